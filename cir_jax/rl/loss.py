"""Losses: weighted sums over trained tokens divided by the mini-batch's number of them.

A token's weight tells what kind of mean the loss is: 1 for the mean over tokens. Weights are
made on the host, for the whole mini-batch: neither packing, nor micro-batches, nor the order of
rows can change the loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cir_jax.masked import masked_sum
from cir_jax.rl.kl import k3

Metrics = dict[str, Float[Array, ""]]


# --- means: weights of the tokens of S sequences, relative to the mean over all N tokens


def token_mean(counts_S: Int[np.ndarray, " S"], length: int) -> Float[np.ndarray, " S"]:
    """sum / N. Source: DAPO, arXiv:2503.14476, section 3.3."""
    return np.ones(len(counts_S))


def sequence_mean(counts_S: Int[np.ndarray, " S"], length: int) -> Float[np.ndarray, " S"]:
    """Mean over sequences of the mean over their tokens. Source: GRPO, arXiv:2402.03300."""
    return sequence_sum(counts_S, length) / np.maximum(counts_S, 1)


def sequence_sum(counts_S: Int[np.ndarray, " S"], length: int) -> Float[np.ndarray, " S"]:
    """Mean over sequences of the sum over their tokens; those without a token do not count."""
    return np.full(len(counts_S), counts_S.sum() / max(np.count_nonzero(counts_S), 1))


def constant(counts_S: Int[np.ndarray, " S"], length: int) -> Float[np.ndarray, " S"]:
    """The same divided by a length that is none of theirs. Source: Dr. GRPO, arXiv:2503.20783."""
    return sequence_sum(counts_S, length) / length


LOSS_MEANS: dict[str, Callable[..., Float[np.ndarray, " S"]]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant": constant,
}


# --- losses


def policy_loss(
    logp: Float[Array, "*tokens"],
    old_logp: Float[Array, "*tokens"],
    advantage: Float[Array, "*tokens"],
    trained: Bool[Array, "*tokens"],
    weight: Float[Array, "*tokens"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    num_tokens: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped surrogate with separate bounds, summed with weights / num_tokens.

    m = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = exp(logp - old_logp)
    l = min(m, -A dual_clip) where A < 0, else m

    weight: 0 where a token is not trained. num_tokens: trained tokens of the whole mini-batch.
    Source: DAPO, arXiv:2503.14476, section 3.1; dual clip, arXiv:1912.09729.
    Returns: the loss, and the share of tokens whose gradient each clip removes.
    """
    # An untrained token's ratio is 1, so that its gradient is exactly zero and never nan.
    # Beyond e^20 both clips hold, whatever the sign of A: the bound changes nothing, but keeps
    # exp finite, whose gradient would be 0 * inf.
    log_ratio = jnp.where(trained, jnp.minimum(logp - old_logp, 20.0), 0.0)
    ratio = jnp.exp(log_ratio)
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    bounded = jnp.maximum(plain, clipped)
    dual = jnp.minimum(bounded, -advantage * dual_clip)
    loss = jnp.where(advantage < 0, dual, bounded)

    def share(x):
        return masked_sum(x.astype(jnp.float32), trained.astype(jnp.float32)) / num_tokens

    metrics = {
        "clip_high_share": share((clipped > plain) & (advantage > 0)),
        "clip_low_share": share((clipped > plain) & (advantage < 0)),
        "dual_clip_share": share((dual < bounded) & (advantage < 0)),
        "ratio_mean": share(ratio),
        # k3 estimate of KL(old || new). Source: http://joschu.net/blog/kl-approx.html
        "old_new_kl": share(ratio - 1 - log_ratio),
    }
    return masked_sum(loss, weight) / num_tokens, metrics


def importance_weights(
    old_logp: Float[Array, "*tokens"],
    sampler_logp: Float[Array, "*tokens"],
    sampled: Bool[Array, "*tokens"],
    cap: float,
) -> Float[Array, "*tokens"]:
    """min(exp(old_logp - sampler_logp), cap), without a gradient; 1 where nobody sampled.

    Corrects for a sampler whose probabilities are not the trainer's: of another precision, say.
    Source: truncated importance sampling, Ionides 2008, doi:10.1198/106186008X320456.
    """
    log_ratio = jnp.where(sampled, jnp.minimum(old_logp - sampler_logp, 20.0), 0.0)
    return jax.lax.stop_gradient(jnp.where(sampled, jnp.minimum(jnp.exp(log_ratio), cap), 1.0))


def sampler_mismatch(
    old_logp: Float[Array, "*tokens"],
    sampler_logp: Float[Array, "*tokens"],
    sampled: Bool[Array, "*tokens"],
    num_sampled: Float[Array, ""] | float,
) -> Metrics:
    """How far the sampler's log-probabilities are from the trainer's: the largest difference,
    the mean one, and k3's estimate of KL(sampler || trainer)."""
    sampler_logp = jnp.where(sampled, sampler_logp, 0.0)
    old_logp = jax.lax.stop_gradient(jnp.where(sampled, old_logp, 0.0))
    difference = jnp.abs(old_logp - sampler_logp)
    return {
        "sampler_mismatch_max": jnp.max(difference, initial=0.0),
        "sampler_mismatch_mean": jnp.sum(difference) / num_sampled,
        "sampler_kl": jnp.sum(k3(sampler_logp, old_logp)) / num_sampled,
    }


def value_loss(
    values: Float[Array, "*tokens"],
    old_values: Float[Array, "*tokens"],
    targets: Float[Array, "*tokens"],
    trained: Bool[Array, "*tokens"],
    weight: Float[Array, "*tokens"],
    *,
    clip: float,
    num_tokens: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], Metrics]:
    """Squared error of the critic's values, the larger of theirs and of the clipped ones'.

    l = max((V - target)^2, (clip(V, V_old - clip, V_old + clip) - target)^2) / 2,
    summed with weights / num_tokens.

    Source: Implementation Matters, arXiv:2005.12729, section 3, as PPO's code has it.
    Returns: the loss, and the share of tokens whose gradient the clip removes.
    """
    values = jnp.where(trained, values, 0.0)
    old_values, targets = (jnp.where(trained, x, 0.0) for x in (old_values, targets))
    free = (values - targets) ** 2
    clipped = (jnp.clip(values, old_values - clip, old_values + clip) - targets) ** 2
    share = jnp.sum((clipped > free).astype(values.dtype)) / num_tokens
    loss = masked_sum(jnp.maximum(free, clipped) / 2, weight) / num_tokens
    return loss, {"clip_share": share, "mean": jnp.sum(values) / num_tokens}


def sft_loss(
    logp: Float[Array, "*tokens"],
    weight: Float[Array, "*tokens"],
    *,
    num_tokens: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], Metrics]:
    """Negative log-likelihood of the trained tokens, summed with weights / num_tokens."""
    return -masked_sum(logp, weight) / num_tokens, {}
