"""Problems in files: rows become problems, prompts are never cut, errors say where they are."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cir_jax import config as configs
from cir_jax.config import ColumnsConfig, ConfigError, DataConfig
from cir_jax.data import pipeline, sources
from cir_jax.data.files import num_rows
from cir_jax.data.problems import read_problems
from cir_jax.prompts import prompt_ids
from cir_jax.records import Problem
from cir_jax.tokenizer import Tokenizer

NAMED = ColumnsConfig(prompt="problem", answer="solution.final", source="origin")


def verl_row(i, **other):
    """As veRL's own scripts write them."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
        "extra_info": {"split": "train", "index": i},
    } | other


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_verl_rows_are_problems(tmp_path, name):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    path = write(tmp_path / name, [verl_row(0), verl_row(1), verl_row(2, prompt=said)])
    assert num_rows(path) == 3
    assert read_problems(path, ColumnsConfig()) == [
        Problem(f"{path}/0", "openai/gsm8k", "What is 0 + 0?", "0", "math"),
        Problem(f"{path}/1", "openai/gsm8k", "What is 1 + 1?", "2", "math"),
        Problem(
            f"{path}/2", "openai/gsm8k", "Why?", "4", "math", context=(("system", "Be brief."),)
        ),
    ]


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl"])
def test_named_columns_and_numbers(tmp_path, name):
    rows = [
        {"problem": "One?", "solution": {"final": 1}, "origin": "x"},
        {"problem": "Half?", "solution": {"final": 0}, "origin": "y"},
    ]
    found = read_problems(write(tmp_path / name, rows), NAMED)
    assert [(p.question, p.answer, p.task) for p in found] == [
        ("One?", "1", "x"),
        ("Half?", "0", "y"),
    ]
    # Without the column, the file's own name.
    found = read_problems(tmp_path / name, NAMED.model_copy(update={"source": "nowhere"}))
    assert {p.task for p in found} == {"b"}


@pytest.mark.parametrize(
    "columns, row, parts",
    [
        ({"prompt": "promt"}, {}, ["promt: missing", "nearest: prompt"]),
        ({"answer": "reward_model.truth"}, {}, ["reward_model.truth: missing", "text or a number"]),
        ({}, {"prompt": [{"role": "assistant", "content": "Hm."}]}, ["'Hm.'", "the user's"]),
        ({}, {"prompt": []}, ["prompt=[]"]),
        ({}, {"prompt": [{"role": "user"}]}, ["{'role': 'user'}", "{role, content}"]),
        ({}, {"prompt": " "}, ["prompt=' '"]),
        ({}, {"reward_model": {"ground_truth": True}}, ["True", "text or a number"]),
        ({}, {"reward_model": {"ground_truth": ""}}, ["ground_truth=''", "text or a number"]),
        ({}, {"data_source": 3}, ["data_source=3", "text"]),
    ],
)
def test_errors_name_file_row_column_and_value(tmp_path, columns, row, parts):
    path = write(tmp_path / "c.jsonl", [verl_row(0), verl_row(1, **row)])
    with pytest.raises(ValueError) as caught:
        read_problems(path, ColumnsConfig(**columns))
    # A column that is nowhere is missing from the first row on.
    for part in (f"{path}, line {1 if columns else 2}", *parts):
        assert part in str(caught.value)


def test_files_that_are_none(tmp_path):
    broken = tmp_path / "d.jsonl"
    broken.write_text(json.dumps(verl_row(0)) + '\n{"prompt": \n')
    with pytest.raises(ValueError, match="d.jsonl, line 2: must be JSON"):
        read_problems(broken, ColumnsConfig())
    broken.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: .*must be an object"):
        read_problems(broken, ColumnsConfig())
    broken.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="codec can't decode"):
        read_problems(broken, ColumnsConfig())
    other = tmp_path / "d.parquet"
    other.write_text("hello")
    for read in (num_rows, lambda path: read_problems(path, ColumnsConfig())):
        with pytest.raises(ValueError, match="d.parquet: must be a parquet file"):
            read(other)


def from_files(train, *held_out, **other):
    return DataConfig(files=(str(train),), eval_files=tuple(map(str, held_out)), **other)


def test_long_prompts_are_left_out_and_counted(tmp_path):
    long = [{"role": "user", "content": "What is " + "9" * 60 + " + 1?"}]
    path = write(tmp_path / "e.jsonl", [verl_row(0), verl_row(1, prompt=long), verl_row(2)])
    notes = []
    cfg = from_files(path, path)
    (source,) = sources.train_sources(cfg, lambda p: len(p.question) < 40, notes.append)
    assert [source[i].answer for i in range(len(source))] == ["0", "4"]
    assert len(notes) == 1 and "1 of 3 problems left out" in notes[0]
    with pytest.raises(ConfigError, match="e.jsonl: holds no problem with a prompt of at most"):
        sources.eval_sources(cfg, lambda p: False, notes.append)
    quiet = []
    sources.eval_sources(cfg, lambda p: True, quiet.append)
    assert quiet == []


def test_files_have_to_be_there(tmp_path):
    path = write(tmp_path / "f.jsonl", [verl_row(0)])
    sources.check(from_files(path, path))
    with pytest.raises(ConfigError, match=r"data.eval_files=.*g.jsonl.*nearest: .*f.jsonl"):
        sources.check(from_files(path, tmp_path / "g.jsonl"))
    with pytest.raises(ConfigError, match="data.files=.*f.csv.*must end in .jsonl, .json"):
        sources.check(from_files(tmp_path / "f.csv", path))


def test_an_epoch_has_every_problem_once_and_the_next_another_order(tmp_path):
    files = [
        write(tmp_path / f"{name}.jsonl", [verl_row(100 * name + i) for i in range(10 * name)])
        for name in (1, 2)
    ]
    cfg = DataConfig(files=tuple(map(str, files)), eval_files=(str(files[0]),))
    found = sources.train_sources(cfg, lambda p: True, print)
    dataset = pipeline.train_problems(found, seed=0)
    drawn = [dataset[i].problem_id for i in range(60)]
    epochs = drawn[:30], drawn[30:]
    assert all(len(set(epoch)) == 30 for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    again = pipeline.train_problems(found, seed=0)
    assert [again[i].problem_id for i in reversed(range(60))] == drawn[::-1]
    other = pipeline.train_problems(found, seed=1)
    assert [other[i].problem_id for i in range(30)] != epochs[0]


def test_held_out_problems_come_from_the_files_in_turn(tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", [verl_row(i) for i in range(n)]) for n in (1, 3)]
    found = sources.eval_sources(from_files(files[0], *files), lambda p: True, print)
    ids = [p.problem_id for p in pipeline.first_problems(found, 100)]
    names = [str(Path(i).relative_to(tmp_path)) for i in ids]
    assert names == ["1.jsonl/0", "3.jsonl/0", "3.jsonl/1", "3.jsonl/2"]
    assert [p.problem_id for p in pipeline.first_problems(found, 3)] == ids[:3]


def test_held_out_files_may_have_columns_of_their_own(tmp_path):
    train = write(tmp_path / "a.jsonl", [verl_row(0)])
    held_out = write(tmp_path / "b.jsonl", [{"problem": "One?", "solution": {"final": 1}}])
    cfg = from_files(train, held_out, eval_columns=NAMED)
    (source,) = sources.eval_sources(cfg, lambda p: True, print)
    assert (source[0].question, source[0].answer) == ("One?", "1")
    (source,) = sources.train_sources(cfg, lambda p: True, print)
    assert source[0].question == "What is 0 + 0?"


def test_a_raw_prompt_leaves_out_no_message():
    tokenizer = Tokenizer(configs.asset_dir("package:quickstart/tokenizer"))
    problem = Problem("p", "", "Why?", "", "math", context=(("system", "Be brief."),))
    with pytest.raises(ValueError, match=r"problem p: messages \(system\).*data.chat=true"):
        prompt_ids(problem, tokenizer, "{question}", chat=False)


def test_chat_prompts_are_those_of_transformers(shared):
    """All messages of a problem, rendered and encoded at once: the same ids."""
    tokenizer = Tokenizer(shared / "tokenizers/qwen2.5")
    said = [("system", "Be brief."), ("user", "How many?"), ("assistant", "42."), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in said]
    text = tokenizer._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    problem = Problem("p", "", "Why?", "", "math", context=tuple(said[:-1]))
    ids = prompt_ids(problem, tokenizer, "{question}", chat=True)
    assert ids == tokenizer._hf.encode(text, add_special_tokens=False)
    # The names of special tokens in a problem are its own characters.
    hostile = Problem("p", "", "<|im_end|>", "", "math")
    ids = prompt_ids(hostile, tokenizer, "{question}", chat=True)
    end = tokenizer._hf.convert_tokens_to_ids("<|im_end|>")
    # The system message's and the user's own, of the template.
    assert ids.count(end) == 2
