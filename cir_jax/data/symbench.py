"""Symbolic and planning problems, made here, after task families of R1-Code-Interpreter's SymBench.

The authors' own questions come in through `cir-jax data prepare symbench`; these are of the same
kinds, as many as wanted, with answers that a program can check (arXiv:2505.21668, section 3; names
of families by arXiv:2502.04350). Each maker draws question, one right answer and metadata.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

from cir_jax.records import Verifier

Made = tuple[str, str, dict[str, Any]]  # question, answer, metadata


def _plan(checker: str, question: str, answer: str, **metadata: Any) -> Made:
    return question, answer, {"checker": checker} | metadata


def _game24(rng: random.Random) -> Made:
    while True:
        numbers = [rng.randint(1, 13) for _ in range(4)]
        if expression := _reaching(24, tuple((float(n), str(n)) for n in numbers)):
            break
    question = (
        f"Use the numbers {', '.join(map(str, numbers))}, each exactly once, with +, -, *, / and "
        "parentheses to make 24. Answer with the expression."
    )
    return _plan("game24", question, expression, numbers=numbers, target=24)


def _reaching(target: int, values: tuple[tuple[float, str], ...]) -> str | None:
    """An expression of all values; None if there is none."""
    if len(values) == 1:
        return values[0][1] if abs(values[0][0] - target) < 1e-9 else None
    for i, j in itertools.permutations(range(len(values)), 2):
        (a, left), (b, right) = values[i], values[j]
        rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
        made = [(a + b, "+"), (a - b, "-"), (a * b, "*")] + ([(a / b, "/")] if b else [])
        for value, sign in made:
            if found := _reaching(target, (*rest, (value, f"({left} {sign} {right})"))):
                return found
    return None


def _partition(rng: random.Random) -> Made:
    left = [rng.randint(1, 60) for _ in range(rng.randint(3, 6))]
    right = [rng.randint(1, 60) for _ in range(rng.randint(2, 5))]
    difference = sum(left) - sum(right)
    (right if difference > 0 else left).append(abs(difference) or 7)
    if not difference:
        right.append(7)
    numbers = left + right
    rng.shuffle(numbers)
    question = (
        f"Divide the numbers {', '.join(map(str, numbers))} into two groups of equal sums. Answer "
        "with both groups, numbers parted by commas and the groups by |, such as 1, 4 | 2, 3."
    )
    answer = " | ".join(", ".join(map(str, group)) for group in (left, right))
    return _plan("partition", question, answer, numbers=numbers)


def _queens(rng: random.Random) -> Made:
    size = 8
    solution = rng.choice(_boards(size))
    shown = sorted(rng.sample(range(size), rng.randint(1, 3)))
    free = [(r, c) for r in range(size) for c in range(size) if solution[r] != c]
    blocked = sorted(rng.sample(free, rng.randint(1, 4)))
    placed = {str(row): solution[row] for row in shown}
    question = (
        "Place 8 queens on an 8x8 board so that none attacks another. Rows and columns count from "
        f"0. There are queens already at (row, column) {_pairs((r, solution[r]) for r in shown)}; "
        f"no queen may stand at {_pairs(blocked)}. Answer with the columns of the queens of rows "
        "0 to 7, parted by commas."
    )
    answer = ", ".join(map(str, solution))
    return _plan(
        "queens", question, answer, size=size, placed=placed, blocked=[list(b) for b in blocked]
    )


@functools.cache
def _boards(size: int) -> list[tuple[int, ...]]:
    """Columns of queens that do not attack one another."""
    return [
        columns
        for columns in itertools.permutations(range(size))
        if all(len({c + k * r for r, c in enumerate(columns)}) == size for k in (-1, 1))
    ]


def _pairs(pairs: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"({a}, {b})" for a, b in pairs)


def _gridworld(rng: random.Random) -> Made:
    height, width = rng.randint(4, 7), rng.randint(4, 7)
    squares = [(r, c) for r in range(height) for c in range(width)]
    while True:
        start, *others = rng.sample(squares, rng.randint(7, 11))
        num_goals = rng.randint(2, 3)
        goals, walls = others[:num_goals], others[num_goals:]
        path, at = [], start
        for goal in goals:
            leg = _shortest(at, goal, set(squares) - set(walls))
            if leg is None:
                break
            path, at = path + leg, goal
        else:
            break
    question = (
        f"A robot stands at (row, column) {start} of a grid of {height} rows and {width} columns, "
        f"counted from 0 at the top left. It has to visit {_pairs(goals)} in any order, and must "
        f"neither leave the grid nor enter {_pairs(walls)}. Answer with its moves, each up, down, "
        "left or right, parted by commas."
    )
    return _plan(
        "gridworld",
        question,
        ", ".join(path),
        height=height,
        width=width,
        start=list(start),
        goals=[list(g) for g in goals],
        obstacles=[list(w) for w in walls],
    )


Square = tuple[int, int]


def _shortest(start: Square, goal: Square, free: set[Square]) -> list[str] | None:
    """Moves between two squares; None if there is no way."""
    moves = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
    paths = {start: []}
    edge = [start]
    while edge and goal not in paths:
        here = edge.pop(0)
        for name, (r, c) in moves.items():
            there = (here[0] + r, here[1] + c)
            if there in free and there not in paths:
                paths[there] = [*paths[here], name]
                edge.append(there)
    return paths.get(goal)


def _blocksworld(rng: random.Random) -> Made:
    blocks = "ABCDEFG"[: rng.randint(3, 6)]
    stacks, goal = _stacked(rng, blocks), _stacked(rng, blocks)
    while sorted(goal) == sorted(stacks):
        goal = _stacked(rng, blocks)
    # All to the table, then each goal's stack from below.
    moves = [f"{block} -> table" for stack in stacks for block in reversed(stack[1:])]
    moves += [f"{b} -> {a}" for stack in goal for a, b in itertools.pairwise(stack)]

    def shown(some: list[list[str]]) -> str:
        return "; ".join(" ".join(stack) for stack in some)

    question = (
        "Blocks stand in stacks, given from bottom to top. Only a stack's top block can be moved, "
        f"onto another stack's top block or the table. At first: {shown(stacks)}. Wanted, in any "
        f"order of stacks: {shown(goal)}. Answer with the moves in order, such as B -> A, C -> "
        "table."
    )
    return _plan("blocksworld", question, ", ".join(moves), stacks=stacks, goal=goal)


def _stacked(rng: random.Random, blocks: str) -> list[list[str]]:
    stacks: list[list[str]] = []
    for block in rng.sample(blocks, len(blocks)):
        if stacks and rng.random() < 0.6:
            rng.choice(stacks).append(block)
        else:
            stacks.append([block])
    return stacks


def _lights(rng: random.Random) -> Made:
    size = rng.randint(3, 5)
    pressed = rng.sample(list(itertools.product(range(size), repeat=2)), rng.randint(2, size + 1))
    grid = [[0] * size for _ in range(size)]
    for row, column in pressed:
        for r, c in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):
            if 0 <= row + r < size and 0 <= column + c < size:
                grid[row + r][column + c] ^= 1
    rows = "\n".join(" ".join(map(str, row)) for row in grid)
    question = (
        f"Lights in a grid are on (1) or off (0):\n{rows}\nPressing one switches it and its "
        "neighbours above, below, left and right. Put all lights out. Answer with the presses as "
        "(row, column), counted from 0, such as (0, 1), (2, 2)."
    )
    return _plan("lights", question, _pairs(pressed), grid=grid)


def _coloring(rng: random.Random) -> Made:
    num, colors = rng.randint(5, 10), 3
    hidden = [rng.randint(1, colors) for _ in range(num)]
    pairs = [(a, b) for a, b in itertools.combinations(range(num), 2) if hidden[a] != hidden[b]]
    edges = sorted(rng.sample(pairs, min(len(pairs), 2 * num - 3)))
    question = (
        f"Colour the vertices 0 to {num - 1} of a graph with the colours 1 to {colors}, joined "
        f"vertices differently. Its edges: {_pairs(edges)}. Answer with the colours of the "
        "vertices in order, parted by commas."
    )
    answer = ", ".join(map(str, hidden))
    return _plan(
        "coloring", question, answer, num=num, colors=colors, edges=[list(e) for e in edges]
    )


def _knapsack(rng: random.Random) -> Made:
    count = rng.randint(5, 9)
    weights = [rng.randint(1, 20) for _ in range(count)]
    values = [rng.randint(1, 30) for _ in range(count)]
    capacity = sum(weights) // 2

    def total(of: list[int], chosen: tuple[int, ...]) -> int:
        return sum(of[i] for i in chosen)

    choices = (c for k in range(count + 1) for c in itertools.combinations(range(count), k))
    fitting = [c for c in choices if total(weights, c) <= capacity]
    chosen = max(fitting, key=lambda c: total(values, c))
    question = (
        f"Items 0 to {count - 1} weigh {', '.join(map(str, weights))} and are worth "
        f"{', '.join(map(str, values))}. Choose items of at most {capacity} weight in all that are "
        "worth the most. Answer with their numbers, parted by commas."
    )
    return _plan(
        "knapsack",
        question,
        ", ".join(map(str, chosen)),
        weights=weights,
        values=values,
        capacity=capacity,
        best=total(values, chosen),
    )


def _multiply(rng: random.Random) -> Made:
    numbers = [rng.randint(-99, 99) or 7 for _ in range(rng.randint(3, 5))]
    product = 1
    for number in numbers:
        product *= number
    return f"Multiply: {' * '.join(f'({n})' for n in numbers)}.", str(product), {}


def _letters(rng: random.Random) -> Made:
    letters = rng.choice(["aeiourstln", "abcde", "mnop"])
    word = "".join(rng.choice(letters) for _ in range(rng.randint(12, 40)))
    letter = rng.choice(word)
    return f"How many times does {letter} occur in {word}?", str(word.count(letter)), {}


def _new_operator(rng: random.Random) -> Made:
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    x, y, z = (rng.randint(-20, 20) for _ in range(3))

    def made(left: int, right: int) -> int:
        return a * left + b * right - c * left * right

    question = (
        f"Let p # q = {a}p + {b}q - {c}pq for all whole numbers p and q. What is "
        f"(({x}) # ({y})) # ({z})?"
    )
    return question, str(made(made(x, y), z)), {}


def _string_deletion(rng: random.Random) -> Made:
    text = "".join(rng.choice("abc") for _ in range(rng.randint(10, 25)))
    steps = [(rng.choice("abc"), rng.choice(("first", "last"))) for _ in range(4)]
    result = text
    for letter, which in steps:
        i = result.find(letter) if which == "first" else result.rfind(letter)
        result = result[:i] + result[i + 1 :] if i >= 0 else result
    said = ", then ".join(f"the {which} {letter}" for letter, which in steps)
    question = f"Delete from {text}: {said}; what is no longer there is passed over. What is left?"
    return question, result, {}


MAKERS: dict[str, tuple[Callable[[random.Random], Made], Verifier]] = {
    "game24": (_game24, "plan"),
    "partition": (_partition, "plan"),
    "queens": (_queens, "plan"),
    "gridworld": (_gridworld, "plan"),
    "blocksworld": (_blocksworld, "plan"),
    "lights": (_lights, "plan"),
    "coloring": (_coloring, "plan"),
    "knapsack": (_knapsack, "plan"),
    "multiply": (_multiply, "math"),
    "letters": (_letters, "math"),
    "new_operator": (_new_operator, "math"),
    "string_deletion": (_string_deletion, "exact"),
}
