"""A step's experience: rollouts, rewards, and which groups are trained on."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from cir_jax import hosts
from cir_jax.config import Config
from cir_jax.evals.suite import grade
from cir_jax.metrics import Timer
from cir_jax.models.qwen import Params
from cir_jax.records import Problem, Score, Trajectory
from cir_jax.reward.score import Grader
from cir_jax.reward.shaping import shaping
from cir_jax.rollout.engine import Engine, model_turns
from cir_jax.rollout.sampling import Sampling
from cir_jax.rollout.schedule import RolloutStats
from cir_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Experience:
    """groups, rewards_PG: what is trained on. trajectories, scores, rewards: all that was sampled.

    figures: of dynamic sampling, if it is on.
    """

    groups: list[list[Trajectory]]
    rewards_PG: Float[np.ndarray, "P G"]
    trajectories: list[Trajectory]
    scores: list[Score]
    rewards: list[float]
    stats: RolloutStats
    figures: dict[str, float]


def gather(
    cfg: Config,
    engine: Engine,
    grader: Grader,
    tokenizer: Tokenizer,
    params: Params,
    problems_of: Callable[[int], Sequence[Problem]],
    *,
    step: int,
    max_calls: int,
    timer: Timer,
) -> Experience:
    """Samples and grades a step's groups; with rollout.refill_rounds, until enough of them teach.

    A group of equal rewards teaches nothing, and is trained on only where too few others were
    found. Source: DAPO's dynamic sampling, arXiv:2503.14476, section 3.2.

    Of several processes each samples and grades its share of a round, and all get all of it.

    problems_of: the problems of a round, by its number: step * rounds + round within the step.
    """
    rollout = cfg.rollout
    P, G = rollout.prompts_per_step, rollout.samples_per_prompt
    rounds = rollout.refill_rounds + 1
    teaching: list[tuple[list[Trajectory], list[float]]] = []
    equal: list[tuple[list[Trajectory], list[float]]] = []
    trajectories: list[Trajectory] = []
    scores: list[Score] = []
    rewards: list[float] = []
    all_stats = []
    for number in range(step * rounds, (step + 1) * rounds):
        with timer.stage("rollout_s"):
            groups, stats = engine.rollout(
                params,
                problems_of(number),
                samples=G,
                max_calls=max_calls,
                sampling=Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p),
                phase="rl",
                step=number,
            )
        own = [t for group in groups for t in group]
        with timer.stage("reward_s"):
            hosts.mark("grading")
            own_scores = grade(own, grader, tokenizer)
            own_rewards = [
                s.value
                + shaping(cfg.reward, t, model_turns(t, tokenizer), rollout.max_response_tokens)
                for t, s in zip(own, own_scores, strict=True)
            ]
            parts = hosts.gather((own, own_scores, own_rewards, stats))
        new, new_scores, new_rewards = (
            [x for part in parts for x in part[field]] for field in range(3)
        )
        groups = [new[i : i + G] for i in range(0, len(new), G)]
        for p, group in enumerate(groups):
            own = new_rewards[p * G : (p + 1) * G]
            (equal if rounds > 1 and len(set(own)) == 1 else teaching).append((group, own))
        trajectories += new
        scores += new_scores
        rewards += new_rewards
        all_stats.append(RolloutStats.of_processes([part[3] for part in parts]))
        if len(teaching) >= P:
            break
    chosen = (teaching + equal)[:P]
    figures = {"rounds": len(all_stats), "equal_groups_share": len(equal) / (len(all_stats) * P)}
    return Experience(
        [group for group, _ in chosen],
        np.array([own for _, own in chosen], np.float32),
        trajectories,
        scores,
        rewards,
        RolloutStats(*map(sum, zip(*map(dataclasses.astuple, all_stats), strict=True))),
        figures if rounds > 1 else {},
    )
