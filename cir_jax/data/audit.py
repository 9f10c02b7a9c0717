"""What Reasoning-Gym's scorers say of right, wrong, nearly right, malformed and empty answers."""

import dataclasses
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from cir_jax.data import gym
from cir_jax.records import Problem, Score

Submit = Callable[[Problem, Sequence[str]], Future[Score]]
"""As the grader's, cir_jax/reward/score.py; answers stand in <<<>>>, which holds any text."""

MALFORMED = (
    *("", " ", "\n\n", "banana", "None", "nan", "inf", "1e999", "()", "(", "[]", "{}", "[[", "1/0"),
    *("\\frac{", "\\text{}", "\\boxed{}", "[[1, 2], [3, 4]]", '{"a": 1}', "[{}]", "a,b,c", "\x00"),
    "9" * 5000,
)


@dataclasses.dataclass
class Findings:
    """Of one task; empty lists and True are what should be."""

    name: str
    repeatable: bool = True
    unsolved: list[str] = dataclasses.field(default_factory=list)
    """Right answers that are not called correct."""
    accepted: list[str] = dataclasses.field(default_factory=list)
    """Malformed or wrong ones that are."""
    unchecked: list[str] = dataclasses.field(default_factory=list)
    """What could not be checked, with the reason."""
    num_answers: int = 0

    @property
    def is_sound(self) -> bool:
        return self.repeatable and not (self.unsolved or self.accepted or self.unchecked)


def audit(name: str, submit: Submit, num_problems: int = 3) -> Findings:
    """Grades answers to some of the task's problems."""
    found = Findings(name)
    draw, again = gym.candidates(name), gym.candidates(name)
    graded = []
    for index in range(0, 1000 * num_problems, 1000):
        question, truth, metadata = draw(index)
        found.repeatable &= (question, truth) == again(index)[:2]
        right = truth or solution(name, metadata)
        problem = Problem(name, name, question, truth, "gym", metadata=metadata)
        for answer in (right, *MALFORMED, *wrong(right)):
            graded.append((answer, right, submit(problem, [f"<<<{answer}>>>"])))
    for answer, right, future in graded:
        _note(found, answer, right, future.result().reason)
    return found


def _note(found: Findings, answer: str, right: str, reason: str) -> None:
    found.num_answers += 1
    if reason not in ("correct", "wrong", "unparsable"):
        found.unchecked.append(f"{reason}: {answer[:40]!r}")
    elif answer == right:
        if reason != "correct":
            found.unsolved.append(f"{reason}: {answer[:40]!r}")
    elif reason == "correct" and not _may_be_right(found.name, answer, right):
        found.accepted.append(f"{answer[:40]!r}, not {right[:40]!r}")


def wrong(right: str) -> Iterator[str]:
    """The right answer with its numbers changed, and with less or more than what is in it."""
    numbers = list(re.finditer(r"\d+", right))
    for match in numbers[:2] + numbers[-1:]:
        yield right[: match.start()] + str(int(match[0]) + 1) + right[match.end() :]
    flipped = {"True": "False", "False": "True", "Yes": "No", "No": "Yes"}
    if right in flipped:
        yield flipped[right]
    yield from (right[: len(right) // 2], right[::-1])


def _may_be_right(name: str, answer: str, right: str) -> bool:
    """Not every change makes an answer wrong."""
    return (
        answer.strip() == right.strip()
        or sorted(re.findall(r"\w+", answer)) == sorted(re.findall(r"\w+", right))
        or name in MANY_RIGHT
    )


MANY_RIGHT = (
    *("rush_hour", "graph_color", "rubiks_cube", "polynomial_equations"),
    *("coin_flip", "decimal_arithmetic", "power_function", "time_intervals"),
)
"""Tasks of which a change of a right answer may make another, or one that is near enough: the
last digit of a rounded number, a move that is stopped by the next car, a unit left out."""


def solution(name: str, metadata: dict[str, Any]) -> str:
    """A right answer where the package gives none."""
    return {"boxnet": _boxnet, "rush_hour": _rush_hour}[name](metadata)


def _boxnet(metadata: dict[str, Any]) -> str:
    """Each box in turn goes to its target, first by rows, then by columns."""
    state, steps = metadata["initial_state"], []
    for square, items in state.items():
        for box in (item for item in items if item.startswith("box_")):
            target = "target_" + box.removeprefix("box_")
            goal = next(s for s, there in state.items() if target in there)
            here, end = ([float(x) for x in s.split("_")] for s in (square, goal))
            for axis in (0, 1):
                while here[axis] != end[axis]:
                    agent = f"Agent[{here[0]}, {here[1]}]"
                    here[axis] += 1 if end[axis] > here[axis] else -1
                    steps.append({agent: f"move({box}, square[{here[0]}, {here[1]}])"})
            steps.append({f"Agent[{here[0]}, {here[1]}]": f"move({box}, {target})"})
    return json.dumps(steps)


def _rush_hour(metadata: dict[str, Any]) -> str:
    """The shortest moves, by breadth, on the board's text: 36 squares, A the car to get out."""
    # As the question shows it: cars by the alphabet, without gaps.
    cars = sorted(set(metadata["board_config"]) - set("ox"))
    letters = {car: chr(ord("A") + i) for i, car in enumerate(cars)} | {"o": "."}
    start = metadata["board_config"].translate(str.maketrans(letters))
    seen, edge = {start: ""}, deque([start])
    while edge:
        board = edge.popleft()
        if board[17] == "A":
            return seen[board].strip()
        for move, there in _rush_hour_moves(board):
            if there not in seen:
                seen[there] = f"{seen[board]} {move}"
                edge.append(there)
    raise ValueError(f"no way out: {start}")


def _rush_hour_moves(board: str) -> Iterator[tuple[str, str]]:
    for car in sorted(set(board) - set(".x")):
        squares = [i for i, c in enumerate(board) if c == car]
        step = squares[1] - squares[0]
        for sign, front in ((1, squares[-1]), (-1, squares[0])):
            ahead = front + sign * step
            in_row = step == 6 or ahead // 6 == front // 6
            if 0 <= ahead < 36 and in_row and board[ahead] == ".":
                moved = list(board)
                moved[squares[0] if sign > 0 else squares[-1]] = "."
                moved[ahead] = car
                yield f"{car}{'+' if sign > 0 else '-'}1", "".join(moved)
