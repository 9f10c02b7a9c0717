"""Memory used again by each save on a CPU, whose updates go on meanwhile.

To touch memory for the first time costs more there than to copy or to write what it holds, above
all on a virtual machine that gives free memory back to its host. While the state itself is written
an update, to which its memory was promised, has to take new memory; and each checkpoint's files go
to new memory of the system, which holds those of the checkpoint before.
"""

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def copied(tree: Any, into: Any) -> Any:
    """Copies of a tree's arrays, to be saved in place of them.

    Args:
      into: copies of before, which are lost; where they fit, their memory is used.
    """
    shapes, old_shapes = (jax.tree.map(lambda x: (x.shape, x.dtype), t) for t in (tree, into))
    return _copy_into(tree, into) if shapes == old_shapes else _copy(tree)


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _copy_into(tree: Any, old: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def uncache(folder: Path) -> None:
    """Frees the memory in which the system holds the files of a folder; nothing if it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
