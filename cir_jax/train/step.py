"""Jitted steps on packed batches: old log-probabilities, and one optimizer update.

Both run device by device over the rows' mesh axes, with the same forward pass on the same
micro-batches, so that the first ratio of an update is exactly 1.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from cir_jax import mesh as meshes
from cir_jax.config import ComputeConfig, ModelConfig, RLConfig
from cir_jax.masked import masked_sum
from cir_jax.models import logprob, lora, qwen
from cir_jax.rl.batch import TrainBatch, micro
from cir_jax.rl.loss import Metrics, policy_loss, sft_loss
from cir_jax.train.state import TrainState, state_shardings

# Loss of some tokens: (logp, batch, old_logp, num_tokens) -> loss, metrics; every array has the
# shape of logp, and both results are sums over tokens.
LossFn = Callable[..., tuple[Float[Array, ""], Metrics]]

_ROWS = (None, "batch", "length")


def sft_loss_fn(logp, batch: TrainBatch, old_logp, num_tokens):
    return sft_loss(logp, batch.trained, num_tokens=num_tokens)


def rl_loss_fn(cfg: RLConfig) -> LossFn:
    def loss_fn(logp, batch: TrainBatch, old_logp, num_tokens):
        return policy_loss(
            logp,
            old_logp,
            batch.advantage,
            batch.trained,
            clip_low=cfg.clip_low,
            clip_high=cfg.clip_high,
            dual_clip=cfg.dual_clip,
            num_tokens=num_tokens,
        )

    return loss_fn


def _next(x_RT: Array) -> Array:
    """What is told of each token's successor in the row; 0 at the end."""
    return jnp.pad(x_RT[:, 1:], ((0, 0), (0, 1)))


def batch_logprobs(
    params: qwen.Params,
    cfg: ModelConfig,
    compute: ComputeConfig,
    batch: TrainBatch,
    temperature: Float[Array, ""] | float,
) -> Float[Array, "R T"]:
    """Log-probability of each token given those before it in its segment.

    At a segment's first token it means nothing, and is 0 at a row's.
    """
    hidden = qwen.forward(params, cfg, *batch[:3], compute)
    table = qwen.head_table(params)
    logp, _ = logprob.token_logprobs(hidden, table, _next(batch.ids), temperature)
    return jnp.pad(logp[:, :-1], ((0, 0), (1, 0)))


def batch_loss(
    loss_fn: LossFn,
    params: qwen.Params,
    cfg: ModelConfig,
    compute: ComputeConfig,
    batch: TrainBatch,
    old_logp: Float[Array, "R T"],
    temperature: Float[Array, ""] | float,
    num_tokens: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], Metrics]:
    """Loss and metrics of a micro-batch, the trained tokens' mean entropy among them."""

    def of_tokens(logp_C, entropy_C, args):
        batch, old_logp, num_tokens = args
        loss, metrics = loss_fn(logp_C, batch, old_logp, num_tokens)
        weight = batch.trained.astype(jnp.float32)
        entropy = masked_sum(jax.lax.stop_gradient(entropy_C), weight) / num_tokens
        return loss, {"loss": loss, "entropy": entropy} | metrics

    hidden = qwen.forward(params, cfg, *batch[:3], compute)
    successors = jax.tree.map(_next, (batch, old_logp))
    args = (*successors, jnp.float32(num_tokens))
    table = qwen.head_table(params)
    return logprob.token_loss(of_tokens, hidden, table, _next(batch.ids), args, temperature)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def old_logprobs(
    params: qwen.Params,
    batch: TrainBatch,
    num_micro: Int[Array, ""],
    temperature: Float[Array, ""],
    *,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "M R T"]:
    """The trainer's own log-probabilities, in the micro-batches of the update."""

    def local(params, batch, num_micro, temperature):
        def body(m, logp_MRT):
            logp = batch_logprobs(params, cfg, compute, micro(batch, m), temperature)
            return jax.lax.dynamic_update_index_in_dim(logp_MRT, logp, m, 0)

        return jax.lax.fori_loop(0, num_micro, body, jnp.zeros(batch.ids.shape, jnp.float32))

    run = meshes.over_rows(local, (qwen.param_axes(cfg), _ROWS, (), ()), _ROWS)
    return run(params, batch, num_micro, temperature)


def gradients(
    cfg: ModelConfig, compute: ComputeConfig, loss_fn: LossFn
) -> Callable[..., tuple[qwen.Params, Metrics]]:
    """The function of (params, batch, old_logp_MRT, num_micro, temperature) that returns the
    trained parameters' gradients, and metrics.

    Sums over the first num_micro micro-batches, in which the loss is divided by the trained
    tokens of all of them. Micro-batches are counted, not scanned: how many there are is data.
    """
    trained_axes, frozen_axes = lora.split(qwen.param_axes(cfg), cfg)

    def local(trained, frozen, batch, old_logp, num_micro, temperature, num_tokens):
        """Sums over this device's rows, then over all devices."""

        def of_micro(m):
            old = jax.lax.dynamic_index_in_dim(old_logp, m, keepdims=False)
            rows = micro(batch, m)

            def loss(trained):
                params = lora.join(trained, frozen)
                return batch_loss(loss_fn, params, cfg, compute, rows, old, temperature, num_tokens)

            return jax.grad(loss, has_aux=True)(trained)

        def body(m, total):
            return jax.tree.map(jnp.add, total, of_micro(m))

        shapes = jax.eval_shape(of_micro, jnp.int32(0))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        grads, metrics = jax.lax.fori_loop(0, num_micro, body, zeros)
        grads = jax.tree.map(
            lambda axes, g: meshes.sum_replicas(g, axes),
            trained_axes,
            grads,
            is_leaf=meshes.is_axes,
        )
        return grads, jax.tree.map(meshes.sum_rows, metrics)

    def run(params, batch, old_logp, num_micro, temperature):
        num_tokens = jnp.maximum(jnp.sum(batch.trained), 1).astype(jnp.float32)
        by_device = meshes.over_rows(
            local,
            (trained_axes, frozen_axes, _ROWS, _ROWS, (), (), ()),
            (trained_axes, ()),
        )
        trained, frozen = lora.split(params, cfg)
        return by_device(trained, frozen, batch, old_logp, num_micro, temperature, num_tokens)

    return run


def make_update(
    cfg: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One compiled update: the gradients of all micro-batches, then the optimizer.

    update(state, batch, old_logp_MRT, num_micro, temperature) -> state, metrics. The state is
    donated. The number of filled micro-batches changes no shape. A non-finite gradient norm
    leaves the state as it was (metric `skipped`).
    """
    # The state goes out as it came in: another layout would be another program at the next step.
    layout = state_shardings(cfg, mesh, optimizer)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, None))
    def update(state: TrainState, batch: TrainBatch, old_logp, num_micro, temperature):
        grads, metrics = gradients(cfg, compute, loss_fn)(
            state.params, batch, old_logp, num_micro, temperature
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        trained, frozen = lora.split(state.params, cfg)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = lora.join(optax.apply_updates(trained, updates), frozen)
        new = TrainState(params, opt_state, state.num_updates + 1)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return state, metrics | {"grad_norm": norm, "skipped": 1.0 - finite}

    return update
