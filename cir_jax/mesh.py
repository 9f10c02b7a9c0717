"""The device mesh and the one table from logical axes to mesh axes.

Training runs device by device over the rows' axes, `data` and `fsdp` (see `over_rows`): there,
parameters are shards, which `gather` makes whole layer by layer. The axis `tensor` is left to the
compiler, which follows `constrain`; so are all axes in decoding.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cir_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "layers": (),
    "batch": ROWS,
    "length": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (None: those that jax sees); ConfigError if the axes' product is not
    their number.

    A host's devices are neighbours in it, so that those that share a row are of one host.
    """
    found = list(jax.devices() if devices is None else devices)
    if cfg.num_devices != len(found):
        raise ConfigError(
            f"mesh={cfg.shape} (data, fsdp, tensor): needs {cfg.num_devices} devices, "
            f"but {'jax sees' if devices is None else 'the topology has'} {len(found)}"
        )
    found.sort(key=lambda device: (device.process_index, device.id))
    return _mesh(np.array(found), cfg, "tensor")


def _mesh(devices: np.ndarray, cfg: MeshConfig, key: str) -> Mesh:
    """key: that cfg.tensor is from."""
    owners = [device.process_index for device in devices.flat]
    if any(len(set(of_row)) > 1 for of_row in np.reshape(owners, (-1, cfg.tensor))):
        raise ConfigError(
            f"mesh.{key}={cfg.tensor}: must divide the devices of a process, "
            f"{owners.count(owners[0])}: each process has rows of its own"
        )
    return Mesh(devices.reshape(cfg.shape), AXES, axis_types=(AxisType.Auto,) * 3)


def decoding_mesh(mesh: Mesh, cfg: MeshConfig) -> Mesh:
    """The same devices, in the same order, as rollouts use them: programs may go from one mesh to
    the other."""
    if cfg.decode_tensor is None:
        return mesh
    return _mesh(mesh.devices, cfg.decoding, "decode_tensor")


def spec(*axes: str | None, among: Iterable[str] = AXES) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes, as far as the mesh axes `among` go.

    A mesh axis used twice raises ValueError.
    """
    entries = [tuple(m for m in RULES[axis] if m in among) for axis in axes]
    used = [m for entry in entries for m in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map to a mesh axis twice: {used}")
    # A single axis bare: a spec with a tuple of one compares as another one.
    return PartitionSpec(*(e[0] if len(e) == 1 else e or None for e in entries))


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for x to be laid out by its logical axes on the mesh of `jax.set_mesh`, if any."""
    auto = _abstract_mesh().auto_axes
    return jax.lax.with_sharding_constraint(x, spec(*axes, among=auto)) if auto else x


def platform() -> str:
    """cpu, gpu or tpu: what the mesh of `jax.set_mesh` is made of, which need not be here."""
    device = _abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def _abstract_mesh() -> AbstractMesh:
    return jax.sharding.get_abstract_mesh()


# --- between this process and the devices


def num_row_shards() -> int:
    """Devices, or groups of such along `tensor`, that have rows of their own."""
    mesh = _abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in ROWS) if mesh.shape else 1


def put_rows(tree: Any) -> Any:
    """Arrays of this process's rows, as arrays of all processes' rows on the mesh, if any."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jnp.asarray, tree)
    rows = sharding(mesh, "batch")
    if jax.process_count() == 1:
        return jax.device_put(tree, rows)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), tree)


def own_rows(tree: Any) -> Any:
    """The reverse: of arrays [rows, ...] those of this process, of numbers the number."""

    def own(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.ndim == 0:
            return np.asarray(x)
        # Devices along `tensor` hold the same rows.
        parts = {shard.index[0].start: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    for x in jax.tree.leaves(tree):
        x.copy_to_host_async()
    return jax.tree.map(own, tree)


def put_same(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that each process has the whole of."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda at: x[at]), tree
    )


def whole(x: jax.Array) -> np.ndarray:
    """The reverse: all of an array, on each process."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


# --- device by device


def over_rows(f: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """f, run by every device of the axes `data` and `fsdp` on its own part.

    in_axes, out_axes: as f's arguments and results, a tuple of logical axes for each array (or
    one for a whole subtree). Without a mesh f is run as it is.
    """
    return _over(f, in_axes, out_axes, [m for m in ROWS if m in _abstract_mesh().auto_axes])


def over_auto(f: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """The same over all axes that are left to the compiler so far: for kernels it cannot split."""
    return _over(f, in_axes, out_axes, _abstract_mesh().auto_axes)


def _over(f: Callable, in_axes: Any, out_axes: Any, mesh_axes: Iterable[str]) -> Callable:
    if not mesh_axes:
        return f

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda axes: spec(*axes, among=mesh_axes), tree, is_leaf=is_axes)

    return jax.shard_map(
        f,
        in_specs=specs(in_axes),
        out_specs=specs(out_axes),
        axis_names=set(mesh_axes),
        check_vma=False,
    )


def is_axes(x: Any) -> bool:
    """Whether x is the logical axes of one array."""
    return type(x) is tuple and all(axis is None or isinstance(axis, str) for axis in x)


def num_shards() -> int:
    """Devices that share the parameters, where each runs on its own; else 1."""
    return jax.lax.axis_size("fsdp") if _inside() else 1


def _inside() -> bool:
    return "fsdp" in _abstract_mesh().manual_axes


def gather(w: jax.Array, axes: tuple[str | None, ...], dtype: jnp.dtype) -> jax.Array:
    """The whole of a weight with these logical axes, in another type, for one layer's use.

    Cast before it is gathered, so that no more than needed travels. Its gradient is summed and
    scattered back over `fsdp` in that type; `sum_replicas` has to do the rest.
    """
    shared = [d for d, axis in enumerate(axes) if "fsdp" in RULES[axis]]
    if not shared or num_shards() == 1:
        return w.astype(dtype)
    return _gather(w, shared[0], jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w: jax.Array, dim: int, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.all_gather(w.astype(dtype), "fsdp", axis=dim, tiled=True)


def _gather_fwd(w, dim, dtype):
    return _gather(w, dim, dtype), jnp.zeros((), w.dtype)


def _gather_bwd(dim, dtype, like, grad):
    return (sum_to_own_part(grad, dim).astype(like.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def sum_replicas(grad: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The sum of a parameter's gradients over the devices that hold the same part of it."""
    if not _inside():
        return grad
    held_apart = {m for axis in axes for m in RULES[axis]}
    return sum_over(grad, tuple(m for m in ROWS if m not in held_apart))


def sum_over(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    """The sum over the devices of mesh axes, where each runs on its own part.

    On CPUs floats are added in the devices' order. There, the collective adds them in another one
    when several processes hold them, and what Adam makes of the last bits of gradients that almost
    cancel out can be seen in the next step's figures.
    """
    if not _adds_in_order(x, axes):
        return jax.lax.psum(x, axes)
    return jnp.sum(jax.lax.all_gather(x, axes), axis=0, dtype=x.dtype)


def sum_to_own_part(x: jax.Array, dim: int) -> jax.Array:
    """The sum over `fsdp`, of which each device gets its part along a dimension.

    For TPUs in groups of four, and with that dimension first: otherwise XLA gives all of the sum
    to all devices, which costs twice the traffic, and waits for it.
    """
    if _adds_in_order(x, "fsdp"):
        size = x.shape[dim] // num_shards()
        start = jax.lax.axis_index("fsdp") * size
        return jax.lax.dynamic_slice_in_dim(sum_over(x, "fsdp"), start, size, dim)
    if platform() != "tpu":
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=dim, tiled=True)
    x = jnp.moveaxis(x, dim, 0)
    for groups in _nested_groups(num_shards()):
        x = jax.lax.psum_scatter(x, "fsdp", tiled=True, axis_index_groups=groups)
    return jnp.moveaxis(x, 0, dim)


def _nested_groups(size: int) -> list[list[list[int]]]:
    """Groups of the numbers below size, such that parts of parts are parts of the whole in order.

    Of four, a host's devices, then of four such groups and so on, the largest strides first.
    """
    sides: list[int] = []
    while size % 4 == 0 and size > 4:
        sides, size = [4, *sides], size // 4
    sides = [size, *sides]
    numbers = np.arange(math.prod(sides)).reshape(sides)
    return [np.moveaxis(numbers, n, -1).reshape(-1, sides[n]).tolist() for n in range(len(sides))]


def _adds_in_order(x: jax.Array, axes: str | tuple[str, ...]) -> bool:
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return is_float and bool(axes) and jax.lax.axis_size(axes) > 1 and platform() == "cpu"


def each_tensor_shard(x: jax.Array) -> jax.Array:
    """[S, ...]: x of each device of the axis `tensor`, where each runs on its own part; else of
    this one alone."""
    return jax.lax.all_gather(x, "tensor") if _on_tensor_shards() else x[None]


def tensor_shard() -> jax.Array | int:
    """Which of those devices this is."""
    return jax.lax.axis_index("tensor") if _on_tensor_shards() else 0


def _on_tensor_shards() -> bool:
    return "tensor" in _abstract_mesh().manual_axes


def sum_rows(x: jax.Array) -> jax.Array:
    """The sum over all devices that run on rows of their own."""
    return sum_over(x, ROWS) if _inside() else x


def max_rows(x: jax.Array) -> jax.Array:
    """The largest over those devices."""
    return jax.lax.pmax(x, ROWS) if _inside() else x
