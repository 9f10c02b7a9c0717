"""Suites: which benchmarks, how many samples of each problem, drawn how, asked how. All data.

Source: CIR, arXiv:2505.24480, evaluation; prompts of R1-CI, arXiv:2505.21668. A suite of one's own
is a TOML file with the fields of `Suite`, and [[benchmarks]] tables with those of `Benchmark`.
"""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from cir_jax.config import ConfigError, Section
from cir_jax.config.base import NonNegativeInt, PositiveInt
from cir_jax.config.errors import missing_file

PROMPTS = {
    "cir": "Please solve the following problem step by step. During your reasoning process, if "
    "needed, you can choose to write python code to enhance your reasoning. The code executor will "
    "run your code and provide the execution results back to you to support your reasoning "
    "process. Please put the final answer within \\boxed{}.\n{question}",
    "text": "Please solve the following problem step by step and put the final answer within "
    "\\boxed{}.\n{question}",
    "instruct": "Please provide a solution to the following problem by integrating natural "
    "language reasoning with Python codes. Begin by explaining your thought process step by step, "
    "and then implement the solution in Python. Ensure the code is clear, well-documented, and "
    "follows best practices. Finally, present the final answer enclosed within \\boxed{} for "
    "clarity.\n{question}",
}
"""Prompts by name: CIR's with and without code, and that for instruct models."""


class Benchmark(Section):
    """A file of problems, and how they are asked."""

    name: str
    """What the tables call it."""
    file: str
    """.jsonl, .json or .parquet, in --data-dir unless it is a path."""
    problem: str = "problem"
    """Column of the question."""
    answer: str = "solution"
    """Column of the answer, or of a solution with the answer in its last box."""
    types: tuple[str, ...] = ("subject", "level")
    """Columns that accuracies are also reported by, where the file has them."""
    samples: PositiveInt = 16
    """Samples per problem, n of AVG@n (CIR: 16; MATH500: 1)."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits; 0 is greedy (CIR: 1.0; MATH500: greedy)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Mass of the most likely tokens that are sampled from (CIR: 0.95)."""


class Suite(Section):
    """Benchmarks with a common budget and common prompts."""

    name: str
    """What the tables call it."""
    benchmarks: Annotated[tuple[Benchmark, ...], Field(min_length=1)]
    """In the tables' order."""
    max_response_tokens: PositiveInt = 16384
    """Model and tool tokens per response (CIR: 16384)."""
    max_calls: NonNegativeInt = 5
    """Executed programs per response, with tools (CIR: 5)."""
    code_prompt: str = PROMPTS["cir"]
    """With tools: a text with {question}, or the name of one of PROMPTS."""
    text_prompt: str = PROMPTS["text"]
    """Without tools; the same."""

    @pydantic.field_validator("code_prompt", "text_prompt")
    @classmethod
    def _prompt(cls, value: str) -> str:
        if (text := PROMPTS.get(value, value)).count("{question}") == 0:
            raise ValueError(f"must contain {{question}}, or be one of {', '.join(PROMPTS)}")
        return text

    @pydantic.model_validator(mode="after")
    def _names(self) -> "Suite":
        names = [benchmark.name for benchmark in self.benchmarks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"benchmarks: the name {twice[0]!r} is there twice")
        return self


BENCHMARKS = (
    Benchmark(name="math500", file="math500.jsonl", answer="answer", samples=1, temperature=0.0),
    Benchmark(name="amc23", file="amc23.jsonl"),
    Benchmark(name="aime24", file="aime24.jsonl"),
    Benchmark(name="aime25", file="aime25.jsonl"),
    Benchmark(name="olymmath_en_easy", file="olymmath_en_easy.jsonl"),
    Benchmark(name="olymmath_en_hard", file="olymmath_en_hard.jsonl"),
)
SUITES = {
    "cir": Suite(name="cir", benchmarks=BENCHMARKS[:5]),
    "olymmath": Suite(name="olymmath", benchmarks=BENCHMARKS[4:]),
}
"""CIR's five benchmarks in the order of its table; both halves of OlymMATH in English."""


def find_suite(name: str) -> Suite:
    """Of SUITES by name, or of a TOML file. Raises ConfigError naming what is wrong with it."""
    if name in SUITES:
        return SUITES[name]
    path = Path(name)
    if path.suffix != ".toml":
        near = difflib.get_close_matches(name, SUITES, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(
            f"--suite {name!r}: must be one of {', '.join(SUITES)}, or a .toml file{hint}"
        )
    if not path.is_file():
        raise ConfigError(missing_file("--suite", path))
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        return Suite.model_validate(_tuples(tree))
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error


def pick(suite: Suite, names: Sequence[str]) -> Suite:
    """The suite with these benchmarks alone, of its own or of the known ones.

    Raises ConfigError with the nearest name.
    """
    known = {benchmark.name: benchmark for benchmark in (*BENCHMARKS, *suite.benchmarks)}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"nearest: {near[0]}" if near else f"there are: {', '.join(known)}"
            raise ConfigError(f"--benchmarks {name!r}: unknown benchmark; {hint}")
    picked = tuple(known[name] for name in dict.fromkeys(names))
    return suite.model_copy(update={"benchmarks": picked})


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _one_line(error: pydantic.ValidationError) -> str:
    # An unknown key first: misspelt, it is also the reason why another is missing.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if first["type"] == "missing":
        return f"{where}: missing"
    if first["type"] == "extra_forbidden":
        section = Benchmark if len(first["loc"]) > 1 else Suite
        near = difflib.get_close_matches(str(first["loc"][-1]), section.model_fields, n=1)
        hint = f"nearest: {near[0]}" if near else f"keys: {', '.join(section.model_fields)}"
        message = f"unknown key; {hint}"
    if isinstance(first["input"], dict):
        return f"{where}: {message}" if where else message
    return f"{where}={first['input']!r}: {message}"
