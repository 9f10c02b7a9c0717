"""Samples as they are kept: one JSON object a line, with all that tables and figures are made of.

An evaluation directory holds samples.jsonl, whose lines are in the order (task, setting, problem,
sample) and hold nothing that depends on the clock, and timings.jsonl, which has a line beside each
of them. Fields of a line of samples.jsonl:

- task, problem_id, problem, sample: the benchmark (or task), the problem, its index there, the
  number of the sample;
- prompt, max_calls: the setting, which prompt (code, text, config) and the most programs;
- fork: of a counterfactual, which sample it begins as, at which call, and what became of the tool
  there (on, off, corrupted); else null;
- question, truth, types, needs_code: of the problem; types as {"subject": ..., "level": ...};
- answer, vote: the last box, null if there is none; equal numbers for equivalent answers of one
  problem;
- score, reason, stop_reason: the verdict, +1 or -1, and why; what ended the response;
- spans: author (prompt, model, tool), start and end (tokens) and text of each author's stretches;
- calls: code, status, stdout and error of each program, and how many tokens were put back;
- ids, logp: every token, prompt first, and its log-probability, 0 where the model did not write it.

Of timings.jsonl: programs_s, the seconds of each program, and rollout_s, those of the rollout that
the sample was part of.

A training run's samples.jsonl (cir_jax/metrics.py) reads as the same, with its step.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import numpy as np

from cir_jax import config as configs
from cir_jax import metrics
from cir_jax.config import ConfigError
from cir_jax.metrics import SAMPLES, TIMINGS
from cir_jax.records import Author, Call, ExecResult, Problem, Score, Trajectory, author_spans
from cir_jax.reward.answer import last_boxed
from cir_jax.tokenizer import Tokenizer

PARTS = "parts"
DESCRIPTION = "evaluation.json"
"""Of an evaluation directory: the model, the stage of its weights, and all that was asked."""

Branch = Literal["on", "off", "corrupted"]


class Setting(NamedTuple):
    """prompt: code and text are a suite's, config is data.template. max_calls: most programs."""

    prompt: str
    max_calls: int

    @property
    def name(self) -> str:
        return "text" if self.prompt == "text" else f"{self.prompt}, {self.max_calls} calls"


class Span(NamedTuple):
    """Tokens start .. end - 1, all of one author."""

    author: str
    start: int
    end: int
    text: str


class Fork(NamedTuple):
    """Where a counterfactual leaves the sample that it begins as: at this call, counted from 0."""

    sample: int
    call: int
    branch: Branch


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One response with its verdict; the fields are those of the table above.

    rollout_s: seconds of the rollout that it was part of; those of its programs are in `calls`.
    step: of a training run's sample. vote: None without an answer, or if answers were not compared.
    """

    task: str
    problem_id: str
    problem: int
    sample: int
    setting: Setting
    question: str
    truth: str
    answer: str | None
    vote: int | None
    score: float
    reason: str
    stop_reason: str
    spans: tuple[Span, ...]
    calls: tuple[Call, ...]
    ids: np.ndarray
    logp: np.ndarray
    types: dict[str, str] = dataclasses.field(default_factory=dict)
    needs_code: bool = False
    fork: Fork | None = None
    step: int | None = None
    rollout_s: float = 0.0

    @property
    def correct(self) -> bool:
        return self.score > 0

    @property
    def turns(self) -> list[Span]:
        """The stretches that the model wrote."""
        return [span for span in self.spans if span.author == "model"]

    @property
    def num_model_tokens(self) -> int:
        return sum(span.end - span.start for span in self.turns)

    @property
    def num_response_tokens(self) -> int:
        """Model and tool tokens."""
        return sum(s.end - s.start for s in self.spans if s.author != "prompt")

    def verdict(self) -> Score:
        return Score(self.score, self.reason)

    def trajectory(self) -> Trajectory:
        """As the engine wrote it; of its problem there is what the sample has."""
        author = np.concatenate(
            [np.full(s.end - s.start, Author[s.author.upper()], np.int8) for s in self.spans]
            or [np.zeros(0, np.int8)]
        )
        problem = Problem(
            self.problem_id, self.task, self.question, self.truth, "math", self.needs_code
        )
        return Trajectory(
            problem, self.sample, self.ids, author, self.logp, self.calls, self.stop_reason
        )


def sample_of(
    trajectory: Trajectory,
    score: Score,
    tokenizer: Tokenizer,
    *,
    index: int,
    setting: Setting,
    vote: int | None = None,
    fork: Fork | None = None,
    rollout_s: float = 0.0,
) -> Sample:
    """What is kept of a graded trajectory. index: of its problem in its benchmark."""
    t, problem = trajectory, trajectory.problem
    spans = _spans(t.author, t.ids, tokenizer)
    return Sample(
        task=problem.task,
        problem_id=problem.problem_id,
        problem=index,
        sample=t.sample,
        setting=setting,
        question=problem.question,
        truth=problem.answer,
        answer=_answer(spans),
        vote=vote,
        score=score.value,
        reason=score.reason,
        stop_reason=t.stop_reason,
        spans=spans,
        calls=t.calls,
        ids=t.ids,
        logp=t.logp,
        types=problem.metadata.get("types", {}),
        needs_code=problem.needs_code,
        fork=fork,
        rollout_s=rollout_s,
    )


def _spans(author: np.ndarray, ids: np.ndarray, tokenizer: Tokenizer) -> tuple[Span, ...]:
    ends = set(tokenizer.end_ids)
    return tuple(
        Span(
            who.name.lower(),
            at.start,
            at.stop,
            # What ends a response is no part of its text; in a prompt it is.
            tokenizer.decode([i for i in ids[at] if who == Author.PROMPT or i not in ends]),
        )
        for who, at in author_spans(author)
    )


def _answer(spans: Iterable[Span]) -> str | None:
    return last_boxed([span.text for span in spans if span.author == "model"])


# --- lines


def to_line(sample: Sample) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its line of samples.jsonl, and that of timings.jsonl."""
    s = sample
    line = {
        "task": s.task,
        "problem_id": s.problem_id,
        "problem": s.problem,
        "sample": s.sample,
        "prompt": s.setting.prompt,
        "max_calls": s.setting.max_calls,
        "fork": s.fork and s.fork._asdict(),
        "question": s.question,
        "truth": s.truth,
        "types": s.types,
        "needs_code": s.needs_code,
        "answer": s.answer,
        "vote": s.vote,
        "score": s.score,
        "reason": s.reason,
        "stop_reason": s.stop_reason,
        "spans": [span._asdict() for span in s.spans],
        "calls": [
            {
                "code": c.code,
                "status": c.result.status,
                "stdout": c.result.stdout,
                "error": c.result.error,
                "tool_tokens": c.num_tool_tokens,
            }
            for c in s.calls
        ],
        "ids": s.ids.tolist(),
        "logp": [round(float(x), 4) for x in s.logp],
    }
    programs_s = [round(c.result.wall_s, 4) for c in s.calls]
    return line, {"programs_s": programs_s, "rollout_s": round(s.rollout_s, 3)}


def from_line(line: dict[str, Any], timing: dict[str, Any]) -> Sample:
    """The inverse of `to_line`."""
    calls = tuple(
        Call(
            c["code"],
            ExecResult(c["status"], c["stdout"], c["error"], seconds),
            c["tool_tokens"],
        )
        for c, seconds in zip(line["calls"], timing["programs_s"], strict=True)
    )
    same = ("task", "problem_id", "problem", "sample", "question", "truth", "types", "needs_code")
    same += ("answer", "vote", "score", "reason", "stop_reason")
    return Sample(
        **{name: line[name] for name in same},
        setting=Setting(line["prompt"], line["max_calls"]),
        spans=tuple(Span(**span) for span in line["spans"]),
        calls=calls,
        ids=np.asarray(line["ids"], np.int32),
        logp=np.asarray(line["logp"], np.float32),
        fork=Fork(**line["fork"]) if line["fork"] else None,
        rollout_s=timing["rollout_s"],
    )


# --- reading


def read(folder: Path) -> list[Sample]:
    """The samples of an evaluation directory, those that there are yet, or of a training run.

    Raises ConfigError naming file and line of what cannot be read.
    """
    if configs.holds_run(folder):
        return _of_training(folder)
    if (folder / SAMPLES).is_file():
        files = [(folder / SAMPLES, folder / TIMINGS)]
    else:
        files = [(part, timings_of(part)) for part in sorted((folder / PARTS).glob("*.jsonl"))]
    return [sample for pair in files for sample in _of_file(*pair)]


def timings_of(part: Path) -> Path:
    return part.with_suffix(".timings")


def _of_file(file: Path, timings: Path) -> Iterator[Sample]:
    with open(file, encoding="utf-8") as lines, open(timings, encoding="utf-8") as beside:
        for number, (line, timing) in enumerate(zip(lines, beside, strict=True), start=1):
            yield _parsed(file, number, from_line, line, timing)


def _parsed(file: Path, number: int, make, *lines: str) -> Sample:
    try:
        return make(*map(json.loads, lines))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}, line {number}: no line of samples: {error!r}") from error


def _of_training(folder: Path) -> list[Sample]:
    """Of metrics.MetricsWriter.write_sample.

    What a line does not say of its problem is taken from the id and the prompt; the budget is that
    of the step's metrics.
    """
    file = folder / SAMPLES
    if not file.is_file():
        return []
    tokenizer = Tokenizer(configs.asset_dir(configs.load_run(folder).tokenizer))
    budgets = {r["step"]: r["max_calls"] for r in metrics.read(folder) if r["kind"] == "rl"}
    seen: dict[str, int] = {}

    def make(line: dict[str, Any]) -> Sample:
        author, ids = np.asarray(line["author"], np.int8), np.asarray(line["ids"], np.int32)
        spans = _spans(author, ids, tokenizer)
        outputs = [span.end - span.start for span in spans if span.author == "tool"]
        return Sample(
            task=line.get("task", _task(line["problem_id"])),
            problem_id=line["problem_id"],
            problem=seen.setdefault(line["problem_id"], len(seen)),
            sample=line["sample"],
            setting=Setting("config", line.get("max_calls", budgets.get(line["step"], 0))),
            question=line.get("question", spans[0].text),
            truth=line["answer"],
            answer=_answer(spans),
            vote=None,
            score=line["score"],
            reason=line["reason"],
            stop_reason=line["stop_reason"],
            spans=spans,
            calls=tuple(
                Call(
                    c["code"],
                    ExecResult(c["status"], c["stdout"], c.get("error", "")),
                    outputs[n] if n < len(outputs) else 0,
                )
                for n, c in enumerate(line["calls"])
            ),
            ids=ids,
            logp=np.asarray(line["logp"], np.float32),
            step=line["step"],
        )

    with open(file, encoding="utf-8") as lines:
        return [_parsed(file, n, make, line) for n, line in enumerate(lines, start=1)]


def _task(problem_id: str) -> str:
    """TASK of TASK/SPLIT/NUMBER; of a file's problem, FILE/NUMBER, the file's name."""
    path = PurePath(problem_id).parent
    return path.stem if path.suffix or len(path.parts) < 2 else path.parts[0]


# --- writing


class Parts:
    """Where an evaluation's samples come in, one part a group of problems, and become one file.

    A part is there whole or not at all, so whoever goes on asks for the missing ones. Of several
    processes each writes its own share of every part, into one directory that all of them see.
    """

    def __init__(self, folder: Path, index: int = 0, count: int = 1):
        self._folder, self._index, self._count = folder, index, count
        if not self.complete:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)

    @property
    def complete(self) -> bool:
        return (self._folder / SAMPLES).is_file()

    def _path(self, number: int, index: int) -> Path:
        return self._folder / PARTS / f"{number:06d}.{index:04d}-of-{self._count:04d}.jsonl"

    def has(self, number: int) -> bool:
        """Whether all processes have written theirs."""
        return all(self._path(number, index).is_file() for index in range(self._count))

    def write(self, number: int, samples: Sequence[Sample]) -> None:
        lines = [to_line(sample) for sample in samples]
        path = self._path(number, self._index)
        # The samples last: it is they that say that the part is there.
        _write(timings_of(path), [timing for _, timing in lines])
        _write(path, [line for line, _ in lines])

    def read(self, number: int) -> list[Sample]:
        """What all processes have written."""
        paths = [self._path(number, index) for index in range(self._count)]
        return [sample for path in paths for sample in _of_file(path, timings_of(path))]

    def merge(self, num_parts: int) -> None:
        """All parts in order as one file; by one process, when all are there."""
        paths = [self._path(n, i) for n in range(num_parts) for i in range(self._count)]
        _join([timings_of(path) for path in paths], self._folder / TIMINGS)
        _join(paths, self._folder / SAMPLES)
        self.remove()

    def remove(self) -> None:
        """What is left of the parts once they are one file; by one process."""
        folder = self._folder / PARTS
        if self._index == 0 and folder.is_dir():
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    aside = path.with_name(path.name + ".new")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _join(parts: Iterable[Path], path: Path) -> None:
    aside = path.with_name(path.name + ".new")
    with open(aside, "wb") as file:
        for part in parts:
            file.write(part.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
