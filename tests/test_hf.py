"""Weights: ours -> Hugging Face -> ours, bit-exact, on any mesh; every mistake is named."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models_table import (
    ONE_DEVICE_FLAGS,
    QWEN2,
    QWEN3,
    TOKENIZER,
    UNTIED,
    assert_same,
    both_families,
    one_device,
    params_of,
)
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from cir_jax import mesh as meshes
from cir_jax.config import MeshConfig
from cir_jax.models import hf, qwen, tensorfile
from cir_jax.models.hf_config import read_config
from cir_jax.models.hf_directory import CONFIG, GENERATION, INDEX, WEIGHTS

SMALL_SHARDS = 20_000  # bytes; the float32 embedding has 6144


def export(directory, cfg, shard_bytes=hf.SHARD_BYTES, dtype=jnp.float32):
    hf.export(params_of(cfg, dtype), cfg, directory, TOKENIZER, shard_bytes)


# --- ours -> Hugging Face -> ours


@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, SMALL_SHARDS, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("cfg", "shape"), [(UNTIED, (2, 2, 2)), (QWEN3, (1, 4, 2))], ids=["qwen2", "qwen3"]
)
def test_round_trip_is_exact(tmp_path, cfg, shape, dtype, shard_bytes):
    mesh = meshes.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    shardings = qwen.param_shardings(cfg, mesh)
    placed = jax.device_put(params_of(cfg, dtype), shardings)
    hf.export(placed, cfg, tmp_path / "hf", TOKENIZER, shard_bytes)
    assert read_config(tmp_path / "hf") == cfg
    loaded = hf.load(tmp_path / "hf", cfg, mesh, dtype)
    assert_same(loaded, params_of(cfg, dtype))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded, shardings))

    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    tensors = [load_file(file) for file in files]
    if shard_bytes == hf.SHARD_BYTES:
        assert [file.name for file in files] == [WEIGHTS]
        assert not (tmp_path / "hf" / INDEX).exists()
    else:
        index = json.loads((tmp_path / "hf" / INDEX).read_text())
        held = {name: f.name for f, t in zip(files, tensors, strict=True) for name in t}
        assert len(files) > 1 and held == index["weight_map"]
        sizes = [sum(x.nbytes for x in t.values()) for t in tensors]
        assert sum(sizes) == index["metadata"]["total_size"]
        alone = [len(t) == 1 for t in tensors]
        assert all(a or size <= shard_bytes for a, size in zip(alone, sizes, strict=True))


@both_families
def test_transformers_loads_shards_without_a_complaint(tmp_path, cfg):
    """And what it saves, in the type that published weights have, is read back exactly."""
    export(tmp_path / "ours", cfg, SMALL_SHARDS, jnp.bfloat16)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", output_loading_info=True
    )
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    added = json.loads((TOKENIZER / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert added[str(model.generation_config.eos_token_id)]["content"] == "<|endoftext|>"
    model.save_pretrained(tmp_path / "theirs")
    loaded = hf.load(tmp_path / "theirs", cfg, one_device())
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), params_of(cfg, jnp.bfloat16))
    assert_same(loaded, rounded)


def test_the_type_can_be_chosen(tmp_path):
    export(tmp_path, QWEN2)
    loaded = hf.load(tmp_path, QWEN2, one_device(), jnp.bfloat16)
    assert_same(loaded, params_of(QWEN2, jnp.bfloat16))


def test_a_table_stored_twice_is_accepted(tmp_path):
    export(tmp_path, QWEN2)
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert_same(hf.load(tmp_path, QWEN2, one_device()), params_of(QWEN2))


def test_companions_are_copied_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in TOKENIZER.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / GENERATION).write_text('{"eos_token_id": [3, 4]}')
    for name in ("config.json", "model.safetensors", "README.md"):
        (source / name).write_text("theirs")
    hf.export(params_of(QWEN2), QWEN2, tmp_path / "out", source)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    shipped = {file.name for file in TOKENIZER.iterdir()}
    assert names == shipped | {CONFIG, WEIGHTS, GENERATION}
    assert (tmp_path / "out" / GENERATION).read_text() == '{"eos_token_id": [3, 4]}'
    assert read_config(tmp_path / "out") == QWEN2


BIAS_AND_NORM = QWEN3.model_copy(update={"qkv_bias": True})
NO_BIAS_NO_NORM = QWEN2.model_copy(update={"qkv_bias": False})


@pytest.mark.parametrize("cfg", [BIAS_AND_NORM, NO_BIAS_NO_NORM], ids=["both", "neither"])
def test_models_that_transformers_lacks_are_not_exported(tmp_path, cfg):
    with pytest.raises(ValueError, match=r"model\.qkv_bias=.*qk_norm="):
        export(tmp_path, cfg)


# --- blocks and rows of a file


def test_blocks_of_rows_are_the_tensor(tmp_path, monkeypatch):
    export(tmp_path, UNTIED)
    expected = load_file(tmp_path / WEIGHTS)
    for block_bytes in (1, 200, 10**6):
        monkeypatch.setattr(tensorfile, "BLOCK_BYTES", block_bytes)
        for name, tensor in tensorfile.read_header(tmp_path / WEIGHTS).items():
            blocks = [*tensorfile.read_blocks(tensor)]
            row_bytes = expected[name][0].nbytes
            assert all(x.nbytes <= max(block_bytes, row_bytes) for x in blocks)
            np.testing.assert_array_equal(np.concatenate(blocks), expected[name])


PROCESS = """
import json, sys
from pathlib import Path
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
import numpy as np
from models_table import UNTIED, params_of
from cir_jax import mesh as meshes
from cir_jax.models import hf, tensorfile

rows = []

def read(tensor, first=0, end=None):
    rows.append((tensor.shape, first, end))
    return read_all(tensor, first, end)

read_all, tensorfile.read = tensorfile.read, read
# Of training, where a process has rows of its own, this is no mesh.
auto = (jax.sharding.AxisType.Auto,) * 3
mesh = jax.make_mesh((1, 1, 2), meshes.AXES, axis_types=auto)
loaded = hf.load(Path(sys.argv[3]), UNTIED, mesh)
for x, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(params_of(UNTIED)), strict=True):
    (shard,) = x.addressable_shards
    np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
print(json.dumps(sorted(set(rows))))
"""


def test_each_process_reads_the_rows_that_it_holds(tmp_path):
    export(tmp_path / "hf", UNTIED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "XLA_FLAGS": ONE_DEVICE_FLAGS,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(number), str(tmp_path / "hf")],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    for number, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        # Vocabulary, heads and MLP are cut in two, in HF's order [out, in]. What has them as
        # inputs (o, down) or not at all (norms) is read whole.
        half = [
            [shape, number * shape[0] // 2, (number + 1) * shape[0] // 2]
            for shape in ([64, 24], [24, 24], [12, 24], [40, 24], [24], [12])
        ]
        whole = [[shape, 0, 24] for shape in ([24, 24], [24, 40], [24])]
        assert json.loads(out.splitlines()[-1]) == sorted(half + whole)


# --- what is wrong with a directory


def change(directory, edit, file=0):
    """Edits the tensors of one of the directory's files, in their order."""
    path = sorted(directory.glob("*.safetensors"))[file]
    tensors = load_file(path)
    edit(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)


def second(directory):
    return sorted(directory.glob("model-*.safetensors"))[1]


def truncate(directory):
    os.truncate(second(directory), second(directory).stat().st_size - 5)


def truncate_in_the_header(directory):
    os.truncate(second(directory), 60)


def empty(directory):
    second(directory).write_bytes(b"")


def junk(directory):
    second(directory).write_bytes((9).to_bytes(8, "little") + b"not json!")


def remove(directory):
    second(directory).unlink()


def remove_all(directory):
    for file in [*directory.glob("model-*.safetensors"), directory / INDEX]:
        file.unlink()


def edit_index(edit):
    def damage(directory):
        index = json.loads((directory / INDEX).read_text())
        edit(index)
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def edit_shard(edit):
    return lambda directory: change(directory, edit, file=1)


NAME = "model.norm.weight"


def first_shard_again(tensors):
    tensors["model.embed_tokens.weight"] = np.zeros((64, 24), np.float32)


def assert_refused(directory, cfg, words):
    """By everything that reads a directory, in one line with these words; nothing is written."""
    target = directory / "converted"
    target.mkdir()
    for read in (
        lambda: hf.load(directory, cfg, one_device()),
        lambda: hf.convert(directory, target, None),
    ):
        with pytest.raises(ValueError) as caught:
            read()
        text = str(caught.value)
        assert len(text.splitlines()) == 1 and all(word in text for word in words), text
    assert [*target.iterdir()] == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ["model-00002-of-", "truncated"]),
        (truncate_in_the_header, ["model-00002-of-", "truncated"]),
        (empty, ["model-00002-of-", "truncated"]),
        (junk, ["model-00002-of-", "header"]),
        (remove, [INDEX, "names model-00002-of-", "missing"]),
        (remove_all, [WEIGHTS, INDEX]),
        (edit_index(lambda i: i.pop("weight_map")), [INDEX, "weight_map"]),
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
    export(tmp_path, UNTIED, SMALL_SHARDS)
    damage(tmp_path)
    assert_refused(tmp_path, UNTIED, words)


def drop(name):
    return lambda tensors: tensors.pop(name)


def transpose(name):
    return lambda tensors: tensors.update({name: tensors[name].T})


def add(name):
    return lambda tensors: tensors.update({name: np.zeros(3, np.float32)})


UP = "mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop("model.norm.weight"), ["missing", "model.norm.weight"]),
        (drop(f"model.layers.2.{UP}"), ["missing", f"model.layers.2.{UP}"]),
        (drop("lm_head.weight"), ["missing", "lm_head.weight"]),
        (add("model.extra"), ["unexpected", "model.extra"]),
        (add(f"model.layers.3.{UP}"), ["unexpected", f"layers.3.{UP}"]),
        (transpose("model.embed_tokens.weight"),
         ["model.embed_tokens.weight", "(24, 64)", "(64, 24)"]),
        # As many entries as expected, in another order.
        (transpose(f"model.layers.1.{UP}"), [f"model.layers.1.{UP}", "(24, 40)", "(40, 24)"]),
        (add("model.layers.0.self_attn.q_proj.bias"),
         ["model.layers.0.self_attn.q_proj.bias", "(3,)", "(24,)"]),
    ],
)  # fmt: skip
def test_the_wrong_tensor_is_named(tmp_path, edit, words):
    export(tmp_path, UNTIED)
    change(tmp_path, edit)
    assert_refused(tmp_path, UNTIED, words)


def test_a_header_that_lies_about_a_size(tmp_path):
    shapes = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    tensorfile.write(tmp_path / "x", shapes, lambda _: [np.eye(2, 3, dtype=np.float32)])
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
        export(tmp_path / "a" / "hf", QWEN2, SMALL_SHARDS)
    assert [*(tmp_path / "a").iterdir()] == []


def test_a_directory_with_contents_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="exists; must be new or an empty"):
        export(tmp_path, QWEN2)
    with pytest.raises(ValueError, match="exists; must be new or an empty"):
        export(tmp_path / "mine", QWEN2)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
