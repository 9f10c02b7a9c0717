"""Task kinds: problem number i of a split, as a pure function of (task, split, i).

Arithmetic from reasoning-gym and arithmetic in words, which have demonstrations for a cold start;
all of Reasoning-Gym as rg:NAME (gym.py) and symbolic problems as sym:NAME (symbench.py). Splits
never share a question: a hash of the question's text says which of sft, rl and eval it belongs to.
"""

import dataclasses
import difflib
import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from cir_jax.config import ConfigError
from cir_jax.data import gym, symbench
from cir_jax.records import Problem, Verifier

Split = Literal["sft", "rl", "eval"]

# Candidates tried per problem; the rarest split takes one in ten.
_CANDIDATES = 256


@dataclasses.dataclass(frozen=True)
class Task:
    """needs_code: a small model cannot get it right by text alone.

    candidate(i): question, answer and metadata of the i-th draw.
    """

    needs_code: bool
    candidate: Callable[[int], tuple[str, str, dict[str, Any]]]
    verifier: Verifier


def check_names(task_names: Sequence[str]) -> None:
    """Raises ConfigError, with the nearest name, if there is no such task."""
    for name in task_names:
        if reason := gym.EXCLUDED.get(name.removeprefix(GYM)):
            raise ConfigError(f"data.tasks: {name!r} cannot be used: {reason}")
        if name not in names():
            near = difflib.get_close_matches(name, names(), n=1)
            hint = f"nearest: {near[0]}" if near else f"there are: {', '.join(names())}"
            raise ConfigError(f"data.tasks: unknown task {name!r}; {hint}")


GYM, SYMBENCH = "rg:", "sym:"


@functools.cache
def names() -> tuple[str, ...]:
    """All task kinds."""
    of_gym = (GYM + name for name in gym.names())
    return (*TASKS, *(SYMBENCH + name for name in symbench.MAKERS), *of_gym)


@functools.cache
def task(name: str) -> Task:
    """The task kind of a name."""
    if name.startswith(GYM):
        return Task(True, gym.candidates(name.removeprefix(GYM)), "gym")
    if name.startswith(SYMBENCH):
        make, verifier = symbench.MAKERS[name.removeprefix(SYMBENCH)]
        return Task(True, lambda index: make(random.Random(f"{name}:{index}")), verifier)
    return TASKS[name]


def problem(task_name: str, split: Split, index: int) -> Problem:
    """Problem number `index` of a split; any index, in any order."""
    kind = task(task_name)
    for attempt in range(_CANDIDATES):
        question, answer, metadata = kind.candidate(index * _CANDIDATES + attempt)
        if split_of(question) == split:
            break
    else:
        raise RuntimeError(f"{task_name}: no {split} question near index {index}")
    return Problem(
        problem_id=f"{task_name}/{split}/{index}",
        task=task_name,
        question=question,
        answer=answer,
        verifier=kind.verifier,
        needs_code=kind.needs_code,
        metadata=metadata,
    )


def find_problem(problem_id: str) -> Problem:
    """The problem of this id."""
    return problem(*parse_id(problem_id))


def parse_id(problem_id: str) -> tuple[str, Split, int]:
    """Task, split and index; ValueError if it is no problem's id."""
    match problem_id.split("/"):
        case [name, split, index] if name in names() and split in get_args(Split):
            if index.isdecimal():
                return name, split, int(index)
    raise ValueError(f"{problem_id!r} is not the id of a problem: TASK/SPLIT/NUMBER")


def split_of(question: str) -> Split:
    """eval for one question in ten; the others half sft, half rl."""
    byte = hashlib.blake2b(question.encode(), digest_size=2).digest()
    share = int.from_bytes(byte, "big") / 65536
    return "eval" if share < 0.1 else "sft" if share < 0.55 else "rl"


def _gym(name: str, needs_code: bool, **parameters: Any) -> Task:
    return Task(needs_code, gym.candidates(name, **parameters), "gym")


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_words(n: int) -> str:
    """English words of 0 <= n < 10,000, no hyphens."""
    if n < 20:
        return _ONES[n]
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if n >= unit:
            rest = f" {number_words(n % unit)}" if n % unit else ""
            return f"{number_words(n // unit)} {name}{rest}"
    return _TENS[n // 10 - 2] + (f" {_ONES[n % 10]}" if n % 10 else "")


Drawn = tuple[str, int, list[int]]  # question, answer, operands


def _words(name: str, needs_code: bool, draw: Callable[[random.Random], Drawn]) -> Task:
    def candidate(index: int) -> tuple[str, str, dict[str, Any]]:
        question, answer, operands = draw(random.Random(f"{name}:{index}"))
        return question, str(answer), {"operands": operands}

    return Task(needs_code, candidate, "math")


def _larger(rng: random.Random) -> Drawn:
    a, b = rng.sample(range(10, 100), 2)
    return f"Which is larger, {number_words(a)} or {number_words(b)}?", max(a, b), [a, b]


def _spelled(rng: random.Random) -> Drawn:
    n = rng.randrange(100, 10000)
    return f"Write {number_words(n)} in digits.", n, [n]


def _times(rng: random.Random) -> Drawn:
    a, b = rng.randrange(12, 100), rng.randrange(12, 100)
    question = f"A box holds {number_words(a)} pens. How many pens do {number_words(b)} boxes hold?"
    return question, a * b, [a, b]


def _after(rng: random.Random) -> Drawn:
    n = rng.randrange(100, 100000)
    return f"What number comes right after {n}?", n + 1, [n]


TASKS: dict[str, Task] = {
    # Text suffices.
    "larger": _words("larger", False, _larger),
    "spelled": _words("spelled", False, _spelled),
    "after": _words("after", False, _after),
    # Only code is reliable.
    "sum": _gym("chain_sum", True, min_terms=2, max_terms=2, min_digits=1, max_digits=2),
    "chain": _gym("chain_sum", True, min_terms=4, max_terms=4, min_digits=2, max_digits=3),
    "product": _gym("products", True, min_terms=2, max_terms=2, min_digits=2, max_digits=3),
    "lcm": _gym("lcm", True, min_value=11, max_value=99),
    "bits": _gym("count_bits", True, min_n=1000, max_n=99999),
    "primes": _gym("count_primes", True, min_n=10, max_n=999),
    "times": _words("times", True, _times),
}
