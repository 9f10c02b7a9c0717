"""What `cir-jax aot` reports: of real programs, by texts with the figures worked out."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_text import loop_of, module
from test_learn import TINY, step_of

from cir_jax import cli
from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.aot import child, cost, fit, lengths, report, text, work
from cir_jax.aot.chips import topology
from cir_jax.aot.compilation import Facts, Plan
from cir_jax.jitted import device_bytes
from cir_jax.rollout import schedule
from cir_jax.rollout.engine import Engine
from cir_jax.rollout.sampling import Sampling
from cir_jax.tokenizer import Tokenizer
from cir_jax.train import compiled, learn

ROOT = Path(__file__).parent.parent
V5E, V5P = topology("v5e:4x4"), topology("v5p:2x2x2")
SEVEN_B = ROOT / "configs/cir_qwen2.5_math_7b_v5e16.toml"


def cost_of(entry, *others, trips=None, loop=None):
    return cost.cost(module(entry, *others), trips=trips or {}, loop=loop)


# --- what a program costs


def test_cycles_count_as_often_as_they_run():
    """From 1 to 10 by steps of 2: 5 times 7 cycles, and 100 outside."""
    estimated = 'negate(%x), backend_config={"estimated_cycles":"7"}'
    entry, *others = loop_of("constant(10)", body=("negate(%x)", estimated))
    entry = entry.replace("parameter(0)", 'parameter(0), x={"estimated_cycles":"100"}')
    assert cost_of(entry, *others).cycles == 5 * 7 + 100


GATHER = """
  %p = bf16[4,8]{1,0} parameter(0)
  %g = bf16[64,8]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,\
12,13,14,15}}, dimensions={0}
  ROOT %c = (bf16[4,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) custom-call(%g), \
custom_call_target="AsyncCollectiveStart\""""
BESIDE = """
  %p = bf16[4,8]{1,0} parameter(0)
  %n = bf16[4,8]{1,0} negate(%p)
  %g = bf16[64,8]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,\
12,13,14,15}}, dimensions={0}
  ROOT %t = (bf16[4,8]{1,0}, bf16[64,8]{1,0}) tuple(%n, %g)"""


def test_an_asynchronous_collective_counts_once_where_it_begins():
    """The one that begins in a fusion and goes on in another is one; the plain one blocks."""
    entry = """
  %x = bf16[4,8]{1,0} parameter(0)
  %a = (bf16[4,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%starts
  %b = (bf16[4,8]{1,0}, bf16[64,8]{1,0}) fusion(%x), kind=kOutput, calls=%async_collective_fusion.1
  %s = f32[] parameter(1)
  ROOT %r = f32[] all-reduce(%s), channel_id=1, replica_groups=[4,4]<=[16], to_apply=%add"""
    found = cost_of(
        entry,
        ("starts (p: bf16[4,8]) -> bf16[4,8]", GATHER),
        ("async_collective_fusion.1 (p: bf16[4,8]) -> bf16[4,8]", BESIDE),
    ).collectives
    kinds = [(c.kind, c.dtypes, c.size, c.bytes, c.times, c.blocking) for c in found]
    assert kinds == [
        ("all-gather", ("bf16",), 16, 64 * 8 * 2, 1, False),
        ("all-reduce", ("f32",), 4, 4, 1, True),
    ]


def test_a_sum_of_which_a_slice_is_kept_is_scattered():
    inner = """
  %p = bf16[64,8]{1,0} parameter(0)
  %s = bf16[64,8]{1,0} all-reduce(%p), replica_groups={{0,4,8,12}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %d = bf16[16,8]{1,0} dynamic-slice(%s, %i, %i), dynamic_slice_sizes={16,8}"""
    entry = """
  %x = bf16[64,8]{1,0} parameter(0)
  ROOT %f = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3"""
    (found,) = cost_of(entry, ("all-reduce-scatter.3 (p: f32[]) -> f32[]", inner)).collectives
    assert (found.kind, found.size, found.bytes, found.blocking) == (
        "reduce-scatter",
        4,
        1024,
        True,
    )


def test_seconds_of_a_collective():
    """Over 16 chips of v5e both axes' links; over 4 of them one. Each passes on all but its part;
    a sum goes round twice; a blocking one takes 5 us more."""
    gather = cost.Collective("all-gather", ("bf16",), 16, 9 * 10**9, 2, False, "")
    assert gather.seconds(V5E) == pytest.approx(2 * 9e9 * 15 / 16 / 9e10)
    total = cost.Collective("all-reduce", ("f32",), 4, 9 * 10**9, 1, True, "")
    assert total.seconds(V5E) == pytest.approx(2 * 9e9 * 3 / 4 / 4.5e10 + 5e-6)


def test_attention_kernels_are_counted_by_their_blocks():
    """2048 positions in blocks of 1024: 3 of 4 blocks are live, for each of 28 heads."""
    kernel = """
  %q = bf16[28,2048,128]{2,1,0} parameter(0)
  %k = bf16[4,2048,128]{2,1,0} parameter(1)
  ROOT %splash_mha_dkv.1 = bf16[28,2048,128]{2,1,0} custom-call(%q, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q_dkv\\": 1024}"
}}, metadata={op_name="jit(f)/splash"}"""
    found = cost_of(kernel)
    assert found.kernel_flops == (0, 10 * 1024**2 * 128 * 3 * 28)
    # At the peak, times the chip's factor for the backward pass.
    assert found.kernels_s(V5E) == pytest.approx(found.kernel_flops[1] / 1.97e14)
    assert cost_of(kernel.replace("mha_dkv", "mha_fwd")).kernel_flops == (
        4 * 1024**2 * 128 * 3 * 28,
        0,
    )


def test_without_a_clock_there_are_no_seconds():
    found = cost_of("  ROOT %x = f32[8]{0} parameter(0)")
    assert found.seconds(topology("tpu7x:2x2x1")) is None and found.seconds(V5P) == 0.0


# --- names of slices, messages of the compiler


def test_slices():
    assert (V5E.num_chips, V5E.num_devices, V5E.name) == (16, 16, "v5e:4x4")
    ironwood = topology("TPU7x:2x2x1")
    assert (ironwood.num_chips, ironwood.num_devices, ironwood.name) == (4, 8, "tpu7x:2x2x1")


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v5e:2x2x2", "v5p:2x2", "v9:2x2", "v5e:0x4", ""])
def test_what_is_no_slice_is_refused(name, capsys):
    assert cli.main(["aot", str(SEVEN_B), "--topology", name]) == 2
    assert f"--topology={name!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory. The size required "
            "for HLO temporaries (21.39G) exceeds available HBM (15.75G)",
            (21.39, 15.75),
        ),
        ("XLA:TPU: Used 512.00M of 15.75G hbm. Exceeded hbm capacity by", (0.5, 15.75)),
    ],
)
def test_overflow_is_read(message, expected):
    found = child.overflow(message)
    assert (found["needed_gib"], found["usable_gib"]) == expected
    assert child.overflow("INTERNAL: something else") is None


def test_the_largest_buffers_are_read():
    lines = """  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
  980.00MiB( 10%);  980.00MiB;   2899443712;                6; f32[16,1,1,5120,224]
    1.40GiB( 15%);  453.25MiB;   4136697856;                5; 5×f32[28,18944,224]
"""
    assert child.buffers(lines) == [
        {"bytes": 980 * 2**20, "shapes": "f32[16,1,1,5120,224]"},
        {"bytes": int(453.25 * 2**20), "shapes": "5×f32[28,18944,224]"},
    ]


# --- the report


def facts(**changes):
    made = {
        "memory": None,
        "overflow": None,
        "buffers": (),
        "text": "ENTRY %main () -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n",
        "compile_s": 1.0,
        "host_bytes": 2**30,
        "versions": {},
        "cached": False,
    }
    return Facts(**(made | changes))


def test_what_does_not_fit_is_refused_with_the_number():
    """The compiler's figure, and what is held beside the program: 2 GiB that are no argument."""
    cfg = configs.load_alone(SEVEN_B)
    held = {"policy": 5 * 2**30, "reference": 2 * 2**30}
    plan = Plan(("update",), held, {"update": {"policy": 5 * 2**30}}, 0, 0, 5120, 512)
    over = facts(overflow={"needed_gib": 21.39, "usable_gib": 15.75})
    made = report.make(cfg, V5E, plan, {"update": over}, lengths.default(cfg, None, None))
    assert not made["fits"] and made["programs"][0]["live_gib"] == pytest.approx(23.39)
    shown = text.of_report(made)
    assert "DOES NOT FIT" in shown and "23.39 GiB" in shown and "15.75 usable" in shown
    # A program that compiles may not fit beside the rest either.
    sizes = dict.fromkeys(("argument", "output", "alias", "temp", "generated_code"), 0)
    alone = facts(memory=sizes | {"argument": 6 * 2**30, "temp": 8 * 2**30})
    plan = Plan(("weights",), plan.held, {"weights": {"policy": 2 * 2**30}}, 0, 0, 5120, 512)
    made = report.make(cfg, V5E, plan, {"weights": alone}, lengths.default(cfg, None, None))
    assert made["programs"][0]["live_gib"] == pytest.approx(14 + 5) and not made["fits"]
    json.dumps(made)


def test_decoding_must_read_weights_and_cache():
    """By hand: 7B in bfloat16 over 4 devices, and 64 rows of a device to 2048 positions."""
    cfg = configs.load_alone(SEVEN_B)
    D, F, L, K, H, N, V = 3584, 18944, 28, 4, 128, 28, 152064
    weights = L * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + V * D
    cache = 64 * 2048 * L * 2 * K * H
    assert work.decode_bytes(cfg, 2048) == 2 * (weights + cache) / 4
    quantized = configs.load_alone(SEVEN_B, ["rollout.cache_dtype=int8"])
    assert work.decode_bytes(quantized, 2048) == (2 * weights + cache * (1 + 4 / H)) / 4


def test_lengths_fill_micro_batches():
    """1024 sequences of 640 tokens are 128 rows of 5120: 8 micro-batches of 16."""
    cfg = configs.load_alone(SEVEN_B)
    means = lengths.default(cfg, 256, 384)
    assert means.rows(cfg, 1024) == 128 and work.micro_batches(cfg, "update", means) == 8
    assert means.bucket(5120) == 1024 and means.bucket(600) == 600


def test_a_run_on_another_slice():
    cfg = configs.load_alone(SEVEN_B, ["rl.micro_rows=32"])
    other = fit.on_slice(cfg, V5P)
    assert other.mesh.shape == (1, 8, 1) and other.mesh.decoding.shape == (1, 2, 4)
    # Two rows for each device, as before.
    assert other.rl.micro_rows == 16 and other.rollout.slots % 2 == 0
    changes = fit.overrides(cfg, other)
    assert "mesh.fsdp=8" in changes
    assert configs.load_alone(SEVEN_B, ["rl.micro_rows=32", *changes]) == other


# --- the command


def test_without_libtpu_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["aot", str(SEVEN_B), "--topology", "v5e:4x4"]) == 2
    assert "cir_jax[tpu]" in capsys.readouterr().err


def test_a_slice_that_is_none_is_named(capsys):
    pytest.importorskip("libtpu")
    assert cli.main(["aot", str(SEVEN_B), "--topology", "v5e:3x3"]) == 2
    assert "--topology='v5e:3x3': libtpu knows no such slice" in capsys.readouterr().err


def slice_configs():
    return sorted((ROOT / "configs").glob("cir_qwen2.5_math_7b_v*.toml"))


@pytest.mark.parametrize("path", slice_configs(), ids=lambda p: p.stem)
def test_slices_of_the_7b_run_are_those_of_their_headers(path):
    header = path.read_text().split("\nbase =")[0]
    name = re.search(r"--topology ([\w:]+)", header)[1]
    cfg = configs.load_alone(path)
    assert cfg.mesh.num_devices == topology(name).num_devices
    assert (cfg.mesh.tensor, cfg.mesh.decoding.tensor) == (1, cfg.model.num_kv_heads)


# --- the very programs of a run


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def on_eight_devices():
    """A run on 8 devices that decodes with other shares than it trains with; its programs."""
    changes = ("mesh.fsdp=8", "mesh.decode_tensor=2", "rollout.slots=8", "rl.micro_rows=8")
    of_sft = ("sft.steps=0", "sft.micro_rows=8")
    path = ROOT / "configs/quickstart.toml"
    cfg = configs.load(path, (*TINY, *changes, *of_sft, "model.vocab_size=640"))
    mesh = meshes.make_mesh(cfg.mesh)
    tokenizer = Tokenizer(configs.asset_dir(cfg.tokenizer))
    with jax.set_mesh(mesh):
        programs = compiled.jitted(cfg, mesh, tokenizer.end_ids)
        yield cfg, mesh, tokenizer, {p.name: p for p in programs}


def assert_is(jitted, function, args, options):
    """The same program, to the letter, layouts of arguments and results included."""
    with jax.set_mesh(jitted.mesh):
        assert function.lower(*args, **options).as_text() == jitted.lower().as_text()


def test_a_step_trains_with_the_programs_that_are_compiled(on_eight_devices, monkeypatch):
    cfg, mesh, _, programs = on_eight_devices
    policy = programs["update"].args[0]
    seen = {}

    def log_probabilities(*args, **options):
        args += (options.pop("temperature"),)
        seen["old"] = args, options
        return jnp.zeros(args[1].ids.shape, jnp.float32)

    def update(*args):
        seen["update"] = args
        raise Stop

    monkeypatch.setattr(learn, "old_logprobs", log_probabilities)
    learner = learn.Learner(cfg, mesh, None)
    real, learner._update = learner._update, update
    with pytest.raises(Stop):
        learner.learn(learn.Models(policy), *step_of(), 0)
    args, options = seen["old"]
    assert_is(programs["old log-probabilities"], compiled.old_logprobs, args, options)
    assert_is(programs["update"], real, seen["update"], {})


def test_rollouts_decode_with_the_programs_that_are_compiled(on_eight_devices, monkeypatch):
    cfg, mesh, tokenizer, programs = on_eight_devices
    engine = Engine(
        cfg.model,
        cfg.rollout,
        tokenizer,
        None,
        template="{question}",
        chat=False,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        dtype=cfg.compute.dtype,
        seed=0,
        mesh=meshes.decoding_mesh(mesh, cfg.mesh),
    )
    seen = {}

    def advance(*args, **options):
        seen["args"], seen["options"] = args, options
        raise Stop

    def cast(params):
        seen["params"] = params
        return programs["rollout"].args[0]

    real, real_cast, engine._cast = schedule.decode.advance, engine._cast, cast
    monkeypatch.setattr(schedule.decode, "advance", advance)
    problem = step_of()[0][0][0].problem
    with pytest.raises(Stop):
        engine.rollout(
            programs["update"].args[0].params,
            [problem],
            samples=2,
            max_calls=1,
            sampling=Sampling(1.0),
            phase="t",
            step=0,
            prompts=[[1, 2]],
        )
    assert_is(programs["rollout"], real, seen["args"], seen["options"])
    assert_is(programs["weights"], real_cast, (seen["params"],), {})


def test_what_lies_on_a_device(on_eight_devices):
    """Matrices in eight parts, in tiles of 8 x 128; three copies with the moments."""
    _, mesh, _, _ = on_eight_devices
    shape = jax.ShapeDtypeStruct(
        (2, 40, 200), np.float32, sharding=meshes.sharding(mesh, None, "batch")
    )
    assert (
        device_bytes({"a": shape, "b": jax.ShapeDtypeStruct((), np.int32)}) == 2 * 8 * 256 * 4 + 4
    )


@pytest.mark.parametrize("size", [1, 2, 8, 16, 12, 64])
def test_sums_in_groups_end_as_sums_over_all(size):
    """Scattered group after group, part d of the sum is device d's."""
    held = {d: np.arange(size) for d in range(size)}  # which parts of the whole
    summed = {d: {d} for d in range(size)}
    for groups in meshes._nested_groups(size):
        assert sorted(x for group in groups for x in group) == list(range(size))
        new_held, new_summed = {}, {}
        for group in groups:
            for n, d in enumerate(group):
                new_held[d] = np.split(held[d], len(group))[n]
                new_summed[d] = set().union(*(summed[other] for other in group))
        held, summed = new_held, new_summed
    assert all(held[d].tolist() == [d] and summed[d] == set(range(size)) for d in range(size))
