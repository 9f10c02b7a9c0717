"""Trajectories -> packed training arrays [M, R, T]: micro-batches of packed rows.

Several trajectories share a row, each its own segment with positions from 0. All arrays are
aligned to the token: entry t tells of token t, not of the one predicted after it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from cir_jax.records import Author

Tree = TypeVar("Tree")


class Sequence1D(NamedTuple):
    """One trajectory to train on.

    sampler_logp, advantage: [T], or one for all tokens; demonstrations have none. weight: of its
    trained tokens in the loss, relative to a mean over tokens. train_tool: whether its tool
    tokens are trained as well.
    """

    ids: np.ndarray
    author: np.ndarray
    sampler_logp: np.ndarray | float = 0.0
    advantage: np.ndarray | float = 0.0
    weight: float = 1.0
    train_tool: bool = False

    @property
    def trained(self) -> np.ndarray:
        """The loss's mask [T]: what the model wrote, unless the tool's tokens are asked for."""
        return trained_tokens(self.author, self.train_tool)


def trained_tokens(author: np.ndarray, train_tool: bool) -> np.ndarray:
    return (author == Author.MODEL) | (train_tool & (author == Author.TOOL))


class TrainBatch(NamedTuple):
    """segment_ids: 1, 2, ... within a row, 0 for padding; sampled: the policy drew it; trained:
    the loss counts it, with this weight (0 for the others)."""

    ids: Int[Array, "M R T"]
    positions: Int[Array, "M R T"]
    segment_ids: Int[Array, "M R T"]
    sampled: Bool[Array, "M R T"]
    trained: Bool[Array, "M R T"]
    weight: Float[Array, "M R T"]
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


class Layout:
    """Where the tokens of sequences of these lengths lie in packed rows [M, R, T].

    max_micro fixes the shape whatever the lengths; the rest is padding. num_micro: how many
    micro-batches are filled.
    """

    def __init__(self, lengths: Sequence[int], *, row_length: int, micro_rows: int, max_micro: int):
        rows = plan_rows(lengths, row_length)
        self.num_micro = -(-len(rows) // micro_rows)
        if self.num_micro > max_micro:
            raise ValueError(f"{len(rows)} rows do not fit into {max_micro} x {micro_rows}")
        self._shape = (max_micro, micro_rows, row_length)
        # Of each sequence: its number within the row, and its part of all rows' tokens.
        self._segment = [0] * len(lengths)
        self._at = [slice(0)] * len(lengths)
        for r, members in enumerate(rows):
            start = r * row_length
            for segment, i in enumerate(members, start=1):
                self._segment[i] = segment
                self._at[i] = slice(start, start + lengths[i])
                start += lengths[i]

    def pack(
        self, values: Iterable[np.ndarray | float | int], dtype: type
    ) -> Shaped[np.ndarray, "M R T"]:
        """Of each sequence an array [T], or one number for all its tokens; padding is 0."""
        packed = np.zeros(np.prod(self._shape), dtype)
        for at, value in zip(self._at, values, strict=True):
            packed[at] = value
        return packed.reshape(self._shape)

    def unpack(self, packed: Shaped[np.ndarray, "M R T"]) -> list[np.ndarray]:
        """The reverse: each sequence's own."""
        return [packed.reshape(-1)[at] for at in self._at]

    def batch(self, sequences: Sequence[Sequence1D]) -> TrainBatch:
        return TrainBatch(
            ids=self.pack((s.ids for s in sequences), np.int32),
            positions=self.pack((np.arange(len(s.ids)) for s in sequences), np.int32),
            segment_ids=self.pack(self._segment, np.int32),
            sampled=self.pack((s.author == Author.MODEL for s in sequences), bool),
            trained=self.pack((s.trained for s in sequences), bool),
            weight=self.pack((s.trained * s.weight for s in sequences), np.float32),
            sampler_logp=self.pack((s.sampler_logp for s in sequences), np.float32),
            advantage=self.pack((s.advantage for s in sequences), np.float32),
        )


def pack(
    sequences: Sequence[Sequence1D], *, row_length: int, micro_rows: int, max_micro: int
) -> tuple[TrainBatch, int]:
    """The sequences in a layout of their own, and how many micro-batches are filled."""
    layout = Layout(
        [len(s.ids) for s in sequences],
        row_length=row_length,
        micro_rows=micro_rows,
        max_micro=max_micro,
    )
    return layout.batch(sequences), layout.num_micro


def abstract_batch(shape: tuple[int, int, int]) -> TrainBatch:
    """Shapes and types of packed arrays [M, R, T]."""
    layout = Layout([1], row_length=1, micro_rows=1, max_micro=1)
    one = layout.batch([Sequence1D(np.zeros(1, np.int32), np.zeros(1, np.int8))])
    return TrainBatch(*(jax.ShapeDtypeStruct(shape, x.dtype) for x in one))


def max_micro(num_sequences: int, micro_rows: int) -> int:
    """Micro-batches that hold any num_sequences: at worst each takes a row of its own."""
    return -(-num_sequences // micro_rows)


def micro(tree: Tree, m: Int[Array, ""]) -> Tree:
    """Micro-batch m of arrays [M, ...], without its leading axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False), tree)
