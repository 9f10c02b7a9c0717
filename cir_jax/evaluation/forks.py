"""Counterfactuals: what a response would have come to, had one of its calls gone otherwise.

At each call of a sample the response is taken up again, from its tokens up to the call, with

- on: the output that it had, and the rest of the budget;
- off: no output, and no programs from there on: the model goes on behind its block;
- corrupted: another output in the place of its own, and the rest of the budget.

The three go on with the same random numbers, which are none of the sample's own.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from cir_jax.evals.exam import Exam
from cir_jax.evals.samples import Branch, Fork, Sample, sample_of
from cir_jax.evals.suite import grade
from cir_jax.models.qwen import Params
from cir_jax.records import Author, Call, ExecResult, Problem, Trajectory
from cir_jax.reward.score import Grader
from cir_jax.rollout import fence
from cir_jax.rollout.engine import Engine, own_share
from cir_jax.sandbox.text import result_text
from cir_jax.tokenizer import Tokenizer

BRANCHES: tuple[Branch, ...] = ("on", "off", "corrupted")

_NUMBER = re.compile(r"[0-9]+")
# What a corrupted output says where there is no number to change.
_NOTHING = "None"
# A fork's random numbers are of (problem, sample, call): more samples and calls than there are.
_SAMPLES, _CALLS = 2**11, 2**5


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A response up to where it is taken up again.

    calls: those that are behind it. max_calls: programs that it may still run.
    """

    problem: Problem
    sample: Sample
    fork: Fork
    ids: np.ndarray
    author: np.ndarray
    logp: np.ndarray
    calls: tuple[Call, ...]
    max_calls: int

    @property
    def num_begun(self) -> int:
        """Tokens of the response."""
        return int((self.author != Author.PROMPT).sum())

    def finished(self, continuation: Trajectory) -> Trajectory:
        """With what came after it, as one response."""
        at = continuation.num_prompt_tokens
        return Trajectory(
            self.problem,
            self.fork.sample,
            continuation.ids,
            np.concatenate([self.author, continuation.author[at:]]),
            np.concatenate([self.logp, continuation.logp[at:]]),
            self.calls + continuation.calls,
            continuation.stop_reason,
        )


def answer_forks(
    engine: Engine,
    grader: Grader,
    tokenizer: Tokenizer,
    params: Params,
    exam: Exam,
    samples: Sequence[Sample],
) -> list[Sample]:
    """All forks of the samples, in order of (sample, call, branch).

    engine: its prompts may be as long as a response.
    """
    by_id = {problem.problem_id: problem for problem in exam.problems}
    begun = [
        _begin(sample, call, branch, by_id[sample.problem_id], engine, tokenizer)
        for sample in samples
        # A last call that filled the response has no output, and nothing after it.
        for call in range(sum(span.author == "tool" for span in sample.spans))
        for branch in BRANCHES
    ]
    begun = [b for b in begun if b.num_begun < engine.cfg.max_response_tokens]
    begun = [b for b in begun if len(b.ids) < engine.max_length]
    if not begun:
        return []
    groups, stats = engine.rollout(
        params,
        [b.problem for b in begun],
        samples=1,
        max_calls=[b.max_calls for b in begun],
        sampling=exam.sampling,
        phase=f"fork/{exam.name}",
        step=0,
        indices=[_place(b) for b in begun],
        prompts=[b.ids.tolist() for b in begun],
        begun=[b.num_begun for b in begun],
    )
    own = [begun[i] for i in own_share(len(begun))]
    whole = [b.finished(group[0]) for b, group in zip(own, groups, strict=True)]
    scores = grade(whole, grader, tokenizer)
    return [
        sample_of(
            trajectory,
            score,
            tokenizer,
            index=b.sample.problem,
            setting=b.sample.setting,
            fork=b.fork,
            rollout_s=stats.wall_s,
        )
        for b, trajectory, score in zip(own, whole, scores, strict=True)
    ]


def _begin(
    sample: Sample,
    call: int,
    branch: Branch,
    problem: Problem,
    engine: Engine,
    tokenizer: Tokenizer,
) -> _Begun:
    whole = sample.trajectory()
    made = sample.calls[call]
    output = [span for span in sample.spans if span.author == "tool"][call]
    calls, left = sample.calls[: call + 1], sample.setting.max_calls - call - 1
    end, written = output.end, []
    if branch != "on":
        end, calls = output.start, sample.calls[:call]
    if branch == "off":
        left = 0
    if branch == "corrupted":
        turn = next(span for span in sample.spans if span.end == output.start)
        boundary = fence.BOUNDARIES[engine.cfg.boundary]
        _, trailing = boundary.find_call(tokenizer.decode(sample.ids[turn.start : turn.end]))
        text = corrupted(result_text(made.result, engine.cfg.result))
        written = tokenizer.encode(boundary.put_back(text, trailing))
        calls += (Call(made.code, ExecResult("ok", text), len(written)),)
    more = np.zeros(len(written))
    return _Begun(
        problem=problem,
        sample=sample,
        fork=Fork(sample.sample, call, branch),
        ids=np.concatenate([sample.ids[:end], np.asarray(written, np.int32)]),
        author=np.concatenate([whole.author[:end], more + Author.TOOL]).astype(np.int8),
        logp=np.concatenate([sample.logp[:end], more]).astype(np.float32),
        calls=calls,
        max_calls=left,
    )


def corrupted(text: str) -> str:
    """Another output of the same look: the last digit of its last number is one more (9: 0).

    Of a text without digits, "None"; of that, "0".
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return "0" if text == _NOTHING else _NOTHING
    at = numbers[-1].end() - 1
    return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]


def _place(begun: _Begun) -> int:
    """Numbers the random numbers: those of a call's three branches are the same."""
    fork = begun.fork
    return (begun.sample.problem * _SAMPLES + fork.sample) * _CALLS + fork.call
