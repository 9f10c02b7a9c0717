"""Greedy evaluation on held-out problems."""

import dataclasses
from collections.abc import Sequence

from cir_jax import hosts
from cir_jax.evals.codestats import accuracy_by_task, code_stats
from cir_jax.models.qwen import Params
from cir_jax.records import Problem, Score, Trajectory
from cir_jax.reward.score import Grader
from cir_jax.rollout.engine import Engine, model_turns
from cir_jax.rollout.sampling import GREEDY
from cir_jax.rollout.schedule import RolloutStats
from cir_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One row of the results table, with what it was computed from."""

    summary: dict[str, float]
    by_task: dict[str, float]
    trajectories: list[Trajectory]
    scores: list[Score]
    stats: RolloutStats


def grade(trajectories: Sequence[Trajectory], grader: Grader, tokenizer: Tokenizer) -> list[Score]:
    """Scores of model-written text alone, all graded at the same time."""
    return grader.results(
        [grader.submit(t.problem, model_turns(t, tokenizer)) for t in trajectories]
    )


def evaluate(
    engine: Engine,
    grader: Grader,
    tokenizer: Tokenizer,
    params: Params,
    problems: Sequence[Problem],
    *,
    max_calls: int,
) -> Evaluation:
    """One greedy response per problem. Of several processes each answers and grades its share."""
    groups, stats = engine.rollout(
        params,
        problems,
        samples=1,
        max_calls=max_calls,
        sampling=GREEDY,
        phase="eval",
        step=0,
    )
    own = [group[0] for group in groups]
    hosts.mark("grading the evaluation")
    parts = hosts.gather((own, grade(own, grader, tokenizer), stats))
    trajectories = [t for part, _, _ in parts for t in part]
    scores = [score for _, part, _ in parts for score in part]
    stats = RolloutStats.of_processes([part for _, _, part in parts])
    return Evaluation(
        code_stats(trajectories, scores),
        accuracy_by_task(trajectories, scores),
        trajectories,
        scores,
        stats,
    )
