"""A jitted function with the arguments that a run gives it, as shapes, types and layouts.

Trainer and engine take their functions from the modules that list them so (`rollout/compiled.py`,
`train/compiled.py`), and `cir-jax aot` compiles what these list: one place says what is compiled.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from cir_jax import mesh as meshes


class Jitted(NamedTuple):
    """mesh: that of `jax.set_mesh` when it runs. held: arguments, by their numbers, that the run
    keeps on the devices between its programs, by what they are."""

    name: str
    function: Callable
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    mesh: Mesh
    held: Mapping[int, str]

    def lower(self) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self.function.lower(*self.args, **self.options)


def abstract(mesh: Mesh, axes: Any, tree: Any) -> Any:
    """Shapes and types of the tree's arrays, laid out by logical axes.

    axes: as the tree, a tuple for each array or for a whole subtree.
    """

    def of_subtree(axes: tuple[str | None, ...], tree: Any) -> Any:
        def one(x):
            filled = axes + (None,) * (len(x.shape) - len(axes))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.sharding(mesh, *filled))

        return jax.tree.map(one, tree)

    return jax.tree.map(of_subtree, axes, tree, is_leaf=meshes.is_axes)


def device_bytes(tree: Any) -> int:
    """Of what one device holds of such arrays, with the padding of a TPU's tiles."""

    def one(x: jax.ShapeDtypeStruct) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        shape = [n for n in shape if n > 1]  # axes of one are put before the tiles
        rows = 8 * max(1, 4 // x.dtype.itemsize)
        for at, tile in ((-1, 128), (-2, rows)):
            if len(shape) >= -at and len(shape) > 1:
                shape[at] += -shape[at] % tile
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))
