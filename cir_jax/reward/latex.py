r"""One way of writing for what mathematicians and benchmark authors write in many.

Every function here maps a short text to a text in time linear in its length (a few hundred
characters: `answer.MAX_ANSWER_CHARS`), raises nothing on malformed input and evaluates nothing.
"""

import itertools
import re

_SIGNS = str.maketrans(
    {
        **dict.fromkeys("−–—﹣－", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\t\n", " "),
        **dict.fromkeys("，、", ","),
        "；": ";",
        "：": ":",
        "（": "(",
        "）": ")",
        "％": "%",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "±": r"\pm ",
        "∓": r"\mp ",
        "∞": r"\infty ",
        "π": r"\pi ",
        "θ": r"\theta ",
        "α": r"\alpha ",
        "β": r"\beta ",
        "°": r"^\circ ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\neq ",
        "≈": r"\approx ",
        "∈": r"\in ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∅": r"\emptyset ",
        "ℝ": r"\mathbb{R}",
        "²": "^{2}",
        "³": "^{3}",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "€": "",
        "£": "",
    }
)

# Braces of one level may stand in a command's argument.
_ARGUMENT = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|texttt|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|operatorname"
    r"|rm|bf|boldsymbol|bm)\s*" + _ARGUMENT
)

# In turn: what is drawn, not said.
_DRAWN = [
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![a-zA-Z])"), ""),
    (re.compile(r",\s*\\!\s*"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{?\s*(\w+)\s*\\choose\s*(\w+)\s*\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"\\(?:[dtc]frac)(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\(?:ldotp)(?![a-zA-Z])"), "."),
    (re.compile(r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\(?:lt)(?![a-zA-Z])"), "<"),
    (re.compile(r"\\(?:gt)(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:degree|degrees)(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ "),
    (re.compile(r"\\lg(?![a-zA-Z])"), r"\\log_{10}"),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\\\\s*\[[^\[\]]{0,20}\]"), r"\\\\"),
    (re.compile(r"\\(?:mathrm|text|rm)\s*\{\s*([ie])\s*\}"), r"\1"),
    (re.compile(r"(?<![\\a-zA-Z])(?:infinity|infty|inf)(?![a-zA-Z])", re.I), r"\\infty "),
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\s*(\d{2,}|\(\s*-?\w+(?:\s*/\s*\w+)?\s*\))"), r"^{\1}"),
    (re.compile(r"√\s*(\d+|\w)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])"), r"\1\\times 10^{\2}"),
]

# Digits in groups of three. A comma alone is dealt with apart: it may part a list.
_GROUPED = re.compile(
    r"(?<![\d.,])(\d{1,3})((?:(?:\\[,;:! ]|\{\s*,\s*\}|,\\[! ]\s*| )\d{3})+)(?!\d)"
)
_COMMAS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_SPACES = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~")
_ENDS = re.compile(r"(?:[.,;:\s]|\\\\|\\$)+$")
_LEADING_DOLLAR = re.compile(r"^(-?)\s*\\\$\s*")
_PARTS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")]


def tidy(text: str) -> str:
    """Without what is drawn, not said: delimiters of formulas, spaces, sizes, last full stop."""
    text = text.translate(_SIGNS).strip()
    text = _unwrapped(text)
    text = _LEADING_DOLLAR.sub(r"\1", text)
    for pattern, plain in _DRAWN:
        text = pattern.sub(plain, text)
    text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = _COMMAS.sub(lambda m: _without_commas(m[0], text), text)
    text = _SPACES.sub(" ", text)
    return _unwrapped(_ENDS.sub("", " ".join(text.split())))


def _unwrapped(text: str) -> str:
    """Without delimiters, braces and parentheses that are around all of it."""
    while True:
        inner = text.strip()
        for opening, closing in _PARTS:
            body = inner[len(opening) : -len(closing)]
            both = inner.startswith(opening) and inner.endswith(closing)
            if both and body and opening not in body and closing not in body:
                inner = body.strip()
        if inner[:1] + inner[-1:] in ("()", "{}") and _is_one_pair(inner):
            inner = inner[1:-1].strip()
        if inner == text:
            return text
        text = inner


def _is_one_pair(text: str) -> bool:
    """Whether the first bracket closes with the last, and nothing in it makes it a tuple."""
    depth = 0
    for i, char in enumerate(text):
        if char in "({[" and text[i - 1 : i] != "\\":
            depth += 1
        elif char in ")}]" and text[i - 1 : i] != "\\":
            depth -= 1
            if depth == 0 and i < len(text) - 1:
                return False
        elif char in ",;" and depth == 1 and text[0] == "(":
            return False
    return depth == 0


def _without_commas(number: str, text: str) -> str:
    """1,000 in a text: one number, unless it may be two in brackets or a list."""
    rest = text.replace(number, "", 1)
    is_bare = not re.search(r"[(\[{,;]", rest)
    has_zeros = re.search(r",0", number) is not None
    return number.replace(",", "") if is_bare or has_zeros or ", " in rest else number


def depth(text: str) -> int:
    """The most brackets that are around anything."""
    now = most = 0
    for char in text:
        if char in "([{":
            now += 1
            most = max(most, now)
        elif char in ")]}":
            now -= 1
    return most


def says_anything(text: str) -> bool:
    r"""Whether there is a digit, a letter or a command other than spacing, and not just \text{}."""
    return re.search(r"[^\W_]|\\[a-zA-Z]", plain_text(text)) is not None


def plain_text(text: str) -> str:
    r"""What \text{...} and its like hold, without the command."""
    for _ in range(3):
        text, changed = _TEXT.subn(lambda m: f" {m[1]} ", text)
        if not changed:
            break
    return text


def words(text: str) -> str | None:
    """Words in small letters, if the text is nothing but words, and not one letter; else None."""
    said = " ".join(plain_text(text).replace("\\ ", " ").split()).strip(" .!\"'").casefold()
    is_words = re.fullmatch(r"[^\W\d_]+(?:[ \-',]+[^\W\d_]+)*", said) and len(said) > 1
    return said if is_words else None


def is_prose(text: str) -> bool:
    r"""Whether words are meant, and no product of variables such as xy or abc."""
    said = words(text)
    return said is not None and ("text" in text or _is_prose(said))


def _is_prose(said: str) -> bool:
    """Not a product of variables such as xy or abc."""
    parts = re.split(r"[ \-',]+", said)
    return max(map(len, parts)) >= 4 or said in _SHORT_WORDS


_SHORT_WORDS = {"yes", "no", "odd", "all", "one", "two", "six", "ten", "mon", "tue", "red"}


def spelled(text: str) -> str:
    """For comparison as text: without spaces and braces around one character."""
    text = re.sub(r"\{(\w)\}", r"\1", plain_text(text)).strip()
    # 1 2 is not 12.
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


_LABEL = re.compile(r"^\s*\(?\s*([A-Z])\s*(?:\)|\.|:)\s*(.*)$", re.DOTALL)


def choice(text: str) -> str | None:
    r"""The letter of a choice: A of A, (A), A., \textbf{(A)}\ 5 or (A) five; None if there is none.

    It is that of a label alone: A + 1 and A or B are none.
    """
    said = " ".join(plain_text(text).split())
    if re.fullmatch(r"[A-Z]", said):
        return said
    label = _LABEL.match(said)
    if label is None or re.search(r"^(?:or|and)\b|^[,/&]|\([A-Z]\)", label[2]):
        return None
    return label[1]


def after_label(text: str) -> str | None:
    r"""What follows the label of a choice: 5 of \textbf{(A)}\ 5; None if there is none."""
    if not re.match(r"^\s*(?:\\text|\\mathrm|\\mathbf|\([A-Z]\)\s)", text):
        return None
    label = _LABEL.match(plain_text(text))
    return label[2].strip() or None if label else None


def pm_expanded(text: str) -> str:
    r"""A list of what \pm and \mp stand for, each sign on its own: 1 \pm 2 is 1+2, 1-2."""
    sign = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")
    if not 1 <= len(sign.findall(text)) <= 6:
        return text
    parts = []
    for part in top_level(text, ",;"):
        pieces = sign.split(part)
        for signs in itertools.product("+-", repeat=len(pieces) - 1):
            parts.append(
                "".join(a + b for a, b in itertools.zip_longest(pieces, signs, fillvalue=""))
            )
    # As a sign of its own, + says nothing.
    return ", ".join(re.sub(r"(^|[=({,])\s*\+", r"\1", part.strip()) for part in parts)


def top_level(text: str, separators: str) -> list[str]:
    """The parts between separators that no bracket is around."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char in separators and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


_OUTWARD = re.compile(r"([\[\]])([^\[\]()]*,[^\[\]()]*)([\[\]])")


_RELATION = re.compile(r"\s*([a-zA-Z])\s*(<|>|\\le|\\ge)(?![a-zA-Z])\s*([^<>=]+?)\s*")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|\bor\b|\\(?:lor|vee)(?![a-zA-Z])")


def union(text: str) -> str:
    """Inequalities of one variable that are joined by or, as a union; others as they are."""
    found = [_RELATION.fullmatch(part) for part in _OR.split(text)]
    if len(found) < 2 or None in found or len({match[1] for match in found}) > 1:
        return text
    intervals = []
    for match in found:
        _, sign, bound = match.groups()
        if sign in ("<", r"\le"):
            intervals.append(rf"(-\infty,{bound}{')' if sign == '<' else ']'}")
        else:
            intervals.append(rf"{'(' if sign == '>' else '['}{bound},\infty)")
    return r" \cup ".join(intervals)


def kind(text: str) -> str:
    r"""set or tuple, if all of it is one \{...\} or (...) of several; else ""."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set"
    is_tuple = text[:1] + text[-1:] == "()" and len(top_level(text, ",")) == 1 and "," in text
    return "tuple" if is_tuple and _is_closed(text) else ""


def _is_closed(text: str) -> bool:
    """Whether the first bracket closes with the last."""
    depth_now = 0
    for i, char in enumerate(text):
        depth_now += (char in "([{") - (char in ")]}")
        if depth_now == 0:
            return i == len(text) - 1
    return False


def open_interval(text: str) -> str:
    """(a,b) of ]a,b[, as French authors write it, and the like; others as they are."""
    match = _OUTWARD.fullmatch(text)
    if match is None:
        return text
    left, inner, right = match.groups()
    return f"{'(' if left == ']' else '['}{inner}{')' if right == '[' else ']'}"


_REPEATING = re.compile(
    r"(?<![\d.])(-?\d*)\.(\d*)(?:\\overline\s*\{(\d+)\}|\\bar\s*\{(\d+)\}|\\dot\s*\{(\d)\}|\((\d+)\))"
)


def exact_decimals(text: str) -> str:
    r"""Repeating decimals, 0.1\overline{6}, as fractions."""

    def fraction(match: re.Match) -> str:
        whole, fixed, *repeated = match.groups()
        block = next(r for r in repeated if r)
        sign = "-" if whole.startswith("-") else ""
        digits = whole.lstrip("-") + fixed
        top = int(digits + block) - int(digits or "0")
        return f"{sign}\\frac{{{top}}}{{{'9' * len(block) + '0' * len(fixed)}}}"

    return _REPEATING.sub(fraction, text)


_DEGREES_IN_TRIG = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*\{?\d\}?)?)"
    r"\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*\\circ\s*[)}]?"
)
_ORDINAL = re.compile(
    r"(?<=\d)\s*(?:\^\s*\{?\s*)?(?:\\(?:text|mathrm)\s*\{\s*)?(?:th|st|nd|rd)\s*\}{0,2}$"
)


def for_parser(text: str) -> str:
    """What the parser of math-verify would misread, as what it reads."""
    text = pm_expanded(union(open_interval(exact_decimals(text))))
    text = _DEGREES_IN_TRIG.sub(r"\1(\\frac{\2\\pi}{180})", text)
    text = _ORDINAL.sub("", text)
    mixed = re.fullmatch(r"(-?)\s*(\d+) (\d+)\s*/\s*(\d+)", text)
    if mixed:
        text = f"{mixed[1]}\\frac{{{int(mixed[2]) * int(mixed[4]) + int(mixed[3])}}}{{{mixed[4]}}}"
    return re.sub(r"(?<![\w./^_{])(\d+)\s*/\s*(\d+)(?![\w./])", r"\\frac{\1}{\2}", text)
