r"""Numbers compared exactly and at once: rationals, percentages, quantities, numbers in a base."""

import re
from fractions import Fraction
from typing import NamedTuple

from cir_jax.reward.latex import plain_text

_DECIMAL = r"\d+(?:\.\d*)?|\.\d+"
_RATIONAL = re.compile(
    rf"""\s*(?P<sign>[+-]?)\s*(?:
        (?P<whole>\d+)?\s*\\frac\s*(?:\{{\s*(?P<top>-?\d+)\s*\}}|(?P<t>\d))\s*
            (?:\{{\s*(?P<bottom>-?\d+)\s*\}}|(?P<b>\d))
        | (?P<mixed>\d+)\ (?P<n>\d+)\s*/\s*(?P<d>\d+)
        | (?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL})
        | (?P<decimal>{_DECIMAL})
            (?:\s*\\(?:times|cdot)\s*10\s*\^\s*(?:\{{\s*(?P<power>-?\d{{1,3}})\s*\}}|(?P<p>\d)))?
    )\s*""",
    re.VERBOSE,
)


_INTEGER = re.compile(r"([+-]?)0*(\d+|\d{1,3}(?:,\d{3})+)", re.ASCII)


def plain_integer(text: str) -> tuple[bool, str] | None:
    """Sign and digits: as text, since int() refuses long ones and takes quadratic time."""
    match = _INTEGER.fullmatch(text.strip("$ "))
    if match is None:
        return None
    digits = match[2].replace(",", "")
    return match[1] == "-" and digits != "0", digits


def rational(text: str) -> Fraction | None:
    r"""The value of an integer, decimal, a/b, \frac{a}{b}, mixed number or a \times 10^{n}."""
    match = _RATIONAL.fullmatch(text)
    if match is None:
        return None
    try:
        value = _value(match)
    except ZeroDivisionError:
        return None
    return -value if match["sign"] == "-" else value


def _value(match: re.Match) -> Fraction:
    if match["top"] or match["t"]:
        top, bottom = int(match["top"] or match["t"]), int(match["bottom"] or match["b"])
        return int(match["whole"] or 0) + Fraction(top, bottom)
    if match["mixed"]:
        return int(match["mixed"]) + Fraction(int(match["n"]), int(match["d"]))
    if match["over"]:
        return Fraction(match["over"]) / Fraction(match["under"])
    return Fraction(match["decimal"]) * Fraction(10) ** int(match["power"] or match["p"] or 0)


_IN_BASE = re.compile(r"\(?\s*([0-9A-Za-z]+)\s*\)?\s*_\s*\{?\s*(\d{1,2})\s*\}?")


def in_base(text: str) -> tuple[str, int] | None:
    """Digits and base of 1011_2; None if it is no number of that base, as a_1 and 53_2 are."""
    match = _IN_BASE.fullmatch(" ".join(plain_text(text).split()))
    if match is None or not 2 <= int(match[2]) <= 36:
        return None
    digits, base = match[1].upper().lstrip("0") or "0", int(match[2])
    try:
        int(digits, base)
    except ValueError:
        return None
    return digits, base


_PERCENT = re.compile(r"\s*(?:\\?%|\\?(?:text|mathrm)?\s*\{?\s*per\s?cent\s*\}?)$")


def without_percent(text: str) -> str | None:
    r"""50 of 50\% and 50 percent; None of what is no percentage."""
    rest = _PERCENT.sub("", text)
    return None if rest == text else rest.strip()


# By dimension, in terms of the first. Money has no names of countries.
_UNITS: dict[str, dict[str, str]] = {
    "length": {
        "1": "m meter metre",
        "1/1000": "mm millimeter millimetre",
        "1/100": "cm centimeter centimetre",
        "1000": "km kilometer kilometre",
    },
    "imperial length": {
        "1": "in inch inche",
        "12": "ft foot feet",
        "36": "yd yard",
        "63360": "mi mile",
    },
    "time": {
        "1": "s sec second",
        "60": "min minute",
        "3600": "h hr hour",
        "86400": "day",
        "604800": "week",
    },
    "years": {"1": "yr year", "1/12": "month"},
    "mass": {"1": "g gram", "1/1000": "mg milligram", "1000": "kg kilogram"},
    "imperial mass": {"1": "oz ounce", "16": "lb pound"},
    "volume": {"1": "l liter litre", "1/1000": "ml milliliter millilitre"},
    "money": {"1": "dollar usd buck", "1/100": "cent"},
    "angle": {"1": "degree deg", "": "rad radian"},
    "morning": {"1": "am"},
    "evening": {"1": "pm"},
}


class Unit(NamedTuple):
    """dimension: of the unit and its power; factor: 1 of it, in terms of the dimension's first."""

    dimension: tuple[str, ...]
    factor: Fraction


def _names() -> dict[str, Unit]:
    found = {}
    for dimension, units in _UNITS.items():
        for factor, names in units.items():
            unit = Unit((dimension if factor else "radians",), Fraction(factor or 1))
            found |= dict.fromkeys(names.split(), unit)
    return found


_BY_NAME = _names()

_LAST_TEXT = re.compile(
    r"^(?P<rest>.*[\d})]|.*\\pi)\s*\\(?:text|mathrm|mbox|textrm|operatorname)\s*\{(?P<unit>[^{}]*)\}"
    r"\s*(?:\^\s*\{?\s*(?P<power>\d)\s*\}?)?$",
    re.DOTALL,
)
_LAST_WORDS = re.compile(
    r"^(?P<rest>.*[\d})]|.*\\pi)\s+(?P<unit>[a-zA-Z][a-zA-Z./ -]*)"
    r"(?:\^\s*\{?\s*(?P<power>\d)\s*\}?)?$",
    re.DOTALL,
)


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""The number of a quantity and its unit, None if it has none or one that is not known.

    Words that follow a number are a unit, known or not: 5\text{ apples}. Letters that may be
    variables (5 m) are one only if they are known.
    """
    match = _LAST_TEXT.match(text) or _LAST_WORDS.match(text)
    if match is None or not re.search(r"\d|\\pi", match["rest"]):
        return text, None
    name = match["unit"].strip().rstrip(",").lower()
    unit = _unit(name, int(match["power"] or 1))
    is_word = re.match(r"\\?\s*[a-z]{3,}", name) and not re.search(r"\b(?:and|or|to|if)\b", name)
    if unit is None and not (is_word or "\\" in text[match.end("rest") :]):
        return text, None
    if re.search(r"\b(?:and|or|to|if|base)\b", name):
        return text, None
    return match["rest"].strip(), unit


def _unit(name: str, power: int) -> Unit | None:
    name = name.replace(".", "").replace("~", " ").strip()
    for word, its_power in (("square", 2), ("sq", 2), ("cubic", 3), ("cu", 3)):
        if name.startswith(word + " "):
            name, power = name.removeprefix(word).strip(), its_power
    above, _, below = re.sub(r"\s+per\s+|\s*/\s*", "/", name).partition("/")
    unit = _BY_NAME.get(above) or _BY_NAME.get(above.removesuffix("s"))
    if unit is None:
        return None
    if below:
        other = _BY_NAME.get(below) or _BY_NAME.get(below.removesuffix("s"))
        if other is None:
            return None
        return Unit((*unit.dimension, "per", *other.dimension), unit.factor / other.factor)
    return Unit(unit.dimension * power, unit.factor**power)
