"""Files of a run that grow: metrics.jsonl, timings.jsonl, samples.jsonl.

metrics.jsonl and samples.jsonl hold nothing that depends on the clock, so that two runs of one
seed write the same bytes; timings.jsonl has a line beside each line of metrics.jsonl.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.records import Score, Trajectory

METRICS, TIMINGS, SAMPLES = "metrics.jsonl", "timings.jsonl", "samples.jsonl"
_FILES = (METRICS, TIMINGS, SAMPLES)


class MetricsWriter:
    """Appends JSON lines to the files of a run directory."""

    def __init__(self, run_dir: Path):
        self._dir = run_dir

    def write(self, kind: str, step: int, metrics: dict[str, Any], timings: dict[str, float]):
        head = {"kind": kind, "step": step}
        self._append(METRICS, head | metrics)
        self._append(TIMINGS, head | {k: round(v, 4) for k, v in timings.items()})

    def write_sample(self, step: int, trajectory: Trajectory, score: Score, text: str) -> None:
        """One trajectory: its text for people, its tokens with author and log-probability."""
        t = trajectory
        self._append(
            SAMPLES,
            {
                "step": step,
                "problem_id": t.problem.problem_id,
                "sample": t.sample,
                "answer": t.problem.answer,
                "score": score.value,
                "reason": score.reason,
                "stop_reason": t.stop_reason,
                "calls": [
                    {"code": c.code, "status": c.result.status, "stdout": c.result.stdout}
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
