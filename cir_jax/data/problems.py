"""Problems in files: veRL's parquet files as they are, and parquet or JSONL with named columns."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cir_jax.config import ColumnsConfig, ConfigError
from cir_jax.data.files import read_rows, wrong_field
from cir_jax.records import Problem


def read_problems(path: Path, columns: ColumnsConfig) -> list[Problem]:
    """All rows of a file, in order; the ids of problems count them from 0.

    Raises ConfigError naming file, row, column, value and what was expected.
    """
    heads = [_head(getattr(columns, name)) for name in ("prompt", "answer", "source")]
    return [
        _problem(_Row(path, n, where, values), columns)
        for n, (where, values) in enumerate(read_rows(path, heads))
    ]


def _head(column: str) -> str:
    return column.partition(".")[0]


class _Row:
    """One row, and errors that say where it is."""

    def __init__(self, path: Path, number: int, where: str, values: Mapping[str, Any]):
        self.path, self.number = path, number
        self._where, self._values = where, values

    def get(self, column: str) -> Any:
        """A column's value, a.b being field b of column a; None if there is none."""
        value: Any = self._values
        if column in value:
            return value[column]
        for part in column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    def error(self, column: str, value: Any, expected: str) -> ConfigError:
        if value is None:
            missing = f"{self._where}: {column}: missing; must be {expected}"
            return ConfigError(missing + self._nearest(column))
        return wrong_field(self._where, column, value, expected)

    def _nearest(self, column: str) -> str:
        if _head(column) in self._values:
            return ""
        near = difflib.get_close_matches(_head(column), self._values, n=1)
        there = f"nearest: {near[0]}" if near else f"there are: {', '.join(self._values)}"
        return f"; {there}"


def _problem(row: _Row, columns: ColumnsConfig) -> Problem:
    context, question = _messages(row, columns.prompt)
    source = row.get(columns.source)
    if source is not None and not isinstance(source, str):
        raise row.error(columns.source, source, "text")
    return Problem(
        problem_id=f"{row.path}/{row.number}",
        task=source or row.path.stem,
        question=question,
        answer=_answer(row, columns.answer),
        verifier="math",
        context=context,
    )


def _messages(row: _Row, column: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """The messages before the question, and the question."""
    value = row.get(column)
    expected = "text, or messages {role, content} of which the last is the user's"
    if isinstance(value, str) and value.strip():
        return (), value
    if not isinstance(value, list) or not value:
        raise row.error(column, value, expected)
    messages = []
    for message in value:
        keys = ("role", "content")
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(k), str) for k in keys
        ):
            raise row.error(column, value, expected)
        messages.append((message["role"], message["content"]))
    *context, (role, question) = messages
    if role != "user" or not question.strip():
        raise row.error(column, value, expected)
    return tuple(context), question


def _answer(row: _Row, column: str) -> str:
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise row.error(column, value, "text or a number")
