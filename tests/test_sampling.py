"""Sampling: the right distribution within all bounds, and the same whoever stands beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax import mesh as meshes
from cir_jax.config import MeshConfig
from cir_jax.rollout.sampling import Sampling, row_keys, sample

V = 300  # more than two blocks of the running sum, and not whole ones
ROWS = 2048
run = jax.jit(sample)


def logits(scale=2.0):
    return np.random.default_rng(0).normal(size=V).astype(np.float32) * scale


def of_rows(rows, **settings):
    """Sampling of so many rows; settings are numbers or one for each row."""
    values = Sampling(**({"temperature": 1.0} | settings))
    types = Sampling(np.float32, np.float32, np.int32, np.float32)
    return Sampling(
        *(
            jnp.asarray(np.broadcast_to(np.asarray(x, t), rows))
            for x, t in zip(values, types, strict=True)
        )
    )


def nothing_forced(rows):
    return jnp.full(rows, -1)


def draw(row, *, times=20, **settings):
    """ROWS x times tokens of one distribution, and the log-probabilities of the last ROWS."""
    keys = jnp.asarray(row_keys(0, "test", 0, np.arange(ROWS), np.zeros(ROWS, int)))
    logits_VB = jnp.broadcast_to(jnp.asarray(row)[:, None], (len(row), ROWS))
    tokens, asked = [], of_rows(ROWS, **settings)
    for at in range(times):
        token, logp = run(logits_VB, keys, jnp.full(ROWS, at), asked, nothing_forced(ROWS))
        tokens.append(np.asarray(token))
    return np.concatenate(tokens), tokens[-1], np.asarray(logp)


def softmax(row, temperature=1.0):
    weights = np.exp(np.asarray(row, np.float64) / temperature)
    return weights / weights.sum()


def allowed(p, top_p=1.0, top_k=0, min_p=0.0):
    """By their definitions: tokens for which those more likely have less than top_p together,
    and are fewer than top_k, and that have min_p of the most likely one's probability."""
    return np.array(
        [
            (top_p == 1 or p[p > x].sum() < top_p)
            and (top_k == 0 or (p > x).sum() < top_k)
            and x >= min_p * p.max()
            for x in p
        ]
    )


@pytest.mark.parametrize(
    ("temperature", "bounds"),
    [
        (1.0, {}),
        (0.6, {}),
        (1.0, {"top_p": 0.8}),
        (1.5, {"top_p": 0.95}),
        (1.0, {"top_p": 0.3}),
        (1.0, {"top_k": 40}),
        (0.7, {"top_k": 3}),
        (1.0, {"min_p": 0.1}),
        (1.5, {"top_p": 0.9, "top_k": 60, "min_p": 0.02}),
        (1.0, {"top_p": 0.6, "min_p": 0.001}),
    ],
)
def test_tokens_follow_the_distribution(temperature, bounds):
    """Pearson's statistic of 40,960 draws: mean k, standard deviation sqrt(2 k), at k + 1 kinds."""
    tokens, last, logp = draw(logits(), temperature=temperature, **bounds)
    p = softmax(logits(), temperature)
    kept = allowed(p, **bounds)
    assert kept.all() == (not bounds)
    counts = np.bincount(tokens, minlength=V)
    assert counts[~kept].sum() == 0
    expected = np.where(kept, p, 0) / p[kept].sum() * len(tokens)
    often = expected >= 5
    k = often.sum() - 1
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert abs(statistic - k) < 5 * np.sqrt(2 * k) + 1
    np.testing.assert_allclose(logp, np.log(p[last]), rtol=1e-4, atol=1e-5)


def test_each_row_has_settings_of_its_own():
    """A greedy row, one of everything, a nucleus and a forced token side by side."""
    row = logits()
    rows = jnp.broadcast_to(jnp.asarray(row)[:, None], (V, 4))
    keys = jnp.asarray(row_keys(0, "test", 0, np.arange(4), np.zeros(4, int)))
    asked = of_rows(4, temperature=[0.0, 1.0, 1.0, 0.5], top_p=[1.0, 1.0, 0.2, 1.0])
    forced = jnp.array([-1, -1, -1, 17])
    drawn = []
    for at in range(200):
        token, logp = run(rows, keys, jnp.full(4, at), asked, forced)
        drawn.append(np.asarray(token))
    greedy, anything, few, fixed = np.array(drawn).T
    assert set(greedy) == {int(row.argmax())} and set(fixed) == {17}
    assert len(set(anything)) > 30
    assert set(few) <= set(np.flatnonzero(allowed(softmax(row), top_p=0.2)))
    np.testing.assert_allclose(logp[3], np.log(softmax(row, 0.5)[17]), rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "top_k": 30}, {"temperature": 0.0}])
def test_a_shared_vocabulary_gives_the_same_tokens(settings):
    """Four devices with a quarter of the vocabulary each, two with rows of their own."""
    rows, V = 16, 1024
    logits_VB = jnp.asarray(np.random.default_rng(2).normal(size=(V, rows)) * 2, jnp.float32)
    keys = jnp.asarray(row_keys(0, "test", 0, np.arange(rows), np.zeros(rows, int)))
    forced = nothing_forced(rows).at[3].set(700)
    args = logits_VB, keys, jnp.arange(rows), of_rows(rows, **settings), forced
    tokens, logp = run(*args)
    with jax.set_mesh(meshes.make_mesh(MeshConfig(fsdp=2, tensor=4))):
        others, logp_others = run(*args)
    assert others[3] == 700
    np.testing.assert_array_equal(tokens, others)
    np.testing.assert_allclose(logp, logp_others, atol=1e-5)


def test_no_number_is_no_reason_to_hang():
    """Logits of a model that has diverged: some token comes out."""
    draw(np.full(V, np.nan, np.float32), top_p=0.9, top_k=5, times=1)


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
    columns = jnp.asarray(rng.normal(size=(V, 8)), jnp.float32)
    keys = jnp.asarray(row_keys(0, "test", 0, np.arange(8), np.zeros(8, int)))
    positions, asked, free = jnp.arange(8), of_rows(8, top_p=top_p), nothing_forced(8)
    tokens, logp = run(columns, keys, positions, asked, free)
    order = rng.permutation(8)
    others, logp_others = run(columns[:, order], keys[order], positions[order], asked, free)
    np.testing.assert_array_equal(tokens[order], others)
    np.testing.assert_array_equal(logp[order], logp_others)


def test_rows_in_doubt_are_looked_at_apart_with_the_same_result():
    """Three rows with a nucleus: alone in doubt among 16, and as all of 16 are."""
    columns = jnp.asarray(np.random.default_rng(3).normal(size=(V, 16)), jnp.float32)
    keys = jnp.asarray(row_keys(0, "test", 0, np.arange(16), np.zeros(16, int)))
    of_three = np.where(np.arange(16) % 6 == 2, 0.5, 1.0)
    for at in range(20):
        args = columns, keys, jnp.full(16, at)
        few, logp = run(*args, of_rows(16, top_p=of_three), nothing_forced(16))
        all_, logp_all = run(*args, of_rows(16, top_p=0.5), nothing_forced(16))
        np.testing.assert_array_equal(few[2::6], all_[2::6])
        np.testing.assert_array_equal(logp[2::6], logp_all[2::6])
