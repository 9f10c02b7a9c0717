"""Problems and the prompts that are made of them."""

import difflib

import pydantic

from cir_jax.config.base import PositiveFloat, PositiveInt, Section
from cir_jax.config.templates import TEMPLATES


class ColumnsConfig(Section):
    """Columns of files; a.b is field b of column a. The defaults are veRL's."""

    prompt: str = "prompt"
    """The question as text, or messages, {role, content} each, of which the last is the
    question."""
    answer: str = "reward_model.ground_truth"
    """The answer that the grader compares with, text or a number."""
    source: str = "data_source"
    """Name that accuracies are reported by; files without the column: their own name."""
    verifier: str = "verifier"
    """How answers are graded: math, exact, choice, plan or gym; files without the column: math."""
    metadata: tuple[str, ...] = ("subject", "level", "type", "unique_id", "options", "metadata")
    """Columns that are kept with a problem, where there are any, for tables and graders."""


class DataConfig(Section):
    """Problems and prompts."""

    tasks: tuple[str, ...] = ()
    """Task kinds drawn with equal weight: names from cir_jax/data/tasks.py, rg:NAME of
    Reasoning-Gym, sym:NAME of symbolic problems (`cir-jax data list`)."""
    files: tuple[str, ...] = ()
    """Problems to train on, .parquet (veRL's as they are), .jsonl or .json, each equally often."""
    eval_files: tuple[str, ...] = ()
    """Held-out problems, with files; from all in turn."""
    sets: tuple[str, ...] = ()
    """Prepared data sets to train on, NAME or NAME:SPLIT, as `cir-jax data prepare` makes them."""
    eval_sets: tuple[str, ...] = ()
    """Prepared data sets of held-out problems; from all in turn."""
    directory: str = "data/sets"
    """Where prepared data sets lie (prepare's --data-dir)."""
    weights: dict[str, PositiveFloat] = {}
    """How often tasks, files and sets are drawn from, by their names: 1 where one is not named;
    empty: tasks equally often, the problems of all files and sets, too."""
    columns: ColumnsConfig = ColumnsConfig()
    """Columns of the files."""
    eval_columns: ColumnsConfig | None = None
    """Columns of the held-out files; null (leave out) = columns."""
    template: str = "{question}\n"
    """Text of the prompt, in which {question} is replaced, or a paper's by name: cir, cir_text,
    tir, r1ci."""
    chat: bool = False
    """Put it, as the user's message, into the tokenizer's chat template, thinking disabled, after
    what other messages the problem has; else it is raw text (CIR: Qwen3 chat, Math base raw)."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are never cut, tokens: their problems are left out and counted, generated
    ones replaced by others (CIR: 1024)."""
    curriculum: str = ""
    """File that `cir-jax curriculum` has written: which problems, or which tasks, RL draws from
    which step on (R1-CI v2); empty: all from the first."""

    @pydantic.model_validator(mode="after")
    def _sources(self) -> "DataConfig":
        listed = [key for key in ("files", "sets") if getattr(self, key)]
        held_out = [key for key in ("eval_files", "eval_sets") if getattr(self, key)]
        if not self.tasks and not listed:
            raise ValueError(
                "tasks=[]: must have at least one entry, unless there are files or sets"
            )
        if listed and not held_out and not self.tasks:
            raise ValueError(
                f"eval_{listed[0]}=[]: must have at least one entry, as {listed[0]} has"
            )
        self._check_weights()
        return self

    def _check_weights(self) -> None:
        names = (*self.tasks, *self.files, *self.sets)
        for name in self.weights:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0)
                raise ValueError(
                    f"weights={{{name!r}: ...}}: must be one of tasks, files or sets; "
                    f"nearest: {near[0]}"
                )
        if self.weights and self.curriculum:
            raise ValueError(f"weights={self.weights}: a curriculum draws without weights")

    @pydantic.field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        text = TEMPLATES.get(value, value)
        if "{question}" not in text:
            near = difflib.get_close_matches(value, TEMPLATES, n=1)
            hint = f"nearest name: {near[0]}" if near else f"or be one of {', '.join(TEMPLATES)}"
            raise ValueError(f"must contain {{question}}; {hint}")
        return text
