"""The call boundary as a deterministic automaton over bytes, composed to a table over tokens.

"fence" (CIR, section 1.3 of its rules): in the text generated since the last tool output, the
first ```` ```python ```` ... ```` ``` ```` with a non-blank body is a call. The opening fence's
line holds nothing after `python` but blanks, and ends with a newline (CRLF will do); the first
three back-ticks after it close the block; a block with a blank body is passed over, and the
search goes on after its closing fence. As a regular expression, searched from left to right:
BLOCK below. Blank means ASCII white space, as Python's own grammar has it: a no-break space is
a body. A fence need not start its line.

"stop_word", the ablation: no block is a call until the model itself writes STOP_WORD, anywhere
after the first such block's closing fence, whatever stands in between and around it. The program
is the last non-blank block that is closed before the stop word.

The decode loop sees tokens only, so a call is noticed with the token that holds the boundary's
last byte. What that token carries past the boundary was sampled and stays as sampled; `find_call`
returns it as the trailing text. The output block goes on from there: after trailing text that
ends with a newline it brings no newline of its own, so there is one between fence and output
unless the model itself wrote more; after any other trailing text it starts a new line.

The table of Qwen2.5's 152 thousand tokens takes 0.2 s (one CPU core), less than a tenth of what
reading the tokenizer takes, so it is built anew by every process and cached nowhere.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cir_jax.tokenizer import FENCE_CLOSE, FENCE_OPEN, OUTPUT_OPEN, Tokenizer, put_back_text

BLOCK = re.compile(r"```python[ \t\r\f\v]*\n(.*?)```", re.DOTALL)
BLANKS = " \t\n\r\f\v"
STOP_WORD = OUTPUT_OPEN.strip()

# Numbers of two states of every automaton: at the start of a model turn; a call, absorbing.
OUTSIDE, CALL = 0, 1


class _State(NamedTuple):
    """`part` of a turn, and the bytes matched there of what ends it.

    "outside" of blocks (and on the rest of an opening fence's line), in a "blank" or other
    "body", in search of the "stop word", or in a "call".
    """

    part: str
    matched: int = 0


_START, _CALL = _State("outside"), _State("call")


def _matched(word: bytes, matched: int, byte: int) -> int:
    """Length of the longest prefix of `word` at the text's end, a byte further on."""
    end = word[:matched] + bytes([byte])
    return next(n for n in range(len(end), -1, -1) if word.startswith(end[len(end) - n :]))


def _next_state(state: _State, byte: int, closed: _State) -> _State:
    """closed: the state in which the closing fence of a non-blank block leaves the automaton."""
    part, matched = state
    blank = chr(byte) in BLANKS
    match part:
        case "outside" if matched == len(FENCE_OPEN) and blank:
            return _State("blank") if byte == ord("\n") else state
        case "outside":
            # An opening fence followed by anything else is none.
            matched %= len(FENCE_OPEN)
            return _State(part, _matched(FENCE_OPEN.encode(), matched, byte))
        case "blank" | "body" if byte == ord("`"):
            if matched + 1 < len(FENCE_CLOSE):
                return _State(part, matched + 1)
            return _START if part == "blank" else closed
        case "blank" if blank and matched == 0:
            return state
        case "blank" | "body":
            return _State("body")
        case "stop word":
            matched = _matched(STOP_WORD.encode(), matched, byte)
            return _CALL if matched == len(STOP_WORD) else _State(part, matched)
        case "call":
            return _CALL
    raise AssertionError(state)


@functools.cache
def _byte_table(closed: _State) -> np.ndarray:
    """[Q, 256] int8: the state after a byte."""
    states = [_START, _CALL]
    rows = []
    for state in states:  # grows as states are found
        after = [_next_state(state, byte, closed) for byte in range(256)]
        states += [s for s in dict.fromkeys(after) if s not in states]
        rows.append([states.index(s) for s in after])
    return np.array(rows, np.int8)


def _blocks(text: str) -> list[re.Match[str]]:
    return [match for match in BLOCK.finditer(text) if match[1].strip(BLANKS)]


def first_block(text: str) -> re.Match[str] | None:
    """The first non-blank block of a model turn; the match ends with its closing fence."""
    return next(iter(_blocks(text)), None)


def _find_fence(text: str) -> tuple[str, str] | None:
    block = first_block(text)
    return (block[1], text[block.end() :]) if block else None


def _find_stop_word(text: str) -> tuple[str, str] | None:
    blocks = _blocks(text)
    at = text.find(STOP_WORD, blocks[0].end()) if blocks else -1
    return (_blocks(text[:at])[-1][1], text[at + len(STOP_WORD) :]) if at >= 0 else None


class Boundary(NamedTuple):
    """When a call is noticed: on the device by the automaton, on the host in the text.

    closed: where the closing fence of a non-blank block leads. written: what the boundary takes
    of the output block's opening after that fence. find_call: the program of the first call in a
    model turn, and the text past its boundary.
    """

    closed: _State
    written: str
    find_call: Callable[[str], tuple[str, str] | None]

    @property
    def byte_table(self) -> np.ndarray:
        """[Q, 256] int8: the state after a byte, from the state before it."""
        return _byte_table(self.closed)

    def put_back(self, result: str, trailing: str) -> str:
        """What follows a call whose boundary's token carried `trailing` past it."""
        return put_back_text(result, trailing, written=self.written)


BOUNDARIES = {
    "fence": Boundary(_CALL, "", _find_fence),
    "stop_word": Boundary(_State("stop word"), f"\n{STOP_WORD}", _find_stop_word),
}


def token_table(tokenizer: Tokenizer, vocab_size: int, boundary: Boundary) -> np.ndarray:
    """[Q, V] int8: the state after a token, from the state before it.

    vocab_size may exceed the tokenizer's (padding rows of the embedding): those change nothing.
    """
    byte_table = boundary.byte_table
    table = np.tile(np.arange(len(byte_table), dtype=np.int8)[:, None], (1, vocab_size))
    # All tokens at once, byte by byte: Qwen2.5 has 152 thousand.
    lengths = np.array([len(token) for token in tokenizer.token_bytes])
    starts = np.cumsum(lengths) - lengths
    joined = np.frombuffer(b"".join(tokenizer.token_bytes), np.uint8)
    for at in range(lengths.max()):
        longer = np.flatnonzero(lengths > at)
        table[:, longer] = byte_table[table[:, longer], joined[starts[longer] + at]]
    return table
