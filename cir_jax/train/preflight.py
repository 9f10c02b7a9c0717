"""What all processes of a run have to have in common, before the first of them waits for another.

Two hosts with different programs, data or settings compute nonsense together, or wait forever.
"""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cir_jax import config as configs
from cir_jax import hosts
from cir_jax.config import Config
from cir_jax.train.stopping import exit_code, is_agreed

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "grain")
_PACKAGES += ("transformers", "sympy", "math-verify", "reasoning-gym")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Larger files count by their size alone: weights have a digest of their own later.
_MAX_BYTES = 2**28


def with_others(cfg: Config) -> AbstractContextManager[None]:
    """With the other processes of the run, if there are any (hosts.py)."""
    return hosts.joined(cfg.hosts, lambda: facts(cfg), exit_code, is_agreed)


def facts(cfg: Config) -> dict[str, str]:
    """Each key of the config, versions, code, the files that the config names, flags."""
    found = {key: repr(value) for key, value in _flat(configs.to_tree(cfg), "")}
    found["python"] = platform.python_version()
    found |= {f"version of {name}": _version(name) for name in _PACKAGES}
    package = Path(configs.__file__).parent.parent
    found["code of cir_jax"] = digest(package.rglob("*.py"), package)
    # By key alone: those that come with the package lie where each host has it.
    found |= {
        f"files of {key}": digest(_files(value), Path(value).parent)
        for key, value in _named_files(cfg)
    }
    return found | {f"environment's {name}": os.environ.get(name, "") for name in _VARIABLES}


def digest(paths: Iterable[Path], root: Path) -> str:
    """Of the files' contents and their names as seen from root; "none" if there is none."""
    total = hashlib.blake2b(digest_size=8)
    names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
    for name in names:
        path = root / name
        size = path.stat().st_size
        total.update(f"{name} {size}\n".encode())
        if size <= _MAX_BYTES:
            total.update(path.read_bytes())
    return total.hexdigest() if names else "none"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _flat(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield key, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{key}.{name}" if key else name)


def _named_files(cfg: Config) -> list[tuple[str, str]]:
    """Keys of inputs, with what they name: data, tokenizer, weights."""
    keys = [("tokenizer", cfg.tokenizer), ("sft.weights", cfg.sft.weights)]
    keys += [("data.curriculum", cfg.data.curriculum)]
    for key, names in (
        ("sft.data", cfg.sft.data),
        ("data.files", cfg.data.files),
        ("data.eval_files", cfg.data.eval_files),
    ):
        keys += [(f"{key}[{i}]", name) for i, name in enumerate(names)]
    return [(key, str(configs.asset_dir(value))) for key, value in keys if value]


def _files(name: str) -> Iterable[Path]:
    path = Path(name)
    return path.rglob("*") if path.is_dir() else [path]
