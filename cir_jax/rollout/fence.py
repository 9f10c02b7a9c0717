"""The call boundary as a deterministic automaton over bytes, composed to a table over tokens.

Rule (CIR, section 1.3 of its rules): in the text generated since the last tool output, the
first ```` ```python ```` ... ```` ``` ```` with a non-blank body is a call. The opening fence's
line holds nothing after `python` but blanks; the first three back-ticks after it close the
block; a block with a blank body is passed over, and the search goes on after its closing fence.
As a regular expression, searched from left to right: BLOCK below.
"""

import functools
import re

import numpy as np

from cir_jax.tokenizer import FENCE_OPEN, Tokenizer

BLOCK = re.compile(r"```python[ \t\r\f\v]*\n(.*?)```", re.DOTALL)
BLANKS = " \t\n\r\f\v"

# States: n after n bytes of the opening fence (0: outside), then the body, blank or not, after
# 0-2 back-ticks, then the closed call.
OUTSIDE = 0
_OPENED = len(FENCE_OPEN)
_BLANK_BODY = _OPENED + 1
_BODY = _BLANK_BODY + 3
CALL = _BODY + 3
NUM_STATES = CALL + 1


def next_state(state: int, byte: int) -> int:
    """One byte of the automaton. CALL is absorbing."""
    tick = byte == ord("`")
    if state == CALL:
        return CALL
    if state >= _BODY:
        return state + 1 if tick else _BODY
    if state >= _BLANK_BODY:
        if tick:
            return state + 1 if state < _BLANK_BODY + 2 else OUTSIDE
        return _BLANK_BODY if state == _BLANK_BODY and chr(byte) in BLANKS else _BODY
    if state == _OPENED and byte == ord("\n"):
        return _BLANK_BODY
    if state == _OPENED and chr(byte) in BLANKS:
        return _OPENED
    if state < _OPENED and byte == FENCE_OPEN.encode()[state]:
        return state + 1
    if tick:
        # Three back-ticks and a fourth: the last three may open a block.
        return 3 if state == 3 else 1
    return OUTSIDE


@functools.cache
def _byte_table() -> np.ndarray:
    return np.array(
        [[next_state(q, byte) for byte in range(256)] for q in range(NUM_STATES)], np.int8
    )


def token_table(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """[Q, V] int8: the state after a token, from the state before it.

    vocab_size may exceed the tokenizer's (padding rows of the embedding): those change nothing.
    """
    table = np.tile(np.arange(NUM_STATES, dtype=np.int8)[:, None], (1, vocab_size))
    byte_table = _byte_table()
    # All tokens at once, byte by byte: Qwen2.5 has 152 thousand.
    lengths = np.array([len(token) for token in tokenizer.token_bytes])
    starts = np.cumsum(lengths) - lengths
    joined = np.frombuffer(b"".join(tokenizer.token_bytes), np.uint8)
    for at in range(lengths.max()):
        longer = np.flatnonzero(lengths > at)
        table[:, longer] = byte_table[table[:, longer], joined[starts[longer] + at]]
    return table


def find_call(text: str) -> tuple[str, str] | None:
    """The code of the first call in a model turn, and what follows its closing fence."""
    for match in BLOCK.finditer(text):
        if match.group(1).strip(BLANKS):
            return match.group(1), text[match.end() :]
    return None
