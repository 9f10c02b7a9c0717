"""Files of a run that grow: metrics.jsonl, timings.jsonl, samples.jsonl.

metrics.jsonl and samples.jsonl hold nothing that depends on the clock, so that two runs of one
seed write the same bytes; timings.jsonl has a line beside each line of metrics.jsonl, with the time
it was written at.
"""

import contextlib
import dataclasses
import json
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
    """Appends JSON lines to the files of a run directory, and copies metrics to sinks."""

    def __init__(self, run_dir: Path):
        self._dir = run_dir
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
        head = {"kind": kind, "step": step}
        line = head | metrics
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

    def sizes(self) -> dict[str, int]:
        """Bytes of each file: what a checkpoint remembers of them."""
        return {n: p.stat().st_size if (p := self._dir / n).exists() else 0 for n in _FILES}

    def truncate(self, sizes: dict[str, int]) -> None:
        """Drops what was written after a checkpoint."""
        for name, size in sizes.items():
            path = self._dir / name
            if path.exists():
                with open(path, "r+b") as file:
                    file.truncate(size)


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
