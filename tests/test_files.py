"""Rows of data files: each with where it stands, and errors that say so."""

import json

import pytest

from cir_jax.config import ConfigError
from cir_jax.data.files import field, read_rows, wrong_field

ROWS = [{"question": "é?", "n": 1}, {"question": "b", "n": 2}]


def rows_of(path):
    return list(read_rows(path))


def test_jsonl_counts_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n  \n" + json.dumps(ROWS[1]), encoding="utf-8")
    assert rows_of(path) == [(f"{path}, line 1", ROWS[0]), (f"{path}, line 4", ROWS[1])]


def test_json_is_a_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS))
    assert rows_of(path) == [(f"{path}, row 1", ROWS[0]), (f"{path}, row 2", ROWS[1])]


def test_parquet_is_a_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [row | {"messages": [{"role": "user", "content": "x"}]} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert rows_of(path) == [(f"{path}, row {n}", row) for n, row in enumerate(rows, start=1)]
    path.write_bytes(b"PAR1 not quite")
    with pytest.raises(ConfigError, match="a.parquet: must be a parquet file"):
        rows_of(path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', ["a.jsonl, line 2: must be JSON", '{"a":']),
        ("a.jsonl", "{}\n[1]\n", ["a.jsonl, line 2: [1]: must be an object"]),
        ("a.json", '{"a": 1}', ["a.json: must hold a list"]),
        ("a.json", "[{}, 3]", ["a.json, row 2: 3: must be an object"]),
        ("a.csv", "", ["a.csv: must end in .jsonl, .json, .parquet"]),
        ("a.jsonl", None, ["a.jsonl: ", "No such file"]),
        ("a.jsonl", b"\xff\n", ["a.jsonl: ", "utf-8"]),
    ],
)
def test_bad_files(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        rows_of(path)
    assert all(word in str(caught.value) for word in words)


def test_fields():
    row = {"a": "x", "n": 3, "yes": True}
    assert field("f, line 1", row, "a", str) == "x"
    assert field("f, line 1", row, "n", int) == 3
    for name, kind, words in [
        ("b", str, "f, line 1: m[0].b: missing; must be a string"),
        ("a", list, "f, line 1: m[0].a='x': must be a list"),
        ("yes", int, "f, line 1: m[0].yes=True: must be a whole number"),
    ]:
        with pytest.raises(ConfigError) as caught:
            field("f, line 1", row, name, kind, within="m[0].")
        assert str(caught.value) == words
    # Long values are shown in part.
    assert len(str(wrong_field("f", "a", "y" * 1000, "short"))) < 100
