"""What values may be: the study's lists of choices, and one check of numbers and of choices."""

from math import inf
from numbers import Integral, Real

# Of localisation, see `attribution.attribute`: integrated gradients, from zero; sequential
# integrated gradients (Enguehard), from a baseline for each token; architecture-adapted
# multilingual integrated gradients (Chen et al. 2024), from a prompt of EOS tokens.
METHODS = ("ig", "sig", "amig")
RULES = ("right", "left", "endpoints", "midpoint", "gauss", "clenshaw", "converged")  # `quadrature`
SITES = ("down_input", "pre_activation")  # where neurons are read, see `passes.site_modules`
DTYPES = ("float64", "float32", "bfloat16", "float16")
# Of every parameter that is one of a few texts.
CHOICES = {
    "method": METHODS,
    "rule": RULES,
    "answer": ("all", "first"),
    "site": SITES,
    "amig_factor": ("w-b", "w"),
    "dtype": DTYPES,
    "middle": ("cut", "drop"),
    "embedding": ("input", "output"),  # of an update, see `editing.object_embedding`
    "score": ("sum", "visible_mean"),  # of a synapse, see `find_synapses`
    "cas_score": ("raw", "max"),  # see `cas.kept_neurons`
    "statistic": ("trimmed", "mean", "median"),  # that a figure shows
}


def check(name, value, low, high=inf, what=""):
    """ValueError unless `value` is a number with low <= value < high; an integer if `low` is one.

    what: the message's words for such a number."""
    kind = Integral if isinstance(low, int) else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value < high:
        what = what or ("an integer" if kind is Integral else "a number")
        below = f" and below {high}" if high < inf else ""
        raise ValueError(f"{name} {value!r}: want {what}, at least {low}{below}")


def one_of(name, value, known):
    """ValueError unless `value` is one of the texts `known`."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(known)}")
