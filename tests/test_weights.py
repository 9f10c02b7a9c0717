"""import-hf and export-hf: what they write and refuse, and how much memory they take."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_table import (
    ONE_DEVICE_FLAGS,
    QWEN2,
    QWEN3,
    TOKENIZER,
    YARN,
    assert_same,
    one_device,
    params_of,
)

from cir_jax import cli
from cir_jax import mesh as meshes
from cir_jax.config import LoRAConfig, MeshConfig, ModelConfig
from cir_jax.models import hf, lora, qwen, tensorfile
from cir_jax.models.hf_config import read_config
from cir_jax.models.hf_directory import CONFIG, GENERATION, WEIGHTS
from cir_jax.train import weights

SMALL_SHARDS = 20_000  # bytes
TYPES = [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("dtype", TYPES, ids=["float32", "bfloat16"])
def test_import_and_export_are_exact(tmp_path, capsys, dtype):
    cfg = QWEN3.model_copy(update={"yarn": YARN})
    params = params_of(cfg, dtype)
    first, imported, second = (tmp_path / name for name in ("first", "imported", "second"))
    hf.export(params, cfg, first, TOKENIZER, SMALL_SHARDS)
    (first / "README.md").write_text("not needed")
    assert cli.main(["import-hf", str(first), str(imported), "--dtype", dtype.dtype.name]) == 0
    assert cli.main(["export-hf", str(imported), str(second)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(imported), str(second)]
    names = {CONFIG, GENERATION, "vocab.json", "merges.txt", "tokenizer_config.json"}
    for directory in (imported, second):
        assert {file.name for file in directory.iterdir()} == names | {WEIGHTS}
        assert_same(hf.load(directory, cfg, one_device(), dtype), params)
        for name in names:
            assert (directory / name).read_text() == (first / name).read_text()


@pytest.mark.parametrize("source", TYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("target", TYPES, ids=["float32", "bfloat16"])
def test_a_run_starts_from_imported_weights(tmp_path, source, target):
    """Whatever type they were published and are kept in."""
    hf.export(params_of(QWEN2, source), QWEN2, tmp_path / "hf", TOKENIZER)
    weights.import_hf(str(tmp_path / "hf"), tmp_path / "imported", target.dtype.name)
    stored = tensorfile.read_header(tmp_path / "imported" / WEIGHTS)
    assert {tensorfile.DTYPES[x.dtype] for x in stored.values()} == {jnp.dtype(target)}
    kept = jax.tree.map(lambda x: x.astype(target), params_of(QWEN2, source))
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    loaded = weights.load(tmp_path / "imported", QWEN2, mesh, 0)
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), kept))


def test_weights_of_another_model_are_refused(tmp_path):
    hf.export(params_of(QWEN2), QWEN2, tmp_path, TOKENIZER)
    other = QWEN2.model_copy(update={"rope_theta": 1.0})
    with pytest.raises(ValueError, match=r"rope_theta=500.0, but model.rope_theta=1.0"):
        weights.load(tmp_path, other, one_device(), 0)
    # These two change what is computed, not what is stored.
    longer = QWEN2.model_copy(update={"max_positions": 512, "yarn": YARN})
    assert_same(weights.load(tmp_path, longer, one_device(), 0), params_of(QWEN2))


def test_weights_without_a_tokenizer(tmp_path):
    """Such a source is taken; what is not there is not written."""
    hf.export(params_of(QWEN2), QWEN2, tmp_path / "hf", TOKENIZER)
    for file in (tmp_path / "hf").iterdir():
        if file.name not in (CONFIG, WEIGHTS):
            file.unlink()
    weights.import_hf(str(tmp_path / "hf"), tmp_path / "imported", "float32")
    assert {file.name for file in (tmp_path / "imported").iterdir()} == {CONFIG, WEIGHTS}
    assert read_config(tmp_path / "imported") == QWEN2


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys):
    hf.export(params_of(QWEN2), QWEN2, tmp_path / "hf", TOKENIZER)
    (tmp_path / "hf" / WEIGHTS).rename(tmp_path / "hf" / "model.safetensors.index.json")
    before = sorted(tmp_path.iterdir())
    for argv, words in [
        (["import-hf", "nobody/nothing", "out"], ["nobody/nothing", "no such directory", "hub"]),
        (["import-hf", "./no/such/path", "out"], ["./no/such/path", "no such directory"]),
        (["import-hf", str(tmp_path / "hf"), "out"], ["index.json", "not JSON"]),
        (["export-hf", str(tmp_path / "hf"), "out"], ["index.json", "not JSON"]),
        (["import-hf", str(TOKENIZER), "out"], [CONFIG, "no such file"]),
        (["import-hf", "nobody/nothing", "hf"], ["OUT=", "exists"]),
        (["export-hf", str(tmp_path / "hf"), "hf"], ["OUT=", "exists"]),
        (["export-hf", str(tmp_path / "hg"), "out"], ["RUN_DIR=", "no such"]),
    ]:
        assert cli.main([*argv[:2], str(tmp_path / argv[2])]) == 2
        text = capsys.readouterr().err
        assert len(text.splitlines()) == 1 and all(word in text for word in words), text
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["import-hf", "export-hf"])
def test_a_failure_halfway_leaves_nothing(tmp_path, monkeypatch, capsys, command):
    hf.export(params_of(QWEN2), QWEN2, tmp_path / "hf", TOKENIZER)
    read = []

    def fail(*args):
        read.append(args)
        if len(read) > 5:
            raise OSError("no space left on device")
        return read_all(*args)

    read_all = tensorfile.read
    monkeypatch.setattr(tensorfile, "read", fail)
    assert cli.main([command, str(tmp_path / "hf"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"cir-jax: {command}: no space left on device\n"
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


# --- memory

MEASURE = """
import gc, json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from cir_jax import cli, config as configs, mesh as meshes
from cir_jax.models import hf, qwen

directory, tokenizer = Path(sys.argv[1]), configs.asset_dir("package:quickstart/tokenizer")
cfgs = [configs.ModelConfig.model_validate_json(text) for text in sys.argv[2:]]
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


def command(*argv):
    assert cli.main(argv) == 0


# The first model is small: what is imported and compiled on first use belongs to the base.
for name, cfg in zip("ab", cfgs, strict=True):
    a, b, c, d = (directory / name / x for x in "abcd")
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), qwen.abstract_params(cfg))
    hf.export(params, cfg, a, tokenizer, 50_000_000)
    figures = {"export of parameters": extra(lambda: hf.export(params, cfg, b, tokenizer))[0]}
    del params
    figures["import-hf"] = extra(lambda: command("import-hf", str(a), str(c)))[0]
    figures["export-hf"] = extra(lambda: command("export-hf", str(c), str(d)))[0]
    hf.load(c, cfg, mesh)
    figures["load"], params = extra(lambda: jax.block_until_ready(hf.load(c, cfg, mesh)))
    assert all(bool((x == 0.5).all()) for x in jax.tree.leaves(params))
    del params
print(json.dumps(figures))
"""


@pytest.mark.slow
def test_host_memory_stays_under_twice_the_largest_tensor(tmp_path):
    cfg = ModelConfig(
        vocab_size=8192, width=512, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=64,
        mlp_width=2048, rope_theta=1e4,
    )  # fmt: skip
    environment = os.environ | {
        "XLA_FLAGS": ONE_DEVICE_FLAGS,
        # Every array of a MB or more goes back to the system when it is freed; glibc's own
        # threshold rises to 32 MB, and what it keeps below would count.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }
    models = (model.model_dump_json() for model in (QWEN2, cfg))
    argv = [sys.executable, "-c", MEASURE, str(tmp_path), *models]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    mib = {name: value / 2**20 for name, value in figures.items()}
    print("MiB beyond the process's base:", {name: round(x) for name, x in mib.items()})
    # In MiB: the largest tensor is the table, 8192 x 512 float32; each of the 8 layers has three
    # MLP matrices of 4, q and o of 1, k and v of 0.25.
    largest, params = 16, 8 * (3 * 4 + 2 * 1 + 2 * 0.25) + 16
    for name in ("export of parameters", "import-hf", "export-hf"):
        assert mib[name] < 2 * largest, name
    # On a CPU the parameters lie in the host's memory too.
    assert params * 0.9 < mib["load"] < params + 2 * largest


def test_adapters_are_added_and_merged(tmp_path):
    """A run starts from stored weights with adapters that change nothing; what it exports after
    they have moved is a plain model that computes the same."""
    hf.export(params_of(QWEN2), QWEN2, tmp_path / "base", TOKENIZER)
    adapted = QWEN2.model_copy(update={"lora": LoRAConfig(rank=2, alpha=2.0, targets=("k", "up"))})
    params = weights.load(tmp_path / "base", adapted, one_device(), 0)
    adapters, base = lora.split(params, adapted)
    assert_same(base, params_of(QWEN2))
    assert len(jax.tree.leaves(adapters)) == 4
    params = lora.join(jax.tree.map(lambda x: x + 0.1, adapters), base)
    hf.export(params, adapted, tmp_path / "out", TOKENIZER)
    exported = weights.load(tmp_path / "out", QWEN2, one_device(), 0)
    ids = jnp.arange(12)[None]
    args = ids, ids, jnp.ones_like(ids)
    got, expected = qwen.forward(exported, QWEN2, *args), qwen.forward(params, adapted, *args)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(got - qwen.forward(base, QWEN2, *args)).max() > 0.01
