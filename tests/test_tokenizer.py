"""The tokenizer: Qwen2.5's class and specials, bytes of each token, no special ids from text."""

import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_jax import config as configs
from cir_jax.rollout.fence import BOUNDARIES
from cir_jax.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, Tokenizer, put_back_text
from cir_jax.train.sft import train_tokenizer

ROOT = Path(__file__).parent.parent
SHIPPED = configs.asset_dir("package:quickstart/tokenizer")


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer(SHIPPED)


@pytest.fixture(scope="module")
def qwen(shared):
    return Tokenizer(shared / "tokenizers/qwen2.5")


@pytest.fixture(scope="module", params=["shipped", "qwen"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def joined(tokenizer, ids):
    return b"".join(tokenizer.token_bytes[i] for i in ids)


def special_ids(tokenizer):
    return set(tokenizer._hf.added_tokens_decoder)


def test_shipped_is_of_qwens_kind(shipped, qwen):
    assert type(shipped._hf) is type(qwen._hf)
    ours, theirs = shipped._hf.added_tokens_decoder, qwen._hf.added_tokens_decoder
    assert [str(t) for _, t in sorted(ours.items())] == [str(t) for _, t in sorted(theirs.items())]
    assert sorted(ours) == list(range(shipped.size - len(ours), shipped.size))
    for piece in ("normalizer", "pre_tokenizer"):
        mine, other = (getattr(t._hf.backend_tokenizer, piece) for t in (shipped, qwen))
        assert mine.__getstate__() == other.__getstate__()


def test_specials(tokenizer):
    names = [tokenizer.token_bytes[i].decode() for i in sorted(special_ids(tokenizer))]
    assert tuple(names) == SPECIAL_TOKENS
    assert tokenizer.token_bytes[tokenizer.eos_id].decode() == END_OF_TEXT
    assert len(tokenizer.token_bytes) == tokenizer.size


def test_shipped_fits_the_quickstart_model(shipped):
    cfg = configs.load(ROOT / "configs/quickstart_sft.toml")
    assert shipped.size <= cfg.model.vocab_size


def test_every_byte_has_a_token(tokenizer):
    plain = [b for i, b in enumerate(tokenizer.token_bytes) if i not in special_ids(tokenizer)]
    assert {bytes([b]) for b in range(256)} <= set(plain)
    assert b"" not in plain


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_names_of_specials_in_text_are_text(tokenizer, name):
    text = f"a{name}b {name}\n{name}"
    ids = tokenizer.encode(text)
    assert not set(ids) & special_ids(tokenizer)
    assert joined(tokenizer, ids).decode() == text


def check_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    # Qwen2.5's normalizer: composed and decomposed letters are the same tokens.
    normal = unicodedata.normalize("NFC", text)
    assert joined(tokenizer, ids) == normal.encode()
    assert tokenizer.decode(ids) == normal
    assert not set(ids) & special_ids(tokenizer)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bytes_are_the_texts(tokenizer, text):
    check_bytes(tokenizer, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n \t\r\n",
        "```python\nprint(1)\n```\n```output\n1\n```\n",
        "12345678901",
        "don't DON'T",
        "\x00\x7f\u0085\u00a0\u2028\ufeff",
        "naïve 数学 한글 🙂👨‍👩‍👧 e\u0301 \u212b",
        "<|im_start|><tool_call>",
    ],
)
def test_bytes_of_chosen_texts(tokenizer, text):
    check_bytes(tokenizer, text)


def test_encode_is_transformers_own_where_no_special_is_named(tokenizer):
    rng = random.Random(0)
    words = ["The", " answer", " is", " 42", "\n", "```", "python", " \\boxed{", "}", "é", "  "]
    for _ in range(50):
        text = "".join(rng.choices(words, k=12))
        assert tokenizer.encode(text) == tokenizer._hf.encode(text, add_special_tokens=False)


def test_decode_skips_rows_beyond_the_vocabulary(tokenizer):
    ids = tokenizer.encode("one two")
    padded = [tokenizer.size, *ids, tokenizer.size + 1, 10**6]
    assert tokenizer.decode(padded) == "one two"
    assert tokenizer.decode(np.array(padded, np.int32)) == "one two"
    assert tokenizer.decode([]) == ""


def test_decode_of_any_ids_is_their_bytes(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, tokenizer.size, 20)
        assert tokenizer.decode(ids) == joined(tokenizer, ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("trailing", ["", "\n", "\n\n", " \n", "\r\n", " ", " and"])
@pytest.mark.parametrize("result", ["3", "", "a\nb", "```"])
def test_put_back_text_starts_on_a_line_of_its_own(trailing, result):
    """The block as specified; its first newline is left out if it is there already."""
    block = put_back_text(result, trailing)
    assert ("\n" + block).endswith(f"\n```output\n{result}\n```\n")
    assert (trailing + block).startswith(trailing.removesuffix("\n") + "\n```output")


@pytest.mark.parametrize("trailing", ["", "\n", "s\n", "s"])
def test_put_back_text_goes_on_after_a_written_opening(trailing):
    block = put_back_text("3", trailing, written="\n```output")
    assert trailing + block == trailing.removesuffix("\n") + "\n3\n```\n"


def test_output_block_is_no_call():
    assert BOUNDARIES["fence"].find_call(put_back_text("3", "")) is None


def read_files(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.mark.slow
def test_training_reproduces_the_shipped_files(tmp_path):
    cfg = configs.load(ROOT / "configs/quickstart_sft.toml", ["sft.num_trajectories=3000"])
    train_tokenizer(cfg, tmp_path)
    assert read_files(tmp_path) == read_files(SHIPPED)


def test_chat_turns_are_those_of_transformers(qwen):
    """Texts encoded between the template's parts, or all at once: the same ids."""
    said = [
        {"role": "user", "content": "How many, then?"},
        {"role": "assistant", "content": "42."},
        {"role": "user", "content": "```\nWhy?\n```"},
    ]

    def together(messages):
        text = qwen._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return qwen._hf.encode(text, add_special_tokens=False)

    first = qwen.chat_turn(said[0]["content"], is_first=True)
    assert first == together(said[:1])
    answer = qwen.encode(said[1]["content"])
    assert first + answer + qwen.chat_turn(said[2]["content"], is_first=False) == together(said)
    system = {"role": "system", "content": "Be brief."}
    briefly = qwen.chat_turn(said[0]["content"], system=system["content"], is_first=True)
    assert briefly == together([system, said[0]])
