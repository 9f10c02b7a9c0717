"""The papers' runs and their small twins: one recipe in two sizes, and each twin starts."""

import contextlib
import json
import math
from pathlib import Path

import pytest
from models_table import one_device

from cir_jax import cli, metrics
from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.ablation.strategies import ALL_ON, STRATEGIES, without
from cir_jax.config import SandboxConfig
from cir_jax.sandbox import store
from cir_jax.train import rollouts

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
TWINS = sorted(CONFIGS.glob("quickstart*.toml"))


def load(name, *overrides):
    """A config whose weights and files need not be there."""
    own = ("sft.weights=''", "tokenizer='package:quickstart/tokenizer'")
    none = ("sft.data=[]", "sft.epochs=0", "data.curriculum=''")
    return configs.load(CONFIGS / f"{name}.toml", (*own, *none, *overrides))


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != ALL_ON])
def test_each_ablation_of_the_papers_run_is_that_of_the_command(name):
    run = without(load("cir_qwen2.5_math_7b"), name, 0, Path())
    overlay = load(f"ablations/cir_{name}")
    assert set(configs.differences(run, overlay)) == {"name", "run_dir"}


@pytest.mark.parametrize("first", ["r1ci_qwen2.5_{}_sft", "r1ci_qwen2.5_{}", "r1ci_v2_qwen2.5_{}"])
@pytest.mark.parametrize(("size", "devices"), [("3b", 8), ("14b", 32)])
def test_sizes_differ_in_model_and_machine_alone(first, size, devices):
    base, other = load(first.format("7b")), load(first.format(size))
    assert other.model.num_layers == configs.preset(f"Qwen2.5-{size.upper()}").num_layers
    assert other.mesh.data * other.mesh.fsdp * other.mesh.tensor == devices
    assert f"v5e-{devices}" in (CONFIGS / f"{first.format(size)}.toml").read_text()
    # Whole heads and rows on each device.
    assert other.model.num_kv_heads % other.mesh.tensor == 0
    changed = {key for key in configs.differences(base, other) if key.partition(".")[0] != "model"}
    assert changed <= {
        "name",
        "mesh.fsdp",
        "mesh.tensor",
        "rollout.slots",
        "rl.micro_rows",
        "sft.micro_rows",
    }


# What makes a recipe; sizes, budgets and learning rates are those of the machine and model.
RECIPE = """
    rl.advantage rl.clip_low rl.clip_high rl.loss_mean rl.kl_coef rl.kl_in rl.kl_estimator
    rl.entropy_coef rl.epochs rl.shuffle rl.train_tool_tokens rl.whiten_tool_tokens
    rl.importance_cap reward.overlong_factor reward.failed_code_penalty reward.format_reward
    reward.turn_penalty reward.turn_limit model.qk_norm model.qkv_bias rollout.temperature
    rollout.top_p rollout.raise_calls_above
""".split()


@pytest.mark.parametrize(
    ("paper", "twin", "also"),
    [
        ("cir_qwen2.5_math_7b", "quickstart", []),
        ("cir_qwen3_8b", "quickstart_qwen3", []),
        ("torl_qwen2.5_math_7b", "quickstart_torl", ["rollout.max_calls"]),
        ("dapo_qwen2.5_math_7b", "quickstart_dapo", []),
        (
            "r1ci_qwen2.5_7b",
            "quickstart_r1ci_v1",
            ["rollout.max_calls", "rollout.samples_per_prompt", "sandbox.timeout_s"],
        ),
        (
            "r1ci_v2_qwen2.5_7b",
            "quickstart_r1ci",
            ["rollout.max_calls", "rollout.samples_per_prompt", "sandbox.timeout_s"],
        ),
        (
            "r1ci_qwen2.5_7b_sft",
            "quickstart_r1ci_sft",
            ["sft.batch_size", "sft.optim.schedule", "sft.optim.warmup_share"],
        ),
    ],
)
def test_a_twin_has_the_papers_recipe(paper, twin, also):
    big, small = load(paper), load(twin)
    keys = also if paper.endswith("_sft") else [*RECIPE, *also]
    assert keys and {k: at(big, k) for k in keys} == {k: at(small, k) for k in keys}
    assert bool(big.rollout.refill_rounds) == bool(small.rollout.refill_rounds)
    assert bool(big.reward.overlong_buffer) == bool(small.reward.overlong_buffer)


def at(cfg, key):
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


# --- each of them starts


@pytest.fixture(scope="module")
def one_device_and_sandbox():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda cfg: one_device())
        # One for all: its start takes seconds.
        with store.open_store(SandboxConfig(num_workers=1), None) as opened:
            shared = contextlib.nullcontext(opened)
            patch.setattr(rollouts, "open_store", lambda cfg, record_dir, process: shared)
            yield


# A step of seconds; the model stays, as its weights are there.
SMALL = (
    "rl.steps=3",
    "rl.micro_rows=8",
    "rollout.prompts_per_step=4",
    "rollout.slots=16",
    "rollout.prefill_rows=8",
    "eval.num_problems=10",
    "checkpoint.every=3",
    "samples_per_log=2",
)
SMALL_SFT = (
    "sft.steps=3",
    "sft.num_trajectories=64",
    "sft.batch_size=16",
    "sft.optim.warmup_steps=1",
)


def trained(path, run_dir, *overrides):
    """The rows that a run has written, by their kind."""
    command = "sft" if path.stem.endswith("_sft") else "train"
    argv = [command, str(path), *overrides, f"run_dir={str(run_dir)!r}"]
    assert cli.main(argv) == 0
    rows = {}
    for row in metrics.read(run_dir):
        rows.setdefault(row["kind"], []).append(row)
    return rows


def own_answers(path):
    """32 trajectories such as `cir-jax collect` writes."""
    question = (
        "Solve the following multiplication: {} * 828. Give only the result as your final answer."
    )
    rows = [
        {
            "question": question.format(n),
            "response": f"```python\nprint({n} * 828)\n```\n```output\n{n * 828}\n```\n"
            f"\\boxed{{{n * 828}}}.",
        }
        for n in range(100, 132)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_each_twin_takes_three_steps(path, tmp_path, one_device_and_sandbox):
    overrides = [*SMALL]
    if path.stem == "quickstart_r1ci_sft":
        own_answers(tmp_path / "rows.jsonl")
        overrides.append(f"sft.data={str(tmp_path / 'rows.jsonl')!r}")
    elif "steps = " in path.read_text().partition("[sft]")[2].partition("[")[0]:
        overrides += SMALL_SFT
    once = path.stem in ("quickstart_rloo", "quickstart_torl")
    overrides.append(f"rl.minibatch_prompts={4 if once else 2}")
    rows = trained(path, tmp_path / "run", *overrides)
    cfg = configs.load_run(tmp_path / "run")
    if cfg.sft.trains:
        assert [row["step"] for row in rows["sft"]] == [1, 2, 3]
        assert all(0 < row["loss"] < math.inf and row["skipped"] == 0 for row in rows["sft"])
    steps = rows.get("rl", [])
    assert [row["step"] for row in steps] == ([] if path.stem.endswith("_sft") else [1, 2, 3])
    for row in steps:
        assert row["skipped"] == 0 and 0 <= row["grad_norm"] < math.inf
        assert ("ref_kl" in row) == (cfg.rl.kl_coef > 0)
        assert ("critic/loss" in row) == (cfg.rl.advantage == "gae")
        assert ("rounds" in row) == (cfg.rollout.refill_rounds > 0)
        assert row["max_calls"] == configs.max_calls_at(cfg.rollout.max_calls, 0)
    # Of random weights all answers are wrong: there is nothing to learn from.
    if steps and cfg.sft.weights:
        assert any(row["grad_norm"] > 0 for row in steps)
        # With one update a step all of it is on policy.
        assert any(row["old_new_kl"] > 0 for row in steps) == (not once)
    assert len(rows["eval"]) == (3 if cfg.sft.trains and steps else 2)


@pytest.mark.slow
def test_an_imported_launch_takes_a_step(tmp_path, one_device_and_sandbox):
    """CIR's, with generated problems and a small model in the place of its files and weights."""
    weights = configs.asset_dir("package:quickstart/cold_start")
    out = tmp_path / "cir.toml"
    launch = ROOT / "tests/launches/cir.sh"
    argv = ["import-verl", str(launch), "--tasks", "product", "--weights", str(weights)]
    assert cli.main([*argv, "-o", str(out)]) == 0
    rows = trained(
        out,
        tmp_path / "run",
        *SMALL,
        "rl.steps=1",
        "rl.minibatch_prompts=2",
        "rollout.samples_per_prompt=2",
        "rollout.max_response_tokens=40",
        "rollout.max_context=600",
        "data.max_prompt_tokens=500",
        "compute.dtype=float32",
        "tokenizer='package:quickstart/tokenizer'",
    )
    (step,) = rows["rl"]
    assert step["skipped"] == 0 and step["max_calls"] == 2
