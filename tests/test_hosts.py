"""Runs of several processes: the same as one's, whatever happens to one of them."""

import math

import pods
import pytest
from models_table import TINY_RUN

from cir_jax import metrics

CONFIG = ("train", "configs/quickstart.toml", *TINY_RUN, "mesh.data=2", "mesh.fsdp=4")


def train(folder, count, devices, *overrides):
    run = folder / "run"
    args = (*pods.CLI, *CONFIG, f"run_dir={str(run)!r}", *overrides)
    pod = pods.start(folder, count, devices, *args)
    pod.check()
    return run, pod


def assert_same_run(one, other, tolerance=1e-5):
    """Same tokens; same figures to float32's accuracy."""
    for a, b in zip(metrics.read(one), metrics.read(other), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if key in ("chain", "params_digest"):
                continue
            same = (
                math.isclose(b[key], value, rel_tol=tolerance, abs_tol=tolerance)
                if (isinstance(value, float))
                else b[key] == value
            )
            assert same or key == "batch_digest", (key, a, b)
    for a, b in zip(*(metrics.read(d, metrics.SAMPLES) for d in (one, other)), strict=True):
        assert a["ids"] == b["ids"] and a["author"] == b["author"] and a["calls"] == b["calls"]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    one, _ = train(tmp_path / "one", 1, 8)
    two, pod = train(tmp_path / "two", 2, 4)
    assert_same_run(one, two)
    assert pod.text(0).splitlines()[-1] == str(two)
    assert pod.text(1) == ""
