"""The device mesh and the one table from logical axes to mesh axes."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cir_jax.config import ConfigError, MeshConfig

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "layers": None,
    "batch": ("data", "fsdp"),
    "length": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(cfg: MeshConfig) -> Mesh:
    """A mesh over all devices; ConfigError if the axes' product is not their number."""
    shape = (cfg.data, cfg.fsdp, cfg.tensor)
    wanted = cfg.data * cfg.fsdp * cfg.tensor
    if wanted != jax.device_count():
        raise ConfigError(
            f"mesh={shape} (data, fsdp, tensor): needs {wanted} devices, "
            f"but jax sees {jax.device_count()}"
        )
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def spec(*axes: str | None) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes; a mesh axis used twice raises."""
    entries = [RULES[axis] for axis in axes]
    used = [m for e in entries if e for m in ((e,) if isinstance(e, str) else e)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map to a mesh axis twice: {used}")
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for x to be laid out by its logical axes on the mesh of `jax.set_mesh`, if any."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))
