"""Problems: pure, split without overlap, right; demonstrations do what they show."""

import hashlib
import itertools
import math
import os
import random
import re
import subprocess
import sys

import pytest

from cir_jax.config import ConfigError, DataConfig, ResultConfig, RewardConfig, RolloutConfig
from cir_jax.data import audit, gym, pipeline, sources, tasks
from cir_jax.data.demonstrations import check_demonstrated, demonstration, guess, programs
from cir_jax.data.symbench import MAKERS
from cir_jax.data.tasks import TASKS, number_words, problem, split_of
from cir_jax.records import Author, ExecResult
from cir_jax.reward.gym import gym_verdict
from cir_jax.reward.packing import pack
from cir_jax.reward.score import Grader
from cir_jax.reward.verifiers import VERIFIERS
from cir_jax.rollout.fence import BOUNDARIES
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.pool import Sandbox
from cir_jax.sandbox.text import result_text
from cir_jax.train.sft import segments

SPLITS = ("sft", "rl", "eval")
NAMES = tuple(TASKS)
each_task = pytest.mark.parametrize("name", NAMES)


# --- problems


@each_task
def test_any_order_gives_the_same_problems(name):
    keys = [(split, i) for split in SPLITS for i in (0, 1, 5, 2**20 - 1)]
    first = [problem(name, *key) for key in keys]
    assert first == [problem(name, *key) for key in reversed(keys)][::-1]
    assert len({p.problem_id for p in first}) == len(keys)
    assert all(p.task == name and p.needs_code == TASKS[name].needs_code for p in first)


def digest():
    """A hash over problems and demonstrations of every task, and over the pipeline's order."""
    parts = [problem(name, split, 3) for name in NAMES for split in SPLITS]
    parts += [demonstration(name, 3, text_share=0.5, failed_share=0.5) for name in NAMES]
    dataset = pipeline.train_problems(sources.of_tasks(NAMES, "rl"), seed=1)
    parts += [p.problem_id for p in pipeline.step_problems(dataset, 2, 20)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def test_another_process_gives_the_same_problems():
    code = "from tests.test_tasks import digest; print(digest())"
    env = os.environ | {"PYTHONHASHSEED": "1"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, check=True
    )
    assert done.stdout.strip() == digest()


@each_task
def test_splits_share_no_question(name):
    questions = {split: {problem(name, split, i).question for i in range(100)} for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not questions[a] & questions[b]
    for split in SPLITS:
        assert {split_of(q) for q in questions[split]} == {split}
        assert len(questions[split]) > 60  # draws repeat where a task has few questions


def test_shares_of_the_splits():
    drawn = [split_of(f"question {i}") for i in range(4000)]
    # Standard deviations of the shares are at most sqrt(0.45 * 0.55 / 4000) = 0.008.
    for split, share in {"sft": 0.45, "rl": 0.45, "eval": 0.1}.items():
        assert abs(drawn.count(split) / 4000 - share) < 0.03


def number_of(words):
    """The number that English words say."""
    units = "zero one two three four five six seven eight nine ten eleven twelve thirteen"
    units = (units + " fourteen fifteen sixteen seventeen eighteen nineteen").split()
    tens = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
    total = part = 0
    for word in words.split():
        if word in units:
            part += units.index(word)
        elif word in tens:
            part += 10 * tens.index(word)
        elif word == "hundred":
            part *= 100
        else:
            assert word == "thousand"
            total, part = total + 1000 * part, 0
    return total + part


def numbers(question):
    return [int(n) for n in re.findall(r"\d+", question)]


def expression(question):
    """The value of the arithmetic after the colon, term by term."""
    terms = re.findall(r"([+-]?)\s*(\d+)", question.split(":")[1])
    return sum(-int(n) if sign == "-" else int(n) for sign, n in terms)


SOLUTIONS = {
    "sum": expression,
    "chain": expression,
    "product": lambda q: math.prod(numbers(q)),
    "lcm": lambda q: next(n for n in itertools.count(1) if not any(n % k for k in numbers(q))),
    "bits": lambda q: f"{numbers(q)[-1]:b}".count("1"),
    "primes": lambda q: sum(
        n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))
        for n in range(numbers(q)[0], numbers(q)[1] + 1)
    ),
    "larger": lambda q: max(
        map(number_of, re.fullmatch(r"Which is larger, (.*) or (.*)\?", q).groups())
    ),
    "spelled": lambda q: number_of(re.fullmatch(r"Write (.*) in digits\.", q).group(1)),
    "after": lambda q: numbers(q)[0] + 1,
    "times": lambda q: math.prod(
        map(number_of, re.fullmatch(r"A box holds (.*) pens\. .* do (.*) boxes hold\?", q).groups())
    ),
}


@each_task
def test_answers_are_right(name):
    for split, i in itertools.product(SPLITS, range(25)):
        p = problem(name, split, i)
        assert p.answer == str(SOLUTIONS[name](p.question)), p.question


def test_number_words():
    assert number_words(0) == "zero"
    assert number_words(7015) == "seven thousand fifteen"
    assert number_words(340) == "three hundred forty"
    assert all(number_of(number_words(n)) == n for n in range(10_000))


def test_unknown_task_names_the_nearest():
    tasks.check_names(NAMES)
    with pytest.raises(ConfigError, match=r"data\.tasks.*'prime'.*nearest: primes"):
        tasks.check_names(["sum", "prime"])
    with pytest.raises(ConfigError, match=f"'zzz'.*{', '.join(NAMES)}"):
        tasks.check_names(["zzz"])


# --- the pipeline


@pytest.mark.parametrize("names", [NAMES, ("sum",), ("bits", "sum", "times")])
def test_train_problems_in_any_order(names):
    dataset = pipeline.train_problems(sources.of_tasks(names, "rl"), seed=3)
    order = list(range(40)) + [10_000]
    in_order = {i: dataset[i] for i in order}
    random.Random(0).shuffle(order)
    again = pipeline.train_problems(sources.of_tasks(names, "rl"), seed=3)
    assert all(again[i] == in_order[i] for i in order)
    assert all(split_of(p.question) == "rl" for p in in_order.values())


def test_steps_are_slices():
    dataset = pipeline.train_problems(sources.of_tasks(NAMES, "rl"), seed=0)
    steps = [pipeline.step_problems(dataset, step, 6) for step in (0, 1, 2)]
    assert sum(steps, []) == [dataset[i] for i in range(18)]


def test_tasks_take_turns():
    dataset = pipeline.train_problems(sources.of_tasks(NAMES, "rl"), seed=0)
    for start in (0, 900):
        assert {dataset[start + i].task for i in range(len(NAMES))} == set(NAMES)


def test_seeds_differ_and_no_draw_repeats():
    ids = [
        [dataset[i].problem_id for i in range(90)]
        for dataset in (
            pipeline.train_problems(sources.of_tasks(NAMES, "rl"), seed) for seed in (0, 1)
        )
    ]
    assert all(len(set(run)) == 90 for run in ids)
    assert not set(ids[0]) & set(ids[1])  # 10 draws of 2^20 per task: a common one is unlikely


def test_eval_problems_are_fixed_and_held_out():
    problems = pipeline.first_problems(sources.of_tasks(NAMES, "eval"), 50)
    assert problems == pipeline.first_problems(sources.of_tasks(NAMES, "eval"), 50)
    assert problems[:20] == pipeline.first_problems(sources.of_tasks(NAMES, "eval"), 20)
    assert {split_of(p.question) for p in problems} == {"eval"}
    counts = [sum(p.task == name for p in problems) for name in NAMES]
    assert max(counts) - min(counts) <= 1
    assert len({p.problem_id for p in problems}) == 50


# --- demonstrations


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(Limits(timeout_s=10.0), num_workers=2) as sandbox:
        yield sandbox


@each_task
def test_programs_run_as_shown(sandbox, name):
    problems = [problem(name, "sft", i) for i in range(6)]
    pairs = [[sandbox.submit(code) for code in programs(p)] for p in problems]
    for p, (good, bad) in zip(problems, pairs, strict=True):
        result = good.result(60)
        assert (result.status, result_text(result, ResultConfig())) == ("ok", p.answer)
        result = bad.result(60)
        assert result.status == "error" and "Error" in result_text(result, ResultConfig())


def demos(name, count, **shares):
    return [demonstration(name, i, **({"failed_share": 0.0} | shares)) for i in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_share_of_answers_by_text(share):
    drawn = [not d.programs for name in NAMES for d in demos(name, 100, text_share=share)]
    # 100 draws of each task: a standard deviation of at most 0.017; no spread at the ends.
    assert abs(sum(drawn) / len(drawn) - share) <= (0.06 if 0 < share < 1 else 0)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_share_of_failing_programs(share):
    drawn = [
        len(d.programs) == 2
        for name in NAMES
        for d in demos(name, 100, text_share=0.0, failed_share=share)
    ]
    assert abs(sum(drawn) / len(drawn) - share) <= (0.06 if 0 < share < 1 else 0)


@each_task
def test_demonstrations_show_the_programs_or_a_text_answer(name):
    for demo in demos(name, 40, text_share=0.5, failed_share=0.5):
        good, bad = programs(demo.problem)
        assert demo.programs in ((), (good,), (bad, good))
        assert split_of(demo.problem.question) == "sft"
        assert (demo.answer is None) == bool(demo.programs)
        if not demo.programs and not TASKS[name].needs_code:
            assert demo.answer == demo.problem.answer


@each_task
def test_guesses_are_rarely_right_where_code_is_needed(name):
    by_text = demos(name, 80, text_share=1.0)
    right = sum(d.answer == d.problem.answer for d in by_text) / len(by_text)
    if TASKS[name].needs_code:
        # A guess of n digits is right once in 9 * 10^(n-1): 1 in 9 for the shortest.
        assert right < 0.3
    else:
        assert right == 1


@pytest.mark.parametrize("truth", ["7", "0", "-5", "1200", "-340"])
def test_guess_has_the_truths_sign_and_length(truth):
    rng = random.Random(0)
    guesses = {guess(truth, rng) for _ in range(300)}
    assert {len(g) for g in guesses} == {len(truth)}
    assert {g.startswith("-") for g in guesses} == {truth.startswith("-")}
    assert not any(g.lstrip("-").startswith("0") for g in guesses)
    assert len(guesses) >= 9


def test_graders_agree_with_the_answers():
    problems = [problem(name, "eval", i) for name in NAMES for i in range(3)]
    wrong = [str(int(p.answer) + 1) for p in problems]
    with Grader(num_workers=1) as grader:
        right_scores, wrong_scores = (
            [
                grader.submit(p, [f"The answer is \\boxed{{{answer}}}."])
                for p, answer in zip(problems, answers, strict=True)
            ]
            for answers in ([p.answer for p in problems], wrong)
        )
        assert {future.result(60).value for future in right_scores} == {1.0}
        assert {future.result(60).value for future in wrong_scores} == {-1.0}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_demonstrations_are_cut_where_the_engine_notices_calls(name):
    """Each stretch of the model's but the last ends with the boundary, and has one program."""
    boundary = BOUNDARIES[name]
    demo = demonstration("sum", 0, text_share=0.0, failed_share=1.0)
    assert len(demo.programs) == 2
    results = [ExecResult("error", error="NameError: x"), ExecResult("ok", stdout="7")]
    parts = segments(demo, results, "{question}\n", RolloutConfig(boundary=name))
    *turns, last = [text for author, text in parts if author == Author.MODEL]
    assert [boundary.find_call(text) for text in turns] == [(p + "\n", "") for p in demo.programs]
    assert boundary.find_call(last) is None
    outputs = [text for author, text in parts if author == Author.TOOL]
    assert outputs == [boundary.put_back(text, "") for text in ("NameError: x", "7")]
    # A prefix of results is no part of the answer.
    cfg = RolloutConfig(boundary=name, result=ResultConfig(prefix="Results:\n"))
    *_, (_, prefixed), (_, end) = segments(demo, results, "{question}\n", cfg)
    assert prefixed == boundary.put_back("Results:\n7", "") and end == last
    # The whole reads the same, whoever writes the output block's opening.
    assert f"{demo.programs[1]}\n```\n```output\n7\n```\nThe answer" in "".join(t for _, t in parts)


# --- Reasoning-Gym and symbolic problems


def test_all_tasks_have_names_and_excluded_ones_say_why():
    names = tasks.names()
    assert len(set(names)) == len(names) and set(TASKS) < set(names)
    assert sum(name.startswith("rg:") for name in names) == 105
    tasks.check_names(["rg:sudoku", "sym:game24", "sum"])
    with pytest.raises(ConfigError, match="'rg:composite' cannot be used: it is a mixture"):
        tasks.check_names(["rg:composite"])
    with pytest.raises(ConfigError, match="unknown task 'rg:sudok'; nearest: rg:sudoku"):
        tasks.check_names(["rg:sudok"])
    assert tasks.parse_id("sym:lights/rl/3") == ("sym:lights", "rl", 3)


@pytest.mark.parametrize("name", MAKERS)
def test_symbolic_problems_are_right_and_repeatable(name):
    for split in ("rl", "eval"):
        for index in (0, 7):
            made = problem(f"sym:{name}", split, index)
            assert made == problem(f"sym:{name}", split, index)
            assert split_of(made.question) == split
            job = {"answer": made.answer, "truth": made.answer, "metadata": pack(made.metadata)}
            assert VERIFIERS[made.verifier](job) == "correct"
            reason = VERIFIERS[made.verifier](job | {"answer": "17 banana"})
            assert reason in ("wrong", "unparsable")


REPAIRED = {
    "game_of_life_halting": ["banana", "maybe"],
    "complex_arithmetic": ["nan", "inf"],
    "number_format": ["0.001"],
    "prime_factorization": ["banana", "2 x"],
    "boxnet": ["7", "[[1, 2]]", '{"a": 1}'],
    "coin_flip": ["-1", "9" * 400],
    "isomorphic_strings": ["banana"],
    "word_ladder": ["banana"],
    "rush_hour": ["A+1"],
}


@pytest.mark.parametrize("name", REPAIRED)
def test_repaired_scorers(name):
    made = problem(f"rg:{name}", "rl", 1)
    assert made == problem(f"rg:{name}", "rl", 1)
    right = made.answer or audit.solution(name, made.metadata)
    given = {"question": made.question, "truth": made.answer, "metadata": made.metadata}
    assert gym_verdict(right, **given) == "correct"
    assert {gym_verdict(a, **given) for a in ("", *REPAIRED[name])} <= {"wrong", "unparsable"}


def test_questions_are_the_same_in_every_process():
    """Draws from a set would be in the order of its members' hashes."""
    code = (
        "from cir_jax.data.gym import candidates\n"
        "for name in ('isomorphic_strings', 'ransom_note', 'polynomial_multiplication'):\n"
        "    print([candidates(name)(i)[:2] for i in range(3)])\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_tasks_without_demonstrations_are_named():
    check_demonstrated(["sum"])
    with pytest.raises(ConfigError, match="'rg:sudoku' has no demonstrations"):
        check_demonstrated(["sum", "rg:sudoku"])


def test_too_long_problems_of_tasks_are_replaced_and_counted():
    notes = []
    cfg = DataConfig(tasks=("sum",))
    (source,) = sources.train_sources(cfg, lambda p: "+" in p.question, notes.append)
    plain = sources.of_tasks(["sum"], "rl")[0]
    long = [i for i in range(60) if "+" not in plain[i].question]
    assert len(long) >= 10
    for i in (*range(60), *reversed(range(60))):
        assert "+" in source[i].question
        assert (source[i] == plain[i]) == (i not in long)
    assert source[long[0]] == source[long[0]]
    assert ["sum: 1 " in notes[0], "sum: 10 " in notes[1], len(notes)] == [True, True, 2]
    (none,) = sources.train_sources(cfg, lambda p: False, notes.append)
    with pytest.raises(ConfigError, match="64 problems in a row"):
        none[0]


@pytest.mark.slow
def test_every_gym_task_is_sound():
    with Grader(num_workers=2, cfg=RewardConfig(answer_format="angles")) as grader:
        found = [audit.audit(name, grader.submit, 2) for name in gym.names()]
    assert [its for its in found if not its.is_sound] == []
