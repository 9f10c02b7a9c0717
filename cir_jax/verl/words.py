"""A script's statements and their words, as they are written: quotes and expansions in place."""

import dataclasses
import re
from collections.abc import Iterator

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=", re.ASCII)
_BLANKS = re.compile(r"(?:[ \t\r]|\\\n)*")
_END = re.compile(r"&&|\|\||;;|[;|&()\n]|\Z")
_REDIRECT = re.compile(r"\d*(?:<<<|<<|>>|[<>]&|[<>])[ \t]*")


@dataclasses.dataclass(frozen=True)
class Statement:
    """words: as they are written, quotes and all; end: the operator or newline after them."""

    line: int
    words: tuple[str, ...]
    end: str


def statements(text: str) -> Iterator[Statement]:
    """Raises ValueError naming the line where a quote or bracket is not closed."""
    words: list[str] = []
    # Ends of the texts that follow the line, `<<END`.
    documents: list[str] = []
    at, line, position = 0, 1, 0
    while True:
        at = _BLANKS.match(text, at).end()
        if text[at : at + 1] == "#":
            at = (text + "\n").index("\n", at)
        line += text.count("\n", position, at)
        position = at
        if not words:
            start = line
        if end := _END.match(text, at):
            if words:
                yield Statement(start, tuple(words), end[0])
            if at >= len(text):
                return
            words = []
            at = end.end()
            if end[0] == "\n":
                for document in documents:
                    close = re.compile(rf"^\t*{re.escape(document)}$", re.MULTILINE)
                    found = close.search(text, at)
                    at = found.end() if found else len(text)
                documents = []
        elif redirect := _REDIRECT.match(text, at):
            at = _word_end(text, redirect.end(), line)
            if redirect[0].strip().endswith("<<"):
                documents.append(re.sub("^-|[\"'\\\\]", "", text[redirect.end() : at]))
        else:
            end_of_word = _word_end(text, at, line)
            words.append(text[at:end_of_word])
            at = end_of_word


def _word_end(text: str, at: int, line: int) -> int:
    begin = at
    while at < len(text) and text[at] not in " \t\r\n;|&<>)":
        if text[at] == "(":
            # An array, `NAME=(...)`; else the end of a word such as a function's name.
            assignment = ASSIGNMENT.match(text, begin)
            if not assignment or assignment.end() != at:
                break
        at = after(text, at, line)
    return at


def after(text: str, at: int, line: int) -> int:
    """Past the character, quoted text or bracketed expansion that begins there."""
    char = text[at]
    try:
        if char == "\\":
            return min(at + 2, len(text))
        if char in "'`":
            return text.index(char, at + 1) + 1
        if char == '"':
            at += 1
            while text[at] != '"':
                inside = text[at] == "\\" or text[at : at + 2] in ("$(", "${")
                at = after(text, at, line) if inside else at + 1
            return at + 1
        if char == "(" or text[at : at + 2] in ("$(", "${"):
            at += 1 if char == "(" else 2
            close = "}" if text[at - 1] == "{" else ")"
            while text[at] != close:
                at = after(text, at, line)
            return at + 1
    except (ValueError, IndexError):
        raise ValueError(f"line {line}: {char} is not closed") from None
    return at + 1
