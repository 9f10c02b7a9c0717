"""Which training problems share text with held-out ones: n-gram decontamination.

A problem is dropped if any run of n words of it is also in a held-out problem, or, where one of the
two has fewer words, if the shorter is a run of words of the longer. Words are runs of letters and
digits in small letters, so formulas count by what is in them and layout does not count.
Source: n-grams as in GPT-3's and Qwen's reports; n = 13 there.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cir_jax.records import Problem

_WORD = re.compile(r"[^\W_]+")
_MIN_WORDS = 4
"""Shorter questions (1 + 1 = ?) only overlap with equal ones."""


class Overlap(NamedTuple):
    """number: of the training problem in its order; with_id: the held-out one; words: shared."""

    number: int
    with_id: str
    words: str


def words_of(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def find_overlaps(
    train: Iterable[Problem], held_out: Sequence[Problem], n: int = 13
) -> list[Overlap]:
    """The training problems that overlap, each with the first held-out one that it does with."""
    grams: dict[tuple[str, ...], str] = {}
    lengths = set()
    for problem in held_out:
        words = words_of(problem.question)
        size = min(n, len(words))
        lengths.add(size)
        for i in range(len(words) - size + 1):
            grams.setdefault(words[i : i + size], problem.problem_id)
    whole = {words_of(p.question): p.problem_id for p in reversed(held_out)}
    train = list(train)
    runs = _runs_of_short(train, held_out, n)
    found = []
    for number, problem in enumerate(train):
        words = words_of(problem.question)
        shared = _shared(words, grams, whole, lengths, n) or runs.get(words)
        if shared:
            found.append(Overlap(number, *shared))
    return found


Words = tuple[str, ...]


def _shared(
    words: Words, grams: dict[Words, str], whole: dict[Words, str], lengths: set[int], n: int
) -> tuple[str, str] | None:
    if words in whole:
        return whole[words], " ".join(words)
    for size in sorted(lengths, reverse=True):
        if size < min(n, _MIN_WORDS):
            continue
        for i in range(len(words) - size + 1):
            if with_id := grams.get(words[i : i + size]):
                return with_id, " ".join(words[i : i + size])
    return None


def _runs_of_short(
    train: Sequence[Problem], held_out: Sequence[Problem], n: int
) -> dict[tuple[str, ...], tuple[str, str]]:
    """Training questions of fewer than n words that are a run of words of a held-out one."""
    short = {w for p in train if _MIN_WORDS <= len(w := words_of(p.question)) < n}
    sizes = {len(words) for words in short}
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for problem in held_out if short else ():
        words = words_of(problem.question)
        for size in sizes:
            for i in range(len(words) - size + 1):
                run = words[i : i + size]
                if run in short:
                    found.setdefault(run, (problem.problem_id, " ".join(run)))
    return found
