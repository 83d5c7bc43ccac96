"""Numbers as people and models write them."""

from __future__ import annotations

import re
from fractions import Fraction

PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+"
NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}%])[-+\u2212])?[$\u20ac\u00a3]?"
    rf"(?:\\[dt]?frac\{{(?P<top>-?[0-9]+)\}}\{{(?P<under>[0-9]+)\}}"
    rf"|(?<![\w.])(?P<whole>[0-9]+) (?P<over>[0-9]+)/(?P<parts>[0-9]+)(?![\w/])"
    rf"|(?P<number>{PLAIN})(?:[eE](?P<power>[-+]?[0-9]+)(?!\w))?(?:/(?P<share>{PLAIN}))?)"
)
DIGITS = 400
"""Most digits and powers of ten of a number that is read; a longer one is no number that anybody meant."""


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None where there is none that can be read."""
    found = list(NUMBER.finditer(text))
    return value_of(found[-1]) if found else None


def value_of(match: re.Match[str]) -> Fraction | None:
    """What a match of `NUMBER` is worth: thousands separators and currency signs left out, fractions divided."""
    part = match.groupdict()
    if len(match[0]) > DIGITS or abs(int(part["power"] or 0)) > DIGITS:
        return None
    try:
        if part["top"]:
            value = Fraction(int(part["top"]), int(part["under"]))
        elif part["whole"]:
            value = int(part["whole"]) + Fraction(int(part["over"]), int(part["parts"]))
        else:
            value = plain(part["number"]) * Fraction(10) ** int(part["power"] or 0)
            value /= plain(part["share"]) if part["share"] else 1
    except ZeroDivisionError:
        return None
    return -value if part["sign"] in ("-", "\u2212") else value


def plain(text: str) -> Fraction:
    """The value of digits with separators and a point."""
    return Fraction(text.replace(",", ""))


def close(found: Fraction, right: Fraction, tolerance: float) -> bool:
    """Whether a number is the right one, or as near as `tolerance` times that one."""
    return abs(found - right) <= Fraction(tolerance) * abs(right)
