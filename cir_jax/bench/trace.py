"""A long-tailed trace: how long model turns and programs take, and trajectories that take as long.

Lengths of turns and latencies of programs are lognormal, given by their median and 99th
percentile; a response makes 0 to 4 calls, each number equally likely.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from cir_jax.config import ResultConfig
from cir_jax.records import Author, Call, ExecResult, Problem, Trajectory
from cir_jax.rollout import fence
from cir_jax.sandbox.text import result_text
from cir_jax.tokenizer import Tokenizer

MAX_CALLS = 4
PROMPT_TOKENS = 64
_CODE = "print(6 * 7)\n"
_OUTPUT = "42\n"
_Z99 = statistics.NormalDist().inv_cdf(0.99)


@dataclasses.dataclass(frozen=True)
class Lognormal:
    """By its median and its 99th percentile. Raises ValueError if these are the wrong way round."""

    p50: float
    p99: float

    def __post_init__(self):
        if not 0 < self.p50 <= self.p99:
            raise ValueError(f"p50={self.p50:g}, p99={self.p99:g}: must be above 0, and rising")

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return self.p50 * np.exp(math.log(self.p99 / self.p50) / _Z99 * rng.normal(size=size))


@dataclasses.dataclass(frozen=True)
class TraceRow:
    """turns: tokens of the model's turns; latencies_s: of the program after each but the last."""

    turns: tuple[int, ...]
    latencies_s: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a trace is drawn from.

    max_response: model and tool tokens per response. A turn that leaves no room for its program's
    output and an answer is the last; longer ones than there is room for are cut.
    timeout_s: programs that would take longer are ended then.
    """

    turn: Lognormal
    latency_s: Lognormal
    max_response: int
    timeout_s: float

    def draw(self, num_rows: int, seed: int, *, least: int, output: int) -> list[TraceRow]:
        """The same rows for the same arguments; the first of them whatever num_rows is.

        least: tokens of the shortest turn; output: of what is put back after a call.
        Raises ValueError if a response has no room for the shortest turn.
        """
        if self.max_response < least:
            raise ValueError(f"max_response={self.max_response}: must be at least {least}")
        rows = []
        for index in range(num_rows):
            rng = np.random.default_rng((seed, index))
            num_calls = int(rng.integers(MAX_CALLS + 1))
            drawn = np.ceil(self.turn.draw(rng, num_calls + 1)).astype(int)
            latencies = np.minimum(self.latency_s.draw(rng, num_calls), self.timeout_s)
            turns: list[int] = []
            room = self.max_response
            for length in drawn.tolist():
                turns.append(min(max(length, least), room))
                room -= turns[-1] + output
                if room < least:
                    break
            rows.append(TraceRow(tuple(turns), tuple(latencies[: len(turns) - 1].tolist())))
        return rows


class Writer:
    """Makes trajectories of trace rows: words, Python blocks, outputs, and end-of-text tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.boundary = fence.BOUNDARIES["fence"]
        self._eos_id = tokenizer.eos_id
        self._words = np.array(
            [
                i
                for i, token in enumerate(tokenizer.token_bytes)
                if token.isascii() and token.decode().strip().isalpha()
            ]
        )
        self._block = tokenizer.encode(f"\n```python\n{_CODE}```")
        result = ExecResult("ok", stdout=_OUTPUT)
        self.output = tokenizer.encode(
            self.boundary.put_back(result_text(result, ResultConfig()), "")
        )
        # One word at least before a block.
        self.least = len(self._block) + 1

    def response(self, row: TraceRow, index: int, seed: int) -> Trajectory:
        """The whole response, with its calls."""
        prompt, *turns = self._texts(row, index, seed)
        pieces = [(prompt, Author.PROMPT)]
        for turn in turns:
            pieces += [(turn, Author.MODEL), (self.output, Author.TOOL)]
        calls = tuple(
            Call(_CODE, ExecResult("ok", stdout=_OUTPUT, wall_s=latency_s), len(self.output))
            for latency_s in row.latencies_s
        )
        return _trajectory(index, pieces[:-1], calls)

    def overrun(self, row: TraceRow, index: int, seed: int, turn: int) -> Trajectory:
        """One turn, sampled on from its block to the end of the response's model text.

        All text before it, turns and outputs, is its prompt; it makes no call.
        """
        before, *turns = self._texts(row, index, seed)
        for text in turns[:turn]:
            before = before + text + self.output
        sampled = [token for text in turns[turn:] for token in text]
        return _trajectory(index, [(before, Author.PROMPT), (sampled, Author.MODEL)], ())

    def _texts(self, row: TraceRow, index: int, seed: int) -> list[list[int]]:
        """The prompt and the model's turns."""
        rng = np.random.default_rng((seed, index))
        ends = [self._block] * len(row.latencies_s) + [[self._eos_id]]
        lengths = [length - len(end) for length, end in zip(row.turns, ends, strict=True)]
        texts = [rng.choice(self._words, length).tolist() for length in [PROMPT_TOKENS, *lengths]]
        return [text + end for text, end in zip(texts, [[], *ends], strict=True)]


def _trajectory(
    index: int, pieces: Sequence[tuple[Sequence[int], Author]], calls: tuple[Call, ...]
) -> Trajectory:
    ids = np.concatenate([np.array(ids, np.int32) for ids, _ in pieces])
    author = np.repeat(
        np.array([author for _, author in pieces], np.int8), [len(ids) for ids, _ in pieces]
    )
    return Trajectory(
        Problem(f"trace-{index}", "trace", "", "", "math"),
        sample=0,
        ids=ids,
        author=author,
        logp=np.zeros(len(ids), np.float32),
        calls=calls,
        stop_reason="eos",
    )
