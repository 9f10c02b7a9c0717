"""Benchmarks: measured in turn, medians without the warm-up, lines of JSON."""

import json
import os
import subprocess
import sys

import pytest

from cir_jax import cli
from cir_jax.bench import ceiling
from cir_jax.bench.contest import contest
from cir_jax.bench.decode import limit
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


def test_a_contender_may_have_an_interpreter_of_its_own(tmp_path, monkeypatch):
    """Without `site`, and from another directory, only contest tells it where this package is."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    (tmp_path / "d.py").write_text(
        "import sys\n"
        "from cir_jax.bench.contest import serve\n"
        "serve(lambda: lambda: {'no_site': sys.flags.no_site})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert contest({"d": {}}, rounds=1, pythons={"d": str(python)})["d"]["no_site"] == 1


def test_ceilings_are_the_best_of_several(monkeypatch):
    def times(*of_tries):
        remaining = iter(of_tries)
        monkeypatch.setattr(ceiling, "seconds", lambda f: next(remaining))

    times(4, 2, 3, 9, 5)
    assert ceiling.product_rate(None, num_devices=8) == 8 * 2 * 2048**3 / 2
    times(4, 2, 3, 9, 5)
    assert ceiling.read_rate(None) == 2**29 / 2


# D 4, N 2, K 1, H 2, F 8, V 10, one layer.
TINY = ModelConfig(
    vocab_size=10,
    width=4,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    mlp_width=8,
    rope_theta=1e4,
)


def test_model_flops_by_hand():
    """q 16, k and v 8 each, o 16, MLP 96, head 40."""
    cfg = TINY
    assert flops.layer_params(cfg) == 16 + 8 + 8 + 16 + 96
    assert flops.matmul_params(cfg) == 144 + 40
    # 3 rows of 6: 18 tokens; scores and their product with v, half of 6 x 6 each: 2 FLOPs x 18
    # positions x 4 (N H) x 2 products x 3 rows.
    assert flops.forward_flops(cfg, 3, 6) == 2 * 184 * 18 + 2 * 18 * 4 * 2 * 3
    assert flops.prefill_flops(cfg, 3, 6) == 2 * 144 * 18 + 2 * 18 * 4 * 2 * 3
    assert flops.train_flops(cfg, 3, 6) == 3 * flops.forward_flops(cfg, 3, 6)


def test_decode_limit_by_hand():
    """3 slots, prompts of 5, 3 new tokens: the steps attend to 5, 6 and 7 positions.

    A row's cache holds k and v, K H = 2 numbers each, at 6 positions: 24 numbers. A step reads
    184 + 3 x 24 = 256 numbers, and computes 2 x 184 FLOPs a row and, for the scores and their
    product with v, 2 x 6 x N H = 48 each: 464 a row. The prefill of 4 tokens computes, a row,
    2 x 144 x 4 FLOPs and half of 2 x 4 x 4 x N H = 128 for each of the two products: 1280. It
    reads 144 numbers.
    """

    def of(read, matmul, itemsize=4):
        rates = {"read_bytes_per_s": read, "matmul_flops_per_s": matmul}
        return limit(TINY, 3, 5, 3, itemsize, rates)

    memory = of(1024, 1e9)
    assert (memory["step_bytes"], memory["step_flops"]) == (4 * 256, 3 * 464)
    # A step takes 1 s for its bytes, 2 s for its FLOPs at half of these.
    assert (memory["limited_by"], memory["step_limit_tokens_per_s"]) == ("memory", 3)
    assert memory["limit_tokens_per_s"] == pytest.approx(9 / (3 + 144 / 256))
    assert memory["prefill_flops"] == 3 * 1280
    matmul = of(1024, 3 * 464 / 2)
    assert (matmul["limited_by"], matmul["step_limit_tokens_per_s"]) == ("matmul", 1.5)
    assert matmul["limit_tokens_per_s"] == pytest.approx(9 / (6 + 2 * 1280 / 464))
    assert of(1024, 1e9, itemsize=2)["step_limit_tokens_per_s"] == 6


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


@pytest.mark.slow
def test_bench_decode_against_transformers():
    ours, theirs, ratio = bench(
        "decode",
        *("--slots", "2", "--prompt", "8", "--new", "4", "--rounds", "1"),
        *("--against", "transformers"),
    )
    assert (ours["system"], theirs["system"]) == ("cir_jax", "transformers")
    for line in (ours, theirs):
        assert line["tokens_per_s"] == pytest.approx(2 * 4 / line["seconds"])
    assert ours["share_of_limit"] == ours["tokens_per_s"] / ours["limit_tokens_per_s"]
    assert 0 < ours["share_of_limit"] < 1.2
    # Two rows do not pay for reading 108 million parameters.
    assert ours["limited_by"] == "memory"
    assert ratio["tokens_per_s"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])


@pytest.mark.slow
def test_bench_save():
    (line,) = bench("save", "--batch", "1", "--length", "32", "--updates", "1", "--rounds", "2")
    assert line["state_bytes"] > 12 * 108e6  # parameters and two moments, float32
    assert line["step_share"] == pytest.approx(line["save_s"] / line["step_s"])
    assert 0 < line["digest_s"] < line["step_s"] and line["step_sd_s"] > 0
    assert 0 < line["blocked_s"] < line["step_s"] + line["save_s"]


def test_an_unknown_preset_is_one_line(capsys):
    assert cli.main(["bench", "update", "--preset", "bensh"]) == cli.EXIT_CONFIG
    assert capsys.readouterr().err == "cir-jax: preset='bensh': unknown; nearest: bench\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--preset", "bensh"), "preset='bensh': unknown; nearest: bench"),
        (("--model", "nowhere"), "nowhere/config.json: no such file"),
        (("--against", "tunix", "--python", "nowhere"), "--python nowhere: No such file"),
        (("--against", "tunix", "--python", "false"), "--against tunix: false lacks tunix: pip"),
        (("--top-p", "0"), "argument --top-p: 0: must be above 0 and at most 1"),
        (("--slots", "0"), "argument --slots"),
        (("--model", "x", "--preset", "Qwen3-8B"), "not allowed with argument"),
        (("--against", "vllm"), "argument --against: invalid choice: 'vllm'"),
    ],
)
def test_wrong_arguments_of_decode_are_named(arguments, message, capsys):
    try:
        code = cli.main(["bench", "decode", *arguments])
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == cli.EXIT_CONFIG
    assert message in capsys.readouterr().err.splitlines()[-1]
