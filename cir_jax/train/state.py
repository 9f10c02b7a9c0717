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


def state_shardings(
    cfg: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Layout of a state: the optimizer's moments lie as their parameters, scalars everywhere."""
    params = qwen.param_shardings(cfg, mesh)
    everywhere = meshes.sharding(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, qwen.abstract_params(cfg)),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(params, opt_state, everywhere)


def init_state(
    params: qwen.Params, cfg: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """The parameters with a fresh optimizer. The arrays are new: the state may be donated."""

    def fresh(params):
        return TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0))

    return jax.jit(fresh, out_shardings=state_shardings(cfg, mesh, optimizer))(params)


def abstract_state(
    cfg: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, types and layout of a state: the target of a restore."""
    params = qwen.abstract_params(cfg)
    state = TrainState(
        params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), jnp.int32)
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_shardings(cfg, mesh, optimizer),
    )
