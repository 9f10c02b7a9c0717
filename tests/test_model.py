"""The model: parity with transformers, packing, cache, vocabulary head and meshes agree."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.config import ConfigError, MeshConfig, ModelConfig, YarnConfig
from cir_jax.models import hf, logprob, qwen
from cir_jax.models.cache import Cache, make_cache

TOKENIZER = configs.asset_dir("package:quickstart/tokenizer")
QWEN2 = ModelConfig(
    vocab_size=64,
    width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=40,
    rope_theta=500.0,  # no model's default, so that a lost setting shows
    norm_eps=1e-5,
)
UNTIED = QWEN2.model_copy(update={"tied_embeddings": False})
# Heads wider than width / num_heads, as in Qwen3.
QWEN3 = UNTIED.model_copy(update={"qkv_bias": False, "qk_norm": True, "head_dim": 10})
# A ramp with pairs below, on and above it, so that a lost setting shows.
YARN = YarnConfig(factor=4.0, original_length=64, beta_fast=8.0, beta_slow=0.5)
MODELS = {
    "qwen2": QWEN2,
    "qwen2-untied": UNTIED,
    "qwen2-gqa1": QWEN2.model_copy(update={"num_kv_heads": 4}),
    "qwen2-gqa7": UNTIED.model_copy(update={"num_heads": 14, "num_kv_heads": 2}),
    "qwen3": QWEN3,
    "qwen3-tied-gqa1": QWEN3.model_copy(update={"tied_embeddings": True, "num_kv_heads": 4}),
    "qwen2-yarn": QWEN2.model_copy(update={"yarn": YARN, "head_dim": 16}),
    "qwen3-yarn": QWEN3.model_copy(
        update={"yarn": YARN.model_copy(update={"attention_factor": 1.3, "truncate": False})}
    ),
    "qwen3-gqa7": QWEN3.model_copy(update={"num_heads": 7, "num_kv_heads": 1}),
}
each_model = pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
SHAPE = (8, 24)


@functools.cache
def params_of(cfg):
    """Random values everywhere: biases and norms too, which are 0 and 1 at the start."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.3, x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, qwen.abstract_params(cfg))


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


def random_ids(shape, seed=0):
    return np.random.default_rng(seed).integers(0, QWEN2.vocab_size, shape)


def assert_near(got, expected, tolerance):
    """Largest difference, relative to the largest value."""
    difference = np.abs(np.asarray(got) - np.asarray(expected)).max()
    assert difference <= tolerance * np.abs(np.asarray(expected)).max()


# --- Hugging Face


@each_model
def test_logits_are_transformers(tmp_path, cfg):
    hf.export(params_of(cfg), cfg, tmp_path, TOKENIZER)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert type(theirs).__name__ == ("Qwen3" if cfg.qk_norm else "Qwen2") + "ForCausalLM"
    ids = np.repeat(random_ids((1, 24)), 2, axis=0)
    ids[1, 0] += 1
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    hidden = plain(cfg, ids)
    got = logprob.logits(
        jnp.asarray(hidden.reshape(-1, cfg.width)), qwen.head_table(params_of(cfg))
    )
    assert_near(got, expected.reshape(-1, cfg.vocab_size), 1e-4)
    # The rows differ in their first token alone, and the last logits show it.
    assert np.abs(expected[1, -1] - expected[0, -1]).max() > 0.01 * np.abs(expected).max()


@each_model
def test_load_of_an_export_is_exact(tmp_path, cfg):
    hf.export(params_of(cfg), cfg, tmp_path, TOKENIZER)
    mesh = meshes.make_mesh(MeshConfig(data=8))
    loaded = hf.load(tmp_path, cfg, mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, params_of(cfg))


def test_load_lays_out_on_the_mesh(tmp_path):
    hf.export(params_of(UNTIED), UNTIED, tmp_path, TOKENIZER)
    mesh = meshes.make_mesh(MESH)
    loaded = hf.load(tmp_path, UNTIED, mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, params_of(UNTIED))
    expected = qwen.param_shardings(UNTIED, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded, expected))


def test_load_reads_bfloat16(tmp_path):
    """What the published weights are stored in."""
    hf.export(params_of(QWEN3), QWEN3, tmp_path, TOKENIZER)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    loaded = hf.load(tmp_path / "half", QWEN3, meshes.make_mesh(MeshConfig(data=8)))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params_of(QWEN3))
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


def test_export_carries_the_tokenizer(tmp_path):
    hf.export(params_of(QWEN2), QWEN2, tmp_path, TOKENIZER)
    assert {path.name for path in TOKENIZER.iterdir()} < {path.name for path in tmp_path.iterdir()}


BIAS_AND_NORM = QWEN3.model_copy(update={"qkv_bias": True})
NO_BIAS_NO_NORM = QWEN2.model_copy(update={"qkv_bias": False})


@pytest.mark.parametrize("cfg", [BIAS_AND_NORM, NO_BIAS_NO_NORM], ids=["both", "neither"])
def test_models_that_transformers_lacks_are_not_exported(tmp_path, cfg):
    with pytest.raises(ValueError, match=r"model\.qkv_bias=.*qk_norm="):
        hf.export(params_of(cfg), cfg, tmp_path, TOKENIZER)


def drop(name):
    return lambda tensors: tensors.pop(name)


def transpose(name):
    return lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)})


def add(name):
    return lambda tensors: tensors.update({name: np.zeros(3, np.float32)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model.norm.weight"), ["missing", "model.norm.weight"]),
        (
            drop("model.layers.2.mlp.up_proj.weight"),
            ["missing", "model.layers.2.mlp.up_proj.weight"],
        ),
        (drop("lm_head.weight"), ["missing", "lm_head.weight"]),
        (add("model.extra"), ["unexpected", "model.extra"]),
        (add("model.layers.3.mlp.up_proj.weight"), ["unexpected", "layers.3.mlp.up_proj.weight"]),
        (
            transpose("model.embed_tokens.weight"),
            ["model.embed_tokens.weight", "(24, 64)", "(64, 24)"],
        ),
        # As many entries as expected, in another order.
        (
            transpose("model.layers.1.mlp.up_proj.weight"),
            ["model.layers.1.mlp.up_proj.weight", "(24, 40)", "(40, 24)"],
        ),
        (
            add("model.layers.0.self_attn.q_proj.bias"),
            ["model.layers.0.self_attn.q_proj.bias", "(3,)", "(24,)"],
        ),
    ],
)
def test_load_names_the_wrong_tensor(tmp_path, change, words):
    hf.export(params_of(UNTIED), UNTIED, tmp_path, TOKENIZER)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / hf.WEIGHTS)
    with pytest.raises(ValueError) as caught:
        hf.load(tmp_path, UNTIED, meshes.make_mesh(MeshConfig(data=8)))
    assert all(word in str(caught.value) for word in words)


# --- parameters


@pytest.mark.parametrize("cfg", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
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


def pack_rows(segments, length):
    """One row per list of id arrays: ids, positions, segment_ids; 0 is padding."""
    arrays = np.zeros((3, len(segments), length), np.int32)
    for r, row in enumerate(segments):
        at = 0
        for n, ids in enumerate(row, start=1):
            arrays[:, r, at : at + len(ids)] = ids, np.arange(len(ids)), np.full(len(ids), n)
            at += len(ids)
    return arrays


@pytest.mark.parametrize("cfg", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
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


def junk_cache(cfg):
    """Finite values that would show wherever they are read."""
    k, v = make_cache(cfg, ROWS, LENGTH)
    return Cache(k + 7.0, v - 9.0)


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
        written = np.asarray(got != before).all(axis=(0, 3, 4))
        unchanged = np.asarray(got == before).all(axis=(0, 3, 4))
        stands_at = np.array([10, 0, 0, 16, 0])
        expected_written = np.arange(LENGTH)[None] < stands_at[:, None]
        np.testing.assert_array_equal(written, expected_written)
        np.testing.assert_array_equal(unchanged, ~expected_written)


@pytest.mark.parametrize("beyond", [0, 1, 10**6])
def test_padding_leaves_the_cache_as_it_is(beyond):
    """Tokens at positions, or in rows, outside the cache: nothing is stored for them."""
    cache = junk_cache(QWEN2)
    _, same = continued(QWEN2, cache, random_ids((ROWS, 4)), LENGTH + beyond)
    jax.tree.map(np.testing.assert_array_equal, same, cache)
    _, same = continued(QWEN2, cache, random_ids((2, 4)), np.arange(4), [ROWS + beyond] * 2)
    jax.tree.map(np.testing.assert_array_equal, same, cache)


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


def test_cache_on_a_mesh_equals_one_device():
    ids = random_ids((8, 10))
    mesh = meshes.make_mesh(MESH)
    with jax.set_mesh(mesh):
        params = on_mesh(QWEN2, mesh)
        cache = jax.jit(make_cache, static_argnums=(0, 1, 2))(QWEN2, 8, 12)
        axes = ("layers", "batch", "length", "kv_heads", "head_dim")
        assert cache.k_LBSKH.sharding.is_equivalent_to(meshes.sharding(mesh, *axes), 5)
        for at in (0, 5):
            positions = jnp.broadcast_to(at + jnp.arange(5)[None], (8, 5))
            hidden, cache = forward_cached(
                params, QWEN2, jnp.asarray(ids[:, at : at + 5]), positions, cache, None
            )
    assert_near(hidden, plain(QWEN2, ids)[:, 5:], 1e-5)


def test_parameters_are_spread_over_the_mesh():
    """Of a (2, 2, 2) mesh, matrices are cut by fsdp and tensor: a quarter on each device."""
    layers = on_mesh(UNTIED, meshes.make_mesh(MESH))["layers"]
    for x in (layers["attn"]["q"], layers["attn"]["o"], layers["mlp"]["up"], layers["mlp"]["down"]):
        assert x.addressable_shards[0].data.size * 4 == x.size


def test_without_a_mesh_nothing_is_asked_for():
    x = jnp.ones((3, 5))  # no multiple of any axis
    assert meshes.constrain(x, "batch", "embed") is x
