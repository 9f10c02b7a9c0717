"""What rollouts compile: the jitted functions, with the arguments that a config gives them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from cir_jax import mesh as meshes
from cir_jax.config import ModelConfig, RolloutConfig
from cir_jax.jitted import Jitted, abstract
from cir_jax.models import qwen
from cir_jax.rollout import decode, fence
from cir_jax.rollout.sampling import Sampling


def cache_dtype(cfg: RolloutConfig, dtype: str) -> str:
    """dtype: that decoding computes in."""
    return dtype if cfg.cache_dtype == "compute" else cfg.cache_dtype


@functools.lru_cache
def decoding_weights(model: ModelConfig, dtype: str) -> Callable[[qwen.Params], qwen.Params]:
    """The function that makes a trainer's parameters those of decoding, on decoding's mesh."""
    return jax.jit(lambda params: qwen.for_decoding(params, model, dtype)[0])


def advance_options(
    cfg: RolloutConfig, model: ModelConfig, end_ids: tuple[int, ...]
) -> dict[str, Any]:
    """What of `decode.advance` is fixed when it is compiled, on the mesh of `jax.set_mesh`."""
    return {
        "cfg": model,
        "steps": cfg.segment_steps,
        "end_ids": end_ids,
        "prefill_rows": -(-cfg.prefill_rows // meshes.num_row_shards()),
        "prefill_chunk": cfg.prefill_chunk,
    }


def no_work(num_slots: int, width: int) -> decode.Work:
    """For `decode.advance`, of so many slots and texts of at most `width` tokens: nothing to do."""

    def zeros(dtype, *shape: int) -> np.ndarray:
        return np.zeros((num_slots, *shape), dtype)

    return decode.Work(
        ends=zeros(bool),
        enters=zeros(bool),
        max_length=zeros(np.int32),
        calls_left=zeros(np.int32),
        keys=zeros(np.uint32, 2),
        sampling=Sampling(zeros(np.float32), zeros(np.float32), zeros(np.int32), zeros(np.float32)),
        ids=zeros(np.int32, width),
        count=zeros(np.int32),
        source=np.full(num_slots, -1, np.int32),
        is_output=zeros(bool),
        is_last=zeros(bool),
        queued=zeros(np.int32),
    )


def nothing_forced(num_slots: int, width: int) -> Int[np.ndarray, "B F"]:
    """For `decode.advance`: all tokens are sampled."""
    return np.full((num_slots, width), -1, np.int32)


def max_stopped(cfg: RolloutConfig) -> Int[Array, ""]:
    return jnp.int32(int(cfg.return_share * cfg.slots))


def jitted(
    cfg: RolloutConfig,
    model: ModelConfig,
    params: qwen.Params,
    *,
    dtype: str,
    end_ids: tuple[int, ...],
    max_prompt_tokens: int,
    max_length: int,
    mesh: Mesh,
) -> list[Jitted]:
    """The programs of a rollout whose rows are all sampled: weights, empty slots, advance.

    params: the trainer's, abstract. mesh: of decoding. max_length: tokens of the longest row.
    """
    cast = decoding_weights(model, dtype)
    merged = model.model_copy(update={"lora": None})
    with jax.set_mesh(mesh):
        weights = jax.eval_shape(cast, params)
        weights = abstract(mesh, qwen.decoding_axes(weights, merged), weights)
        shape = {
            "cfg": merged,
            "dtype": cache_dtype(cfg, dtype),
            "num_slots": cfg.slots,
            "length": max_length,
        }
        slots = jax.eval_shape(functools.partial(decode.make_slots, **shape))
        slots = abstract(mesh, decode.slots_axes(shape["dtype"]), slots)
        num_states = len(fence.BOUNDARIES[cfg.boundary].byte_table)
        args = (
            weights,
            slots,
            abstract(mesh, ("batch",), no_work(cfg.slots, max_prompt_tokens)),
            abstract(mesh, (), jax.ShapeDtypeStruct((num_states, model.vocab_size), jnp.int8)),
            abstract(mesh, ("batch",), nothing_forced(cfg.slots, 1)),
            abstract(mesh, (), jax.ShapeDtypeStruct((), jnp.int32)),
        )
        options = advance_options(cfg, merged, end_ids)
    return [
        Jitted("weights", cast, (params,), {}, mesh, {0: "policy"}),
        Jitted("slots", decode.make_slots, (), shape, mesh, {}),
        Jitted("rollout", decode.advance, args, options, mesh, {}),
    ]
