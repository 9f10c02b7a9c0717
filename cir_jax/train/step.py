"""Jitted steps on packed batches: old log-probabilities, and one optimizer update.

Both run device by device over the rows' mesh axes, with the same forward pass on the same
micro-batches, so that the first ratio of an update is exactly 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from cir_jax import mesh as meshes
from cir_jax.config import ComputeConfig, ModelConfig, RLConfig
from cir_jax.masked import masked_sum
from cir_jax.models import logprob, lora, qwen, value
from cir_jax.rl.batch import TrainBatch, micro
from cir_jax.rl.kl import KL
from cir_jax.rl.loss import (
    Metrics,
    importance_weights,
    policy_loss,
    sampler_mismatch,
    sft_loss,
    value_loss,
)
from cir_jax.train.state import TrainState, state_shardings

_ROWS = (None, "batch", "length")


class Given(NamedTuple):
    """What was computed of each token before the step's first update, None where not needed.

    Log-probabilities then (None: they are those of this update) and by the reference model; for
    the critic its values, of the state before the token, and what it is to learn.
    """

    old_logp: Float[Array, "*tokens"] | None = None
    ref_logp: Float[Array, "*tokens"] | None = None
    old_values: Float[Array, "*tokens"] | None = None
    targets: Float[Array, "*tokens"] | None = None


class Counts(NamedTuple):
    """Tokens of the whole mini-batch, at least 1."""

    trained: Float[Array, ""]
    sampled: Float[Array, ""]


# Loss of some tokens: (logp, entropy, batch, given, counts) -> loss, metrics; every array has the
# shape of logp, and both results are sums over tokens (see models/logprob.py for maxima).
LossFn = Callable[..., tuple[Float[Array, ""], Metrics]]


def sft_loss_fn(logp, entropy, batch: TrainBatch, given: Given, counts: Counts):
    return sft_loss(logp, batch.weight, num_tokens=counts.trained)


def rl_loss_fn(cfg: RLConfig) -> LossFn:
    """Clipped surrogate + kl_coef * KL - entropy_coef * entropy, each the same kind of mean."""

    def loss_fn(logp, entropy, batch: TrainBatch, given: Given, counts: Counts):
        old_logp = jax.lax.stop_gradient(logp) if given.old_logp is None else given.old_logp
        sampler = (old_logp, batch.sampler_logp, batch.sampled)
        weight = batch.weight
        if cfg.importance_cap is not None:
            weight = weight * importance_weights(*sampler, cfg.importance_cap)
        loss, metrics = policy_loss(
            logp,
            old_logp,
            batch.advantage,
            batch.trained,
            weight,
            clip_low=cfg.clip_low,
            clip_high=cfg.clip_high,
            dual_clip=cfg.dual_clip,
            num_tokens=counts.trained,
        )
        metrics |= sampler_mismatch(*sampler, counts.sampled)
        if given.ref_logp is not None:
            # An untrained token's difference is 0, so that its gradient is, too.
            ref_logp = jnp.where(batch.trained, given.ref_logp, logp)
            kl = KL[cfg.kl_estimator](logp, ref_logp)
            loss += cfg.kl_coef * masked_sum(kl, batch.weight) / counts.trained
            metrics["ref_kl"] = masked_sum(kl, batch.trained.astype(kl.dtype)) / counts.trained
        if cfg.entropy_coef:
            loss -= cfg.entropy_coef * masked_sum(entropy, batch.weight) / counts.trained
        return loss, metrics

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
    return _of_next(logp)


def batch_values(
    params: qwen.Params, cfg: ModelConfig, compute: ComputeConfig, batch: TrainBatch
) -> Float[Array, "R T"]:
    """The critic's value before each token is drawn; at a segment's first token as above."""
    return _of_next(value.forward(params, cfg, *batch[:3], compute))


def _of_next(x_RT: Array) -> Array:
    """What stands at each token and tells of its successor, moved to that."""
    return jnp.pad(x_RT[:, :-1], ((0, 0), (1, 0)))


def batch_loss(
    loss_fn: LossFn,
    params: qwen.Params,
    cfg: ModelConfig,
    compute: ComputeConfig,
    batch: TrainBatch,
    given: Given,
    temperature: Float[Array, ""] | float,
    counts: Counts,
) -> tuple[Float[Array, ""], Metrics]:
    """Loss and metrics of a micro-batch, the trained tokens' mean entropy among them."""

    def of_tokens(logp_C, entropy_C, args):
        batch, given, counts = args
        loss, metrics = loss_fn(logp_C, entropy_C, batch, given, counts)
        trained = batch.trained.astype(jnp.float32)
        entropy = masked_sum(jax.lax.stop_gradient(entropy_C), trained) / counts.trained
        return loss, {"loss": loss, "entropy": entropy} | metrics

    hidden = qwen.forward(params, cfg, *batch[:3], compute)
    args = (*jax.tree.map(_next, (batch, given)), counts)
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

    def of_micro(params, rows, temperature):
        return batch_logprobs(params, cfg, compute, rows, temperature)

    axes = qwen.param_axes(cfg)
    return _forward_passes(of_micro, axes, params, batch, num_micro, temperature)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def old_values(
    params: qwen.Params,
    batch: TrainBatch,
    num_micro: Int[Array, ""],
    *,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "M R T"]:
    """The critic's values."""

    def of_micro(params, rows):
        return batch_values(params, cfg, compute, rows)

    return _forward_passes(of_micro, value.param_axes(cfg), params, batch, num_micro)


def _forward_passes(of_micro, axes, params, batch, num_micro, *scalars):
    def local(params, batch, num_micro, *scalars):
        def body(m, out_MRT):
            out = of_micro(params, micro(batch, m), *scalars)
            return jax.lax.dynamic_update_index_in_dim(out_MRT, out, m, 0)

        return jax.lax.fori_loop(0, num_micro, body, jnp.zeros(batch.ids.shape, jnp.float32))

    run = meshes.over_rows(local, (axes, _ROWS, (), *(() for _ in scalars)), _ROWS)
    return run(params, batch, num_micro, *scalars)


def gradients(
    cfg: ModelConfig, compute: ComputeConfig, loss_fn: LossFn
) -> Callable[..., tuple[qwen.Params, Metrics]]:
    """The function of (params, batch, given, num_micro, temperature) that returns the
    trained parameters' gradients, and metrics.

    Sums over the first num_micro micro-batches, in which the loss is divided by the trained
    tokens of all of them. Micro-batches are counted, not scanned: how many there are is data.
    """

    def loss(params, rows, given, temperature, counts):
        return batch_loss(loss_fn, params, cfg, compute, rows, given, temperature, counts)

    return _gradients(loss, qwen.param_axes(cfg), cfg)


def value_gradients(
    cfg: ModelConfig, compute: ComputeConfig, clip: float
) -> Callable[..., tuple[qwen.Params, Metrics]]:
    """The same of a critic's parameters and loss; the temperature has no meaning."""

    def loss(params, rows, given, temperature, counts):
        loss, metrics = value_loss(
            batch_values(params, cfg, compute, rows),
            given.old_values,
            given.targets,
            rows.trained,
            rows.weight,
            clip=clip,
            num_tokens=counts.trained,
        )
        return loss, {"loss": loss} | metrics

    return _gradients(loss, value.param_axes(cfg), cfg)


def _gradients(loss_of: Callable, axes: qwen.Params, cfg: ModelConfig):
    trained_axes, frozen_axes = lora.split(axes, cfg)

    def local(trained, frozen, batch, given, num_micro, temperature, counts):
        """Sums over this device's rows, then over all devices."""

        def of_micro(m):
            rows, its = micro(batch, m), micro(given, m)

            def loss(trained):
                return loss_of(lora.join(trained, frozen), rows, its, temperature, counts)

            return jax.grad(loss, has_aux=True)(trained)

        def body(m, total):
            grads, metrics = of_micro(m)
            grads = jax.tree.map(jnp.add, total[0], grads)
            return grads, logprob.combine(jnp.add, jnp.maximum, total[1], metrics)

        shapes = jax.eval_shape(of_micro, jnp.int32(0))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        grads, metrics = jax.lax.fori_loop(0, num_micro, body, zeros)
        grads = jax.tree.map(
            lambda axes, g: meshes.sum_replicas(g, axes),
            trained_axes,
            grads,
            is_leaf=meshes.is_axes,
        )
        return grads, logprob.combine(meshes.sum_rows, meshes.max_rows, metrics)

    def run(params, batch, given, num_micro, temperature):
        counts = Counts(
            *(
                jnp.maximum(jnp.sum(x), 1).astype(jnp.float32)
                for x in (batch.trained, batch.sampled)
            )
        )
        by_device = meshes.over_rows(
            local,
            (trained_axes, frozen_axes, _ROWS, _ROWS, (), (), ()),
            (trained_axes, ()),
        )
        trained, frozen = lora.split(params, cfg)
        return by_device(trained, frozen, batch, given, num_micro, temperature, counts)

    return run


def make_update(
    cfg: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One compiled update: the gradients of all micro-batches, then the optimizer.

    update(state, batch, given, num_micro, temperature) -> state, metrics. The state is
    donated. The number of filled micro-batches changes no shape. A non-finite gradient norm or
    loss leaves the state as it was (metric `skipped`).
    """
    layout = state_shardings(cfg, mesh, optimizer)
    return _make_update(gradients(cfg, compute, loss_fn), cfg, layout, optimizer)


def make_value_update(
    cfg: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    clip: float,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The same for a critic."""
    layout = state_shardings(cfg, mesh, optimizer, value)
    return _make_update(value_gradients(cfg, compute, clip), cfg, layout, optimizer)


def _make_update(gradients: Callable, cfg: ModelConfig, layout: TrainState, optimizer):
    # The state goes out as it came in: another layout would be another program at the next step.

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, None))
    def update(state: TrainState, batch: TrainBatch, given: Given, num_micro, temperature):
        grads, metrics = gradients(state.params, batch, given, num_micro, temperature)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        trained, frozen = lora.split(state.params, cfg)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = lora.join(optax.apply_updates(trained, updates), frozen)
        new = TrainState(params, opt_state, state.num_updates + 1)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return state, metrics | {"grad_norm": norm, "skipped": 1.0 - finite}

    return update
