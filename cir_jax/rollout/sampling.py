"""Sampling whose randomness is a function of (seed, step, problem, sample, position)."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

# Entries that are summed first where a running sum over the vocabulary is needed.
_BLOCK = 128


def row_keys(
    seed: int, phase: str, step: int, problems: np.ndarray, samples: np.ndarray
) -> UInt32[np.ndarray, "B 2"]:
    """One key per row; equal arguments give equal keys, whatever the order of the rows.

    phase: separates streams that share a step number (rollout and evaluation).
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(phase.encode()))
    key = jax.random.fold_in(key, step)
    fold = jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(key, p), s))
    return np.asarray(jax.random.key_data(fold(jnp.asarray(problems), jnp.asarray(samples))))


def sample(
    logits_BV: Float[Array, "B V"],
    keys_B2: UInt32[Array, "B 2"],
    positions_B: Int[Array, " B"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token per row from softmax(logits / temperature), and its log-probability there.

    Temperature 0 is greedy: the most likely token, its log-probability at temperature 1.
    top_p: below 1, only tokens are drawn for which those more likely than them have less than
    this mass together (nucleus sampling, arXiv:1904.09751; equally likely ones are in or out
    together). The log-probability is the whole softmax's, also then.

    One uniform number of (key, position, attempt) is looked up in the running sum. The nucleus
    needs no sort: a token drawn from outside it is drawn again from those more likely than it,
    which include the nucleus, until all rows' tokens lie within.
    """
    greedy = temperature == 0
    scaled_BV = logits_BV / jnp.where(greedy, 1.0, temperature)
    top_B = jnp.max(scaled_BV, axis=-1)
    weights_BV = jnp.exp(scaled_BV - top_B[:, None])
    total_B = jnp.sum(weights_BV, axis=-1)

    def draw(attempt: Int[Array, ""], floor_B: Float[Array, " B"]) -> Int[Array, " B"]:
        """From the tokens whose weight is above the row's floor."""

        def uniform(key, position):
            key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
            return jax.random.uniform(jax.random.fold_in(key, attempt))

        above_BV = jnp.where(weights_BV > floor_B[:, None], weights_BV, 0.0)
        return _look_up(above_BV, jax.vmap(uniform)(keys_B2, positions_B))

    def attempt(carry):
        n, tokens_B, inside_B, floor_B = carry
        drawn_B = draw(n, floor_B)
        weight_B = jnp.take_along_axis(weights_BV, drawn_B[:, None], axis=-1)[:, 0]
        more_B = jnp.sum(jnp.where(weights_BV > weight_B[:, None], weights_BV, 0.0), axis=-1)
        tokens_B = jnp.where(inside_B, tokens_B, drawn_B)
        inside_now_B = more_B < top_p * total_B
        floor_B = jnp.where(inside_now_B, floor_B, weight_B)
        return n + 1, tokens_B, inside_B | inside_now_B, floor_B

    B = logits_BV.shape[0]
    nothing = jnp.full(B, -1.0)

    def whole(_):
        return draw(jnp.int32(0), nothing)

    def nucleus(_):
        start = (jnp.int32(0), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool), nothing)
        return jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), attempt, start)[1]

    def most_likely(_):
        return jnp.argmax(scaled_BV, axis=-1).astype(jnp.int32)

    which = jnp.where(greedy, 2, (top_p < 1).astype(jnp.int32))
    tokens_B = jax.lax.switch(which, [whole, nucleus, most_likely], None)
    at_token_B = jnp.take_along_axis(scaled_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B, at_token_B - top_B - jnp.log(total_B)


def _look_up(weights_BV: Float[Array, "B V"], uniform_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first index at which the running sum exceeds uniform x total; its weight is positive."""
    B, V = weights_BV.shape
    padded = jnp.pad(weights_BV, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    sums = jnp.sum(padded, axis=-1)
    running = jnp.cumsum(sums, axis=-1)
    # Strictly below the total, whatever the product is rounded to.
    total = running[:, -1]
    target = jnp.minimum(uniform_B * total, jnp.nextafter(total, jnp.zeros_like(total)))
    block = _first(running > target[:, None])
    before = _at(running, block) - _at(sums, block)
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    exceeds = (before[:, None] + jnp.cumsum(inside, axis=-1) > target[:, None]) & (inside > 0)
    # The block's own running sum may end below its sum by rounding: then it is its last token.
    last = _BLOCK - 1 - _first((inside > 0)[:, ::-1])
    offset = jnp.where(jnp.any(exceeds, axis=-1), _first(exceeds), last)
    return (block * _BLOCK + offset).astype(jnp.int32)


def _first(true_BN: Bool[Array, "B N"]) -> Int[Array, " B"]:
    return jnp.argmax(true_BN, axis=-1).astype(jnp.int32)


def _at(x_BN: Float[Array, "B N"], index_B: Int[Array, " B"]) -> Float[Array, " B"]:
    return jnp.take_along_axis(x_BN, index_B[:, None], axis=-1)[:, 0]
