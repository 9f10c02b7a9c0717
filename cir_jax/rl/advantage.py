"""Advantages over an explicit [prompts, samples] axis, plain functions in a dict."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from cir_jax.masked import whiten


def reinforce_pp_baseline(
    rewards_PG: Float[Array, "P G"], num_tokens_PG: Float[Array, "P G"]
) -> Float[Array, "P G"]:
    """REINFORCE++ with the group's mean as baseline, whitened over the whole batch's tokens.

    a = R - mean_g(R) (no baseline for groups of one);  A = whiten(a, weight = num_tokens)

    num_tokens counts the tokens that carry the advantage; no division by the group's deviation.
    Source: REINFORCE++, arXiv:2501.03262, section 3.2; as run in CIR, arXiv:2505.24480.
    """
    G = rewards_PG.shape[1]
    baseline = jnp.mean(rewards_PG, axis=1, keepdims=True) if G > 1 else 0.0
    return whiten(rewards_PG - baseline, num_tokens_PG)


ADVANTAGES: dict[str, Callable[..., Float[Array, "P G"]]] = {
    "reinforce_pp_baseline": reinforce_pp_baseline,
}
