"""The report's material: reading, decoding, curves, and a page that needs nothing else."""

import json
import re
import shutil

import numpy as np
import pytest
from models_table import TOKENIZER
from runs_on_file import write_evaluation, write_run

from cir_jax import cli
from cir_jax import config as configs
from cir_jax.config import ConfigError
from cir_jax.metrics import METRICS, SAMPLES
from cir_jax.report import curves, page, tables, trajectories
from cir_jax.report.source import Material, Source, gather, labels, markdown_table
from cir_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    return write_run(tmp_path_factory.mktemp("runs") / "first", tokenizer)


def units(text):
    return text.encode("utf-16-le")


def test_pieces_are_the_text_cut_at_tokens():
    """On random bytes, which are cut within characters and are often no characters at all."""
    rng = np.random.default_rng(0)
    alphabet = "aé√😀\n".encode() + bytes([0xFF, 0x80, 0])
    for _ in range(200):
        table = [bytes(rng.choice(list(alphabet), rng.integers(0, 4))) for _ in range(20)]
        ids = rng.integers(0, 22, rng.integers(0, 12)).tolist()
        text, sizes = trajectories.pieces(ids, table)
        joined = b"".join(table[i] for i in ids if i < len(table))
        assert text == joined.decode("utf-8", "replace")
        assert len(sizes) == len(ids)
        assert sum(sizes) * 2 == len(units(text)) or not ids


def test_a_character_belongs_to_the_token_that_ends_it(tokenizer):
    halves = ("😀".encode()[:2], "😀".encode()[2:])
    text, sizes = trajectories.pieces([0, 1, 2, 3], [b"a", *halves, b"b"])
    assert (text, sizes) == ("a😀b", [1, 0, 2, 1])
    ids = tokenizer.encode("print('√2')")
    assert trajectories.pieces(ids, tokenizer.token_bytes)[0] == tokenizer.decode(ids)


def test_a_trajectory_has_what_training_made_of_it(run, tokenizer):
    (source,) = gather([run]).sources
    row = next(r for r in source.samples if r["calls"] and r["score"] > 0)
    found = trajectories.whole(row, tokenizer.token_bytes)
    assert found["text"] == row["text"]
    assert len(found["sizes"]) == sum(count for _, count in found["spans"]) == len(row["ids"])
    assert [who for who, _ in found["spans"]] == [0, 1, 2, 1]
    own = [x for x, who in zip(row["logp"], row["author"], strict=True) if who == 1]
    assert found["logp"] == [round(-1000 * x) for x in own]
    assert found["answer"] == found["truth"] == row["answer"]
    assert "advantages" not in found
    listed = trajectories.listed(row, 0)
    assert (listed["reward"], listed["advantage"], listed["budget"]) == (
        0.75,
        0.5,
        row["max_calls"],
    )
    assert listed["tokens"] == sum(count for who, count in found["spans"] if who)


def test_without_its_tokenizer_a_run_is_shown_as_text(tmp_path, run):
    (source,) = gather([run]).sources
    config = source.config | {"tokenizer": "/nowhere"}
    lost = Source(**{**vars(source), "config": config})
    html, notes = page.render(Material([lost], {}), most=100)
    assert any("text without tokens, tokenizer='/nowhere'" in note for note in notes)
    assert trajectories.whole(source.samples[0], ())["text"] == source.samples[0]["text"]
    # Lines that an analysis cannot use cost that analysis alone.
    other = tmp_path / "other"
    shutil.copytree(run, other)
    lines = [{k: v for k, v in row.items() if k != "accuracy"} for row in source.lines]
    (other / METRICS).write_text("".join(json.dumps(row) + "\n" for row in lines))
    shown, left_out = page.analyses_of(gather([other]).sources)
    assert shown and left_out == ["analysis learning_curve left out: KeyError('accuracy')"]


def test_samples_are_spread_over_runs_and_steps():
    def source(n):
        return Source(str(n), None, "run", {}, [], [], [{"i": i} for i in range(n)], {})

    rows = trajectories.chosen([source(100), source(3)], 13)
    assert [row["i"] for n, row in rows if n == 0] == list(range(0, 100, 10))
    assert [row["i"] for n, row in rows if n == 1] == [0, 1, 2]
    assert len(trajectories.chosen([source(4), source(5)], 100)) == 9


def test_curves_have_finite_numbers_and_raises(run):
    (source,) = gather([run]).sources
    assert curves.raises(source.of_kind("rl")) == [(3, 2)]
    source.lines[2]["reward"] = float("nan")
    (curve,) = curves.curves(curves.CHARTS[0], [source])
    assert curve.steps == [1, 3, 4]
    assert curve.values == [0.1, 0.3, 0.4]
    drawn = {chart.title: chart for chart in curves.draw_all([source])}
    assert {"Reward", "Executions", "Entropy", "Seconds by stage"} <= set(drawn)
    assert "Gradient norm" not in drawn
    picture = drawn["Seconds by stage"].picture
    assert picture.startswith("<svg") and "var(--s1)" in picture and ">RL step</text>" in picture
    assert not re.search("#0[0-9a-f]0[0-9a-f]{3}", picture)


def test_a_point_lies_where_the_data_says(run):
    """What values are read off by: the first step's place, by the path that matplotlib drew."""
    (source,) = gather([run]).sources
    drawn = curves.draw(curves.CHARTS[0], [source], curves.curves(curves.CHARTS[0], [source]))
    left, _, right, _ = drawn.data["box"]
    low, high = drawn.data["steps"]
    x = left + (1 - low) / (high - low) * (right - left)
    path = re.search(r'<path d="M ([0-9.]+) [^"]*"[^>]*var\(--s0\)', drawn.picture)
    assert float(path[1]) == pytest.approx(x, abs=0.2)


def test_tables(tmp_path, run, tokenizer):
    other = write_run(tmp_path / "other", tokenizer, "rl.clip_high=0.5")
    material = gather([run, other])
    found = {table.title: table for table in tables.tables(material)}
    stages = found["Evaluations during training"].rows
    assert [row[1] for row in stages] == ["25.0 %", "75.0 %"] * 2
    assert ["rl.clip_high", "0.28", "0.5"] in found["Configs differ in"].rows
    assert [row[0] for row in found["Correct by task"].rows] == ["chain", "larger", "sum"]


def test_an_ablation_stands_for_its_runs(tmp_path, tokenizer):
    for name in ("all_on", "kl"):
        write_run(tmp_path / name / "0", tokenizer, steps=1)
    (tmp_path / "ablation.md").write_text("| off | seeds |\n|---|---|\n| nothing | 0 |\n\nMore.\n")
    material = gather([tmp_path])
    assert [source.name for source in material.sources] == ["all_on/0", "kl/0"]
    assert material.tables == {str(tmp_path): [["off", "seeds"], ["nothing", "0"]]}


def test_a_run_brings_the_evaluations_in_it(tmp_path, tokenizer):
    run = write_run(tmp_path / "run", tokenizer, steps=3)
    evaluation = write_evaluation(run / "evals/cir-1", tokenizer)
    material = gather([run, evaluation])
    assert [source.kind for source in material.sources] == ["run", "evaluation"]
    of_evaluation = material.sources[1]
    assert len(of_evaluation.samples) == 15
    rows = [trajectories.listed(row, 1) for row in of_evaluation.samples]
    assert {row["setting"] for row in rows} >= {"code", "code, call 1 off"}
    found = trajectories.whole(of_evaluation.samples[0], tokenizer.token_bytes)
    assert found["answer"] == of_evaluation.samples[0]["answer"] == found["truth"]
    assert found["text"] == "".join(s["text"] for s in of_evaluation.samples[0]["spans"])
    shown, left_out = page.analyses_of(material.sources)
    assert left_out == []
    assert all(len(row) == len(s.table.columns) for s in shown for row in s.table.rows)
    titles = [s.table.title for s in shown]
    assert "Learning curve" in titles and len(titles) == len(set(titles)) > 3
    assert any(s.picture.startswith("<svg") for s in shown)
    (card,) = [tables.card(source) for source in material.sources[1:]]
    assert {("correct", "50.0 %"), ("counterfactual samples", "9")} <= set(card.figures)
    html, notes = page.render(material, most=100)
    assert notes == [] and "quickstart/001, after RL" in html


def test_names_tell_directories_apart(tmp_path):
    a, b = tmp_path / "a/run/001", tmp_path / "b/run/001"
    assert labels([a]) == ["run/001"]
    assert labels([a, b]) == ["a/run/001", "b/run/001"]
    assert markdown_table("text\n| a | b |\n|:--|--|\n| | 2 |\n") == [["a", "b"], ["", "2"]]


def test_a_line_that_is_being_written_is_left_out(tmp_path, tokenizer):
    run = write_run(tmp_path / "run", tokenizer, steps=1)
    whole = (run / SAMPLES).read_text()
    (run / SAMPLES).write_text(whole + '{"step": 1, "prob')
    assert len(gather([run]).sources[0].samples) == whole.count("\n")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (METRICS, "{}", "line 5: has no 'kind'"),
        (METRICS, "nonsense", "line 5: no JSON object"),
        (SAMPLES, '{"step": 1}', "line 13: has no 'problem_id'"),
        (SAMPLES, "3", "line 13: no JSON object"),
    ],
)
def test_a_broken_line_is_named(tmp_path, tokenizer, name, line, message):
    run = write_run(tmp_path / "run", tokenizer, steps=2)
    number = int(re.search(r"line (\d+)", message)[1])
    text = (run / name).read_text().splitlines()[: number - 1]
    (run / name).write_text("\n".join([*text, line]) + "\n")
    with pytest.raises(ConfigError, match=re.escape(name) + ".*" + message):
        gather([run])


def test_bad_arguments_end_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for argument, message in (("gone", "no such directory"), ("empty", "holds neither")):
        assert cli.main(["report", str(tmp_path / argument)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path / argument) in error and message in error
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_the_command_writes_one_file_that_needs_nothing(tmp_path, run, capsys):
    out = tmp_path / "report.html"
    assert cli.main(["report", str(run), "-o", str(out), "--trajectories", "10"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "10 of 24 trajectories" in said.err
    html = out.read_text(encoding="utf-8")
    places = re.findall(r'(?:src|href|action|data)="([^"]*)"', html)
    assert all(place.startswith("#") for place in places)
    assert "@import" not in html and "url(http" not in html
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert configs.load_run(run).name == "quickstart"


def test_numbers_without_json_stay_out_of_the_data():
    with pytest.raises(ValueError):
        page.pack({"x": float("nan")})
    assert re.fullmatch(r"[A-Za-z0-9+/=]*", page.pack({"</script>": json.loads('"\\ud800"')}))
