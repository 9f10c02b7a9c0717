"""The call boundary: automaton = regular expression at every prefix, token table = automaton."""

import random
import re
import typing

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cir_jax import config as configs
from cir_jax.config import RolloutConfig
from cir_jax.rollout.fence import BOUNDARIES, CALL, OUTSIDE, token_table
from cir_jax.tokenizer import Tokenizer

FENCE, STOP_WORD = BOUNDARIES["fence"], BOUNDARIES["stop_word"]
both = pytest.mark.parametrize("boundary", BOUNDARIES.values(), ids=BOUNDARIES.keys())

FRAGMENTS = [
    *["`", "``", "```", "````", "```python", "```python\n", "\n```", "\n```\n", "```python\n```"],
    *["python", "python3", "py", "Python", "```py\n", "```Python\n", "```python3\n", "p", "n"],
    *["\n", " ", "  ", "\t", "\r\n", "\f", "\v", "\x00", "\x1c", "\u00a0", "\u0085", "\u2028"],
    *["x", "print(1)", "é", "数", "🙂", "'", '"', "~~~", "<|endoftext|>"],
    *["output", "```output", "\n```output\n", "out", "```out"],
]


def state_after(data, boundary, state=OUTSIDE):
    for byte in data:
        state = boundary.byte_table[state, byte]
    return state


def first_call(data, boundary):
    """Bytes up to the one that makes a call; None if there is none."""
    state = OUTSIDE
    for n, byte in enumerate(data, start=1):
        state = boundary.byte_table[state, byte]
        if state == CALL:
            return n
    return None


def call_in(data, boundary):
    """The rule once more, on bytes: code of the first call, and bytes up to its boundary's end."""

    def blocks(data):
        found = re.finditer(rb"```python[ \t\r\f\v]*\n(.*?)```", data, re.DOTALL)
        return [m for m in found if m[1].strip()]  # of ASCII white space, since these are bytes

    closed = blocks(data)
    if boundary is FENCE:
        return (closed[0][1], closed[0].end()) if closed else None
    at = data.find(b"```output", closed[0].end()) if closed else -1
    return (blocks(data[:at])[-1][1], at + 9) if at >= 0 else None


def text_of(data):
    # A character cut in two is no blank, and no part of a fence, either way.
    return data.decode("utf-8", errors="replace")


def has_call(data, boundary):
    return boundary.find_call(text_of(data)) is not None


def test_boundaries_are_the_configs():
    field = RolloutConfig.model_fields["boundary"]
    assert set(typing.get_args(field.annotation)) == set(BOUNDARIES)
    assert field.default == "fence"


@pytest.mark.parametrize(
    ("text", "code", "rest"),
    [
        ("```python\nprint(1)\n```", "print(1)\n", ""),
        ("text ```python\nx```", "x", ""),
        ("```python \t\r\nx\n```\n", "x\n", "\n"),
        ("```python\r\nx\r\n```\r\n", "x\r\n", "\r\n"),
        ("```python\r\n\r\n```\r\n```python\r\nx```", "x", ""),
        ("```python\nx\n``` and ```python\ny\n```", "x\n", " and ```python\ny\n```"),
        ("````python\nx\n```", "x\n", ""),
        ("```python\nx\n````", "x\n", "`"),
        ("```python\n` `` x```", "` `` x", ""),
        ("```python\n`\n```", "`\n", ""),
        ("```python\n\n```\n```python\nx\n```", "x\n", ""),  # a blank one is passed over
        ("```python\n \t\n``````python\nx\n```", "x\n", ""),
        ("```python\n\n```python\n```python\nx```", "x", ""),
        ("```py\nx\n```python\ny\n```", "y\n", ""),
        ("```python3\nx\n```python\ny\n```", "y\n", ""),
        ("```python```python\nx\n```", "x\n", ""),
        ("```python `````python\nx\n```", "x\n", ""),
        ("```python\n\u00a0```", "\u00a0", ""),  # no blank in ASCII
        ("```python\né数🙂```é", "é数🙂", "é"),
        ("```python\n# ```python\nx\n```", "# ", "python\nx\n```"),  # the first three close it
        ("```python\nx\n```output", "x\n", "output"),
    ],
)
def test_calls(text, code, rest):
    assert FENCE.find_call(text) == (code, rest)
    assert first_call(text.encode(), FENCE) == len(text.encode()) - len(rest.encode())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "print(1)",
        "```python\nx\n",
        "```python\nx\n``",
        "```python\nx\n`` `",
        "```py\nx\n```",
        "```Python\nx\n```",
        "```python3\nx\n```",
        "```python x\n```",
        "```python\rx\n```",  # a lone carriage return ends no line
        "```python\u00a0\nx\n```",
        "``` python\nx\n```",
        "```\nx\n```",
        "``python\nx\n```",
        "`` `python\nx\n```",
        "```python x```",
        "```python\n```",
        "```python\n \t\r\n\f\v```",
        "```python\n```python\nx\n```",  # the second fence closes the blank first block
        "```output\n3\n```\n",
        "~~~python\nx\n~~~",
    ],
)
@both
def test_no_calls(text, boundary):
    assert boundary.find_call(text) is None
    assert first_call(text.encode(), boundary) is None


@pytest.mark.parametrize(
    ("text", "code", "rest"),
    [
        ("```python\nx\n```\n```output", "x\n", ""),
        ("```python\nx\n``` is\n````outputs\n", "x\n", "s\n"),
        ("```python\nx\n``````output", "x\n", ""),
        ("```python\nx\n```\n```out```output", "x\n", ""),
        ("```output\n```python\nx\n```\n```output\n", "x\n", "\n"),  # one before is none
        ("```python\n```\n```output\n```python\nx\n```\n```output", "x\n", ""),
        # The closing fence is not part of the stop word.
        ("```python\nx\n```output\n1\n```\n```output", "x\n", ""),
        # The program before the stop word, not the first one.
        ("```python\nx\n```\n```python\ny\n```\n```output", "y\n", ""),
        ("```python\nx\n```\n```python\n\n```\n```output", "x\n", ""),
        # Wherever it stands: here in a second block.
        ("```python\nx\n```\n```python\ny\n```output", "x\n", ""),
    ],
)
def test_calls_by_stop_word(text, code, rest):
    assert STOP_WORD.find_call(text) == (code, rest)
    assert first_call(text.encode(), STOP_WORD) == len(text.encode()) - len(rest.encode())


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx\n```",
        "```python\nx\n```\n``output",
        "```python\nx\n```\n``` output",
        "```python\nx\n```\n```Output",
        "```python\nx\n```output",
        "```python\nx\n```\n```outpu\nt",
        "```python\nx\n\n```output",
        "```python\n\n```\n```output",
        "```python3\nx\n```\n```output",
    ],
)
def test_no_calls_by_stop_word(text):
    assert STOP_WORD.find_call(text) is None
    assert first_call(text.encode(), STOP_WORD) is None


@both
@settings(max_examples=300, deadline=None, derandomize=True)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=14))
@example(fragments=["```python\n", "x", "\n```", "`", "```python\n", "```"])
@example(fragments=["```python\n", "x", "\n```", "````", "output"])
def test_automaton_is_the_regex_at_every_prefix(boundary, fragments):
    data = "".join(fragments).encode()
    state = OUTSIDE
    for n in range(len(data) + 1):
        assert (state == CALL) == has_call(data[:n], boundary), data[:n]
        assert has_call(data[:n], boundary) == (call_in(data[:n], boundary) is not None)
        state = boundary.byte_table[state, data[n]] if n < len(data) else state


@both
@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(alphabet="`python\n xu", max_size=40))
def test_automaton_is_the_regex_on_letters(boundary, text):
    block = "x\n```\n" if boundary is STOP_WORD else ""
    data = f"```python\n{block}{text}".encode()
    for n in range(len(data) + 1):
        assert (state_after(data[:n], boundary) == CALL) == has_call(data[:n], boundary)


def fuzz(seed, count, max_fragments=12):
    rng = random.Random(seed)
    for _ in range(count):
        # Openings are likely, so that most texts get past the first line.
        start = rng.choice(["", "", "```python\n", "```python\n\n```", "```python\nx```\n"])
        yield start + "".join(rng.choices(FRAGMENTS, k=rng.randrange(max_fragments)))


@both
def test_code_and_rest_are_what_the_text_holds(boundary):
    num_calls = 0
    for text in fuzz(seed=1, count=5_000):
        data = text.encode()
        expected, found = call_in(data, boundary), boundary.find_call(text)
        assert (expected is None) == (found is None)
        if found:
            num_calls += 1
            assert (found[0].encode(), found[1].encode()) == (expected[0], data[expected[1] :])
            assert first_call(data, boundary) == expected[1]
    assert 200 < num_calls < 4_500


@both
def test_call_is_absorbing(boundary):
    assert (boundary.byte_table[CALL] == CALL).all()


# --- tokens


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer(configs.asset_dir("package:quickstart/tokenizer"))


@pytest.fixture(scope="module")
def qwen(shared):
    return Tokenizer(shared / "tokenizers/qwen2.5")


@pytest.fixture(scope="module", params=["shipped", "qwen"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tables(tokenizer):
    return {b.written: token_table(tokenizer, tokenizer.size + 7, b) for b in BOUNDARIES.values()}


def ids_of_bytes(tokenizer):
    return {b: i for i, b in reversed(list(enumerate(tokenizer.token_bytes)))}


@both
def test_table_steps_as_the_automaton(tokenizer, tables, boundary):
    table, num_states = tables[boundary.written], len(boundary.byte_table)
    ids = np.random.default_rng(0).choice(tokenizer.size, min(600, tokenizer.size), replace=False)
    words = (b"`", b"python", b"output")
    some = [i for i, b in enumerate(tokenizer.token_bytes) if any(word in b for word in words)]
    for i in {*ids, *some}:
        data = tokenizer.token_bytes[i]
        after = [state_after(data, boundary, q) for q in range(num_states)]
        assert table[:, i].tolist() == after, data


@both
def test_padding_rows_change_nothing(tokenizer, tables, boundary):
    table, num_states = tables[boundary.written], len(boundary.byte_table)
    assert table.shape == (num_states, tokenizer.size + 7) and table.dtype == np.int8
    assert (table[:, tokenizer.size :] == np.arange(num_states)[:, None]).all()


def random_split(text, id_of, rng):
    """Some tokens whose bytes are the text."""
    data, ids, at = text.encode(), [], 0
    while at < len(data):
        end = rng.choice([n for n in range(at + 1, len(data) + 1) if data[at:n] in id_of])
        ids.append(id_of[data[at:end]])
        at = end
    return ids


# Texts that streams are made of, each in several splits; the weights let calls be neither rare
# nor certain.
PHRASES = {
    0.20: ["```python\n", "```python\r\n", "```python \n", "``````python\n", "```python\n\n```"],
    0.15: ["\n```", "```", "```\n", "\n```\n\n", "````", "`` `", "`"],
    0.10: ["\n```output", "```output\n", "```outputs", "````output", "output"],
    0.05: ["```python3\n", "```py\n", "```Python\n", "``` python\n", "```python", "~~~python\n"],
}
PADDING = 6  # tokens of the longest split


def phrases(tokenizer, rng):
    """[n, PADDING] ids, filled up with a padding row's, and each phrase's probability."""
    id_of, token_bytes = ids_of_bytes(tokenizer), tokenizer.token_bytes
    groups = []
    for weight, texts in PHRASES.items():
        splits = [random_split(text, id_of, rng) for text in texts for _ in range(30)]
        groups.append((weight, [ids for ids in splits if len(ids) <= PADDING]))

    def tokens(weight, chosen):
        return weight, [[i] for i, data in enumerate(token_bytes) if chosen(data)]

    groups += [
        tokens(0.20, lambda data: b"`" in data),
        tokens(0.06, lambda data: b"\n" in data or b"\r" in data),
        tokens(0.05, lambda data: not data.strip()),
        tokens(0.04, lambda data: b"python" in data.lower() or b"output" in data),
        tokens(0.05, lambda data: "\ufffd" in text_of(data)),  # parts of characters
        tokens(0.05, lambda data: not data.isascii()),
        tokens(0.05, lambda data: True),
    ]
    rows = [
        ids + [tokenizer.size] * (PADDING - len(ids)) for _, phrases in groups for ids in phrases
    ]
    shares = [weight / len(phrases) for weight, phrases in groups for _ in phrases]
    return np.array(rows), np.array(shares) / sum(shares)


def check_streams(tokenizer, table, boundary, *, num_streams, length, seed):
    """The table's first CALL is the token that holds the last byte of the first call.

    All streams run through the table at once. That no earlier prefix holds a call, and every
    later one does, is the regular expression's own word at the prefixes before, at and long
    after the call. Returns the number of streams with a call, and of those whose last token
    goes on after the boundary.
    """
    rows, shares = phrases(tokenizer, random.Random(seed))
    draws = np.random.default_rng(seed).choice(len(rows), (num_streams, length), p=shares)
    ids_NT = rows[draws].reshape(num_streams, -1)
    states_N = np.zeros(num_streams, np.int8)
    calls_at_N = np.full(num_streams, -1)
    for t, ids_N in enumerate(ids_NT.T):
        states_N = table[states_N, ids_N]
        calls_at_N[(states_N == CALL) & (calls_at_N < 0)] = t
    pieces = [*tokenizer.token_bytes, b""]
    num_calls = num_trailing = 0
    for ids, t in zip(ids_NT.tolist(), calls_at_N.tolist(), strict=True):
        data = [pieces[i] for i in ids]
        whole = b"".join(data)
        expected = call_in(whole, boundary)
        assert has_call(whole, boundary) == (t >= 0) == (expected is not None), data
        if t < 0:
            continue
        code, end = expected
        upto = b"".join(data[: t + 1])
        trailing = upto[end:]
        assert len(upto) - len(data[t]) < end <= len(upto), data
        assert boundary.find_call(text_of(upto)) == (text_of(code), text_of(trailing)), data
        assert not has_call(upto[: len(upto) - len(data[t])], boundary), data
        num_calls += 1
        num_trailing += trailing != b""
    return num_calls, num_trailing


@both
def test_streams_of_tokens(tokenizer, tables, boundary):
    num_streams = 20_000 if tokenizer.size > 1_000 else 10_000
    num_calls, num_trailing = check_streams(
        tokenizer, tables[boundary.written], boundary, num_streams=num_streams, length=14, seed=1
    )
    assert 0.1 * num_streams < num_calls < 0.9 * num_streams
    if boundary is FENCE:  # few tokens go on after "output"
        assert num_trailing > 0.01 * num_streams


@pytest.mark.slow
@pytest.mark.parametrize("length", [7, 14, 40])
@both
def test_a_hundred_thousand_streams_of_tokens(qwen, boundary, length):
    table = token_table(qwen, qwen.size + 1, boundary)
    num_calls, _ = check_streams(
        qwen, table, boundary, num_streams=100_000, length=length, seed=length
    )
    assert num_calls > 1_000


@both
def test_one_stream_prefix_by_prefix(tokenizer, tables, boundary):
    """Token after token, as the decode loop steps."""
    rows, shares = phrases(tokenizer, random.Random(2))
    draws = np.random.default_rng(2).choice(len(rows), (300, 14), p=shares)
    for ids in rows[draws].reshape(300, -1):
        state, data = OUTSIDE, b""
        for i in ids[ids < tokenizer.size]:
            state = tables[boundary.written][state, i]
            data += tokenizer.token_bytes[i]
            assert state == state_after(data, boundary)
            assert (state == CALL) == has_call(data, boundary)


@pytest.mark.parametrize(
    "pieces",
    [
        ["```", "python", "\n", "1", "\n", "```"],
        ["`", "`", "`", "p", "y", "t", "h", "o", "n", "\n", "1", "`", "`", "`"],
        ["``", "`", "python", "\n", "1", "``", "`"],
        [" ```", "python", "\n\n", "1", "\n", "``", "`\n"],
        ["```", "python", "\r\n", "1", "\r\n", "``", "`\r\n"],
        ["```", "python", "\n", "1", "\n", "``", "`\n\n"],
        ["```", "python", "\n", "1", "\n", " ```\n"],
        ["```", "python", "\n", "1", "\n", "``", "``"],
        ["```", "python", "\n", "1", "`.`", "\n", "``", "``,"],
        ["```", "python", "\n", "\n", "```", "python", "\n", "```", "python", "\n", "1", "```"],
    ],
)
def test_chosen_splits_of_fences(qwen, pieces):
    id_of = ids_of_bytes(qwen)
    table = token_table(qwen, qwen.size, FENCE)
    states = [OUTSIDE]
    for piece in pieces:
        states.append(int(table[states[-1], id_of[piece.encode()]]))
    assert states.index(CALL) == len(pieces)


# --- put-back


@pytest.mark.parametrize(
    ("ticks", "token", "between"),
    [
        # As CIR has it.
        ("", "```", "```\n```output"),
        # The token brings the newline, alone or after other characters.
        ("``", "`\n", "```\n```output"),
        ("`", "``\n", "```\n```output"),
        ("", " ```\n", " ```\n```output"),
        ("``", "`\r\n", "```\r\n```output"),
        ("``", "`;\n", "```;\n```output"),
        # The model's own empty line stays.
        ("``", "`\n\n", "```\n\n```output"),
        # Other characters: the output starts a line.
        ("`", "``,", "```,\n```output"),
        ("``", "``", "````\n```output"),
        ("``", "`s", "```s\n```output"),
    ],
)
def test_put_back_after_the_closing_token(qwen, ticks, token, between):
    id_of = ids_of_bytes(qwen)
    ids = [*qwen.encode("```python\n1\n"), *[id_of[b"`"]] * len(ticks), id_of[token.encode()]]
    code, trailing = FENCE.find_call(qwen.decode(ids))
    assert code == "1\n" + " " * token.startswith(" ")
    ids += qwen.encode(FENCE.put_back("3", trailing))
    assert qwen.decode(ids) == f"```python\n1\n{between}\n3\n```\n"


@pytest.mark.parametrize(
    ("token", "between"),
    [("output", "```output\n3"), ("outputs", "```outputs\n3")],
)
def test_put_back_after_the_stop_word(qwen, token, between):
    ids = [*qwen.encode("```python\n1\n```\n```"), ids_of_bytes(qwen)[token.encode()]]
    code, trailing = STOP_WORD.find_call(qwen.decode(ids))
    assert code == "1\n"
    ids += qwen.encode(STOP_WORD.put_back("3", trailing))
    assert qwen.decode(ids) == f"```python\n1\n```\n{between}\n```\n"


@both
def test_put_back_after_every_token_that_ends_a_boundary(tokenizer, tables, boundary):
    """Output starts a line, at once after a newline that was sampled; no byte is changed."""
    table, id_of = tables[boundary.written], ids_of_bytes(tokenizer)
    start = "```python\n1\n" + "```\n" * (boundary is STOP_WORD)
    last = "```output" if boundary is STOP_WORD else "```"
    num_tokens = 0
    for n in range(len(last)):
        ids = random_split(start + last[:n], id_of, random.Random(n))
        before = int(state_after((start + last[:n]).encode(), boundary))
        for i in np.flatnonzero(table[before, : tokenizer.size] == CALL):
            turn = b"".join(tokenizer.token_bytes[i] for i in [*ids, i])
            _, trailing = boundary.find_call(tokenizer.decode([*ids, i]))
            output = tokenizer.encode(boundary.put_back("3", trailing))
            whole = b"".join(tokenizer.token_bytes[i] for i in [*ids, i, *output])
            opening = b"" if boundary is STOP_WORD else b"```output\n"
            newline = b"" if trailing.endswith("\n") else b"\n"
            assert whole == turn + newline + opening + b"3\n```\n"
            num_tokens += 1
    # After all but the last letter, each token that begins with it; before that, some more.
    assert num_tokens > sum(d.startswith(last[-1:].encode()) for d in tokenizer.token_bytes)
