r"""The outcome reward: which box counts, what equals the truth, and the limits of the graders."""

import time

import pytest

from cir_jax.config import RewardConfig
from cir_jax.records import Problem
from cir_jax.reward.boxes import last_boxed, last_in_angles
from cir_jax.reward.packing import pack, unpack
from cir_jax.reward.score import Grader


def problem(truth, **kwargs):
    return Problem("id", "task", "question", truth, **({"verifier": "math"} | kwargs))


@pytest.fixture(scope="module")
def grader():
    with Grader(num_workers=1, timeout_s=2.0) as grader:
        # Libraries are loaded, and the spare worker is ready, before a test measures time.
        grader.submit(problem("1"), [r"\boxed{x}"]).result(60)
        end = time.monotonic() + 30
        while len(grader.stats()["workers"]) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        yield grader


@pytest.mark.parametrize(
    ("segments", "content"),
    [
        ([r"so \boxed{5}."], "5"),
        ([r"\boxed{1} then \boxed{2}"], "2"),
        ([r"\boxed{\frac{1}{2}}"], r"\frac{1}{2}"),
        ([r"\boxed{\{1, 2\}}"], r"\{1, 2\}"),
        ([r"\boxed{\left\{ 1 \right.}"], r"\left\{ 1 \right."),
        ([r"\boxed{\boxed{3}}"], "3"),
        ([r"\boxed {4}"], "4"),
        ([r"\boxed{}"], ""),
        ([r"\boxed{1}", "and no more"], "1"),
        ([r"\boxed{1}", r"\boxed{2}", ""], "2"),
        ([r"\boxed{\text{a } b}"], r"\text{a } b"),
        ([], None),
        (["5"], None),
        ([r"\fbox{5}"], None),
        ([r"\boxed 5"], None),
        ([r"\boxed{5"], None),
        ([r"\boxed{5\}"], None),
        ([r"\boxed{1} but \boxed{2"], None),
        ([r"\boxed{", "5}"], None),
        ([r"\box", "ed{5}"], None),
    ],
)
def test_last_boxed(segments, content):
    assert last_boxed(segments) == content


def test_last_boxed_takes_linear_time():
    started = time.monotonic()
    assert last_boxed([r"\boxed{" * 50_000]) is None
    assert last_boxed([r"\boxed{1" * 50_000 + "}"]) == "1"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("segments", "content"),
    [
        (["so <<<5>>>"], "5"),
        (["<<<1>>> or <<<2>>>"], "2"),
        (["<<<a < b>>>", "that is it"], "a < b"),
        (["<<<[[1, 2],\n[3, 4]]>>>"], "[[1, 2],\n[3, 4]]"),
        (["<<<1>>> and <<<2"], None),
        (["<<<", "1>>>"], None),
        (["<<5>>"], None),
        ([r"\boxed{5}"], None),
    ],
)
def test_last_in_angles(segments, content):
    assert last_in_angles(segments) == content


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        (["the answer is 5"], "no_box"),
        ([r"\boxed{5"], "no_box"),
        ([r"\boxed{}"], "unparsable"),
        ([r"\boxed{\ldots}"], "unparsable"),
        ([r"\boxed{" + "x" * 100_000 + "}"], "unparsable"),
        ([r"\boxed{" + "9" * 100_000 + "}"], "wrong"),
        ([r"\boxed{__import__('os')._exit(0)}"], "unparsable"),
    ],
)
def test_reasons(grader, segments, reason):
    started = time.monotonic()
    score = grader.submit(problem("5"), segments).result(60)
    assert (score.value, score.reason) == (-1.0, reason)
    assert time.monotonic() - started < 1.9
    assert grader.stats()["restarts"] == 0


def test_a_box_printed_by_the_tool_earns_nothing(grader):
    """Segments hold what the model wrote; the output between them is not among them."""
    text = ["```python\nprint(chr(92) + 'boxed{5}')\n```", "That settles it."]
    tool = "\n```output\n\\boxed{5}\n```\n"
    assert grader.submit(problem("5"), text).result(60).reason == "no_box"
    assert grader.submit(problem("5"), [text[0] + tool + text[1]]).result(60).value == 1.0
    # Nor does a box that the model opens and the tool's output would close.
    assert grader.submit(problem("5"), [r"\boxed{", "5}"]).result(60).reason == "no_box"


def gym_problem(name, index=0):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset(name, size=index + 1, seed=1)[index]
    question, metadata = entry["question"], entry["metadata"]
    return Problem(name, name, question, entry["answer"] or "", "gym", metadata=metadata)


def test_gym_scores(grader):
    right = gym_problem("leg_counting")
    assert grader.submit(right, [rf"\boxed{{{right.answer}}}"]).result(60).value == 1.0
    assert grader.submit(right, [r"\boxed{banana}"]).result(60).reason == "wrong"
    words = gym_problem("spell_backward")
    assert grader.submit(words, [rf"\boxed{{\text{{{words.answer}}}}}"]).result(60).value == 1.0
    malformed = grader.submit(gym_problem("prime_factorization"), [r"\boxed{banana}"]).result(60)
    assert (malformed.value, malformed.reason) == (-1.0, "unparsable")
    unknown = problem("5", verifier="gym", metadata={"source_dataset": "none"})
    assert grader.submit(unknown, [r"\boxed{5}"]).result(60).reason == "error:ValueError"


def test_formats_and_modes():
    """One worker per grader, no spare: this asks what is handed over, not how fast."""
    said = ["First <<<1/2>>>, so", r"\boxed{7} or 0.5"]
    half = problem("0.5")
    with Grader(cfg=RewardConfig(answer_format="angles")) as grader:
        assert grader.submit(half, said).result(60).reason == "correct"
        assert grader.submit(half, said[1:]).result(60).reason == "no_answer"
        assert grader.submit(half, [r"<<<\boxed{1/2}>>>"]).result(60).reason == "correct"
        jobs = {
            "exact": ("Valid", "valid", {}),
            "choice": ("(B) five", "(B)", {}),
            "plan": (
                "(8-2)*(1+3)",
                "",
                {"checker": "game24", "numbers": [1, 2, 3, 8], "target": 24},
            ),
        }
        for verifier, (answer, truth, metadata) in jobs.items():
            asked = problem(truth, verifier=verifier, metadata=metadata)
            assert grader.submit(asked, [f"<<<{answer}>>>"]).result(60).reason == "correct"
            assert grader.submit(asked, ["<<<(C) 1>>>"]).result(60).value == -1.0
        # What could not be checked is no wrong answer.
        unknown = problem("", verifier="plan", metadata={"checker": "none"})
        assert grader.submit(unknown, ["<<<1>>>"]).result(60).reason == "error:KeyError"
    with Grader(cfg=RewardConfig(mode="lenient")) as grader:
        assert grader.submit(half, ["The answer is 1/2."]).result(60).reason == "correct"
        assert grader.submit(half, [r"\boxed{7} or 0.5"]).result(60).reason == "wrong"
        assert grader.submit(half, ["I do not know."]).result(60).reason == "unparsable"


def test_gym_metadata_survive_json():
    """graph_color keys its colouring by integers, which plain JSON would turn into text."""
    metadata = {"a": (1, [2.5, None]), 3: {"b": True, "tuple": "x", (1, 2): ()}}
    packed = pack(metadata)
    assert unpack(packed) == metadata
    assert isinstance(unpack(packed)["a"], tuple)
    with pytest.raises(TypeError, match="object"):
        pack({"a": object()})


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "1000000!"])
def test_time_limit_is_enforced_by_killing(grader, answer):
    """Last in this file: it costs workers."""
    before = grader.stats()
    started = time.monotonic()
    score = grader.submit(problem("5"), [rf"\boxed{{{answer}}}"]).result(60)
    assert (score.value, score.reason) == (-1.0, "timeout")
    assert 2.0 <= time.monotonic() - started < 10
    after = grader.stats()
    assert after["timeouts"] == before["timeouts"] + 1
    assert not set(before["pids"]) <= set(after["pids"])
    assert grader.submit(problem("5"), [r"\boxed{5}"]).result(60).value == 1.0
