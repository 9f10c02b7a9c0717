"""Recorded trajectories: every layout gives the tokens and authors that a rollout would have."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from cir_jax import config as configs
from cir_jax.collect.rejection import line
from cir_jax.config import ConfigError, ModelConfig, ResultConfig
from cir_jax.data import pipeline, sources
from cir_jax.models import hf, qwen
from cir_jax.records import Author, Problem, Score, author_spans
from cir_jax.rl.batch import pack
from cir_jax.rollout import decode
from cir_jax.rollout.engine import Engine
from cir_jax.rollout.sampling import Sampling
from cir_jax.sandbox.pool import Sandbox
from cir_jax.tokenizer import END_OF_TEXT, Tokenizer
from cir_jax.train import transcripts

ROOT = Path(__file__).parent.parent
SHIPPED = configs.asset_dir("package:quickstart/tokenizer")


def load_config(*overrides):
    return configs.load(ROOT / "configs/quickstart.toml", overrides)


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer(SHIPPED)


@pytest.fixture(scope="module", params=["shipped", "qwen2.5"])
def tokenizer(request):
    if request.param == "shipped":
        return request.getfixturevalue("shipped")
    return Tokenizer(request.getfixturevalue("shared") / "tokenizers/qwen2.5")


def read(tmp_path, tokenizer, *rows, **changes):
    """The sequences of a file of these rows, and the counts of rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cfg = load_config(f"sft.data={path}", "data.max_prompt_tokens=100")
    rollout = cfg.rollout.model_copy(update={"max_response_tokens": 500} | changes)
    cfg = cfg.model_copy(update={"rollout": rollout})
    recorded, counts = transcripts.load(cfg, tokenizer)
    return [r.sequence for r in recorded], counts


def stretches(sequence, tokenizer):
    """(author, text) of each stretch, the end token by its name."""
    edges = np.flatnonzero(np.diff(sequence.author, prepend=-1, append=-1))
    return [
        (Author(sequence.author[a]), tokenizer.decode(sequence.ids[a:b]))
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]


# --- one trajectory in every layout

QUESTION = "What is 6 * 7?"
PROGRAMS = ["Try.\n```python\nprint(six)\n```", "Mend it: ```python\nprint(6 * 7)\n```"]
ERROR = "NameError: name 'six' is not defined"
ANSWER = "The answer is \\boxed{42}."
OUTPUTS = [f"\n```output\n{ERROR}\n```\n", "\n```output\n42\n```\n"]
WHOLE = [
    (Author.PROMPT, f"{QUESTION}\n"),
    (Author.MODEL, PROGRAMS[0]),
    (Author.TOOL, OUTPUTS[0]),
    (Author.MODEL, PROGRAMS[1]),
    (Author.TOOL, OUTPUTS[1]),
    (Author.MODEL, ANSWER + END_OF_TEXT),
]
SEGMENTS = [
    {"author": "tool" if n % 2 else "model", "text": text.removesuffix(END_OF_TEXT)}
    for n, (_, text) in enumerate(WHOLE[1:])
]
TRACEBACK = f'Traceback (most recent call last):\n  File "x", line 1\n    six\n{ERROR}\n'


def chat(*contents, roles=("user", "assistant")):
    said = zip(contents, (roles * len(contents)), strict=False)
    return {"messages": [{"role": role, "content": content} for content, role in said]}


LAYOUTS = {
    "segments": {"question": QUESTION, "segments": SEGMENTS},
    "r1-ci": chat(QUESTION, PROGRAMS[0], ERROR, PROGRAMS[1], "42\n", ANSWER),
    "tool": {
        "messages": [
            {"role": role, "content": content}
            for role, content in [
                ("system", ""),
                ("user", QUESTION),
                ("assistant", PROGRAMS[0] + "\n"),
                ("tool", f"out\n{TRACEBACK}"),
                ("assistant", PROGRAMS[1]),
                ("tool", "```output\n42\n```"),
                ("assistant", ANSWER + END_OF_TEXT),
            ]
        ]
    },
    "response": {"question": QUESTION, "response": "".join(t for _, t in WHOLE[1:])},
    "spaced": {
        "question": QUESTION,
        "response": PROGRAMS[0] + "\n\n```output\n" + TRACEBACK + "\n```\n" + PROGRAMS[1]
        + "\n```output \n\n42\n```" + "\n" + ANSWER,
    },
    "windows": {
        "question": QUESTION,
        "response": "".join(t for _, t in WHOLE[1:]).replace("```output\n", "```output\r\n"),
    },
    "mixed": chat(QUESTION, PROGRAMS[0] + OUTPUTS[0] + PROGRAMS[1], "42", ANSWER),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_one_trajectory(tmp_path, tokenizer, name):
    """Each stretch encoded apart, and its author's."""
    (got,), counts = read(tmp_path, tokenizer, LAYOUTS[name])
    want = [(who, tokenizer.encode(text.removesuffix(END_OF_TEXT))) for who, text in WHOLE]
    want[-1][1].append(tokenizer.eos_id)
    assert got.ids.tolist() == [i for _, ids in want for i in ids]
    assert got.author.tolist() == [who for who, ids in want for _ in ids]
    assert counts["kept"] == 1 and sum(counts.values()) == 1


def test_only_what_the_model_wrote_is_trained(tmp_path, shipped):
    """In the packed batch: its text and the end tokens, of all rows; nothing of prompt or tool."""
    rows = [LAYOUTS["r1-ci"], {"question": "1?", "response": "\\boxed{1}"}, LAYOUTS["response"]]
    sequences, _ = read(tmp_path, shipped, *rows)
    batch, _ = pack(sequences, row_length=300, micro_rows=2, max_micro=2)
    assert batch.segment_ids.max() > 1
    got = [
        shipped.decode(batch.ids[at][batch.trained[at]])
        for at in np.ndindex(batch.ids.shape[:2])
        if batch.trained[at].any()
    ]
    model = "".join(text for who, text in WHOLE if who == Author.MODEL)
    texts = sorted([model, model, "\\boxed{1}" + END_OF_TEXT])
    assert sorted("".join(got).split(END_OF_TEXT)[:-1]) == [
        t.removesuffix(END_OF_TEXT) for t in texts
    ]
    assert (batch.trained == (batch.weight > 0)).all()


def test_a_table_of_mixed_rows(tmp_path, shipped):
    """Columns that a row lacks hold null there, as parquet has it."""
    row = LAYOUTS["segments"] | {"messages": None, "response": None, "tokenizer": None}
    row = row | {"segments": [segment | {"ids": None} for segment in SEGMENTS]}
    (got,), _ = read(tmp_path, shipped, row)
    assert stretches(got, shipped) == WHOLE


def test_results_are_reworded(tmp_path, shipped):
    """As this config's rollouts would show them, and a prefix that is there is not doubled."""
    result = ResultConfig(prefix="Results:\n", max_chars=4)
    for output in ("1234567", "Results:\n1234567"):
        row = chat(QUESTION, PROGRAMS[1], output, ANSWER)
        (got,), _ = read(tmp_path, shipped, row, result=result)
        assert stretches(got, shipped)[2][1] == "\n```output\nResults:\n12...67\n```\n"


def test_stop_word_is_written_by_the_model(tmp_path, shipped):
    for name in ("r1-ci", "response", "mixed"):
        (got,), _ = read(tmp_path, shipped, LAYOUTS[name], boundary="stop_word")
        assert stretches(got, shipped)[1:3] == [
            (Author.MODEL, f"{PROGRAMS[0]}\n```output"),
            (Author.TOOL, f"\n{ERROR}\n```\n"),
        ]
    with pytest.raises(ConfigError, match=r"segments\[0\].text=.*must be a call .*'stop_word'"):
        read(tmp_path, shipped, LAYOUTS["segments"], boundary="stop_word")


def test_a_last_program_without_output_is_the_models(tmp_path, shipped):
    """As in a rollout whose budget is used up."""
    last = f"{ANSWER}\n```python\nprint(43)\n```\nSo it is."
    for row in (chat(QUESTION, last), {"question": QUESTION, "response": last}):
        (got,), _ = read(tmp_path, shipped, row)
        assert stretches(got, shipped)[1:] == [(Author.MODEL, last + END_OF_TEXT)]


GOOD = {"question": QUESTION, "response": ANSWER}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD | {"question": "word " * 120}, "too_long"),
        (GOOD | {"response": "word " * 520}, "too_long"),
        (chat(QUESTION, PROGRAMS[0] + PROGRAMS[1], "42", ANSWER), "several_programs"),
        (GOOD | {"response": "```output\n3\n```\nThree."}, "stray_output"),
        (GOOD | {"response": "It is ```output\r\n3\r\n``` three."}, "stray_output"),
        (GOOD | {"response": "```py\n3\n```\n```output\n3\n```\nThree."}, "stray_output"),
        (GOOD | {"response": f"{PROGRAMS[0]}\nIt is\n```output\n3\n```\nThree."}, "stray_output"),
        (GOOD | {"response": PROGRAMS[0] + OUTPUTS[0]}, "no_answer"),
        (GOOD | {"response": " \n"}, "no_answer"),
    ],
)
def test_rows_that_cannot_be_used_are_left_out_whole_and_counted(tmp_path, shipped, row, reason):
    sequences, counts = read(tmp_path, shipped, GOOD, row, GOOD)
    assert [stretches(s, shipped)[1][1] for s in sequences] == [ANSWER + END_OF_TEXT] * 2
    assert {name: n for name, n in counts.items() if n} == {"kept": 2, reason: 1}
    assert reason in transcripts.COUNTED


def test_text_between_program_and_output_is_cut_and_counted(tmp_path, shipped):
    row = chat(QUESTION, PROGRAMS[1] + "\nLet us see.", "42", ANSWER)
    (got,), counts = read(tmp_path, shipped, row)
    assert stretches(got, shipped)[1] == (Author.MODEL, PROGRAMS[1])
    assert counts["cut_after_program"] == counts["kept"] == 1


def changed(n, **changes):
    segments = [s | (changes if i == n else {}) for i, s in enumerate(SEGMENTS)]
    return {"question": QUESTION, "segments": segments}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "?", "answer": "3"}, "one of the fields segments, messages, response; its f"),
        ({"response": "3"}, "question: missing; must be a string"),
        (GOOD | {"response": ["3"]}, "response=['3']: must be a string"),
        (GOOD | {"messages": []}, "must have one of the fields"),
        ({"messages": []}, "messages=[]: must be user, assistant"),
        ({"messages": ["hello"]}, "messages[0]='hello': must be an object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: missing"),
        (chat("Be brief.", QUESTION, roles=("system", "user")), "messages[0].role='system': must"),
        (chat(QUESTION, "a", roles=("user",)), "messages[1].role='user': must be 'assistant'"),
        (chat(QUESTION), "messages='user': must be assistant's at the end"),
        (chat(QUESTION, "Hm.", "Well?", "3"), "messages[2].content='Well?': must be preceded by"),
        ({"question": "?", "segments": SEGMENTS[:2]}, "must be model and tool in turn, model last"),
        (changed(1, author="model"), "segments[1].author='model': must be 'tool'"),
        (changed(2, text=3), "segments[2].text=3: must be a string"),
        (changed(0, text="No code."), "segments[0].text='No code.': must be a call"),
        (changed(0, text=PROGRAMS[0] + " And more."), "must be at its end where the call is"),
    ],
)
def test_rows_of_no_layout(tmp_path, shipped, row, words):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, shipped, GOOD, row)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 2: ")
    assert words in str(caught.value)


def test_nothing_to_train_on(tmp_path, shipped):
    with pytest.raises(ConfigError, match="nothing to train on; .*'no_answer': 1"):
        read(tmp_path, shipped, GOOD | {"response": ""})


# --- rollout -> file -> SFT


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(num_workers=1) as sandbox:
        yield sandbox


def written(trajectory, tokenizer, cfg):
    """A trajectory's line, as it comes back from the file."""
    return json.loads(json.dumps(line(trajectory, Score(1.0, "correct"), tokenizer, cfg)))


def check_equal(sequence, trajectory):
    assert sequence.ids.tolist() == trajectory.ids.tolist()
    assert sequence.author.tolist() == trajectory.author.tolist()
    assert sequence.trained.tolist() == (trajectory.author == Author.MODEL).tolist()


def test_a_rollouts_tokens_come_back(tmp_path, shipped, sandbox):
    """Of the shipped cold start's rollouts, token by token; and, where it sampled what the
    tokenizer makes of its text, also from the texts alone."""
    cfg = load_config("rollout.slots=16")
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor")
    )
    engine = Engine(
        cfg.model,
        cfg.rollout,
        shipped,
        sandbox,
        template=cfg.data.template,
        chat=cfg.data.chat,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        dtype="float32",
        seed=0,
    )
    groups, _ = engine.rollout(
        hf.load(configs.asset_dir(cfg.sft.weights), cfg.model, mesh),
        pipeline.first_problems(sources.of_tasks(cfg.data.tasks, "eval"), 10),
        samples=4,
        max_calls=3,
        sampling=Sampling(1.0),
        phase="test",
        step=4,
    )
    whole = [t for group in groups for t in group if t.stop_reason == "eos"]
    assert {0, 1, 2} <= {len(t.calls) for t in whole}
    rows = [written(t, shipped, cfg.rollout) for t in whole]
    sequences, counts = read(tmp_path, shipped, *rows)
    assert counts["kept"] == len(whole)
    for sequence, trajectory in zip(sequences, whole, strict=True):
        check_equal(sequence, trajectory)

    def is_canonical(t):
        spans = author_spans(t.author)
        texts = [(t.ids[at].tolist(), shipped.decode(t.ids[at])) for _, at in spans]
        return all(transcripts._encode(text, shipped) == ids for ids, text in texts)

    canonical = [i for i, t in enumerate(whole) if is_canonical(t)]
    assert any(whole[i].calls for i in canonical)
    elsewhere = [rows[i] | {"tokenizer": "another"} for i in canonical]
    for i, sequence in zip(canonical, read(tmp_path, shipped, *elsewhere)[0], strict=True):
        check_equal(sequence, whole[i])


def test_sampled_tokens_come_back_where_text_would_not_say_them(
    tmp_path, tokenizer, sandbox, monkeypatch
):
    """A scripted rollout: words spelt by single characters, a closing fence whose token carries
    the newline after it (if there is such a token), a failing program."""
    fences = [i for i, b in enumerate(tokenizer.token_bytes) if b in (b"```\n", b"```")]
    closing = max(fences, key=lambda i: len(tokenizer.token_bytes[i]))
    trailing = tokenizer.token_bytes[closing].removeprefix(b"```").decode()
    spelt = [tokenizer.encode(c)[0] for c in "The answer"]
    assert spelt != tokenizer.encode("The answer")
    first = [*spelt, *tokenizer.encode(" so\n```python\nprint(nothing)\n"), closing]
    error = "NameError: name 'nothing' is not defined"
    first_output = tokenizer.encode(transcripts.BOUNDARIES["fence"].put_back(error, trailing))
    second = tokenizer.encode("```python\nprint(6 * 7)\n```")
    second_output = tokenizer.encode("\n```output\n42\n```\n")
    answer = [*tokenizer.encode("\\boxed{42}"), tokenizer.eos_id]
    prompt = tokenizer.encode(QUESTION + "\n")
    script = np.array(prompt + first + first_output + second + second_output + answer)
    scripted = jax.numpy.asarray(script)

    def sample(logits_VB, keys_B2, positions_B, *_):
        return scripted.at[positions_B].get(mode="clip"), -jax.numpy.ones(len(positions_B))

    monkeypatch.setattr(decode, "sample", sample)
    model = ModelConfig(
        vocab_size=tokenizer.size, width=4, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=4, mlp_width=4, rope_theta=1e4,
    )  # fmt: skip
    # Segments of a length of their own: the program is this test's alone.
    cfg = load_config("rollout.slots=1", "rollout.prefill_rows=1", "rollout.segment_steps=6")
    cfg = cfg.rollout.model_copy(update={"max_response_tokens": 200})
    engine = Engine(
        model, cfg, tokenizer, sandbox,
        template="{question}\n", chat=False, max_prompt_tokens=32, dtype="float32",
            seed=0,
    )  # fmt: skip
    problem = Problem("p", "sum", QUESTION, "42", "math")
    ((trajectory,),), _ = engine.rollout(
        qwen.init(model, jax.random.key(0)), [problem], samples=1, max_calls=3,
        sampling=Sampling(1.0), phase="test", step=0,
    )  # fmt: skip
    assert trajectory.ids.tolist() == script.tolist() and len(trajectory.calls) == 2
    row = written(trajectory, tokenizer, cfg)
    assert [call["output"] for call in row["calls"]] == [error, "42"]
    check_equal(read(tmp_path, tokenizer, row)[0][0], trajectory)
    # Without the ids the same text has other tokens.
    (other,), _ = read(tmp_path, tokenizer, row | {"tokenizer": "another"})
    assert tokenizer.decode(other.ids) == tokenizer.decode(trajectory.ids)
    assert len(other.ids) < len(trajectory.ids)
    # Ids that are not those of the text are no record.
    row["segments"][0]["ids"][0] += 1
    with pytest.raises(ConfigError, match=r"line 1: segments\[0\].ids=.*must be the ids of the te"):
        read(tmp_path, tokenizer, row)


def test_fingerprint_tells_tokenizers_apart(shipped, tmp_path):
    assert shipped.fingerprint == Tokenizer(SHIPPED).fingerprint
    for path in SHIPPED.iterdir():
        text = path.read_text()
        # The same tokens, two of them with each other's ids.
        if path.name == "vocab.json":
            vocab = json.loads(text)
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
            text = json.dumps(vocab)
        (tmp_path / path.name).write_text(text)
    assert Tokenizer(tmp_path).fingerprint != shipped.fingerprint
