"""Trajectories -> packed training arrays [M, R, T]: micro-batches of packed rows.

Several trajectories share a row, each its own segment with positions from 0. All arrays are
aligned to the token: entry t tells of token t, not of the one predicted after it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cir_jax.records import Author


class Sequence1D(NamedTuple):
    """One trajectory to train on: ids, author and the sampler's log-probabilities [T], and one
    advantage for all its tokens. Demonstrations have neither of the last two."""

    ids: np.ndarray
    author: np.ndarray
    sampler_logp: np.ndarray | float = 0.0
    advantage: float = 0.0


class TrainBatch(NamedTuple):
    """segment_ids: 1, 2, ... within a row, 0 for padding; trained: the policy sampled it."""

    ids: Int[Array, "M R T"]
    positions: Int[Array, "M R T"]
    segment_ids: Int[Array, "M R T"]
    trained: Bool[Array, "M R T"]
    sampler_logp: Float[Array, "M R T"]
    advantage: Float[Array, "M R T"]


def plan_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """First-fit decreasing: indices of the sequences that share each row, longest first."""
    too_long = [i for i, n in enumerate(lengths) if n > row_length]
    if too_long:
        i = too_long[0]
        raise ValueError(f"sequence {i} has {lengths[i]} tokens, more than a row: {row_length}")
    rows: list[list[int]] = []
    room: list[int] = []
    open_from = 0
    shortest = min(lengths, default=0)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for r in range(open_from, len(rows)):
            if room[r] >= lengths[i]:
                break
        else:
            r = len(rows)
            rows.append([])
            room.append(row_length)
        rows[r].append(i)
        room[r] -= lengths[i]
        while open_from < len(rows) and room[open_from] < shortest:
            open_from += 1
    return rows


def pack(
    sequences: Sequence[Sequence1D], *, row_length: int, micro_rows: int, max_micro: int
) -> tuple[TrainBatch, int]:
    """Packed rows as [max_micro, micro_rows, row_length], and how many micro-batches are filled.

    max_micro fixes the shape whatever the sequences' lengths; the rest is padding.
    """
    rows = plan_rows([len(s.ids) for s in sequences], row_length)
    num_micro = -(-len(rows) // micro_rows)
    if num_micro > max_micro:
        raise ValueError(f"{len(rows)} rows do not fit into {max_micro} x {micro_rows}")
    shape = (max_micro * micro_rows, row_length)
    ids, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    trained = np.zeros(shape, bool)
    sampler_logp, advantage = (np.zeros(shape, np.float32) for _ in range(2))
    for r, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members, start=1):
            seq = sequences[i]
            at = slice(start, start + len(seq.ids))
            ids[r, at] = seq.ids
            positions[r, at] = np.arange(len(seq.ids))
            segment_ids[r, at] = segment
            trained[r, at] = seq.author == Author.MODEL
            sampler_logp[r, at] = seq.sampler_logp
            advantage[r, at] = seq.advantage
            start = at.stop
    arrays = (ids, positions, segment_ids, trained, sampler_logp, advantage)
    batch = TrainBatch(*(a.reshape(max_micro, micro_rows, row_length) for a in arrays))
    return batch, num_micro


def max_micro(num_sequences: int, micro_rows: int) -> int:
    """Micro-batches that hold any num_sequences: at worst each takes a row of its own."""
    return -(-num_sequences // micro_rows)


def micro(batch: TrainBatch, m: Int[Array, ""]) -> TrainBatch:
    """Micro-batch m, without its leading axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False), batch)
