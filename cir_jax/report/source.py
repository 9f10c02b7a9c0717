"""What a report is made of: the files of training runs, evaluations and ablations."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from cir_jax import config as configs
from cir_jax.config import ConfigError
from cir_jax.evals.samples import DESCRIPTION, PARTS
from cir_jax.metrics import METRICS, SAMPLES, TIMINGS
from cir_jax.sinks import WANDB_ID

SANDBOX_FILE = "sandbox.json"
# What `cir-jax ablate` leaves beside its runs, STRATEGY/SEED.
ABLATION_TABLE = "ablation.md"

# What a trajectory cannot be shown without.
_NEEDED = ("sample", "answer", "score", "reason", "stop_reason", "calls", "ids", "logp")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """One directory: a run with its metrics, or an evaluation, which has none.

    name: unlike any other's of the report. config: as JSON has it. timings: beside each of lines.
    about: what the directory's other files say, by file. tokenizer: directory, or package:NAME.
    """

    name: str
    directory: Path
    kind: Literal["run", "evaluation"]
    config: dict[str, Any]
    lines: list[Row]
    timings: list[Row]
    samples: list[Row]
    about: dict[str, dict[str, Any]]

    @property
    def tokenizer(self) -> str:
        return self.config["tokenizer"]

    def of_kind(self, kind: str) -> list[Row]:
        return [line for line in self.lines if line["kind"] == kind]

    def timings_of(self, kind: str) -> list[Row]:
        return [line for line in self.timings if line["kind"] == kind]


@dataclasses.dataclass(frozen=True)
class Material:
    """tables: of ablations, by directory: rows of cells, the first of them the titles."""

    sources: list[Source]
    tables: dict[str, list[list[str]]]


def gather(paths: Sequence[Path]) -> Material:
    """Reads directories; one of `cir-jax ablate` stands for its runs, and a run for the evaluations
    in it, too.

    Raises ConfigError naming the path, or the file and line, that cannot be used.
    """
    directories: list[Path] = []
    tables = {}
    for path in paths:
        if (path / ABLATION_TABLE).is_file():
            text = (path / ABLATION_TABLE).read_text(encoding="utf-8")
            tables[str(path)] = markdown_table(text)
            directories += sorted(p.parent for p in path.glob(f"*/*/{configs.CONFIG_FILE}"))
        else:
            directories.append(path)
    found = [inner for path in directories for inner in (path, *_evaluations_in(path))]
    found = list({path.resolve(): path for path in found}.values())
    names = labels([path.resolve() for path in found])
    sources = [_read(path, name) for path, name in zip(found, names, strict=True)]
    return Material(sources, tables)


def _evaluations_in(path: Path) -> list[Path]:
    return sorted(file.parent for file in path.glob(f"evals/*/{DESCRIPTION}"))


def labels(paths: Sequence[Path]) -> list[str]:
    """The last two parts of each path, or as many as tell all of them apart."""
    for depth in range(2, max(len(p.parts) for p in paths) + 1):
        found = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(found)) == len(found):
            break
    return found


def markdown_table(text: str) -> list[list[str]]:
    """Cells of the lines between bars, without the rule below the titles."""
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [row for row in cells if any(set(cell) - set("-: ") for cell in row)]


def _read(path: Path, name: str) -> Source:
    if not path.is_dir():
        raise ConfigError(f"RUN={str(path)!r}: no such directory")
    if (path / DESCRIPTION).is_file():
        about = _object(path / DESCRIPTION)
        try:
            config = about["asked"]["config"]
            config["tokenizer"]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path / DESCRIPTION}: has no {error}") from error
        samples = _evaluation_samples(path)
        return Source(name, path, "evaluation", config, [], [], samples, {DESCRIPTION: about})
    if not configs.holds_run(path):
        raise ConfigError(
            f"RUN={str(path)!r}: holds neither {configs.CONFIG_FILE} of a run, nor "
            f"{DESCRIPTION} of an evaluation, nor {ABLATION_TABLE} of an ablation"
        )
    about = {
        file.name: _object(file)
        for file in sorted(path.glob("*.json"))
        if file.name not in (configs.CONFIG_FILE, WANDB_ID)
    }
    lines = list(_lines(path / METRICS, ("kind", "step")))
    timings = list(_lines(path / TIMINGS, ("kind", "step")))
    samples = list(_lines(path / SAMPLES, ("step", "problem_id", *_NEEDED, "author")))
    config = _object(path / configs.CONFIG_FILE)
    return Source(name, path, "run", config, lines, timings, samples, about)


def _evaluation_samples(path: Path) -> list[Row]:
    needed = ("task", "problem_id", *_NEEDED, "spans")
    if (path / SAMPLES).is_file():
        return list(_lines(path / SAMPLES, needed))
    # An evaluation that is not complete yet.
    parts = sorted((path / PARTS).glob("*.jsonl"))
    return [row for part in parts for row in _lines(part, needed)]


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return found


def _lines(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    """The objects of a file, none if there is no file. A last line without an end is left out: a
    run that goes on is writing it."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: no JSON object: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: no JSON object")
            missing = [key for key in needed if key not in row]
            if missing:
                raise ConfigError(f"{path}, line {number}: has no {missing[0]!r}")
            yield row
