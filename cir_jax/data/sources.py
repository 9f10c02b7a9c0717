"""Where problems come from: sources, each a sequence of problems with a name.

Another kind of source needs `name`, `len()` and `[i]`, and a place in the functions here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cir_jax.config import ColumnsConfig, ConfigError, DataConfig
from cir_jax.data import curriculum, tasks
from cir_jax.data.curriculum import By
from cir_jax.data.files import check_file
from cir_jax.data.problems import read_problems
from cir_jax.records import Problem

# Draws per task and seed; far more than any run takes.
_DRAWS = 2**20


class Source(Protocol):
    """Problem i is the same whenever it is asked for."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Problem: ...


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """A split of a task kind."""

    name: str
    split: tasks.Split

    def __len__(self) -> int:
        return _DRAWS

    def __getitem__(self, i: int) -> Problem:
        return tasks.problem(self.name, self.split, i)


@dataclasses.dataclass(frozen=True)
class ListSource:
    """Problems that lie in memory."""

    name: str
    problems: Sequence[Problem]

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, i: int) -> Problem:
        return self.problems[i]


@dataclasses.dataclass(frozen=True)
class OneProblem:
    """Of a task kind, by its id; made when it is asked for."""

    name: str

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Problem:
        return tasks.find_problem(self.name)


def of_tasks(names: Sequence[str], split: tasks.Split) -> list[Source]:
    return [TaskSource(name, split) for name in names]


def check(cfg: DataConfig) -> None:
    """Raises ConfigError, with the nearest name, if a task or file is not there."""
    tasks.check_names(cfg.tasks)
    for key in ("files", "eval_files"):
        for file in getattr(cfg, key):
            check_file(Path(file), f"data.{key}")
    if cfg.tasks and cfg.curriculum:
        plan = curriculum.read(Path(cfg.curriculum))
        find = finder(cfg, of_tasks(cfg.tasks, "rl"))
        for stage in plan.stages:
            for name in stage.names:
                find(plan.by, name)


def train_sources(
    cfg: DataConfig, fits: Callable[[Problem], bool], note: Callable[[str], None]
) -> list[Source]:
    """Of the RL phase: one of each task, or one of all files together.

    fits: whether a problem's prompt is short enough; a file's others are left out, and `note` is
      told how many. Raises ConfigError if a file cannot be used, or nothing of it is left.
    """
    if cfg.tasks:
        return of_tasks(cfg.tasks, "rl")
    lists = [_of_file(file, cfg.columns, fits, note) for file in cfg.files]
    return [ListSource("files", [problem for problems in lists for problem in problems])]


def eval_sources(
    cfg: DataConfig, fits: Callable[[Problem], bool], note: Callable[[str], None]
) -> list[Source]:
    """The held-out ones: one of each task, or of each file; the rest as above."""
    if cfg.tasks:
        return of_tasks(cfg.tasks, "eval")
    columns = cfg.eval_columns or cfg.columns
    return [ListSource(file, _of_file(file, columns, fits, note)) for file in cfg.eval_files]


def finder(cfg: DataConfig, found: Sequence[Source]) -> Callable[[By, str], Source]:
    """What finds a task, or a problem by its id, among the training sources.

    It raises ConfigError if there is none of this name.
    """
    in_files = [p for source in found if isinstance(source, ListSource) for p in source.problems]
    by_id = {problem.problem_id: problem for problem in in_files}
    by_task: dict[str, list[Problem]] = {}
    for problem in in_files:
        by_task.setdefault(problem.task, []).append(problem)

    def find(by: By, name: str) -> Source:
        where = f"data.curriculum={cfg.curriculum!r}"
        if not cfg.tasks:
            problems = by_task.get(name, []) if by == "task" else [by_id.get(name)]
            if not any(problems):
                raise ConfigError(f"{where}: {name!r} is no {by} of data.files={list(cfg.files)}")
            return ListSource(name, problems)
        try:
            task = name if by == "task" else tasks.parse_id(name)[0]
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        if task not in cfg.tasks:
            raise ConfigError(f"{where}: {name!r} is not of data.tasks={list(cfg.tasks)}")
        return TaskSource(name, "rl") if by == "task" else OneProblem(name)

    return find


def _of_file(
    file: str,
    columns: ColumnsConfig,
    fits: Callable[[Problem], bool],
    note: Callable[[str], None],
) -> list[Problem]:
    problems = read_problems(Path(file), columns)
    try:
        short = [p for p in problems if fits(p)]
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    left_out = len(problems) - len(short)
    if not short:
        but = f" with a prompt of at most data.max_prompt_tokens: {left_out} are left out"
        raise ConfigError(f"{file}: holds no problem{but if left_out else ''}")
    if left_out:
        note(
            f"{file}: {left_out} of {len(problems)} problems left out, their prompts are longer "
            "than data.max_prompt_tokens"
        )
    return short
