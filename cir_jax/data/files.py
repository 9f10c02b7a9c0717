"""Problems in files: veRL's parquet files as they are, and parquet or JSONL with named columns."""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cir_jax.config import ColumnsConfig
from cir_jax.config.errors import missing_file
from cir_jax.records import Problem

_SUFFIXES = (".parquet", ".jsonl")
_SHOWN = 80


def check_file(path: Path, key: str) -> None:
    """Raises ValueError unless it is there and of a kind that can be read. key: who names it."""
    if problem := suffix_problem(path):
        raise ValueError(f"{key}={str(path)!r}: {problem}")
    if not path.is_file():
        raise ValueError(missing_file(key, path))


def suffix_problem(path: Path) -> str:
    """What is wrong with the kind of a file; "" if it is one that can be read."""
    return "" if path.suffix in _SUFFIXES else f"must end in {' or '.join(_SUFFIXES)}"


def num_rows(path: Path) -> int:
    """Raises ValueError if it cannot be read."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(path).num_rows
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not a parquet file: {error}") from error
    return sum(1 for _ in _jsonl(path, []))


def read_problems(path: Path, columns: ColumnsConfig) -> list[Problem]:
    """All rows of a file, in order; row 0 is the first.

    Raises ValueError naming file, row, column, value and what was expected; OSError.
    """
    rows = _parquet if path.suffix == ".parquet" else _jsonl
    heads = [_head(getattr(columns, name)) for name in ("prompt", "answer", "source")]
    return [_problem(_Row(path, n, row), columns) for n, row in rows(path, heads)]


def _head(column: str) -> str:
    return column.partition(".")[0]


class _Row:
    """One row, and errors that say where it is."""

    def __init__(self, path: Path, number: int, values: Mapping[str, Any]):
        self.path, self.number, self._values = path, number, values

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

    def error(self, column: str, value: Any, expected: str) -> ValueError:
        shown = repr(value)
        if len(shown) > _SHOWN:
            shown = shown[:_SHOWN] + "..."
        where = f"{self.path}, row {self.number}, column {column}"
        if value is None:
            return ValueError(f"{where}: missing, {expected}{self._nearest(column)}")
        return ValueError(f"{where}: {shown}: {expected}")

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
        raise row.error(columns.source, source, "must be text")
    return Problem(
        problem_id=f"{row.path.name}/{row.number}",
        task=source or row.path.stem,
        question=question,
        answer=_answer(row, columns.answer),
        verifier="math",
        context=context,
    )


def _messages(row: _Row, column: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """The messages before the question, and the question."""
    value = row.get(column)
    expected = "must be text, or messages {role, content} of which the last is the user's"
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
    raise row.error(column, value, "must be text or a number")


def _jsonl(path: Path, heads: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(line for line in file if line.strip()):
                try:
                    values = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, row {number}: not JSON: {error}") from error
                if not isinstance(values, dict):
                    raise ValueError(f"{path}, row {number}: must be an object, {{...}}")
                yield number, values
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after row {number}: not UTF-8: {error}") from error


def _parquet(path: Path, heads: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # What is not asked for is not read, but its name helps to find a misspelt one.
            others = dict.fromkeys(names)
            number = 0
            for batch in file.iter_batches(columns=[name for name in names if name in heads]):
                for values in batch.to_pylist():
                    yield number, others | values
                    number += 1
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from error
