"""Advantages and losses: float64 transcriptions of their equations, and what changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.masked import masked_mean, masked_sum, whiten
from cir_jax.rl.advantage import ADVANTAGES
from cir_jax.rl.loss import policy_loss, sft_loss

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


def advantage_float64(rewards, num_tokens):
    a = rewards.astype(np.float64)
    if rewards.shape[1] > 1:
        a = a - a.mean(axis=1, keepdims=True)
    return repeated_whitening(a.ravel(), num_tokens.ravel()).reshape(a.shape)


def both(rewards, num_tokens):
    got = ADVANTAGES["reinforce_pp_baseline"](
        jnp.asarray(rewards, jnp.float32), jnp.asarray(num_tokens, jnp.float32)
    )
    return np.asarray(got), advantage_float64(np.asarray(rewards), np.asarray(num_tokens))


@pytest.mark.parametrize("G", [1, 2, 5, 16])
@pytest.mark.parametrize("seed", range(3))
def test_advantage_is_its_equation(G, seed):
    rng = np.random.default_rng(seed)
    rewards = rng.choice([-1.0, 1.0], (6, G))
    rewards[0] = 1.0  # a group of equal rewards
    num_tokens = rng.integers(0, 400, (6, G))  # 0: a response without trained tokens
    num_tokens[1, 0] = 1
    got, expected = both(rewards, num_tokens)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_advantage_by_hand():
    # Baselines 0 and 1: a = [1, -1], [0, 0]. Tokens 1, 3, 2, 2: mean (1 - 3) / 8 = -1/4,
    # variance (1 * 25/16 + 3 * 9/16 + 4 * 1/16) / 7 = 56/16/7 = 1/2.
    got, _ = both([[1.0, -1.0], [1.0, 1.0]], [[1, 3], [2, 2]])
    expected = (np.array([[1, -1], [0, 0]]) + 0.25) * 2**0.5
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_groups_of_one_have_no_baseline():
    # a = R: tokens 2, 2; mean 0, variance 4 / 3.
    got, _ = both([[1.0], [-1.0]], [[2], [2]])
    np.testing.assert_allclose(got, np.array([[1], [-1]]) * 0.75**0.5, rtol=1e-5)


@pytest.mark.parametrize("value", [-1.0, 1.0])
@pytest.mark.parametrize("G", [1, 3])
def test_equal_rewards_everywhere_teach_nothing(value, G):
    got, _ = both(np.full((4, G), value), np.arange(4 * G).reshape(4, G))
    assert not got.any()


def test_whitened_over_tokens():
    rng = np.random.default_rng(0)
    num_tokens = rng.integers(1, 100, (8, 4))
    got, _ = both(rng.choice([-1.0, 1.0], (8, 4)), num_tokens)
    tokens = np.repeat(got.ravel(), num_tokens.ravel())
    assert tokens.mean() == pytest.approx(0, abs=1e-5)
    assert tokens.var(ddof=1) == pytest.approx(1, abs=1e-4)


def test_a_groups_reward_level_changes_nothing():
    rng = np.random.default_rng(1)
    rewards = rng.choice([-1.0, 1.0], (5, 4))
    num_tokens = rng.integers(1, 50, (5, 4))
    shifted = rewards + np.arange(5)[:, None] * 2
    np.testing.assert_allclose(
        both(rewards, num_tokens)[0], both(shifted, num_tokens)[0], rtol=1e-4, atol=1e-5
    )


# --- losses


def loss_float64(logp, old_logp, advantage, trained, clip_low, clip_high, dual_clip, num_tokens):
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
        total += loss
        gradient[at] = -a * ratio / num_tokens if free else 0.0
    return total / num_tokens, gradient, {k: n / num_tokens for k, n in shares.items()}


def loss_inputs(seed, shape=(6, 40), spread=1.0):
    """Log-probabilities whose ratios lie on both sides of every bound."""
    rng = np.random.default_rng(seed)
    old_logp = -rng.exponential(2.0, shape)
    logp = old_logp + rng.normal(0, spread, shape)
    advantage = np.repeat(rng.normal(0, 1, (shape[0], 1)), shape[1], axis=1)
    trained = rng.random(shape) < 0.6
    trained[0] = False
    trained[1] = np.arange(shape[1]) == 3
    return [
        logp.astype(np.float32),
        old_logp.astype(np.float32),
        advantage.astype(np.float32),
    ], trained


@functools.partial(jax.jit, static_argnames=tuple(CLIPS))
def jitted(logp, old_logp, advantage, trained, num_tokens, **clips):
    loss = functools.partial(policy_loss, num_tokens=num_tokens, **clips)
    return jax.value_and_grad(loss, has_aux=True)(logp, old_logp, advantage, trained)


def value_and_grad(arrays, trained, num_tokens, **clips):
    (value, metrics), gradient = jitted(*arrays, trained, num_tokens, **clips)
    return float(value), np.asarray(gradient), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "clips", [CLIPS, {"clip_low": 0.0, "clip_high": 1.5, "dual_clip": 1.2}], ids=["paper", "other"]
)
def test_policy_loss_gradient_and_shares_are_the_equations(seed, clips):
    arrays, trained = loss_inputs(seed)
    num_tokens = float(trained.sum())
    loss, gradient, shares = loss_float64(*arrays, trained, **clips, num_tokens=num_tokens)
    got_loss, got_gradient, metrics = value_and_grad(arrays, trained, num_tokens, **clips)
    assert got_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(got_gradient, gradient, rtol=1e-4, atol=1e-8)
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
        lambda x: sft_loss(x, jnp.asarray(trained), num_tokens=num_tokens)[0]
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
