"""The jitted half of the engine: slots, and the one program that moves them on.

A slot holds one row. The cache holds keys and values of all its tokens but the last, which the
next decode step feeds. `advance` puts in what the host has for the slots (new rows, outputs of
programs) and then decodes a segment. Everything a device decides about is in this one program, so
processes that launch it equally often agree on everything: loops end when all devices say so.

Shapes never depend on the rows at hand, so nothing recompiles, and a row's numbers do not depend
on its slot or its neighbours. Devices of the mesh axes `data` and `fsdp` each have slots of their
own; nothing of these travels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from cir_jax import mesh as meshes
from cir_jax.config import ModelConfig
from cir_jax.models import logprob, qwen
from cir_jax.models.cache import Cache, cache_axes, make_cache
from cir_jax.rollout import fence
from cir_jax.rollout.sampling import PLAIN, Sampling, sample

# Status of a slot. LOADING: its text is not all in yet; WAITING: a call has been noticed.
EMPTY, LOADING, RUNNING, WAITING, EOS, FULL = range(6)
# What a process that is asked to stop adds to its queued rows: all see it in the segment's report.
# More than any rollout has rows, and its sum over 2000 processes is still a number.
STOP = 2**20


class Slots(NamedTuple):
    """State of B slots. max_length: tokens at which a row is FULL."""

    cache: Cache
    last_id: Int[Array, " B"]
    length: Int[Array, " B"]
    max_length: Int[Array, " B"]
    status: Int[Array, " B"]
    fence_state: Int[Array, " B"]
    calls_left: Int[Array, " B"]
    keys: UInt32[Array, "B 2"]
    sampling: Sampling


class Work(NamedTuple):
    """What is done to each slot before a segment.

    ends: the row is given up.
    enters: a new row takes the slot, with max_length, calls_left, keys and sampling.
    ids, count: text that is put in, at most T tokens. is_output: of a program, which ends a model
      turn: the fence automaton starts anew, and the budget is one call shorter.
    source: a slot of the same device that begins with this text, a prompt; -1: none.
    is_last: with this text the row runs (again).
    queued: rows that are yet to come, at any slot of the process that holds them; plus STOP.
    """

    ends: Bool[Array, " B"]
    enters: Bool[Array, " B"]
    max_length: Int[Array, " B"]
    calls_left: Int[Array, " B"]
    keys: UInt32[Array, "B 2"]
    sampling: Sampling
    ids: Int[Array, "B T"]
    count: Int[Array, " B"]
    source: Int[Array, " B"]
    is_output: Bool[Array, " B"]
    is_last: Bool[Array, " B"]
    queued: Int[Array, " B"]


class Report(NamedTuple):
    """What a segment did. The tokens between `begin` and `length` are the first of `ids`.

    num_running, num_left: rows that run, and rows that are not done, of all processes; STOP or
      more of the latter: some are asked to stop.
    """

    status: Int[Array, " B"]
    begin: Int[Array, " B"]
    length: Int[Array, " B"]
    ids: Int[Array, "B n"]
    logp: Float[Array, "B n"]
    num_running: Int[Array, ""]
    num_left: Int[Array, ""]


# Logical axes of each array.
_ROW, _ROWS = ("batch",), ("batch", None)
_SAMPLING = Sampling(*[_ROW] * len(Sampling._fields))
_WORK_AXES = Work(*[_ROW] * len(Work._fields))._replace(keys=_ROWS, sampling=_SAMPLING, ids=_ROWS)
_REPORT_AXES = Report(_ROW, _ROW, _ROW, _ROWS, _ROWS, num_running=(), num_left=())


def slots_axes(dtype: str) -> Slots:
    """dtype: of the cache."""
    axes = Slots(*[_ROW] * len(Slots._fields))
    return axes._replace(cache=cache_axes(dtype), keys=_ROWS, sampling=_SAMPLING)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "num_slots", "length"))
def make_slots(*, cfg: ModelConfig, dtype: str, num_slots: int, length: int) -> Slots:
    """Empty slots of at least this length, their cache as `make_cache` makes it."""

    def zeros(dtype) -> Array:
        return jnp.zeros(num_slots, dtype)

    slots = Slots(
        cache=make_cache(cfg, num_slots, length, dtype),
        last_id=zeros(jnp.int32),
        length=zeros(jnp.int32),
        max_length=zeros(jnp.int32),
        status=jnp.full(num_slots, EMPTY, jnp.int8),
        fence_state=zeros(jnp.int8),
        calls_left=zeros(jnp.int32),
        keys=jnp.zeros((num_slots, 2), jnp.uint32),
        sampling=Sampling(
            zeros(jnp.float32), zeros(jnp.float32), zeros(jnp.int32), zeros(jnp.float32)
        ),
    )
    return jax.tree.map(
        lambda axes, x: meshes.constrain(x, *axes), slots_axes(dtype), slots, is_leaf=meshes.is_axes
    )


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "steps", "end_ids", "prefill_rows", "prefill_chunk"),
    donate_argnums=1,
)
def advance(
    params: qwen.Params,
    slots: Slots,
    work: Work,
    fence_table_QV: Int[Array, "Q V"],
    forced_BF: Int[Array, "B F"],
    max_stopped: Int[Array, ""],
    *,
    cfg: ModelConfig,
    steps: int,
    end_ids: tuple[int, ...],
    prefill_rows: int,
    prefill_chunk: int,
) -> tuple[Slots, Report]:
    """Does the work, then decodes at most `steps` tokens for each running row.

    The segment ends early when no row runs, and when more than max_stopped rows have come to
    wait, or to an end while rows are queued.

    params: as `qwen.for_decoding` makes them. end_ids: tokens that end a row.
    forced_BF: the token to write at each position, or below 0, or beyond F, a sampled one.
    prefill_rows, prefill_chunk: text goes in so many rows of a device and tokens at a time.
    """

    def local(params, slots, work, table, forced, max_stopped):
        slots = _enter(slots, work)
        slots = _put_in(params, cfg, slots, work, prefill_rows, prefill_chunk)
        slots = _copy_prompts(slots, work)
        queued = meshes.sum_rows(jnp.sum(work.queued))
        return _decode(params, cfg, slots, table, forced, max_stopped, queued, steps, end_ids)

    of_slots = slots_axes(slots.cache.dtype)
    axes = (qwen.decoding_axes(params, cfg), of_slots, _WORK_AXES, (None, None), _ROWS, ())
    run = meshes.over_rows(local, axes, (of_slots, _REPORT_AXES))
    return run(params, slots, work, fence_table_QV, forced_BF, max_stopped)


def _enter(slots: Slots, work: Work) -> Slots:
    def new(entering: Array, held: Array) -> Array:
        enters = work.enters.reshape((-1,) + (1,) * (held.ndim - 1))
        return jnp.where(enters, entering.astype(held.dtype), held)

    leaves = work.ends | work.enters
    return slots._replace(
        length=jnp.where(leaves, 0, slots.length),
        max_length=new(work.max_length, slots.max_length),
        status=jnp.where(leaves, EMPTY, slots.status).astype(jnp.int8),
        fence_state=new(jnp.full_like(slots.fence_state, fence.OUTSIDE), slots.fence_state),
        calls_left=new(work.calls_left, slots.calls_left),
        keys=new(work.keys, slots.keys),
        sampling=Sampling(*map(new, work.sampling, slots.sampling)),
    )


def _groups(
    chosen_B: Bool[Array, " B"], size: int
) -> tuple[Int[Array, " groups_size"], Int[Array, ""]]:
    """The chosen rows, group after group, and how many groups hold any, on any device.

    Entries beyond the chosen rows are B, which is no row.
    """
    B = len(chosen_B)
    rows = jnp.sort(jnp.where(chosen_B, jnp.arange(B), B))
    rows = jnp.pad(rows, (0, -B % size), constant_values=B)
    return rows, meshes.max_rows((jnp.sum(chosen_B) + size - 1) // size)


@jax.named_scope("put_in")
def _put_in(
    params: qwen.Params, cfg: ModelConfig, slots: Slots, work: Work, size: int, chunk_size: int
) -> Slots:
    """The work's texts, and their keys and values. A row that reaches its limit is FULL, the rest
    of its text is cut."""
    B, T = work.ids.shape
    S, C, R = slots.cache.length, min(chunk_size, T), min(size, B)
    has_text = (work.count > 0) & (work.source < 0)
    old = slots.length
    count = jnp.where(has_text, jnp.minimum(work.count, slots.max_length - old), 0)
    new = old + count

    # The token before these is not in the cache yet; the last of these need not be.
    fed_BT = jnp.concatenate([slots.last_id[:, None], work.ids[:, :-1]], axis=1)
    fed_BT = jnp.pad(fed_BT, ((0, 0), (0, -T % C)))
    rows, num_groups = _groups(count > 0, R)

    def group(g, cache):
        rows_R = jax.lax.dynamic_slice(rows, (g * R,), (R,))
        count_R = count.at[rows_R].get(mode="fill", fill_value=0)
        old_R = old.at[rows_R].get(mode="fill", fill_value=0)

        def chunk(c, cache):
            fed_BC = jax.lax.dynamic_slice(fed_BT, (0, c * C), (B, C))
            offsets = (c * C + jnp.arange(C))[None]
            positions_RC = old_R[:, None] - 1 + offsets
            inside = (offsets < count_R[:, None]) & (positions_RC >= 0)
            _, cache = qwen.forward_cached(
                params,
                cfg,
                fed_BC.at[rows_R].get(mode="clip"),
                jnp.where(inside, positions_RC, S),
                cache,
                rows_R,
            )
            return cache

        num_chunks = meshes.max_rows((jnp.max(count_R) + C - 1) // C)
        return jax.lax.fori_loop(0, num_chunks, chunk, cache)

    cache = jax.lax.fori_loop(0, num_groups, group, slots.cache)
    runs = jnp.where(work.is_last, RUNNING, LOADING)
    status = jnp.where(new >= slots.max_length, FULL, runs)
    return slots._replace(
        cache=cache,
        last_id=jnp.where(count > 0, _last(work), slots.last_id),
        length=new,
        status=jnp.where(has_text, status, slots.status).astype(jnp.int8),
        fence_state=jnp.where(has_text, fence.OUTSIDE, slots.fence_state).astype(jnp.int8),
        calls_left=slots.calls_left - (work.is_output & work.is_last & has_text),
    )


def _last(work: Work) -> Int[Array, " B"]:
    return work.ids[jnp.arange(len(work.count)), jnp.maximum(work.count - 1, 0)]


@jax.named_scope("copy_prompts")
def _copy_prompts(slots: Slots, work: Work) -> Slots:
    """Prompts that another row of the device holds, and their keys and values, bit by bit."""
    copies = work.source >= 0
    length = min(work.ids.shape[1], slots.cache.length)
    targets = jnp.argsort(~copies)

    def copy(n, cache):
        return cache.copy_row(work.source[targets[n]], targets[n], length)

    return slots._replace(
        cache=jax.lax.fori_loop(0, jnp.sum(copies), copy, slots.cache),
        last_id=jnp.where(copies, _last(work), slots.last_id),
        length=jnp.where(copies, work.count, slots.length),
        status=jnp.where(copies, RUNNING, slots.status).astype(jnp.int8),
    )


@jax.named_scope("decode")
def _decode(
    params, cfg, slots: Slots, table_QV, forced_BF, max_stopped, queued, steps, end_ids
) -> tuple[Slots, Report]:
    B = len(slots.length)
    S = slots.cache.length
    rows_B = jnp.arange(B)
    begin = slots.length
    began = slots.status

    def counts(slots: Slots) -> Int[Array, "3"]:
        """Of all processes: rows that run, that have come to wait, and to an end."""

        def has_become(*status):
            return jnp.isin(slots.status, jnp.array(status)) & (began == RUNNING)

        chosen = slots.status == RUNNING, has_become(WAITING), has_become(EOS, FULL)
        return meshes.sum_rows(jnp.stack([jnp.sum(x, dtype=jnp.int32) for x in chosen]))

    def goes_on(carry):
        n, (running, waiting, ended), *_ = carry
        stopped = waiting + jnp.where(queued > 0, ended, 0)
        return (n < steps) & (running > 0) & (stopped <= max_stopped)

    def step(carry):
        n, _, slots, ids_Bn, logp_Bn = carry
        runs = slots.status == RUNNING
        positions_B1 = jnp.where(runs, slots.length - 1, S)[:, None]
        hidden, cache = qwen.forward_cached(
            params, cfg, slots.last_id[:, None], positions_B1, slots.cache
        )
        logits_VB = logprob.step_logits(hidden[:, 0], qwen.head_table(params))
        logits_VB = meshes.constrain(logits_VB, "vocab", "batch")
        # Rows that do not run ask for nothing that costs time.
        asked = Sampling(
            *(jnp.where(runs, x, plain) for x, plain in zip(slots.sampling, PLAIN, strict=True))
        )
        forced_B = forced_BF.at[rows_B, slots.length].get(mode="fill", fill_value=-1)
        token, logp = sample(logits_VB, slots.keys, slots.length, asked, forced_B)

        length = slots.length + runs
        fence_state = jnp.where(
            runs, table_QV[slots.fence_state.astype(jnp.int32), token], slots.fence_state
        )
        called = (fence_state == fence.CALL) & (slots.calls_left > 0)
        status = jnp.where(called, WAITING, RUNNING)
        status = jnp.where(length >= slots.max_length, FULL, status)
        status = jnp.where(jnp.isin(token, jnp.array(end_ids, jnp.int32)), EOS, status)
        slots = slots._replace(
            cache=cache,
            last_id=jnp.where(runs, token, slots.last_id),
            length=length,
            fence_state=fence_state,
            status=jnp.where(runs, status, slots.status).astype(jnp.int8),
        )
        ids_Bn = ids_Bn.at[:, n].set(token)
        logp_Bn = logp_Bn.at[:, n].set(logp)
        return n + 1, counts(slots), slots, ids_Bn, logp_Bn

    start = (
        jnp.int32(0),
        counts(slots),
        slots,
        jnp.zeros((B, steps), jnp.int32),
        jnp.zeros((B, steps), jnp.float32),
    )
    _, (running, *_), slots, ids_Bn, logp_Bn = jax.lax.while_loop(goes_on, step, start)
    unfinished = jnp.isin(slots.status, jnp.array([LOADING, RUNNING, WAITING]))
    left = meshes.sum_rows(jnp.sum(unfinished, dtype=jnp.int32)) + queued
    return slots, Report(slots.status, begin, slots.length, ids_Bn, logp_Bn, running, left)
