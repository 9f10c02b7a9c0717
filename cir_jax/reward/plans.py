r"""Answers that many can be right: plans and arrangements, checked against their constraints.

Each checker takes an answer as text and the problem's metadata, and says whether every constraint
holds; a text that is no such plan raises ValueError. Metadata name the checker in "checker". The
problems are made by cir_jax/data/symbench.py, after task families of R1-Code-Interpreter
(arXiv:2505.21668, SymBench).
"""

import ast
import collections
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from cir_jax.reward import latex
from cir_jax.reward.answer import Verdict

Metadata = dict[str, Any]

_MAX_CHARS = 20_000


def plan_verdict(answer: str, metadata: Metadata) -> Verdict:
    """Raises KeyError if the metadata name no checker, or lack what it needs."""
    check, needed = CHECKERS[metadata["checker"]]
    given = {name: metadata[name] for name in needed}
    text = latex.plain_text(answer[:_MAX_CHARS]).strip().strip("`$").strip()
    if len(answer) > _MAX_CHARS or not text:
        return "unparsable"
    try:
        return "correct" if check(text, **given) else "wrong"
    except (ValueError, ZeroDivisionError):
        return "unparsable"


def _game24(text: str, *, numbers: Sequence[int], target: int) -> bool:
    """An expression of + - * / and parentheses with each number once."""
    text = text.partition("=")[0]
    for written, plain in (
        (r"\times", "*"),
        (r"\cdot", "*"),
        (r"\div", "/"),
        ("×", "*"),
        ("÷", "/"),
    ):
        text = text.replace(written, plain)
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"\\(?:left|right)", "", text).strip()
    if len(text) > 500 or not re.fullmatch(r"[\d\s+*/().-]+", text):
        raise ValueError("no expression")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("no expression") from error
    used: collections.Counter[int] = collections.Counter()
    value = _value(tree, used)
    return used == collections.Counter(numbers) and value == target


_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def _value(node: ast.AST, used: collections.Counter[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("no sum, difference, product or quotient of whole numbers")


def _numbers(text: str) -> list[int]:
    """Whole numbers of a list, with any brackets and separators; nothing else may stand there."""
    if not re.fullmatch(r"[\s\d,;()\[\]{}\\-]+", text) or not re.search(r"\d", text):
        raise ValueError("no list of whole numbers")
    return [int(n) for n in re.findall(r"-?\d{1,9}", text)]


def _partition(text: str, *, numbers: Sequence[int]) -> bool:
    """Two groups, parted by |, of equal sums, that together are the numbers."""
    groups = text.replace(r"\mid", "|").replace(r"\vert", "|").split("|")
    if len(groups) != 2:
        raise ValueError("not two groups")
    left, right = map(_numbers, groups)
    return sorted(left + right) == sorted(numbers) and sum(left) == sum(right)


def _queens(
    text: str, *, size: int, placed: dict[int, int], blocked: Sequence[Sequence[int]]
) -> bool:
    """Columns of the queens of rows 0 .. size-1, none attacking another or on a blocked square."""
    columns = _numbers(text)
    if len(columns) != size or not all(0 <= c < size for c in columns):
        return False
    is_free = all(len({c + k * r for r, c in enumerate(columns)}) == size for k in (-1, 0, 1))
    keeps = all(columns[int(row)] == column for row, column in placed.items())
    return is_free and keeps and not any(columns[r] == c for r, c in blocked)


_MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def _gridworld(
    text: str,
    *,
    height: int,
    width: int,
    start: Sequence[int],
    goals: Sequence[Sequence[int]],
    obstacles: Sequence[Sequence[int]],
) -> bool:
    """Moves from the start that visit all goals, never an obstacle or a square outside."""
    moves = [word.lower() for word in re.findall(r"[a-zA-Z]+", text)]
    if not moves or any(move not in _MOVES for move in moves):
        raise ValueError("no list of moves")
    row, column = start
    walls, missing = {tuple(o) for o in obstacles}, {tuple(g) for g in goals} - {tuple(start)}
    for move in moves:
        row, column = row + _MOVES[move][0], column + _MOVES[move][1]
        if not (0 <= row < height and 0 <= column < width) or (row, column) in walls:
            return False
        missing.discard((row, column))
    return not missing


_BLOCK_MOVE = re.compile(
    r"(?:move\s+)?(?:block\s+)?([A-Z])\s*(?:->|→|\\to|\bto\b|\bonto\b|\bon\b)\s*(?:the\s+)?(?:block\s+)?([A-Z]\b|table)"
    r"(?:\s*[;,.\n]+|\s*$)\s*",
    re.I,
)


def _blocksworld(
    text: str, *, stacks: Sequence[Sequence[str]], goal: Sequence[Sequence[str]]
) -> bool:
    """Moves of top blocks onto other top blocks or the table that end in the goal's stacks.

    stacks, goal: blocks from bottom to top; the order of stacks does not matter.
    """
    moves, at = [], 0
    while at < len(text):
        match = _BLOCK_MOVE.match(text, at)
        if match is None:
            raise ValueError("no list of moves")
        moves.append((match[1].upper(), match[2]))
        at = match.end()
    state = [list(stack) for stack in stacks]
    for block, onto in moves:
        source = next((stack for stack in state if stack and stack[-1] == block), None)
        if source is None:
            return False
        if onto.lower() == "table":
            target = []
            state.append(target)
        else:
            tops = (s for s in state if s and s[-1] == onto.upper() and s is not source)
            target = next(tops, None)
            if target is None:
                return False
        target.append(source.pop())
    return sorted(s for s in state if s) == sorted(list(stack) for stack in goal)


def _lights(text: str, *, grid: Sequence[Sequence[int]]) -> bool:
    """Presses (row, column), each switching its light and its neighbours', that put all out."""
    pressed = _numbers(text)
    if len(pressed) % 2:
        raise ValueError("no list of pairs")
    lit = {(r, c) for r, row in enumerate(grid) for c, on in enumerate(row) if on}
    squares = {(r, c) for r, row in enumerate(grid) for c, _ in enumerate(row)}
    for row, column in zip(pressed[::2], pressed[1::2], strict=True):
        if (row, column) not in squares:
            return False
        near = ((0, 0), *_MOVES.values())
        lit ^= {(row + r, column + c) for r, c in near} & squares
    return not lit


def _coloring(text: str, *, num: int, colors: int, edges: Sequence[Sequence[int]]) -> bool:
    """A colour from 1 on for each vertex in turn, different where an edge joins two."""
    found = _numbers(text)
    in_range = len(found) == num and all(1 <= color <= colors for color in found)
    return in_range and all(found[a] != found[b] for a, b in edges)


def _knapsack(
    text: str, *, weights: Sequence[int], values: Sequence[int], capacity: int, best: int
) -> bool:
    """Numbers of items, each once, within the capacity and of the best value."""
    chosen = _numbers(text)
    if len(set(chosen)) != len(chosen) or not all(0 <= i < len(weights) for i in chosen):
        return False
    weight, value = (sum(of[i] for i in chosen) for of in (weights, values))
    return weight <= capacity and value == best


# With the metadata that each needs.
CHECKERS: dict[str, tuple[Callable[..., bool], tuple[str, ...]]] = {
    "game24": (_game24, ("numbers", "target")),
    "partition": (_partition, ("numbers",)),
    "queens": (_queens, ("size", "placed", "blocked")),
    "gridworld": (_gridworld, ("height", "width", "start", "goals", "obstacles")),
    "blocksworld": (_blocksworld, ("stacks", "goal")),
    "lights": (_lights, ("grid",)),
    "coloring": (_coloring, ("num", "colors", "edges")),
    "knapsack": (_knapsack, ("weights", "values", "capacity", "best")),
}
