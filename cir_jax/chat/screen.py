"""What a person sees of a conversation: text as it comes in, and who wrote it."""

import codecs
import os
from collections.abc import Iterable
from typing import TextIO

from cir_jax.records import Author
from cir_jax.tokenizer import Tokenizer

_OUTPUT, _NOTE, _PLAIN = "\x1b[36m", "\x1b[2m", "\x1b[0m"
_RUNNING = " running ..."

# Control characters would reach the terminal from a program's output: a stand-in for each, but
# for newline and tab.
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"}
_VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


class Screen:
    """Answers go to `out`, everything else to `err`.

    On a terminal the output of programs is coloured, unless NO_COLOR is set (no-color.org), one
    sees that a program runs, and control characters are shown instead of obeyed. Elsewhere only
    the text itself is written.
    """

    def __init__(self, out: TextIO, err: TextIO, tokenizer: Tokenizer):
        self._out, self._err = out, err
        self._tokenizer = tokenizer
        self._live = out.isatty()
        self._coloured = not os.environ.get("NO_COLOR")
        self._at_line_start = True
        self._begin(None)

    def tokens(self, ids: Iterable[int], author: Author) -> None:
        """More of an answer; its characters are shown as soon as all of their bytes are there."""
        if author != self._author:
            self._finish()
            self._begin(author)
        table, unseen = self._tokenizer.token_bytes, self._tokenizer.end_ids
        known = (i for i in map(int, ids) if i < len(table) and i not in unseen)
        self._show(self._decoder.decode(b"".join(table[i] for i in known)))

    def running(self) -> None:
        """A program has been started; what comes next takes the place of this."""
        if self._live:
            self._finish()
            self._begin(None)
            self._write(self._styled(_NOTE, _RUNNING))
            self._is_running = True

    def end(self) -> None:
        """The answer is over, or given up."""
        self._finish()
        if not self._at_line_start:
            self._write("\n")
        self._at_line_start = True
        self._begin(None)

    def note(self, text: str) -> None:
        """A line that is no part of the conversation."""
        coloured = self._coloured and self._err.isatty()
        self._err.write((f"{_NOTE}{text}{_PLAIN}" if coloured else text) + "\n")
        self._err.flush()

    def progress(self, text: str) -> None:
        """A note for who waits at a terminal."""
        if self._err.isatty():
            self.note(text)

    def _begin(self, author: Author | None) -> None:
        self._author = author
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_running = False

    def _finish(self) -> None:
        """What one author wrote is over: bytes that make no character are shown as such."""
        if self._is_running:
            self._write("\b" * len(_RUNNING) + "\x1b[K")
        self._show(self._decoder.decode(b"", final=True))

    def _show(self, text: str) -> None:
        if not text:
            return
        self._at_line_start = text.endswith("\n")
        if self._live:
            text = text.translate(_VISIBLE)
        self._write(self._styled(_OUTPUT, text) if self._author == Author.TOOL else text)

    def _styled(self, style: str, text: str) -> str:
        return f"{style}{text}{_PLAIN}" if self._live and self._coloured else text

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
