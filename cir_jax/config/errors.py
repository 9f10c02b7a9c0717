"""What is wrong with a config, in one line: key, value, and what was expected."""

import difflib
import functools
from pathlib import Path
from typing import Any

import pydantic

from cir_jax.config.keys import all_keys, meaning, toml_text


class ConfigError(ValueError):
    """A config that cannot be used; the message is one line with key, value and expectation."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def missing_file(key: str, path: Path) -> str:
    """One line for a path that is not there, with the nearest name beside it."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; nearest: {path.parent / near[0]}" if near else ""
    return f"{key}={str(path)!r}: no such file or directory{hint}"


def unknown_key(key: str, value: Any) -> str:
    keys = all_keys()
    # First a key that only lacks its section, however short that makes it.
    bare = [k for k in keys if k.endswith("." + key)]
    near = difflib.get_close_matches(key, bare, n=1, cutoff=0)
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
    if not near:
        leaf = key.rsplit(".", 1)[-1]
        near = [k for k in keys if k.rsplit(".", 1)[-1] == leaf][:1]
    hint = f"nearest valid key: {near[0]}" if near else "cir-jax train --help prints all keys"
    return f"{key}={toml_text(value)}: unknown key; {hint}"


def wrong_value(key: str, value: Any, expected: str) -> str:
    return f"{key}={toml_text(value)}: {expected}; {meaning(key)}"


# What a value of the wrong type should be, in TOML's words instead of pydantic's.
_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string, in quotes",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "too_short": "a list with at least one entry",
    "finite_number": "finite",
}


def one_line(error: pydantic.ValidationError, tree: dict[str, Any]) -> str:
    # An unknown key first: misspelt, it is also the reason why another is missing.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    valid = set(all_keys())
    key = ""
    for part in first["loc"]:
        candidate = f"{key}.{part}" if key else str(part)
        if candidate not in valid and first["type"] != "extra_forbidden":
            break
        key = candidate
    if first["type"] == "extra_forbidden":
        return unknown_key(key, first["input"])
    if first["type"] == "missing":
        return f"{key}: missing; {meaning(key)}"
    if first["type"] == "model_type":
        return f"{key}={toml_text(first['input'])}: must be a table [{key}]"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict):
        # From a check over a whole section, which names the field itself.
        return f"{key}.{message}" if key else message
    if first["type"] in _TYPES:
        message = f"must be {_TYPES[first['type']]}"
    message = message.replace("Input should be", "must be")
    # The whole value, where the error is about an entry of a list.
    value = functools.reduce(lambda section, part: section[part], key.split("."), tree)
    return wrong_value(key, value, message)
