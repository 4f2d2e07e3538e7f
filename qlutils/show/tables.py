"""Tables as CSV (full precision), Markdown and LaTeX, sentences about their rows, the paper's
values beside ours."""

import csv
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from qlutils.files import write_bytes
from qlutils.paths import packaged
from qlutils.show.stats import LEAST

UNDEFINED = "–"
PAPER_MODELS = ("gpt2", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B")

# A sign and what LaTeX wants; "[" at the start of a row would be an argument of the row end before.
_LATEX = r"""
\ \textbackslash{}
~ \textasciitilde{}
^ \textasciicircum{}
< \textless{}
> \textgreater{}
| \textbar{}
[ {[}
– --
— ---
− $-$
Δ $\Delta$
∩ $\cap$
× $\times$
± $\pm$
≥ $\geq$
≤ $\leq$
λ $\lambda$
β $\beta$
α $\alpha$
τ $\tau$
σ $\sigma$
μ $\mu$
→ $\rightarrow$
’ '
“ ``
” ''
… \ldots{}
& \&
% \%
$ \$
# \#
_ \_
{ \{
} \}
"""
_LATEX = dict(line.split() for line in _LATEX.strip().splitlines())
_LATEX = str.maketrans(_LATEX | {"\n": " ", "\r": " "})


# --- numbers and sentences ------------------------------------------------------------------------


def format_value(value, low=None, high=None, digits=2):
    """One value for reading: "0.52 [0.47, 0.57]"; the interval is optional.

    "–" where undefined; an undefined interval shows as [–, –], since a number without one is not a
    result. Floats have `digits` decimals, whole numbers and texts stand as they are."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return UNDEFINED
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if low is not None:
        text, low, high = _decimals([value, low, high], digits)
        return f"{text} [{low}, {high}]"
    if isinstance(value, (float, np.floating)):
        return _decimals([value], digits)[0]
    return str(value)


def _decimals(numbers, digits):
    """A number, and the bounds of its interval if given, with equally many decimals.

    There are more than `digits`, up to 4, where the number, or the bound that tells its interval
    from 0, would read as 0. With a size below 0.0001, or from 10,000 on, all are written as
    1.2e-07. The size of a number with bounds is a tenth of their distance at least, as for
    0.00001 [-0.003, 0.003]."""
    value, *bounds = map(float, numbers)
    low, high = bounds or (value, value)
    size = np.nanmax([abs(value), (high - low) / 10])
    largest = np.nanmax(np.abs([value, low, high]))
    nearest = max(low, -high)  # of the bounds to 0; negative where they are on both sides
    least = min(size, nearest) if nearest >= 5e-5 else size
    form = f"z.{digits}f"
    if digits and size and (size < 1e-4 or largest >= 1e4):
        form = "z.1e"
    elif digits and 0 < 2 * least < 10**-digits:
        rounded_up = 2 * least if bounds else least  # of an interval 0.0006 is 0.001
        places = min(4, -int(np.floor(np.log10(rounded_up))))
        form = f"z.{places}f"
    return [UNDEFINED if np.isnan(one) else f"{one:{form}}" for one in (value, *bounds)]


def with_interval(row, name="mean"):
    """A value of a table's row for a sentence: "0.41 [0.35, 0.47] (n = 120)", of a difference "(n
    = 90 and 30)"; "undefined (n = 0)"; without n if it has none."""
    n = counted(row, "n")
    text = format_value(row[name], row[f"{name}_low"], row[f"{name}_high"])
    if text == UNDEFINED:
        text = "undefined"
    return f"{text} (n = {n})" if n else text


def counted(row, name):
    """The n of a table's row, of both sides of a difference: "90 and 30"; "" where it has none."""
    sides = [row.get(name), row.get(f"{name}_other")]
    return " and ".join(f"{count:.0f}" for count in sides if not pd.isna(count))


def too_few(row):
    """Why a row has no interval: how many facts are on each side, and how many it takes."""
    n = counted(row, "n_facts" if "n_facts" in row else "n")
    side = " on each side" if "and" in n else ""
    return f"{n or 'too few'} facts; an interval needs {LEAST}{side}"


def verdict(row, name="mean"):
    """What the 95 % interval of a value says about 0, in words."""
    low = row[f"{name}_low"]
    high = row[f"{name}_high"]
    if pd.isna(low):
        return f"not testable here ({too_few(row)})"
    if low > 0:
        return "lies above 0"
    return "lies below 0" if high < 0 else "cannot be told from 0"


def pick(table, **keys):
    """The one row of a table with these values; `class_` stands for the column class."""
    for name, value in keys.items():
        table = table[table[name.rstrip("_")] == value]
    if len(table) != 1:
        raise ValueError(f"{len(table)} rows of the table have {keys}; want one")
    return table.iloc[0]


# --- tables ---------------------------------------------------------------------------------------


def display_table(frame, digits=2):
    """The table as texts, without row numbers: columns x, x_low, x_high become one column "x [95
    %]"."""
    frame = _flat(frame)
    shown = {}
    for name, bounds in _bounds(frame).items():
        columns = [frame[one].tolist() for one in (name, *bounds)]
        # counts may have become floats where one is missing
        places = 0 if re.fullmatch(r"n|n_.*|.*_n", name) else digits
        title = f"{name} [95 %]" if bounds else name
        shown[title] = [format_value(*values, digits=places) for values in zip(*columns)]
    return pd.DataFrame(shown, index=[""] * len(frame))


def write_table(
    frame,
    stem,
    folder,
    caption="",
    note="",
    *,
    digits=2,
):
    """Write `stem`.csv (every column, full precision), .md and .tex (as `display_table`) into
    folder; their paths."""
    flat = _flat(frame)
    shown = display_table(frame, digits)
    numeric = [pd.api.types.is_numeric_dtype(flat[name]) for name in _bounds(flat)]
    return write_files(
        stem,
        folder,
        {
            "csv": csv_bytes(flat),
            "md": _markdown(shown, numeric, caption, note).encode(),
            "tex": _latex(shown, numeric, caption, note, stem).encode(),
        },
    )


def write_files(stem, folder, contents):
    """Write {kind: bytes} as folder/stem.kind; their paths. ValueError for a stem that would lead
    to another folder."""
    if not isinstance(stem, str) or not re.fullmatch(r"[\w.-]+", stem):
        raise ValueError(f"stem must be a plain file name without folder, not {stem!r}")
    paths = {kind: Path(folder) / f"{stem}.{kind}" for kind in contents}
    for kind, path in paths.items():
        write_bytes(path, contents[kind])
    return paths


def csv_bytes(frame):
    """A frame without its index as CSV, rows ended by a line feed."""
    plain = dict(index=False, lineterminator="\n")
    text = frame.to_csv(**plain)
    if "\r" in text:  # the csv module need not quote it; every reader takes it for a row's end
        text = frame.to_csv(**plain, quoting=csv.QUOTE_NONNUMERIC)
    return text.encode()


def _bounds(frame):
    """{column: [] or its columns of bounds, x_low and x_high}, without these columns."""
    bounds = {}
    for name in frame:
        both = [f"{name}_low", f"{name}_high"]
        bounds[name] = both if set(both) <= set(frame) else []
    inner = sum(bounds.values(), [])
    return {name: both for name, both in bounds.items() if name not in inner}


def _flat(frame):
    """Columns named by texts; rows numbered."""
    return frame.rename(columns=str).reset_index(drop=True)


def _markdown(shown, numeric, caption, note):
    aligned = ["--:" if right else ":--" for right in numeric]
    rows = [shown.columns, aligned, *shown.to_numpy()]
    table = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)
    title = caption and f"**{caption}**"
    return "\n\n".join(filter(None, [title, table, note])) + "\n"


def _cell(text):
    """A cell of Markdown. Backslashes before a pipe are doubled, else they would escape its
    escape."""
    text = re.sub(r"\r\n|\r|\n", " ", str(text))
    return re.sub(r"(\\*)\|", r"\1\1\|", text)


def _latex(
    shown,
    numeric,
    caption,
    note,
    stem,
):
    def escaped(text):
        return str(text).translate(_LATEX)

    styler = shown.reset_index(drop=True).style.hide(axis="index")
    styler = styler.format(escaped).format_index(escaped, axis=1)
    table = styler.to_latex(
        column_format="".join("r" if right else "l" for right in numeric),
        position_float="centering",
        hrules=True,
        label=f"tab:{stem}",
        caption=escaped(caption) if caption else None,
    )
    table = table.replace("\\centering\n", "\\centering\n\\small\n", 1)
    if note:
        below = f"\\par\\smallskip{{\\footnotesize {escaped(note)}}}\n"
        table = table.replace("\\end{table}", below + "\\end{table}")
    return "% needs \\usepackage{booktabs}\n" + table


# --- the paper's values ---------------------------------------------------------------------------


def paper_value(table, model, column, **keys):
    """A value the paper prints, NaN where it has none: for another model, method or set of neurons.

    `paper_values.json` names each table's columns and keys; the key class is written `class_`. An
    error for the name of a table, column or key that there is not."""
    printed = paper()["tables"][str(table)]
    place = printed["columns"].index(column)
    cells = [_papers_name(model)]
    cells += [keys.get(name, keys.get(f"{name}_")) for name in printed["keys"][1:]]
    row = printed["rows"].get("|".join(cells))
    value = row and row[place]
    return np.nan if value is None else value


def without_empty_paper_columns(frame):
    """Columns of the paper's values (`..._paper`) are dropped where it has none; ours stay,
    undefined or not."""
    empty = frame.columns[frame.isna().all() & frame.columns.str.endswith("_paper")]
    return frame.drop(columns=empty)


def paper_notes(table, model):
    """What to know about the paper's printed values of a table for a model (misprints); nothing for
    other models."""
    model = _papers_name(model)
    if model not in PAPER_MODELS:
        return []
    return [
        note["text"]
        for note in paper()["notes"]
        if str(note["table"]) == str(table) and note["model"] in ("*", model)
    ]


def _papers_name(model):
    return model.removeprefix("openai-community/")


@cache
def paper():
    """`paper_values.json`: the values of the paper's tables, notes on misprints, its experimental
    settings."""
    return json.loads(packaged("show/paper_values.json"))
