"""The contender of `bench decode` that is this package: the engine's own jitted functions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax import mesh as meshes
from cir_jax.bench.ceiling import seconds
from cir_jax.bench.contest import Figures, serve
from cir_jax.config import MeshConfig, ModelConfig, RolloutConfig
from cir_jax.models import hf, qwen
from cir_jax.models.hf_config import from_hf_config
from cir_jax.rollout import decode, fence
from cir_jax.rollout.sampling import Sampling, row_keys
from cir_jax.train.state import init_params

SEGMENT_STEPS = 64


def start(
    *,
    config: dict[str, Any],
    directory: str,
    slots: int,
    prompt: int,
    new: int,
    dtype: str,
    top_p: float,
) -> Callable[[], Figures]:
    """config: a config.json; directory: of the weights, "" for random ones."""
    cfg = from_hf_config(config)
    mesh = meshes.make_mesh(MeshConfig(fsdp=jax.device_count()))
    jax.set_mesh(mesh)
    params = hf.load(Path(directory), cfg, mesh) if directory else init_params(cfg, mesh, 0)
    params = jax.jit(lambda params: qwen.for_decoding(params, cfg, dtype)[0])(params)
    table = jnp.full((1, cfg.vocab_size), fence.OUTSIDE, jnp.int8)
    work = _prompts(cfg, slots, prompt, new, top_p)
    idle = work._replace(enters=np.zeros_like(work.enters), count=np.zeros_like(work.count))
    shape = RolloutConfig()

    def advance(state: decode.Slots, work: decode.Work) -> tuple[decode.Slots, decode.Report]:
        return decode.advance(
            params,
            state,
            meshes.put_rows(work),
            table,
            meshes.put_rows(np.full((slots, 1), -1, np.int32)),
            jnp.int32(slots),
            cfg=cfg,
            steps=SEGMENT_STEPS,
            end_ids=(),
            prefill_rows=shape.prefill_rows,
            prefill_chunk=shape.prefill_chunk,
        )

    def rollout() -> None:
        state = decode.make_slots(cfg=cfg, dtype=dtype, num_slots=slots, length=prompt + new)
        state, report = advance(state, work)
        for _ in range(SEGMENT_STEPS, new, SEGMENT_STEPS):
            state, report = advance(state, idle)
            jax.device_get((report.ids, report.logp))
        status, length = jax.device_get((report.status, report.length))
        if (status != decode.FULL).any() or (length != prompt + new).any():
            raise RuntimeError(f"rows of {length.min()} to {length.max()} tokens")

    return lambda: {"seconds": seconds(rollout)}


def _prompts(cfg: ModelConfig, slots: int, prompt: int, new: int, top_p: float) -> decode.Work:
    """Random prompts into all slots."""

    def full(value, dtype) -> np.ndarray:
        return np.full(slots, value, dtype)

    return decode.Work(
        ends=full(False, bool),
        enters=full(True, bool),
        max_length=full(prompt + new, np.int32),
        calls_left=full(0, np.int32),
        keys=row_keys(0, "bench", 0, np.arange(slots), np.zeros(slots, np.int32)),
        sampling=Sampling(
            full(1, np.float32), full(top_p, np.float32), full(0, np.int32), full(0, np.float32)
        ),
        ids=np.random.default_rng(0).integers(0, cfg.vocab_size, (slots, prompt), np.int32),
        count=full(prompt, np.int32),
        source=full(-1, np.int32),
        is_output=full(False, bool),
        is_last=full(True, bool),
        queued=full(0, np.int32),
    )


if __name__ == "__main__":
    serve(start)
