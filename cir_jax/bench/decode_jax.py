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
from cir_jax.config import MeshConfig, RolloutConfig
from cir_jax.models import hf, qwen
from cir_jax.models.hf_config import from_hf_config
from cir_jax.records import Author
from cir_jax.rollout import decode, fence
from cir_jax.rollout.sampling import row_keys
from cir_jax.train.state import init_params

SEGMENT_STEPS = 64
# No token's id: nothing ends a row before its last token.
_NO_EOS = -1


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
    params, cfg = qwen.for_decoding(params, cfg, dtype)
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (slots, prompt), np.int32)
    table = jnp.full((1, cfg.vocab_size), fence.OUTSIDE, jnp.int8)
    keys = row_keys(0, "bench", 0, np.arange(slots), np.zeros(slots, np.int32))

    def rollout() -> None:
        state = decode.make_slots(cfg=cfg, dtype=dtype, num_slots=slots, length=prompt + new)
        state = _prefill(params, state, prompts, keys, new, cfg)
        for _ in range(0, new, SEGMENT_STEPS):
            state = decode.decode_segment(
                params,
                state,
                table,
                jnp.float32(1),
                jnp.float32(top_p),
                jnp.int32(slots),
                cfg=cfg,
                steps=SEGMENT_STEPS,
                eos_id=_NO_EOS,
            )
            status, length = jax.device_get((state.status, state.length))
        jax.device_get((state.ids, state.author, state.logp))
        if (status != decode.FULL).any() or (length != prompt + new).any():
            raise RuntimeError(f"rows of {length.min()} to {length.max()} tokens")

    return lambda: {"seconds": seconds(rollout)}


def _prefill(params, state, prompts, keys, new, cfg) -> decode.Slots:
    """All prompts into their slots, in launches of the engine's default shape."""
    shape = RolloutConfig()
    R, C = shape.prefill_rows, shape.prefill_chunk
    slots, prompt = prompts.shape
    for first in range(0, slots, R):
        count = min(R, slots - first)

        def padded(values: np.ndarray, fill: int, count: int = count) -> jax.Array:
            widths = [(0, R - count)] + [(0, 0)] * (values.ndim - 1)
            return jnp.asarray(np.pad(values, widths, constant_values=fill))

        rows_R = padded(np.arange(first, first + count, dtype=np.int32), slots)
        full = np.full(count, prompt + new, np.int32)
        no_calls = np.zeros(count, np.int32)
        state = decode.admit(
            state,
            rows_R,
            padded(keys[first : first + count], 0),
            padded(full, 0),
            padded(no_calls, 0),
        )
        for begin in range(0, prompt, C):
            chunk = prompts[first : first + count, begin : begin + C]
            width = chunk.shape[1]
            ids_RC = np.pad(chunk, ((0, R - count), (0, C - width)))
            state = decode.extend(
                params,
                state,
                rows_R,
                jnp.asarray(ids_RC),
                padded(np.full(count, width, np.int32), 0),
                jnp.int32(Author.PROMPT),
                padded(np.full(count, begin + C >= prompt), 0),
                cfg=cfg,
            )
    return state


if __name__ == "__main__":
    serve(start)
