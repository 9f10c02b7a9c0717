"""What a step is made of: shaped rewards, dynamic sampling, and a budget that rises."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cir_jax import config as configs
from cir_jax.config import RewardConfig
from cir_jax.metrics import Timer
from cir_jax.records import Author, Call, ExecResult, Problem, Score, Trajectory
from cir_jax.reward.shaping import keeps_format, overlong, shaping
from cir_jax.rollout.schedule import RolloutStats
from cir_jax.train import experience
from cir_jax.train.loop import Run

PROBLEM = Problem("p", "sum", "?", "0", "math")


def load(*overrides):
    return configs.load(Path(__file__).parent.parent / "configs/quickstart.toml", overrides)


def trajectory(length=3, statuses=(), stop_reason="eos", problem=PROBLEM, sample=0):
    """A prompt of two tokens, and a response of a length."""
    author = np.array([Author.PROMPT] * 2 + [Author.MODEL] * length, np.int8)
    calls = tuple(Call("1", ExecResult(status), 1) for status in statuses)
    ids = np.zeros(len(author), np.int32)
    logp = np.zeros(len(author), np.float32)
    return Trajectory(problem, sample, ids, author, logp, calls, stop_reason)


# --- shaping


@pytest.mark.parametrize(
    ("length", "expected"),
    # Of 100 tokens the last 20 cost up to 0.5: halfway 0.25.
    [(1, 0.0), (80, 0.0), (81, -0.025), (90, -0.25), (100, -0.5)],
)
def test_overlong_responses_lose_reward_bit_by_bit(length, expected):
    assert overlong(length, 100, 20, 0.5) == pytest.approx(expected)
    assert overlong(length, 100, 0, 0.5) == 0.0


def test_nothing_is_shaped_by_default():
    worst = trajectory(100, ("error",) * 9, "response_length")
    assert shaping(RewardConfig(), worst, ["```python\n1"] * 10, 100) == 0.0


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((), 0.0), (("ok",), 0.0), (("ok", "error"), -0.5), (("timeout", "timeout"), -0.5)],
)
def test_failed_code_costs_once(statuses, expected):
    cfg = RewardConfig(failed_code_penalty=0.5)
    assert shaping(cfg, trajectory(3, statuses), ["a"], 100) == expected


@pytest.mark.parametrize(
    ("statuses", "last", "stop_reason", "expected"),
    [
        ((), "The answer is 3.", "eos", 0),
        (("ok",), "The answer is 3.", "eos", 1),
        (("error",), "The answer is 3.", "eos", 1),
        (("ok",), "The answer", "response_length", -1),
        (("ok",), "```python\nprint(1)", "eos", -1),
        ((), "```python\nprint(1)", "response_length", -1),
    ],
)
def test_format_of_intermediate_replies(statuses, last, stop_reason, expected):
    turns = ["```python\n1\n```"] * len(statuses) + [last]
    row = trajectory(3, statuses, stop_reason)
    assert keeps_format(row, turns) == expected
    assert shaping(RewardConfig(format_reward=0.1), row, turns, 100) == 0.1 * expected


@pytest.mark.parametrize(("turns", "expected"), [(6, 0.0), (7, -0.1)])
def test_more_than_six_turns_cost(turns, expected):
    cfg = RewardConfig(turn_penalty=0.1)
    assert shaping(cfg, trajectory(), ["a"] * turns, 100) == expected


# --- dynamic sampling


class FakeEngine:
    """Groups of two; the answers to problem n are right as `right` says."""

    def __init__(self):
        self.steps = []

    def rollout(self, params, problems, *, samples, max_calls, sampling, phase, step):
        self.steps.append(step)
        groups = [[trajectory(problem=p, sample=g) for g in range(samples)] for p in problems]
        return groups, RolloutStats(wall_s=1.0, num_model_tokens=10)


def gathered(monkeypatch, right, *overrides, step=0):
    """right: of each problem, in the order they come up, the samples that are right."""

    def problems_of(number):
        return [dataclasses.replace(PROBLEM, problem_id=str(number * 3 + i)) for i in range(3)]

    def grade(rows, grader, tokenizer):
        return [
            Score(1.0 if t.sample in right[int(t.problem.problem_id)] else -1.0, "") for t in rows
        ]

    monkeypatch.setattr(experience, "grade", grade)
    monkeypatch.setattr(experience, "model_turns", lambda *_: ["a"])
    cfg = load(
        "rollout.prompts_per_step=3", "rollout.samples_per_prompt=2", "rl.minibatch_prompts=3",
        *overrides,
    )  # fmt: skip
    engine = FakeEngine()
    new = experience.gather(
        cfg, engine, None, None, None, problems_of, step=step, max_calls=1, timer=Timer()
    )
    return new, engine, [group[0].problem.problem_id for group in new.groups]


def test_without_refills_all_groups_are_trained_on(monkeypatch):
    new, engine, names = gathered(monkeypatch, {0: (), 1: (0,), 2: (0, 1)})
    assert names == ["0", "1", "2"] and engine.steps == [0] and new.figures == {}
    assert new.rewards_PG.tolist() == [[-1, -1], [1, -1], [1, 1]]
    assert new.rewards == new.rewards_PG.ravel().tolist()


def test_groups_of_equal_rewards_are_replaced(monkeypatch):
    right = {0: (), 1: (0,), 2: (0, 1), 3: (1,), 4: (0, 1), 5: (0,), 6: (0,), 7: (0,), 8: (0,)}
    new, engine, names = gathered(monkeypatch, right, "rollout.refill_rounds=2")
    assert names == ["1", "3", "5"] and engine.steps == [0, 1]
    assert new.rewards_PG.tolist() == [[1, -1], [-1, 1], [1, -1]]
    # What was sampled is counted whole: six groups, three of them equal.
    assert len(new.trajectories) == len(new.scores) == len(new.rewards) == 12
    assert new.figures == {"rounds": 2, "equal_groups_share": 0.5}
    assert new.stats.num_model_tokens == 20 and new.stats.wall_s == 2.0


def test_refills_are_bounded_and_equal_groups_fill_up(monkeypatch):
    right = dict.fromkeys(range(12), ()) | {4: (0,)}
    new, engine, names = gathered(monkeypatch, right, "rollout.refill_rounds=1")
    assert names == ["4", "0", "1"] and engine.steps == [0, 1]
    assert new.rewards_PG.tolist() == [[1, -1], [-1, -1], [-1, -1]]


def test_each_step_has_problems_of_its_own(monkeypatch):
    right = dict.fromkeys(range(12), (0,))
    _, engine, names = gathered(monkeypatch, right, "rollout.refill_rounds=1", step=1)
    assert names == ["6", "7", "8"] and engine.steps == [2]


def test_equal_is_said_of_shaped_rewards(monkeypatch):
    """A failure that costs makes a group of two wrong answers one that teaches."""
    monkeypatch.setattr(
        experience, "shaping", lambda cfg, t, turns, longest: -0.5 * (t.sample == 1)
    )
    new, engine, _ = gathered(monkeypatch, {0: (), 1: (), 2: ()}, "rollout.refill_rounds=1")
    assert engine.steps == [0] and new.rewards_PG.tolist() == [[-1, -1.5]] * 3


# --- the call budget


def budgets(shares, *overrides):
    """The budget of each step, given the share of responses that used all of it."""
    run = SimpleNamespace(cfg=load(*overrides), extra_calls=0)
    out = []
    for step, share in enumerate(shares):
        out.append(Run.max_calls(run, step))
        Run.raise_calls(run, share, out[-1])
    return out


def test_the_budget_is_the_schedules():
    assert budgets([1.0] * 4, "rollout.max_calls=[[0, 1], [2, 3]]") == [1, 1, 3, 3]


def test_the_budget_rises_where_it_is_used_up():
    keys = ("rollout.max_calls=1", "rollout.raise_calls_above=0.5", "rollout.calls_limit=3")
    assert budgets([0.5, 0.6, 0.2, 0.9, 1.0, 1.0], *keys) == [1, 1, 2, 2, 3, 3]
    # A schedule beyond the limit stays as it is.
    assert budgets([1.0] * 2, "rollout.max_calls=5", *keys[1:]) == [5, 5]
    assert configs.eval_max_calls(load(*keys)) == 3
