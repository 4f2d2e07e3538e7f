"""A notebook's parameters: the names and defaults it declares, and the values they may have."""

import ast
import json
import re
from pathlib import Path

from qlutils import paths
from qlutils.checks import CHOICES, METHODS, check, one_of

NULLABLE = ("relations", "facts_per_relation", "device", "dtype")  # None: all, all, the best, its
# Of parameters whose other values would give numbers without a meaning: at least, below, and what
# they are of. The rest is checked where it is used.
RANGES = {
    "t": (0.05, 1.0, "a share of the largest score that results keep"),
    "static_threshold": (0.0, 1.0, "a CS2"),
    "example_line": (0.0, 1.0, "a CS2"),
    "n_locality": (1,),
    "ppl_entries": (0,),
    "ppl_max_tokens": (2,),
    "seed": (0,),
    "facts_per_relation": (1,),
    "known_prompts": (0,),
    "other_rule_facts": (0,),
    "more_controls_facts": (1,),
    "sweep_facts": (1,),
    "control_queries": (1,),
    "steps": (2,),
    "tolerance": (1e-9, 1.0, "a share of a query's largest score"),
    "suppress": (0.0, 1.0, "a factor that suppresses"),
    "enhance": (1.0, 1e30, "a factor that enhances"),
    "alpha": (1e-9, 1.0, "a share of the mean attention"),
    "lambda1": (-1e30, 1e30, "a finite number"),
    "lambda2": (-1e30, 1e30, "a finite number"),
    "cas_threshold": (0.1, 1.0, "a share of the largest CAS that results keep"),
}
PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def declared_parameters(notebook):
    """{name: default} of a notebook's cell tagged `parameters`; {} without one."""
    source = ""
    found = {}
    for cell in json.loads(Path(notebook).read_bytes())["cells"]:
        if "parameters" in cell["metadata"].get("tags", ()):
            source = "".join(cell["source"])
    try:
        for line in ast.parse(source).body:
            [target] = line.targets
            found[target.id] = ast.literal_eval(line.value)
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(
            f"the parameters cell of {Path(notebook).name} must hold nothing but lines `name = "
            f"literal value`; got\n{source}"
        ) from None
    return found


def parameters_of(name, namespace):
    """{parameter: value} of the notebook `name`, which hands over its namespace, `globals()`.

    What it declares is read from its file, here or in `paths.NOTEBOOKS`. Before a notebook is
    opened nothing else is set in it but imported CONSTANTS, so any other name with a plain value
    was given as a parameter and is refused. ValueError names it, or a value of another type than
    its default or out of range."""
    file = Path(f"{name}.ipynb")
    declared = declared_parameters(file if file.is_file() else paths.NOTEBOOKS / file)
    if absent := declared.keys() - namespace.keys():
        raise ValueError(f"parameter {min(absent)} is not set: run the parameters cell first")
    values = {parameter: namespace[parameter] for parameter in declared}
    if "study" not in namespace:  # not opened yet
        for other, value in namespace.items():
            # In, Out, _ are Jupyter's
            if isinstance(value, PLAIN) and re.match("(?!In$|Out$)[A-Z]?[a-z]", other):
                values.setdefault(other, value)
    check_given(values, declared)
    return values


def check_given(given, declared):
    """ValueError unless every given parameter is known and of its default's type and range."""
    for name, value in given.items():
        if name not in declared:
            known = ", ".join(declared)
            raise ValueError(f"unknown parameter {name!r}; this notebook knows {known}")
        default = declared[name]
        kinds = (int, float) if type(default) is float else (type(default),)
        empty = value is None and name in NULLABLE
        if not (default is None or empty or type(value) in kinds):
            raise ValueError(
                f"parameter {name}={value!r}: want a value like its default {default!r}, "
                f"of type {type(default).__name__}"
            )
    check_values(given)


def check_values(given):
    """ValueError for a parameter whose value has no meaning."""
    for name in given.get("methods") or ():
        one_of("method", name, METHODS)
    for name, value in given.items():
        if value is not None and name in CHOICES:
            one_of(name, value, CHOICES[name])
        if value is not None and name in RANGES:
            check(f"parameter {name}", value, *RANGES[name])
