"""Where problems come from: sources, each a sequence of problems with a name.

Another kind of source needs `name`, `len()` and `[i]`, and a place in the functions here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cir_jax.config import ColumnsConfig, ConfigError, DataConfig
from cir_jax.data import tasks
from cir_jax.data.files import check_file, read_problems
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


def of_tasks(names: Sequence[str], split: tasks.Split) -> list[Source]:
    return [TaskSource(name, split) for name in names]


def check(cfg: DataConfig) -> None:
    """Raises ConfigError, with the nearest name, if a task or file is not there."""
    tasks.check_names(cfg.tasks)
    try:
        for key in ("files", "eval_files"):
            for file in getattr(cfg, key):
                check_file(Path(file), f"data.{key}")
    except ValueError as error:
        raise ConfigError(str(error)) from error


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


def _of_file(
    file: str,
    columns: ColumnsConfig,
    fits: Callable[[Problem], bool],
    note: Callable[[str], None],
) -> list[Problem]:
    try:
        problems = read_problems(Path(file), columns)
        short = [p for p in problems if fits(p)]
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
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
