"""The TFDS builder of problem sets, on array_record files: nothing here needs TensorFlow.

Order is the files', and the same rows give the same bytes.
"""

import dataclasses
import hashlib
import json
import shutil
import socket
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from cir_jax.config import ConfigError
from cir_jax.data.files import column, read_rows, suffixes, wrong_field
from cir_jax.data.problems import messages
from cir_jax.data.sets import SETS, VERSION, File, ProblemSet, folder
from cir_jax.records import Problem

_FIELDS = ("problem_id", "task", "question", "answer", "verifier", "metadata", "context")
_SUMS = "checksums.json"


class Problems(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One configuration for each set of cir_jax/data/sets.py."""

    name = "problems"
    # Sums are `_Sums`: TFDS would keep them in the package.
    url_infos: ClassVar[dict[str, Any]] = {}
    sums: "_Sums"
    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, description=its.summary) for name, its in SETS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            homepage=SETS[self.builder_config.name].source,
            features=tfds.features.FeaturesDict({k: tfds.features.Text() for k in _FIELDS}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        name = self.builder_config.name
        found = {}
        for split, files in SETS[name].splits.items():
            paths = [(file, _path(name, split, file, dl_manager, self.sums)) for file in files]
            if all(path is not None for _, path in paths):
                found[split] = self._generate_examples(name, split, paths)
        if not found:
            raise ConfigError(f"data prepare {name}: {_wanted(name, dl_manager)}")
        return found

    def _generate_examples(
        self, name: str, split: str, files: list[tuple[File, Path]]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        for number, problem in enumerate(read_problems(name, split, files)):
            row = dataclasses.asdict(problem)
            row["metadata"] = json.dumps(problem.metadata, sort_keys=True)
            row["context"] = json.dumps(problem.context)
            yield number, {key: row[key] for key in _FIELDS}


def _manual(directory: Path | None, name: str, split: str, file: File) -> Path | None:
    """NAME, NAME/SPLIT or NAME/TASK with any ending that can be read."""
    if directory is None:
        return None
    several = len(SETS[name].splits[split]) > 1
    stems = [f"{name}/{file.task}"] if several else [f"{name}/{split}"]
    if not several and len(SETS[name].splits) == 1:
        stems.append(name)
    paths = (directory / f"{stem}{suffix}" for stem in stems for suffix in suffixes())
    return next((path for path in paths if path.is_file()), None)


def _path(
    name: str, split: str, file: File, dl_manager: tfds.download.DownloadManager, sums: "_Sums"
) -> Path | None:
    """Where a file is; None if it is in no manual directory and cannot be downloaded."""
    directory = dl_manager._manual_dir  # `manual_dir` raises where there is none
    path = _manual(Path(directory) if directory else None, name, split, file)
    if path is None and file.url:
        try:
            _reach(file.url)
            path = Path(dl_manager.download(file.url))
        except (OSError, tfds.download.DownloadError) as error:
            wanted = _wanted(name, dl_manager)
            raise ConfigError(f"data prepare {name}: {file.url}: {error}; {wanted}") from error
        return _named_as(sums.checked(path, file), file.url)
    return path


def _reach(url: str) -> None:
    """Raises OSError if there is no way to the host: TFDS would try for minutes."""
    if not urllib.request.getproxies():
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), timeout=10).close()


def _named_as(path: Path, url: str) -> Path:
    """A link with the ending of the url: what a file holds is told by its name."""
    link = path.with_name(path.name + ".as." + url.rsplit("/", 1)[-1])
    if not link.exists():
        link.symlink_to(path.name)
    return link


def _wanted(name: str, dl_manager: tfds.download.DownloadManager) -> str:
    stems = ", ".join(f"{name}/{split}" for split in SETS[name].splits)
    return f"no file {stems} ({', '.join(suffixes())}) in --manual-dir {dl_manager._manual_dir}"


class _Sums:
    """SHA-256 of what has been downloaded, by url."""

    def __init__(self, path: Path):
        self._path = path
        self._known = json.loads(path.read_text()) if path.exists() else {}

    def checked(self, path: Path, file: File) -> Path:
        """The path. Raises ConfigError if the file is not the one that it should be."""
        with open(path, "rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
        known = file.sha256 or self._known.get(file.url)
        if known and found != known:
            raise ConfigError(f"{file.url}: sha256={found}: must be {known}; {path} is left there")
        if not known:
            self._known[file.url] = found
            self._path.write_text(json.dumps(self._known, indent=1, sort_keys=True) + "\n")
            print(f"{file.url}: sha256={found}, kept in {self._path} as that of the first download")
        return path


def read_problems(name: str, split: str, files: list[tuple[File, Path]]) -> Iterator[Problem]:
    """The problems of a split, in the order of its files.

    Raises ConfigError naming file, row and field, or if there are more or fewer than there should.
    """
    its = SETS[name]
    seen: set[str] = set()
    number = 0
    for file, path in files:
        for where, row in read_rows(path, list_in="examples"):
            problem = _problem(its, name, split, file, where, row, number)
            if its.distinct and problem.question in seen:
                continue
            seen.add(problem.question)
            yield problem
            number += 1
    wanted = its.num_problems.get(split, number)
    if number != wanted:
        raise ConfigError(f"{name}:{split}: {number} problems: must be {wanted}")


def _problem(
    its: ProblemSet, name: str, split: str, file: File, where: str, row: dict, number: int
) -> Problem:
    context, question = messages(where, *_first(where, row, its.question))
    head, answer = _first(where, row, its.answer)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise wrong_field(where, head, answer, "text or a number")
    question, answer = its.clean(question, answer)
    metadata = {key: row[key] for key in its.metadata if row.get(key) is not None}
    metadata |= metadata.pop("metadata", {})
    verifier = its.verifier if isinstance(its.verifier, str) else its.verifier(question, answer)
    task = next((row[key] for key in its.task if isinstance(row.get(key), str)), None)
    return Problem(
        problem_id=f"{name}/{split}/{number}",
        task=task or (f"{name}/{file.task}" if file.task else name),
        question=question,
        answer=answer,
        verifier=row.get("verifier", verifier) if its.task else verifier,
        metadata=metadata,
        context=context,
    )


def _first(where: str, row: dict, columns: tuple[str, ...]) -> tuple[str, Any]:
    """The first of the columns that a row has, and its value."""
    for head in columns:
        value = column(row, head)
        if value is not None:
            return head, value
    there = ", ".join(row)
    raise ConfigError(f"{where}: {columns[0]}: missing (or {', '.join(columns[1:])}); has {there}")


def prepare(name: str, data_dir: Path, manual_dir: Path | None) -> dict[str, int]:
    """Makes a set anew in its directory. Returns the number of problems of each split."""
    tfds.disable_progress_bar()
    data_dir.mkdir(parents=True, exist_ok=True)
    # Beside the old one, which stays until the new one is whole.
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{name}.") as new:
        builder = Problems(config=name, data_dir=new, file_format="array_record")
        builder.sums = _Sums(data_dir / _SUMS)
        builder.download_and_prepare(
            download_dir=data_dir / "downloads",
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
        )
        old = folder(name, data_dir)
        shutil.rmtree(old, ignore_errors=True)
        old.parent.mkdir(parents=True, exist_ok=True)
        Path(builder.data_dir).rename(old)
    return {split: its.num_examples for split, its in builder.info.splits.items()}


def stored(name: str, data_dir: Path, split: str) -> Any:
    """A prepared split as a random-access source of rows; `problem` reads them."""
    return tfds.builder_from_directory(folder(name, data_dir)).as_data_source(split)


def problem(row: dict[str, bytes]) -> Problem:
    """Of a stored row: text comes back as bytes."""
    text = {key: row[key].decode() for key in _FIELDS}
    metadata, context = (json.loads(text.pop(key)) for key in ("metadata", "context"))
    return Problem(**text, metadata=metadata, context=tuple(map(tuple, context)))
