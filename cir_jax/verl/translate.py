"""A veRL launch as a config of ours, with a report of what became of each key."""

import dataclasses
import difflib
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from cir_jax import config as configs
from cir_jax.config import ConfigError
from cir_jax.config.keys import all_keys, toml_text
from cir_jax.data import tasks as task_kinds
from cir_jax.verl import hydra
from cir_jax.verl.keys import KEYS, Category, Launch, Outcome, key_of
from cir_jax.verl.shell import Command, Unknown

# Configurations whose defaults those of KEYS are.
_CONFIG_NAMES = {"ppo_trainer", "ppo_megatron_trainer"}
_MODULES = {"main_ppo", "main_dapo"}


@dataclasses.dataclass(frozen=True)
class Line:
    """Of the report. given: the launch says the value; else it is veRL's own."""

    key: str
    value: str
    given: bool
    outcome: Outcome

    def __str__(self) -> str:
        own = "" if self.given else " (veRL's own)"
        return f"{self.key}={self.value}{own}: {self.outcome.text}"


@dataclasses.dataclass(frozen=True)
class Translation:
    """settings: our keys, each with its value and the veRL key that it is from."""

    settings: dict[str, tuple[Any, str]]
    report: tuple[Line, ...]

    def lines(self, *categories: Category) -> list[Line]:
        return [line for line in self.report if line.outcome.category in categories]


def translate(
    command: Command,
    *,
    tasks: Sequence[str] = (),
    weights: str = "",
    name: str,
) -> Translation:
    """The config of a launch.

    tasks: to train on in place of the launch's files. weights: directory of the model's weights
      and tokenizer, if not the launch's. name: of the run, unless the launch says one.

    Raises ConfigError naming the argument or key that cannot be read.
    """
    if command.module not in _MODULES:
        known = ", ".join(sorted(_MODULES))
        raise ConfigError(f"{command.module}: is not a trainer of veRL's PPO ({known})")
    task_kinds.check_names(tasks)
    try:
        overrides, options = hydra.parse(command.arguments)
    except ValueError as error:
        raise ConfigError(f"import-verl: {error}") from None
    given: dict[str, hydra.Override] = {}
    for override in overrides:
        # The last one wins; ~key takes back what was said before.
        given.pop(override.key, None)
        given[override.key] = override
    values = {
        key: _resolved(override, given) for key, override in given.items() if not override.deleted
    }
    # A value that is not known gives way to one that is, such as an argument of the script.
    unknown = {entry.key: entry for entry in command.unknown if entry.key not in given}
    given |= {key: hydra.Override(key, entry.text, entry.text) for key, entry in unknown.items()}
    values |= {key: entry.text for key, entry in unknown.items()}
    launch = Launch(values, tuple(tasks), weights)
    for entry in unknown.values():
        _check_unknown(entry, launch)
    report = [_option(option) for option in options]
    settings: dict[str, tuple[Any, str]] = {"name": (name, "")}
    unset = [key for key, entry in KEYS.items() if entry.always and key not in values]
    # veRL's own values first: what the launch says wins over them.
    for key in (*unset, *given):
        override = given.get(key)
        line = _line(key, override, launch)
        report.append(line)
        for ours, value in line.outcome.settings.items():
            settings[ours] = (value, key if override else f"{key}, veRL's own")
    return Translation(settings, tuple(report))


def _check_unknown(unknown: Unknown, launch: Launch) -> None:
    """Raises ConfigError unless the launch is understood without the value."""
    entry = key_of(unknown.key)
    if entry and entry.nameable:
        return
    try:
        if entry and entry.rule(unknown.text, launch).category == "ignored":
            return
    except (ValueError, TypeError):
        pass
    raise ConfigError(f"{unknown.key}={unknown.text}: {unknown.reason}")


def _line(key: str, override: hydra.Override | None, launch: Launch) -> Line:
    entry = key_of(key)
    default = KEYS[key].default if entry and not override else ""
    text = override.text if override else str(default)
    if entry is None:
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
        outcome = Outcome("unknown", f"unknown key{f'; nearest: {near[0]}' if near else ''}")
    elif override and override.deleted:
        outcome = Outcome("lacking", "a key cannot be taken away")
    else:
        try:
            outcome = entry.rule(launch.values[key] if override else entry.default, launch)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{key}={text}: {error}") from error
    return Line(key, text, override is not None, outcome)


def _resolved(override: hydra.Override, given: dict[str, hydra.Override]) -> Any:
    """The value; of `${other.key}`, that key's."""
    seen = {override.key}
    value = override.value
    while isinstance(value, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        other = match[1]
        if other in seen or not (other in given or other in KEYS):
            raise ConfigError(f"{override.key}={override.text}: {other} has no value")
        seen.add(other)
        value = given[other].value if other in given else KEYS[other].default
    return value


def _option(option: str) -> Line:
    flag, _, value = option.partition("=")
    if flag == "--config-name" and value.removesuffix(".yaml") not in _CONFIG_NAMES:
        text = "values of keys that are left out, which are taken to be ppo_trainer's"
        outcome = Outcome("lacking", text)
    elif flag in ("--config-name", "--config-path", "--config-dir"):
        outcome = Outcome("ignored", "where hydra finds its files")
    else:
        outcome = Outcome("unknown", "unknown option")
    return Line(flag, value, True, outcome)


def to_toml(translation: Translation, header: Sequence[str]) -> str:
    """The config as a file, each key with the one that it is from. header: lines of its comment.

    Raises ConfigError if it is not a config, whatever its directories hold.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    order = {key: place for place, key in enumerate(all_keys())}
    for key in sorted(translation.settings, key=order.__getitem__):
        value, source = translation.settings[key]
        *parents, leaf = key.split(".")
        table = tree
        for part in parents:
            table = table.setdefault(part, {})
        table[leaf] = value
        sources[key] = source
    # Weights may be yet to import: any directory stands for them here.
    configs.from_tree(tree | {"tokenizer": "package:", "sft": {}})
    lines = []
    for line in header:
        indent = "  " * (len(line) - len(line.lstrip(" ")))
        wrapped = textwrap.wrap(
            line, 98, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        lines += [f"# {part}".rstrip() for part in wrapped or [""]]
    return "\n".join([*lines, *_tables(tree, sources, "")]) + "\n"


def _tables(table: dict[str, Any], sources: dict[str, str], prefix: str) -> list[str]:
    """A table's own keys, then the tables in it."""
    lines = []
    inner = []
    for key, value in table.items():
        if isinstance(value, dict):
            inner += ["", f"[{prefix}{key}]", *_tables(value, sources, f"{prefix}{key}.")]
        else:
            source = sources[prefix + key]
            lines.append(f"{key} = {toml_text(value)}" + (f"  # {source}" if source else ""))
    return lines + inner
