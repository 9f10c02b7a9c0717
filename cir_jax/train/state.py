"""The training state: parameters and optimizer, as plain pytrees laid out on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from cir_jax import mesh as meshes
from cir_jax.config import ModelConfig, OptimConfig
from cir_jax.models import qwen


class TrainState(NamedTuple):
    """num_updates counts applied updates; a step with a non-finite gradient is not applied."""

    params: qwen.Params
    opt_state: Any
    num_updates: Int[Array, ""]


def make_optimizer(cfg: OptimConfig, num_updates: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW. num_updates: length of the schedule."""
    tail = {
        "constant": optax.constant_schedule(cfg.learning_rate),
        "cosine": optax.cosine_decay_schedule(
            cfg.learning_rate, max(1, num_updates - cfg.warmup_steps), alpha=0.1
        ),
    }[cfg.schedule]
    warmup = optax.linear_schedule(0.0, cfg.learning_rate, max(1, cfg.warmup_steps))
    schedule = optax.join_schedules([warmup, tail], [cfg.warmup_steps])
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(schedule, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay),
    )


def init_params(cfg: ModelConfig, mesh: Mesh, seed: int) -> qwen.Params:
    """Random parameters, made where they belong. The same values on every mesh."""
    shardings = qwen.param_shardings(cfg, mesh)
    return jax.jit(lambda key: qwen.init(cfg, key), out_shardings=shardings)(jax.random.key(seed))


def init_state(params: qwen.Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh optimizer; its moments take the layout of the parameters."""
    params = jax.tree.map(jnp.copy, params)  # The state is donated; the caller keeps its own.
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def abstract_state(
    cfg: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, types and layout of a state: the target of a restore."""
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        qwen.abstract_params(cfg),
        qwen.param_shardings(cfg, mesh),
    )
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    by_shape = {x.shape: x.sharding for x in jax.tree.leaves(params)}
    replicated = meshes.sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=by_shape.get(x.shape, replicated)
        ),
        state,
    )
