"""Packing: every token once, segments apart, masks from the authors, a fixed shape."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_jax.records import Author
from cir_jax.rl.batch import Layout, Sequence1D, TrainBatch, max_micro, micro, pack, plan_rows

ROW = 16
lengths_in_row = st.lists(st.integers(1, ROW), max_size=30)
seeded = settings(max_examples=150, deadline=None, derandomize=True)


def sequences(lengths, seed=0):
    """Sequences of these lengths, all values different from padding's and from each other."""
    rng = np.random.default_rng(seed)
    ids = iter(range(1, sum(lengths) + 1))
    return [
        Sequence1D(
            np.array([next(ids) for _ in range(n)], np.int32),
            rng.integers(0, 3, n).astype(np.int8),
            -rng.random(n).astype(np.float32) - 0.1,
            float(rng.normal()),
            float(rng.random()) + 0.1,
        )
        for n in lengths
    ]


def packed(seqs, micro_rows=4, **kwargs):
    count = max_micro(len(seqs), micro_rows)
    return pack(
        seqs, **({"row_length": ROW, "micro_rows": micro_rows, "max_micro": count} | kwargs)
    )


def rows_of(batch):
    """The batch as a list of rows, each a TrainBatch of 1-d arrays."""
    flat = [x.reshape(-1, x.shape[-1]) for x in batch]
    return [TrainBatch(*row) for row in zip(*flat, strict=True)]


@seeded
@given(lengths=lengths_in_row)
def test_plan_places_each_sequence_once_without_overflow(lengths):
    rows = plan_rows(lengths, ROW)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= ROW for row in rows)


@seeded
@given(lengths=lengths_in_row)
def test_plan_leaves_no_room_for_what_comes_later(lengths):
    """First fit: what is left of a row is too short for any sequence of a later row."""
    rows = plan_rows(lengths, ROW)
    room = [ROW - sum(lengths[i] for i in row) for row in rows]
    for r, later in itertools.combinations(range(len(rows)), 2):
        assert room[r] < min(lengths[i] for i in rows[later])


def test_plan_of_known_lengths():
    # Longest first: 9 | 7 joins 9 (16) | 6 6 share, 4 joins them (16) | 3 alone.
    assert plan_rows([3, 6, 9, 4, 6, 7], ROW) == [[2, 5], [1, 4, 3], [0]]


def test_sequence_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match=f"sequence 1 has {ROW + 1} tokens.*{ROW}"):
        plan_rows([3, ROW + 1], ROW)
    assert plan_rows([ROW], ROW) == [[0]]


@seeded
@given(lengths=lengths_in_row, seed=st.integers(0, 3))
def test_pack_holds_each_sequence_once_and_nothing_else(lengths, seed):
    seqs = sequences(lengths, seed)
    by_first_id = {int(s.ids[0]): s for s in seqs}
    num_padding = 0
    for row in rows_of(packed(seqs)[0]):
        last = row.segment_ids.max()
        # Segments 1, 2, ... side by side, then padding.
        filled = int((row.segment_ids > 0).sum())
        assert (np.diff(row.segment_ids[:filled]) >= 0).all()
        assert set(row.segment_ids[:filled]) == set(range(1, last + 1))
        assert not any(x[filled:].any() for x in row)
        num_padding += ROW - filled
        for segment in range(1, last + 1):
            at = row.segment_ids == segment
            seq = by_first_id.pop(int(row.ids[at][0]))
            assert row.ids[at].tolist() == seq.ids.tolist()
            assert row.positions[at].tolist() == list(range(len(seq.ids)))
            assert (row.sampled[at] == (seq.author == Author.MODEL)).all()
            assert (row.trained[at] == row.sampled[at]).all()
            assert (row.weight[at] == np.where(row.trained[at], np.float32(seq.weight), 0)).all()
            assert (row.sampler_logp[at] == seq.sampler_logp).all()
            assert (row.advantage[at] == np.float32(seq.advantage)).all()
    assert not by_first_id
    assert num_padding + sum(lengths) == max_micro(len(seqs), 4) * 4 * ROW


@seeded
@given(lengths=lengths_in_row, micro_rows=st.integers(1, 5))
def test_shape_is_fixed_and_filled_from_the_front(lengths, micro_rows):
    batch, num_micro = packed(sequences(lengths), micro_rows)
    shape = (max_micro(len(lengths), micro_rows), micro_rows, ROW)
    assert {x.shape for x in batch} == {shape}
    used = batch.segment_ids.any(axis=(1, 2))
    assert used.tolist() == [True] * num_micro + [False] * (shape[0] - num_micro)


@pytest.mark.parametrize("author", list(Author))
def test_only_the_models_tokens_are_trained(author):
    seq = Sequence1D(np.arange(1, 5), np.full(4, author))
    batch, _ = packed([seq])
    assert batch.trained.sum() == (4 if author == Author.MODEL else 0)


def test_tool_tokens_are_trained_where_asked_for():
    author = np.array([Author.PROMPT, Author.MODEL, Author.TOOL, Author.MODEL])
    batch, _ = packed([Sequence1D(np.arange(1, 5), author, weight=0.5, train_tool=True)])
    assert batch.trained[0, 0, :5].tolist() == [False, True, True, True, False]
    assert batch.weight[0, 0, :5].tolist() == [0, 0.5, 0.5, 0.5, 0]
    assert batch.sampled[0, 0, :5].tolist() == [False, True, False, True, False]


@seeded
@given(lengths=lengths_in_row, micro_rows=st.integers(1, 5))
def test_a_layout_gives_back_what_it_was_given(lengths, micro_rows):
    layout = Layout(
        lengths,
        row_length=ROW,
        micro_rows=micro_rows,
        max_micro=max_micro(len(lengths), micro_rows),
    )
    own = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    for a, b in zip(own, layout.unpack(layout.pack(own, np.int32)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_demonstrations_have_no_logp_and_no_advantage():
    batch, _ = packed([Sequence1D(np.arange(1, 5), np.ones(4))])
    assert not batch.sampler_logp.any() and not batch.advantage.any()


def test_too_few_micro_batches_raise():
    with pytest.raises(ValueError, match="3 rows do not fit into 1 x 2"):
        packed(sequences([ROW] * 3), micro_rows=2, max_micro=1)


def test_micro_batch_is_a_slice():
    batch, num_micro = packed(sequences([ROW] * 7), micro_rows=2)
    assert num_micro == 4
    for m in range(num_micro):
        for part, whole in zip(micro(batch, jnp.int32(m)), batch, strict=True):
            assert (np.asarray(part) == whole[m]).all()
