"""Reasoning-Gym's tasks: problem i as a pure function of (task, i), in every process the same.

What an audit of all 106 tasks of reasoning-gym 0.1.25 has found (`cir-jax data audit` repeats it:
of each task problems by number and again, with the right answer, with malformed and empty ones,
and with the right one's numbers changed). All tasks but one are used; of those that are not in the
table, too, only the whole score counts (`reward.gym_threshold`), since half of the scorers give
parts of it, up to 0.99 for one wrong cell of a hundred (game_of_life) or one wrong day
(time_intervals).

  task                       found                                     what is done
  -------------------------  ----------------------------------------  ---------------------------
  composite                  a mixture, made of others by name         excluded
  game_of_life_halting       accepts any answer that is not empty      True or False as text
  complex_arithmetic         accepts nan                               nan and inf are wrong
  coin_flip                  0 is right for small probabilities:       also within 1e-4 of the
                             tolerance 1e-4 whatever the number        number itself
  number_format              tolerance 0.01 where other numbers of     the number itself
                             the question are as near
  number_sorting             tolerance takes in changed numbers        the numbers themselves
  boxnet                     raises on JSON that is no list of steps   unparsable; a list of objects
  prime_factorization        raises on what is no number               unparsable
  game_of_life, coin_flip,   raise on other shapes, or numbers of      unparsable
  time_intervals             thousands of digits
  complex_arithmetic,        score falls with the distance, rounding   from 0.99 on it is correct
  polynomial_equations,      costs some
  power_function
  decimal_arithmetic,        by their questions: the last digit may    left as it is
  polynomial_equations       be off by one
  fraction_simplification,   read an answer with words behind it       left as it is
  kakurasu, survo
  boxnet, rush_hour          have no answer (many are right)           truth is empty; the audit
                                                                       solves them
  graph_color, rubiks_cube,  the same, with an example in the          the example is the truth
  propositional_logic        metadata
  isomorphic_strings,        draw from sets, whose order differs by    sets are sorted
  ransom_note,               process
  polynomial_multiplication
  knight_swap                question by number, example answer by     left as it is: the scorer
                             process                                   plays the moves
  list_functions             draws from the interpreter's generator    seeded by number
  acre, gsm_symbolic,        make all problems at once, or only a few  a seed of its own for each
  list_functions,                                                      problem
  word_ladder
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

        # One of them draws from the interpreter's own generator.
        state = random.getstate()
        random.seed(f"{name}:{index}")
        try:
            return reasoning_gym.create_dataset(name, seed=index, size=1, **parameters)[0]
        finally:
            random.setstate(state)

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
