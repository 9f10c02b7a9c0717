"""Digests of parameters and states that do not depend on the mesh, and see a single flipped bit.

Of each leaf two sums of its bit pattern, modulo 2^32: plain, and with each element's index, counted
from 1, as its weight. Sums of whole numbers come out the same in any order, so a leaf has one
digest however it is laid out. The plain sum sees any single change; the weighted one sees
elements that have changed places, too.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def _sums(leaves: Sequence[Array]) -> UInt32[Array, "leaves 3"]:
    """Plain sum, weighted sum, and how many elements are not finite."""
    return jnp.stack([_leaf_sums(x) for x in leaves])


def _leaf_sums(x: Array) -> UInt32[Array, "3"]:
    bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    unsound = ~jnp.isfinite(x) if is_float else jnp.zeros(x.shape, bool)
    zero = jnp.uint32(0)
    # All sums in one pass: on a CPU 20 times as fast as one after the other.
    sums = jax.lax.reduce(
        (bits, bits * (index + 1), unsound.astype(jnp.uint32)),
        (zero, zero, zero),
        lambda a, b: tuple(map(jnp.add, a, b)),
        tuple(range(x.ndim)),
    )
    return jnp.stack(sums)


def leaf_digests(tree: Any) -> dict[str, str]:
    """Of each leaf, by its path with slashes: 16 hex digits."""
    return {name: digest for name, (digest, _) in _by_leaf(tree).items()}


def params_digest(tree: Any) -> tuple[str, dict[str, str], str]:
    """One digest of the whole tree, those of its leaves, and the first leaf with a number that is
    not finite ("" if there is none)."""
    found = _by_leaf(tree)
    leaves = {name: digest for name, (digest, _) in found.items()}
    unsound = next((name for name, (_, count) in found.items() if count), "")
    return combined(leaves), leaves, unsound


def combined(leaves: Mapping[str, str]) -> str:
    """One digest of those of leaves."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(leaves.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _by_leaf(tree: Any) -> dict[str, tuple[str, int]]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    sums = np.asarray(_sums([x for _, x in paths]))
    return {
        name: (f"{plain:08x}{weighted:08x}", int(unsound))
        for name, (plain, weighted, unsound) in zip(names, sums.tolist(), strict=True)
    }
