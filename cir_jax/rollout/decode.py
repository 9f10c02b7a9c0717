"""The jitted half of the engine: slots, decode segments, prefill.

A slot holds one row: its ids, who wrote each and with what log-probability, written where the
token is written. The cache holds keys and values of all its tokens but the last, which the next
decode step feeds. Shapes never depend on the rows at hand, so nothing recompiles, and a row's
numbers do not depend on its slot or its neighbours.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from cir_jax.config import ModelConfig
from cir_jax.mesh import constrain
from cir_jax.models import logprob, qwen
from cir_jax.models.cache import Cache, make_cache
from cir_jax.records import Author
from cir_jax.rollout import fence
from cir_jax.rollout.sampling import sample

# Status of a slot.
EMPTY, RUNNING, WAITING, EOS, FULL = range(5)


class Slots(NamedTuple):
    """State of B slots of S tokens. WAITING: a call has just been noticed."""

    cache: Cache
    ids: Int[Array, "B S"]
    author: Int[Array, "B S"]
    logp: Float[Array, "B S"]
    length: Int[Array, " B"]
    max_length: Int[Array, " B"]
    status: Int[Array, " B"]
    fence_state: Int[Array, " B"]
    calls_left: Int[Array, " B"]
    keys: UInt32[Array, "B 2"]


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "num_slots", "length"))
def make_slots(*, cfg: ModelConfig, dtype: str, num_slots: int, length: int) -> Slots:
    """Empty slots of at least this length, their cache in the given type."""
    cache = make_cache(cfg, num_slots, length, dtype)
    B, S = num_slots, cache.length
    return Slots(
        cache=cache,
        ids=constrain(jnp.zeros((B, S), jnp.int32), "batch", "length"),
        author=constrain(jnp.zeros((B, S), jnp.int8), "batch", "length"),
        logp=constrain(jnp.zeros((B, S), jnp.float32), "batch", "length"),
        length=jnp.zeros(B, jnp.int32),
        max_length=jnp.zeros(B, jnp.int32),
        status=jnp.full(B, EMPTY, jnp.int8),
        fence_state=jnp.zeros(B, jnp.int8),
        calls_left=jnp.zeros(B, jnp.int32),
        keys=jnp.zeros((B, 2), jnp.uint32),
    )


@functools.partial(jax.jit, donate_argnums=0)
def admit(
    slots: Slots,
    rows_R: Int[Array, " R"],
    keys_R2: UInt32[Array, "R 2"],
    max_length_R: Int[Array, " R"],
    calls_R: Int[Array, " R"],
) -> Slots:
    """Empties slots for new rows, which stay EMPTY until their prompt is in.

    Rows outside 0..B-1 are padding, here and in `extend`.
    """

    def put(x, value):
        return x.at[rows_R].set(value, mode="drop")

    return slots._replace(
        length=put(slots.length, 0),
        max_length=put(slots.max_length, max_length_R),
        status=put(slots.status, EMPTY),
        fence_state=put(slots.fence_state, fence.OUTSIDE),
        calls_left=put(slots.calls_left, calls_R),
        keys=put(slots.keys, keys_R2),
    )


@functools.partial(jax.jit, static_argnames="length", donate_argnums=0)
def fork(
    slots: Slots,
    sources_R: Int[Array, " R"],
    targets_R: Int[Array, " R"],
    count_R: Int[Array, " R"],
    *,
    length: int,
) -> Slots:
    """Copies the first count_R tokens of other rows, and lets the rows run.

    Their prompts are the same, and so are their keys and values, bit by bit.
    length: static bound of count_R. Targets outside 0..B-1 are padding.
    """

    def copied(x_BS):
        part = x_BS[:, :length].at[sources_R].get(mode="clip")
        return x_BS.at[targets_R, :length].set(part, mode="drop")

    return slots._replace(
        cache=slots.cache.copy_rows(sources_R, targets_R, length),
        ids=copied(slots.ids),
        author=copied(slots.author),
        logp=copied(slots.logp),
        length=slots.length.at[targets_R].set(count_R, mode="drop"),
        status=slots.status.at[targets_R].set(jnp.int8(RUNNING), mode="drop"),
    )


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnums=1)
def extend(
    params: qwen.Params,
    slots: Slots,
    rows_R: Int[Array, " R"],
    ids_RC: Int[Array, "R C"],
    count_R: Int[Array, " R"],
    author: Int[Array, ""],
    last_R: Bool[Array, " R"],
    *,
    cfg: ModelConfig,
) -> Slots:
    """Appends count_R of ids_RC to rows that do not run, and fills the cache up to them.

    Prompts and tool outputs come in through here, in chunks of C; with a text's last chunk the
    row runs again. Tool output ends a model turn: the fence automaton starts anew, and the
    budget is one call shorter. A row that reaches its limit is FULL, the rest is cut.
    """
    R, C = ids_RC.shape
    S = slots.ids.shape[1]
    old = slots.length.at[rows_R].get(mode="clip")
    limit = slots.max_length.at[rows_R].get(mode="clip")
    count_R = jnp.minimum(count_R, limit - old)
    new = old + count_R
    offsets = jnp.arange(C)[None]

    rows_RC = jnp.broadcast_to(rows_R[:, None], (R, C))
    write_RC = jnp.where(offsets < count_R[:, None], old[:, None] + offsets, S)
    at = (rows_RC, write_RC)
    ids = slots.ids.at[at].set(ids_RC, mode="drop")
    slots = slots._replace(
        ids=ids,
        author=slots.author.at[at].set(author.astype(jnp.int8), mode="drop"),
        logp=slots.logp.at[at].set(0.0, mode="drop"),
    )

    # The token before these is not in the cache yet; the last of these need not be.
    first = jnp.maximum(old - 1, 0)[:, None] + offsets
    inside = first < new[:, None] - 1
    fed_RC = ids.at[rows_RC, jnp.minimum(first, S - 1)].get(mode="clip")
    positions_RC = jnp.where(inside, first, S)
    _, cache = qwen.forward_cached(params, cfg, fed_RC, positions_RC, slots.cache, rows_R)

    runs = last_R & (new < limit)
    status = jnp.where(runs, RUNNING, jnp.where(new >= limit, FULL, EMPTY)).astype(jnp.int8)
    called = (last_R & (author == Author.TOOL)).astype(jnp.int32)
    return slots._replace(
        cache=cache,
        length=slots.length.at[rows_R].set(new, mode="drop"),
        status=slots.status.at[rows_R].set(status, mode="drop"),
        fence_state=slots.fence_state.at[rows_R].set(fence.OUTSIDE, mode="drop"),
        calls_left=slots.calls_left.at[rows_R].add(-called, mode="drop"),
    )


@functools.partial(jax.jit, static_argnames=("cfg", "steps", "eos_id"), donate_argnums=1)
def decode_segment(
    params: qwen.Params,
    slots: Slots,
    fence_table_QV: Int[Array, "Q V"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    max_waiting: Int[Array, ""],
    *,
    cfg: ModelConfig,
    steps: int,
    eos_id: int,
) -> Slots:
    """At most `steps` tokens for each running row; ends early when no row runs, and when more
    than max_waiting rows have begun to wait.

    """
    B, S = slots.ids.shape
    waited = jnp.sum(slots.status == WAITING)
    rows_B = jnp.arange(B)

    def step(carry):
        n, slots = carry
        runs = slots.status == RUNNING
        last = slots.length - 1
        ids_B1 = slots.ids[rows_B, jnp.maximum(last, 0)][:, None]
        positions_B1 = jnp.where(runs, last, S)[:, None]
        hidden, cache = qwen.forward_cached(params, cfg, ids_B1, positions_B1, slots.cache)
        logits_BV = logprob.logits(hidden[:, 0], qwen.head_table(params))
        token, logp = sample(logits_BV, slots.keys, slots.length, temperature, top_p)

        at = (rows_B, jnp.where(runs, slots.length, S))
        length = slots.length + runs
        fence_state = jnp.where(
            runs, fence_table_QV[slots.fence_state.astype(jnp.int32), token], slots.fence_state
        )
        called = (fence_state == fence.CALL) & (slots.calls_left > 0)
        status = jnp.where(called, WAITING, RUNNING)
        status = jnp.where(length >= slots.max_length, FULL, status)
        status = jnp.where(token == eos_id, EOS, status)
        return n + 1, slots._replace(
            cache=cache,
            ids=slots.ids.at[at].set(token, mode="drop"),
            author=slots.author.at[at].set(jnp.int8(Author.MODEL), mode="drop"),
            logp=slots.logp.at[at].set(logp, mode="drop"),
            length=length,
            fence_state=fence_state,
            status=jnp.where(runs, status, slots.status).astype(jnp.int8),
        )

    def goes_on(carry):
        n, slots = carry
        waiting = jnp.sum(slots.status == WAITING) - waited
        return (n < steps) & jnp.any(slots.status == RUNNING) & (waiting <= max_waiting)

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), slots))[1]
