"""The call boundary: automaton = regular expression at every prefix, token table = automaton."""

import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cir_jax import config as configs
from cir_jax.rollout.fence import CALL, NUM_STATES, OUTSIDE, find_call, next_state, token_table
from cir_jax.tokenizer import Tokenizer

FRAGMENTS = [
    *["`", "``", "```", "````", "```python", "```python\n", "\n```", "\n```\n", "```python\n```"],
    *["python", "python3", "py", "Python", "```py\n", "```Python\n", "```python3\n", "p", "n"],
    *["\n", " ", "  ", "\t", "\r\n", "\f", "\v", "\x00", "\x1c", "\u00a0", "\u0085", "\u2028"],
    *["x", "print(1)", "é", "数", "🙂", "'", '"', "~~~", "<|endoftext|>"],
]


def state_after(data, state=OUTSIDE):
    for byte in data:
        state = next_state(state, byte)
    return state


def first_call(data):
    """Bytes up to the one that makes a call; None if there is none."""
    state = OUTSIDE
    for n, byte in enumerate(data, start=1):
        state = next_state(state, byte)
        if state == CALL:
            return n
    return None


def has_call(data):
    # A character cut in two is no blank, and no part of a fence, either way.
    return find_call(data.decode("utf-8", errors="replace")) is not None


@pytest.mark.parametrize(
    ("text", "code", "rest"),
    [
        ("```python\nprint(1)\n```", "print(1)\n", ""),
        ("text ```python\nx```", "x", ""),
        ("```python \t\r\nx\n```\n", "x\n", "\n"),
        ("```python\nx\n``` and ```python\ny\n```", "x\n", " and ```python\ny\n```"),
        ("````python\nx\n```", "x\n", ""),
        ("```python\nx\n````", "x\n", "`"),
        ("```python\n` `` x```", "` `` x", ""),
        ("```python\n\n```\n```python\nx\n```", "x\n", ""),  # a blank one is passed over
        ("```python\n \t\n``````python\nx\n```", "x\n", ""),
        ("```py\nx\n```python\ny\n```", "y\n", ""),
        ("```python```python\nx\n```", "x\n", ""),
        ("```python\n\u00a0```", "\u00a0", ""),  # no blank in ASCII
        ("```python\n# ```python\nx\n```", "# ", "python\nx\n```"),  # the first three close it
    ],
)
def test_calls(text, code, rest):
    assert find_call(text) == (code, rest)
    assert first_call(text.encode()) == len(text.encode()) - len(rest.encode())


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
def test_no_calls(text):
    assert find_call(text) is None
    assert first_call(text.encode()) is None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=14))
@example(fragments=["```python\n", "x", "\n```", "`", "```python\n", "```"])
def test_automaton_is_the_regex_at_every_prefix(fragments):
    data = "".join(fragments).encode()
    state = OUTSIDE
    for n in range(len(data) + 1):
        assert (state == CALL) == has_call(data[:n]), data[:n]
        state = next_state(state, data[n]) if n < len(data) else state


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(alphabet="`python\n x", max_size=40))
def test_automaton_is_the_regex_on_letters(text):
    data = f"```python\n{text}".encode()
    for n in range(len(data) + 1):
        assert (state_after(data[:n]) == CALL) == has_call(data[:n])


def fuzz(seed, count, max_fragments=12):
    rng = random.Random(seed)
    for _ in range(count):
        # Openings are likely, so that most texts get past the first line.
        start = rng.choice(["", "", "```python\n", "```python\n\n```"])
        yield start + "".join(rng.choices(FRAGMENTS, k=rng.randrange(max_fragments)))


def test_automaton_is_the_regex_on_many_texts():
    num_calls = 0
    for text in fuzz(seed=0, count=30_000):
        data = text.encode()
        at = first_call(data)
        if at is None:
            assert not has_call(data), data
            continue
        num_calls += 1
        # The call is there with its last byte, not before, and stays.
        assert has_call(data[:at]) and has_call(data) and not has_call(data[: at - 1]), data
    assert 3_000 < num_calls < 27_000


def test_code_and_rest_are_what_the_text_holds():
    blanks = " \t\n\r\f\v"
    for text in fuzz(seed=1, count=3_000):
        if found := find_call(text):
            code, rest = found
            end = f"{code}```{rest}"
            assert text.endswith(end) and code.strip(blanks) and "```" not in code
            opening, newline, _ = text.removesuffix(end).rpartition("\n")
            assert newline and opening.rstrip(" \t\r\f\v").endswith("```python")


def test_call_is_absorbing():
    assert all(next_state(CALL, byte) == CALL for byte in range(256))


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
def table(tokenizer):
    return token_table(tokenizer, tokenizer.size + 7)


@pytest.fixture(scope="module")
def fence_ids(tokenizer):
    """Tokens with a back-tick or `python` in them."""
    return [i for i, b in enumerate(tokenizer.token_bytes) if b"`" in b or b"python" in b]


def test_table_steps_as_the_automaton(tokenizer, table, fence_ids):
    ids = np.random.default_rng(0).choice(tokenizer.size, min(600, tokenizer.size), replace=False)
    for i in {*ids, *fence_ids}:
        after = [state_after(tokenizer.token_bytes[i], q) for q in range(NUM_STATES)]
        assert table[:, i].tolist() == after, tokenizer.token_bytes[i]


def test_padding_rows_change_nothing(tokenizer, table):
    assert table.shape == (NUM_STATES, tokenizer.size + 7)
    assert (table[:, tokenizer.size :] == np.arange(NUM_STATES)[:, None]).all()


def check_stream(tokenizer, table, ids):
    """The table says CALL from the first prefix on in which the text has a call."""
    state = OUTSIDE
    text = b""
    for i in ids:
        state = int(table[state, i])
        text += tokenizer.token_bytes[i]
        assert state == state_after(text)
        assert (state == CALL) == has_call(text)
    return state == CALL


def test_streams_of_random_tokens(tokenizer, table, fence_ids):
    rng = np.random.default_rng(1)
    opening = tokenizer.encode("```python\n")
    closing = tokenizer.encode("\n```")
    num_calls = 0
    for _ in range(300):
        anything = rng.integers(0, tokenizer.size, 6).tolist()
        pieces = [anything, rng.choice(fence_ids, 3).tolist(), opening, closing]
        order = rng.integers(0, len(pieces), 6)
        num_calls += check_stream(tokenizer, table, [i for n in order for i in pieces[n]])
    assert 20 < num_calls < 280


def test_every_split_into_tokens_finds_the_same_call(tokenizer, table):
    """Fences split and merged: the call is found by the token that holds its last byte."""
    id_of = {b: i for i, b in reversed(list(enumerate(tokenizer.token_bytes)))}
    rng = random.Random(2)
    num_calls = 0
    for text in fuzz(seed=3, count=1_500, max_fragments=10):
        data = text.encode()
        at, state, found = 0, OUTSIDE, None
        while at < len(data):
            ends = [n for n in range(at + 1, min(at + 12, len(data)) + 1) if data[at:n] in id_of]
            end = rng.choice(ends)
            state = table[state, id_of[data[at:end]]]
            if state == CALL and found is None:
                found = (at, end)
            at = end
        expected = first_call(data)
        num_calls += expected is not None
        assert (found is None) == (expected is None), data
        assert found is None or found[0] < expected <= found[1], data
    assert 100 < num_calls < 1_400


@pytest.mark.parametrize(
    "pieces",
    [
        ["```", "python", "\n", "1", "\n", "```"],
        ["`", "`", "`", "p", "y", "t", "h", "o", "n", "\n", "1", "`", "`", "`"],
        ["``", "`", "python", "\n", "1", "``", "`"],
        ["```", "python", "\n", "1", "\n", "``", "`\n"],
        ["```", "python", "\n", "1", "\n", "``", "``"],
    ],
)
def test_chosen_splits_of_fences(qwen, pieces):
    id_of = {b: i for i, b in reversed(list(enumerate(qwen.token_bytes)))}
    table = token_table(qwen, qwen.size)
    states = [OUTSIDE]
    for piece in pieces:
        states.append(int(table[states[-1], id_of[piece.encode()]]))
    assert states.index(CALL) == len(pieces)
