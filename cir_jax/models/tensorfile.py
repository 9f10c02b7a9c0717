"""Safetensors files, read and written one tensor at a time.

The safetensors package maps whole files (pages that count as this process's memory) and saves
only tensors that are all in memory; models larger than memory need neither.
Format: 8 bytes with the header's length, little-endian; the header, JSON; the tensors' bytes.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"


class Stored(NamedTuple):
    """Where a tensor lies. dtype: a name of the format, which may be none of DTYPES."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises ValueError if it is truncated or no safetensors."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file}: truncated, or no safetensors file: the header is cut off")
        text = opened.read(length)
    try:
        header = json.loads(text)
        header.pop(_METADATA, None)
        tensors = {
            name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: no safetensors file: its header is not readable") from error
    for name, (dtype, shape, begin, end) in tensors.items():
        if end > size - 8 - length:
            raise ValueError(
                f"{file}: truncated: tensor {name} ends at byte {8 + length + end} of {size}"
            )
        if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(
                f"{file}: tensor {name} has {end - begin} bytes, which is not {dtype} {shape}"
            )
    return {
        name: Stored(file, dtype, shape, 8 + length + begin)
        for name, (dtype, shape, begin, _) in tensors.items()
    }


def read(tensor: Stored) -> np.ndarray:
    """The values, in an array of their own."""
    value = np.empty(tensor.shape, DTYPES[tensor.dtype])
    left = memoryview(value.reshape(-1).view(np.uint8))
    with tensor.file.open("rb", buffering=0) as opened:
        opened.seek(tensor.start)
        # One call reads 2 GiB at most.
        while left:
            count = opened.readinto(left)
            if not count:
                raise ValueError(f"{tensor.file}: ends within a tensor that its header names")
            left = left[count:]
    return value


def write(
    file: Path,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    value_of: Callable[[str], np.ndarray],
) -> None:
    """Writes the tensors in their order, asking for one value at a time."""
    header, end = {_METADATA: {"format": "pt"}}, 0
    for name, x in tensors.items():
        begin, end = end, end + num_bytes(x)
        header[name] = {
            "dtype": _NAMES[np.dtype(x.dtype)],
            "shape": list(x.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name, x in tensors.items():
            value = value_of(name)
            assert (value.shape, value.dtype) == (x.shape, x.dtype), name
            opened.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8))


def num_bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
