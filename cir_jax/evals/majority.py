"""maj@k: the probability that the answer given most often among k samples is correct."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

# Different texts up to which answers of one problem are compared with each other.
_COMPARED = 64


def maj_at_k(votes: Sequence[int | None], correct: Sequence[bool], k: int) -> float:
    """Expectation, exact, over all subsets of k samples of one problem.

    The most frequent answer wins; of t equally frequent ones, each with probability 1 / t. A
    sample without an answer has no vote; without any vote nothing wins. All correct samples are
    one answer.

    Of subsets in which the correct answer has m votes, those are counted in which no other has
    more, by how many others have m too: for each m the coefficients of x^(k - m) y^others in
    prod over wrong answers with n_i votes of
    sum over v < m of C(n_i, v) x^v  +  C(n_i, m) x^m y.

    Source: majority voting of self-consistency, arXiv:2203.11171, section 2; maj@k as in Minerva,
    arXiv:2206.14858, section 2.2.

    Args:
      votes: equal numbers for equivalent answers, None for no answer.
      correct: whether each sample is.

    Raises ValueError unless 1 <= k <= number of samples. Up to 1024 samples.
    """
    num = len(votes)
    if not 1 <= k <= num:
        raise ValueError(f"k={k}: must be at least 1 and at most {num}, the samples there are")
    right = sum(correct)
    wrong = Counter(v for v, c in zip(votes, correct, strict=True) if not c and v is not None)
    silent = num - right - wrong.total()
    won = 0.0
    for m in range(1, min(k, right) + 1):
        if m > max(wrong.values(), default=0):
            won += math.comb(right, m) * math.comb(num - right, k - m)
        else:
            ways = _others(list(wrong.values()), silent, m, k - m)
            won += math.comb(right, m) * float(ways @ (1 / np.arange(1, len(ways) + 1)))
    return min(1.0, won / math.comb(num, k))


def _others(wrong: Sequence[int], silent: int, m: int, drawn: int) -> np.ndarray:
    """In how many ways `drawn` samples that are not correct have at most m votes for any answer,
    by the number of answers with m votes."""
    ways = np.zeros((drawn + 1, min(drawn // m, len(wrong)) + 1))
    for v in range(min(silent, drawn) + 1):
        ways[v, 0] = math.comb(silent, v)
    for count in wrong:
        after = np.zeros_like(ways)
        for v in range(min(count, m - 1, drawn) + 1):
            after[v:] += math.comb(count, v) * ways[: drawn + 1 - v]
        if count >= m and drawn >= m:
            after[m:, 1:] += math.comb(count, m) * ways[: drawn + 1 - m, :-1]
        ways = after
    return ways[drawn]


def votes_of(
    answers: Sequence[str | None],
    correct: Sequence[bool],
    equal: Callable[[list[tuple[str, str]]], list[bool]],
) -> list[int | None]:
    """Numbers of the answers to one problem: equal ones for equivalent answers, from 0 in order.

    All correct answers are equivalent. Of the others, each is compared with the first of every
    class so far; beyond 64 different texts, a new text is a class of its own.

    equal: of pairs of answers, whether they are equivalent; asked about many at a time.
    """
    number: dict[tuple[bool, str], int] = {}
    firsts: list[tuple[int, str]] = []
    found: list[int | None] = []
    num_classes = 0
    for answer, is_correct in zip(answers, correct, strict=True):
        if answer is None:
            found.append(None)
            continue
        key = (True, "") if is_correct else (False, answer.strip())
        if key not in number:
            same = None
            if not is_correct and len(number) < _COMPARED:
                verdicts = equal([(first, key[1]) for _, first in firsts])
                same = next((n for (n, _), yes in zip(firsts, verdicts, strict=True) if yes), None)
            number[key] = num_classes if same is None else same
            if same is None:
                num_classes += 1
                if not is_correct:
                    firsts.append((number[key], key[1]))
        found.append(number[key])
    return found
