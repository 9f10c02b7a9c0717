"""Questions put to a model: a part of a benchmark's problems becomes samples with verdicts."""

import dataclasses
from collections.abc import Sequence

from cir_jax.evals.majority import votes_of
from cir_jax.evals.samples import Sample, Setting, sample_of
from cir_jax.evals.suite import grade
from cir_jax.models.qwen import Params
from cir_jax.prompts import prompt_ids
from cir_jax.records import Problem, Score, Trajectory
from cir_jax.reward.answer import last_boxed
from cir_jax.reward.score import Grader
from cir_jax.rollout.engine import Engine, model_turns
from cir_jax.rollout.sampling import Sampling
from cir_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Exam:
    """phase: names the random numbers of its samples (Engine.rollout); of all settings the same.

    left_out: problems whose prompts are too long.
    """

    name: str
    problems: Sequence[Problem]
    samples: int
    sampling: Sampling
    phase: str
    left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Form:
    """How a problem is asked. template: of the prompt; chat: it goes into the chat template."""

    setting: Setting
    template: str
    chat: bool

    def prompt_ids(self, problem: Problem, tokenizer: Tokenizer) -> list[int]:
        return prompt_ids(problem, tokenizer, self.template, self.chat)


def answer(
    engine: Engine,
    grader: Grader,
    tokenizer: Tokenizer,
    params: Params,
    exam: Exam,
    form: Form,
    part: range,
) -> list[Sample]:
    """Samples of a part of the problems, in order; of several processes each has its own share.

    A token depends on the weights, the engine's seed, the exam, the problem's index, the number of
    the sample and the position, not on the parts, and not on the form but for what it asks.
    """
    problems = [exam.problems[i] for i in part]
    groups, stats = engine.rollout(
        params,
        problems,
        samples=exam.samples,
        max_calls=form.setting.max_calls,
        sampling=exam.sampling,
        phase=exam.phase,
        step=0,
        indices=part,
        prompts=[form.prompt_ids(problem, tokenizer) for problem in problems],
    )
    index = {problem.problem_id: i for i, problem in zip(part, problems, strict=True)}
    scores = iter(grade([t for group in groups for t in group], grader, tokenizer))
    samples = []
    for group in groups:
        verdicts = [next(scores) for _ in group]
        votes = _votes(group, verdicts, grader, tokenizer)
        samples += [
            sample_of(
                trajectory,
                score,
                tokenizer,
                index=index[trajectory.problem.problem_id],
                setting=form.setting,
                vote=vote,
                rollout_s=stats.wall_s,
            )
            for trajectory, score, vote in zip(group, verdicts, votes, strict=True)
        ]
    return samples


def _votes(
    group: Sequence[Trajectory], scores: Sequence[Score], grader: Grader, tokenizer: Tokenizer
) -> list[int | None]:
    """Which answers to a problem are equivalent, as the grader sees it."""

    def equal(pairs: list[tuple[str, str]]) -> list[bool]:
        if group[0].problem.verifier != "math":
            return [False] * len(pairs)  # they have no equivalence but being equal
        futures = [
            grader.submit(Problem("", "", "", first, "math"), [f"\\boxed{{{second}}}"])
            for first, second in pairs
        ]
        return [future.result().value > 0 for future in futures]

    answers = [last_boxed(model_turns(t, tokenizer)) for t in group]
    return votes_of(answers, [score.value > 0 for score in scores], equal)
