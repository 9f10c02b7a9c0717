"""Metadata of problems as JSON, for messages to the graders and for stored problems."""

from typing import Any


def pack(value: Any) -> Any:
    """The value as JSON that keeps tuples and keys other than text, which score functions need.

    Raises:
      TypeError: for a type that cannot be kept.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [pack(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    raise TypeError(f"metadata of type {type(value).__name__}")


def unpack(value: Any) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(unpack(item) for item in value["tuple"])
        return {unpack(key): unpack(item) for key, item in value["dict"]}
    return value
