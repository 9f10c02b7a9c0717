"""HBM traffic of decode loops compiled for v5e."""

import pytest
import tpu

from cir_jax.aot import hlo

# A decode loop on four devices with 4 key heads, one to each, and 2 queries a head. On a device, in
# bytes: keys and values of a layer are B x S x H x 2 = 2^27 each, what v5e's VMEM holds. A layer's
# weights: q D x 2 x H, k and v D x H, o 2 x H x D, up and down D x F / 4, times 2.
L, B, K, R, S, H, D, F = 4, 64, 4, 2, 8192, 128, 2048, 8192
LAYER = B * S * H * 2
CACHE = 2 * L * LAYER
WEIGHTS = L * (6 * D * H + 2 * D * F // 4) * 2
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P

kind, topology, (L, B, K, R, S, H, D, F) = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology)
mesh = topologies.make_mesh(devices, (4,), ("x",))

def array(*shape, split=None, dtype=jnp.bfloat16):
    spec = P(*("x" if i == split else None for i in range(len(shape))))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

weights = {
    "q": array(L, D, K, R, H, split=2), "k": array(L, D, K, H, split=2),
    "v": array(L, D, K, H, split=2), "o": array(L, K, R, H, D, split=1),
    "up": array(L, D, F, split=2), "down": array(L, F, D, split=1),
}
cache = (array(L, B, K, S, H, split=2),) * 2
rows = jnp.arange(B)

def layer(w, x, position, write, read):
    q = jnp.einsum("bd,dkrh->bkrh", x, w["q"])
    cache = write(jnp.einsum("bd,dkh->bkh", x, w["k"]), jnp.einsum("bd,dkh->bkh", x, w["v"]))
    k, v = read(cache)
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32)
    seen = jnp.arange(S) <= position[:, None, None, None]
    p = jax.nn.softmax(jnp.where(seen, scores, -1e30)).astype(x.dtype)
    x = x + jnp.einsum("bkrs,bksh,krhd->bd", p, v, w["o"], optimize=[(0, 1), (0, 1)])
    return x + jax.nn.silu(x @ w["up"]) @ w["down"], cache

SET = dict(mode="promise_in_bounds", unique_indices=True)

def in_carry(weights, x, cache, position):
    def one(l, carry):
        x, cache = carry
        def write(*new):
            return [c.at[l, rows, :, position].set(n, **SET) for c, n in zip(cache, new)]
        def read(cache):
            return [jax.lax.dynamic_index_in_dim(c, l, keepdims=False) for c in cache]
        x, cache = layer(jax.tree.map(lambda w: w[l], weights), x, position, write, read)
        return x, tuple(cache)
    return jax.lax.fori_loop(0, L, one, (x, cache))

def in_scan(weights, x, cache, position):
    def one(x, inputs):
        w, *cache = inputs
        def write(*new):
            return [c.at[rows, :, position].set(n, **SET) for c, n in zip(cache, new)]
        x, cache = layer(w, x, position, write, lambda cache: cache)
        return x, tuple(cache)
    return jax.lax.scan(one, x, (weights, *cache))

def decode(weights, cache, x, position, steps):
    def step(carry):
        n, x, cache, position = carry
        x, cache = (in_scan if kind == "scan" else in_carry)(weights, x, cache, position)
        return n + 1, x, cache, position + 1
    return jax.lax.while_loop(lambda c: c[0] < steps, step, (0, x, cache, position))

donated = () if kind == "not donated" else 1
compiled = jax.jit(decode, donate_argnums=donated).lower(
    weights, cache, array(B, D), array(B, dtype=jnp.int32), array(dtype=jnp.int32)
).compile()
print(json.dumps(compiled.as_text()))
"""
STEP = "jit(decode)/while"


def decode_loop(kind):
    return hlo.parse(tpu.run(PROGRAM, kind, "v5e:2x2", (L, B, K, R, S, H, D, F)))


@pytest.mark.tpu
def test_a_decode_step_reads_weights_and_cache_once():
    compiled = decode_loop("carry")
    # Of the program with one step: the compiler may load a small weight once for all steps.
    once = hlo.traffic(compiled, trips={STEP: 1}, loop=None)
    assert CACHE + WEIGHTS <= once.read <= 1.01 * (CACHE + WEIGHTS), str(once)
    assert once.written < 0.01 * CACHE, str(once)
    step = hlo.traffic(compiled, trips={}, loop=STEP)
    assert 0.98 * (CACHE + WEIGHTS) <= step.read <= once.read, str(step)
    assert hlo.large_writes(compiled, LAYER // 8, loop=None) == []


@pytest.mark.tpu
def test_a_cache_that_is_scanned_is_copied():
    compiled = decode_loop("scan")
    step = hlo.traffic(compiled, trips={}, loop=STEP)
    # Keys and values are taken out and put back, read and written both times, and read in between.
    assert step.read + step.written > 4 * (CACHE + WEIGHTS), str(step)
    assert len(hlo.large_writes(compiled, LAYER, loop=STEP)) == 4


@pytest.mark.tpu
def test_a_cache_that_is_not_donated_is_copied_before_the_loop():
    compiled = decode_loop("not donated")
    assert [a.written for a in hlo.large_writes(compiled, LAYER, loop=None)] == [CACHE // 2] * 2
    assert hlo.large_writes(compiled, LAYER, loop=STEP) == []
