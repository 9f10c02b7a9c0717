"""tpu_scripts against a fake gcloud: what is called, what is left, how it ends."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from cloud import REQUEST, ROOT, SCRIPTS, SLICE, Cloud

WITH = ("--python=/usr/bin/python3",)
RUNS = sorted(path.stem for path in SCRIPTS.glob("*.sh") if "help()" in path.read_text())
STOCKOUT = "code 8: There is no more capacity in the zone"


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.005)


def watch(cloud, *words, code=0, options=(), **env):
    return cloud.run("watch", *REQUEST, *WITH, *options, "--", *words, code=code, **env)


# -- style, help, dry run ----------------------------------------------------------------------


def test_shellcheck_and_format():
    files = sorted(path.name for path in SCRIPTS.glob("*.sh"))
    # One by one: shellcheck takes ten times as long for all of them together.
    calls = [["shellcheck", file] for file in files] + [["shfmt", "-i", "2", "-ci", "-d", *files]]
    programs = Path(sysconfig.get_path("scripts"))
    for tool, *words in calls:
        done = subprocess.run(
            [programs / tool, *words], capture_output=True, text=True, cwd=SCRIPTS
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_only_one_place_calls_gcloud():
    for path in SCRIPTS.glob("*.sh"):
        lines = [
            line for line in path.read_text().splitlines() if re.search(r"^[^#]*\bgcloud ", line)
        ]
        run = [line for line in lines if re.match(r"\s*(timeout.* )?gcloud \"\$@\"", line)]
        assert len(run) == (path.name == "lib.sh"), (path.name, run)


@pytest.mark.parametrize("script", RUNS)
def test_help_has_an_example(cloud, script):
    text = cloud.run(script, "--help").stdout
    assert f"Example:\n  tpu_scripts/{script}.sh " in text
    assert not cloud.calls()


PLANS = {
    "create": REQUEST,
    "setup": SLICE,
    "run": (*SLICE, "--", "echo", "a b"),
    "status": SLICE,
    "logs": (*SLICE, "--workers=all", "--out=x"),
    "stop": SLICE,
    "watch": (*REQUEST, "--", "echo", "a b"),
    "delete": SLICE,
    "reap": ("--zone=us-a", "--delete"),
    "doctor": ("--zone=us-a", "--type=v5litepod-16", "--bucket=gs://b"),
    "sweep": (*REQUEST, "--configs=configs/quickstart.toml", "--seeds=0,1"),
    "local_pod": ("--", "true"),
    "batch": ("--name=a", "--region=r", "--bucket=gs://b", "--", "true"),
}


@pytest.mark.parametrize("script", RUNS)
def test_dry_run_prints_and_calls_nothing(cloud, script):
    source = {"CIR_SOURCE": str(ROOT)} if script == "sweep" else {}
    done = cloud.run(script, "--dry-run", *PLANS[script], **source)
    assert not cloud.calls()
    if script != "local_pod":
        commands = [shlex.split(x) for x in done.stdout.splitlines() if x.startswith("gcloud")]
        assert commands
    assert not (cloud.dir.parent / "x").exists()
    if script == "watch":
        verbs = [words[4 - (words[3] == "tpu-vm") :][0] for words in commands]
        assert [words[4] for words in commands][:2] == ["describe", "create"], verbs
        assert commands[-1][4] == "describe" and commands[-2][4] == "delete"


def test_errors_of_arguments_are_one_line(cloud):
    for words, told in (
        (("--name=Big", "--zone=z"), "--name=Big: expected"),
        (("--name=a",), "--zone: is missing"),
        ((*SLICE, "--type=v9-1", "--spot", "--ttl=1h"), "--type=v9-1: no such type"),
        ((*SLICE, "--type=tpu7x-8", "--spot", "--ttl=1h"), "only Compute Engine"),
        ((*SLICE, "--type=v5e-1", "--spot"), "--ttl: is missing"),
        ((*SLICE, "--type=v5e-1", "--ttl=1h"), "--spot, --on-demand"),
        ((*REQUEST, "--reserved"), "contradicts"),
        ((*SLICE, "--type=v5e-1", "--spot", "--ttl=soon"), "--ttl=soon: expected a time"),
        ((*REQUEST, "--tll=3h"), "--tll=3h: no such option"),
        ((*REQUEST, "--backend=gce"), "--backend=gce"),
    ):
        done = cloud.run("create", *words, code=2)
        assert told in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not cloud.calls()


# -- slices --------------------------------------------------------------------------------------


def test_a_slice_is_created_once(cloud):
    cloud.run("create", *REQUEST, "--price=2")
    (create,) = cloud.calls("create")
    labels = next(word for word in create["argv"] if word.startswith("--labels="))
    assert re.fullmatch(r"--labels=cir-run=a,cir-owner=ada-l,cir-expires=\d{10}", labels)
    assert "--spot" in create["argv"] and "--node-id=a" in create["argv"]
    cloud.run("create", *REQUEST)
    assert cloud.changes() == ["create"]
    cloud.run("delete", *SLICE)
    cloud.run("delete", *SLICE)
    assert cloud.changes() == ["create", "delete"] and not cloud.slices()


@pytest.mark.parametrize("string", [False, True])
def test_stockouts_move_on_to_the_next_zone(tmp_path, string):
    cloud = Cloud(tmp_path, replies={"create": [[1, STOCKOUT], [1, STOCKOUT]]}, string=string)
    cloud.run("create", *REQUEST, "--zone=us-a,us-b")
    zones = [word for c in cloud.calls("create") for word in c["argv"] if word.startswith("--zone")]
    assert zones == ["--zone=us-a", "--zone=us-b", "--zone=us-a"]


def test_a_failed_slice_is_replaced(tmp_path):
    cloud = Cloud(tmp_path, states=[["PROVISIONING", "FAILED"], ["ACTIVE"]], reason=STOCKOUT)
    cloud.run("create", *REQUEST)
    assert cloud.changes() == ["create", "delete", "create"]


def test_a_slice_refused_for_the_users_error_is_not_asked_for_again(tmp_path):
    cloud = Cloud(tmp_path, states=["PROVISIONING", "FAILED"], reason="Quota 'TPUS' exceeded")
    done = watch(cloud, "true", code=2)
    assert cloud.changes() == ["create", "delete"] and "Quota" in done.stderr
    assert not cloud.slices()


@pytest.mark.parametrize(
    "text",
    [
        "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/mine'",
        "INVALID_ARGUMENT: Invalid value for accelerator type",
        "There was a problem refreshing your current auth tokens",
        "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptible' has been exceeded.",
    ],
)
def test_refused_requests_are_made_once(tmp_path, text):
    cloud = Cloud(tmp_path, replies={"create": [[1, text]]})
    done = watch(cloud, "true", code=2)
    assert cloud.changes()[:1] == ["create"] and cloud.changes().count("create") == 1
    assert text[:40] in done.stderr


def test_an_endless_queue_ends(tmp_path):
    cloud = Cloud(tmp_path, states=["WAITING_FOR_RESOURCES"])
    done = watch(cloud, "true", code=75, options=["--queue=1s"])
    assert "no slice within" in done.stderr and not cloud.slices()
    assert "--valid-until-duration=1s" in cloud.calls("create")[0]["argv"]


def test_deleting_is_tried_again_and_loud(tmp_path):
    cloud = Cloud(tmp_path, replies={"delete": [[1, "INTERNAL"], [1, "code=503"]]})
    cloud.run("create", *REQUEST)
    cloud.run("delete", *SLICE)
    assert not cloud.slices() and len(cloud.calls("delete")) == 3
    cloud.run("create", *REQUEST)
    cloud.play(replies={"delete": [None] * 3 + [[1, "INTERNAL"]] * 9})
    done = cloud.run("delete", *SLICE, code=1, CIR_TRIES="2")
    assert "MAY STILL BE THERE" in done.stderr
    assert "gcloud compute tpus queued-resources delete a --zone=us-a --force" in done.stderr


def test_anothers_slice_is_left_alone(cloud):
    cloud.run("create", *REQUEST, "--owner=bob")
    for script, words in (("create", REQUEST), ("delete", SLICE)):
        assert "of bob's" in cloud.run(script, *words, code=2).stderr
    assert "of bob's" in watch(cloud, "true", code=2).stderr
    assert "is a v5litepod-1" in cloud.run(
        "create", *REQUEST, "--owner=bob", "--type=v5litepod-8", code=2
    ).stderr  # fmt: skip
    assert cloud.slices() == ["a"]


def test_reap_finds_what_a_killed_launcher_left(cloud):
    cloud.run("create", *REQUEST)
    cloud.run("create", *REQUEST, "--name=b", "--ttl=9h")
    later = {"CIR_NOW": str(int(time.time()) + 7200)}
    done = cloud.run("reap", "--zone=us-a", code=3, **later)
    assert "its time is over" in done.stderr and cloud.slices() == ["a", "b"]
    cloud.run("reap", "--zone=us-a", "--owner=bob", "--delete", **later)
    assert cloud.slices() == ["a", "b"]
    cloud.run("reap", "--zone=us-a", "--delete", **later)
    assert cloud.slices() == ["b"]


def test_doctor(cloud):
    words = ("--zone=us-a", "--type=v5litepod-1", "--price=1.5")
    cloud.run("create", *REQUEST)
    done = cloud.run("doctor", *words)
    assert "1.50 an hour" in done.stderr and "delete.sh --name=a" in done.stderr
    done = cloud.run("doctor", *words, "--type=v6e-8", code=1)
    assert "WRONG v6e-8: is not offered" in done.stderr


# -- runs ----------------------------------------------------------------------------------------


def test_a_run_from_request_to_end(cloud):
    done = watch(cloud, "bash", "-c", "echo hello $CIR_ATTEMPT", options=["--price=0.5"])
    assert "hello 1" in done.stdout and "at most 0.50" in done.stderr
    assert cloud.changes() == ["create", "scp", "delete"] and not cloud.slices()
    until(lambda: not cloud.processes(""), 5)


def test_words_reach_the_program_unchanged(cloud):
    words = ["a b", "it's", '"q"', "$HOME `id` $(id)", "line\nline", "", "*", "\\", "--x=~", "é; #"]
    program = "import json, sys; json.dump(sys.argv[1:], open('words.json', 'w'))"
    cloud.run("create", *REQUEST)
    cloud.run("run", *SLICE, *WITH, "--", "python3", "-c", program, *words)
    (found,) = cloud.home().glob("cir/code/*/words.json")
    assert json.loads(found.read_text()) == words


def test_the_second_call_changes_nothing(cloud):
    cloud.run("create", *REQUEST)
    cloud.run("setup", *SLICE, *WITH)
    words = (*SLICE, *WITH, "--", "bash", "-c", "echo x >>count; sleep 1000")
    cloud.run("run", "--detach", *words)
    count = next(cloud.home().glob("cir/code/*")) / "count"
    until(count.exists)
    before = cloud.changes()
    cloud.run("setup", *SLICE, *WITH)
    cloud.run("run", "--detach", *words)
    assert cloud.changes() == before == ["create", "scp"]
    assert count.read_text() == "x\n" and len(cloud.processes("sleep")) == 1
    table = cloud.run("status", *SLICE).stdout.splitlines()
    assert table[0].split()[:4] == ["worker", "state", "code", "attempt"]
    assert table[1].split()[:4] == ["0", "running", "-", "1"]
    other = cloud.run("run", "--detach", *words[:-1], "echo other", code=2)
    assert "goes on with another command" in other.stderr
    cloud.run("stop", *SLICE)
    cloud.run("stop", *SLICE)
    assert not cloud.processes("sleep")
    cloud.run("run", "--detach", *words)  # stopped: goes on
    until(lambda: count.read_text() == "x\nx\n")
    cloud.run("logs", *SLICE, "--workers=all", "--out=logs")
    log = (cloud.dir.parent / "logs/worker-0.log").read_text()
    assert log.count("attempt 1:") == 3  # two starts and an end
    cloud.run("delete", *SLICE)


def test_a_broken_connection_starts_nothing_twice(cloud):
    """gcloud itself runs a command again after 255, and so do we."""
    lost = [255, "[255] connection lost"]
    cloud.run("create", *REQUEST)
    cloud.run("setup", *SLICE, *WITH)
    calls = len(cloud.calls("ssh"))
    cloud.play(replies={"ssh": [None] * (calls + 1) + [lost, lost]})
    words = (*SLICE, *WITH, "--detach", "--", "sleep", "1000")
    cloud.run("run", *words)
    cloud.run("run", *words)
    assert len(cloud.processes("sleep")) == 1


@pytest.mark.parametrize("code", [2, 64, 65, 76, 78])
def test_the_users_errors_are_not_tried_again(cloud, code):
    if code == 2:
        done = watch(cloud, "bash", "-c", f"echo begun; exit {code}", code=code)
        assert done.stdout.count("begun\n") == 1 and f"exit code {code}" in done.stderr
        assert cloud.changes() == ["create", "scp", "delete"]
        return
    out = supervise(cloud, "bash", "-c", f"exit {code}")
    assert out == ("failed", str(code), "1")


def supervise(cloud, *words, retries=2, run_dir=""):
    """State, code and attempt once the supervisor has ended."""
    where = ["--home", str(cloud.dir), "--worker=0", f"--run-dir={run_dir}"]
    python = ["/usr/bin/python3", str(SCRIPTS / "supervisor.py")]
    timing = ["--poll=0.02", "--backoff=0.01", f"--retries={retries}"]
    words = words if "--" in words else ("--", *words)
    subprocess.run([*python, "start", *where, *timing, *words], check=True)
    found = []

    def ended():
        said = subprocess.run([*python, "status", *where], capture_output=True, text=True)
        found[:] = [
            re.search(rf" {key}=(\S+)", said.stdout)[1] for key in ("state", "code", "attempt")
        ]
        return found[0] not in ("running", "retrying", "starting")

    until(ended)
    return tuple(found)


def test_crashes_are_retried_while_there_is_progress(cloud):
    assert supervise(cloud, "bash", "-c", "kill -ABRT $$", retries=2) == ("failed", "134", "3")
    # A newer checkpoint each time: 6 attempts, though only one may be fruitless.
    run_dir = cloud.dir / "run"
    program = f"d={run_dir}/checkpoints; mkdir -p $d; n=$(ls $d | wc -l); mkdir $d/$n; "
    program += "[ $n = 5 ] || exit 75"
    assert supervise(cloud, "bash", "-c", program, retries=1, run_dir=run_dir) == ("done", "0", "6")


def test_preempted_programs_are_not_restarted_here(cloud):
    assert supervise(cloud, "bash", "-c", "exit 143") == ("preempted", "143", "1")


def test_nothing_of_a_program_is_left(cloud):
    program = "setsid sleep 777 & (setsid nohup sleep 778 &) ; sleep 0.1"
    cloud.env["FAKE_VM"] = f"{cloud.dir}/"
    os.environ["FAKE_VM"] = f"{cloud.dir}/"
    try:
        assert supervise(cloud, "bash", "-c", program)[0] == "done"
    finally:
        del os.environ["FAKE_VM"]
    assert not cloud.processes("sleep")


def test_one_of_eight_workers_fails_while_gcloud_returns_0(cloud):
    """v5litepod-32: the fifth worker does nothing at all, and gcloud does not say so."""
    words = ("--name=a", "--zone=us-a")
    cloud.run("create", *REQUEST, "--type=v5litepod-32")
    cloud.play(deaf=[5])
    done = cloud.run("setup", *words, *WITH, code=75)
    assert "worker 5: no answer" in done.stderr
    cloud.play()
    # The eighth fails alone: it is named, and the others are ended.
    program = "[ $TPU_WORKER_ID != 7 ] && exec sleep 1000; sleep 0.2; exit 65"
    done = cloud.run("run", *words, *WITH, "--", "bash", "-c", program, code=65, CIR_POLL="0.3")
    assert "worker 7: a failed with exit code 65" in done.stderr
    assert not cloud.processes("sleep")
    cloud.play(deaf=[2])
    table = cloud.run("status", *words, code=1)
    assert [line.split()[1] for line in table.stdout.splitlines()[1:]] == [
        "stopped", "stopped", "unreachable", *["stopped"] * 4, "failed",
    ]  # fmt: skip


def test_workers_that_differ_are_refused(cloud):
    cloud.run("create", *REQUEST, "--type=v4-16")
    cloud.run("setup", *SLICE, *WITH)
    (ready,) = cloud.home(1).glob("cir/code/*/.ready")
    ready.write_text(ready.read_text().replace("python=3", "python=2"))
    assert "workers differ" in cloud.run("setup", *SLICE, *WITH, code=78).stderr


def test_a_suspended_slice_is_replaced_and_the_run_goes_on(tmp_path):
    mark = tmp_path / "checkpoints"
    cloud = Cloud(tmp_path, preempt=[str(mark / "1")], states=["ACTIVE"])
    program = f"mkdir -p {mark}; [ -e {mark}/1 ] && exit 0; mkdir {mark}/1; exec sleep 1000"
    try:
        watch(cloud, "bash", "-c", program, options=[f"--run-dir={tmp_path}"])
        assert cloud.changes() == ["create", "scp", "delete", "create", "scp", "delete"]
        assert not cloud.slices() and not cloud.processes("sleep")
    finally:
        cloud.end()


@pytest.mark.parametrize(
    "moment, number, code",
    [
        ("queued", signal.SIGTERM, 143),
        ("running", signal.SIGTERM, 143),
        ("running", signal.SIGINT, 130),
        ("installing", signal.SIGINT, 130),
    ],
)
def test_a_launcher_that_is_ended_deletes_its_slice(tmp_path, moment, number, code):
    states = ["WAITING_FOR_RESOURCES"] if moment == "queued" else ["ACTIVE"]
    cloud = Cloud(tmp_path, states=states)
    launcher = cloud.begin("watch", *REQUEST, *WITH, "--", "sleep", "1000")
    try:
        reached = {
            "queued": lambda: len(cloud.calls("describe")) > 2,
            "installing": lambda: cloud.calls("scp"),
            "running": lambda: cloud.processes("sleep"),
        }
        until(reached[moment])
        launcher.send_signal(number)
        sent = time.time()
        assert launcher.wait(20) == code
        assert cloud.calls("delete")[0]["time"] - sent < 2
        cloud.run("delete", *SLICE)  # waits for its end
        assert not cloud.slices() and not cloud.processes("")
    finally:
        launcher.kill()
        cloud.end()


def test_a_killed_launcher_is_taken_over(tmp_path):
    cloud = Cloud(tmp_path, states=["ACTIVE"])
    words = ("watch", *REQUEST, *WITH, "--", "bash", "-c", "echo x >>$HOME/count; exec sleep 1000")
    try:
        first = cloud.begin(*words)
        until(lambda: cloud.processes("sleep"))
        first.kill()
        first.wait()
        calls = len(cloud.calls("ssh"))
        second = cloud.begin(*words)
        until(lambda: len(cloud.calls("ssh")) > calls + 5)
        assert cloud.changes() == ["create", "scp"]
        assert (cloud.home() / "count").read_text() == "x\n"
        assert len(cloud.processes("sleep")) == 1
        second.terminate()
        assert second.wait(20) == 143
    finally:
        cloud.end()


def test_the_end_of_its_time_ends_the_slice(tmp_path):
    """The launcher's own clock, and without it the workers'."""
    cloud = Cloud(tmp_path, states=["ACTIVE"])
    try:
        done = watch(cloud, "sleep", "1000", code=75, options=["--ttl=2s"])
        assert "its time" in done.stderr and not cloud.slices()
        assert not cloud.processes("sleep")
        deletes = len(cloud.calls("delete"))
        cloud.run("create", *REQUEST, "--ttl=2s")
        cloud.run("setup", *SLICE, *WITH)
        until(lambda: len(cloud.calls("delete")) > deletes)
    finally:
        cloud.end()


def test_a_config_that_does_not_fit_is_refused_before_anything_is_asked_for(cloud):
    train = ("cir-jax", "train", "configs/quickstart.toml")
    here = [f"--source={ROOT}", "--type=v5litepod-16"]
    for words, told in (
        (train, "mesh=(1, 1, 1) (data, fsdp, tensor): is 1 devices, but v5litepod-16 has 16"),
        ((*train, "mesh.fsdp=8"), "is 8 devices, but v5litepod-16 has 16"),
        (("cir-jax", "train", "configs/none.toml"), "no such file"),
        ((*train, "mesh.fsdp=16", "rl.stepz=3"), "rl.steps"),
        ((*train, "mesh.fsdp=all"), "mesh.fsdp='all': expected a number"),
    ):
        # The keys are checked where pydantic is.
        done = watch(cloud, *words, code=2, options=here, CIR_LAUNCH_PYTHON=sys.executable)
        assert told in done.stderr
    assert not cloud.calls()
    done = cloud.run(
        "watch", *REQUEST, *here, "--dry-run", "--", *train, "mesh.fsdp=16", "rl.micro_rows=16"
    )
    assert "rl.micro_rows=16 run_dir=runs/a resume=true" in done.stdout
    done = watch(cloud, "true", code=2, options=["--env=HF_TOKEN=hf_abc"])
    assert "--env-file" in done.stderr and "hf_abc" not in done.stderr


# -- sweeps, batch -------------------------------------------------------------------------------


@pytest.fixture
def sweep(cloud):
    """Words of a sweep over 2 configs, 3 seeds and 2 values, its slices on this machine."""
    configs = cloud.source / "configs"
    configs.mkdir()
    text = (ROOT / "configs/quickstart.toml").read_text()
    for name in "ab":
        (configs / f"{name}.toml").write_text(
            text.replace('name = "quickstart"', f'name = "{name}"')
        )
    program = cloud.dir.parent / "bin/cir-jax"
    program.write_text(
        f'#!/bin/sh\n[ -e {cloud.dir}/hold ] && sleep 1000\necho "$@" >>{cloud.dir}/ran\n'
    )
    program.chmod(0o755)
    cloud.env["CIR_LOCAL"] = str(cloud.dir / "local")
    words = ["--name=s", "--type=local-1x1", "--configs=configs/a.toml,configs/b.toml"]
    return [*words, "--seeds=0,1,2", "--set=rl.steps=1,2", f"--ledger={cloud.dir}/ledger"]


def ran(cloud):
    path = cloud.dir / "ran"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(cloud, sweep):
    first = cloud.begin("sweep", *sweep)
    until(lambda: len(ran(cloud)) >= 5, 40)
    (cloud.dir / "hold").touch()
    first.terminate()
    assert first.wait(20) == 143
    (cloud.dir / "hold").unlink()
    done = len(ran(cloud))
    assert 5 <= done < 12
    ids = sorted(path.stem for path in cloud.dir.glob("ledger/*.json"))
    table = cloud.run("sweep", *sweep).stdout.splitlines()
    assert len(ids) == len(table) == 12 == len(set(ran(cloud)))
    assert sorted(path.stem for path in cloud.dir.glob("ledger/*.json")) == ids
    assert all(line.split("\t")[1] == "done" for line in table)
    # At most the one that was under way ran again.
    assert len(ran(cloud)) - done <= 12 - done + 1
    words = ran(cloud)[0].split()
    assert (
        words[:4] == ["train", "configs/a.toml", "seed=0", "rl.steps=1"] and "resume=true" in words
    )
    cloud.run("sweep", *sweep)
    assert len(ran(cloud)) <= 13
    assert not list(cloud.dir.glob("local/*/slice"))


def test_two_sweeps_at_once_share_no_job(cloud, sweep):
    sweep = [*sweep[:3], "--seeds=0,1", *sweep[5:]]
    both = [cloud.begin("sweep", *sweep) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(ran(cloud)) == len(set(ran(cloud))) == 4


def test_a_jobs_name_depends_on_what_it_trains(cloud, sweep):
    def names(*words):
        lines = cloud.run("sweep", "--table", *sweep[:4], *words, f"--ledger={cloud.dir}/x").stdout
        return [line.split("\t")[0] for line in lines.splitlines()]

    before = names("--set=rl.steps=1", "--set=seed2=3")
    assert sorted(before) == sorted(names("--set=seed2=3", "--set=rl.steps=1"))
    config = cloud.source / "configs/a.toml"
    config.write_text("# another comment\n" + config.read_text())
    assert names("--set=rl.steps=1", "--set=seed2=3") == before
    config.write_text(config.read_text().replace("width = 128", "width = 64"))
    changed = names("--set=rl.steps=1", "--set=seed2=3")
    assert changed[:3] != before[:3] and changed[3:] == before[3:]


def batch(cloud, *words):
    path = cloud.dir / "job.json"
    place = ("--name=a", "--region=us-a", "--bucket=gs://b", f"--job-file={path}")
    cloud.run("batch", *place, *words)
    return json.loads(path.read_text())["taskGroups"][0]


def test_each_batch_task_has_a_command_of_its_own(cloud, tmp_path):
    of_words = batch(cloud, "--tasks=9", "--", "echo", "it's", "--shard={index}/{count}")
    (tmp_path / "jobs").write_text("".join(f"echo 'a b' {i}\n" for i in range(9)))
    of_file = batch(cloud, f"--jobs={tmp_path / 'jobs'}")
    for group, expected in (
        (of_words, [f"it's --shard={i}/9" for i in range(9)]),
        (of_file, [f"a b {i}" for i in range(9)]),
    ):
        spec = group["taskSpec"]
        assert group["taskCount"] == "9" and spec["maxRunDuration"] == "3600s"
        assert spec["lifecyclePolicies"][0]["actionCondition"]["exitCodes"] == [50001, 75]
        script = spec["runnables"][0]["script"]["text"]
        command = script[script.index('cd "$d"') :].replace('cd "$d"', "true")
        said = [
            subprocess.run(
                ["sh", "-c", "d=/; " + command],
                env=os.environ | {"BATCH_TASK_INDEX": str(i), "BATCH_TASK_COUNT": "9"},
                capture_output=True,
                text=True,
            ).stdout.strip()
            for i in range(9)
        ]
        assert said == expected


def test_batch_job_is_one_that_the_sdk_knows(cloud):
    """Against the message classes of an installed SDK: unknown fields and wrong enums are named."""
    sdk = Path("/usr/lib/google-cloud-sdk/lib")
    if not sdk.is_dir():
        pytest.skip("no Google Cloud SDK here")
    batch(cloud, "--", "true")
    program = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/third_party"]
from apitools.base.py import encoding
from googlecloudsdk.generated_clients.apis.batch.v1 import batch_v1_messages as m
job = encoding.JsonToMessage(m.Job, open(sys.argv[2]).read())
def check(message):
    assert not message.all_unrecognized_fields(), message.all_unrecognized_fields()
    for field in message.all_fields():
        value = getattr(message, field.name)
        for inner in value if isinstance(value, list) else [value]:
            if hasattr(inner, "all_fields"):
                check(inner)
check(job)
print(job.taskGroups[0].taskCount)
"""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", program, sdk, cloud.dir / "job.json"],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n", done.stderr


def test_a_launcher_that_is_offline_keeps_the_slice(tmp_path):
    """Neither gcloud nor the workers answer for a while, and the run goes on."""
    cloud = Cloud(tmp_path, states=["ACTIVE"])
    offline = [1, "Could not resolve host: tpu.googleapis.com; connection failed"]
    program = f"until [ -e {tmp_path}/end ]; do sleep 0.02; done"
    launcher = cloud.begin("watch", *REQUEST, *WITH, "--", "bash", "-c", program)
    try:
        until(lambda: cloud.processes("bash\x00-c\x00until"))
        seen = {verb: len(cloud.calls(verb)) for verb in ("ssh", "describe")}
        cloud.play(replies={v: [None] * (n + 1) + [offline] * 7 for v, n in seen.items()})
        until(lambda: len(cloud.calls("describe")) > seen["describe"] + 9, 40)
        (tmp_path / "end").touch()
        assert launcher.wait(20) == 0
        assert cloud.changes() == ["create", "scp", "delete"]
    finally:
        launcher.kill()
        cloud.end()


@pytest.mark.slow
def test_the_sdk_knows_the_printed_commands(cloud, tmp_path):
    """By the linter that gcloud ships with, which needs no network and no account."""
    gcloud = Path("/usr/bin/gcloud")
    if not gcloud.exists():
        pytest.skip("no Google Cloud SDK here")
    flex = (*SLICE, "--type=v5e-16", "--flex", "--nodes=2", "--ttl=1h", "--project=p")
    plans = [(script, words) for script, words in PLANS.items() if script != "sweep"]
    seen = {}
    for script, words in [*plans, ("create", flex)]:
        text = cloud.run(script, "--dry-run", *words).stdout
        for line in filter(lambda x: x.startswith("gcloud"), text.splitlines()):
            # A worker's command is one word, in which the linter would look for options.
            words = [re.sub("^--command=.*", "--command=ls", w) for w in shlex.split(line)]
            seen[tuple(w.partition("=")[0] for w in words)] = shlex.join(words)
    env = {"PATH": "/usr/bin:/bin", "CLOUDSDK_CONFIG": str(tmp_path), "HOME": str(tmp_path)}
    env |= {"CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
    for line in seen.values():
        lint = [gcloud, "meta", "lint-gcloud-commands", f"--command-string={line}"]
        done = subprocess.run(lint, env=env, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)[0]["success"], (line, done.stdout[-500:])


def local(cloud, *words, **kwargs):
    cloud.env |= {"CIR_LOCAL": str(cloud.dir / "local"), "FAKE_VM": f"{cloud.dir}/"}
    return cloud.run("local_pod", *words, **kwargs)


def test_a_local_pod_is_processes_with_jaxs_variables(cloud):
    program = "env | grep ^JAX_ | sort; echo $XLA_FLAGS; sleep 0.2"
    done = local(cloud, "--processes=2", "--devices=3", "--", "bash", "-c", program)
    said = [p.read_text() for p in sorted(cloud.dir.glob("local/local/runs/local/worker-*/log"))]
    assert len(said) == 2 and said[0] == done.stdout
    for index, text in enumerate(said):
        assert f"JAX_PROCESS_ID={index}\n" in text and "JAX_NUM_PROCESSES=2\n" in text
        assert re.search(r"JAX_COORDINATOR_ADDRESS=127.0.0.1:\d+\n", text)
        assert "--xla_force_host_platform_device_count=3\n" in text
    # Done is done; one worker's error ends the other, too.
    assert local(cloud, "--devices=3", "--", "bash", "-c", program).stdout == said[0]
    program = "[ $JAX_PROCESS_ID = 0 ] && exec sleep 1000; sleep 0.3; exit 78"
    done = local(cloud, "--name=b", "--grace=1s", "--", "bash", "-c", program, code=78)
    assert "worker 1: b failed with exit code 78" in done.stderr
    assert not cloud.processes("sleep") and not list(cloud.dir.glob("local/*/slice"))


def test_ctrl_c_ends_a_local_pod(cloud):
    cloud.env |= {"CIR_LOCAL": str(cloud.dir / "local"), "FAKE_VM": f"{cloud.dir}/"}
    pod = cloud.begin("local_pod", "--grace=1s", "--", "sleep", "1000")
    until(lambda: len(cloud.processes("sleep")) == 2)
    pod.send_signal(signal.SIGINT)
    assert pod.wait(20) == 130 and not cloud.processes("sleep")


@pytest.mark.slow
def test_a_slice_that_has_lost_a_worker_is_replaced(tmp_path):
    """The cloud still calls it ACTIVE, and the other worker can only fail."""
    cloud = Cloud(tmp_path, states=["ACTIVE"])
    cloud.env["CIR_LOST_AFTER"] = "3"
    program = f"[ -e {tmp_path}/end ] && exit 0; touch {tmp_path}/begun; sleep 0.5; exit 75"
    words = [*REQUEST, "--type=v4-16", *WITH, "--retries=0", "--", "bash", "-c", program]
    launcher = cloud.begin("watch", *words)
    try:
        until(lambda: (tmp_path / "begun").exists())
        cloud.play(deaf=[1])
        until(lambda: cloud.calls("delete"))
        cloud.play()
        (tmp_path / "end").touch()
        assert launcher.wait(40) == 0, launcher.stderr.read()
        assert cloud.changes() == ["create", "scp", "delete"] * 2
    finally:
        launcher.kill()
        cloud.end()


def test_status_log_and_run_directory_go_to_the_bucket(cloud, monkeypatch):
    """By the gcloud of the worker; here one that writes down what it is asked for."""
    program = cloud.dir.parent / "bin/gcloud"
    program.unlink()
    program.write_text(f'#!/bin/sh\necho "$@" >>{cloud.dir}/asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", cloud.env["PATH"])
    words = ["--bucket=gs://b/runs", "--checkpoints=gs://b/c", "--", "true"]
    assert supervise(cloud, *words, run_dir=cloud.dir / "run") == ("done", "0", "1")
    until(lambda: "rsync" in (cloud.dir / "asked").read_text())
    asked = (cloud.dir / "asked").read_text()
    assert "storage ls gs://b/c/" in asked and "log.tail gs://b/runs/run/worker-0/" in asked
    assert re.search(rf"rsync .* {cloud.dir}/run gs://b/runs/run/run/\d+\n", asked)
