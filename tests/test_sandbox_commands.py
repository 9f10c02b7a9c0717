"""cir-jax run, doctor and bench sandbox."""

import json
import random

import pytest

from cir_jax.bench import programs
from cir_jax.cli import main
from cir_jax.sandbox import canary, probe


def test_run_prints_what_a_model_reads(tmp_path, capsys):
    path = tmp_path / "program.py"
    path.write_text("import random\nrandom.random()")
    texts = []
    for seed in ("1", "2"):
        assert main(["run", str(path), "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == f"{random.Random(1).random()}\n" != texts[1]
    path.write_text("print('x' * 500)\n1 / 0")
    assert main(["run", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "ZeroDivisionError: division by zero\n"
    assert captured.err.startswith("status: error, ")
    assert main(["run", str(tmp_path / "none.py")]) == 2
    assert "none.py" in capsys.readouterr().err


def test_doctor_lists_rungs_and_attacks(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "kernel: " in out and "rung namespaces: works" in out
    assert out.count("  held  ") >= 20 and "BROKEN" not in out
    monkeypatch.setitem(canary._ATTACKS, "one that succeeds", "    pass")
    assert main(["doctor"]) == 1
    assert "BROKEN  one that succeeds" in capsys.readouterr().out
    outcomes = dict.fromkeys(("namespaces", "namespaces-flat", "landlock"), "forbidden here")
    monkeypatch.setattr(probe, "try_rungs", lambda interpreter: outcomes)
    assert main(["doctor"]) == 1
    assert "namespaces: forbidden here" in capsys.readouterr().out


def test_bench_prints_lines_of_json(capsys):
    assert main(["bench", "sandbox", "--workers", "1", "--num", "10"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    loads = {line["load"]: line for line in lines if line.get("system") == "cir_jax"}
    assert set(loads) == {"trivial", "solve", "mixed"}
    assert all(line["num_right"] == line["num"] == 10 for line in loads.values())
    ratio = [line for line in lines if "ratio" in line]
    fresh = [line for line in lines if line.get("system") == "fresh python"]
    assert ratio[0]["programs_per_s"] == pytest.approx(
        loads["solve"]["programs_per_s"] / fresh[0]["programs_per_s"]
    )


def test_mixed_load_is_the_stated_mix():
    pairs = programs.mixed(100, seed=0)
    assert sum(text.startswith("NameError") for _, text in pairs) == 3
    assert sum("sympy" in code for code, _ in pairs) == 30
    assert pairs == programs.mixed(100, seed=0) != programs.mixed(100, seed=1)


def test_symbolic_programs_print_what_is_expected(capsys):
    pairs = [(code, text) for code, text in programs.mixed(200, seed=2) if "sympy" in code]
    # One of each of the tasks at least.
    assert len({"".join(c for c in code if not c.isdigit()) for code, _ in pairs}) >= 12
    for code, text in pairs:
        exec(code, {})
        assert capsys.readouterr().out.strip() == text, code
