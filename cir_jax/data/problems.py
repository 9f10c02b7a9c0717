"""Problems in files: veRL's parquet files as they are, and parquet or JSONL with named columns."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from cir_jax.config import ColumnsConfig, ConfigError
from cir_jax.data.files import column, read_rows, wrong_field
from cir_jax.records import Problem, Verifier


def read_problems(path: Path, columns: ColumnsConfig) -> list[Problem]:
    """All rows of a file, in order; the ids of problems count them from 0.

    Raises ConfigError naming file, row, column, value and what was expected.
    """
    names = (columns.prompt, columns.answer, columns.source, columns.verifier, *columns.metadata)
    return [
        _problem(_Row(path, n, where, values), columns)
        for n, (where, values) in enumerate(read_rows(path, [_head(name) for name in names]))
    ]


def messages(where: str, name: str, value: Any) -> tuple[tuple[tuple[str, str], ...], str]:
    """The messages before the question, and the question, of text or a list of messages.

    Raises ConfigError naming where, the column's name and value.
    """
    error = wrong_field(
        where, name, value, "text, or messages {role, content} of which the last is the user's"
    )
    if isinstance(value, str) and value.strip():
        return (), value
    if not isinstance(value, list) or not value:
        raise error
    found = []
    for message in value:
        keys = ("role", "content")
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(k), str) for k in keys
        ):
            raise error
        found.append((message["role"], message["content"]))
    *context, (role, question) = found
    if role != "user" or not question.strip():
        raise error
    return tuple(context), question


def _head(name: str) -> str:
    return name.partition(".")[0]


class _Row:
    """One row, and errors that say where it is."""

    def __init__(self, path: Path, number: int, where: str, values: Mapping[str, Any]):
        self.path, self.number, self.where = path, number, where
        self._values = values

    def get(self, name: str) -> Any:
        return column(self._values, name)

    def error(self, name: str, value: Any, expected: str) -> ConfigError:
        if value is None:
            missing = f"{self.where}: {name}: missing; must be {expected}"
            return ConfigError(missing + self._nearest(name))
        return wrong_field(self.where, name, value, expected)

    def _nearest(self, name: str) -> str:
        if _head(name) in self._values:
            return ""
        near = difflib.get_close_matches(_head(name), self._values, n=1)
        there = f"nearest: {near[0]}" if near else f"there are: {', '.join(self._values)}"
        return f"; {there}"


def _problem(row: _Row, columns: ColumnsConfig) -> Problem:
    prompt = row.get(columns.prompt)
    if prompt is None:
        raise row.error(columns.prompt, None, "text, or messages {role, content}")
    context, question = messages(row.where, columns.prompt, prompt)
    source = row.get(columns.source)
    if source is not None and not isinstance(source, str):
        raise row.error(columns.source, source, "text")
    return Problem(
        problem_id=f"{row.path}/{row.number}",
        task=source or row.path.stem,
        question=question,
        answer=_answer(row, columns.answer),
        verifier=_verifier(row, columns.verifier),
        metadata=_metadata(row, columns.metadata),
        context=context,
    )


def _answer(row: _Row, name: str) -> str:
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise row.error(name, value, "text or a number")


def _verifier(row: _Row, name: str) -> Verifier:
    value = row.get(name)
    if value is None:
        return "math"
    if value not in get_args(Verifier):
        raise row.error(name, value, f"one of {', '.join(get_args(Verifier))}")
    return value


def _metadata(row: _Row, names: tuple[str, ...]) -> dict[str, Any]:
    """Of each column that there is; what objects hold (a verifier's metadata) by its own names."""
    found: dict[str, Any] = {}
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.startswith("{"):
            value = _object(value)
        if isinstance(value, dict) and name == "metadata":
            found |= value
        elif value is not None:
            found[name] = value
    return found


def _object(text: str) -> Any:
    """Of JSON, which is how tables keep objects of many shapes; other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text
