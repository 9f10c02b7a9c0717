"""Reductions over the entries that a weight selects."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def masked_sum(x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, ""]:
    """Sum of x * weight, where entries of weight 0 may hold anything, also inf and nan."""
    return jnp.sum(jnp.where(weight != 0, x, 0) * weight)


def masked_mean(x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, ""]:
    """Weighted mean; 0 where the weights sum to 0."""
    return masked_sum(x, weight) / jnp.maximum(jnp.sum(weight), 1)


def whiten(
    x: Float[Array, "..."], weight: Float[Array, "..."], eps: float = 1e-8
) -> Float[Array, "..."]:
    """(x - mean) * rsqrt(variance + eps), with whole-number weights as counts.

    Mean and Bessel-corrected variance count entry i weight_i times: whitening values that are
    constant along a row, weighted by the row's tokens, is whitening over its tokens.
    """
    count = jnp.sum(weight)
    mean = masked_mean(x, weight)
    variance = masked_sum((x - mean) ** 2, weight) / jnp.maximum(count - 1, 1)
    return (x - mean) * jnp.reciprocal(jnp.sqrt(variance + eps))
