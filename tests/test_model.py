"""The model with itself: packing, cache, vocabulary head and meshes agree."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_table import (
    MODELS,
    QWEN2,
    QWEN3,
    UNTIED,
    assert_near,
    both_families,
    pack_rows,
    params_of,
    random_ids,
)

from cir_jax import mesh as meshes
from cir_jax.config import ConfigError, MeshConfig
from cir_jax.models import logprob, qwen
from cir_jax.models.cache import BLOCK, MAX_BLOCK, Cache, make_cache, quantize

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
SHAPE = (8, 24)

init = jax.jit(qwen.init, static_argnums=0)
forward = jax.jit(qwen.forward, static_argnums=1)
forward_cached = jax.jit(qwen.forward_cached, static_argnums=1)


def plain(cfg, ids):
    """Hidden states of whole rows. All calls share one shape, hence one compilation per model."""
    padded = np.zeros((3, *SHAPE), np.int32)
    padded[:, : ids.shape[0], : ids.shape[1]] = np.stack(
        [ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), np.ones_like(ids)]
    )
    hidden = forward(params_of(cfg), cfg, *padded)
    return np.asarray(hidden)[: ids.shape[0], : ids.shape[1]]


# --- parameters


@both_families
def test_parameters_are_as_declared(cfg):
    params = jax.eval_shape(lambda: qwen.init(cfg, jax.random.key(0)))
    same = jax.tree.map(
        lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), params, qwen.abstract_params(cfg)
    )
    assert jax.tree.all(same)
    assert params["layers"]["attn"]["q"].shape == (3, cfg.width, cfg.num_heads, cfg.head_dim)
    assert ("head" in params) == (not cfg.tied_embeddings)
    axes = jax.tree.leaves(qwen.param_axes(cfg), is_leaf=lambda x: isinstance(x, tuple))
    assert [len(a) for a in axes] == [x.ndim for x in jax.tree.leaves(params)]


def test_layers_start_different_and_seeds_differ():
    a, b = (init(QWEN2, jax.random.key(seed))["layers"]["attn"]["q"] for seed in (0, 1))
    assert not (a[0] == a[1]).any() and not (a == b).any()


# --- packing


@both_families
def test_packed_rows_equal_unpacked(cfg):
    segments = [[random_ids(n, seed=n) for n in row] for row in ([9, 1, 7], [24], [5, 6], [])]
    hidden = forward(params_of(cfg), cfg, *pack_rows(segments * 2, 24))
    assert np.isfinite(hidden).all()  # padding too
    for r, row in enumerate(segments):
        at = 0
        for ids in row:
            assert_near(hidden[r, at : at + len(ids)], plain(cfg, ids[None])[0], 1e-5)
            at += len(ids)


def test_a_token_depends_on_those_before_it_in_its_segment_alone():
    rows = pack_rows([[random_ids(8), random_ids(8)]], 20)
    ids, positions, segment_ids = map(jnp.asarray, rows)

    @jax.jit
    @jax.jacrev
    def dependence(scale_T):
        """One entry of each token's hidden state, by the scale of each token's embedding."""
        table = params_of(QWEN2)["embed"][ids[0]] * scale_T[:, None]
        params = params_of(QWEN2) | {"embed": table}
        row = jnp.arange(20)[None]
        return qwen.forward(params, QWEN2, row, positions, segment_ids)[0, :, 0]

    depends = np.asarray(dependence(jnp.ones(20))) != 0
    expected = np.zeros((20, 20), bool)
    for at in (slice(0, 8), slice(8, 16)):
        expected[at, at] = np.tri(8)
    np.testing.assert_array_equal(depends[:16, :16], expected[:16, :16])
    assert not depends[:16, 16:].any()


# --- the cache

ROWS, LENGTH = 5, 19


def junk_cache(cfg, dtype="float32", rows=ROWS, length=LENGTH):
    """Finite values that would show wherever they are read."""
    k, v = make_cache(cfg, rows, length, dtype)
    return Cache(jax.tree.map(lambda x: x + 7, k), jax.tree.map(lambda x: x - 9, v))


def continued(cfg, cache, ids, positions, rows=None):
    rows_B = None if rows is None else jnp.array(rows)
    ids, positions = jnp.asarray(ids), jnp.asarray(np.broadcast_to(positions, ids.shape))
    return forward_cached(params_of(cfg), cfg, ids, positions, cache, rows_B)


@pytest.mark.parametrize(
    ("cfg", "chunk"),
    [(QWEN2, 16), (QWEN2, 4), (QWEN2, 1), (MODELS["qwen3-gqa7"], 4)],
    ids=["qwen2-16", "qwen2-4", "qwen2-1", "qwen3-gqa7-4"],
)
def test_cached_chunks_equal_forward(cfg, chunk):
    ids = random_ids((ROWS, 16))
    cache = junk_cache(cfg)
    parts = []
    for at in range(0, 16, chunk):
        span = np.arange(at, at + chunk)
        hidden, cache = continued(cfg, cache, ids[:, span], span)
        parts.append(hidden)
    assert_near(np.concatenate(parts, axis=1), plain(cfg, ids), 1e-5)


def test_rows_continue_apart():
    """Rows in any order, at different positions, with padding beside them and instead of them."""
    ids = random_ids((2, 16))
    expected = plain(QWEN2, ids)
    cache = junk_cache(QWEN2)
    outside = LENGTH
    # Positions of two rows of tokens, and the cache's rows that they belong to.
    plan = [
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [3, 0]),
        ([[4, 5, 6, 7], [outside] * 4], [3, 0]),
        ([[8, 9, 10, 11], [0, 1, 2, 3]], [3, ROWS]),  # the second row's tokens are nobody's
        ([[12, 13, 14, outside], [4, 5, outside, outside]], [3, 0]),
        ([[6, 7, 8, 9], [15, outside, outside, outside]], [0, 3]),
    ]
    for positions, rows in plan:
        positions = np.array(positions)
        own = [1 if row == 0 else 0 for row in rows]  # row 3 holds ids[0], row 0 holds ids[1]
        tokens = np.take_along_axis(ids[own], np.minimum(positions, 15), axis=1)
        hidden, cache = continued(QWEN2, cache, tokens, positions, rows)
        for n in range(2):
            if rows[n] < ROWS and (real := positions[n] < outside).any():
                assert_near(hidden[n][real], expected[own[n], positions[n][real]], 1e-5)
    for got, before in zip(cache, junk_cache(QWEN2), strict=True):
        written = np.asarray(got != before).all(axis=(0, 2, 4))
        unchanged = np.asarray(got == before).all(axis=(0, 2, 4))
        stands_at = np.array([10, 0, 0, 16, 0])
        expected_written = np.arange(LENGTH)[None] < stands_at[:, None]
        np.testing.assert_array_equal(written, expected_written)
        np.testing.assert_array_equal(unchanged, ~expected_written)


@pytest.mark.parametrize(
    ("beyond", "dtype"), [(0, "float32"), (1, "float32"), (10**6, "float32"), (0, "int8")]
)
def test_padding_leaves_the_cache_as_it_is(beyond, dtype):
    """Tokens at positions, or in rows, outside the cache: nothing is stored for them."""
    cache = junk_cache(QWEN2, dtype)
    _, same = continued(QWEN2, cache, random_ids((ROWS, 4)), LENGTH + beyond)
    jax.tree.map(np.testing.assert_array_equal, same, cache)
    _, same = continued(QWEN2, cache, random_ids((2, 4)), np.arange(4), [ROWS + beyond] * 2)
    jax.tree.map(np.testing.assert_array_equal, same, cache)


@pytest.mark.parametrize(
    ("length", "rounded", "block"),
    [
        # At most one block: as it is. Then whole blocks of 128, and from 2 x 16 x 128 positions of
        # 256, from twice that of 512, also where rounding up leads there.
        (100, 100, 100),
        (129, 256, 128),
        (4000, 4096, 512),
        (5000, 5120, 512),
        (8100, 8192, 512),
        (40000, 40448, 512),
    ],
)
def test_long_caches_are_read_in_larger_blocks(length, rounded, block):
    cache = jax.eval_shape(lambda: make_cache(QWEN2, 1, length, "float32"))
    assert (cache.length, cache.block) == (rounded, block)
    assert block <= MAX_BLOCK and rounded % block == 0


# The error of int8: by models as tiny as these, see test_an_int8_cache_is_nearly_the_same.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("int8", 0.3)])
def test_a_row_does_not_depend_on_how_far_the_cache_is_read(dtype, tolerance):
    """Several blocks of the cache: whether a neighbour is long or short changes not one bit."""
    length = 2 * BLOCK + 5
    ids = random_ids((2, 24))
    cache = junk_cache(QWEN2, dtype, 2, length)
    assert cache.length == 3 * BLOCK
    _, cache = continued(QWEN2, cache, ids, np.arange(24))

    def next_token(other):
        positions = np.array([[24], [other]])
        return continued(QWEN2, cache, ids[:, :1], positions)[0][0]

    alone = next_token(3 * BLOCK)  # the neighbour is padding
    for other in (24, BLOCK, length - 1):
        np.testing.assert_array_equal(next_token(other), alone)
    longer = np.concatenate([ids, ids[:, :1]], axis=1)
    assert_near(alone[0], whole(longer)[0, 24], tolerance)


def whole(ids):
    rows = jnp.asarray(ids)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return forward(params_of(QWEN2), QWEN2, rows, positions, jnp.ones_like(rows))


def test_a_row_is_copied_bit_by_bit():
    for dtype in ("float32", "int8"):
        cache = jax.tree.map(
            lambda x: jnp.arange(x.size).reshape(x.shape).astype(x.dtype),
            make_cache(QWEN2, ROWS, LENGTH, dtype),
        )
        copied = cache.copy_row(jnp.int32(1), jnp.int32(3), 7)
        for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(copied), strict=True):
            expected = np.array(before)
            expected[:, 3, :, :7] = expected[:, 1, :, :7]
            np.testing.assert_array_equal(after, expected)


def test_quantized_entries_are_off_by_a_254th():
    """Half a step of 127 from 0 to the vector's largest, and float32's rounding of the quotient."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) * 10.0 ** rng.integers(-9, 9, (50, 1))
    x[0] = 0
    x = x.astype(np.float32)
    values, scale = map(np.asarray, quantize(jnp.asarray(x)))
    assert values.dtype == np.int8 and (np.abs(values[1:]).max(-1) == 127).all()
    off = np.abs(values.astype(np.float64) * scale[:, None] - x)
    share = off[1:] / (np.abs(x[1:]).max(-1, keepdims=True) / 254)
    assert 0.9 < share.max() <= 1 + 1e-4 and (off[0] == 0).all()
    # What is no number is not hidden.
    strange = quantize(jnp.array([[1.0, np.nan], [1.0, np.inf]]))
    assert not np.isfinite(strange.values * strange.scale[:, None]).all(axis=1).any()


@both_families
def test_an_int8_cache_is_nearly_the_same(cfg):
    """Prefill and decoding: log-probabilities of all tokens, to a thirtieth of their spread.

    A key's or value's entry is off by at most 1/254 of its vector's largest, on average half of
    that; the logits of these random models, three layers later, by 1 to 2 percent.
    """
    ids = random_ids((ROWS, 16))
    logps = []
    for dtype in ("float32", "int8"):
        cache, parts = junk_cache(cfg, dtype), []
        for span in map(np.arange, (0, 4, 12, 13, 14, 15), (4, 12, 13, 14, 15, 16)):
            hidden, cache = continued(cfg, cache, ids[:, span], span)
            parts.append(hidden)
        hidden = jnp.concatenate(parts, axis=1)
        logps.append(jax.nn.log_softmax(hidden @ qwen.head_table(params_of(cfg)).T))
    exact, nearly = map(np.asarray, logps)
    assert 1e-3 < (nearly - exact).std() / exact.std() < 1 / 30


@pytest.mark.parametrize(
    ("dtype", "vector"),
    # Per layer and head, for keys and for values: 6 entries, with int8 a scale of 4 bytes.
    [("float32", 24), ("bfloat16", 12), ("int8", 6 + 4)],
)
def test_bytes_of_a_cached_position(dtype, vector):
    cache = jax.eval_shape(lambda: make_cache(QWEN2, 4, 100, dtype))
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert nbytes == 4 * 100 * 2 * 3 * 2 * vector


# --- the vocabulary head


def weighted(logprobs, hidden, table, targets, temperature, weight):
    """A scalar of every log-probability and entropy, for a gradient through all of them."""
    logp, entropy = logprobs(hidden, table, targets, temperature)
    return jnp.sum(logp * weight[0] + entropy * weight[1]), (logp, entropy)


def direct_logprobs(hidden, table, targets, temperature):
    logp_BTV = jax.nn.log_softmax(hidden @ table.T / temperature)
    logp = jnp.take_along_axis(logp_BTV, targets[..., None], -1)[..., 0]
    return logp, -(jnp.exp(logp_BTV) * logp_BTV).sum(-1)


weighted_grad = jax.jit(
    jax.value_and_grad(weighted, argnums=(1, 2), has_aux=True), static_argnums=0
)


@pytest.mark.parametrize("chunk", [1, 7, 33, 1024])
def test_token_logprobs_are_log_softmax(chunk):
    """Values, entropies and gradients, whatever the chunks: 33 tokens, one chunk or many."""
    rng = np.random.default_rng(0)
    hidden, table, weight = (
        rng.normal(0, scale, shape).astype(np.float32)
        for scale, shape in ((1, (3, 11, 24)), (0.5, (64, 24)), (1, (2, 3, 11)))
    )
    ours = functools.partial(logprob.token_logprobs, chunk=chunk)
    for temperature in (1.0, 0.6):
        got, expected = (
            weighted_grad(f, hidden, table, random_ids((3, 11)), temperature, weight)
            for f in (ours, direct_logprobs)
        )
        jax.tree.map(functools.partial(assert_near, tolerance=1e-5), got, expected)


# --- meshes


def mesh_axes(name):
    entry = meshes.RULES[name]
    return {entry} if isinstance(entry, str) else set(entry or ())


@pytest.mark.parametrize(("a", "b"), [*itertools.combinations(meshes.RULES, 2)], ids=str)
def test_collisions_raise(a, b):
    if mesh_axes(a) & mesh_axes(b):
        with pytest.raises(ValueError, match="twice"):
            meshes.spec(a, b)
    else:
        assert len(meshes.spec(a, b)) == 2


@pytest.mark.parametrize("axes", [("mlp", "mlp"), ("heads", "kv_heads"), ("batch", "embed")])
def test_known_collisions(axes):
    with pytest.raises(ValueError, match="twice"):
        meshes.spec(*axes)


def test_mesh_of_another_size_names_both_numbers():
    with pytest.raises(ConfigError, match=r"mesh=\(2, 1, 2\).*4 devices.*8"):
        meshes.make_mesh(MeshConfig(data=2, tensor=2))


def on_mesh(cfg, mesh):
    return jax.device_put(params_of(cfg), qwen.param_shardings(cfg, mesh))


@pytest.mark.parametrize(
    ("cfg", "shape"),
    [(UNTIED, (2, 2, 2)), (QWEN3, (2, 2, 2)), (UNTIED, (1, 8, 1))],
    ids=["qwen2-2-2-2", "qwen3-2-2-2", "qwen2-1-8-1"],
)
def test_forward_and_head_on_a_mesh_equal_one_device(cfg, shape):
    rows = pack_rows([[random_ids(9, seed=n), random_ids(7, seed=n + 50)] for n in range(8)], 24)
    targets = jnp.asarray(random_ids(SHAPE, seed=1))

    def logprobs(params, hidden):
        return logprob.token_logprobs(hidden, qwen.head_table(params), targets, 1.0, 64)

    hidden = forward(params_of(cfg), cfg, *rows)
    expected = hidden, *logprobs(params_of(cfg), hidden)
    mesh = meshes.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    with jax.set_mesh(mesh):
        params = on_mesh(cfg, mesh)
        placed = jax.device_put(rows, meshes.sharding(mesh, None, "batch", "length"))
        hidden = forward(params, cfg, *placed)
        got = hidden, *jax.jit(logprobs)(params, hidden)
    assert len(hidden.addressable_shards) == 8 and not hidden.is_fully_replicated
    jax.tree.map(functools.partial(assert_near, tolerance=1e-5), got, expected)


# int8 rounds differently where sums do: then an entry is off by up to twice as much.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("int8", 0.3)])
def test_cache_on_a_mesh_equals_one_device(dtype, tolerance):
    ids = random_ids((8, 10))
    mesh = meshes.make_mesh(MESH)
    with jax.set_mesh(mesh):
        params = on_mesh(QWEN2, mesh)
        cache = jax.jit(make_cache, static_argnums=(0, 1, 2, 3))(QWEN2, 8, 12, dtype)
        axes = ("layers", "batch", "kv_heads", "length", "head_dim")
        for x in jax.tree.leaves(cache):
            expected = meshes.sharding(mesh, *axes[: x.ndim])
            assert x.sharding.is_equivalent_to(expected, x.ndim)
        for at in (0, 5):
            positions = jnp.broadcast_to(at + jnp.arange(5)[None], (8, 5))
            hidden, cache = forward_cached(
                params, QWEN2, jnp.asarray(ids[:, at : at + 5]), positions, cache, None
            )
    assert_near(hidden, plain(QWEN2, ids)[:, 5:], tolerance)


def test_parameters_are_spread_over_the_mesh():
    """Of a (2, 2, 2) mesh, matrices are cut by fsdp and tensor: a quarter on each device."""
    layers = on_mesh(UNTIED, meshes.make_mesh(MESH))["layers"]
    for x in (layers["attn"]["q"], layers["attn"]["o"], layers["mlp"]["up"], layers["mlp"]["down"]):
        assert x.addressable_shards[0].data.size * 4 == x.size


def test_without_a_mesh_nothing_is_asked_for():
    x = jnp.ones((3, 5))  # no multiple of any axis
    assert meshes.constrain(x, "batch", "embed") is x
