"""Eight virtual CPU devices, strict ranks and shapes, a compilation cache that stays."""

import os
from pathlib import Path

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        # Most of the tests' time goes into compiling programs that run once on tiny arrays: so
        # machine code is made quickly, from the same programs.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/cir_jax/tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes in signatures are checked in the tests only.
install_import_hook(
    [
        "cir_jax.masked",
        "cir_jax.models",
        "cir_jax.rl",
        "cir_jax.rollout.decode",
        "cir_jax.rollout.sampling",
        "cir_jax.train.step",
    ],
    "beartype.beartype",
)

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared():
    """Material beside the checkout: the real Qwen2.5 tokenizer, benchmark sets."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED.name}/ is not beside the checkout")
    return SHARED
