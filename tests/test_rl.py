"""Advantages and losses: float64 transcriptions of their equations, and what changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.masked import masked_mean, masked_sum, whiten
from cir_jax.rl.advantage import ADVANTAGES, Rollouts, outcome_rewards, value_targets
from cir_jax.rl.kl import KL
from cir_jax.rl.loss import LOSS_MEANS, importance_weights, policy_loss, sft_loss, value_loss

CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


# --- reductions


def test_masked_reductions_ignore_what_is_not_selected():
    x = jnp.array([1.0, jnp.nan, 3.0, jnp.inf, -jnp.inf])
    weight = jnp.array([2.0, 0.0, 1.0, 0.0, 0.0])
    assert masked_sum(x, weight) == 5
    assert masked_mean(x, weight) == pytest.approx(5 / 3)
    assert masked_mean(x, jnp.zeros(5)) == 0


def repeated_whitening(x, counts, eps=1e-8):
    """Whitens the entries, each repeated as often as it counts, in float64."""
    tokens = np.repeat(x.astype(np.float64), counts)
    variance = tokens.var(ddof=1) if len(tokens) > 1 else 0.0
    return (x - tokens.mean()) / np.sqrt(variance + eps)


@pytest.mark.parametrize("seed", range(5))
def test_whiten_is_whitening_over_repeated_tokens(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 2, 20)
    counts = rng.integers(0, 30, 20)
    got = whiten(jnp.asarray(x, jnp.float32), jnp.asarray(counts, jnp.float32))
    np.testing.assert_allclose(got, repeated_whitening(x, counts), rtol=1e-4, atol=1e-5)


def test_whiten_of_one_token_or_none_is_finite():
    for weight in ([0.0, 1.0], [0.0, 0.0]):
        assert np.isfinite(whiten(jnp.array([5.0, 5.0]), jnp.array(weight))).all()


# --- advantages


def rollouts(seed, shape=(6, 5, 30), *, gamma=1.0, lam=1.0, outcome=False):
    """Rewards (an outcome, or of every token), a mask with gaps, and values; float64.

    Among the rows: a group of equal rewards, a row without a token, one with a single token.
    """
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.6
    mask[1, 0] = False
    mask[2, 0] = np.arange(shape[2]) == 7
    reward = rng.choice([-1.0, 1.0], shape[:2])
    reward[0] = 0.7
    rewards = outcome_rewards(reward, mask)
    if not outcome:
        rewards = rewards + np.where(mask, rng.normal(0, 0.1, shape), 0)
    return Rollouts(rewards, mask, rng.normal(size=shape), gamma, lam)


def estimated(of, name, dtype=np.float64):
    """By the package's function, in a type."""
    with jax.enable_x64(dtype == np.float64):
        arrays = [jnp.asarray(x, dtype) for x in (of.rewards, of.values)]
        given = Rollouts(arrays[0], jnp.asarray(of.mask), arrays[1], of.gamma, of.lam)
        function = value_targets if name == "value_targets" else ADVANTAGES[name]
        return np.asarray(function(given))


def whitened_loop(a, mask):
    """Token by token, over those of the mask; 0 elsewhere."""
    tokens = [float(x) for x, m in zip(a.ravel(), mask.ravel(), strict=True) if m]
    mean = sum(tokens) / len(tokens)
    variance = sum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1)
    return np.where(mask, (a - mean) / np.sqrt(variance + 1e-8), 0)


def group_loop(of, rule):
    """A number for each row, from its own reward and those of the others, on all its tokens."""
    out = np.zeros(of.mask.shape)
    for p, group in enumerate(of.rewards.sum(axis=2)):
        for g, own in enumerate(group):
            others = [x for i, x in enumerate(group) if i != g]
            out[p, g] = rule(own, others)
    return np.where(of.mask, out, 0)


def less_mean(own, others):
    return own - (own + sum(others)) / (1 + len(others)) if others else own


def grpo_rule(own, others):
    if not others:
        return own / (1 + 1e-6)
    mean = (own + sum(others)) / (1 + len(others))
    std = (sum((x - mean) ** 2 for x in (own, *others)) / len(others)) ** 0.5
    return (own - mean) / (std + 1e-6)


def rloo_rule(own, others):
    return own - sum(others) / len(others) if others else own


def tokens_of(of):
    """Each row's tokens that carry something, first to last, with the row's index."""
    for row in np.ndindex(of.mask.shape[:2]):
        yield row, np.flatnonzero(of.mask[row])


def returns_loop(of):
    out = np.zeros(of.mask.shape)
    for row, at in tokens_of(of):
        for n, t in enumerate(at):
            out[row][t] = sum(of.gamma**k * of.rewards[row][s] for k, s in enumerate(at[n:]))
    return out


def gae_loop(of):
    """The definition as a sum: (gamma lam)^k times the k-th later token's error."""
    out = np.zeros(of.mask.shape)
    for row, at in tokens_of(of):
        r, v = of.rewards[row][at], [*of.values[row][at], 0.0]
        errors = [r[n] + of.gamma * v[n + 1] - v[n] for n in range(len(at))]
        for n, t in enumerate(at):
            out[row][t] = sum((of.gamma * of.lam) ** k * e for k, e in enumerate(errors[n:]))
    return out


TRANSCRIPTIONS = {
    "reinforce_pp_baseline": lambda of: whitened_loop(group_loop(of, less_mean), of.mask),
    "reinforce_pp": lambda of: whitened_loop(returns_loop(of), of.mask),
    "grpo": lambda of: group_loop(of, grpo_rule),
    "dr_grpo": lambda of: group_loop(of, less_mean),
    "rloo": lambda of: group_loop(of, rloo_rule),
    "gae": lambda of: whitened_loop(gae_loop(of), of.mask),
    "value_targets": lambda of: np.where(of.mask, gae_loop(of) + of.values, 0),
}


def test_every_advantage_is_transcribed():
    assert set(TRANSCRIPTIONS) == set(ADVANTAGES) | {"value_targets"}


@pytest.mark.parametrize("name", TRANSCRIPTIONS)
@pytest.mark.parametrize("G", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_advantages_are_their_equations(name, G, seed):
    of = rollouts(seed, (6, G, 30), gamma=0.97, lam=0.9)
    expected = TRANSCRIPTIONS[name](of)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(estimated(of, name), expected, rtol=1e-6, atol=1e-6)
    # In float32 the whitening's sums and quotients leave some units in the last place.
    np.testing.assert_allclose(estimated(of, name, np.float32), expected, rtol=2e-5, atol=2e-5)


def test_advantage_by_hand():
    # Baselines 0 and 1: a = [1, -1], [0, 0]. Tokens 1, 3, 2, 2: mean (1 - 3) / 8 = -1/4,
    # variance (1 * 25/16 + 3 * 9/16 + 4 * 1/16) / 7 = 56/16/7 = 1/2.
    mask = np.arange(3) < np.array([[1, 3], [2, 2]])[:, :, None]
    rewards = outcome_rewards(np.array([[1.0, -1.0], [1.0, 1.0]]), mask)
    got = estimated(Rollouts(rewards, mask, rewards, 1.0, 1.0), "reinforce_pp_baseline")
    expected = (np.array([[1, -1], [0, 0]]) + 0.25) * 2**0.5
    np.testing.assert_allclose(got, np.where(mask, expected[:, :, None], 0), rtol=1e-6)


def test_discounted_by_hand_across_a_tools_tokens():
    """Two model tokens, two of a tool, one more of the model: the tool's are not there."""
    mask = np.array([[[True, True, False, False, True]]])
    rewards = outcome_rewards(np.array([[1.0]]), mask)
    values = np.array([[[0.5, 0.25, 9.0, 9.0, 0.75]]])
    of = Rollouts(rewards, mask, values, 0.5, 0.5)
    # Errors, last first: 1 - 0.75 = 0.25; 0.375 - 0.25 = 0.125; 0.125 - 0.5 = -0.375.
    # Sums with (0.5 * 0.5)^k: 0.25; 0.125 + 0.0625 = 0.1875; -0.375 + 0.046875 = -0.328125.
    targets = estimated(of, "value_targets")[0, 0]
    np.testing.assert_allclose(targets, [0.5 - 0.328125, 0.25 + 0.1875, 0, 0, 1.0])
    # Returns 0.25, 0.5, 1: in the order of their deviations from 7/12, -4, -1 and 5 parts.
    a = estimated(of, "reinforce_pp")[0, 0]
    np.testing.assert_allclose(a[[0, 1]] / a[4], [-0.8, -0.2], rtol=1e-6)
    assert not a[2:4].any()


def test_the_outcome_lies_on_the_last_trained_token():
    mask = np.array([[[True, False, True, False], [False] * 4]])
    # A row without a trained token keeps its reward, at its end: the group's mean counts it.
    np.testing.assert_array_equal(
        outcome_rewards(np.array([[0.3, -1.0]]), mask), [[[0, 0, 0.3, 0], [0, 0, 0, -1.0]]]
    )


@pytest.mark.parametrize("name", ["reinforce_pp_baseline", "grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("value", [-1.0, 0.1, 0.7])
def test_equal_rewards_teach_exactly_nothing(name, value):
    """Though seven times 0.1, in float32, is not seven tenths."""
    mask = np.arange(9) < np.arange(28).reshape(4, 7, 1) % 9
    rewards = outcome_rewards(np.full((4, 7), value), mask)
    of = Rollouts(rewards, mask, rewards, 1.0, 1.0)
    assert not estimated(of, name, np.float32).any()


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_batches_of_one_token_or_none_are_finite(name, num_tokens):
    mask = np.arange(6).reshape(1, 2, 3) < num_tokens
    rewards = outcome_rewards(np.array([[1.0, -1.0]]), mask)
    got = estimated(Rollouts(rewards, mask, rewards + 0.5, 0.9, 0.9), name, np.float32)
    assert np.isfinite(got).all() and not got[~mask].any()


@pytest.mark.parametrize("name", ["reinforce_pp_baseline", "reinforce_pp", "gae"])
def test_whitened_over_tokens(name):
    of = rollouts(0, outcome=True)
    tokens = estimated(of, name)[of.mask]
    assert tokens.mean() == pytest.approx(0, abs=1e-6)
    assert tokens.var(ddof=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["reinforce_pp_baseline", "grpo", "dr_grpo", "rloo"])
def test_a_groups_reward_level_changes_nothing(name):
    of = rollouts(1, outcome=True)
    level = np.arange(6.0)[:, None] + np.zeros((6, 5))
    shifted = of._replace(rewards=of.rewards + outcome_rewards(level, of.mask))
    np.testing.assert_allclose(estimated(of, name), estimated(shifted, name), rtol=1e-6, atol=1e-6)


# --- losses


def loss_float64(
    logp, old_logp, advantage, trained, clip_low, clip_high, dual_clip, num_tokens, weight
):
    """Token by token. Returns the loss, its gradient by logp, and each clip's share."""
    gradient = np.zeros(logp.shape)
    total = 0.0
    shares = {"clip_low_share": 0, "clip_high_share": 0, "dual_clip_share": 0}
    for at in zip(*np.nonzero(trained), strict=True):
        a, ratio = float(advantage[at]), float(np.exp(float(logp[at]) - float(old_logp[at])))
        clip = min(max(ratio, 1 - clip_low), 1 + clip_high)
        loss = max(-a * ratio, -a * clip)
        free = True
        if a > 0 and ratio > 1 + clip_high:
            shares["clip_high_share"] += 1
            free = False
        if a < 0 and ratio < 1 - clip_low:
            shares["clip_low_share"] += 1
            free = False
        if a < 0 and ratio > dual_clip:
            loss = -a * dual_clip
            shares["dual_clip_share"] += 1
            free = False
        total += weight[at] * loss
        gradient[at] = -a * ratio * weight[at] / num_tokens if free else 0.0
    return total / num_tokens, gradient, {k: n / num_tokens for k, n in shares.items()}


def loss_inputs(seed, shape=(6, 40), spread=1.0, dtype=np.float32):
    """Log-probabilities whose ratios lie on both sides of every bound."""
    rng = np.random.default_rng(seed)
    old_logp = -rng.exponential(2.0, shape)
    logp = old_logp + rng.normal(0, spread, shape)
    advantage = np.repeat(rng.normal(0, 1, (shape[0], 1)), shape[1], axis=1)
    trained = rng.random(shape) < 0.6
    trained[0] = False
    trained[1] = np.arange(shape[1]) == 3
    return [x.astype(dtype) for x in (logp, old_logp, advantage)], trained


@functools.partial(jax.jit, static_argnames=tuple(CLIPS))
def jitted(logp, old_logp, advantage, trained, weight, num_tokens, **clips):
    loss = functools.partial(policy_loss, num_tokens=num_tokens, **clips)
    return jax.value_and_grad(loss, has_aux=True)(logp, old_logp, advantage, trained, weight)


def value_and_grad(arrays, trained, num_tokens, weight=None, **clips):
    """In the arrays' type."""
    dtype = np.result_type(*arrays)
    weight = np.where(trained, 1.0 if weight is None else weight, 0).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        (value, metrics), gradient = jitted(*arrays, trained, weight, num_tokens, **clips)
        return float(value), np.asarray(gradient), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "clips", [CLIPS, {"clip_low": 0.0, "clip_high": 1.5, "dual_clip": 1.2}], ids=["paper", "other"]
)
def test_policy_loss_gradient_and_shares_are_the_equations(seed, clips):
    arrays, trained = loss_inputs(seed, dtype=np.float64)
    weight = np.random.default_rng(seed).random((len(trained), 1)) + np.zeros(trained.shape)
    num_tokens = float(trained.sum())
    loss, gradient, shares = loss_float64(
        *arrays, trained, **clips, num_tokens=num_tokens, weight=weight
    )
    got_loss, got_gradient, metrics = value_and_grad(arrays, trained, num_tokens, weight, **clips)
    assert got_loss == pytest.approx(loss, rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(got_gradient, gradient, rtol=1e-6, atol=1e-9)
    for name, share in shares.items():
        assert share > 0 and metrics[name] == pytest.approx(share)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # A > 0: the ratio counts up to 1.28, below without bound.
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),
        (1.4, 2.0, -2.56, 0.0),
        (9.0, 2.0, -2.56, 0.0),
        (0.1, 2.0, -0.2, -0.2),
        # A < 0: not below 0.8, and at most three times.
        (1.0, -2.0, 2.0, 2.0),
        (0.9, -2.0, 1.8, 1.8),
        (0.7, -2.0, 1.6, 0.0),
        (2.9, -2.0, 5.8, 5.8),
        (3.1, -2.0, 6.0, 0.0),
        (1.4, 0.0, 0.0, 0.0),
    ],
)
def test_policy_loss_of_one_token(ratio, advantage, loss, slope):
    arrays = [np.full((1, 1), x, np.float32) for x in (np.log(ratio) - 1, -1.0, advantage)]
    value, gradient, _ = value_and_grad(arrays, np.ones((1, 1), bool), 1.0, **CLIPS)
    assert value == pytest.approx(loss, rel=1e-5)
    # d(A r) / d logp = A r.
    assert gradient[0, 0] == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("log_ratio", [19.0, 21.0, 95.0, 1e4])
@pytest.mark.parametrize(("advantage", "loss"), [(2.0, -2.56), (-2.0, 6.0)])
def test_huge_ratios_are_clipped_and_finite(log_ratio, advantage, loss):
    arrays = [np.full((1, 1), x, np.float32) for x in (-1.0, -1.0 - log_ratio, advantage)]
    value, gradient, metrics = value_and_grad(arrays, np.ones((1, 1), bool), 1.0, **CLIPS)
    assert value == pytest.approx(loss) and gradient[0, 0] == 0
    assert np.isfinite(list(metrics.values())).all()


def test_on_policy_the_loss_is_minus_the_mean_advantage():
    arrays, trained = loss_inputs(0, spread=0.0)
    value, gradient, metrics = value_and_grad(arrays, trained, float(trained.sum()), **CLIPS)
    assert value == pytest.approx(-arrays[2][trained].mean(), rel=1e-5)
    np.testing.assert_allclose(gradient[trained], -arrays[2][trained] / trained.sum(), rtol=1e-5)
    assert metrics["ratio_mean"] == pytest.approx(1) and metrics["old_new_kl"] == 0
    assert all(metrics[f"{name}_share"] == 0 for name in ("clip_low", "clip_high", "dual_clip"))


def test_kl_estimate_is_its_equation():
    arrays, trained = loss_inputs(0, spread=0.3)
    _, _, metrics = value_and_grad(arrays, trained, float(trained.sum()), **CLIPS)
    log_ratio = (arrays[0].astype(np.float64) - arrays[1])[trained]
    expected = np.mean(np.exp(log_ratio) - 1 - log_ratio)
    assert expected > 0 and metrics["old_new_kl"] == pytest.approx(expected, rel=1e-4)


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("where", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_untrained_tokens_do_not_exist(junk, where):
    """Whatever they hold, their gradient is zero to the bit and nothing else changes."""
    arrays, trained = loss_inputs(0)
    num_tokens = float(trained.sum())
    clean = value_and_grad(arrays, trained, num_tokens, **CLIPS)
    soiled = [np.where(trained | (n not in where), x, junk) for n, x in enumerate(arrays)]
    value, gradient, metrics = value_and_grad(
        [x.astype(np.float32) for x in soiled], trained, num_tokens, **CLIPS
    )
    assert (value, metrics) == (clean[0], clean[2])
    assert not bits(gradient)[~trained].any()
    assert (bits(gradient) == bits(clean[1])).all()


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_untrained_tokens_do_not_exist_for_sft(junk):
    (logp, _, _), trained = loss_inputs(0)
    logp = np.where(trained, logp, junk).astype(np.float32)
    num_tokens = float(trained.sum())
    value, gradient = jax.value_and_grad(
        lambda x: sft_loss(x, jnp.asarray(trained, jnp.float32), num_tokens=num_tokens)[0]
    )(jnp.asarray(logp))
    assert float(value) == pytest.approx(-logp[trained].astype(np.float64).mean(), rel=1e-5)
    np.testing.assert_array_equal(gradient, np.where(trained, np.float32(-1 / num_tokens), 0))
    assert not bits(gradient)[~trained].any()


def test_batch_without_trained_tokens_is_zero():
    arrays, trained = loss_inputs(0)
    value, gradient, metrics = value_and_grad(arrays, np.zeros_like(trained), 1.0, **CLIPS)
    assert value == 0 and not gradient.any() and not any(metrics.values())


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_sum_to_the_whole(rows):
    arrays, trained = loss_inputs(2)
    num_tokens = float(trained.sum())
    whole_value, whole_gradient, whole_metrics = value_and_grad(
        arrays, trained, num_tokens, **CLIPS
    )
    parts = [
        value_and_grad(
            [x[at : at + rows] for x in arrays], trained[at : at + rows], num_tokens, **CLIPS
        )
        for at in range(0, len(trained), rows)
    ]
    assert sum(value for value, _, _ in parts) == pytest.approx(whole_value, rel=1e-5)
    np.testing.assert_allclose(np.concatenate([g for _, g, _ in parts]), whole_gradient, rtol=1e-6)
    for name, value in whole_metrics.items():
        assert sum(metrics[name] for _, _, metrics in parts) == pytest.approx(value, rel=1e-5)


def mean_loop(loss, trained, mean, length):
    """The mean of a loss [S, T], sequence by sequence."""
    rows = [row[mask] for row, mask in zip(loss, trained, strict=True) if mask.any()]
    if mean == "token_mean":
        return np.concatenate(rows).mean()
    if mean == "sequence_mean":
        return np.mean([row.mean() for row in rows])
    return np.mean([row.sum() for row in rows]) / (length if mean == "constant" else 1)


@pytest.mark.parametrize("mean", LOSS_MEANS)
def test_weights_make_the_means(mean):
    (loss, _, _), trained = loss_inputs(0, dtype=np.float64)
    assert {0, 1} < set(trained.sum(axis=1))
    counts = trained.sum(axis=1)
    weights = LOSS_MEANS[mean](counts, 100)
    got = (weights[:, None] * np.where(trained, loss, 0)).sum() / counts.sum()
    assert got == pytest.approx(mean_loop(loss, trained, mean, 100), rel=1e-12)
    assert np.isfinite(LOSS_MEANS[mean](np.zeros(3, int), 100)).all()


KL_LOOPS = {
    "k1": (lambda p, q: p - q, lambda p, q: 1.0),
    "k2": (lambda p, q: (p - q) ** 2 / 2, lambda p, q: p - q),
    # d/dp (e^(q - p) - 1 - (q - p)) = 1 - e^(q - p).
    "k3": (lambda p, q: np.exp(q - p) - 1 - (q - p), lambda p, q: 1 - np.exp(q - p)),
}


@pytest.mark.parametrize("name", KL)
def test_kl_estimates_are_their_equations(name):
    (logp, ref, _), _ = loss_inputs(0, spread=0.5, dtype=np.float64)
    value, slope = KL_LOOPS[name]
    assert np.abs(logp - ref).max() < 2.5  # where no bound is met
    with jax.enable_x64(True):
        got = np.asarray(KL[name](jnp.asarray(logp), jnp.asarray(ref)))
        gradient = jax.grad(lambda x: KL[name](x, jnp.asarray(ref)).sum())(jnp.asarray(logp))
    for at in np.ndindex(logp.shape):
        assert got[at] == pytest.approx(value(logp[at], ref[at]), rel=1e-6, abs=1e-12)
        assert gradient[at] == pytest.approx(slope(logp[at], ref[at]), rel=1e-6, abs=1e-12)


def test_kl_estimates_are_unbiased():
    """In the mean over p's tokens: k1 and k3 give sum p log(p / q)."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    exact = (p * np.log(p / q)).sum()
    for name in ("k1", "k3"):
        got = (p * np.asarray(KL[name](jnp.log(p), jnp.log(q)))).sum()
        assert got == pytest.approx(exact, rel=1e-5)


def test_k3_is_bounded():
    far = KL["k3"](jnp.array([-100.0, -1.0]), jnp.array([-1.0, -100.0]))
    np.testing.assert_allclose(far, [10.0, 10.0])


def test_importance_weights_are_truncated_ratios_without_gradient():
    old, sampler = jnp.array([-1.0, -1.0, -1.0, -1.0]), jnp.array([-1.5, -4.0, -0.5, jnp.nan])
    sampled = jnp.array([True, True, True, False])
    got, gradient = (
        importance_weights(old, sampler, sampled, 2.0),
        jax.grad(lambda x: importance_weights(x, sampler, sampled, 2.0).sum())(old),
    )
    np.testing.assert_allclose(got, [np.exp(0.5), 2.0, np.exp(-0.5), 1.0], rtol=1e-6)
    assert not gradient.any()


@pytest.mark.parametrize("seed", range(3))
def test_value_loss_and_gradient_are_the_equations(seed):
    """Values on both sides of both bounds; what untrained tokens hold does not matter."""
    (values, old, _), trained = loss_inputs(seed, dtype=np.float64)
    rng = np.random.default_rng(seed)
    targets, weight = old + rng.normal(0, 1, old.shape), rng.random(old.shape)
    soiled = [np.where(trained, x, np.nan) for x in (values, old, targets)]
    num_tokens, clip = float(trained.sum()), 0.5
    loss, share, gradient = 0.0, 0, np.zeros(old.shape)
    for at in zip(*np.nonzero(trained), strict=True):
        near = min(max(values[at], old[at] - clip), old[at] + clip)
        free, clipped = (values[at] - targets[at]) ** 2, (near - targets[at]) ** 2
        loss += weight[at] * max(free, clipped) / 2 / num_tokens
        share += clipped > free
        if free >= clipped:
            gradient[at] = weight[at] * (values[at] - targets[at]) / num_tokens
    with jax.enable_x64(True):
        got, got_gradient = jax.value_and_grad(
            lambda v: value_loss(
                v,
                *map(jnp.asarray, (*soiled[1:], trained, np.where(trained, weight, 0))),
                clip=clip,
                num_tokens=num_tokens,
            ),
            has_aux=True,
        )(jnp.asarray(soiled[0]))
    assert float(got[0]) == pytest.approx(loss, rel=1e-6)
    assert 0 < share and float(got[1]["clip_share"]) == pytest.approx(share / num_tokens)
    inside = np.abs(values - old) != clip
    np.testing.assert_allclose(
        np.where(inside, got_gradient, 0), np.where(inside, gradient, 0), rtol=1e-6, atol=1e-12
    )
