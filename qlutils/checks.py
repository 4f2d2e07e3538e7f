"""What values may be: the study's lists of choices, and one check of numbers and of choices."""

from math import inf
from numbers import Integral, Real

METHODS = ("ig", "sig", "amig")  # of localisation, see `attribution.attribute`
DTYPES = ("float64", "float32", "bfloat16", "float16")


def check(name, value, kind=float, low=-inf, high=inf, what=""):
    """ValueError unless `value` is a number of `kind` (int or float) with low <= value < high.

    what: the message's words for what would be right, where a range does not say it."""
    number = Integral if kind is int else Real
    if isinstance(value, bool) or not isinstance(value, number) or not low <= value < high:
        below = f" and below {high}" if high < inf else ""
        what = what or f"{'an integer' if kind is int else 'a number'} of at least {low}{below}"
        raise ValueError(f"{name} {value!r}: want {what}")


def one_of(name, value, known):
    """ValueError unless `value` is one of the texts `known`."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(known)}")
