"""Figures of an evaluation against values computed by hand, and against counting all cases."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from cir_jax.evals.bootstrap import interval, mcnemar, mean_interval, paired, resampled
from cir_jax.evals.majority import maj_at_k, votes_of
from cir_jax.evals.passk import pass_at_k, powers_of_two


@pytest.mark.parametrize(
    "num, correct, k, expected",
    [
        # 1 - C(3, 2) / C(4, 2) = 1 - 3/6, and 1 - C(2, 2) / C(4, 2) = 1 - 1/6.
        (4, 1, 2, 1 / 2),
        (4, 2, 2, 5 / 6),
        # Fewer wrong ones than are drawn: one of them is right.
        (4, 3, 2, 1.0),
        (4, 0, 4, 0.0),
        # pass@1 is the mean, whatever n.
        (16, 5, 1, 5 / 16),
        # pass@n is whether any is right.
        (16, 1, 16, 1.0),
        # 1 - C(13, 4) / C(16, 4) = 1 - 715/1820.
        (16, 3, 4, 1 - 715 / 1820),
    ],
)
def test_pass_at_k_by_hand(num, correct, k, expected):
    assert pass_at_k(num, correct, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_equals_the_binomials_up_to_1024():
    for correct, k in itertools.product((0, 1, 7, 100, 512, 1023, 1024), (1, 2, 64, 512, 1024)):
        exact = 1 - Fraction(math.comb(1024 - correct, k), math.comb(1024, k))
        assert pass_at_k(1024, correct, k) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("num, correct, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_says_what_is_wrong(num, correct, k):
    with pytest.raises(ValueError, match="must be at least"):
        pass_at_k(num, correct, k)


def test_powers_of_two_end_with_all():
    assert [powers_of_two(n) for n in (1, 2, 5, 16)] == [
        [1],
        [1, 2],
        [1, 2, 4, 5],
        [1, 2, 4, 8, 16],
    ]


def counted_maj(votes, correct, k):
    """The definition, subset by subset."""
    won = Fraction(0)
    for subset in itertools.combinations(range(len(votes)), k):
        ballots = ["right" if correct[i] else votes[i] for i in subset]
        ballots = [vote for vote in ballots if vote is not None]
        most = max(map(ballots.count, ballots), default=0)
        winners = {vote for vote in ballots if ballots.count(vote) == most}
        if "right" in winners:
            won += Fraction(1, len(winners))
    return won / math.comb(len(votes), k)


def test_maj_at_k_by_hand():
    # Three right, two equal wrong ones. k=2 of 10 pairs: both right 3, one right 6 (a tie, half),
    # none right 1. k=3 of 10: three or two right 1 + 6, one right beside two equal wrong ones 3.
    votes, correct = [0, 0, 0, 1, 1], [True] * 3 + [False] * 2
    assert maj_at_k(votes, correct, 1) == pytest.approx(3 / 5)
    assert maj_at_k(votes, correct, 2) == pytest.approx((3 + 6 / 2) / 10)
    assert maj_at_k(votes, correct, 3) == pytest.approx(7 / 10)
    assert maj_at_k(votes, correct, 5) == 1.0
    # One right against two different wrong ones: all three tie.
    assert maj_at_k([0, 1, 2], [True, False, False], 3) == pytest.approx(1 / 3)
    # No answer is no vote: the only one wins.
    assert maj_at_k([0, None, None], [True, False, False], 3) == 1.0
    assert maj_at_k([None, None], [False, False], 2) == 0.0
    with pytest.raises(ValueError, match="k=4"):
        maj_at_k([0, 1, 2], [True, False, False], 4)


def test_maj_at_k_equals_counting_subsets():
    rng = np.random.default_rng(0)
    for _ in range(40):
        votes = [None if v == 4 else int(v) for v in rng.integers(0, 5, 8)]
        correct = [vote == 0 for vote in votes]
        for k in range(1, 9):
            expected = float(counted_maj(votes, correct, k))
            assert maj_at_k(votes, correct, k) == pytest.approx(expected, abs=1e-12)


def test_maj_at_k_of_1024_samples():
    """With a clear majority the more votes the better; with all different it is the mean."""
    votes = [0] * 600 + [1] * 300 + list(range(2, 126))
    correct = [vote == 0 for vote in votes]
    at = [maj_at_k(votes, correct, k) for k in (1, 64, 1024)]
    assert at[0] == pytest.approx(600 / 1024) and at[0] < at[1] < at[2] == 1.0
    different = list(range(64))
    right = [n == 0 for n in different]
    assert maj_at_k(different, right, 16) == pytest.approx(16 / 64 / 16)


def test_votes_are_equal_for_equivalent_answers():
    asked = []

    def equal(pairs):
        asked.append(pairs)
        return [float(Fraction(a)) == float(Fraction(b)) for a, b in pairs]

    answers = ["3", None, "1/2", "0.5", " 1/2", "3.0", "7"]
    correct = [True, False, False, False, False, True, False]
    assert votes_of(answers, correct, equal) == [0, None, 1, 1, 1, 0, 2]
    # Correct ones are not compared, nor is a text that was there before.
    assert asked == [[], [("1/2", "0.5")], [("1/2", "7")]]


def test_interval_of_a_mean():
    # Means of 4 values 0, 0, 1, 1 are binomial(4, 1/2) / 4, of which 1/16 are 0, and 1/16 are 1:
    # more than 2.5 % at each end.
    found = interval([0.0, 0.0, 1.0, 1.0])
    assert found == (0.5, 0.0, 1.0)
    assert found == interval([0.0, 0.0, 1.0, 1.0])
    # With 400 values the normal approximation holds: 0.5 -+ 1.96 sqrt(0.25 / 400) = 0.049.
    _, low, high = interval([0.0, 1.0] * 200)
    assert low == pytest.approx(0.451, abs=0.005) and high == pytest.approx(0.549, abs=0.005)
    with pytest.raises(ValueError, match="no problems"):
        interval([])


def test_resamples_do_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch):
    values = np.arange(5.0)
    whole = resampled(values)
    monkeypatch.setattr("cir_jax.evals.bootstrap._AT_ONCE", 35)
    np.testing.assert_array_equal(resampled(values), whole)
    # The variance of a mean of 5 out of 0..4 is 2 / 5.
    assert whole.var() == pytest.approx(0.4, rel=0.05)


def test_mean_of_benchmarks_weighs_them_equally():
    found = mean_interval([[1.0] * 50, [0.0, 1.0] * 50])
    assert found.mean == 0.75
    # Only the second varies, by sqrt(0.25 / 100) / 2.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.025, rel=0.1)


def test_paired_difference():
    # Every problem gains 1/4: no resample can be other. Of 8 sign patterns, all + and all - are as
    # far from 0.
    one, other = [0.5, 0.25, 1.0], [0.25, 0.0, 0.75]
    assert paired(one, other).difference == (0.25, 0.25, 0.25)
    assert paired(one, other).p_value == 2 / 8 and paired(one, other).p_mcnemar is None
    assert paired(one, one).p_value == 1.0
    with pytest.raises(ValueError, match="the same"):
        paired([1.0], [1.0, 0.0])


def test_mcnemar():
    # 6 gained and 1 lost: twice the chance of at most one head in 7, 2 (1 + 7) / 128.
    assert mcnemar(6, 1) == pytest.approx(16 / 128)
    assert mcnemar(1, 6) == mcnemar(6, 1)
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    before, after = [0.0] * 6 + [1.0, 1.0], [1.0] * 6 + [0.0, 1.0]
    test = paired(after, before)
    assert test.p_mcnemar == pytest.approx(16 / 128) and test.difference.mean == 5 / 8
    # The same test; of many problems, patterns are drawn.
    assert test.p_value == pytest.approx(16 / 128)
    many = paired([1.0] * 30 + [0.0] * 17, [0.0] * 30 + [1.0] * 17)
    assert many.p_value == pytest.approx(many.p_mcnemar, abs=0.01)
