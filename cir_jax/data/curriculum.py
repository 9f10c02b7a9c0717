"""R1-Code-Interpreter's curriculum: what can still be improved first.

Of a problem that was answered right with probability p, 4p(1 - p) is what training on it can
improve. Problems are sorted by that into four groups; stage s trains on groups 1 to s, each stage
for equally many steps, and the last one to the end.

Source: R1-Code-Interpreter, arXiv:2505.21668v2, multi-stage curriculum: the groups [0.64, 1],
[0.48, 0.64), [0.32, 0.48), [0, 0.32), and 150 steps per stage.
"""

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cir_jax.config import ConfigError
from cir_jax.data.files import field, read_rows, wrong_field

By = Literal["problem", "task"]

# Least improvement potential of each group. Exact: 4 * 0.2 * 0.8 is on a boundary, and as a float
# above or below it, depending on how it is computed.
GROUPS = (Fraction(16, 25), Fraction(12, 25), Fraction(8, 25), Fraction(0))


class Answers(NamedTuple):
    """How many were collected, and how many of them are correct."""

    num: int
    correct: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """names: of the problems or tasks that it adds to those of the stages before."""

    from_step: int
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """by: what the stages name."""

    by: By
    stages: tuple[Stage, ...]

    def at(self, step: int) -> tuple[int, list[str]]:
        """An RL step's stage, from 0, and all that may be drawn in it."""
        begun = [stage for stage in self.stages if stage.from_step <= step]
        return len(begun) - 1, [name for stage in begun for name in stage.names]


def potential(answers: Answers) -> Fraction:
    """4p(1 - p), exactly."""
    return Fraction(4 * answers.correct * (answers.num - answers.correct), answers.num**2)


def group_of(answers: Answers) -> int:
    """The group's number, from 0."""
    return next(n for n, least in enumerate(GROUPS) if potential(answers) >= least)


def make(answers: Mapping[str, Answers], by: By, stage_steps: int) -> Curriculum:
    """The stages of problems or tasks, in the order they are given in within each group.

    Groups before the first that holds anything have no stage: there is nothing to train on.
    """
    groups: list[list[str]] = [[] for _ in GROUPS]
    for name, its in answers.items():
        groups[group_of(its)].append(name)
    while not groups[0]:
        del groups[0]
    stages = (Stage(n * stage_steps, tuple(names)) for n, names in enumerate(groups))
    return Curriculum(by, tuple(stages))


def read_answers(paths: Iterable[Path], by: By) -> dict[str, Answers]:
    """Collected answers by problem or task, summed over files (`cir-jax collect` in several modes).

    Raises:
      ConfigError: a row is not one of counts, or there is none.
    """
    num: collections.Counter[str] = collections.Counter()
    correct: collections.Counter[str] = collections.Counter()
    for path in paths:
        for where, row in read_rows(path):
            name = field(where, row, "problem_id" if by == "problem" else "task", str)
            its = Answers(*(field(where, row, k, int) for k in ("num_answers", "num_correct")))
            if its.num < 1:
                raise wrong_field(where, "num_answers", its.num, "at least 1")
            if not 0 <= its.correct <= its.num:
                expected = f"from 0 to num_answers={its.num}"
                raise wrong_field(where, "num_correct", its.correct, expected)
            num[name] += its.num
            correct[name] += its.correct
    if not num:
        raise ConfigError(f"{', '.join(map(str, paths))}: holds no counts of answers")
    return {name: Answers(num[name], correct[name]) for name in num}


def write(curriculum: Curriculum, path: Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(curriculum), indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Curriculum:
    """What `write` has written; ConfigError naming what is wrong."""
    where = f"data.curriculum={str(path)!r}"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: must hold an object of by and stages")
    by = field(where, tree, "by", str)
    if by not in ("problem", "task"):
        raise wrong_field(where, "by", by, "problem or task")
    stages = [_stage(where, n, row) for n, row in enumerate(field(where, tree, "stages", list))]
    steps = [stage.from_step for stage in stages]
    if not steps or steps[0] != 0 or steps != sorted(set(steps)) or not stages[0].names:
        raise wrong_field(
            where, "stages", steps, "stages whose from_step begins at 0 and rises, none empty first"
        )
    return Curriculum(by, tuple(stages))


def _stage(where: str, number: int, row: Any) -> Stage:
    if not isinstance(row, dict):
        raise wrong_field(where, f"stages[{number}]", row, "an object of from_step and names")
    within = f"stages[{number}]."
    names: Sequence[Any] = field(where, row, "names", list, within=within)
    if not all(isinstance(name, str) for name in names):
        raise wrong_field(where, f"{within}names", names, "a list of strings")
    return Stage(field(where, row, "from_step", int, within=within), tuple(names))
