"""Values that programs do not expect: a fixed table of known ones, and a pool that hypothesis draws."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

# What JSON text can't be made of by json.dumps: put in the place of these marks when a document is written.
MARKS = {
    "@@deep list@@": "[" * 100_000 + "]" * 100_000,
    "@@deep mapping@@": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "@@unclosed@@": "[" * 5_000,
    "@@400 digits@@": "9" * 400,
    "@@NaN@@": "NaN",
    "@@Infinity@@": "-Infinity",
    "@@surrogate@@": '"a\\ud83dz"',
    "@@huge float@@": "1e400",
}
NUMBERS = [0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-12, 1e30, 1e308, 255, 65_536, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1]
NUMBERS += [2**63, 2**64, -(2**63), 10**12]
TEXTS = [
    "",
    " ",
    "\n",
    "null",
    "true",
    "0",
    "None",
    "nan",
    "a" * 50,
    "a" * 100_000,
    "\u0000",
    "\ufeff",
    "é",
    "книги",
    "a\u202eb",
]
TEXTS += ["..", "../x", "./", "a/b", "$(touch owned)", "${oc.env:HOME}", "{}", "[]", "a=b", "#", "%s", "\\", "'", '"']
CONTAINERS: list[Any] = [[], {}, [[]], [{}], [None], {"": None}, [1, "a", None], {"a": {"b": []}}]
ODD: list[Any] = [None, True, False, *NUMBERS, *TEXTS, *CONTAINERS, *MARKS]
BYTES = [
    b"",
    b"\x00",
    b"\xff",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n\n",
    b"\r",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
]
BYTES += [
    b"\xed\xa0\xbd",
    b"\xc0\x80",
    b"\xf4\x90\x80\x80",
    b"\x1f\x8b\x08",
    b"\x28\xb5\x2f\xfd",
    b"PAR1",
    b"ARROW1",
    b"PK\x03\x04",
]
BYTES += [b"\x00" * 4096, b"a" * 70_000, b"null", b"NaN", b"1e999", b"\\ud83d", b"\\u0000", b"-", b"9" * 40]


class Values:
    """Odd values of this campaign: the table's and a pool out of hypothesis, both a function of ``number`` alone."""

    def __init__(self, number: int) -> None:
        self.pool = pool(number)

    def any(self, draw: Random) -> Any:
        """A value fit for JSON once its marks are replaced."""
        return draw.choice(ODD if draw.random() < 0.6 else self.pool)

    def near(self, draw: Random, value: Any) -> Any:
        """A value of about the same type as ``value``, or any other."""
        if draw.random() < 0.35:
            return self.any(draw)
        if isinstance(value, bool) or value is None:
            return draw.choice([True, False, None, 0, 1, "true"])
        if isinstance(value, int):
            return draw.choice(
                [value + 1, value - 1, -value, value * 2, 0, value * 10**6, float(value), str(value), value // 2]
            )
        if isinstance(value, float):
            return draw.choice(
                [-value, value * 1e30, 0.0, int(value) if math.isfinite(value) else 0, str(value), value / 2]
            )
        if isinstance(value, str):
            return draw.choice([value + " ", value[:-1], value.upper(), value * 2, f"{value}\n", value[::-1], *TEXTS])
        return self.any(draw)


def pool(number: int, count: int = 100) -> list[Any]:
    """``count`` values fit for JSON, as hypothesis draws them with the seed ``number``."""
    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=20)
    )
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    )
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(values)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found
