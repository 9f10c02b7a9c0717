"""Advantages over explicit [prompts, samples, tokens] axes, plain functions in a dict.

A token carries an advantage where the mask says so. Between such tokens others may lie (the
output of tools): returns and GAE pass over those as if they were not there, neither discounting
nor beginning anew, so that what the model writes before a call shares in the outcome.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cir_jax.masked import whiten


class Rollouts(NamedTuple):
    """What advantages are made of.

    rewards: 0 but where something is earned; of all tokens that carry nothing only their sum
      over a row counts, and not in returns.
    values: the critic's expectation before each token is drawn; None where there is no critic.
    gamma, lam: discount per token, and GAE's lambda.
    """

    rewards: Float[Array, "P G T"]
    mask: Bool[Array, "P G T"]
    values: Float[Array, "P G T"] | None
    gamma: float
    lam: float


def outcome_rewards(
    rewards_PG: Float[np.ndarray, "P G"], trained_PGT: Bool[np.ndarray, "P G T"]
) -> Float[np.ndarray, "P G T"]:
    """Each row's reward on its last trained token; where there is none, on its last position."""
    T = trained_PGT.shape[2]
    last_PG = T - 1 - np.argmax(trained_PGT[:, :, ::-1], axis=2)
    return np.where(np.arange(T) == last_PG[:, :, None], rewards_PG[:, :, None], 0)


def reinforce_pp_baseline(of: Rollouts) -> Float[Array, "P G T"]:
    """REINFORCE++ with the group's mean as baseline, whitened over the whole batch's tokens.

    a = R - mean_g(R) (no baseline for groups of one);  A = whiten(a over tokens of the mask)

    No division by the group's deviation.
    Source: REINFORCE++, arXiv:2501.03262, section 3.2; as run in CIR, arXiv:2505.24480.
    """
    a_PG = _centred(_outcome(of))
    count_PG = jnp.sum(of.mask, axis=2).astype(a_PG.dtype)
    return _of_tokens(whiten(a_PG, count_PG), of)


def reinforce_pp(of: Rollouts) -> Float[Array, "P G T"]:
    """REINFORCE++: returns, whitened over the whole batch's tokens. No groups.

    G_t = r_t + gamma G_next(t);  A = whiten(G over tokens of the mask)

    Source: REINFORCE++, arXiv:2501.03262, section 3.1.
    """
    return _whitened(_returns(of), of)


def grpo(of: Rollouts) -> Float[Array, "P G T"]:
    """A = (R - mean_g(R)) / (std_g(R) + 1e-6), std Bessel-corrected; groups of one: R / (1 + 1e-6).

    Source: DeepSeekMath, arXiv:2402.03300, section 4.1.
    """
    score_PG = _outcome(of)
    std_P1 = jnp.std(score_PG, axis=1, ddof=1, keepdims=True) if score_PG.shape[1] > 1 else 1.0
    return _of_tokens(_centred(score_PG) / (std_P1 + 1e-6), of)


def dr_grpo(of: Rollouts) -> Float[Array, "P G T"]:
    """A = R - mean_g(R); groups of one: R.

    Source: Dr. GRPO, arXiv:2503.20783, section 3.2.
    """
    return _of_tokens(_centred(_outcome(of)), of)


def rloo(of: Rollouts) -> Float[Array, "P G T"]:
    """A = R - mean of the group's other R; groups of one: R.

    The same as (R - mean_g(R)) G / (G - 1). Source: RLOO, arXiv:2402.14740, section 3.2.
    """
    score_PG = _outcome(of)
    G = score_PG.shape[1]
    return _of_tokens(_centred(score_PG) * (G / max(G - 1, 1)), of)


def gae(of: Rollouts) -> Float[Array, "P G T"]:
    """Generalised advantage estimates, whitened over the whole batch's tokens.

    d_t = r_t + gamma V_next(t) - V_t;  a_t = d_t + gamma lam a_next(t);  A = whiten(a)

    Source: GAE, arXiv:1506.02438, section 3; whitened as PPO's implementations do.
    """
    return _whitened(_estimates(of), of)


def value_targets(of: Rollouts) -> Float[Array, "P G T"]:
    """What the critic learns: GAE's estimates, as they are before whitening, plus the values."""
    return jnp.where(of.mask, _estimates(of) + of.values, 0)


ADVANTAGES: dict[str, Callable[[Rollouts], Float[Array, "P G T"]]] = {
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "reinforce_pp": reinforce_pp,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "gae": gae,
}

# Those that compare the samples of a problem: with others, P and G may be any whose product is B.
GROUPED = ("reinforce_pp_baseline", "grpo", "dr_grpo", "rloo")


def _outcome(of: Rollouts) -> Float[Array, "P G"]:
    return jnp.sum(of.rewards, axis=2)


def _centred(score_PG: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """Less the group's mean; exactly 0 where all are equal, which their rounded mean may not be."""
    if score_PG.shape[1] == 1:
        return score_PG
    equal_P1 = jnp.all(score_PG == score_PG[:, :1], axis=1, keepdims=True)
    return jnp.where(equal_P1, 0, score_PG - jnp.mean(score_PG, axis=1, keepdims=True))


def _of_tokens(a_PG: Float[Array, "P G"], of: Rollouts) -> Float[Array, "P G T"]:
    return jnp.where(of.mask, a_PG[:, :, None], 0)


def _whitened(a_PGT: Float[Array, "P G T"], of: Rollouts) -> Float[Array, "P G T"]:
    return jnp.where(of.mask, whiten(a_PGT, of.mask.astype(a_PGT.dtype)), 0)


def _by_time(*arrays_PGT: Array) -> tuple[Array, ...]:
    return tuple(jnp.moveaxis(x, 2, 0) for x in arrays_PGT)


@jax.jit
def _returns(of: Rollouts) -> Float[Array, "P G T"]:
    def step(later_PG, here):
        reward_PG, mask_PG = here
        return (jnp.where(mask_PG, reward_PG + of.gamma * later_PG, later_PG),) * 2

    zeros_PG = jnp.zeros(of.rewards.shape[:2], of.rewards.dtype)
    _, returns_TPG = jax.lax.scan(step, zeros_PG, _by_time(of.rewards, of.mask), reverse=True)
    return jnp.moveaxis(returns_TPG, 0, 2)


@jax.jit
def _estimates(of: Rollouts) -> Float[Array, "P G T"]:
    def step(later, here):
        next_value_PG, next_a_PG = later
        reward_PG, mask_PG, value_PG = here
        delta_PG = reward_PG + of.gamma * next_value_PG - value_PG
        a_PG = jnp.where(mask_PG, delta_PG + of.gamma * of.lam * next_a_PG, next_a_PG)
        return (jnp.where(mask_PG, value_PG, next_value_PG), a_PG), a_PG

    zeros_PG = jnp.zeros(of.rewards.shape[:2], of.rewards.dtype)
    by_time = _by_time(of.rewards, of.mask, of.values)
    _, a_TPG = jax.lax.scan(step, (zeros_PG, zeros_PG), by_time, reverse=True)
    return jnp.where(of.mask, jnp.moveaxis(a_TPG, 0, 2), 0)
