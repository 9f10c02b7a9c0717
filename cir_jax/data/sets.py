"""Data sets by name: what `cir-jax data prepare` can make, from where, and how rows are read.

A file is looked for in the manual directory first, and downloaded only if it is not there. Known
SHA-256 sums stand here; the sum of any other download is kept in the data directory when it first
comes, and has to be the same from then on.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cir_jax.config import ConfigError
from cir_jax.records import Verifier

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a split. sha256: "" if it is not known before the first download."""

    url: str = ""
    sha256: str = ""
    task: str = ""
    """What its problems are of, where the file's rows do not say; and its name in a manual
    directory, where a split has several files."""


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """How rows become problems.

    num_problems: by split, where it is known; another number is an error.
    question, answer: the first of these columns that a row has is taken, a.b being field b of a.
    """

    summary: str
    source: str
    splits: dict[str, tuple[File, ...]]
    num_problems: dict[str, int] = dataclasses.field(default_factory=dict)
    question: tuple[str, ...] = ("problem", "question", "prompt")
    answer: tuple[str, ...] = ("answer", "solution", "ground_truth", "reward_model.ground_truth")
    task: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ("subject", "level", "type", "unique_id", "url")
    verifier: Verifier | Callable[[str, str], Verifier] = "math"
    """Or a function of question and answer."""
    clean: Callable[[str, str], tuple[str, str]] = lambda question, answer: (question, answer)
    """Of question and answer: what does not belong to them is taken away."""
    distinct: bool = False
    """Later rows with the question of an earlier one are left out."""


def _gsm8k(question: str, answer: str) -> tuple[str, str]:
    return question, answer.rpartition("####")[2].strip().replace(",", "")


_DAPO_BEFORE = re.compile(r"^Solve the following math problem step by step\..*?\n\n", re.DOTALL)
_DAPO_AFTER = re.compile(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.\s*$")


def _dapo(question: str, answer: str) -> tuple[str, str]:
    """Without DAPO's own instructions: the prompt's template says how to answer."""
    return _DAPO_AFTER.sub("", _DAPO_BEFORE.sub("", question)), answer


def _graded_by_answer(question: str, answer: str) -> Verifier:
    """Options as (A), numbers, and words."""
    if re.fullmatch(r"\([A-Z]\)", answer.strip()):
        return "choice"
    return "math" if re.fullmatch(r"-?[\d.,]+", answer.strip()) else "exact"


_BBH_TASKS = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages "
    "formal_fallacies geometric_shapes hyperbaton logical_deduction_five_objects "
    "logical_deduction_seven_objects logical_deduction_three_objects movie_recommendation "
    "multistep_arithmetic_two navigate object_counting penguins_in_a_table "
    "reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects "
    "web_of_lies word_sorting"
).split()

_HUB = "https://huggingface.co/datasets"
_GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
_BBH = "https://raw.githubusercontent.com/suzgunmirac/BIG-Bench-Hard/main/bbh"


def _test_set(summary: str, repository: str, file: str, count: int, **other: Any) -> ProblemSet:
    url = f"{_HUB}/{repository}/resolve/main/{file}"
    return ProblemSet(summary, repository, {"test": (File(url),)}, {"test": count}, **other)


SETS: dict[str, ProblemSet] = {
    "math500": _test_set(
        "MATH-500, with subject and level", "HuggingFaceH4/MATH-500", "test.jsonl", 500
    ),
    "amc23": _test_set("AMC 12, 2023", "zwhe99/amc23", "data/test-00000-of-00001.parquet", 40),
    "aime24": _test_set(
        "AIME I and II, 2024", "HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet", 30
    ),
    "aime25": _test_set("AIME I and II, 2025", "math-ai/aime25", "test.jsonl", 30),
    "olymmath_en_easy": _test_set(
        "OlymMATH, English, easy", "RUC-AIBOX/OlymMATH", "data/OlymMATH-EN-EASY.jsonl", 100
    ),
    "olymmath_en_hard": _test_set(
        "OlymMATH, English, hard", "RUC-AIBOX/OlymMATH", "data/OlymMATH-EN-HARD.jsonl", 100
    ),
    "gsm8k": ProblemSet(
        "grade school mathematics",
        "openai/grade-school-math",
        {
            "train": (
                File(
                    f"{_GSM8K}/train.jsonl",
                    "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                ),
            ),
            "test": (
                File(
                    f"{_GSM8K}/test.jsonl",
                    "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
                ),
            ),
        },
        {"train": 7473, "test": 1319},
        clean=_gsm8k,
    ),
    "still3": ProblemSet(
        "STILL-3's problems for RL, CIR's source",
        "RUC-AIBOX/STILL-3-Preview-RL-Data",
        {
            "train": (
                File(
                    f"{_HUB}/RUC-AIBOX/STILL-3-Preview-RL-Data/resolve/main/data/"
                    "train-00000-of-00001.parquet"
                ),
            )
        },
        distinct=True,
    ),
    "dapo_math": ProblemSet(
        "DAPO-Math-17k, each problem once, without its instructions",
        "BytedTsinghua-SIA/DAPO-Math-17k",
        {
            "train": (
                File(
                    f"{_HUB}/BytedTsinghua-SIA/DAPO-Math-17k/resolve/main/data/"
                    "dapo-math-17k.parquet"
                ),
            )
        },
        answer=("reward_model.ground_truth", "answer", "solution"),
        metadata=("ability",),
        clean=_dapo,
        distinct=True,
    ),
    "bbh": ProblemSet(
        "BIG-Bench-Hard, 27 tasks (R1-CI)",
        "suzgunmirac/BIG-Bench-Hard",
        {"test": tuple(File(f"{_BBH}/{task}.json", task=task) for task in _BBH_TASKS)},
        question=("input", "question"),
        answer=("target", "answer"),
        verifier=_graded_by_answer,
    ),
    "symbench": ProblemSet(
        "SymBench's questions (R1-CI), from files of your own: question, answer, task and, where "
        "they are not of mathematics, verifier and metadata",
        "yongchao98/R1-Code-Interpreter",
        {"train": (File(),), "test": (File(),)},
        task=("task", "task_name"),
        metadata=("subject", "level", "type", "unique_id", "options", "metadata"),
    ),
}


def find(name: str, key: str = "data prepare") -> ProblemSet:
    """The data set of a name. Raises ConfigError with the nearest."""
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=1)
        hint = f"nearest: {near[0]}" if near else f"there are: {', '.join(SETS)}"
        raise ConfigError(f"{key}: unknown data set {name!r}; {hint}")
    return SETS[name]


VERSION = "1.0.0"


def folder(name: str, data_dir: Path) -> Path:
    """Where a prepared set lies in a data directory."""
    return data_dir / "problems" / name / VERSION


def split_name(name: str, key: str) -> tuple[str, str]:
    """Set and split of NAME or NAME:SPLIT, the first split where none is named."""
    name, _, split = name.partition(":")
    splits = find(name, key).splits
    if split and split not in splits:
        raise ConfigError(f"{key}: {name}:{split}: must be a split of {', '.join(splits)}")
    return name, split or next(iter(splits))
