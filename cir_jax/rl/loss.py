"""Losses: sums over trained tokens divided by the mini-batch's number of them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cir_jax.masked import masked_sum

Metrics = dict[str, Float[Array, ""]]


def policy_loss(
    logp: Float[Array, "*tokens"],
    old_logp: Float[Array, "*tokens"],
    advantage: Float[Array, "*tokens"],
    trained: Bool[Array, "*tokens"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    num_tokens: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped surrogate with separate bounds, summed over trained tokens / num_tokens.

    m = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = exp(logp - old_logp)
    l = min(m, -A dual_clip) where A < 0, else m

    num_tokens is the whole mini-batch's, so micro-batching cannot change the loss.
    Source: DAPO, arXiv:2503.14476, section 3.1; dual clip, arXiv:1912.09729.
    Returns: the loss, and the share of tokens whose gradient each clip removes.
    """
    weight = trained.astype(jnp.float32)
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
        return masked_sum(x.astype(jnp.float32), weight) / num_tokens

    metrics = {
        "clip_high_share": share((clipped > plain) & (advantage > 0)),
        "clip_low_share": share((clipped > plain) & (advantage < 0)),
        "dual_clip_share": share((dual < bounded) & (advantage < 0)),
        "ratio_mean": share(ratio),
        # k3 estimate of KL(old || new). Source: http://joschu.net/blog/kl-approx.html
        "old_new_kl": share(ratio - 1 - log_ratio),
    }
    return masked_sum(loss, weight) / num_tokens, metrics


def sft_loss(
    logp: Float[Array, "*tokens"],
    trained: Bool[Array, "*tokens"],
    *,
    num_tokens: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], Metrics]:
    """Negative log-likelihood of the trained tokens, summed / num_tokens."""
    return -masked_sum(logp, trained.astype(jnp.float32)) / num_tokens, {}
