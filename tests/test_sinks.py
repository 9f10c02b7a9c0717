"""Copies of metrics: TensorBoard's event files, Weights & Biases offline, missing packages."""

import collections
import importlib.util
import json
import time

import pytest
from runs_on_file import tiny

from cir_jax import metrics, sinks
from cir_jax.config import ConfigError
from cir_jax.metrics import MetricsWriter


def write_steps(writer, steps):
    for step in steps:
        writer.write("rl", step, {"reward": step / 2, "graded/wrong": step}, {"rollout_s": 1.5})


def interrupted_run(run_dir, cfg):
    """A run that is killed after step 5 and goes on from its checkpoint after step 3."""
    writer = MetricsWriter(run_dir)
    writer.attach(sinks.open_sinks(cfg, run_dir))
    writer.write("eval", 3, {"stage": "before RL", "accuracy": 0.25}, {"wall_s": 2.0})
    write_steps(writer, range(1, 4))
    sizes = writer.sizes()
    write_steps(writer, range(4, 6))
    writer.close()
    writer = MetricsWriter(run_dir)
    writer.truncate(sizes)
    writer.attach(sinks.open_sinks(cfg, run_dir))
    write_steps(writer, range(4, 8))
    writer.write("eval", 3, {"stage": "after RL", "accuracy": 0.75}, {"wall_s": 2.0})
    writer.close()


def expected(run_dir):
    """Of each line, its step and all of its numbers by name."""
    pairs = zip(metrics.read(run_dir), metrics.read(run_dir, metrics.TIMINGS), strict=True)
    return [(line["step"], sinks.figures(line, timings)) for line, timings in pairs]


def test_names_tell_stages_and_seconds_apart():
    line = {"kind": "eval", "step": 3, "stage": "after RL", "accuracy": 1, "note": "text"}
    beside = {"kind": "eval", "step": 3, "wall_s": 2.0, "unix_s": 1e9}
    assert sinks.figures(line, beside) == {
        "eval/after RL/accuracy": 1.0,
        "eval_timings/wall_s": 2.0,
    }


def test_tensorboard_has_each_step_once(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    interrupted_run(tmp_path, tiny(tmp_path, "metrics.sinks=['tensorboard']"))
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, at, found = path.read_bytes(), 0, collections.Counter()
    while at < len(data):
        # A record: its length in 8 bytes, 4 of checksum, itself, 4 of checksum.
        length = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16
        for value in event.summary.value:
            found[event.step, value.tag, value.simple_value] += 1
            assert abs(event.wall_time - time.time()) < 60
    wanted = [(step, k, v) for step, named in expected(tmp_path) for k, v in named.items()]
    # tensorboardX takes blanks out of names.
    assert found == collections.Counter((s, k.replace(" ", "_"), v) for s, k, v in wanted)


def records_of(path, make):
    """The records of W&B's file: LevelDB's log format, in blocks of 32 kB after 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield make(parts)
            parts = b""


@pytest.mark.slow
def test_wandb_offline_has_each_step_once(tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    cfg = tiny(tmp_path, "metrics.sinks=['wandb']", "metrics.project=trial")
    interrupted_run(tmp_path, cfg)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # A process of W&B's own writes it, on a busy machine a little later.
    for _ in range(300):
        records = list(records_of(path, Record.FromString))
        if any(record.HasField("exit") for record in records):
            break
        time.sleep(0.1)
    (run,) = [r.run for r in records if r.HasField("run")]
    assert run.project == "trial"
    assert run.run_id == json.loads((tmp_path / sinks.WANDB_ID).read_text())["id"]
    lines = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            named = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
            lines.append({k: v for k, v in named.items() if not k.startswith("_")})
    wanted = [
        named | {f"{line['kind']}/step": line["step"]}
        for (_, named), line in zip(expected(tmp_path), metrics.read(tmp_path), strict=True)
    ]
    assert lines == wanted


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    cfg = tiny(tmp_path, "metrics.sinks=wandb").metrics
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"metrics\.sinks=.*pip install 'cir_jax\[wandb\]'"):
        sinks.check(cfg)
    sinks.check(tiny(tmp_path).metrics)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("metrics.sinks=['tensorbord']", "metrics.sinks"),
        ("metrics.sinks=['wandb', 'wandb']", "metrics.sinks.*at most once"),
        ("metrics.project=a/b", "metrics.project"),
        ("metrics.mode=on", "metrics.mode"),
        ("metrics.sink=wandb", "metrics.sinks"),
    ],
)
def test_bad_values_are_named(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, override)
