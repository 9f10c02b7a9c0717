"""Sampling whose randomness is a function of (seed, step, problem, sample, position)."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32


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
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token per row from softmax(logits / temperature), and its log-probability there.

    Temperature 0 is greedy: the most likely token, its log-probability at temperature 1.
    Gumbel-max: argmax(logits / temperature + Gumbel noise of (key, position)).
    """
    greedy = temperature == 0
    scaled_BV = logits_BV / jnp.where(greedy, 1.0, temperature)

    def noise(key, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        return jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32)

    noise_BV = jax.vmap(noise)(keys_B2, positions_B)
    tokens_B = jnp.argmax(scaled_BV + jnp.where(greedy, 0.0, noise_BV), axis=-1)
    logp_BV = jax.nn.log_softmax(scaled_BV, axis=-1)
    return tokens_B, jnp.take_along_axis(logp_BV, tokens_B[:, None], axis=-1)[:, 0]
