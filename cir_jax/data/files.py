"""Rows of data files, with errors that say where: file, line, field, value, expectation."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cir_jax.config import ConfigError
from cir_jax.config.errors import missing_file

_EXCERPT_CHARS = 60


def check_file(path: Path, key: str) -> None:
    """Raises ConfigError unless it is there and of a kind that can be read. key: who names it."""
    if problem := suffix_problem(path):
        raise ConfigError(f"{key}={str(path)!r}: {problem}")
    if not path.is_file():
        raise ConfigError(missing_file(key, path))


def suffix_problem(path: Path) -> str:
    """What is wrong with the kind of a file; "" if it is one that can be read."""
    return "" if path.suffix in _KINDS_OF_FILE else f"must end in {', '.join(_KINDS_OF_FILE)}"


def num_rows(path: Path) -> int:
    """Raises ConfigError if it cannot be read."""
    return sum(1 for _ in read_rows(path, ()))


def suffixes() -> tuple[str, ...]:
    """Endings of files that can be read."""
    return tuple(_KINDS_OF_FILE)


def column(row: Mapping[str, Any], name: str) -> Any:
    """A column's value, a.b being field b of column a; None if there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def read_rows(
    path: Path, fields: Collection[str] | None = None, *, list_in: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, and where it stands ("FILE, line 3"); numbers are from 1.

    By the name's ending: .jsonl has an object on each line that is not blank, .json a list of
    objects, .parquet a table, whose columns are the fields.

    fields: what is asked for; others of a table are not read, and are None.
    list_in: the field of a .json file's one object that may hold its list of rows.

    Raises:
      ConfigError: a row is no object, or the file cannot be read.
    """
    if problem := suffix_problem(path):
        raise ConfigError(f"{path}: {problem}")
    try:
        for where, row in _KINDS_OF_FILE[path.suffix](path, fields, list_in):
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: {_excerpt(row)}: must be an object of fields")
            yield where, row
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _jsonl(path: Path, *_) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _parsed(where, line)


def _json(path: Path, _, list_in: str) -> Iterator[tuple[str, Any]]:
    rows = _parsed(str(path), path.read_text(encoding="utf-8"))
    if isinstance(rows, dict) and list_in in rows:
        rows = rows[list_in]
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: must hold a list of objects; one object a line is .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: must be JSON: {error}: {_excerpt(text.strip())}") from error


def _parquet(path: Path, fields: Collection[str] | None, _) -> Iterator[tuple[str, Any]]:
    # 0.1 s that only who reads such files should wait for.
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            asked = names if fields is None else [name for name in names if name in fields]
            others = dict.fromkeys(names)
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=asked):
                # Of no columns there are no rows to convert.
                for row in batch.to_pylist() if asked else [{}] * batch.num_rows:
                    number += 1
                    yield f"{path}, row {number}", others | row
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: must be a parquet file: {error}") from error


_KINDS_OF_FILE = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}


def wrong_field(where: str, name: str, value: Any, expected: str) -> ConfigError:
    """The error of a row's field."""
    return ConfigError(f"{where}: {name}={_excerpt(value)}: must be {expected}")


# What a field may hold, in words.
_KINDS = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}


def field(where: str, row: dict[str, Any], name: str, kind: type, *, within: str = "") -> Any:
    """The row's field, of a kind; ConfigError if it is missing or of another.

    within: what the row itself is part of, "messages[2]." for one.
    """
    value = row.get(name)
    if name not in row:
        raise ConfigError(f"{where}: {within}{name}: missing; must be {_KINDS[kind]}")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise wrong_field(where, within + name, value, _KINDS[kind])
    return value


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _EXCERPT_CHARS else f"{text[:_EXCERPT_CHARS]}..."
