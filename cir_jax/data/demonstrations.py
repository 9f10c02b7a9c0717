"""Demonstrations for the cold start: how a solver of mixed habits would answer each task.

A share answers by text alone (a guess where the task needs code), the others write a program;
a share of those first write one that fails, read the error, and mend it.
"""

import dataclasses
import random
import re
from collections.abc import Sequence

from cir_jax.config import ConfigError
from cir_jax.data import tasks
from cir_jax.records import Problem


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """programs: run in order, each followed by its output; empty for an answer by text.

    answer: what the box holds; None means the last program's output.
    """

    problem: Problem
    programs: tuple[str, ...]
    answer: str | None


def check_demonstrated(task_names: Sequence[str]) -> None:
    """Raises ConfigError if there are none, or one has no demonstrations."""
    if not task_names:
        raise ConfigError("data.tasks=[]: must have at least one entry, to be demonstrated")
    for name in task_names:
        if name not in tasks.TASKS:
            raise ConfigError(
                f"data.tasks: {name!r} has no demonstrations, as {', '.join(tasks.TASKS)} have; "
                "sft.data names files of trajectories"
            )


def demonstration(
    task_name: str, index: int, *, text_share: float, failed_share: float
) -> Demonstration:
    """Demonstration number `index` of a task, on a problem of the sft split."""
    problem = tasks.problem(task_name, "sft", index)
    rng = random.Random(f"demonstration:{task_name}:{index}")
    if rng.random() < text_share:
        answer = guess(problem.answer, rng) if problem.needs_code else problem.answer
        return Demonstration(problem, (), answer)
    good, bad = programs(problem)
    if rng.random() < failed_share:
        return Demonstration(problem, (bad, good), None)
    return Demonstration(problem, (good,), None)


def guess(truth: str, rng: random.Random) -> str:
    """A number of the truth's sign and length, not computed."""
    sign, digits = ("-", truth[1:]) if truth.startswith("-") else ("", truth)
    tail = "".join(rng.choice("0123456789") for _ in digits[1:])
    return sign + rng.choice("123456789") + tail


def programs(problem: Problem) -> tuple[str, str]:
    """A program that solves the problem, and one that ends in an error."""
    question = problem.question
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    match problem.task:
        case "sum" | "chain":
            expression = question.split(":")[1].removesuffix("=").strip()
            return f"print({expression})", f"print(sum({expression}))"
        case "product":
            a, b = numbers
            return f"print({a} * {b})", f"print({a} x {b})"
        case "lcm":
            a, b = numbers
            return f"import math\nprint(math.lcm({a}, {b}))", f"print(lcm({a}, {b}))"
        case "bits":
            n = numbers[-1]
            return f'print(bin({n}).count("1"))', f'print({n}.count("1"))'
        case "primes":
            a, b = numbers
            body = f"print(len(list(primerange({a}, {b} + 1))))"
            return f"from sympy import primerange\n{body}", body
        case "larger":
            a, b = problem.metadata["operands"]
            return f"print(max({a}, {b}))", f"print(larger({a}, {b}))"
        case "spelled":
            (n,) = problem.metadata["operands"]
            return f"print({n})", f"print(digits({n}))"
        case "after":
            (n,) = problem.metadata["operands"]
            return f"print({n} + 1)", f"print(after({n}))"
        case "times":
            a, b = problem.metadata["operands"]
            return f"print({a} * {b})", f"print({a} x {b})"
    raise ValueError(f"task {problem.task!r} has no demonstrations")
