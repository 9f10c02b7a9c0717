"""The programs of a 7B run, compiled for TPU slices that are not here, as `cir-jax aot` does.

What fits, how fast the compiler thinks it is, and what must not be in it: arrays of tokens x
vocabulary, weights that are summed whole or gathered in float32, copies of the cache.

Run with `pytest -m tpu`; needs the extra `tpu` (libtpu) and minutes, the first time.
"""

import functools
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from cir_jax import cli
from cir_jax import config as configs
from cir_jax.aot import compilation, fit, hlo, lengths, work
from cir_jax.aot.chips import topology

slow = pytest.mark.slow
pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu: pip install -e '.[tpu]'",
    ),
]

CONFIGS = Path(__file__).parent.parent / "configs"
SLICES = {
    "v5e16": "v5e:4x4",
    "v5e64": "v5e:8x8",
    "v6e16": "v6e:4x4",
    "v5p8": "v5p:2x2x1",
    "v5p16": "v5p:2x2x2",
}
GIB = 2**30


def load(run, *overrides):
    return configs.load_alone(CONFIGS / f"cir_qwen2.5_math_7b_{run}.toml", overrides)


@functools.cache
def compiled(run, program, *overrides):
    return compilation.compile_program(load(run, *overrides), topology(SLICES[run]), program)


@functools.cache
def parsed(run, program, *overrides):
    return hlo.parse(compiled(run, program, *overrides).text)


# Two layers are compiled to the same loops as 28.
SMALL = ("model.num_layers=2",)


# --- an update


@pytest.mark.parametrize(
    ("run", "gib", "rate"),
    [
        pytest.param("v5e16", 12.6, 2100, marks=slow),
        pytest.param("v5e64", 5.3, 2100, marks=slow),
        pytest.param("v6e16", 14.3, 5600, marks=slow),
        pytest.param("v5p8", 44.0, 4700, marks=slow),
        pytest.param("v5p16", 25.0, 4700, marks=slow),
    ],
)
def test_7b_updates(run, gib, rate):
    """Of 655,360 tokens with float32 Adam: GiB of a device, estimated tokens/s/chip at least."""
    cfg, where = load(run), topology(SLICES[run])
    facts = compiled(run, "update")
    assert facts.peak_bytes / GIB <= gib and facts.host_bytes <= 2 * GIB
    micro_batches = 655_360 // (cfg.rl.micro_rows * cfg.max_length)
    seconds = work.of_micro_batches(facts, "update", micro_batches).seconds(where)
    assert 655_360 / seconds / where.num_chips >= rate
    # The state goes out where it came in; only the metrics are new.
    assert facts.memory["output"] - facts.memory["alias"] < 2**20


@slow
def test_bfloat16_moments_leave_room():
    facts = compiled("v5e16", "update", "rl.optim.moments=bfloat16")
    assert facts.peak_bytes / GIB <= 10.9


def test_an_update_holds_no_array_of_tokens_by_vocabulary():
    """Logits are of 512 tokens of each of the 16 devices by a 16th of the vocabulary, 9504."""
    cfg = load("v5e16", *SMALL)
    text = compiled("v5e16", "update", *SMALL).text
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([0-9,]+)\]", text)
    sizes = {tuple(map(int, shape.split(","))) for shape in shapes}
    assert (8192, 9504) in sizes
    V, D = cfg.model.vocab_size, cfg.model.width
    for size in sizes:
        if V in size:
            assert math.prod(size) <= V * D // 16, size  # the table's shard
        assert math.prod(size) < cfg.max_length * V, size


def weight_sized(cfg):
    """Elements of the smallest matrix: keys' or values'."""
    return cfg.model.width * cfg.model.num_kv_heads * cfg.model.head_dim


@pytest.mark.parametrize("program", ["update", "old log-probabilities"])
def test_weights_are_gathered_in_bfloat16_and_never_summed_whole(program):
    cfg = load("v5e16", *SMALL)
    facts = compiled("v5e16", program, *SMALL)
    found = work.of_micro_batches(facts, program, 1).collectives
    large = [c for c in found if c.bytes >= 2 * weight_sized(cfg)]
    gathers = [c for c in large if c.kind == "all-gather"]
    # At least the seven matrices of a layer.
    assert len(gathers) >= 7 and all(c.dtypes == ("bf16",) for c in gathers)
    # Small gathers may be written as sums of parts that are zero elsewhere.
    others = [c for c in large if not c.op_name.endswith("all_gather")]
    assert {c.kind for c in others} <= {"all-gather", "all-to-all", "reduce-scatter"}, others
    if program == "update":
        scattered = [c for c in large if c.kind == "reduce-scatter"]
        assert len(scattered) >= 7 and all(c.dtypes == ("bf16",) for c in scattered)


# --- decoding


@pytest.mark.parametrize(
    ("run", "slots", "gib", "ratio", "rate", "changes"),
    [
        ("v5e16", 256, 8.1, 1.05, 1200, ()),
        pytest.param("v5e16", 512, 12.6, 1.05, 1700, (), marks=slow),
        pytest.param("v6e16", 512, 12.6, 1.05, 3400, (), marks=slow),
        # v5p writes scores and states to HBM; attention's share of the bytes grows with the rows.
        pytest.param("v5p8", 64, 8.1, 1.15, 2200, (), marks=slow),
        pytest.param("v5p8", 256, 21.5, 1.25, 4200, (), marks=slow),
        pytest.param("v5p16", 512, 21.5, 1.25, 4200, (), marks=slow),
        # Scales are stored by layers.
        pytest.param("v5e16", 512, 8.6, 1.1, 1700, ("rollout.cache_dtype=int8",), marks=slow),
    ],
)
def test_decoding(run, slots, gib, ratio, rate, changes):
    """Of one device: GiB, bytes of a step to the cache's end by what it has to read, and
    estimated tokens/s/chip where rows are up to 2048 long."""
    overrides = (f"rollout.slots={slots}", *changes)
    cfg, where = load(run, *overrides), topology(SLICES[run])
    facts = compiled(run, "rollout", *overrides)
    plan = compilation.plan(cfg, where)
    assert facts.peak_bytes / GIB <= gib
    for bucket in (2048, plan.cache_length):
        step = work.of_decode_step(cfg, plan, facts, bucket)
        needed = work.decode_bytes(cfg, bucket)
        # Small weights may be loaded once for all steps.
        assert 0.97 * needed <= step.traffic <= ratio * needed, bucket
    seconds = work.of_decode_step(cfg, plan, facts, 2048).seconds(where)
    assert cfg.rollout.slots / seconds / where.num_chips >= rate

    module = parsed(run, "rollout", *overrides)
    rows = slots // (cfg.mesh.decoding.data * cfg.mesh.decoding.fsdp)
    local_heads = cfg.model.num_kv_heads // cfg.mesh.decoding.tensor
    itemsize = 1 if changes else 2
    keys = rows * local_heads * plan.cache_length * cfg.model.head_dim * itemsize
    # Prefill and prompts' forks too work in place. Before all loops, a weight may be laid out anew,
    # and the scales of int8; nothing as large as the keys is.
    for loop in ("/put_in/while", "/copy_prompts/while", "/decode/while"):
        assert hlo.large_writes(module, keys, loop=loop) == []
    assert hlo.large_writes(module, cfg.model.num_layers * keys, loop=None) == []
    # Float32 logits would be ten times the hidden states, of slots or of tokens that are put in.
    group = -(-cfg.rollout.prefill_rows // (cfg.mesh.decoding.data * cfg.mesh.decoding.fsdp))
    for instruction, size in hlo.collectives(module):
        decodes = "/decode/" in instruction.op_name
        tokens = rows if decodes else group * cfg.rollout.prefill_chunk
        assert size <= tokens * cfg.model.width * 4, instruction


def test_fewer_devices_than_heads():
    """1.5B on four chips, each with weights of its own."""
    changes = (
        "model.preset=Qwen2.5-1.5B",
        "mesh.fsdp=4",
        "mesh.decode_tensor=1",
        "rollout.slots=64",
        "rl.micro_rows=4",
    )
    cfg, where = load("v5e16", *changes), topology("v5e:2x2")
    facts = compilation.compile_program(cfg, where, "rollout")
    plan = compilation.plan(cfg, where)
    step = work.of_decode_step(cfg, plan, facts, plan.cache_length)
    assert step.traffic <= 1.05 * work.decode_bytes(cfg, plan.cache_length)


# --- weights from one layout to the other


@slow
def test_weights_for_decoding_are_cast_before_they_travel():
    facts = compiled("v5e16", "weights")
    assert facts.peak_bytes / GIB <= 9.5
    moved = work.whole(facts)
    assert all("f32" not in c.dtypes for c in moved.collectives if c.bytes > 2**24)
    assert moved.links_s(topology("v5e:4x4"), blocking=True) <= 0.15


# --- the command


def test_what_does_not_fit_is_refused_with_the_number(capsys):
    """An update needs 21.4 GiB of 15.75; the mesh of 16 is made one of 8."""
    path = str(CONFIGS / "cir_qwen2.5_math_7b_v5e16.toml")
    assert cli.main(["aot", path, "--topology", "v5e:2x4", "--json"]) == 3
    out, err = capsys.readouterr()
    (update,) = [p for p in json.loads(out)["programs"] if p["program"] == "update"]
    assert not update["fits"] and 20 < update["gib"] < 23
    assert f"update does not fit: needs {update['live_gib']:.2f} GiB" in err
    assert "of 15.75 usable" in err and "v5e:2x4 has 8" in err


def test_the_command_reports_a_small_run(capsys):
    """The quickstart's, on one chip, fits; its figures are finite and of the lengths given."""
    path = str(CONFIGS / "quickstart.toml")
    command = ["aot", path, "--topology", "v5e:1x1", "--json", "--price", "1.2", "sft.steps=0"]
    assert cli.main([*command, "--response", "64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["note"] == "not measured on hardware"
    assert report["step"]["lengths"]["response"] == 64
    assert report["step"]["seconds"] > report["step"]["ideal_s"] > 0
    hours = report["step"]["seconds"] * report["step"]["steps"] / 3600
    assert report["step"]["chip_hours"] == pytest.approx(hours)
    assert report["step"]["cost"] == pytest.approx(1.2 * hours)
    names = [program["program"] for program in report["programs"]]
    assert {"weights", "slots", "rollout", "update"} <= set(names)
    assert all(program["top_buffers"] for program in report["programs"] if program["gib"] > 0.01)


def test_a_cost_is_of_the_whole_program():
    """Twice the micro-batches take twice the cycles, but for what comes before and after."""
    facts = compiled("v5e16", "update", *SMALL)
    one, two, three = (work.of_micro_batches(facts, "update", n) for n in (1, 2, 3))
    assert three.cycles - two.cycles == two.cycles - one.cycles > 0


@slow
def test_a_small_run_is_fitted_to_a_chip(capsys):
    """All of it fits: nothing is computed again, and each response of a step has a slot."""
    path = str(CONFIGS / "quickstart.toml")
    changes = ["sft.steps=0", "compute.remat=full", "rollout.slots=8"]
    command = ["aot", path, "--topology", "v5e:1x1", "--auto-fit", "--json"]
    assert cli.main([*command, *changes]) == 0
    found = json.loads(capsys.readouterr().out)["overrides"]
    fitted = configs.load_alone(path, [*changes, *found])
    assert fitted.compute.remat == "none"
    rollout = fitted.rollout
    assert rollout.slots == rollout.prompts_per_step * rollout.samples_per_prompt


@slow
def test_a_large_run_is_fitted_to_a_slice():
    """On 16 chips of v5e beside float32 Adam: two rows of a device, everything computed again, and
    fewer than 512 slots but more than 256."""
    cfg, where = load("v5e16", "rollout.slots=128"), topology("v5e:4x4")
    fitted = fit.fitted(cfg, where, lengths.default(cfg, None, None), print)
    assert (fitted.compute.remat, fitted.rl.micro_rows) == ("full", 32)
    assert 256 < fitted.rollout.slots < 512
