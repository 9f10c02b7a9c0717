"""The training command of a launch script, its words as bash would expand them; nothing is run.

What launch scripts use of bash: comments, continued lines, quotes, variables and arrays with their
defaults, whole-number arithmetic, "$@", and `if`, `while`, `&&` on tests of strings and numbers.
A variable whose value depends on anything else (the output of a command, a test of files, a loop)
is not known, nor is an argument of the training command that it is part of. shlex splits words but
drops the quotes that say which of them are expanded; hence a scanner of our own.
"""

import ast
import dataclasses
import fnmatch
import itertools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence

from cir_jax.verl.words import ASSIGNMENT, Statement, after, statements

_PARAMETER = re.compile(
    r"(?P<name>[A-Za-z_]\w*|\d+|[@*#])(?P<all>\[(?:[@*]|\d+)\])?(?:(?P<how>:?[-=+?])(?P<word>.*))?",
    re.ASCII | re.DOTALL,
)
_TRIM = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<how>##?|%%?)(?P<word>.*)", re.ASCII | re.DOTALL)
_REST = re.compile(r"[@*]:\d+", re.ASCII)
_QUOTED = re.compile(r"'[^']*'|\"(?:\\.|[^\"])*\"|\\.|\$\{[^}]*\}", re.DOTALL)
_BRACES = re.compile(r"\{[^{}]*(?:,|\.\.)[^{}]*\}")
_NAME = re.compile(r"[A-Za-z_]\w*|[0-9@*#]", re.ASCII)
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)", re.ASCII)
_PYTHON = re.compile(r"-m|(?:.*/)?(?:python[\d.]*|torchrun)")
_SHELL = re.compile(r"(?:.*/)?(?:ba|z|da)?sh")
_LAUNCH = re.compile(r"(?:[\w./-]*[./])?(main_\w+)(?:\.py)?", re.ASCII)
_KEY = re.compile(r"\"?[+~]{0,2}([A-Za-z_][\w.]*)=")
_KEY_ALONE = re.compile(r"[+~]{0,2}[a-z_]\w*(\.\w+)+=", re.ASCII)
_DECLARERS = {"export", "declare", "local", "readonly", "typeset"}
_TESTS = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "-eq": lambda a, b: int(a) == int(b),
    "-ne": lambda a, b: int(a) != int(b),
    "-gt": lambda a, b: int(a) > int(b),
    "-ge": lambda a, b: int(a) >= int(b),
    "-lt": lambda a, b: int(a) < int(b),
    "-le": lambda a, b: int(a) <= int(b),
}


@dataclasses.dataclass(frozen=True)
class Unknown:
    """An argument `key=...` whose value is not known, as it is written, and why."""

    key: str
    text: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Command:
    """module: the trainer's, such as main_ppo; arguments: what follows it, without those whose
    values are unknown; line: where it starts in the script."""

    module: str
    arguments: tuple[str, ...]
    unknown: tuple[Unknown, ...] = ()
    line: int = 1


def training_command(
    script: str,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] = {},
    given: Mapping[str, str] = {},
) -> Command:
    """The one `python -m verl.trainer.main_ppo ...` of a script.

    arguments: of the script, which stand where it says "$@", or else at the end. environment:
      variables that it finds. given: variables that keep their value whatever it assigns.

    Raises ValueError naming the line, and the variable if that is what an argument's key hangs on.
    """
    shell = _Shell(arguments, dict(environment) | dict(given), frozenset(given))
    for statement in statements(script):
        shell.run(statement)
    if len(shell.found) != 1:
        lines = ", ".join(str(command.line) for command in shell.found)
        problem = f"{len(shell.found)} training commands, in lines {lines}" if lines else "none"
        raise ValueError(f"needs one training command (python -m ...main_ppo ...); has {problem}")
    (command,) = shell.found
    if arguments and not shell.took_arguments:
        command = dataclasses.replace(command, arguments=(*command.arguments, *arguments))
    return command


class _Unknown(Exception):
    """A value that cannot be told without running something. shown: what is known of it."""

    shown = ""


# A piece of a word, with whether blanks in it part words; a tuple: words that are parted already.
_Part = tuple[str | tuple[str, ...], bool]


class _Shell:
    """The variables of a script as its statements pass; a value is text, or an array's tuple, or
    why it is unknown."""

    def __init__(
        self, arguments: Sequence[str], variables: dict[str, str], fixed: frozenset[str]
    ) -> None:
        self.found: list[Command] = []
        self.took_arguments = False
        self._arguments = tuple(arguments)
        self._variables: dict[str, str | tuple[str, ...] | _Unknown] = dict(variables)
        self._fixed = fixed
        # Of each open block: whether its statements are run, and whether a branch before was;
        # None: not known.
        self._blocks: list[tuple[bool | None, bool | None]] = []
        # Whether the statement after a && or || is run.
        self._guard: bool | None = True
        # What a variable that is not set is; None: an error, as bash's `set -u` has it.
        self._unset: str | None = None

    def run(self, statement: Statement) -> None:
        words = list(statement.words)
        while words and words[0] in ("then", "do", "{", "}", "!"):
            words.pop(0)
        if not words:
            return
        first, rest = words[0], words[1:]
        runs = self._runs()
        if statement.end == "||":
            self._guard = None if self._guard is None else not self._guard
        elif statement.end != "&&":
            self._guard = True
        if first in ("if", "while", "until"):
            # Our arguments are none that a script would look for.
            is_getopts = rest[:1] == ["getopts"]
            holds = False if is_getopts else self._holds(rest, statement.end)
            if first != "if":
                # What a loop leaves behind is known only if it is not entered.
                holds = False if holds is (first == "until") else None
            self._blocks.append((holds, holds))
        elif first in ("for", "case", "select"):
            self._blocks.append((None, None))
        elif first in ("elif", "else") and self._blocks:
            _, taken = self._blocks.pop()
            holds = self._holds(rest, statement.end) if first == "elif" else True
            now = False if taken else None if taken is None and holds is not False else holds
            self._blocks.append((now, _either(taken, now)))
            if first == "else" and rest:
                self.run(dataclasses.replace(statement, words=tuple(rest)))
        elif first in ("fi", "done", "esac"):
            if self._blocks:
                self._blocks.pop()
        elif first in ("[", "[["):
            holds = self._holds(words, "") if runs else runs
            if statement.end in ("&&", "||"):
                self._guard = holds if statement.end == "&&" or holds is None else not holds
        elif runs is not False:
            self._command(statement.line, words, certain=runs is True)

    def _runs(self) -> bool | None:
        states = [now for now, _ in self._blocks] + [self._guard]
        return False if False in states else None if None in states else True

    def _holds(self, words: Sequence[str], end: str) -> bool | None:
        """Whether a test holds; None if that is not known."""
        if end in ("&&", "||", "|") or len(words) < 3 or words[0] not in ("[", "[["):
            return None
        negated = words[1] == "!"
        test = words[1 + negated : -1]
        last = test[-1] if test else ""
        # What [[ x == *y ]] compares with is a pattern, unless it is quoted.
        is_pattern = words[0] == "[[" and re.search(r"[*?[]", _QUOTED.sub("", last))
        self._unset = ""
        try:
            match [self._text(word) for word in test]:
                case ["-z" | "-n" as kind, text]:
                    return ((text == "") is (kind == "-z")) is not negated
                case [left, "=" | "==" | "!=" as kind, right] if is_pattern:
                    if '"' in last or "'" in last or "\\" in last or "$" in last:
                        return None
                    matches = fnmatch.fnmatchcase(left, right.replace("[^", "[!"))
                    return (matches is (kind != "!=")) is not negated
                case [left, kind, right] if kind in _TESTS:
                    return _TESTS[kind](left, right) is not negated
        except (_Unknown, ValueError):
            pass
        finally:
            self._unset = None
        return None

    def _command(self, line: int, words: list[str], certain: bool) -> None:
        declares = words[0] in _DECLARERS
        if declares:
            words = [word for word in words[1:] if not word.startswith("-")]
        if declares or all(ASSIGNMENT.match(word) for word in words):
            for word in words:
                if assignment := ASSIGNMENT.match(word):
                    self._assign(assignment, word, line, certain)
        elif words[0] == "unset":
            for word in words[1:]:
                self._variables.pop(word, None)
        elif _KEY_ALONE.match(words[0]):
            raise ValueError(
                f"line {line}: {words[0]} stands alone: a comment, or a line without \\ at its "
                "end, cuts it off from the training command"
            )
        for i, (before, word) in enumerate(itertools.pairwise(words)):
            if before in ("-c", "-lc") and i and _SHELL.fullmatch(words[i - 1]):
                # What stands behind it, such as || exit, is no part of it.
                guard, self._guard = self._guard, True if certain else None
                for inner in statements(_unquoted(word)):
                    self.run(dataclasses.replace(inner, line=line + inner.line - 1))
                self._guard = guard
                return
            launch = _LAUNCH.fullmatch(word)
            if launch and _PYTHON.fullmatch(before):
                self.found.append(self._launch(line, launch[1], words[i + 2 :]))

    def _launch(self, line: int, module: str, words: Sequence[str]) -> Command:
        arguments: list[str] = []
        unknown = []
        for word in words:
            try:
                arguments += self._fields(word)
            except _Unknown as reason:
                key = _KEY.match(word)
                if not key:
                    raise ValueError(f"line {line}: {word}: {reason}") from None
                text = self._shown(word[key.end() :])
                unknown.append(Unknown(key[1], text, f"line {line}: {reason}"))
        return Command(module, tuple(arguments), tuple(unknown), line)

    def _assign(self, assignment: re.Match, word: str, line: int, certain: bool) -> None:
        name, appends = assignment.groups()
        if name in self._fixed:
            return
        value: str | tuple[str, ...] | _Unknown
        source = word[assignment.end() :]
        before = self._variables.get(name, "")
        try:
            if not certain:
                raise _Unknown(f"{name} is assigned in line {line}, which may not be run")
            if source.startswith("("):
                inner = [w for s in statements(source[1:-1]) for w in s.words]
                value = tuple(field for w in inner for field in self._fields(w))
                if appends and isinstance(before, tuple):
                    value = (*before, *value)
            else:
                home = self._variables.get("HOME")
                if source.startswith("~/") and isinstance(home, str):
                    source = home + source[1:]
                value = self._text(source)
                if appends and isinstance(before, str):
                    value = before + value
            if isinstance(before, _Unknown) and appends:
                raise before
        except _Unknown as reason:
            value = _Unknown(*reason.args)
            if certain:
                value.shown = self._shown(source)
        self._variables[name] = value

    def _shown(self, word: str) -> str:
        """A word without its quotes; what is not known of it is as it is written."""

        def value(match: re.Match) -> str:
            held = self._variables.get(match[1] or match[2])
            known = held.shown if isinstance(held, _Unknown) else held
            return known if known and isinstance(known, str) else match[0]

        return _VARIABLE.sub(value, word.replace('"', ""))

    def _text(self, word: str) -> str:
        """A word's expansion as one text."""
        parts = (part for part, _ in self._parts(word))
        return "".join(" ".join(part) if isinstance(part, tuple) else part for part in parts)

    def _fields(self, word: str) -> list[str]:
        """A word's expansion as bash splits it: at blanks from variables outside quotes."""
        if _BRACES.search(_QUOTED.sub("", word)):
            raise _Unknown("bash expands { , } outside quotes: quote it")
        # The last is being put together; None: it has not begun.
        fields: list[str | None] = [None]

        def extend(text: str) -> None:
            fields[-1] = (fields[-1] or "") + text

        def end() -> None:
            if fields[-1] is not None:
                fields.append(None)

        for part, splits in self._parts(word):
            for i, text in enumerate(part if isinstance(part, tuple) else (part,)):
                if i:
                    end()
                if not splits:
                    extend(text)
                    continue
                for piece in re.split("([ \t\n]+)", text):
                    if piece.isspace():
                        end()
                    elif piece:
                        extend(piece)
        return [field for field in fields if field is not None]

    def _parts(self, word: str) -> Iterator[_Part]:
        at, quoted = 0, False
        while at < len(word):
            char = word[at]
            if char == '"':
                if not quoted and word.startswith('""', at):
                    yield "", False
                quoted = not quoted
                at += 1
            elif char == "'" and not quoted:
                end = word.index("'", at + 1)
                yield word[at + 1 : end], False
                at = end + 1
            elif char == "\\":
                escaped = word[at + 1 : at + 2]
                if escaped != "\n":
                    yield "\\" * (quoted and escaped not in '$`"\\') + escaped, False
                at += 2
            elif char == "`":
                raise _Unknown(f"commands are not run: {word[at : after(word, at, 0)]}")
            elif char == "$":
                parts, at = self._expansion(word, at, quoted)
                for part, splits in parts:
                    yield part, splits and not quoted
            else:
                # Outside quotes there are blanks only in a default, `${NAME:-two words}`.
                yield char, not quoted
                at += 1

    def _expansion(self, word: str, at: int, quoted: bool) -> tuple[list[_Part], int]:
        """The parts of what begins with $ there, and the place after it."""
        if word.startswith("$((", at):
            end = after(word, at, 0)
            return [(str(self._arithmetic(word[at + 3 : end - 2])), False)], end
        if word.startswith("$(", at):
            end = after(word, at, 0)
            if word[at + 2 : end - 1].strip() == "pwd":
                return [(self._value("PWD"), True)], end
            raise _Unknown(f"commands are not run: {word[at:end]}")
        if word.startswith("${", at):
            end = after(word, at, 0)
            return self._parameter(word[at + 2 : end - 1]), end
        if word.startswith("$'", at) and not quoted:
            raise _Unknown("$'...' is not an expansion that is known here")
        name = _NAME.match(word, at + 1)
        return ([(self._value(name[0]), True)], name.end()) if name else ([("$", False)], at + 1)

    def _parameter(self, inner: str) -> list[_Part]:
        if _REST.fullmatch(inner):
            # From its N-th argument on: ours are overrides, which come behind the script's own.
            inner = inner[0]
        match = _PARAMETER.fullmatch(inner)
        if trim := _TRIM.fullmatch(inner):
            value = self._value(trim["name"])
            return [(_trimmed(str(value), trim["how"], self._text(trim["word"])), True)]
        if not match:
            raise _Unknown(f"${{{inner}}} is not an expansion that is known here")
        name, how, word = match["name"], match["how"] or "", match["word"] or ""
        # A variable that is set to what is not known does not take the default.
        has_value = not how or self._variables.get(name, ()) != () or name in "@*#"
        value = self._value(name, bool(match["all"])) if has_value else None
        is_set = value is not None and not (how.startswith(":") and not value)
        if how.endswith("+"):
            return list(self._parts(word)) if is_set else []
        if value is not None and is_set:
            if match["all"] == "[*]" and isinstance(value, tuple):
                value = " ".join(value)
            elif match["all"] not in (None, "[@]", "[*]"):
                items, index = value if isinstance(value, tuple) else (value,), match["all"][1:-1]
                value = items[int(index)] if int(index) < len(items) else ""
            return [(value, True)]
        if how.endswith("?") or not how:
            raise _Unknown(f"{name} is not set")
        if how.endswith("=") and name not in self._fixed:
            self._variables[name] = self._text(word)
        return list(self._parts(word))

    def _value(self, name: str, whole: bool = False) -> str | tuple[str, ...]:
        """Of an array, its first element, or all of it if `whole`."""
        if name in "@*":
            self.took_arguments = True
            return self._arguments if name == "@" else " ".join(self._arguments)
        if name == "#":
            # Our arguments are overrides, not options that a script would look for.
            return "0"
        value = self._variables.get(name, self._unset)
        if isinstance(value, _Unknown):
            raise value
        if isinstance(value, tuple) and not whole:
            value = value[0] if value else self._unset
        if value is None:
            raise _Unknown(f"the variable {name} is not set; --var {name}=VALUE sets it")
        return value

    def _arithmetic(self, source: str) -> int:
        text = re.sub(r"\$\{?(\w+)\}?", r"\1", source)

        def value(node: ast.AST) -> int:
            match node:
                case ast.Expression(body):
                    return value(body)
                case ast.Constant(int() as number):
                    return number
                case ast.Name(name):
                    return int(self._text(f"${{{name}}}"))
                case ast.UnaryOp(ast.USub(), operand):
                    return -value(operand)
                case ast.BinOp(left, kind, right):
                    a, b = value(left), value(right)
                    match kind:
                        case ast.Add():
                            return a + b
                        case ast.Sub():
                            return a - b
                        case ast.Mult():
                            return a * b
                        case ast.Pow():
                            return a**b
                        case ast.Div() if b:
                            # Towards zero, as in C.
                            return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
                        case ast.Mod() if b:
                            return a - b * (abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1))
            raise _Unknown(f"$(({source})) is not whole-number arithmetic")

        try:
            return value(ast.parse(text.strip(), mode="eval"))
        except (SyntaxError, ValueError):
            raise _Unknown(f"$(({source})) is not whole-number arithmetic") from None


def _unquoted(word: str) -> str:
    """A script that is a word, such as what follows bash -c, without the quotes around it."""
    if word.startswith("'") and word.endswith("'"):
        return word[1:-1]
    return re.sub(r'\\(["$`\\])', r"\1", word.removeprefix('"').removesuffix('"'))


def _trimmed(text: str, how: str, pattern: str) -> str:
    """${NAME#pattern} and its kin: less the shortest (##: longest) start, or end, that matches."""
    cuts = range(len(text) + 1)
    if (how[0] == "#") == (len(how) == 2):
        cuts = reversed(cuts)
    for at in cuts:
        if fnmatch.fnmatchcase(text[:at] if how[0] == "#" else text[at:], pattern):
            return text[at:] if how[0] == "#" else text[:at]
    return text


def _either(a: bool | None, b: bool | None) -> bool | None:
    return True if True in (a, b) else None if None in (a, b) else False
