"""Files of a Hugging Face directory: fetched, written, and where in them each tensor lies.

Weights are in one file or in several with an index; beside them are config.json, and tokenizer
and generation files.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cir_jax.models import tensorfile
from cir_jax.models.tensorfile import Stored
from cir_jax.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
# What goes along with weights: all that is needed to tokenize, and how to end a generation.
COMPANIONS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    GENERATION,
)


def read_json(file: Path) -> Any:
    """Raises ValueError naming the file if it is missing or not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def fetch(source: str) -> Path:
    """A directory as it is; anything else is a hub id, whose files are downloaded.

    Raises ValueError if it is neither, or out of reach.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = [CONFIG, "*.safetensors", INDEX, *COMPANIONS]
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HFValidationError, OSError) as error:
        raise ValueError(
            f"{source!r}: no such directory, and not to be had from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def write_aside(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name when the block is done, and else is removed.

    Raises ValueError if `out` is there and is no empty directory.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"OUT={str(out)!r}: exists; must be new or an empty directory")
    aside = out.parent / f".{out.name}.{os.getpid()}.partial"
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside)
        raise


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer and generation files, and none of the others that may lie beside them.

    A tokenizer without generation settings gets those that end a generation where it says.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(file, target / file.name)
    tokenizes = any((target / name).exists() for name in ("tokenizer.json", "vocab.json"))
    if tokenizes and not (target / GENERATION).exists():
        end = Tokenizer(source).eos_id
        write_json(target / GENERATION, {"eos_token_id": end, "pad_token_id": end})


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Where a directory's tensors lie: one file (transformers prefers it too), or by index.

    Raises ValueError naming the file that is missing or damaged, or that lacks a tensor which the
    index names there.
    """
    if (directory / WEIGHTS).is_file():
        return tensorfile.read_header(directory / WEIGHTS)
    index = directory / INDEX
    if not index.is_file():
        raise ValueError(f"{directory}: holds neither {WEIGHTS} nor {INDEX}")
    try:
        file_of = dict(read_json(index)["weight_map"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{index}: no index: weight_map is missing") from error
    stored: dict[str, Stored] = {}
    for file in sorted(set(file_of.values())):
        if not (directory / file).is_file():
            raise ValueError(f"{index}: names {file}, which is missing")
        header = tensorfile.read_header(directory / file)
        for name in header.keys() & stored.keys():
            raise ValueError(f"{directory / file}: tensor {name} is also in {stored[name].file}")
        stored |= header
    for name, file in file_of.items():
        if name not in stored or stored[name].file.name != Path(file).name:
            raise ValueError(f"{directory / file}: tensor {name} is missing, {INDEX} names it here")
    return stored


def write_tensors(
    directory: Path,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    blocks_of: Callable[[str], Iterable[np.ndarray]],
    shard_bytes: int,
) -> None:
    """Writes one file, or several and an index; asks for one tensor's values at a time.

    shard_bytes: a file holds no more, unless one tensor does.
    """
    shards = _split(tensors, shard_bytes)
    file_of = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = WEIGHTS if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensorfile.write(directory / file, {name: tensors[name] for name in names}, blocks_of)
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(map(tensorfile.num_bytes, tensors.values()))
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})


def _split(tensors: Mapping[str, jax.ShapeDtypeStruct], shard_bytes: int) -> list[list[str]]:
    """Names in order, as many to a file as fit."""
    shards: list[list[str]] = [[]]
    left = shard_bytes
    for name, x in tensors.items():
        size = tensorfile.num_bytes(x)
        if size > left and shards[-1]:
            shards.append([])
            left = shard_bytes
        shards[-1].append(name)
        left -= size
    return shards
