"""Arguments of a veRL command: `key=value` in hydra's grammar, as keys with plain values."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

_OVERRIDE = re.compile(
    r"(?P<prefix>\+{0,2}|~)(?P<key>[A-Za-z_][\w.@/-]*)(?P<given>=(?P<value>.*))?",
    re.DOTALL,
)
_INT = re.compile(r"[+-]?\d[\d_]*")
_FLOAT = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d+)?|[+-]?inf|nan", re.IGNORECASE)
_WORDS = {"null": None, "true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Override:
    """deleted: of `~key`. text: the value as it is written."""

    key: str
    value: Any
    text: str
    deleted: bool = False


def is_override(argument: str) -> bool:
    match = _OVERRIDE.fullmatch(argument)
    return bool(match and (match["given"] or match["prefix"] == "~"))


def parse(arguments: Iterable[str]) -> tuple[list[Override], list[str]]:
    """Overrides in their order, and the other arguments (options of hydra, such as
    --config-name=x).

    `${other.key}` as a value is left as that text. Raises ValueError naming the argument.
    """
    overrides, options = [], []
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument.strip())
        if match and match["prefix"] == "~":
            overrides.append(Override(match["key"], None, match["value"] or "", deleted=True))
        elif match and match["given"]:
            try:
                value = parse_value(match["value"])
            except ValueError as error:
                raise ValueError(f"{argument}: {error}") from None
            overrides.append(Override(match["key"], value, match["value"].strip()))
        elif argument.startswith("--"):
            options.append(argument)
        else:
            raise ValueError(f"{argument}: is not key=value, +key=value, ++key=value or ~key")
    return overrides, options


def parse_value(text: str) -> Any:
    """A value of hydra's grammar: null, booleans, numbers, lists, dicts, else text.

    A blank value is "". Raises ValueError if a quote or bracket is not closed.
    """
    text = text.strip()
    value, end = _value(text, 0, "")
    if text[end:].strip():
        raise ValueError(f"{text[end:].strip()!r} follows the value")
    return value


def _value(text: str, at: int, stops: str) -> tuple[Any, int]:
    at = _blanks(text, at)
    char = text[at : at + 1]
    if char in ("'", '"'):
        end = at + 1
        while text[end : end + 1] != char:
            if end >= len(text):
                raise ValueError(f"{char} is not closed")
            end += 2 if text[end] == "\\" else 1
        return text[at + 1 : end].replace("\\" + char, char), end + 1
    if char in ("[", "{"):
        close = "]" if char == "[" else "}"
        items: list[Any] = []
        at = _blanks(text, at + 1)
        while text[at : at + 1] != close:
            key, at = _value(text, at, ",:" + close if char == "{" else "," + close)
            at = _blanks(text, at)
            if char == "{" and text[at : at + 1] == ":":
                value, at = _value(text, at + 1, "," + close)
                items.append((key, value))
                at = _blanks(text, at)
            else:
                items.append((key, None) if char == "{" else key)
            if text[at : at + 1] == ",":
                at = _blanks(text, at + 1)
            elif text[at : at + 1] != close:
                raise ValueError(f"{char} is not closed")
        return (items if char == "[" else dict(items)), at + 1
    if text.startswith("${", at):
        end = text.find("}", at) + 1
        if not end:
            raise ValueError("${ is not closed")
        return text[at:end], end
    end = at
    while end < len(text) and text[end] not in stops:
        end += 1
    return _primitive(text[at:end].strip()), end


def _blanks(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _primitive(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
