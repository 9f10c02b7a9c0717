"""Safetensors files, read and written one tensor at a time, or some rows of one.

The safetensors package maps whole files (pages that count as this process's memory) and saves
only tensors that are all in memory; models larger than memory need neither.
Format: 8 bytes with the header's length, little-endian; the header, JSON; the tensors' bytes.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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
BLOCK_BYTES = 2**22


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


def read(tensor: Stored, first: int = 0, end: int | None = None) -> np.ndarray:
    """The values of the rows from `first` to before `end` (None: the last), in their own array.

    Raises ValueError if the file has become shorter than its header says.
    """
    num_rows, *row = tensor.shape
    value = np.empty(((num_rows if end is None else end) - first, *row), DTYPES[tensor.dtype])
    left = memoryview(value.reshape(-1).view(np.uint8))
    with tensor.file.open("rb", buffering=0) as opened:
        opened.seek(tensor.start + first * math.prod(row) * value.itemsize)
        # One call reads 2 GiB at most.
        while left:
            count = opened.readinto(left)
            if not count:
                raise ValueError(f"{tensor.file}: ends within a tensor that its header names")
            left = left[count:]
    return value


def read_blocks(tensor: Stored) -> Iterator[np.ndarray]:
    """The values, some rows at a time: of BLOCK_BYTES, unless one row has more."""
    num_rows, *row = tensor.shape
    row_bytes = math.prod(row) * DTYPES[tensor.dtype].itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, num_rows, step):
        yield read(tensor, first, min(first + step, num_rows))


def write(
    file: Path,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    blocks_of: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Writes the tensors in their order, asking for one's values at a time, in blocks of rows."""
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
            num_rows = 0
            for block in blocks_of(name):
                assert (block.shape[1:], block.dtype) == (x.shape[1:], x.dtype), name
                opened.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
                num_rows += len(block)
            assert num_rows == x.shape[0], name


def num_bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
