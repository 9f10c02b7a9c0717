"""A row on the host: its tokens with author and log-probability, its calls, and where it stands."""

import concurrent.futures
import dataclasses
import enum

import numpy as np

from cir_jax.records import Author, Call, ExecResult, Problem, StopReason, Trajectory
from cir_jax.rollout.sampling import Sampling


class State(enum.Enum):
    QUEUED = enum.auto()
    RUNNING = enum.auto()
    """On the device, or with text on its way there."""
    CALLING = enum.auto()
    """Its program runs."""
    ENDING = enum.auto()
    """Given up; what it has written until then may still come in."""
    DONE = enum.auto()


@dataclasses.dataclass(eq=False)
class Row:
    """One response on its way.

    index: among all rows of all processes; group: rows with equal prompts.
    limit: tokens at which it ends. recorded: a trajectory to follow instead of sampling.
    since: the launch that its latest text went in with. turn: where the current model turn begins.
    outgoing: tokens that do not fit into one launch.
    """

    index: int
    group: int
    problem: Problem
    sample: int
    prompt_ids: list[int]
    key: np.ndarray
    sampling: Sampling
    max_calls: int
    limit: int
    limited_by: StopReason
    recorded: Trajectory | None = None
    state: State = State.QUEUED
    since: int = 0
    deadline: float = float("inf")
    stop: StopReason | None = None
    turn: int = 0
    length: int = 0
    calls: list[Call] = dataclasses.field(default_factory=list)
    pending: tuple[str, str, concurrent.futures.Future[ExecResult]] | None = None
    outgoing: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.ids = np.zeros(self.limit, np.int32)
        self.author = np.zeros(self.limit, np.int8)
        self.logp = np.zeros(self.limit, np.float32)

    def write(self, ids, author: Author, logp=0.0) -> int:
        """Appends tokens, up to the limit; returns how many there was room for."""
        end = min(self.length + len(ids), self.limit)
        at = slice(self.length, end)
        count, self.length = end - self.length, end
        self.ids[at] = ids[:count]
        self.author[at] = author
        self.logp[at] = logp if np.ndim(logp) == 0 else logp[:count]
        return count

    def trajectory(self) -> Trajectory:
        n = self.length
        return Trajectory(
            self.problem,
            self.sample,
            self.ids[:n].copy(),
            self.author[:n].copy(),
            self.logp[:n].copy(),
            tuple(self.calls),
            self.stop,
        )
