"""What the scripts do not do in bash: gcloud's JSON, a config's mesh, a sweep's jobs.

It needs Python 3.11 and nothing else, on the machine that launches. Errors are the user's: one
line, exit code 2.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path

EXIT_USER = 2
TRAINING = ("train", "sft")


class UserError(Exception):
    """One line for the person at the terminal."""


# -- what gcloud says --------------------------------------------------------------------------


def parse_slice(record):
    """Fields of a queued resource, `-` where it says nothing; a node's description is read, too."""
    if isinstance(record, list):
        record = record[0] if record else {}
    state = record.get("state", "")
    name = state.get("state", "") if isinstance(state, dict) else state
    specs = record.get("tpu", {}).get("nodeSpec", []) if isinstance(record.get("tpu"), dict) else []
    specs = specs if isinstance(specs, list) else [specs]
    nodes = [spec.get("node", {}) for spec in specs] or [record]
    labels = dict(record.get("labels") or {})
    for node in nodes:
        labels |= node.get("labels") or {}
    kind = record.get("acceleratorType") or nodes[0].get("acceleratorType")
    count = sum(int(spec.get("multisliceParams", {}).get("nodeCount", 1)) for spec in specs) or 1
    parts = str(record.get("name", "-")).split("/")
    reasons = list(_messages(state)) + list(_messages(record.get("error")))
    return {
        "name": parts[-1],
        "zone": parts[parts.index("locations") + 1] if "locations" in parts else "-",
        "state": str(name).upper() or "UNKNOWN",
        "type": str(kind or "-").rpartition("/")[2],
        "nodes": str(count),
        "run": labels.get("cir-run", "-"),
        "owner": labels.get("cir-owner", "-"),
        "expires": str(labels.get("cir-expires", "-")),
        "reason": "; ".join(reasons) or "-",
    }


def _messages(value, key=""):
    """All texts under keys that explain a state."""
    if isinstance(value, dict):
        for inner, below in value.items():
            yield from _messages(below, inner)
    elif isinstance(value, list):
        for below in value:
            yield from _messages(below, key)
    elif isinstance(value, str) and key in ("message", "reason", "detail", "stateInitiator"):
        yield " ".join(value.split())


def slice_command(path):
    found = parse_slice(_json(path))
    for key in ("state", "type", "nodes", "run", "owner", "expires", "reason"):
        print(found[key])


def slices_command(path, zone):
    for record in _json(path) or []:
        found = parse_slice(record)
        found["zone"] = zone if found["zone"] == "-" else found["zone"]
        keys = ("name", "zone", "state", "type", "nodes", "run", "owner", "expires")
        print(*(found[key] for key in keys))


def _json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# -- a config before its hardware --------------------------------------------------------------


def training_words(words):
    """The config and its overrides, of a command that trains; None of another one."""
    for at, word in enumerate(words[:-2]):
        if os.path.basename(word) == "cir-jax" and words[at + 1] in TRAINING:
            return words[at + 2], words[at + 3 :]
    return None


def read_config(path, above=()):
    """A TOML file over its `base`, as nested values."""
    if not path.is_file():
        raise UserError(f"config={str(path)!r}: no such file")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from error
    base = tree.pop("base", None)
    if not isinstance(base, str):
        return tree
    if path.resolve() in above:
        raise UserError(f"{path}: base={base!r}: is a base of itself")
    return _merged(read_config(path.parent / base, (*above, path.resolve())), tree)


def _merged(base, tree):
    tables = {k for k in base.keys() & tree.keys() if isinstance(tree[k], dict)}
    return base | tree | {key: _merged(base[key], tree[key]) for key in tables}


def mesh_sizes(path, overrides):
    """(data, fsdp, tensor) of a config with its overrides."""
    mesh = read_config(path).get("mesh", {})
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip().startswith("mesh."):
            mesh = mesh | {key.strip().removeprefix("mesh."): value.strip()}
    sizes = []
    for axis in ("data", "fsdp", "tensor"):
        value = mesh.get(axis, 1)
        try:
            sizes.append(int(value))
        except (TypeError, ValueError) as error:
            raise UserError(f"mesh.{axis}={value!r}: expected a number of devices") from error
    return tuple(sizes)


def check_command(source, devices, kind, *words):
    """Refuses what would be refused on the slice: a config that is none, a mesh of another size.

    Prints the directory of checkpoints that the config names, if it does.
    """
    found = training_words(words)
    if found is None:
        return
    config, overrides = found
    path = Path(source) / config
    sizes = mesh_sizes(path, overrides)
    _check_keys(source, path, overrides)
    if math.prod(sizes) != int(devices):
        raise UserError(
            f"mesh={sizes} (data, fsdp, tensor): is {math.prod(sizes)} devices, "
            f"but {kind} has {devices}; for example mesh.data=1 mesh.fsdp={devices} mesh.tensor=1"
        )
    print(read_config(path).get("checkpoint", {}).get("dir", ""))


def check_jobs_command(source, devices, kind, *paths):
    for path in paths:
        with contextlib.redirect_stdout(None):
            check_command(source, devices, kind, *_json(path)["words"])


def mesh_command(source, devices, *words):
    """For a command that trains and names no mesh: the override that makes it run on `devices`."""
    found = training_words(words)
    if found is None:
        return
    named = read_config(Path(source) / found[0]).get("mesh") or any(
        word.strip().startswith("mesh.") for word in found[1]
    )
    if not named:
        print(f"mesh.data={devices}")


def _check_keys(source, path, overrides):
    """Every key and value, if the package's own reader of configs is here (it needs pydantic)."""
    sys.path.insert(0, str(Path(source).resolve()))
    try:
        from cir_jax.config import ConfigError, load
    except ImportError:
        return
    try:
        with contextlib.chdir(source):
            load(path.resolve(), overrides)
    except ConfigError as error:
        # Weights and data may lie on the slice alone.
        if "no such file or directory" not in str(error):
            raise UserError(str(error)) from error


# -- sweeps ------------------------------------------------------------------------------------


def split_values(text):
    """Comma-separated values; commas within brackets and quotes belong to a value."""
    values, depth, quote, begin = [], 0, "", 0
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            values.append(text[begin:at])
            begin = at + 1
    return [*values, text[begin:]]


def jobs_of(source, verb, configs, seeds, grid, extra):
    """Each combination of config, seed and values as a job, in order.

    A job's id is a function of what it trains: the config's values (not its comments), the seed and
    the overrides, whatever order they were given in.
    """
    jobs = []
    axes = [[(key, value) for value in split_values(text)] for key, text in grid]
    for config, seed, *chosen in itertools.product(configs, seeds, *axes):
        tree = read_config(Path(source) / config)
        overrides = [f"{key}={value}" for key, value in chosen]
        spec = {"verb": verb, "config": tree, "seed": seed, "set": sorted([*overrides, *extra])}
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True, default=str).encode()).hexdigest()
        stem = re.sub(r"[^a-z0-9]+", "-", Path(config).stem.lower()).strip("-")[:30] or "job"
        stem = stem if stem[0].isalpha() else f"j-{stem}"
        words = ["cir-jax", verb, config, *extra, f"seed={seed}", *overrides]
        job = {"id": f"{stem}-{digest[:10]}", "config": config, "seed": seed}
        jobs.append(job | {"overrides": [*extra, *overrides], "words": words})
    ids = [job["id"] for job in jobs]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"the job {twice} is there twice: a config, seed or value was given twice")
    return jobs


def jobs_command(source, ledger, verb, configs, seeds, *rest):
    """Writes a JSON file for each job that has none, and prints all ids in order."""
    grid, extra = [], []
    for word in rest:
        kind, _, text = word.partition(":")
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value:
            expected = "key.path=value,value" if kind == "set" else "key.path=value"
            raise UserError(f"{text}: expected {expected}")
        if kind == "set":
            grid.append((key.strip(), value))
        else:
            extra.append(text)
    seeds = seeds.split(",")
    for seed in seeds:
        if not re.fullmatch(r"\d+", seed):
            raise UserError(f"--seeds={','.join(seeds)}: expected numbers, {seed!r} is none")
    for job in jobs_of(source, verb, configs.split(","), seeds, grid, extra):
        path = Path(ledger) / f"{job['id']}.json"
        if ledger and not path.exists():
            _replace(path, job | {"state": "waiting"})
        print(job["id"], *map(json.dumps, job["words"]), sep="\t")


def words_command(path):
    """The words of a job, each ended by NUL."""
    sys.stdout.write("".join(word + "\0" for word in _json(path)["words"]))


def note_command(path, *fields):
    """Sets fields of a job's JSON."""
    record = _json(path)
    for field in fields:
        key, _, value = field.partition("=")
        record[key] = int(value) if re.fullmatch(r"-?\d+", value) else value
    _replace(Path(path), record)


def table_command(*paths):
    for path in paths:
        job = _json(path)
        told = [f"seed={job['seed']}", *job["overrides"]]
        print(job["id"], job["state"], job.get("code", "-"), job["config"], *told, sep="\t")


def _replace(path, record):
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# -- Google Cloud Batch ------------------------------------------------------------------------


def batch_script(sha, commands):
    """What each task runs: makes the code ready, then the command of its index.

    commands: one for each task; or a single one for all, in which {index} is the task's number and
    {count} that of tasks.
    """
    lines = [
        "set -eu",
        "export HOME=/root",
        "h=$HOME/cir; d=$h/code/" + sha,
        'mkdir -p "$h/code"',
        '( flock 9; [ -f "$d/.ready" ] || { rm -rf "$d"; mkdir "$d"',
        f'tar -xzf /mnt/bucket/code/cir-{sha}.tar.gz -C "$d"',
        f'sh "$d/tpu_scripts/install.sh" "$h" {sha} ""; }} ) 9>"$h/code.lock"',
        'cd "$d"; PATH=$d/.venv/bin:$PATH',
    ]
    if len(commands) == 1:
        lines.append("exec " + " ".join(map(_with_index, commands[0])))
    else:
        lines.append("case $BATCH_TASK_INDEX in")
        for index, words in enumerate(commands):
            lines.append(f"{index}) exec {' '.join(map(_with_index, words))} ;;")
        lines += ['*) echo "no command for task $BATCH_TASK_INDEX" >&2; exit 2 ;;', "esac"]
    return "\n".join(lines) + "\n"


def _with_index(word):
    """A word for a shell, with the task's variables in the places of {index} and {count}."""
    names = {"{index}": '"$BATCH_TASK_INDEX"', "{count}": '"$BATCH_TASK_COUNT"'}
    parts = re.split(r"(\{index\}|\{count\})", word)
    return "".join(names.get(part) or (shlex.quote(part) if part else "") for part in parts) or "''"


def batch_command(tasks, jobs, parallel, machine, cpus, memory, seconds, bucket, sha, name, *words):
    """job.json; jobs: a file with one command a line, or empty: `tasks` times the words."""
    if jobs:
        lines = Path(jobs).read_text(encoding="utf-8").splitlines()
        commands = [shlex.split(line) for line in lines if line.strip() and line[0] != "#"]
        if not commands:
            raise UserError(f"--jobs={jobs}: holds no command")
        count = len(commands)
    else:
        commands, count = [list(words)], int(tasks)
        if count > 1 and not any("{index}" in word for word in words):
            raise UserError(f"--tasks={count}: all would do the same, {{index}} is in no word")
    where = bucket.removeprefix("gs://").rstrip("/")
    script = batch_script(sha, commands)
    job = {
        "taskGroups": [
            {
                "taskCount": str(count),
                "parallelism": str(int(parallel)),
                "taskSpec": {
                    "runnables": [{"script": {"text": script}}],
                    "computeResource": {"cpuMilli": str(cpus), "memoryMib": str(memory)},
                    "maxRunDuration": f"{seconds}s",
                    "maxRetryCount": 3,
                    # 50001: the VM was pre-empted. Everything else would fail again.
                    "lifecyclePolicies": [
                        {
                            "action": "RETRY_TASK",
                            "actionCondition": {"exitCodes": [50001, 75]},
                        }
                    ],
                    "volumes": [{"gcs": {"remotePath": where}, "mountPath": "/mnt/bucket"}],
                },
            }
        ],
        "allocationPolicy": {
            "instances": [{"policy": {"machineType": machine, "provisioningModel": "SPOT"}}]
        },
        "labels": {"cir-run": name},
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
    }
    print(json.dumps(job, indent=1))


COMMANDS = {
    "slice": slice_command,
    "slices": slices_command,
    "check": check_command,
    "mesh": mesh_command,
    "check-jobs": check_jobs_command,
    "jobs": jobs_command,
    "words": words_command,
    "note": note_command,
    "table": table_command,
    "batch": batch_command,
}


def main():
    try:
        COMMANDS[sys.argv[1]](*sys.argv[2:])
    except UserError as error:
        print(f"cir: {error}", file=sys.stderr)
        return EXIT_USER
    return 0


if __name__ == "__main__":
    sys.exit(main())
