"""Published models by name, as their config.json gives them on the Hugging Face hub.

The base models. Some instruction-tuned siblings say another norm_eps or context: what a checkpoint
itself says is read by cir_jax/models/hf_config.py.
"""

import difflib

from cir_jax.config.model import ModelConfig


def _qwen2(
    num_layers: int, width: int, num_heads: int, num_kv_heads: int, mlp_width: int, **other
) -> ModelConfig:
    """Qwen2.5: the sizes from 7B on have a wider vocabulary table and a head of their own."""
    large = width >= 3584
    sizes = {
        "num_layers": num_layers,
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": width // num_heads,
        "mlp_width": mlp_width,
        "vocab_size": 152064 if large else 151936,
        "tied_embeddings": not large,
        "rope_theta": 1e6,
        "norm_eps": 1e-5 if width >= 5120 else 1e-6,
    }
    return ModelConfig(**(sizes | other))


def _qwen3(
    num_layers: int, width: int, num_heads: int, mlp_width: int, tied_embeddings: bool
) -> ModelConfig:
    """Qwen3 dense: heads of 128, whatever width / num_heads is."""
    return ModelConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=mlp_width,
        vocab_size=151936,
        tied_embeddings=tied_embeddings,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=False,
        qk_norm=True,
        max_positions=40960,
    )


# num_layers, width, num_heads, num_kv_heads, mlp_width
_QWEN2_SIZES = {
    "0.5B": (24, 896, 14, 2, 4864),
    "1.5B": (28, 1536, 12, 2, 8960),
    "3B": (36, 2048, 16, 2, 11008),
    "7B": (28, 3584, 28, 4, 18944),
    "14B": (48, 5120, 40, 8, 13824),
    "32B": (64, 5120, 40, 8, 27648),
    "72B": (80, 8192, 64, 8, 29568),
}
_LONG = {"max_positions": 131072}
_MATH = {"rope_theta": 1e4, "max_positions": 4096}
# The two small distillations start from Qwen2.5-Math; the 1.5B stores a head of its own.
_DISTILL_MATH = {"rope_theta": 1e4, "tied_embeddings": False} | _LONG

PRESETS = {
    # What benchmarks and memory measurements on a CPU use.
    "bench": ModelConfig(
        num_layers=8,
        width=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=2048,
        vocab_size=151936,
        rope_theta=1e6,
    ),
    # The same where many steps count, not one's time. As in large models, reading the cache takes
    # a small part of a step's.
    "bench-small": ModelConfig(
        num_layers=2,
        width=512,
        num_heads=8,
        num_kv_heads=1,
        head_dim=32,
        mlp_width=2048,
        vocab_size=1024,
        rope_theta=1e6,
    ),
    **{
        f"Qwen2.5-{size}": _qwen2(*sizes, **({} if size in ("0.5B", "3B") else _LONG))
        for size, sizes in _QWEN2_SIZES.items()
    },
    **{
        f"Qwen2.5-Math-{size}": _qwen2(*_QWEN2_SIZES[size], **_MATH)
        for size in ("1.5B", "7B", "72B")
    },
    **{
        f"Qwen2.5-Coder-{size}": _qwen2(*_QWEN2_SIZES[size])
        for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B")
    },
    **{
        f"DeepSeek-R1-Distill-Qwen-{size}": _qwen2(*_QWEN2_SIZES[size], **other)
        for size, other in {
            "1.5B": _DISTILL_MATH,
            "7B": _DISTILL_MATH,
            "14B": _LONG,
            "32B": _LONG,
        }.items()
    },
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, True),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, True),
    "Qwen3-4B": _qwen3(36, 2560, 32, 9728, True),
    "Qwen3-8B": _qwen3(36, 4096, 32, 12288, False),
    "Qwen3-14B": _qwen3(40, 5120, 40, 17408, False),
    "Qwen3-32B": _qwen3(64, 5120, 64, 25600, False),
}


def preset(name: str) -> ModelConfig:
    """The model of a name in PRESETS. Raises ValueError with the nearest name."""
    if name not in PRESETS:
        lower = {known.lower(): known for known in PRESETS}
        near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)
        hint = f"nearest: {lower[near[0]]}" if near else f"known: {', '.join(PRESETS)}"
        raise ValueError(f"preset={name!r}: unknown; {hint}")
    return PRESETS[name]
