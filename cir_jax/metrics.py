"""Files of a run that grow: metrics.jsonl, timings.jsonl, samples.jsonl.

metrics.jsonl and samples.jsonl hold nothing that depends on the clock, so that two runs of one
seed write the same bytes; timings.jsonl has a line beside each line of metrics.jsonl, with the time
it was written at. Each line of metrics.jsonl ends with `chain`: a hash of the line and of the chain
before it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.records import Author, Score, Trajectory
from cir_jax.sinks import WRITTEN, Sink

METRICS, TIMINGS, SAMPLES = "metrics.jsonl", "timings.jsonl", "samples.jsonl"
_FILES = (METRICS, TIMINGS, SAMPLES)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step made of a trajectory.

    group: number of its problem among those of the step. max_calls: the step's budget. reward: the
    score with what shaping adds. advantage: [T]; None if it was not trained on.
    """

    step: int
    group: int
    max_calls: int
    reward: float
    advantage: np.ndarray | None


class MetricsWriter:
    """Appends JSON lines to the files of a run directory, and copies metrics to sinks.

    writes: False of all processes of a run but one.
    """

    def __init__(self, run_dir: Path, *, writes: bool = True):
        self._dir, self._writes = run_dir, writes
        self._chain: str | None = None
        self._sinks: list[Sink] = []
        self._num_lines = 0

    def attach(self, sinks: Sequence[Sink]) -> None:
        """Gives them the lines that there are, and from now on each new one."""
        self._sinks = list(sinks)
        if self._sinks and (self._dir / METRICS).exists():
            pairs = zip(read(self._dir), read(self._dir, TIMINGS), strict=True)
            for line, timings in pairs:
                self._copy(line, timings)

    def close(self) -> None:
        """Ends the sinks."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def write(self, kind: str, step: int, metrics: dict[str, Any], timings: dict[str, float]):
        if not self._writes:
            return
        head = {"kind": kind, "step": step}
        line = head | metrics
        if self._chain is None:
            self._chain = self._last_chain()
        self._chain = link(self._chain, line)
        line |= {"chain": self._chain}
        beside = head | {k: round(v, 4) for k, v in timings.items()}
        beside[WRITTEN] = round(time.time(), 1)
        self._append(METRICS, line)
        self._append(TIMINGS, beside)
        self._copy(line, beside)

    def _copy(self, line: dict[str, Any], timings: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(self._num_lines, line, timings)
        self._num_lines += 1

    def write_sample(
        self, trajectory: Trajectory, score: Score, outcome: Outcome, text: str
    ) -> None:
        """One trajectory: its text for people, its tokens with author and log-probability.

        advantage: the mean over the model's tokens; advantages: of each token, if they differ.
        """
        if not self._writes:
            return
        t = trajectory
        mean, each = _advantage(t, outcome.advantage)
        self._append(
            SAMPLES,
            {
                "step": outcome.step,
                "group": outcome.group,
                "task": t.problem.task,
                "problem_id": t.problem.problem_id,
                "sample": t.sample,
                "max_calls": outcome.max_calls,
                "question": t.problem.question,
                "answer": t.problem.answer,
                "score": score.value,
                "reason": score.reason,
                "reward": round(outcome.reward, 4),
                "advantage": mean,
                "advantages": each,
                "stop_reason": t.stop_reason,
                "calls": [
                    {
                        "code": c.code,
                        "status": c.result.status,
                        "stdout": c.result.stdout,
                        "error": c.result.error,
                        "tool_tokens": c.num_tool_tokens,
                    }
                    for c in t.calls
                ],
                "text": text,
                "ids": t.ids.tolist(),
                "author": t.author.tolist(),
                "logp": [round(float(x), 4) for x in t.logp],
            },
        )

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with open(self._dir / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _last_chain(self) -> str:
        path = self._dir / METRICS
        lines = read(self._dir) if path.exists() else []
        return lines[-1]["chain"] if lines else ""

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, all of them on disk: what a checkpoint remembers of them."""
        return {name: synced_size(self._dir / name) for name in _FILES}

    def truncate(self, sizes: dict[str, int]) -> None:
        """Drops what was written after a checkpoint."""
        self._chain = None
        if not self._writes:
            return
        for name, size in sizes.items():
            path = self._dir / name
            if path.exists():
                with open(path, "r+b") as file:
                    file.truncate(min(size, path.stat().st_size))


def synced_size(path: Path) -> int:
    """Bytes of a file, which are on disk then, whatever becomes of the machine; 0 without one."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def link(chain: str, line: dict[str, Any]) -> str:
    """The chain of a line, which is given without one, after a line of another."""
    text = chain + json.dumps(line, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def broken_link(lines: Sequence[dict[str, Any]]) -> int | None:
    """Index of the first line whose chain is not that of what it and those before it say."""
    chain = ""
    for i, line in enumerate(lines):
        chain = link(chain, {key: value for key, value in line.items() if key != "chain"})
        if line.get("chain") != chain:
            return i
    return None


def _advantage(
    trajectory: Trajectory, advantage: np.ndarray | None
) -> tuple[float | None, list[float] | None]:
    if advantage is None:
        return None, None
    each = [round(float(x), 4) for x in advantage]
    own = [x for x, who in zip(each, trajectory.author, strict=True) if who == Author.MODEL]
    mean = round(sum(own) / len(own), 4) if own else 0.0
    return mean, each if len(set(own)) > 1 else None


def read(run_dir: Path, name: str = METRICS) -> list[dict[str, Any]]:
    with open(run_dir / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def num_steps(run_dir: Path) -> int:
    """RL steps in a run's metrics; the last line may be unfinished."""
    path = run_dir / METRICS
    return path.read_bytes().count(b'{"kind": "rl"') if path.exists() else 0


def plain(metrics: dict[str, Any]) -> dict[str, float]:
    """Device scalars as Python floats."""
    return {k: float(np.asarray(v)) for k, v in metrics.items()}


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Key-wise mean of rows with equal keys; the largest where a key ends in _max."""
    return {
        k: float((np.max if k.endswith("_max") else np.mean)([row[k] for row in rows]))
        for k in rows[0]
    }


def reason_counts(scores: Sequence[Score]) -> dict[str, int]:
    """How often the graders gave each reason, as `graded/REASON`."""
    return {f"graded/{k}": n for k, n in sorted(Counter(s.reason for s in scores).items())}


class Timer:
    """Seconds per named stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
