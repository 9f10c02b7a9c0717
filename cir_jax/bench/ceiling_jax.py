"""The ceilings on all devices of a jax mesh; as a contender, both of them.

A process of its own, so that the array that is read does not count as a contender's memory.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cir_jax import mesh as meshes
from cir_jax.bench.ceiling import READ_BYTES, SQUARE, product_rate, read_rate
from cir_jax.bench.contest import Figures, serve
from cir_jax.config import MeshConfig


def wait(f: Callable, *args) -> Callable[[], object]:
    """f(*args), and until the result is there."""
    return lambda: jax.block_until_ready(f(*args))


def products(mesh: Mesh, dtype: str) -> Callable[[], float]:
    """Measures FLOPs/s of large products, in the given type."""
    square = jax.device_put(np.ones((SQUARE, SQUARE), jnp.dtype(dtype)), meshes.sharding(mesh))
    product = wait(jax.jit(jnp.matmul), square, square)
    return lambda: product_rate(product, mesh.size)


def reads(mesh: Mesh) -> Callable[[], float]:
    """Measures bytes/s of a sum over a float32 array, which all devices hold a part of."""
    ones = jax.jit(
        lambda: jnp.ones(READ_BYTES // 4, jnp.float32), out_shardings=meshes.sharding(mesh, "batch")
    )
    read = wait(jax.jit(jnp.sum), ones())
    return lambda: read_rate(read)


def start(*, dtype: str) -> Callable[[], Figures]:
    mesh = meshes.make_mesh(MeshConfig(fsdp=jax.device_count()))
    by_name = {"matmul_flops_per_s": products(mesh, dtype), "read_bytes_per_s": reads(mesh)}
    return lambda: {name: measure() for name, measure in by_name.items()}


if __name__ == "__main__":
    serve(start)
