"""Where problems come from: sources, each a sequence of problems with a name.

Another kind of source needs `name`, `len()` and `[i]`, and a place in the functions here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cir_jax.config import ColumnsConfig, ConfigError, DataConfig
from cir_jax.data import curriculum, sets, tasks
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


Fits = Callable[[Problem], bool]
Note = Callable[[str], None]

# Tries for a problem that fits, before the task is given up.
_TRIES = 64


class TaskSource:
    """A split of a task kind.

    Args:
      fits: whether a problem's prompt is short enough; in the place of one that is too long comes
        another, the same whenever it is asked for. None: all are.
      note: is told how many there were, when they have become ten times as many.
    """

    def __init__(
        self, name: str, split: tasks.Split, fits: Fits | None = None, note: Note = lambda _: None
    ):
        self.name, self._split = name, split
        self._fits, self._note = fits, note
        self._left_out: set[int] = set()

    def __len__(self) -> int:
        return _DRAWS

    def __getitem__(self, i: int) -> Problem:
        for index in range(i, i + _TRIES * _DRAWS, _DRAWS):
            problem = tasks.problem(self.name, self._split, index)
            if self._fits is None or self._fits(problem):
                return problem
            self._leave_out(index)
        raise ConfigError(
            f"data.tasks: {self.name}: {_TRIES} problems in a row whose prompts are longer than "
            "data.max_prompt_tokens"
        )

    def _leave_out(self, index: int) -> None:
        if index not in self._left_out:
            self._left_out.add(index)
            count = len(self._left_out)
            if count in (1, 10, 100, 1000, 10000):
                self._note(
                    f"{self.name}: {count} problems left out so far, their prompts are longer "
                    "than data.max_prompt_tokens"
                )


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


def of_tasks(
    names: Sequence[str],
    split: tasks.Split,
    fits: Fits | None = None,
    note: Note = lambda _: None,
) -> list[Source]:
    return [TaskSource(name, split, fits, note) for name in names]


def check(cfg: DataConfig) -> None:
    """Raises ConfigError, with the nearest name, if a task, file or set is not there."""
    tasks.check_names(cfg.tasks)
    for key in ("files", "eval_files"):
        for file in getattr(cfg, key):
            check_file(Path(file), f"data.{key}")
    for key in ("sets", "eval_sets"):
        for name in getattr(cfg, key):
            _check_set(name, f"data.{key}", Path(cfg.directory))
    if cfg.tasks and cfg.curriculum and not cfg.files and not cfg.sets:
        plan = curriculum.read(Path(cfg.curriculum))
        find = finder(cfg, of_tasks(cfg.tasks, "rl"))
        for stage in plan.stages:
            for name in stage.names:
                find(plan.by, name)


def _check_set(name: str, key: str, directory: Path) -> None:
    base, split = sets.split_name(name, key)
    folder = sets.folder(base, directory)
    if not folder.is_dir():
        raise ConfigError(
            f"{key}={name!r}: not in data.directory={str(directory)!r}: "
            f"cir-jax data prepare {base} --data-dir {directory}"
        )
    if not list(folder.glob(f"problems-{split}.*")):
        raise ConfigError(f"{key}={name!r}: {folder} has no split {split}")


def train_sources(cfg: DataConfig, fits: Fits, note: Note) -> list[Source]:
    """Of the RL phase: one of each task, then one of all files and sets together; with weights one
    of each file and set.

    fits: whether a problem's prompt is short enough; others are left out, and `note` is told how
      many. Raises ConfigError if one cannot be used, or nothing of it is left.
    """
    lists = [_of_file(file, cfg.columns, fits, note) for file in cfg.files]
    lists += [_of_set(name, "data.sets", cfg, fits, note) for name in cfg.sets]
    if lists and not cfg.weights:
        lists = [ListSource("files", [problem for its in lists for problem in its.problems])]
    return [*of_tasks(cfg.tasks, "rl", fits, note), *lists]


def weights(cfg: DataConfig, found: Sequence[Source]) -> list[float] | None:
    """How often each of the training sources is drawn from; None: equally often."""
    return [cfg.weights.get(source.name, 1.0) for source in found] if cfg.weights else None


def eval_sources(cfg: DataConfig, fits: Fits, note: Note) -> list[Source]:
    """The held-out ones: one of each task, file and set; the rest as above."""
    columns = cfg.eval_columns or cfg.columns
    lists = [_of_file(file, columns, fits, note) for file in cfg.eval_files]
    lists += [_of_set(name, "data.eval_sets", cfg, fits, note) for name in cfg.eval_sets]
    return [*of_tasks(cfg.tasks, "eval", fits, note), *lists]


def finder(cfg: DataConfig, found: Sequence[Source]) -> Callable[[By, str], Source]:
    """What finds a task, or a problem by its id, among the training sources.

    It raises ConfigError if there is none of this name.
    """
    listed = [p for source in found if isinstance(source, ListSource) for p in source.problems]
    by_name = {source.name: source for source in found}
    by_id = {problem.problem_id: problem for problem in listed}
    by_task: dict[str, list[Problem]] = {}
    for problem in listed:
        by_task.setdefault(problem.task, []).append(problem)

    def find(by: By, name: str) -> Source:
        where = f"data.curriculum={cfg.curriculum!r}"
        problems = by_task.get(name, []) if by == "task" else [by_id.get(name)]
        if any(problems):
            return ListSource(name, problems)
        if not cfg.tasks:
            which = {k: list(getattr(cfg, k)) for k in ("files", "sets") if getattr(cfg, k)}
            said = " or ".join(f"data.{key}={value}" for key, value in which.items())
            raise ConfigError(f"{where}: {name!r} is no {by} of {said}")
        try:
            task = name if by == "task" else tasks.parse_id(name)[0]
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        if task not in cfg.tasks:
            raise ConfigError(f"{where}: {name!r} is not of data.tasks={list(cfg.tasks)}")
        return by_name[name] if by == "task" else OneProblem(name)

    return find


def _of_file(file: str, columns: ColumnsConfig, fits: Fits, note: Note) -> ListSource:
    return ListSource(file, _short(file, read_problems(Path(file), columns), fits, note))


def _of_set(name: str, key: str, cfg: DataConfig, fits: Fits, note: Note) -> ListSource:
    return ListSource(name, _short(name, set_problems(name, key, cfg.directory), fits, note))


def set_problems(name: str, key: str, directory: str) -> list[Problem]:
    """The problems of a prepared set, NAME or NAME:SPLIT, in their order."""
    _check_set(name, key, Path(directory))
    # 1 s that only who reads such sets should wait for.
    import grain

    from cir_jax.data import builder

    base, split = sets.split_name(name, key)
    rows = builder.stored(base, Path(directory), split)
    return list(grain.MapDataset.source(rows).map(builder.problem))


def _short(name: str, problems: list[Problem], fits: Fits, note: Note) -> list[Problem]:
    try:
        short = [p for p in problems if fits(p)]
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    left_out = len(problems) - len(short)
    if not short:
        but = f" with a prompt of at most data.max_prompt_tokens: {left_out} are left out"
        raise ConfigError(f"{name}: holds no problem{but if left_out else ''}")
    if left_out:
        note(
            f"{name}: {left_out} of {len(problems)} problems left out, their prompts are longer "
            "than data.max_prompt_tokens"
        )
    return short
