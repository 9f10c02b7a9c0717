"""Configs in files: a TOML file with overrides becomes a Config, a run directory keeps it."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from cir_jax.config.errors import ConfigError, missing_file, one_line, unknown_key, wrong_value
from cir_jax.config.keys import all_keys, toml_text
from cir_jax.config.presets import preset
from cir_jax.config.sections import Config

CONFIG_FILE = "config.json"
BASE = "base"
PACKAGE_PREFIX = "package:"
ASSETS = Path(__file__).parent.parent / "assets"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies `key.path=value` overrides and checks everything.

    A file whose key `base` names another, from its own directory, changes that one's keys.

    Raises ConfigError with one line naming the key, its value and the nearest valid name.
    """
    return from_tree(_with_overrides(path, overrides))


def load_alone(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The same, whether or not the directories and files that it names are here."""
    return from_tree_alone(_with_overrides(path, overrides))


def _with_overrides(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    tree = _read(Path(path))
    for override in overrides:
        _set(tree, *_parse_override(override))
    return tree


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """above: the files whose base this one is."""
    if path.is_dir():
        raise ConfigError(f"config={str(path)!r}: is a directory, must be a TOML file")
    if not path.is_file():
        raise ConfigError(missing_file("base" if above else "config", path))
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not a TOML file: {_toml_error(error, text)}") from error
    if BASE not in tree:
        return tree
    base = tree.pop(BASE)
    if not isinstance(base, str):
        raise ConfigError(wrong_value(BASE, base, "must be a string, in quotes"))
    above += (path.resolve(),)
    if (path.parent / base).resolve() in above:
        raise ConfigError(f"{path}: {BASE}={base!r}: is a base of itself")
    return _merged(_read(path.parent / base, above), tree)


def _merged(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Tables key by key; everything else is the tree's."""
    both = base.keys() & tree.keys()
    tables = {k for k in both if isinstance(base[k], dict) and isinstance(tree[k], dict)}
    return base | tree | {key: _merged(base[key], tree[key]) for key in tables}


def override(cfg: Config, overrides: Sequence[str]) -> Config:
    """The config with `key.path=value` overrides applied; they cannot name a preset.

    Raises ConfigError with one line naming the key, its value and the nearest valid name.
    """
    return with_values(cfg, dict(map(_parse_override, overrides)))


def with_values(cfg: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values at some keys, given as `key.path`; raises as `override`."""
    tree = to_tree(cfg)
    for key, value in values.items():
        if key == "model.preset":
            # It would silently lose against every field.
            raise ConfigError(
                wrong_value(key, value, "no effect here, every other key of [model] is given")
            )
        if key not in all_keys():
            raise ConfigError(unknown_key(key, value))
        _set(tree, key, value)
    return from_tree(tree)


def check_key(name: str, key: str) -> None:
    """ConfigError if the key, that `name` lists, is none."""
    if key not in all_keys():
        raise ConfigError(f"{name}: {unknown_key(key, None).replace('=null', '')}")


def from_tree(tree: dict[str, Any]) -> Config:
    """A Config of plain nested values; lists stand for tuples.

    Raises ConfigError with one line naming the key, its value and the nearest valid name.
    """
    cfg = from_tree_alone(tree)
    for key, value in (("tokenizer", cfg.tokenizer), ("sft.weights", cfg.sft.weights)):
        if value and not asset_dir(value).is_dir():
            raise ConfigError(missing_file(key, asset_dir(value)))
    files = [("sft.data", path) for path in cfg.sft.data]
    for key, value in (*files, ("data.curriculum", cfg.data.curriculum)):
        if value and not Path(value).is_file():
            raise ConfigError(missing_file(key, Path(value)))
    return cfg


def from_tree_alone(tree: dict[str, Any]) -> Config:
    """As `from_tree`, whether or not the directories and files that it names are here."""
    tree = _with_preset(tree)
    try:
        return Config.model_validate(_tuples(tree))
    except pydantic.ValidationError as error:
        raise ConfigError(one_line(error, tree)) from error


def to_tree(cfg: Config) -> dict[str, Any]:
    """The resolved config as plain nested values (JSON types)."""
    return cfg.model_dump(mode="json")


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that differ, each with both values."""
    return tree_differences(to_tree(one), to_tree(other))


def tree_differences(one: Any, other: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """The same of plain nested values; None stands for what is not there.

    key: dotted, where both are from.
    """
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {key: (one, other)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in one | other:
        inner = f"{key}.{name}" if key else name
        found |= tree_differences(one.get(name), other.get(name), inner)
    return found


def asset_dir(path: str) -> Path:
    """Directory that a config names: package:NAME is one shipped with cir_jax."""
    if path.startswith(PACKAGE_PREFIX):
        return ASSETS / path.removeprefix(PACKAGE_PREFIX)
    return Path(path)


def save_run(cfg: Config, run_dir: Path) -> None:
    """Writes the resolved config into a run directory."""
    text = json.dumps(to_tree(cfg), indent=1) + "\n"
    # Put in its place as a whole: a process may be killed at any moment.
    aside = run_dir / f"{CONFIG_FILE}.tmp"
    aside.write_text(text, encoding="utf-8")
    aside.replace(run_dir / CONFIG_FILE)


def load_run(run_dir: Path) -> Config:
    """The resolved config that a run directory was made with."""
    if not holds_run(run_dir):
        missing = run_dir / CONFIG_FILE if run_dir.is_dir() else run_dir
        raise ConfigError(missing_file("RUN_DIR", missing))
    return from_tree(json.loads((run_dir / CONFIG_FILE).read_text(encoding="utf-8")))


def holds_run(run_dir: Path) -> bool:
    return (run_dir / CONFIG_FILE).exists()


def holds_weights(directory: Path) -> bool:
    """Whether it is a directory of weights as Hugging Face's are, and `cir-jax import-hf`'s."""
    return any(directory.glob("model.safetensors*"))


def weights_in(directory: Path) -> list[str]:
    """What tells the weights of a directory, or of a run, from others that it may hold later."""
    if holds_weights(directory):
        return sorted(f"{p.name}: {p.stat().st_size}" for p in directory.glob("*.safetensors*"))
    return sorted(p.name for p in (directory / "checkpoints").glob("[0-9]*"))


def _toml_error(error: tomllib.TOMLDecodeError, text: str) -> str:
    """The parser's message, which names a line by number if at all, with that line's text."""
    at = re.search(r"at line (\d+)", str(error))
    lines = text.splitlines()
    number = int(at.group(1)) if at else len(lines)
    shown = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    return f"{error}: {shown!r}"


def _with_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with a preset's values in the place of model.preset, below the keys beside it."""
    model = tree.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return tree
    name = model["preset"]
    if not isinstance(name, str):
        raise ConfigError(wrong_value("model.preset", name, "must be a string, in quotes"))
    try:
        values = preset(name).model_dump()
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    given = {key: value for key, value in model.items() if key != "preset"}
    return tree | {"model": values | given}


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key.path=value")
    value = _parse_value(text.strip())
    if key == BASE:
        raise ConfigError(wrong_value(key, value, "no effect here, only in a file"))
    if key not in all_keys():
        raise ConfigError(unknown_key(key, value))
    return key, value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents, start=1):
        section = ".".join(parents[:depth])
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{section}={toml_text(tree)}: must be a table [{section}]")
    tree[leaf] = value


def _parse_value(text: str) -> Any:
    """A TOML value; anything that is none is taken as a bare string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    return value
