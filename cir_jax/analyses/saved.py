"""What analyses are of: evaluation directories and run directories, read once."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from cir_jax import config as configs
from cir_jax import metrics
from cir_jax.config import ConfigError
from cir_jax.evals.samples import DESCRIPTION, PARTS, Sample, Setting, read

Groups = list[list[Sample]]
"""Samples by problem, [P][n], problems in order."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """An evaluation, or a training run with the samples that it has kept.

    forks, left_out: of an evaluation, the counterfactual samples, and how many problems of a task
    were not asked because their prompts are too long. metrics: of a run, its rows.
    """

    name: str
    folder: Path
    is_run: bool
    samples: list[Sample]
    forks: list[Sample]
    metrics: list[dict]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def settings(self) -> list[Setting]:
        """In the order in which they were asked for."""
        return list(dict.fromkeys(sample.setting for sample in self.samples))

    @property
    def with_tools(self) -> Setting | None:
        """The setting that the model is judged by: the first that may run programs."""
        return next((s for s in self.settings if s.max_calls), None)

    @property
    def without_tools(self) -> Setting | None:
        """The text-only one, else the first with a budget of none."""
        none = [s for s in self.settings if not s.max_calls]
        return next((s for s in none if s.prompt == "text"), next(iter(none), None))

    def groups(self) -> dict[Setting, dict[str, Groups]]:
        """By setting and task."""
        found: dict[Setting, dict[str, dict[str, list[Sample]]]] = {}
        for sample in self.samples:
            problems = found.setdefault(sample.setting, {}).setdefault(sample.task, {})
            problems.setdefault(sample.problem_id, []).append(sample)
        return {
            setting: {task: list(problems.values()) for task, problems in tasks.items()}
            for setting, tasks in found.items()
        }


def evaluations(saved: Sequence[Saved]) -> list[Saved]:
    return [one for one in saved if not one.is_run]


def load(folders: Iterable[Path]) -> list[Saved]:
    """Each folder, and after a run the evaluations that lie in it.

    Raises ConfigError if one is neither a run nor an evaluation, or cannot be read.
    """
    found: list[Saved] = []
    for folder in folders:
        if configs.holds_run(folder):
            found.append(_of_run(folder))
            found += [_of_evaluation(f) for f in sorted(folder.glob("evals/*")) if _holds(f)]
        elif _holds(folder):
            found.append(_of_evaluation(folder))
        else:
            raise ConfigError(f"DIR={str(folder)!r}: holds neither a run nor an evaluation")
    names = [one.name for one in found]
    return [
        dataclasses.replace(one, name=f"{one.name} ({one.folder.name})")
        if names.count(one.name) > 1
        else one
        for one in found
    ]


def _holds(folder: Path) -> bool:
    return any((folder / name).exists() for name in (DESCRIPTION, PARTS))


def _of_run(folder: Path) -> Saved:
    rows = metrics.read(folder) if (folder / metrics.METRICS).is_file() else []
    name = "/".join(folder.resolve().parts[-2:])
    return Saved(name, folder, True, read(folder), [], rows)


def _of_evaluation(folder: Path) -> Saved:
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        name = f"{described['model']}, {described['stage']}"
        left_out = described["left_out"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / DESCRIPTION}: cannot be read: {error!r}") from error
    samples = read(folder)
    whole = [sample for sample in samples if sample.fork is None]
    forks = [sample for sample in samples if sample.fork is not None]
    return Saved(name, folder, False, whole, forks, [], left_out)
