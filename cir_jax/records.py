"""Host-side records that travel between stages: problem -> trajectory -> score.

Token ids are the truth; every text here is a view of them for the sandbox, graders and people.
"""

import dataclasses
import enum
from typing import Any, Literal

import numpy as np


class Author(enum.IntEnum):
    """Who wrote a token. The loss mask is `author == MODEL` and nothing else."""

    PROMPT = 0
    MODEL = 1
    TOOL = 2


ExecStatus = Literal["ok", "error", "timeout", "crashed", "oom", "infra"]
Verifier = Literal["math", "exact", "choice", "plan", "gym"]
# What ended a response: its end-of-text token, or the limit that it hit.
StopReason = Literal["eos", "response_length", "context", "row_time", "step_time"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with what is needed to grade an answer to it.

    verifier: how answers are graded, a name in cir_jax/reward/verifiers.py.
    context: messages before the question, as (role, content).
    """

    problem_id: str
    task: str
    question: str
    answer: str
    verifier: Verifier
    needs_code: bool = False
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    context: tuple[tuple[str, str], ...] = ()


def prompt_text(template: str, problem: Problem) -> str:
    """The prompt: {question} is replaced, other braces (as in `\\boxed{}`) stay."""
    return template.replace("{question}", problem.question)


@dataclasses.dataclass(frozen=True)
class ExecResult:
    """The outcome of one program.

    status: ok (exit status 0), error (uncaught exception or non-zero exit), timeout, crashed
      (killed by a signal, or its worker died twice), oom (memory limit), infra (the sandbox
      itself failed; never shown to the model).
    stdout: what the program printed; the value of a trailing expression if it printed nothing.
    error: last line of the traceback, or a fixed text for timeout/crash/oom; "" when ok.
    """

    status: ExecStatus
    stdout: str = ""
    error: str = ""
    wall_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Call:
    """One executed block: the program, what came of it, and the tokens put back for it."""

    code: str
    result: ExecResult
    num_tool_tokens: int


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One sampled response, exactly as the decode loop wrote it.

    ids, author, logp: [T], prompt first. logp is that of the sampling distribution
    (temperature applied) and 0 where author is not MODEL.
    """

    problem: Problem
    sample: int
    ids: np.ndarray
    author: np.ndarray
    logp: np.ndarray
    calls: tuple[Call, ...]
    stop_reason: StopReason

    @property
    def num_model_tokens(self) -> int:
        return int((self.author == Author.MODEL).sum())

    @property
    def num_prompt_tokens(self) -> int:
        return int((self.author == Author.PROMPT).sum())

    @property
    def num_response_tokens(self) -> int:
        """Model and tool tokens."""
        return len(self.ids) - self.num_prompt_tokens


def author_spans(author: np.ndarray) -> list[tuple[Author, slice]]:
    """Stretches of tokens of one author, in order. author: of each token."""
    edges = np.flatnonzero(np.diff(author, prepend=-1, append=-1)).tolist()
    return [(Author(author[a]), slice(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]


@dataclasses.dataclass(frozen=True)
class Score:
    """A grader's verdict: value is +1 or -1; reason says why (counted in the metrics)."""

    value: float
    reason: str
