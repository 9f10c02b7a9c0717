#!/usr/bin/python3 -IS
"""A gcloud for tests: queued resources as a state machine, workers as directories of this machine.

First on PATH as `gcloud`. The directory FAKE_GCLOUD holds

  scenario.json  what happens; all keys may be left out:
    "replies"    {verb: [[code, text], ...]}: a call of the verb takes the next one; null or none
                 left: it does what it should. Verbs: create describe list delete ssh scp ...
    "states"     states that a slice goes through, one for each describe; the last one stays
                 (default: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE)
    "string"     the state as a string, not as {"state": ...}
    "reason"     message of a FAILED slice
    "deaf"       workers on which ssh does nothing, while gcloud returns 0
    "preempt"    [[path, again], ...]: once the path's pattern matches, all that runs on the slice
                 is killed, its disks are wiped and it is SUSPENDED
  calls.jsonl    a line for each call: {"verb", "argv", "time", "pid"}
  slices/NAME/   slice.json, and the workers' homes w0, w1, ...

Anything unknown ends with 97. A worker's processes carry FAKE_VM=its home.
"""

import fcntl
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time

HOSTS = {"v5litepod-1": 1, "v5litepod-8": 1, "v5litepod-16": 4, "v5litepod-32": 8, "v4-16": 2}
KNOWN = {
    "create": {
        "zone", "accelerator-type", "runtime-version", "node-id", "node-count", "node-prefix",
        "spot", "reserved", "labels", "valid-until-duration", "async", "quiet", "project",
    },
    "describe": {"zone", "format", "project"},
    "list": {"zone", "format", "project"},
    "delete": {"zone", "force", "async", "quiet", "project"},
    "ssh": {"zone", "worker", "command", "quiet", "project"},
    "scp": {"zone", "worker", "quiet", "project"},
    "accelerator-types": {"zone", "format", "project"},
}  # fmt: skip
VERBS = {
    ("compute", "tpus", "queued-resources", "create"): "create",
    ("compute", "tpus", "queued-resources", "describe"): "describe",
    ("compute", "tpus", "queued-resources", "list"): "list",
    ("compute", "tpus", "queued-resources", "delete"): "delete",
    ("compute", "tpus", "tpu-vm", "ssh"): "ssh",
    ("compute", "tpus", "tpu-vm", "scp"): "scp",
    ("compute", "tpus", "accelerator-types", "list"): "accelerator-types",
}
ROOT = os.environ["FAKE_GCLOUD"]


def path(*parts):
    return os.path.join(ROOT, *parts)


def load(name, default):
    try:
        with open(name) as file:
            return json.load(file)
    except FileNotFoundError:
        return default


def save(name, value):
    with open(name + ".tmp", "w") as file:
        json.dump(value, file)
    os.replace(name + ".tmp", name)


def fail(text, code=1):
    print(f"ERROR: (gcloud.compute.tpus) {text}", file=sys.stderr)
    sys.exit(code)


def main(argv):
    verb = VERBS.get(tuple(argv[:4]))
    if argv[:2] == ["config", "get-value"]:
        print({"account": "me@example.com", "project": "mine"}.get(argv[2], "(unset)"))
        return
    if verb is None:
        print("fake gcloud: unknown command", argv, file=sys.stderr)
        sys.exit(97)
    options, words = {}, []
    for word in argv[4:]:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            if key not in KNOWN[verb]:
                print(f"fake gcloud: {verb}: unknown --{key}", file=sys.stderr)
                sys.exit(97)
            options[key] = value
        else:
            words.append(word)
    with open(path("lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(path("calls.jsonl"), "a") as file:
            call = {"verb": verb, "argv": argv, "time": time.time(), "pid": os.getppid()}
            file.write(json.dumps(call) + "\n")
        scenario = load(path("scenario.json"), {})
        counts = load(path("counts.json"), {})
        number = counts.get(verb, 0)
        save(path("counts.json"), counts | {verb: number + 1})
        replies = scenario.get("replies", {}).get(verb, [])
        if number < len(replies) and replies[number] is not None:
            code, text = replies[number]
            (fail(text, code) if code else print(text))
            return
        preempt(scenario)
        after = globals()["do_" + verb.replace("-", "_")](scenario, options, words)
    # What runs on workers must not keep others waiting.
    if after:
        after()


def slice_file(name):
    return path("slices", name, "slice.json")


def find(name, zone):
    slice_ = load(slice_file(name), None)
    if slice_ is None or slice_["zone"] != zone:
        fail(f"NOT_FOUND: Resource 'locations/{zone}/queuedResources/{name}' was not found")
    return slice_


def do_create(scenario, options, words):
    name = words[0]
    if os.path.exists(slice_file(name)):
        fail("ALREADY_EXISTS: Resource already exists")
    shutil.rmtree(path("slices", name), ignore_errors=True)
    os.makedirs(path("slices", name))
    states = scenario.get("states", ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    generation = load(path("generation.json"), 0) + 1
    save(path("generation.json"), generation)
    # A list of lists: one list for each slice that is made.
    if isinstance(states[0], list):
        states = states[min(generation, len(states)) - 1]
    labels = dict(pair.split("=") for pair in options.get("labels", "").split(",") if pair)
    record = {"name": name, "zone": options["zone"], "type": options["accelerator-type"]}
    save(slice_file(name), record | {"labels": labels, "states": states, "at": 0})
    for worker in range(HOSTS[options["accelerator-type"]]):
        os.makedirs(path("slices", name, f"w{worker}"))


def state(slice_):
    return slice_["states"][min(slice_["at"], len(slice_["states"]) - 1)]


def shown(scenario, slice_):
    now = state(slice_)
    told = {"state": now}
    if now == "FAILED":
        told["failedData"] = {"error": {"code": 8, "message": scenario.get("reason", "")}}
    node = {"acceleratorType": slice_["type"], "labels": slice_["labels"]}
    return {
        "name": f"projects/mine/locations/{slice_['zone']}/queuedResources/{slice_['name']}",
        "state": now if scenario.get("string") else told,
        "tpu": {"nodeSpec": [{"nodeId": slice_["name"], "node": node}]},
    }


def do_describe(scenario, options, words):
    slice_ = find(words[0], options["zone"])
    if slice_.get("deleting"):
        if slice_["deleting"] > 1:
            vanish(slice_["name"])
            find(words[0], options["zone"])
        save(slice_file(words[0]), slice_ | {"deleting": slice_["deleting"] + 1})
        print(json.dumps(shown(scenario, slice_) | {"state": {"state": "DELETING"}}))
        return
    print(json.dumps(shown(scenario, slice_)))
    save(slice_file(words[0]), slice_ | {"at": slice_["at"] + 1})


def do_list(scenario, options, words):
    files = glob.glob(path("slices", "*", "slice.json"))
    slices = [load(file, None) for file in sorted(files)]
    print(json.dumps([shown(scenario, s) for s in slices if s["zone"] == options["zone"]]))


def do_accelerator_types(scenario, options, words):
    print(json.dumps([{"type": kind} for kind in HOSTS]))


def do_delete(scenario, options, words):
    slice_ = find(words[0], options["zone"])
    kill(words[0])
    save(slice_file(words[0]), slice_ | {"deleting": 1})


def kill(name):
    """SIGKILL to all that runs on the slice's workers; again until nothing is found."""
    wanted = f"FAKE_VM={path('slices', name)}/".encode()
    while True:
        found = []
        # A worker may ask for its own end.
        for file in set(glob.glob("/proc/[0-9]*/environ")) - {f"/proc/{os.getpid()}/environ"}:
            try:
                with open(file, "rb") as environment:
                    if wanted in environment.read():
                        found.append(int(file.split("/")[2]))
            except OSError:
                continue
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not found:
            return
        time.sleep(0.01)


def vanish(name):
    kill(name)
    shutil.rmtree(path("slices", name))


def preempt(scenario):
    done = load(path("preempted.json"), [])
    for number, pattern in enumerate(scenario.get("preempt", [])):
        if number in done or not glob.glob(pattern):
            continue
        save(path("preempted.json"), [*done, number])
        for file in glob.glob(path("slices", "*", "slice.json")):
            slice_ = load(file, None)
            kill(slice_["name"])
            for home in glob.glob(path("slices", slice_["name"], "w*")):
                shutil.rmtree(home)
                os.makedirs(home)
            save(file, slice_ | {"states": ["SUSPENDED"], "at": 0})
        return


def reachable(options, words):
    name = words[0].partition(":")[0]
    slice_ = find(name, options["zone"])
    if state(slice_) != "ACTIVE" or slice_.get("deleting"):
        fail('This TPU has terminal state "PREEMPTED", so it cannot be used anymore.')
    count = HOSTS[slice_["type"]]
    chosen = options["worker"]
    return name, range(count) if chosen == "all" else [int(w) for w in chosen.split(",")], count


def do_ssh(scenario, options, words):
    name, chosen, count = reachable(options, words)
    return lambda: ssh(scenario, name, chosen, count, options["command"])


def ssh(scenario, name, chosen, count, command):
    for worker in chosen:
        print(f"SSH: Attempting to connect to worker {worker}...", file=sys.stderr)
        if worker in scenario.get("deaf", []):
            continue
        home = path("slices", name, f"w{worker}")
        # As on a VM: a home, a host's name that has the number, and nothing of the caller.
        environment = {"HOME": home, "PATH": os.environ["PATH"], "FAKE_VM": home + "/"}
        environment |= {"TPU_WORKER_ID": str(worker), "FAKE_GCLOUD": ROOT}
        environment |= scenario.get("env", {})
        if count > 1 and "port" in scenario:
            environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{scenario['port']}"
            environment["JAX_NUM_PROCESSES"] = str(count)
            environment["JAX_PROCESS_ID"] = str(worker)
        try:
            subprocess.run(["bash", "-c", command], cwd=home, env=environment)
        except FileNotFoundError:
            fail("connection lost", 255)


def do_scp(scenario, options, words):
    *files, target = words
    name, chosen, _ = reachable(options, [target])
    for worker in chosen:
        if worker not in scenario.get("deaf", []):
            where = os.path.join(path("slices", name, f"w{worker}"), target.partition(":")[2])
            for file in files:
                shutil.copy(file, where)


if __name__ == "__main__":
    main(sys.argv[1:])
