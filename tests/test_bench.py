"""Benchmarks: measured in turn, medians without the warm-up, lines of JSON."""

import json
import os
import subprocess
import sys

import pytest

from cir_jax import cli
from cir_jax.bench.contest import contest
from cir_jax.config import ModelConfig
from cir_jax.models import flops

CONTENDER = """
import os, time
from cir_jax.bench.contest import serve

def start(*, log, figures):
    count = iter(figures)
    ballast = bytearray(os.urandom(1)) * {ballast}

    def measure():
        with open(log, "a") as file:
            file.write("{name}")
        print("a library's chatter")
        return {{"seconds": next(count)}}

    return measure

if __name__ == "__main__":
    serve(start)
"""


def test_contenders_are_measured_in_turn(tmp_path, monkeypatch):
    for name, ballast in (("a", 0), ("b", 2 * 10**8)):
        (tmp_path / f"{name}.py").write_text(CONTENDER.format(name=name, ballast=ballast))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    log = tmp_path / "log"
    # The first figure is the warm-up's; the median of 3, 1, 2 is 2.
    result = contest(dict.fromkeys("ab", {"log": str(log), "figures": [99, 3, 1, 2]}), rounds=3)
    assert log.read_text() == "ab" * 4
    assert result["a"]["seconds"] == result["b"]["seconds"] == 2
    more = result["b"]["peak_bytes"] - result["a"]["peak_bytes"]
    assert 1.8e8 < more < 2.2e8


def test_a_contender_that_ends_is_named(tmp_path, monkeypatch):
    (tmp_path / "c.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(RuntimeError, match="c ended with exit code 3"):
        contest({"c": {}}, rounds=1)


def test_model_flops_by_hand():
    """D 4, N 2, K 1, H 2, F 8, V 10, one layer: q 16, k and v 8 each, o 16, MLP 96, head 40."""
    cfg = ModelConfig(
        vocab_size=10,
        width=4,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        mlp_width=8,
        rope_theta=1e4,
    )
    assert flops.matmul_params(cfg) == 16 + 8 + 8 + 16 + 96 + 40
    # 3 rows of 6: 18 tokens; scores and their product with v, half of 6 x 6 each: 2 FLOPs x 18
    # positions x 4 (N H) x 2 products x 3 rows.
    assert flops.forward_flops(cfg, 3, 6) == 2 * 184 * 18 + 2 * 18 * 4 * 2 * 3
    assert flops.train_flops(cfg, 3, 6) == 3 * flops.forward_flops(cfg, 3, 6)


def bench(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "cir_jax.cli", "bench", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_bench_update_against_torch():
    ours, theirs, ratio = bench(
        "update", "--batch", "1", "--length", "32", "--rounds", "1", "--against", "torch"
    )
    assert (ours["system"], theirs["system"]) == ("cir_jax", "torch")
    for line in (ours, theirs):
        assert line["tokens_per_s"] == pytest.approx(32 / line["seconds"])
        assert 0 < line["mfu"] < 1.5
    assert ratio["tokens_per_s"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])


def test_an_unknown_preset_is_one_line(capsys):
    assert cli.main(["bench", "update", "--preset", "bensh"]) == cli.EXIT_CONFIG
    assert capsys.readouterr().err == "cir-jax: preset='bensh': unknown; nearest: bench\n"
