"""The training state: parameters and optimizer, as plain pytrees laid out on the mesh."""

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from cir_jax import mesh as meshes
from cir_jax.config import ComputeConfig, ModelConfig, OptimConfig
from cir_jax.models import lora, qwen


class TrainState(NamedTuple):
    """num_updates counts applied updates; a step with a non-finite gradient is not applied."""

    params: qwen.Params
    opt_state: Any
    num_updates: Int[Array, ""]


def make_optimizer(cfg: OptimConfig, num_updates: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW. num_updates: length of the schedule; no part of the state
    depends on it."""
    # Rounded first: as floats, some products lie just above the whole number that is meant.
    share = math.ceil(round(cfg.warmup_share * num_updates, 6))
    warmup_steps = cfg.warmup_steps or share
    tail = {
        "constant": optax.constant_schedule(cfg.learning_rate),
        "cosine": optax.cosine_decay_schedule(
            cfg.learning_rate, max(1, num_updates - warmup_steps), alpha=cfg.final_share
        ),
    }[cfg.schedule]
    warmup = optax.linear_schedule(0.0, cfg.learning_rate, max(1, warmup_steps))
    schedule = optax.join_schedules([warmup, tail], [warmup_steps])
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        adam if cfg.moments == "float32" else with_bfloat16_moments(adam),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def with_bfloat16_moments(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moments are kept in bfloat16 between updates, rounded stochastically.

    To the nearest, a second moment would stand still: at beta2 = 0.999 an update changes it by
    a thousandth, and bfloat16's steps are up to a 128th.
    """

    def cast(state: optax.ScaleByAdamState, to: Any) -> optax.ScaleByAdamState:
        return state._replace(mu=to(state.mu, 0), nu=to(state.nu, 1))

    def widen(tree, _):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params):
        def narrow(tree, _):
            return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

        return cast(adam.init(params), narrow)

    def update(updates, state, params=None):
        updates, state = adam.update(updates, cast(state, widen), params)

        def narrow(tree, which):
            key = jax.random.fold_in(jax.random.key(which), state.count)
            leaves, structure = jax.tree.flatten(tree)
            return structure.unflatten(
                stochastic_bfloat16(x, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)
            )

        return updates, cast(state, narrow)

    return optax.GradientTransformation(init, update)


def stochastic_bfloat16(x: Array, key: Array) -> Array:
    """A float32 array as one of its two neighbours in bfloat16 each; in the mean x itself.

    bfloat16 is float32 without its lower 16 bits: a uniform number added to them carries into
    the upper ones as often as the value lies near the upper neighbour. Finite x only.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (bits >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


def init_params(cfg: ModelConfig, mesh: Mesh, seed: int) -> qwen.Params:
    """Random parameters, made where they belong. The same values on every mesh."""
    shardings = qwen.param_shardings(cfg, mesh)
    return jax.jit(lambda key: qwen.init(cfg, key), out_shardings=shardings)(jax.random.key(seed))


# --- states; kind: the module that knows the tree of the parameters, qwen's or a critic's


def state_shardings(
    cfg: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation, kind: ModuleType = qwen
) -> TrainState:
    """Layout of a state: the optimizer's moments lie as their parameters, scalars everywhere."""
    params = kind.param_shardings(cfg, mesh)
    trained, _ = lora.split(params, cfg)
    everywhere = meshes.sharding(mesh)

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    opt_state = jax.tree.map(
        lambda x: (
            x._replace(count=everywhere, mu=trained, nu=trained) if is_adam(x) else everywhere
        ),
        jax.eval_shape(optimizer.init, lora.split(kind.abstract_params(cfg), cfg)[0]),
        is_leaf=is_adam,
    )
    return TrainState(params, opt_state, everywhere)


def init_state(
    params: qwen.Params,
    cfg: ModelConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    kind: ModuleType = qwen,
) -> TrainState:
    """The parameters with a fresh optimizer. The arrays are new: the state may be donated."""

    def fresh(params):
        opt_state = optimizer.init(lora.split(params, cfg)[0])
        return TrainState(jax.tree.map(jnp.copy, params), opt_state, jnp.int32(0))

    return jax.jit(fresh, out_shardings=state_shardings(cfg, mesh, optimizer, kind))(params)


def abstract_state(
    cfg: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation, kind: ModuleType = qwen
) -> TrainState:
    """Shapes, types and layout of a state: the target of a restore."""
    params = kind.abstract_params(cfg)
    opt_state = jax.eval_shape(optimizer.init, lora.split(params, cfg)[0])
    state = TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_shardings(cfg, mesh, optimizer, kind),
    )


def reference_params(
    params: qwen.Params, cfg: ModelConfig, compute: ComputeConfig, mesh: Mesh
) -> qwen.Params:
    """Copies for forward passes alone, in the type that these use them in: what they compute is
    the same to the bit."""
    cast = functools.partial(_in_compute_type, compute=compute)
    return jax.jit(cast, out_shardings=qwen.param_shardings(cfg, mesh))(params)


def abstract_reference(cfg: ModelConfig, compute: ComputeConfig, mesh: Mesh) -> qwen.Params:
    """Shapes, types and layout of such copies: the target of a restore."""
    shapes = jax.eval_shape(
        functools.partial(_in_compute_type, compute=compute), qwen.abstract_params(cfg)
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        qwen.param_shardings(cfg, mesh),
    )


def _in_compute_type(params: qwen.Params, compute: ComputeConfig) -> qwen.Params:
    def cast(path, x: Array) -> Array:
        # The norms' scales are used in float32.
        return jnp.copy(x) if path[-1].key == "scale" else x.astype(compute.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
