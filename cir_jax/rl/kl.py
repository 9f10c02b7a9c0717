"""Estimates of KL(policy || reference) from log-probabilities of the policy's tokens.

Each has this divergence as its mean over the policy's tokens (k2 nearly). The gradients' means
are another matter: k2's is the divergence's gradient, k1's is 0, and k3's is that of
KL(reference || policy).
Source: http://joschu.net/blog/kl-approx.html; its bounds as veRL has them.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def k1(logp: Float[Array, "*tokens"], ref_logp: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """log p - log q; may be negative."""
    return logp - ref_logp


def k2(logp: Float[Array, "*tokens"], ref_logp: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """(log p - log q)^2 / 2."""
    return (logp - ref_logp) ** 2 / 2


def k3(logp: Float[Array, "*tokens"], ref_logp: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """q / p - 1 - log(q / p), at most 10; log(q / p) within 20 of 0."""
    log_ratio = jnp.clip(ref_logp - logp, -20.0, 20.0)
    return jnp.minimum(jnp.exp(log_ratio) - 1 - log_ratio, 10.0)


KL: dict[str, Callable[..., Float[Array, "*tokens"]]] = {"k1": k1, "k2": k2, "k3": k3}
