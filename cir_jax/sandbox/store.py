"""A run's programs: what came of each is written down, and can be given again without running it.

The record is a file of JSON lines, in the order in which programs ended:

- {"settings": ...}: limits, rung and packages of the programs after it;
- {"key", "seed", "code", "status", "stdout", "error", "wall_s"}: a program that has run;
- {"again", "status", "stdout", "error"}: run once more, it did something else.

A key is a hash of settings, program and seed; what a program prints is a function of these, but
for clocks and the like. Of lines with equal keys (a run that was resumed has them) the last counts.
"""

import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, get_args

from cir_jax import exits
from cir_jax.config import SandboxConfig
from cir_jax.exits import RunError
from cir_jax.records import ExecResult, ExecStatus
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.executor import Executor
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.outcome import Tally, result_of
from cir_jax.sandbox.pool import limits_of, open_sandbox

PROGRAMS = "programs.jsonl"
_RECORDS = "programs*.jsonl"
_EXCERPT_CHARS = 80


def _key(settings: dict[str, Any], code: str, seed: int) -> str:
    text = json.dumps([settings, code, seed], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Store:
    """An executor that keeps a record.

    Args:
      executor: runs the programs; closed with this.
      path: of the record, which is appended to; None: there is none.
      recheck_share: of programs, chosen by key, that are run twice to see whether they do the
        same.
    """

    def __init__(self, executor: Executor, path: Path | None, *, recheck_share: float):
        self._executor = executor
        self.limits, self.description = executor.limits, executor.description
        self._settings = self.description | {"limits": dataclasses.asdict(executor.limits)}
        self._recheck_below = recheck_share * 2**32
        self._lock = threading.Lock()
        self._tally = Tally()
        self._counts = dict.fromkeys(_RECHECKS, 0)
        self._before = executor.stats()
        self._path, self._failed = path, ""
        self._file = None if path is None else os.open(path, _APPEND, 0o644)
        self._unwritten: set[Future[ExecResult]] = set()
        if self._file is not None and os.fstat(self._file).st_size:
            os.write(self._file, b"\n")  # a killed run may not have finished its last line
        # Not before there is something to write, or a run that goes on without its record would
        # seem to have lost most of it.
        self._says_settings = False

    def submit(self, code: str, *, seed: int = 0) -> Future[ExecResult]:
        """As the executor's.

        Raises:
          RunError: the record cannot be written to.
        """
        self._check()
        started = time.monotonic()
        future = self._executor.submit(code, seed=seed)
        with self._lock:
            self._unwritten.add(future)

        def keep(done: Future[ExecResult]) -> None:
            self._keep(code, seed, done, started)
            with self._lock:
                self._unwritten.discard(done)

        future.add_done_callback(keep)
        return future

    def _check(self) -> None:
        if self._failed:
            raise RunError(f"{self._path}: {self._failed}", exits.IO)

    def size(self) -> int:
        """Bytes of the record, on disk, with all programs whose results anyone has seen; 0 if
        there is none. Raises RunError as `submit`."""
        # A result can be seen a moment before it is written down.
        while True:
            with self._lock:
                if not any(future.done() for future in self._unwritten):
                    break
            time.sleep(0.001)
        self._check()
        if self._file is None:
            return 0
        os.fsync(self._file)
        return os.fstat(self._file).st_size

    def truncate(self, size: int) -> None:
        """Drops what was recorded after the record had this size."""
        if self._file is not None and os.fstat(self._file).st_size > size:
            os.ftruncate(self._file, size)
            with self._lock:
                self._says_settings = False

    def _keep(self, code: str, seed: int, done: Future[ExecResult], started: float) -> None:
        if (result := result_of(done)) is None:
            return
        self._tally.add(result, time.monotonic() - started)
        if result.status == "infra":
            return  # says nothing about the program
        key = _key(self._settings, code, seed)
        self._write({"key": key, "seed": seed, "code": code} | dataclasses.asdict(result))
        if int(key[:8], 16) < self._recheck_below:
            try:
                again = self._executor.submit(code, seed=seed)
            except RuntimeError:
                return  # it is being closed
            again.add_done_callback(lambda done: self._compare(key, result, done))

    def _compare(self, key: str, first: ExecResult, done: Future[ExecResult]) -> None:
        second = result_of(done)
        if second is None or second.status == "infra":
            return
        said = {name: getattr(second, name) for name in ("status", "stdout", "error")}
        differs = any(getattr(first, name) != value for name, value in said.items())
        with self._lock:
            self._counts["runs_rechecked"] += 1
            self._counts["runs_nondeterministic"] += differs
        if differs:
            self._write({"again": key} | said)

    def _write(self, *lines: dict[str, Any]) -> None:
        with self._lock:
            if not self._says_settings:
                self._says_settings = True
                lines = ({"settings": self._settings}, *lines)
            data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            try:
                while self._file is not None and data:
                    data = data[os.write(self._file, data) :]
            except OSError as error:
                self._failed = str(error)  # for the next program's submission to raise

    def figures(self) -> dict[str, float]:
        """Of the programs that have ended since the last call: how many, in all and by status; the
        median and 99 % of their seconds and of those in the queue; how many were run again, and
        how many of these did something else; retries and restarted workers."""
        before, self._before = self._before, self._executor.stats()
        workers = {name: self._before.get(name, 0) - before.get(name, 0) for name in _OF_WORKERS}
        with self._lock:
            rechecks, self._counts = self._counts, dict.fromkeys(_RECHECKS, 0)
        figures = _figures(self._tally.take()) | rechecks
        return figures | {_OF_WORKERS[name]: count for name, count in workers.items()}

    def stats(self) -> dict[str, Any]:
        return self._executor.stats()

    def close(self) -> None:
        """Ends all programs. May be called twice."""
        self._executor.close()
        self._write()
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Replay:
    """An executor that looks results up in a record and runs nothing.

    Args:
      path: of the record, or of a run directory with one, or with one of each process.
      limits: those that it has to be of.

    Raises:
      SandboxError: there is no record, or it is of programs with other limits.
    """

    def __init__(self, path: Path, limits: Limits):
        self.limits = limits
        self._path = path / PROGRAMS if path.is_dir() else path
        paths = sorted(path.glob(_RECORDS)) if path.is_dir() else [path]
        self._tally = Tally()
        self._lock = threading.Lock()
        self._files: list[BinaryIO] = []
        try:
            self._files += [open(each, "rb") for each in paths or [self._path]]  # noqa: SIM115
        except OSError as error:
            raise SandboxError(f"sandbox.replay={str(path)!r}: {error}") from None
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._settings: list[dict[str, Any]] = []
        try:
            self._index(dataclasses.asdict(limits))
        except BaseException:
            self.close()
            raise
        newest = self._settings[-1]
        self.description = {name: newest[name] for name in newest if name != "limits"}

    def _index(self, limits: dict[str, Any]) -> None:
        recorded: dict[str, Any] = {}
        for file in self._files:
            place = 0
            for data in file:
                if (line := _parsed(data)) is not None:
                    if "settings" in line:
                        recorded = line["settings"]["limits"]
                        if recorded == limits and line["settings"] not in self._settings:
                            self._settings.append(line["settings"])
                    elif "key" in line:
                        self._places[line["key"]] = file, place
                place += len(data)
        if not self._settings:
            differs = [
                f"{name} was {recorded.get(name)!r}, is {value!r}"
                for name, value in limits.items()
                if recorded.get(name) != value
            ]
            why = "; ".join(differs) if recorded else "it is none"
            raise SandboxError(f"sandbox.replay={str(self._path)!r}: not a record of this: {why}")

    def submit(self, code: str, *, seed: int = 0) -> Future[ExecResult]:
        """The recorded result, at once.

        Raises:
          SandboxError: there is none.
        """
        future: Future[ExecResult] = Future()
        result = self._find(_key(settings, code, seed) for settings in reversed(self._settings))
        if result is None:
            excerpt = code.strip()[:_EXCERPT_CHARS]
            raise SandboxError(
                f"sandbox.replay={str(self._path)!r}: does not hold what this run asks for, with "
                f"seed {seed}: {excerpt!r}; the run has left the recorded one"
            )
        self._tally.add(result, result.wall_s)
        future.set_result(result)
        return future

    def _find(self, keys: Iterable[str]) -> ExecResult | None:
        for key in keys:
            if found := self._places.get(key):
                file, place = found
                with self._lock:
                    file.seek(place)
                    line = json.loads(file.readline())
                return ExecResult(*(line[field.name] for field in dataclasses.fields(ExecResult)))
        return None

    def figures(self) -> dict[str, float]:
        """As Store's; programs took the seconds that they had taken."""
        return _figures(self._tally.take()) | dict.fromkeys((*_RECHECKS, *_OF_WORKERS.values()), 0)

    def stats(self) -> dict[str, Any]:
        return {}

    def size(self) -> int:
        """0: nothing is recorded."""
        return 0

    def truncate(self, size: int) -> None:
        """Does nothing: the record is another run's."""

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def record_name(process: int) -> str:
    """Of the record of one of a run's processes."""
    return f"programs.{process}.jsonl" if process else PROGRAMS


def open_store(cfg: SandboxConfig, run_dir: Path | None, process: int = 0) -> Store | Replay:
    """What runs a run's programs; errors as open_sandbox and Replay.

    Args:
      run_dir: where the record goes; None: there is none.
      process: which of the run's this is.
    """
    if cfg.replay:
        return Replay(Path(cfg.replay), limits_of(cfg))
    name = record_name(process)
    path = run_dir / name if run_dir is not None and cfg.record else None
    return Store(open_sandbox(cfg), path, recheck_share=cfg.recheck_share)


_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
_RECHECKS = ("runs_rechecked", "runs_nondeterministic")
# Counts of an executor that has workers, and their names among the figures.
_OF_WORKERS = {"retries": "run_retries", "restarts": "worker_restarts"}


def _figures(programs: dict[str, Any]) -> dict[str, float]:
    """A tally's, flat."""
    statuses = programs["statuses"]
    figures: dict[str, float] = {"runs": sum(statuses.values())}
    figures |= {f"runs_{name}": statuses.get(name, 0) for name in get_args(ExecStatus)}
    for name in ("run", "queue"):
        p50, p99 = programs[f"{name}_s"] or (0.0, 0.0)
        figures |= {f"{name}_p50_s": p50, f"{name}_p99_s": p99}
    return figures


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None for a line that a killed run did not finish."""
    try:
        return json.loads(line)
    except ValueError:
        return None
