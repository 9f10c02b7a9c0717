"""Every key of a config by its dotted name: what it means, and the help that says so."""

import json
from typing import Any, get_args

import pydantic

from cir_jax.config.base import Section
from cir_jax.config.sections import Config


def section_of(field: pydantic.fields.FieldInfo) -> type[Section] | None:
    """The section that a field holds, if it holds one: `Section` or `Section | None`."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def all_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    keys = [prefix + name for name in section.shorthands]
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if inner := section_of(field):
            keys += all_keys(inner, prefix + name + ".")
    return keys


def meaning(key: str) -> str:
    section: Any = Config
    *parents, leaf = key.split(".")
    for part in parents:
        section = section_of(section.model_fields[part])
    if leaf in section.shorthands:
        return section.shorthands[leaf]
    return " ".join((section.model_fields[leaf].description or f"a table [{key}]").split())


def describe() -> str:
    """Every key with default and meaning, for the command line's help."""
    return "\n".join(_describe(Config, ""))


def _describe(section: type[Section], prefix: str) -> list[str]:
    lines = []
    for name, text in section.shorthands.items():
        lines += [f"  {prefix}{name}  (optional)", f"      {text}"]
    for name, field in section.model_fields.items():
        key = prefix + name
        if inner := section_of(field):
            summary = (inner.__doc__ or "").strip().splitlines()[0]
            lines += ["", f"[{key}]  {summary}", *_describe(inner, key + ".")]
            continue
        default = "required" if field.is_required() else f"default {toml_text(field.default)}"
        text = " ".join((field.description or "").split())
        lines += [f"  {key}  ({default})", f"      {text}"]
    return lines


def toml_text(value: Any) -> str:
    """The value as a config file would write it; null, which TOML lacks, for None."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_text(v) for v in value) + "]"
    if value is None or isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
