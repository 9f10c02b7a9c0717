"""Sampling: the right distribution, also of the nucleus, and the same whoever stands beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.rollout.sampling import row_keys, sample

V = 300  # more than two blocks of the running sum, and not whole ones
ROWS = 2048
run = jax.jit(sample)


def logits(scale=2.0):
    return np.random.default_rng(0).normal(size=V).astype(np.float32) * scale


def draw(row, *, temperature=1.0, top_p=1.0, times=20):
    """ROWS x times tokens of one distribution, and the log-probabilities of the last ROWS."""
    keys = jnp.asarray(row_keys(0, "test", 0, np.arange(ROWS), np.zeros(ROWS, int)))
    logits_BV = jnp.broadcast_to(jnp.asarray(row), (ROWS, len(row)))
    tokens = []
    for at in range(times):
        positions = jnp.full(ROWS, at)
        token, logp = run(logits_BV, keys, positions, jnp.float32(temperature), jnp.float32(top_p))
        tokens.append(np.asarray(token))
    return np.concatenate(tokens), tokens[-1], np.asarray(logp)


def softmax(row, temperature=1.0):
    weights = np.exp(np.asarray(row, np.float64) / temperature)
    return weights / weights.sum()


def nucleus(p, top_p):
    """By its definition: tokens for which those more likely have less than top_p together."""
    return np.array([p[p > x].sum() < top_p for x in p])


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8), (1.5, 0.95), (1.0, 0.3)]
)
def test_tokens_follow_the_distribution(temperature, top_p):
    """Pearson's statistic of 40,960 draws: mean k, standard deviation sqrt(2 k), at k + 1 kinds."""
    tokens, last, logp = draw(logits(), temperature=temperature, top_p=top_p)
    p = softmax(logits(), temperature)
    kept = nucleus(p, top_p)
    counts = np.bincount(tokens, minlength=V)
    assert counts[~kept].sum() == 0
    expected = np.where(kept, p, 0) / p[kept].sum() * len(tokens)
    often = expected >= 5
    k = often.sum() - 1
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert abs(statistic - k) < 5 * np.sqrt(2 * k) + 1
    np.testing.assert_allclose(logp, np.log(p[last]), rtol=1e-4, atol=1e-5)


def test_a_tiny_nucleus_is_the_most_likely_token():
    tokens, _, _ = draw(logits(), top_p=1e-6, times=2)
    assert set(tokens) == {int(logits().argmax())}


def test_equal_tokens_are_in_the_nucleus_together():
    tokens, _, _ = draw(np.zeros(V, np.float32), top_p=0.01)
    assert len(set(tokens)) == V


def test_impossible_tokens_are_never_drawn():
    row = np.full(V, -np.inf, np.float32)
    row[[0, 130, 299]] = 0.0
    tokens, _, _ = draw(row)
    assert set(tokens) == {0, 130, 299}


def test_greedy_is_the_argmax_and_its_log_probability_at_one():
    row = logits()
    tokens, last, logp = draw(row, temperature=0.0, top_p=0.5, times=1)
    assert set(tokens) == {int(row.argmax())}
    np.testing.assert_allclose(logp, np.log(softmax(row)[last]), rtol=1e-5)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_rows_token_is_its_own(top_p):
    """Another order of rows, other neighbours: the same tokens and log-probabilities."""
    rng = np.random.default_rng(1)
    rows = jnp.asarray(rng.normal(size=(8, V)), jnp.float32)
    keys = jnp.asarray(row_keys(0, "test", 0, np.arange(8), np.zeros(8, int)))
    positions, one, p = jnp.arange(8), jnp.float32(1.0), jnp.float32(top_p)
    tokens, logp = run(rows, keys, positions, one, p)
    order = rng.permutation(8)
    others, logp_others = run(rows[order], keys[order], positions[order], one, p)
    np.testing.assert_array_equal(tokens[order], others)
    np.testing.assert_array_equal(logp[order], logp_others)
