"""Runs of several processes: the same as one's, whatever happens to one of them."""

import json
import math
import re
import shutil
import signal
import time
from pathlib import Path

import pods
import pytest
from jax._src.clusters import cloud_tpu_cluster
from models_table import TINY_RUN

from cir_jax import config as configs
from cir_jax import exits, hosts, metrics, peers
from cir_jax.config import ConfigError

EIGHT = ("mesh.data=2", "mesh.fsdp=4")
FOUR = ("mesh.data=2", "mesh.fsdp=2")
# What one process does goes wrong in the second of its gradings.
FAULTY = """
import os, sys, time
from cir_jax import cli
from cir_jax.train import experience

grade, count = experience.grade, 0
def faulty(*args):
    global count
    count += 1
    if count == 2 and os.environ["JAX_PROCESS_ID"] == "1":
        {"stuck": lambda: time.sleep(3600), "raises": lambda: 1 / 0}[os.environ["FAULT"]]()
    return grade(*args)

experience.grade = faulty
sys.exit(cli.main())
"""
# The parts of which a run of several processes is made, without one.
PARTS = """
import os, sys
import jax, numpy as np
from cir_jax import hosts, mesh as meshes
from cir_jax.config import ConfigError, HostsConfig, MeshConfig

def code_of(error):
    return getattr(error, "code", None)

with hosts.joined(HostsConfig(), lambda: {"a": "1"}, code_of, lambda error: False):
    index = hosts.index()
    assert hosts.count() == 2 and hosts.is_first() == (index == 0)
    value = {"of": index, "x": np.full(1000 * (1 + index), index)}
    first, second = hosts.gather(value)
    assert first["of"] == 0 and second["x"].sum() == 2000
    assert hosts.of_first("name", lambda: index) == 0
    mesh = meshes.make_mesh(MeshConfig(data=4, tensor=1))
    x = np.arange(8.0)
    y = meshes.put_same({"x": x}, meshes.sharding(mesh, "batch"))["x"]
    np.testing.assert_array_equal(meshes.whole(jax.jit(lambda y: y + 1)(y)), x + 1)
    assert len(meshes.own_rows(y)) == 4
    try:
        meshes.make_mesh(MeshConfig(data=1, tensor=4))
    except ConfigError as error:
        print(error)
    def fails():
        raise ConfigError("only process 0 can see this")
    try:
        hosts.of_first("that", fails)
    except ConfigError as error:
        print(error)
    print("met", flush=True)
    hosts.check_same(step=index)
"""


def test_processes_meet_share_and_find_differences(tmp_path):
    pod = pods.start(tmp_path, 2, 2, "-c", PARTS)
    codes = pod.wait(60)
    for i in range(2):
        said = pod.text(i)
        assert codes[i] == exits.DIFFERENT, said
        assert "met" in said and "only process 0 can see this" in said
        assert "mesh.tensor=4: must divide the devices of a process, 2" in said
        assert "the processes differ in step: process 0 has 0, process 1 has 1" in said


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({peers.ADDRESS: "h:1", peers.COUNT: "2"}, "JAX_PROCESS_ID: not set"),
        ({peers.ADDRESS: "h:1"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID: are not set, but"),
        ({peers.ADDRESS: "h", peers.COUNT: "2", peers.INDEX: "0"}, "'h': must be HOST:PORT"),
        ({peers.ADDRESS: "h:1", peers.COUNT: "2", peers.INDEX: "2"}, "_ID=2: must be from 0 to"),
        ({peers.ADDRESS: "h:1", peers.COUNT: "two", peers.INDEX: "0"}, "S='two': must be a whole"),
    ],
)
def test_a_wrong_environment_names_the_variable(monkeypatch, variables, message):
    for name in (peers.ADDRESS, peers.COUNT, peers.INDEX):
        monkeypatch.delenv(name, raising=False)
    assert hosts.find() is None
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        hosts.find()


def test_the_environment_says_which_process_this_is(monkeypatch):
    monkeypatch.setenv(peers.ADDRESS, "[::1]:77")
    monkeypatch.setenv(peers.COUNT, "3")
    monkeypatch.setenv(peers.INDEX, "2")
    assert hosts.find() == ("[::1]:77", 3, 2)
    monkeypatch.setenv(peers.COUNT, "1")
    monkeypatch.setenv(peers.INDEX, "0")
    assert hosts.find() is None


def test_hosts_of_a_slice_are_detected(monkeypatch):
    """As on GKE, by jax's own detection, with the second of three hosts."""
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "0")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,second,third")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    assert hosts.find() == (f"localhost:{cloud_tpu_cluster.coordinator_port}", 3, 1)
    monkeypatch.setenv(peers.ADDRESS, "other:7")
    assert hosts.find() == ("other:7", 3, 1)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(ConfigError, match="are not set"):
        hosts.find()
    monkeypatch.delenv(peers.ADDRESS)
    assert hosts.find() is None
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert hosts.find() is None


# --- whole runs


def without(*prefixes):
    return tuple(o for o in TINY_RUN if not o.startswith(prefixes))


# A few steps of each phase of the quickstart's own model, with programs that run.
QUICKSTART = (
    *without("model.", "sft.weights", "sft.steps", "rollout.max_response"),
    "sft.steps=2",
    "rollout.max_response_tokens=104",
    "rollout.max_calls=2",
    "eval.num_problems=20",
    *EIGHT,
)
# Only what the faults need.
FAULTS = (
    *without("sft.", "eval.", "rl.steps"),
    "sft.weights=''",
    "sft.steps=0",
    "eval.num_problems=0",
    "rl.steps=300",
    *EIGHT,
)


def train(run, *overrides):
    return "train", "configs/quickstart.toml", *overrides, f"run_dir={str(run)!r}"


def assert_same_run(one, other, tolerance=1e-5):
    """Same tokens; same figures to float32's accuracy."""
    lines = [metrics.read(run) for run in (one, other)]
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, float):
                close = math.isclose(b[key], value, rel_tol=tolerance, abs_tol=tolerance)
                assert close, (key, a, b)
            else:  # digests are of floats
                assert b[key] == value or key in ("chain", "params_digest", "batch_digest")
    for a, b in zip(*(metrics.read(d, metrics.SAMPLES) for d in (one, other)), strict=True):
        assert a["ids"] == b["ids"] and a["author"] == b["author"] and a["calls"] == b["calls"]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does(tmp_path):
    one, two = tmp_path / "one/run", tmp_path / "two/run"
    pods.start(one.parent, 1, 8, *pods.CLI, *train(one, *QUICKSTART)).check()
    pod = pods.start(two.parent, 2, 4, *pods.CLI, *train(two, *QUICKSTART))
    pod.check()
    assert_same_run(one, two)
    (last,) = [line for line in metrics.read(two) if line["kind"] == "rl"][1:]
    assert last["calls_per_response"] > 0
    assert pod.text(0).splitlines()[-1] == str(two)
    # Gloo's and absl's lines come from several threads, in pieces.
    own = pod.text(1)
    assert "cir-jax" not in own and "Traceback" not in own and "evaluating" not in own
    # Each process has run programs of its own, and between them those that one process ran.
    programs = [
        [line["code"] for line in map(json.loads, path.read_text().splitlines()) if "code" in line]
        for path in (one / "programs.jsonl", two / "programs.jsonl", two / "programs.1.jsonl")
    ]
    assert programs[1] and programs[2] and sorted(programs[0]) == sorted(programs[1] + programs[2])
    # Evaluated by other numbers of processes and devices.
    rows = []
    for name, count, devices, mesh in (("alone", 1, 8, EIGHT), ("2x2", 2, 2, FOUR)):
        args = (*pods.CLI, "eval", str(two), *mesh)
        pod = pods.start(tmp_path / name, count, devices, *args)
        pod.check()
        rows += [line for line in pod.text(0).splitlines() if "after RL" in line]
    trained = [line for line in pod.text(0).splitlines() if "after RL" in line]
    assert len(rows) == 2 and rows[0] == rows[1] == trained[0]


def wait_for_step(run, step, pod, timeout_s=200):
    deadline = time.monotonic() + timeout_s
    path = run / metrics.METRICS
    while not (path.exists() and f'"rl", "step": {step},' in path.read_text()):
        assert time.monotonic() < deadline and all(p.poll() is None for p in pod.processes), (
            pod.text(0) + pod.text(1)
        )
        time.sleep(0.05)


@pytest.mark.slow
def test_sigterm_on_one_process_saves_and_any_number_goes_on(tmp_path):
    run = tmp_path / "run"
    pod = pods.start(tmp_path / "two", 2, 4, *pods.CLI, *train(run, *FAULTS))
    wait_for_step(run, 2, pod)
    children = descendants(pod)
    pod.processes[1].send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert pod.wait(60) == [exits.TERMINATED] * 2, pod.text(0) + pod.text(1)
    assert time.monotonic() - start < 15
    assert "process 1 was asked to stop" in pod.text(0)
    assert_gone(children)
    done = len(metrics.read(run))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    # The same two steps more, by one process, and by two of another size.
    more = (*FAULTS, "resume=true", f"rl.steps={done + 2}")
    pods.start(tmp_path / "one", 1, 8, *pods.CLI, *train(run, *more)).check()
    pods.start(tmp_path / "2x2", 2, 2, *pods.CLI, *train(copy, *more, *FOUR)).check()
    assert len(metrics.read(run)) == done + 2
    assert_same_run(run, copy)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(tmp_path, victim):
    run = tmp_path / "run"
    pod = pods.start(tmp_path, 2, 4, *pods.CLI, *train(run, *FAULTS))
    wait_for_step(run, 1, pod)
    children = descendants(pod)
    assert len(children) >= 8
    pod.processes[victim].kill()
    start = time.monotonic()
    codes = pod.wait(60)
    assert time.monotonic() - start < 5
    assert codes[1 - victim] == exits.AGAIN, pod.text(1 - victim)
    assert f"process {victim} is gone: its connection has ended" in pod.text(1 - victim)
    assert_gone(children)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "codes", "message"),
    [
        ("raises", [exits.AGAIN, 1], "process 1 has ended: ZeroDivisionError: division by zero"),
        ("stuck", [exits.AGAIN] * 2, "process 1 is stuck: no progress for 40 s"),
    ],
)
def test_what_goes_wrong_in_one_process_is_said_by_all(
    tmp_path, monkeypatch, fault, codes, message
):
    monkeypatch.setenv("FAULT", fault)
    run = tmp_path / "run"
    args = train(run, *FAULTS, "hosts.stall_timeout_s=40")
    pod = pods.start(tmp_path, 2, 4, "-c", FAULTY, *args)
    wait_for_step(run, 1, pod)
    children = descendants(pod)
    assert pod.wait(90) == codes, pod.text(0) + pod.text(1)
    assert message in pod.text(0)
    assert_gone(children)
    if fault == "raises":
        assert "Traceback" in pod.text(1) and "in faulty" in pod.text(1)
        return
    for i in range(2):
        assert message in pod.text(i)
        assert re.search("process 1 works since 4[0-9] s: grading", pod.text(i))
        assert "most recent call first" in pod.text(i)
    assert "in faulty" in pod.text(1)


@pytest.mark.slow
def test_ctrl_c_in_one_process_ends_all_after_the_step(tmp_path):
    run = tmp_path / "run"
    pod = pods.start(tmp_path, 2, 4, *pods.CLI, *train(run, *FAULTS))
    wait_for_step(run, 1, pod)
    pod.processes[0].send_signal(signal.SIGINT)
    assert pod.wait(60) == [exits.INTERRUPTED] * 2, pod.text(0) + pod.text(1)
    assert configs.holds_run(run)


@pytest.mark.slow
def test_processes_of_different_configs_do_not_start(tmp_path):
    args = train(tmp_path / "run", *FAULTS)
    pod = pods.start(tmp_path, 2, 4, *pods.CLI, *args, each=lambda i: [f"rl.steps={2 + i}"])
    assert pod.wait(60) == [exits.DIFFERENT] * 2
    for i in range(2):
        assert "the processes differ in rl.steps: process 0 has 2, process 1 has 3" in pod.text(i)
    assert not (tmp_path / "run").exists()


def descendants(pod):
    """Of the pod's processes: (number, start time) of each."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        if stat := _stat(int(path.name)):
            parents[int(path.name)] = stat
    found, new = [], {p.pid for p in pod.processes}
    while new:
        new = {pid for pid, (parent, _) in parents.items() if parent in new}
        found += [(pid, parents[pid][1]) for pid in new]
    return found


def _stat(pid):
    """Parent and start time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), fields[19]


def assert_gone(children, within_s=5.0):
    deadline = time.monotonic() + within_s
    left = children
    while left and time.monotonic() < deadline:
        left = [(pid, at) for pid, at in left if (stat := _stat(pid)) and stat[1] == at]
        time.sleep(0.05)
    assert not left, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid, _ in left]
