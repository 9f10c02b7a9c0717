"""Prepared data sets: what they hold, what they are made of, and how runs draw from them."""

import dataclasses
import filecmp
import functools
import hashlib
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cir_jax import cli
from cir_jax.config import ConfigError, DataConfig
from cir_jax.data import pipeline, sets, sources
from cir_jax.data.overlap import find_overlaps
from cir_jax.records import Problem

SHARED = Path(__file__).parents[2] / "shared/data"
benchmark_files = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")

COUNTS = {"math500": 500, "amc23": 40, "aime24": 30, "aime25": 30, "olymmath_en_easy": 100}


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """Prepared by a process in which TensorFlow cannot be imported."""
    directory = tmp_path_factory.mktemp("sets")
    code = (
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def imports(name, *args, **kwargs):\n"
        "    if name.split('.')[0] == 'tensorflow':\n"
        "        raise ModuleNotFoundError('blocked', name='tensorflow')\n"
        "    return real(name, *args, **kwargs)\n"
        "builtins.__import__ = imports\n"
        "from cir_jax import cli\n"
        "status = cli.main(sys.argv[1:])\n"
        "assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    argv = ["data", "prepare", *COUNTS, "--manual-dir", SHARED / "benchmarks"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv, "--data-dir", directory], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{name}: test {count} problems, {sets.folder(name, directory)}"
        for name, count in COUNTS.items()
    ]
    return directory


@benchmark_files
def test_benchmarks_have_their_problems(benchmarks):
    for name, count in COUNTS.items():
        problems = sources.set_problems(name, "data.sets", str(benchmarks))
        assert len(problems) == len({p.problem_id for p in problems}) == count
        rows = (SHARED / f"benchmarks/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [p.question for p in problems] == [json.loads(row)["problem"] for row in rows]
        assert {p.verifier for p in problems} == {"math"} and {p.task for p in problems} == {name}
    of_math = sources.set_problems("math500", "data.sets", str(benchmarks))
    assert of_math[0].metadata == {
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    }
    assert of_math[0].answer == r"\left( 3, \frac{\pi}{2} \right)"


@pytest.fixture
def manual(tmp_path, monkeypatch):
    """Files of small sets, as a user has them; the known numbers of problems do not hold."""
    folder = tmp_path / "manual"
    for name in ("gsm8k", "bbh", "symbench"):
        (folder / name).mkdir(parents=True)
        monkeypatch.setitem(sets.SETS, name, dataclasses.replace(sets.SETS[name], num_problems={}))
    write(folder / "gsm8k/test.jsonl", [{"question": "Two?", "answer": "1 + 1\n#### 1,002"}])
    write(folder / "gsm8k/train.jsonl", [{"question": "One?", "answer": "#### 1"}])
    for task in (file.task for file in sets.SETS["bbh"].splits["test"]):
        target = "(B)" if task == "snarks" else "12" if task == "object_counting" else "valid"
        examples = [{"input": f"{task}?", "target": target}]
        (folder / f"bbh/{task}.json").write_text(json.dumps({"examples": examples}))
    plan = {"checker": "game24", "numbers": [1, 2, 3, 4], "target": 24}
    row = {"question": "24?", "answer": "1*2*3*4", "task": "game24", "verifier": "plan"}
    write(folder / "symbench/test.jsonl", [row | {"metadata": plan}])
    before = "Solve the following math problem step by step. The last line is it.\n\n"
    after = '\n\nRemember to put your answer on its own line after "Answer:".'
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{before}What is {n}?{after}"}],
            "reward_model": {"ground_truth": str(n)},
        }
        for n in (1, 2, 1)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "dapo_math.parquet")
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(folder, directory, *names):
    argv = ["data", "prepare", *names, "--manual-dir", str(folder), "--data-dir", str(directory)]
    return cli.main(argv)


def test_rows_become_problems(manual, tmp_path):
    directory = tmp_path / "sets"
    assert prepare(manual, directory, "gsm8k", "bbh", "symbench", "dapo_math") == 0
    found = {
        name: sources.set_problems(name, "data.sets", str(directory))
        for name in ("gsm8k:test", "gsm8k", "bbh", "symbench:test", "dapo_math")
    }
    assert [(p.question, p.answer) for p in found["gsm8k:test"]] == [("Two?", "1002")]
    assert [p.answer for p in found["gsm8k"]] == ["1"]  # the first split: train
    verifiers = {p.task: p.verifier for p in found["bbh"]}
    assert len(verifiers) == 27 and verifiers["bbh/snarks"] == "choice"
    assert verifiers["bbh/object_counting"] == "math" and verifiers["bbh/navigate"] == "exact"
    (plan,) = found["symbench:test"]
    assert (plan.task, plan.verifier, plan.metadata["checker"]) == ("game24", "plan", "game24")
    assert [(p.question, p.answer) for p in found["dapo_math"]] == [
        ("What is 1?", "1"),
        ("What is 2?", "2"),
    ]


def test_made_anew_it_is_the_same_byte_for_byte(manual, tmp_path):
    made = [tmp_path / name for name in ("one", "two")]
    for directory in (*made, made[0]):
        assert prepare(manual, directory, "gsm8k") == 0
    files = [p.relative_to(made[0]) for p in made[0].rglob("*") if p.is_file()]
    assert any(p.name.endswith("array_record-00000-of-00001") for p in files)
    assert filecmp.cmpfiles(*made, files, shallow=False) == (files, [], [])


def test_errors_are_one_line(manual, tmp_path, capsys):
    def said(*names, folder=manual):
        assert prepare(folder, tmp_path / "sets", *names) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "unknown data set 'math50'; nearest: math500" in said("math50")
    assert "--manual-dir" in said("gsm8k", folder=tmp_path / "nowhere")
    write(manual / "gsm8k/test.jsonl", [{"question": "Two?"}])
    assert f"{manual}/gsm8k/test.jsonl, line 1: answer: missing" in said("gsm8k")
    (manual / "symbench/test.jsonl").unlink()
    assert "no file symbench/train, symbench/test" in said("symbench")
    write(manual / "aime24.jsonl", [{"problem": "1?", "answer": 1}])
    assert "aime24:test: 1 problems: must be 30" in said("aime24")
    assert cli.main(["data", "show", "amc23", "--data-dir", str(tmp_path)]) == 2
    assert "cir-jax data prepare amc23" in capsys.readouterr().err


def test_downloads_have_to_stay_what_they_were(tmp_path, monkeypatch):
    from cir_jax.data import builder

    file = sets.File("http://host/a.jsonl")
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    sums = tmp_path / "sums.json"
    builder._Sums(sums).checked(path, file)
    builder._Sums(sums).checked(path, file)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="http://host/a.jsonl: sha256="):
        builder._Sums(sums).checked(path, file)
    known = hashlib.sha256(b"[]").hexdigest()
    builder._Sums(sums).checked(path, dataclasses.replace(file, sha256=known))
    with pytest.raises(ConfigError, match="must be 0"):
        builder._Sums(sums).checked(path, dataclasses.replace(file, sha256="0"))


def test_what_is_not_there_is_downloaded(tmp_path, monkeypatch, capsys):
    (tmp_path / "www").mkdir()
    write(tmp_path / "www/test.jsonl", [{"problem": "1?", "answer": "1"}])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/test.jsonl"
        splits = {"test": (sets.File(url),)}
        its = dataclasses.replace(sets.SETS["aime24"], splits=splits, num_problems={"test": 1})
        monkeypatch.setitem(sets.SETS, "aime24", its)
        argv = ["data", "prepare", "aime24", "--data-dir", str(tmp_path / "sets")]
        assert cli.main(argv) == 0
        server.shutdown()
    sums = json.loads((tmp_path / "sets/checksums.json").read_text())
    assert sums == {url: hashlib.sha256((tmp_path / "www/test.jsonl").read_bytes()).hexdigest()}
    assert cli.main([*argv[:-1], str(tmp_path / "others")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert url in last and "no file aime24/test" in last


@benchmark_files
def test_known_sums_are_those_of_the_files():
    for files in sets.SETS["gsm8k"].splits.values():
        (file,) = files
        path = SHARED / "gsm8k" / file.url.rsplit("/", 1)[-1]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


def test_runs_draw_from_sets_files_and_tasks_by_weight(manual, tmp_path):
    assert prepare(manual, tmp_path / "sets", "gsm8k", "dapo_math") == 0
    file = write(
        tmp_path / "a.jsonl",
        [{"prompt": f"{n}?", "reward_model": {"ground_truth": "1"}} for n in range(5)],
    )
    cfg = DataConfig(
        tasks=("sum",),
        files=(str(file),),
        sets=("dapo_math",),
        eval_sets=("gsm8k:test",),
        directory=str(tmp_path / "sets"),
        weights={"sum": 2.0, "dapo_math": 5.0},
    )
    sources.check(cfg)
    found = sources.train_sources(cfg, lambda p: True, print)
    weights = sources.weights(cfg, found)
    assert [(s.name, w) for s, w in zip(found, weights, strict=True)] == [
        ("sum", 2.0),
        (str(file), 1.0),
        ("dapo_math", 5.0),
    ]
    dataset = pipeline.train_problems(found, 0, weights)
    drawn = [dataset[i] for i in range(160)]
    tasks = [p.task for p in drawn]
    assert {name: tasks.count(name) for name in set(tasks)} == {
        "sum": 40,
        "a": 20,
        "dapo_math": 100,
    }
    # Each pass over a source has every problem of it once, whatever the others have drawn.
    of_file = [p.question for p in drawn if p.task == "a"]
    assert all(len(set(of_file[i : i + 5])) == 5 for i in range(0, 20, 5))
    assert len({tuple(of_file[i : i + 5]) for i in range(0, 20, 5)}) > 1
    again = pipeline.train_problems(found, 0, weights)
    assert [again[i] for i in (159, 3, 80)] == [drawn[i] for i in (159, 3, 80)]
    held_out = sources.eval_sources(cfg, lambda p: True, print)
    assert [s.name for s in held_out] == ["sum", "gsm8k:test"]
    with pytest.raises(ValueError, match="weights=.*'dapo'.*nearest: dapo_math"):
        DataConfig(tasks=("sum",), sets=("dapo_math",), weights={"dapo": 1.0})
    with pytest.raises(ConfigError, match="data.sets: gsm8k:dev: must be a split of train, test"):
        sources.check(cfg.model_copy(update={"sets": ("gsm8k:dev",)}))


# --- overlaps


def asked(*questions):
    return [Problem(f"id{n}", "t", q, "1", "math") for n, q in enumerate(questions)]


TEXT = "Let $x$ be the number of ways to tile a board of 10 squares with dominoes and squares."


@pytest.mark.parametrize(
    ("question", "is_found"),
    [
        (TEXT, True),
        (TEXT.upper().replace(" ", "  ").replace("$", ""), True),
        ("First. " + TEXT + " Find x.", True),
        (TEXT.replace("10", "11"), False),
        ("Let y be the number of ways to tile a board of 10 squares with dominoes.", False),
        ("a board of 10 squares with dominoes and squares", True),  # a run of 9 words, all it has
        ("dominoes and squares", False),  # too short to tell
        ("1 + 1 = ?", True),  # but for equal ones
        ("What is 1 + 1 = ?", False),
    ],
)
def test_overlaps(question, is_found):
    found = find_overlaps(asked("Why?", question), asked(TEXT, "What is 2?", "1+1=?"), n=15)
    assert [its.number for its in found] == [1] * is_found


def test_overlap_command_writes_what_is_kept_and_dropped(tmp_path, capsys):
    rows = [{"prompt": q, "reward_model": {"ground_truth": "1"}} for q in (TEXT, "Another one?")]
    train = write(tmp_path / "train.jsonl", rows)
    against = write(tmp_path / "against.jsonl", rows[:1])
    argv = ["data", "overlap", "--train", str(train), "--against", str(against)]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "2 training problems, 1 held out: 1 dropped, 1 kept" in capsys.readouterr().out
    kept, dropped = (
        [json.loads(line) for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()]
        for name in ("kept", "dropped")
    )
    assert [row["question"] for row in kept] == ["Another one?"]
    assert [row["overlaps_with"] for row in dropped] == [f"{against}/0"]
    # What is kept can be trained on.
    columns = {"prompt": "question", "answer": "answer", "source": "task"}
    cfg = DataConfig(
        files=(str(tmp_path / "out/kept.jsonl"),), eval_files=(str(against),), columns=columns
    )
    (source,) = sources.train_sources(cfg, lambda p: True, print)
    assert (source[0].question, source[0].task) == ("Another one?", "train")
    assert cli.main([*argv[:-1], "nowhere"]) == 2
