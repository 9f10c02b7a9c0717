"""R1-CI's curriculum: groups by improvement potential, and which problems a step then sees."""

import collections
import json
from fractions import Fraction
from pathlib import Path

import pytest

from cir_jax import cli
from cir_jax import config as configs
from cir_jax.config import ConfigError
from cir_jax.data import curriculum, pipeline, sources, tasks
from cir_jax.data.curriculum import Answers, group_of, potential

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("correct", "expected", "group"),
    [
        # Of 20 answers: 4 * c/20 * (20 - c)/20 = c (20 - c) / 100.
        (10, "1", 0),
        (4, "0.64", 0),  # on the boundary, from both sides
        (16, "0.64", 0),
        (17, "0.51", 1),
        (3, "0.51", 1),
        (2, "0.36", 2),
        (18, "0.36", 2),
        (1, "0.19", 3),
        (0, "0", 3),
        (20, "0", 3),
    ],
)
def test_groups(correct, expected, group):
    assert potential(Answers(20, correct)) == Fraction(expected)
    assert group_of(Answers(20, correct)) == group


@pytest.mark.parametrize(("num", "correct", "group"), [(25, 3, 2), (5, 1, 0), (50, 43, 1)])
def test_groups_of_other_counts(num, correct, group):
    # 4 * 3 * 22 / 625 = 0.4224; 4 * 1 * 4 / 25 = 0.64; 4 * 43 * 7 / 2500 = 0.4816.
    assert group_of(Answers(num, correct)) == group


def counts(path, rows):
    """rows: (problem, answers, correct)."""
    lines = [
        {"problem_id": name, "task": name.split("/")[0], "num_answers": n, "num_correct": c}
        for name, n, c in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# By problem, of 20 answers in all: 10 right (1), 3 (.51), 18 (.36), 0 (0), 16 (.64).
ROWS = [
    ("sum/rl/0", 20, 10),
    ("sum/rl/1", 20, 3),
    ("lcm/rl/0", 20, 18),
    ("lcm/rl/1", 20, 0),
    ("after/rl/0", 20, 16),
]


def written(tmp_path, *arguments, rows=ROWS):
    out = tmp_path / "curriculum.json"
    answers = counts(tmp_path / "a.answers.jsonl", rows)
    assert cli.main(["curriculum", str(answers), "--out", str(out), *arguments]) == 0
    return out


def test_stages_are_cumulative_and_150_steps_long(tmp_path, capsys):
    plan = curriculum.read(written(tmp_path))
    stages = [
        (["sum/rl/0", "after/rl/0"], range(0, 150)),
        (["sum/rl/0", "after/rl/0", "sum/rl/1"], range(150, 300)),
        (["sum/rl/0", "after/rl/0", "sum/rl/1", "lcm/rl/0"], range(300, 450)),
        ([name for name, _, _ in ROWS], [450, 599, 600, 10_000]),
    ]
    for number, (names, steps) in enumerate(stages):
        for step in (steps[0], steps[-1]):
            stage, drawn = plan.at(step)
            assert stage == number and sorted(drawn) == sorted(names)
    assert "from step 150: 1 more, 3 problems in all" in capsys.readouterr().out


def test_answers_of_several_modes_are_added(tmp_path):
    """1 of 5 in one mode and 7 of 15 in another are 8 of 20: 4 * 8 * 12 / 400 = 0.96."""
    paths = [
        counts(tmp_path / "text.jsonl", [("sum/rl/0", 5, 1)]),
        counts(tmp_path / "code.jsonl", [("sum/rl/0", 15, 7), ("sum/rl/1", 5, 5)]),
    ]
    answers = curriculum.read_answers(paths, "problem")
    assert answers == {"sum/rl/0": Answers(20, 8), "sum/rl/1": Answers(5, 5)}
    # 13 of 25: 4 * 13 * 12 / 625 = 0.9984.
    assert curriculum.read_answers(paths, "task") == {"sum": Answers(25, 13)}


def test_by_task(tmp_path):
    """sum 13 of 40 (4 * 13 * 27 / 1600 = .8775), lcm 18 of 40 (.99), after 16 of 20 (.64)."""
    plan = curriculum.read(written(tmp_path, "--by", "task", "--stage-steps", "10"))
    assert plan.by == "task"
    assert [(s.from_step, s.names) for s in plan.stages] == [
        (0, ("sum", "lcm", "after")),
        (10, ()),
        (20, ()),
        (30, ()),
    ]


def test_groups_with_nothing_before_them_have_no_stage(tmp_path):
    rows = [("sum/rl/0", 20, 2), ("sum/rl/1", 20, 20)]  # .36 and 0: the third and fourth group
    plan = curriculum.read(written(tmp_path, rows=rows))
    assert [(s.from_step, s.names) for s in plan.stages] == [
        (0, ("sum/rl/0",)),
        (150, ("sum/rl/1",)),
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"task": "sum", "num_answers": 1, "num_correct": 0}, "line 1: problem_id: missing"),
        ({"problem_id": "a", "num_answers": 0, "num_correct": 0}, "num_answers=0: must be at lea"),
        ({"problem_id": "a", "num_answers": 2, "num_correct": 3}, "num_correct=3: must be from 0"),
        ({"problem_id": "a", "num_answers": "2", "num_correct": 1}, "must be a whole number"),
    ],
)
def test_bad_counts(tmp_path, capsys, row, words):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert cli.main(["curriculum", str(path), "--out", str(tmp_path / "c.json")]) == 2
    assert words in capsys.readouterr().err


# --- what RL draws


def load(path, *overrides):
    keys = ("rollout.prompts_per_step=4", "rl.minibatch_prompts=4", f"data.curriculum={path}")
    return configs.load(ROOT / "configs/quickstart.toml", (*keys, *overrides))


def rl_problems(cfg):
    found = sources.train_sources(cfg.data, lambda problem: True, lambda text: None)
    return pipeline.rl_problems(cfg, found)


def names(problems):
    return [p.problem_id for p in problems]


def test_steps_draw_from_their_stage_alone(tmp_path):
    """Every problem of the stage equally often, and the same whatever was asked for before."""
    path = written(tmp_path, "--stage-steps", "3")
    drawn = rl_problems(load(path))
    plan = curriculum.read(path)
    for step in range(12):
        assert set(names(drawn(step))) <= set(plan.at(step)[1])
    # Stage 0 has 2 problems: in 3 steps of 4 draws each comes up 6 times.
    first = collections.Counter(name for step in range(3) for name in names(drawn(step)))
    assert first == {"sum/rl/0": 6, "after/rl/0": 6}
    # Stage 1 has 3, in 12 draws: 4 times each.
    second = collections.Counter(name for step in range(3, 6) for name in names(drawn(step)))
    assert set(second.values()) == {4} and len(second) == 3
    again = rl_problems(load(path))
    assert [names(again(step)) for step in (11, 3, 0)] == [names(drawn(s)) for s in (11, 3, 0)]
    other = rl_problems(load(path, "seed=1"))
    assert [names(other(s)) for s in range(12)] != [names(drawn(s)) for s in range(12)]


def test_rounds_of_a_step_belong_to_its_stage(tmp_path):
    """With one refill, rounds 0 to 5 are of steps 0 to 2."""
    path = written(tmp_path, "--stage-steps", "3")
    drawn = rl_problems(load(path, "rollout.refill_rounds=1"))
    early = {name for number in range(6) for name in names(drawn(number))}
    assert early == {"sum/rl/0", "after/rl/0"}
    assert "sum/rl/1" in {name for number in (6, 7) for name in names(drawn(number))}


def test_problems_are_those_that_were_answered(tmp_path):
    path = written(tmp_path)
    for problem in rl_problems(load(path))(0):
        task, split, index = problem.problem_id.split("/")
        assert problem == tasks.problem(task, split, int(index))


def test_tasks_join_with_draws_of_their_own(tmp_path):
    """sum (p = .5: 1) from step 0; lcm (p = 1: 0) joins last, two empty groups later."""
    rows = [("sum/rl/0", 20, 10), ("lcm/rl/0", 20, 20)]
    path = written(tmp_path, "--by", "task", "--stage-steps", "2", rows=rows)
    drawn = rl_problems(load(path))
    stages = [[p for step in steps for p in drawn(step)] for steps in (range(0, 2), range(6, 8))]
    assert {p.task for p in stages[0]} == {"sum"} and {p.task for p in stages[1]} == {"sum", "lcm"}
    all_ids = [p.problem_id for stage in stages for p in stage]
    assert len(set(all_ids)) == len(all_ids)


@pytest.mark.parametrize("by", ["problem", "task"])
def test_problems_of_files(tmp_path, by):
    """Of three rows, two of the task y; the first alone is in the first group."""
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"{i}?", "answer": "1", "data_source": "xyy"[i]} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names_of = {"problem": [f"{path}/0", f"{path}/1"], "task": ["x", "y"]}[by]
    stages = [{"from_step": n, "names": [name]} for n, name in enumerate(names_of)]
    plan = tmp_path / "curriculum.json"
    plan.write_text(json.dumps({"by": by, "stages": stages}))
    keys = ("data.tasks=[]", f"data.files={[str(path)]}", f"data.eval_files={[str(path)]}")
    cfg = load(plan, *keys, "data.columns.answer=answer")
    drawn = rl_problems(cfg)
    assert set(names(drawn(0))) == {f"{path}/0"}
    count = {"problem": 2, "task": 3}[by]
    assert set(names(drawn(1)) + names(drawn(2))) == {f"{path}/{i}" for i in range(count)}
    stages[1]["names"] = ["z"]
    plan.write_text(json.dumps({"by": by, "stages": stages}))
    with pytest.raises(ConfigError, match=f"'z' is no {by} of data.files"):
        rl_problems(cfg)


def test_without_a_curriculum_all_tasks_are_drawn(tmp_path):
    cfg = configs.load(ROOT / "configs/quickstart.toml")
    dataset = pipeline.train_problems(sources.of_tasks(cfg.data.tasks, "rl"), cfg.seed)
    assert rl_problems(cfg)(2) == pipeline.step_problems(dataset, 2, 20)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ([], "must hold an object"),
        ({"by": "group", "stages": []}, "by='group': must be problem or task"),
        ({"by": "task", "stages": []}, "stages="),
        ({"by": "task", "stages": [{"from_step": 5, "names": ["sum"]}]}, "begins at 0"),
        ({"by": "task", "stages": [{"from_step": 0, "names": []}]}, "none empty first"),
        ({"by": "task", "stages": [{"from_step": 0, "names": [3]}]}, "stages[0].names"),
        ({"by": "task", "stages": [{"from_step": 0}]}, "stages[0].names: missing"),
        ({"by": "task", "stages": [{"from_step": 0, "names": ["sam"]}]}, "'sam' is not of data.ta"),
        ({"by": "problem", "stages": [{"from_step": 0, "names": ["sum/3"]}]}, "TASK/SPLIT/NUMBER"),
    ],
)
def test_bad_curriculum(tmp_path, tree, words):
    path = tmp_path / "curriculum.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as caught:
        rl_problems(load(path))
    assert str(caught.value).startswith("data.curriculum=") and words in str(caught.value)


def test_curriculum_that_is_not_there():
    with pytest.raises(ConfigError, match="data.curriculum='nowhere.json': no such file"):
        load("nowhere.json")
