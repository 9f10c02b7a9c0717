"""Reasoning-Gym's tasks: problem i as a pure function of (task, i), in every process the same.

What an audit of all tasks of reasoning-gym 0.1.25 has found (`cir-jax data audit` repeats it: of
each task, problems by number and again, the right answer, wrong, nearly right, malformed and empty
ones). All others are used as they are, their scores against `reward.gym_threshold`.

TABLE
"""

import functools
import json
import random
from collections.abc import Callable
from typing import Any

Made = tuple[str, str, dict[str, Any]]  # question, answer, metadata

EXCLUDED = {
    "composite": "it is a mixture of others and needs them named",
}

# They make all their problems at once: here each problem is of a seed of its own.
_MADE_AT_ONCE = ("acre", "gsm_symbolic", "list_functions", "word_ladder")

# Where the package gives no answer, because many are right: one that is.
_ANSWERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "graph_color": lambda metadata: json.dumps(metadata["possible_answer"]),
    "rubiks_cube": lambda metadata: metadata["example_correct_answer"],
    "propositional_logic": lambda metadata: metadata["example_answer"],
}


@functools.cache
def names() -> tuple[str, ...]:
    """All tasks that can be used."""
    from reasoning_gym.factory import DATASETS

    return tuple(sorted(name for name in DATASETS if name not in EXCLUDED))


def candidates(name: str, **parameters: Any) -> Callable[[int], Made]:
    """Draw number i of a task: question, answer ("" if none is known), metadata.

    Args:
      parameters: of the package's data set.
    """

    @functools.cache
    def dataset():
        import reasoning_gym

        whole = reasoning_gym.create_dataset(name, seed=0, size=2**48, **parameters)
        _make_repeatable(name, whole)
        return whole

    def entry(index: int) -> dict[str, Any]:
        if name not in _MADE_AT_ONCE:
            return dataset()[index]
        import reasoning_gym

        return reasoning_gym.create_dataset(name, seed=index, size=1, **parameters)[0]

    def candidate(index: int) -> Made:
        made = entry(index)
        answer = made["answer"]
        if answer is None:
            answer = _ANSWERS.get(name, lambda _: "")(made["metadata"])
        return made["question"], answer, made["metadata"]

    return candidate


class _Sorted(frozenset):
    """A set whose order does not hang on the process."""

    def __iter__(self):
        return iter(sorted(frozenset.__iter__(self)))

    def __sub__(self, other):
        return _Sorted(frozenset.__sub__(self, other))


def _make_repeatable(name: str, dataset: Any) -> None:
    """Draws from sets come in the order of their members' hashes, which differ by process."""
    if name in ("isomorphic_strings", "ransom_note"):
        dataset.letters = _Sorted(dataset.letters)
    elif name == "polynomial_multiplication":
        unordered = dataset._get_monomials

        def monomials(rng: random.Random) -> list:
            return sorted(unordered(rng), key=str)

        dataset._get_monomials = monomials
