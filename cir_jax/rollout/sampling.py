"""Sampling whose randomness is a function of (seed, step, problem, sample, position)."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from cir_jax import mesh as meshes

# Entries that are summed first where a running sum over the vocabulary is needed.
_BLOCK = 128
# Rows that are looked at apart from the others, once no more are left whose token is in doubt.
_FEW = 4
# Attempts whose random numbers are made at once.
_AT_HAND = 4


class Sampling(NamedTuple):
    """How tokens are drawn: numbers of one request, or arrays with one entry per row.

    temperature: divides the logits; 0 is greedy, whatever the others say.
    top_p: below 1, only tokens are drawn for which those more likely than them have less than
      this mass together (nucleus sampling, arXiv:1904.09751).
    top_k: above 0, only tokens that fewer than so many are more likely than.
    min_p: only tokens at least so likely, as a share of the most likely one's probability
      (arXiv:2407.01082).

    Each bound is one on the whole softmax(logits / temperature), and all hold. Equally likely
    tokens are in or out together.
    """

    temperature: Float[Array, " B"] | float
    top_p: Float[Array, " B"] | float = 1.0
    top_k: Int[Array, " B"] | int = 0
    min_p: Float[Array, " B"] | float = 0.0


PLAIN = Sampling(temperature=1.0)
GREEDY = Sampling(temperature=0.0)


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


@jax.named_scope("sample")
def sample(
    logits_VB: Float[Array, "V B"],
    keys_B2: UInt32[Array, "B 2"],
    positions_B: Int[Array, " B"],
    sampling: Sampling,
    forced_B: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token per row and its log-probability in softmax(logits / temperature), all of it.

    Of a greedy row the most likely token, and its log-probability at temperature 1.
    forced_B: the token that is taken instead, if it is not below 0.

    One uniform number of (key, position, attempt) is looked up in the running sum. Bounds need
    no sort: what they allow is always the tokens above some probability. So a token drawn from
    outside is drawn again from those more likely than it, which include all that are allowed,
    until every row's token is. Each attempt reads the logits once, or on a CPU, where a few rows
    are left, theirs.

    The vocabulary comes first: the rows are what is computed side by side. Where the mesh axis
    `tensor` shares the vocabulary, each device looks at its part, and only numbers per row travel.
    """
    rows = ("batch",)
    axes = (("vocab", "batch"), ("batch", None), rows, Sampling(*[rows] * 4), rows)
    draw = meshes.over_auto(_sample, axes, (rows, rows))
    return draw(logits_VB, keys_B2, positions_B, sampling, forced_B)


def _sample(logits_VB, keys_B2, positions_B, sampling: Sampling, forced_B):
    temperature_B, top_p_B, top_k_B, min_p_B = sampling
    greedy_B = temperature_B == 0
    # Logits are divided where they are used: an array of quotients would be written and read.
    scale_B = 1 / jnp.where(greedy_B, 1.0, temperature_B)
    tops_SB = meshes.each_tensor_shard(jnp.max(logits_VB, axis=0))
    top_B = jnp.max(tops_SB, axis=0)
    drawing = _Drawing(logits_VB, top_B, scale_B, _uniforms(keys_B2, positions_B))

    nothing_B = jnp.full(top_B.shape, -jnp.inf)
    running_NB = drawing.running_of_all()
    total_B = jnp.sum(meshes.each_tensor_shard(running_NB[-1]), axis=0)
    # Just below what is allowed, since tokens are drawn from strictly above the floor.
    least_B = jnp.nextafter(top_B + jnp.log(min_p_B) / scale_B, nothing_B)
    floor_B = jnp.where(min_p_B > 0, least_B, nothing_B)
    running_NB = jax.lax.cond(
        jnp.any(min_p_B > 0), lambda: drawing.running(floor_B), lambda: running_NB
    )
    token_B, logit_B = drawing.draw(running_NB, floor_B, jnp.int32(0))

    def attempt(carry):
        n, *found = carry
        # Tied to the loop, or else all weights would be computed and stored before it.
        top_B, n = jax.lax.optimization_barrier((drawing.top_B, n))
        bounds = _Bounds(drawing._replace(top_B=top_B), total_B, top_p_B, top_k_B)
        return n + 1, *_retry(bounds, found, n)

    def all_allowed(carry):
        # All devices stop together: the attempts exchange numbers.
        return meshes.sum_rows(jnp.sum(~carry[3], dtype=jnp.int32)) == 0

    allowed_B = greedy_B | (forced_B >= 0) | ((top_p_B >= 1) & (top_k_B == 0))
    # Two kinds need no look at the others: the most likely token, and one so likely that those
    # above it cannot have as much mass, whatever the rounding.
    allowed_B |= logit_B >= top_B
    weight_B = jnp.exp((logit_B - top_B) * scale_B)
    allowed_B |= (weight_B > (1 - top_p_B + 1e-3) * total_B) & (top_k_B == 0)
    start = (jnp.int32(1), token_B, logit_B, allowed_B)
    _, token_B, logit_B, _ = _until(all_allowed, attempt, start)

    best_B = jax.lax.cond(
        jnp.any(greedy_B),
        lambda: jnp.argmax(logits_VB, axis=0).astype(jnp.int32),
        lambda: jnp.zeros_like(token_B),
    )
    best_SB = meshes.each_tensor_shard(best_B + meshes.tensor_shard() * len(logits_VB))
    best_B = _at(best_SB, _first(tops_SB == top_B[None]))
    token_B = jnp.where(greedy_B, best_B, token_B)
    logit_B = jnp.where(greedy_B, top_B, logit_B)

    # Each device knows the logit of the forced tokens in its part.
    own_B = forced_B - meshes.tensor_shard() * len(logits_VB)
    is_own_B = (own_B >= 0) & (own_B < len(logits_VB))
    forced_logit_B = _at(logits_VB, jnp.clip(own_B, 0, len(logits_VB) - 1))
    forced_logit_SB = meshes.each_tensor_shard(jnp.where(is_own_B, forced_logit_B, -jnp.inf))
    token_B = jnp.where(forced_B >= 0, forced_B, token_B)
    logit_B = jnp.where(forced_B >= 0, jnp.max(forced_logit_SB, axis=0), logit_B)
    return token_B, (logit_B - top_B) * scale_B - jnp.log(total_B)


def _until(done, body, start):
    """Runs the body until `done`, which is computed outside of the loop's condition: there,
    devices could not agree."""

    def step(carry):
        state = body(carry[1])
        return done(state), state

    return jax.lax.while_loop(lambda carry: ~carry[0], step, (done(start), start))[1]


def _ends(weights_NEB: Float[Array, "N E B"]) -> Float[Array, "N B"]:
    return jnp.cumsum(jnp.sum(weights_NEB, axis=1), axis=0)


class _Uniforms(NamedTuple):
    """A number in [0, 1) of each attempt. The first few are at hand, since to make some costs as
    much as to make one."""

    keys_B2: UInt32[Array, "B 2"]
    first_BA: Float[Array, "B A"]

    def of(self, attempt: Int[Array, ""]) -> Float[Array, " B"]:
        def later(key):
            return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), attempt))

        count = self.first_BA.shape[1]
        return jax.lax.cond(
            attempt < count,
            lambda: jnp.take(self.first_BA, attempt, axis=1, mode="clip"),
            lambda: jax.vmap(later)(self.keys_B2),
        )


def _uniforms(keys_B2: UInt32[Array, "B 2"], positions_B: Int[Array, " B"]) -> _Uniforms:
    def of_row(key, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        return jax.random.key_data(key), jax.random.uniform(key, (_AT_HAND,))

    return _Uniforms(*jax.vmap(of_row)(keys_B2, positions_B))


class _Drawing(NamedTuple):
    """Looks uniform numbers up in running sums of exp((logit - top) scale)."""

    logits_VB: Float[Array, "V B"]
    top_B: Float[Array, " B"]
    scale_B: Float[Array, " B"]
    uniforms: "_Uniforms"

    def _blocks(self) -> Float[Array, "N E B"]:
        V, B = self.logits_VB.shape
        padding = ((0, -V % _BLOCK), (0, 0))
        padded = jnp.pad(self.logits_VB, padding, constant_values=-jnp.inf)
        return padded.reshape(-1, _BLOCK, B)

    def _weights(self, logits: Float[Array, "*N B"], floor_B: Float[Array, " B"]):
        floor, top, scale = (
            x.reshape((1,) * (logits.ndim - 1) + (-1,)) for x in (floor_B, self.top_B, self.scale_B)
        )
        return jnp.where(logits > floor, jnp.exp((logits - top) * scale), 0.0)

    def running(self, floor_B: Float[Array, " B"]) -> Float[Array, "N B"]:
        """Weight of the tokens above the floor, up to the end of each block."""
        return _ends(self._weights(self._blocks(), floor_B))

    def running_of_all(self) -> Float[Array, "N B"]:
        """The same without a floor; on a CPU, there is a faster kernel for what selects nothing."""
        return _ends(jnp.exp((self._blocks() - self.top_B[None, None]) * self.scale_B[None, None]))

    def draw(
        self, running_NB: Float[Array, "N B"], floor_B: Float[Array, " B"], attempt: Int[Array, ""]
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """A token above the floor and its logit: the first at which the running sum
        exceeds uniform x total, found by device, block and entry."""
        shards_SB = jnp.cumsum(meshes.each_tensor_shard(running_NB[-1]), axis=0)
        target_B = self.uniforms.of(attempt) * shards_SB[-1]
        shard_B, target_B = _find(shards_SB, target_B)
        block_B, target_B = _find(running_NB, target_B)
        inside_EB = jnp.take_along_axis(self._blocks(), block_B[None, None], axis=0)[0]
        weights_EB = self._weights(inside_EB, floor_B)
        exceeds_EB = (jnp.cumsum(weights_EB, axis=0) > target_B[None]) & (weights_EB > 0)
        # The entries' own running sum may end below the block's by rounding: then it is the last.
        last_B = _BLOCK - 1 - _first((weights_EB > 0)[::-1])
        entry_B = jnp.where(jnp.any(exceeds_EB, axis=0), _first(exceeds_EB), last_B)
        first = meshes.tensor_shard() * len(self.logits_VB)
        token_B = (first + block_B * _BLOCK + entry_B).astype(jnp.int32)
        found = (meshes.each_tensor_shard(x) for x in (token_B, _at(inside_EB, entry_B)))
        return tuple(_at(x_SB, shard_B) for x_SB in found)


class _Bounds(NamedTuple):
    """Which tokens may be drawn. total_B: weight of all tokens."""

    drawing: _Drawing
    total_B: Float[Array, " B"]
    top_p_B: Float[Array, " B"]
    top_k_B: Int[Array, " B"]

    def of_rows(self, rows_F: Int[Array, " F"]) -> "_Bounds":
        logits_VB, *of_row = self.drawing
        columns_VF = logits_VB.at[:, rows_F].get(mode="clip")
        of_row, bounds = jax.tree.map(
            lambda x: x.at[rows_F].get(mode="clip"), (of_row, tuple(self[1:]))
        )
        return _Bounds(_Drawing(columns_VF, *of_row), *bounds)

    def check(
        self, logit_B: Float[Array, " B"], attempt: Int[Array, ""]
    ) -> tuple[Bool[Array, " B"], Int[Array, " B"], Float[Array, " B"]]:
        """Whether tokens of these logits are allowed; and others that are more likely, with their
        logits."""
        running_NB = self.drawing.running(logit_B)
        above_B = jnp.sum(meshes.each_tensor_shard(running_NB[-1]), axis=0)
        logits_VB = self.drawing.logits_VB
        # How many are above costs another look at the logits. Float32 counts to 2^24 exactly.
        count_B = jax.lax.cond(
            jnp.any(self.top_k_B > 0),
            lambda: jnp.sum((logits_VB > logit_B[None]).astype(jnp.float32), axis=0),
            lambda: jnp.zeros_like(above_B),
        )
        count_B = jnp.sum(meshes.each_tensor_shard(count_B), axis=0)
        beyond_B = (above_B >= self.top_p_B * self.total_B) & (self.top_p_B < 1)
        beyond_B |= (count_B >= self.top_k_B) & (self.top_k_B > 0)
        # Where nothing is above, as with logits that are no numbers, no other draw would help.
        return ~beyond_B | (above_B <= 0), *self.drawing.draw(running_NB, logit_B, attempt)


def _retry(
    bounds: _Bounds, found: Sequence[Array], attempt: Int[Array, ""]
) -> tuple[Int[Array, " B"], Float[Array, " B"], Bool[Array, " B"]]:
    """Checks the tokens that are not known to be allowed, and draws others where they are not.

    found: token, logit, and whether it is known to be allowed, of each row; so is the result.
    """

    def tried(bounds, token_B, logit_B, allowed_B):
        is_allowed_B, again_B, again_logit_B = bounds.check(logit_B, attempt)
        allowed_B |= is_allowed_B
        return (
            jnp.where(allowed_B, token_B, again_B),
            jnp.where(allowed_B, logit_B, again_logit_B),
            allowed_B,
        )

    def tried_few():
        rows_F = jnp.nonzero(is_open_B, size=_FEW, fill_value=B)[0]
        of_few = tried(bounds.of_rows(rows_F), *(x.at[rows_F].get(mode="clip") for x in found))
        return tuple(
            x.at[rows_F].set(new, mode="drop") for x, new in zip(found, of_few, strict=True)
        )

    is_open_B = ~found[-1]
    B = len(is_open_B)
    # Elsewhere, to take columns out costs more than to look at all.
    if meshes.platform() != "cpu" or B <= _FEW:
        return tried(bounds, *found)
    are_few = meshes.max_rows(jnp.sum(is_open_B, dtype=jnp.int32)) <= _FEW
    return jax.lax.cond(are_few, tried_few, lambda: tried(bounds, *found))


def _find(
    running_NB: Float[Array, "N B"], target_B: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The first entry that the target is below, and the target less what comes before it.

    A target that rounding has brought to the end is taken as just below it.
    """
    end_B = running_NB[-1]
    target_B = jnp.minimum(target_B, jnp.nextafter(end_B, jnp.zeros_like(end_B)))
    index_B = _first(running_NB > target_B[None])
    before_B = jnp.where(index_B > 0, _at(running_NB, jnp.maximum(index_B - 1, 0)), 0.0)
    return index_B, target_B - before_B


def _first(true_NB: Bool[Array, "N B"]) -> Int[Array, " B"]:
    return jnp.argmax(true_NB, axis=0).astype(jnp.int32)


def _at(x_NB: Array, index_B: Int[Array, " B"]) -> Array:
    return jnp.take_along_axis(x_NB, index_B[None], axis=0)[0]
