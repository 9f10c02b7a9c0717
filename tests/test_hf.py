"""Weights: transformers -> ours -> transformers, bit-exact and lean; every mistake is named."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from cir_jax import cli
from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.config import MeshConfig, ModelConfig, YarnConfig
from cir_jax.models import hf, logprob, presets, qwen, tensorfile

TOKENIZER = configs.asset_dir("package:quickstart/tokenizer")
QWEN2 = ModelConfig(
    vocab_size=64,
    width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=40,
    rope_theta=500.0,
    norm_eps=1e-5,
    max_positions=256,
    tied_embeddings=False,
)
QWEN3 = QWEN2.model_copy(update={"qkv_bias": False, "qk_norm": True, "head_dim": 10})
SMALL_SHARDS = 20_000  # bytes; the float32 embedding has 6144


@functools.cache
def one_device_each():
    return meshes.make_mesh(MeshConfig(data=8))


@functools.cache
def params_of(cfg, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.normal, 0.0, 0.3)
    return jax.tree.map(lambda x: jnp.asarray(draw(x.shape), dtype), qwen.abstract_params(cfg))


def assert_same(got, expected):
    """Bit by bit, types too."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# --- transformers -> ours

# Rope settings as transformers 5 writes them: the pairs' turns within 64 positions range from
# 10 to below 0.1, so the ramp between 8 and 0.5 turns has pairs below, on and above it.
ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
}
KINDS = {
    "qwen2": (Qwen2Config, {}),
    "qwen2-gqa7": (Qwen2Config, {"num_attention_heads": 7, "num_key_value_heads": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 10}),
    "qwen3-gqa1": (Qwen3Config, {"head_dim": 16, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize("rope", [ROPE, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers_is_ours(tmp_path, kind, tied, rope):
    make, other = KINDS[kind]
    sizes = {
        "vocab_size": 64,
        "hidden_size": 56,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }
    config = make(**(sizes | other), tie_word_embeddings=tied, rope_parameters=dict(rope))
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in theirs.parameters():
            x.copy_(torch.normal(0.0, 0.3, x.shape, generator=generator) + (x.ndim == 1))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / hf.INDEX).exists()

    cfg = hf.read_config(tmp_path)
    assert (cfg.tied_embeddings, cfg.yarn is not None) == (tied, rope is YARN)
    params = hf.load(tmp_path, cfg, one_device_each())
    ids = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    forward = jax.jit(qwen.forward, static_argnums=1)
    hidden = forward(params, cfg, ids, positions, np.ones_like(ids))
    got = logprob.logits(hidden.reshape(-1, 56), qwen.head_table(params))
    difference = np.abs(np.asarray(got) - expected.reshape(-1, 64)).max()
    assert difference <= 1e-4 * np.abs(expected).max()


def test_yarn_frequencies_are_transformers():
    """At the sizes and settings of Qwen2.5's long-context configs, all defaults left out."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    rope["original_max_position_embeddings"] = 32768
    config = Qwen2Config(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    yarn = YarnConfig(factor=4.0, original_length=32768)
    got, ours = qwen.rope_frequencies(128, 1e6, yarn)
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-6)
    assert ours == pytest.approx(scale)
    # 0.1 ln 4 + 1
    assert ours == pytest.approx(1.1386294)
    plain, one = qwen.rope_frequencies(128, 1e6, None)
    assert one == 1.0 and got[0] == plain[0] and got[-1] == plain[-1] / 4


# --- ours -> transformers -> ours


@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, SMALL_SHARDS, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("cfg", "shape"), [(QWEN2, (2, 2, 2)), (QWEN3, (1, 4, 2))], ids=["qwen2", "qwen3"]
)
def test_round_trip_is_exact(tmp_path, cfg, shape, dtype, shard_bytes):
    mesh = meshes.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    shardings = qwen.param_shardings(cfg, mesh)
    placed = jax.device_put(params_of(cfg, dtype), shardings)
    hf.export(placed, cfg, tmp_path / "hf", TOKENIZER, shard_bytes)
    assert hf.read_config(tmp_path / "hf") == cfg
    loaded = hf.load(tmp_path / "hf", cfg, mesh, dtype)
    assert_same(loaded, params_of(cfg, dtype))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded, shardings))

    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    tensors = [load_file(file) for file in files]
    if shard_bytes == hf.SHARD_BYTES:
        assert [file.name for file in files] == [hf.WEIGHTS]
        assert not (tmp_path / "hf" / hf.INDEX).exists()
    else:
        index = json.loads((tmp_path / "hf" / hf.INDEX).read_text())
        held = {name: f.name for f, t in zip(files, tensors, strict=True) for name in t}
        assert len(files) > 1 and held == index["weight_map"]
        sizes = [sum(x.nbytes for x in t.values()) for t in tensors]
        assert sum(sizes) == index["metadata"]["total_size"]
        alone = [len(t) == 1 for t in tensors]
        assert all(a or size <= shard_bytes for a, size in zip(alone, sizes, strict=True))


def test_the_type_can_be_chosen(tmp_path):
    hf.export(params_of(QWEN2), QWEN2, tmp_path, TOKENIZER)
    loaded = hf.load(tmp_path, QWEN2, one_device_each(), jnp.bfloat16)
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(QWEN2)))


@pytest.mark.parametrize("cfg", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_transformers_loads_shards_without_a_complaint(tmp_path, cfg):
    hf.export(params_of(cfg, jnp.bfloat16), cfg, tmp_path, TOKENIZER, SMALL_SHARDS)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    added = json.loads((TOKENIZER / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert added[str(model.generation_config.eos_token_id)]["content"] == "<|endoftext|>"


def test_a_table_stored_twice_is_accepted(tmp_path):
    tied = QWEN2.model_copy(update={"tied_embeddings": True})
    hf.export(params_of(tied), tied, tmp_path, TOKENIZER)
    change(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert_same(hf.load(tmp_path, tied, one_device_each()), params_of(tied))


def test_companions_are_copied_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in TOKENIZER.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / hf.GENERATION).write_text('{"eos_token_id": [3, 4]}')
    for name in ("config.json", "model.safetensors", "README.md"):
        (source / name).write_text("theirs")
    hf.export(params_of(QWEN2), QWEN2, tmp_path / "out", source)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    shipped = {file.name for file in TOKENIZER.iterdir()}
    assert names == shipped | {hf.CONFIG, hf.WEIGHTS, hf.GENERATION}
    assert (tmp_path / "out" / hf.GENERATION).read_text() == '{"eos_token_id": [3, 4]}'
    assert hf.read_config(tmp_path / "out") == QWEN2


# --- config.json


def published(**fields):
    """Qwen2.5-7B's config.json, in the words of transformers 4."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    } | fields


def published_qwen3(**fields):
    """Qwen3-8B's."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    } | fields


def without(config, *fields):
    return {name: value for name, value in config.items() if name not in fields}


PLAIN = presets.PRESETS["Qwen2.5-7B"]
LONG = {"factor": 4.0, "original_max_position_embeddings": 32768}
WITH_YARN = PLAIN.model_copy(update={"yarn": YarnConfig(factor=4.0, original_length=32768)})
THETA = {"rope_theta": 1e6}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (published(), PLAIN),
        (published_qwen3(), presets.PRESETS["Qwen3-8B"]),
        # The window would begin after the last layer.
        (published(use_sliding_window=True), PLAIN),
        (published(rope_scaling={"type": "yarn"} | LONG), WITH_YARN),
        (published(rope_scaling={"rope_type": "yarn", "beta_fast": None} | LONG), WITH_YARN),
        (published(rope_scaling={"rope_type": "default"}), PLAIN),
        # transformers 5.
        (
            without(published(rope_parameters={"rope_type": "yarn"} | THETA | LONG), "rope_theta"),
            WITH_YARN,
        ),
        (
            without(published(rope_parameters=THETA, layer_types=["full_attention"]), "rope_theta"),
            PLAIN,
        ),
        (
            published(rope_scaling={"rope_type": "yarn", "factor": 2}),
            PLAIN.model_copy(update={"yarn": YarnConfig(factor=2.0, original_length=131072)}),
        ),
    ],
)  # fmt: skip
def test_config_is_read(config, expected):
    assert hf.from_hf_config(config) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (published(model_type="llama"), ["model_type='llama'", "'qwen2' or 'qwen3'"]),
        (published(model_type="qwen2_moe"), ["model_type='qwen2_moe'"]),
        (without(published(), "model_type"), ["model_type=None"]),
        (published(architectures=["Qwen2ForRewardModel"]), ["architectures=", "RewardModel"]),
        (published(hidden_act="gelu"), ["hidden_act='gelu'"]),
        (published(quantization_config={"bits": 4}), ["quantization_config=", "bits"]),
        (published(use_sliding_window=True, max_window_layers=7), ["sliding_window=131072", "7"]),
        (published(layer_types=["sliding_attention"]), ["layer_types=", "sliding_attention"]),
        (published(rope_scaling={"type": "linear", "factor": 2.0}), ["rope_type='linear'"]),
        (published(rope_scaling={"type": "dynamic"}), ["rope_scaling.rope_type='dynamic'"]),
        (published(rope_parameters={"rope_type": "llama3"}), ["rope_parameters.rope_type"]),
        (published(rope_scaling={"type": "yarn", "mscale": 2} | LONG), ["rope_scaling.mscale=2"]),
        (published(rope_scaling={"type": "yarn"}), ["rope_scaling.factor", "missing"]),
        (published(rope_scaling={"type": "yarn"} | LONG | {"factor": 0.5}), ["factor=0.5"]),
        (without(published(), "hidden_size"), ["hidden_size=None"]),
        (published(num_key_value_heads=5), ["num_kv_heads=5", "num_heads=28"]),
        (published(vocab_size=0), ["vocab_size=0"]),
        (published_qwen3(attention_bias=True), ["attention_bias=true"]),
    ],
)
def test_config_that_is_not_ours_names_field_and_value(tmp_path, config, words):
    (tmp_path / hf.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        hf.read_config(tmp_path)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / hf.CONFIG)) and len(text.splitlines()) == 1
    assert all(word in text for word in words), text


# --- presets

# Numbers of parameters that the hub shows for the published weights.
NUM_PARAMS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_presets_have_the_published_sizes(name):
    shapes = jax.tree.leaves(qwen.abstract_params(presets.preset(name)))
    assert sum(x.size for x in shapes) == NUM_PARAMS[name]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_survive_a_config(name):
    cfg = presets.preset(name)
    assert hf.from_hf_config(hf.to_hf_config(cfg, "bfloat16")) == cfg


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"preset='qwen2.5-7b': unknown; nearest: Qwen2.5-7B"):
        presets.preset("qwen2.5-7b")


# --- what is wrong with a directory


def change(directory, edit):
    tensors = edit(load_file(directory / hf.WEIGHTS))
    save_file(tensors, directory / hf.WEIGHTS)


def shards(directory):
    return sorted(directory.glob("model-*.safetensors"))


def truncate(directory):
    os.truncate(shards(directory)[1], shards(directory)[1].stat().st_size - 5)


def truncate_in_the_header(directory):
    os.truncate(shards(directory)[1], 60)


def empty(directory):
    shards(directory)[1].write_bytes(b"")


def junk(directory):
    shards(directory)[1].write_bytes((9).to_bytes(8, "little") + b"not json!")


def remove(directory):
    shards(directory)[1].unlink()


def remove_all(directory):
    for file in [*shards(directory), directory / hf.INDEX]:
        file.unlink()


def edit_index(edit):
    def damage(directory):
        index = json.loads((directory / hf.INDEX).read_text())
        edit(index)
        (directory / hf.INDEX).write_text(json.dumps(index))

    return damage


def edit_shard(edit):
    def damage(directory):
        tensors = load_file(shards(directory)[1])
        edit(tensors)
        save_file(tensors, shards(directory)[1])

    return damage


NAME = "model.norm.weight"


def first_shard_again(tensors):
    tensors["model.embed_tokens.weight"] = np.zeros((64, 24), np.float32)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ["model-00002-of-", "truncated"]),
        (truncate_in_the_header, ["model-00002-of-", "truncated"]),
        (empty, ["model-00002-of-", "truncated"]),
        (junk, ["model-00002-of-", "header"]),
        (remove, [hf.INDEX, "names model-00002-of-", "missing"]),
        (remove_all, [hf.WEIGHTS, hf.INDEX]),
        (edit_index(lambda i: i.pop("weight_map")), [hf.INDEX, "weight_map"]),
        (edit_index(lambda i: i["weight_map"].update(x="model-00001-of-00009.safetensors")),
         ["model-00001-of-00009.safetensors", "missing"]),
        (edit_index(lambda i: i["weight_map"].update(x=i["weight_map"][NAME])),
         ["tensor x is missing"]),
        (edit_shard(lambda t: t.update(x=np.zeros(3, np.float32))),
         ["model-00002-of-", "unexpected tensor x"]),
        (edit_shard(lambda t: t.update(dict.fromkeys(t, np.zeros(3, np.float32)))),
         ["model-00002-of-", "shape (3,)", "expected"]),
        (edit_shard(lambda t: t.update({k: v.astype(np.int32) for k, v in t.items()})),
         ["model-00002-of-", "type I32"]),
        (edit_shard(first_shard_again), ["model.embed_tokens.weight", "also in"]),
    ],
)  # fmt: skip
def test_damage_names_the_file_and_tensor(tmp_path, damage, words):
    hf.export(params_of(QWEN2), QWEN2, tmp_path, TOKENIZER, SMALL_SHARDS)
    damage(tmp_path)
    with pytest.raises(ValueError) as caught:
        hf.load(tmp_path, QWEN2, one_device_each())
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and all(word in text for word in words), text


def test_a_header_that_lies_about_a_size(tmp_path):
    shapes = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    tensorfile.write(tmp_path / "x", shapes, lambda _: np.eye(2, 3, dtype=np.float32))
    np.testing.assert_array_equal(load_file(tmp_path / "x")["a"], np.eye(2, 3))
    text = (tmp_path / "x").read_bytes().replace(b"[2,3]", b"[2,4]")
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(ValueError, match="tensor a has 24 bytes"):
        tensorfile.read_header(tmp_path / "x")


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    taken = []

    def fail(*args):
        taken.append(args)
        if len(taken) > 5:
            raise KeyboardInterrupt
        return take(*args)

    take = hf._take
    monkeypatch.setattr(hf, "_take", fail)
    with pytest.raises(KeyboardInterrupt):
        hf.export(params_of(QWEN2), QWEN2, tmp_path / "a" / "hf", TOKENIZER, SMALL_SHARDS)
    assert [*(tmp_path / "a").iterdir()] == []


def test_a_directory_with_contents_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="exists; must be new or an empty"):
        hf.export(params_of(QWEN2), QWEN2, tmp_path, TOKENIZER)
    with pytest.raises(ValueError, match="exists; must be new or an empty"):
        hf.export(params_of(QWEN2), QWEN2, tmp_path / "mine", TOKENIZER)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


# --- the command line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_and_export_by_command(tmp_path, capsys, dtype):
    # A width that eight devices share: the command spreads weights over all of them.
    cfg = QWEN3.model_copy(update={"yarn": YarnConfig(factor=4.0, original_length=64)})
    params = params_of(cfg, jnp.dtype(dtype).type)
    first, imported, second = (str(tmp_path / name) for name in ("first", "imported", "second"))
    hf.export(params, cfg, tmp_path / "first", TOKENIZER, SMALL_SHARDS)
    assert cli.main(["import-hf", first, imported, "--dtype", dtype]) == 0
    assert cli.main(["export-hf", imported, second]) == 0
    assert capsys.readouterr().out.splitlines() == [imported, second]
    assert_same(hf.load(tmp_path / "second", cfg, one_device_each(), jnp.dtype(dtype)), params)
    for name in (hf.CONFIG, hf.GENERATION, "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()

    from cir_jax.train import weights

    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    loaded = weights.load(tmp_path / "imported", cfg, mesh)
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    with pytest.raises(ValueError, match=r"rope_theta=500.0, but model.rope_theta=1.0"):
        other = cfg.model_copy(update={"rope_theta": 1.0})
        weights.load(tmp_path / "imported", other, mesh)


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys):
    hf.export(params_of(QWEN2), QWEN2, tmp_path / "hf", TOKENIZER)
    (tmp_path / "hf" / hf.WEIGHTS).unlink()
    before = sorted(tmp_path.iterdir())
    for argv, words in [
        (["import-hf", "nobody/nothing", "out"], ["nobody/nothing", "no such directory", "hub"]),
        (["import-hf", "./no/such/path", "out"], ["./no/such/path", "no such directory"]),
        (["import-hf", str(tmp_path / "hf"), "out"], ["holds neither", hf.WEIGHTS]),
        (["import-hf", str(TOKENIZER), "out"], [hf.CONFIG, "no such file"]),
        (["import-hf", str(tmp_path / "hf"), "hf"], ["OUT=", "exists"]),
        (["export-hf", str(tmp_path / "hg"), "out"], ["RUN_DIR=", "no such"]),
    ]:
        assert cli.main([*argv[:2], str(tmp_path / argv[2])]) == 2
        text = capsys.readouterr().err
        assert len(text.splitlines()) == 1 and all(word in text for word in words), text
    assert sorted(tmp_path.iterdir()) == before


# --- memory

MEASURE = """
import gc, sys
from pathlib import Path
import jax, jax.numpy as jnp
from cir_jax import config as configs, mesh as meshes
from cir_jax.models import hf, qwen

cfg = configs.ModelConfig.model_validate_json(sys.argv[1])
out, tokenizer = Path(sys.argv[2]), configs.asset_dir("package:quickstart/tokenizer")
mesh = meshes.make_mesh(configs.MeshConfig())


def status(field):
    (line,) = [x for x in open("/proc/self/status") if x.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def extra(work):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = status("VmRSS")
    result = work()
    return status("VmHWM") - before, result


# What is imported on first use belongs to the process's base.
hf.Tokenizer(tokenizer)
params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), qwen.abstract_params(cfg))
exported, _ = extra(lambda: hf.export(params, cfg, out, tokenizer, 50_000_000))
del params
imported, params = extra(lambda: jax.block_until_ready(hf.load(out, cfg, mesh)))
assert all(bool((x == 0.5).all()) for x in jax.tree.leaves(params))
print(exported, imported)
"""


def test_host_memory_stays_under_twice_the_largest_tensor(tmp_path):
    cfg = ModelConfig(
        vocab_size=8192, width=512, num_layers=16, num_heads=8, num_kv_heads=2, head_dim=64,
        mlp_width=2048, rope_theta=1e4,
    )  # fmt: skip
    environment = os.environ | {
        "XLA_FLAGS": "",
        # Every array of a MB or more goes back to the system when it is freed; glibc's own
        # threshold rises to 32 MB, and what it keeps below would count.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }
    argv = [sys.executable, "-c", MEASURE, cfg.model_dump_json(), str(tmp_path / "hf")]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    exported, imported = (int(word) / 2**20 for word in done.stdout.split())
    print(f"beyond the process's base: export {exported:.0f} MiB, import {imported:.0f} MiB")
    # In MiB: the largest tensor is the table, 8192 x 512 float32; each of the 16 layers has three
    # MLP matrices of 4, q and o of 1, k and v of 0.25.
    largest, params = 16, 16 * (3 * 4 + 2 * 1 + 2 * 0.25) + 16
    # Compiled programs and what else the first use leaves; one stacked MLP matrix would be 64.
    slack = 40
    assert exported <= 2 * largest + slack
    # On a CPU the parameters lie in the host's memory too.
    assert params * 0.9 <= imported <= params + 2 * largest + slack
