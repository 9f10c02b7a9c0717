"""`cir-jax ablate`: what is switched off, the runs, and their table."""

from pathlib import Path

import pytest
from models_table import TINY_RUN, one_device

from cir_jax import cli, metrics
from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.ablation import report
from cir_jax.ablation.strategies import ALL_ON, STRATEGIES, without
from cir_jax.config import ConfigError

QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.toml"


def test_each_run_differs_in_its_strategy_alone():
    cfg = configs.load(QUICKSTART, ["ablate={}"])
    off = {
        ALL_ON: {},
        "stop_word": {"rollout.boundary": ("fence", "stop_word")},
        "tool_tokens": {"rl.train_tool_tokens": (False, True)},
        "entropy_bonus": {"rl.entropy_coef": (0.0, 0.001)},
        # The quickstart's schedule ends at 3.
        "fixed_budget": {"rollout.max_calls": ([[0, 1], [20, 2], [40, 3]], 3)},
        "kl": {"rl.kl_coef": (0.0, 0.001)},
        "symmetric_clip": {"rl.clip_high": (0.28, 0.2)},
    }
    assert list(off) == list(STRATEGIES)
    for name, expected in off.items():
        run = without(cfg, name, 5, Path("out"))
        assert configs.differences(cfg, run) == expected | {
            "seed": (0, 5),
            "run_dir": ("", "out"),
        }


def test_a_config_may_say_what_else_a_run_needs():
    cfg = configs.load(QUICKSTART, ["ablate={kl={'rl.kl_in'='reward'}}"])
    assert without(cfg, "kl", 0, Path("out")).rl.kl_in == "reward"
    assert without(cfg, "stop_word", 0, Path("out")).rl.kl_in == "loss"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.clip_high=0.2", ["rl.clip_high=0.2", "symmetric_clip is off"]),
        ("eval.num_problems=0", ["eval.num_problems=0", "above 0"]),
        ("rl.steps=0", ["rl.steps=0", "above 0"]),
        ("ablate={kll={}}", ["ablate.kll", "there are all_on, stop_word"]),
        ("ablate={symmetric_clip={'rl.clp_low'=1}}", ["rl.clp_low=1", "rl.clip_low"]),
    ],
)
def test_what_cannot_be_ablated_is_one_line(override, words):
    cfg = configs.load(QUICKSTART, [override])
    with pytest.raises(ConfigError) as error:
        without(cfg, "symmetric_clip", 0, Path("out"))
    assert all(word in str(error.value) for word in words)


def test_overrides_may_stand_behind_options(capsys):
    for argv in (["rl.stpes=2", "--out", "x"], ["--out", "x", "rl.stpes=2"]):
        assert cli.main(["ablate", str(QUICKSTART), *argv]) == cli.EXIT_CONFIG
        assert "rl.stpes=2: unknown key; nearest valid key: rl.steps" in capsys.readouterr().err
    for word in ("--ot", "nothing"):
        with pytest.raises(SystemExit):
            cli.main(["ablate", str(QUICKSTART), "--out", "x", "rl.steps=2", word])
        assert f"unrecognized arguments: {word}" in capsys.readouterr().err


def figures(accuracy, rewards=(0.0, 0.5)):
    return {
        "num_problems": 100,
        "rewards": list(rewards),
        "accuracy_before": 0.25,
        "accuracy": accuracy,
        "needed_code_share": 1.0,
        "reward": 0.25,
        "last_reward": 0.5,
    }


def test_table_by_hand():
    """Off: 0.5 and 0.7, mean 0.6, standard deviation sqrt(2 x 0.1^2) = 0.141. Less than the runs
    of the same seeds: 0.3 and 0.2, mean 0.25, 0.071."""
    on = {0: figures(0.8), 1: figures(0.9)}
    lines = report.table({ALL_ON: on, "kl": {0: figures(0.5), 1: figures(0.7)}}, {}).splitlines()
    assert lines[2].split(" | ")[4:6] == ["0.850 ± 0.071", ""]
    assert lines[3].split(" | ")[:6] == [
        "| KL 0.001",
        "0, 1",
        "0.250 ± 0.000",
        "0.500 ± 0.000",
        "0.600 ± 0.141",
        "0.250 ± 0.071",
    ]
    # Of accuracies 0.5 the standard error is sqrt(0.5 x 0.5 / 100). The difference's is 0.071 /
    # sqrt(2) = 0.05: 0.25 is 5 of them, and 12.71 would be needed of two seeds.
    assert lines[-1].endswith(
        "by up to 0.050 (standard error). Different from all six at 95 % (paired t): none."
    )
    sure = {seed: figures(0.5 + 0.001 * seed) for seed in (0, 1)}
    on = {seed: figures(0.9) for seed in (0, 1)}
    assert report.table({ALL_ON: on, "kl": sure}, {}).endswith("(paired t): KL 0.001.\n")
    more = {"kl": {"sft.steps": 3}, "stop_word": {"sft.steps": 4}}
    alone = report.table({"kl": {0: figures(0.5)}}, more).splitlines()
    assert alone[-1] == "Runs with KL 0.001 also have sft.steps=3."
    assert alone[2].split(" | ")[4:6] == ["0.500", ""]


@pytest.mark.slow
def test_ablate_trains_once_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(meshes, "make_mesh", lambda cfg: one_device())
    options = ["--out", str(tmp_path), "--seeds", "3", "--off", "all_on", "symmetric_clip"]

    def ablate(*overrides):
        return cli.main(["ablate", str(QUICKSTART), *TINY_RUN, *overrides, *options])

    assert ablate() == 0
    out = capsys.readouterr().out
    for name in ("all_on", "symmetric_clip"):
        rows = metrics.read(tmp_path / name / "3")
        assert [r["kind"] for r in rows if r["kind"] != "sft"] == [
            "eval",
            "eval",
            "rl",
            "rl",
            "eval",
        ]
        accuracy = f"{rows[-1]['accuracy']:.3f}"
        title = "nothing" if name == "all_on" else "symmetric clip"
        line = next(line for line in out.splitlines() if line.startswith(f"| {title}"))
        assert accuracy in line
    assert (tmp_path / report.TABLE).read_text() in out
    assert (tmp_path / report.PLOT).read_bytes().startswith(b"\x89PNG")

    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/3/*.json*")}
    assert ablate() == 0
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/3/*.json*")}
    capsys.readouterr()
    assert ablate("rl.clip_low=0.1") == cli.EXIT_CONFIG
    assert "holds a run with rl.clip_low=0.2, here it is 0.1" in capsys.readouterr().err
