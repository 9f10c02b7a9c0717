"""Jitted steps on packed batches: old log-probabilities, and one optimizer update."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from cir_jax.config import ModelConfig, RLConfig
from cir_jax.masked import masked_sum
from cir_jax.mesh import constrain
from cir_jax.models import logprob, qwen
from cir_jax.rl.batch import TrainBatch, micro
from cir_jax.rl.loss import Metrics, policy_loss, sft_loss
from cir_jax.train.state import TrainState, state_shardings

# Loss of one micro-batch: (logp_BT, batch, old_logp_BT, num_tokens) -> loss, metrics.
LossFn = Callable[..., tuple[Float[Array, ""], Metrics]]


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


def batch_logprobs(
    params: qwen.Params, cfg: ModelConfig, batch: TrainBatch, temperature
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-probability of each token given those before it in its segment, and the entropy of
    the distribution it was drawn from; both 0 at the first token of a row."""
    rows = [constrain(x, "batch", "length") for x in batch[:3]]
    hidden = qwen.forward(params, cfg, *rows)
    logp, entropy = logprob.token_logprobs(
        hidden[:, :-1], qwen.head_table(params), batch.ids[:, 1:], temperature
    )
    return jnp.pad(logp, ((0, 0), (1, 0))), jnp.pad(entropy, ((0, 0), (1, 0)))


@functools.partial(jax.jit, static_argnames=("cfg",))
def old_logprobs(
    params: qwen.Params,
    batch: TrainBatch,
    num_micro: Int[Array, ""],
    temperature: Float[Array, ""],
    *,
    cfg: ModelConfig,
) -> Float[Array, "M R T"]:
    """The trainer's own log-probabilities, in the micro-batches of the update.

    Same shapes and same program as in the update, so that its first ratio is exactly 1.
    """

    def body(m, logp_MRT):
        logp, _ = batch_logprobs(params, cfg, micro(batch, m), temperature)
        return jax.lax.dynamic_update_index_in_dim(logp_MRT, logp, m, 0)

    return jax.lax.fori_loop(0, num_micro, body, jnp.zeros(batch.ids.shape, jnp.float32))


def make_update(
    cfg: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation, loss_fn: LossFn
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One compiled update: gradients summed over the filled micro-batches, then the optimizer.

    update(state, batch, old_logp_MRT, num_micro, temperature) -> state, metrics. The state is
    donated. num_micro is data: the number of filled micro-batches changes no shape. A
    non-finite gradient norm leaves the state as it was (metric `skipped`).
    """

    def micro_loss(params, batch: TrainBatch, old_logp, temperature, num_tokens):
        logp, entropy = batch_logprobs(params, cfg, batch, temperature)
        loss, metrics = loss_fn(logp, batch, old_logp, num_tokens)
        weight = batch.trained.astype(jnp.float32)
        entropy = masked_sum(jax.lax.stop_gradient(entropy), weight) / num_tokens
        return loss, {"loss": loss, "entropy": entropy} | metrics

    grad_fn = jax.value_and_grad(micro_loss, has_aux=True)

    # The state goes out as it came in: another layout would be another program at the next step.
    layout = state_shardings(cfg, mesh, optimizer)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, None))
    def update(state: TrainState, batch: TrainBatch, old_logp, num_micro, temperature):
        num_tokens = jnp.maximum(jnp.sum(batch.trained), 1).astype(jnp.float32)

        def one(m):
            old = jax.lax.dynamic_index_in_dim(old_logp, m, keepdims=False)
            return grad_fn(state.params, micro(batch, m), old, temperature, num_tokens)

        def body(m, total):
            (_, metrics), grads = one(m)
            return jax.tree.map(jnp.add, total, (metrics, grads))

        (_, metrics), grads = jax.eval_shape(one, jnp.int32(0))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (metrics, grads))
        metrics, grads = jax.lax.fori_loop(0, num_micro, body, zeros)

        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(params, opt_state, state.num_updates + 1)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return state, metrics | {"grad_norm": norm, "skipped": 1.0 - finite}

    return update
