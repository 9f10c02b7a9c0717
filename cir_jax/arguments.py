"""Kinds of arguments of commands, and how their errors look."""

import argparse
import contextlib
from collections.abc import Iterator

from cir_jax.config import ConfigError


def above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return number


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return number


def part(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0 and at most 1")
    return number


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="override of a config key; the value as in TOML, bare text is a string",
    )


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """What is wrong with files that the user names is no reason for a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"{command}: {error}") from error
