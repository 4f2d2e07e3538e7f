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
from qlutils.show.stats import LEAST

UNDEFINED = "–"
PAPER_MODELS = ("gpt2", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B")
_ALIASES = {"openai-community/gpt2": "gpt2"}
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "–": "--",
        "—": "---",
        "−": "$-$",
        "Δ": r"$\Delta$",
        "∩": r"$\cap$",
        "×": r"$\times$",
        "±": r"$\pm$",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
        "λ": r"$\lambda$",
        "β": r"$\beta$",
        "α": r"$\alpha$",
        "τ": r"$\tau$",
        "σ": r"$\sigma$",
        "μ": r"$\mu$",
        "→": r"$\rightarrow$",
        "’": "'",
        "“": "``",
        "”": "''",
        "…": r"\ldots{}",
        "\n": " ",
        "\r": " ",
    }
)


# --- numbers and sentences ------------------------------------------------------------------------


def format_value(value, low=None, high=None, n=None, digits=2) -> str:
    """One number for reading: "0.52 [0.47, 0.57] (n = 12)"; the interval and n are optional.

    "–" where undefined; an undefined interval shows as [–, –], since a number without one is not a
    result. A value that would round to zero keeps its first digit, 0.004; below 0.0001 and from
    10,000 on numbers are written as 1.2e-07. The bounds are written as the value is; they can ask
    for more digits, too, as for 0.00001 [-0.003, 0.003], and so can the one that tells an interval
    from 0."""
    if low is None or high is None or _number(value, digits) == UNDEFINED:
        text = _number(value, digits)
    else:
        value, low, high = float(value), float(low), float(high)
        size = np.nanmax([abs(value), (high - low) / 10])
        whole = (
            digits == 0 or size == 0 or 1e-4 <= size and np.nanmax(np.abs([value, low, high])) < 1e4
        )
        edge = (
            low if low > 0 else -high if high < 0 else size
        )  # a bound that is not 0 is not shown as 0
        least = min(size, edge if edge >= 5e-5 else size) if whole and size and digits else 1
        places = max(digits, min(4, int(np.ceil(-np.log10(2 * least)))))
        text, low, high = (
            UNDEFINED
            if np.isnan(one)
            else f"{round(one, places) + 0.0:.{places}f}"
            if whole
            else f"{one:.1e}"
            for one in (value, low, high)
        )
        text += f" [{low}, {high}]"
    return text if n is None else f"{text} (n = {_number(n, 0)})"


def with_interval(row, name="mean", digits=2) -> str:
    """A value of a table's row for a sentence: "0.41 [0.35, 0.47] (n = 120)", of a difference "(n
    = 90 and 30)"; "undefined (n = 0)"; without n if it has none."""
    n = counted(row)
    if pd.isna(row[name]):
        return "undefined" + (f" (n = {n})" if n else "")
    return format_value(row[name], row[f"{name}_low"], row[f"{name}_high"], n or None, digits)


def counted(row, name="n") -> str:
    """The n of a table's row for a sentence, of both sides of a difference; "" where it has
    none."""
    sides = [row.get(name), row.get(f"{name}_other")]
    return " and ".join(
        f"{count:.0f}" for count in sides if count is not None and not pd.isna(count)
    )


def too_few(row) -> str:
    """Why a row has no interval: how many facts are on each side, and how many it takes."""
    n = counted(row, "n_facts" if "n_facts" in row else "n")
    return (
        f"{n or 'too few'} facts; an interval needs {LEAST}{' on each side' if 'and' in n else ''}"
    )


def verdict(row, name="mean") -> str:
    """What the 95 % interval of a value says about 0, in words."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if pd.isna(row[name]) or pd.isna(low):
        return f"not testable here ({too_few(row)})"
    return "lies above 0" if low > 0 else "lies below 0" if high < 0 else "cannot be told from 0"


def pick(table: pd.DataFrame, **keys) -> pd.Series:
    """The one row of a table with these values; `class_` stands for the column class."""
    for name, value in keys.items():
        table = table[table[name.rstrip("_")] == value]
    if len(table) != 1:
        raise ValueError(f"{len(table)} rows of the table have {keys}; want one")
    return table.iloc[0]


def _number(value, digits):
    if (
        value is None
        or value is pd.NA
        or (isinstance(value, (float, np.floating)) and np.isnan(value))
    ):
        return UNDEFINED
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if not isinstance(value, (float, np.floating)):
        return str(value)
    if digits and (0 < abs(value) < 1e-4 or abs(value) >= 1e4):
        return f"{value:.1e}"
    if digits and 0 < abs(value) < 0.5 * 10**-digits:
        return f"{value:.1g}"
    return f"{value + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0


# --- tables ---------------------------------------------------------------------------------------


def display_table(frame, digits=2) -> pd.DataFrame:
    """The table as texts, without row numbers: columns x, x_low, x_high become one column "x [95
    %]"."""
    frame, shown = _flat(frame), {}
    for name in _without_bounds(frame):
        values = frame[name].tolist()
        if {f"{name}_low", f"{name}_high"} <= set(frame):
            low, high = frame[f"{name}_low"].tolist(), frame[f"{name}_high"].tolist()
            shown[f"{name} [95 %]"] = [
                format_value(*row, digits=digits) for row in zip(values, low, high)
            ]
        else:  # counts may have become floats where one is missing
            places = 0 if re.fullmatch(r"n|n_.*|.*_n", name) else digits
            shown[name] = [format_value(value, digits=places) for value in values]
    return pd.DataFrame(shown, index=[""] * len(frame))


def write_table(frame, stem, folder, caption="", note="", *, digits=2) -> dict[str, Path]:
    """Write `stem`.csv (every column, full precision), .md and .tex (as `display_table`) into
    folder; their paths."""
    paths = files_of(stem, folder, ("csv", "md", "tex"))
    flat, shown = _flat(frame), display_table(frame, digits)
    numeric = [pd.api.types.is_numeric_dtype(flat[name]) for name in _without_bounds(flat)]
    texts = {
        "csv": csv_text(flat),
        "md": _markdown(shown, numeric, caption, note),
        "tex": _latex(shown, numeric, caption, note, stem),
    }
    for kind, text in texts.items():
        write_bytes(paths[kind], text.encode("utf-8"))
    return paths


def files_of(stem, folder, kinds) -> dict[str, Path]:
    """{kind: folder/stem.kind}; ValueError for a stem that would lead to another folder."""
    if not isinstance(stem, str) or not re.fullmatch(r"[\w.-]+", stem):
        raise ValueError(f"stem must be a plain file name without folder, not {stem!r}")
    return {kind: Path(folder) / f"{stem}.{kind}" for kind in kinds}


def csv_text(frame) -> str:
    """A frame without its index as CSV, rows ended by a line feed."""
    text = frame.to_csv(index=False, lineterminator="\n")
    if (
        "\r" in text
    ):  # which the csv module need not quote, but every reader takes for the end of a row
        text = frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    return text


def _without_bounds(frame) -> list[str]:
    """The columns less the x_low and x_high that belong to a column x."""
    bounds = {
        f"{name}{end}"
        for name in frame
        for end in ("_low", "_high")
        if {f"{name}_low", f"{name}_high"} <= set(frame)
    }
    return [name for name in frame if name not in bounds]


def _flat(frame):
    """Columns named by texts, no two alike; rows numbered."""
    names = [str(name) for name in frame]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ValueError(f"the table has two columns named {', '.join(sorted(doubled))}")
    return frame.set_axis(names, axis=1).reset_index(drop=True)


def _markdown(shown, numeric, caption, note):
    def line(cells):
        return "| " + " | ".join(map(escaped, cells)) + " |"

    def escaped(
        cell,
    ):  # backslashes before a pipe are doubled, else they would escape the one that escapes it
        return re.sub(r"(\\*)\|", r"\1\1\|", re.sub(r"\r\n|\r|\n", " ", str(cell)))

    lines = [f"**{caption}**", ""] if caption else []
    lines += [line(shown.columns), line("--:" if right else ":--" for right in numeric)]
    lines += [line(row) for row in shown.itertuples(index=False)]
    return "\n".join(lines + (["", note] if note else [])) + "\n"


def _latex(shown, numeric, caption, note, stem):
    def line(cells):
        text = " & ".join(str(cell).translate(_LATEX) for cell in cells) + r" \\"
        return (
            "{}" + text if text.startswith("[") else text
        )  # else an argument of the row end before it

    alignment = "".join("r" if right else "l" for right in numeric)
    return (
        "\n".join(
            [
                r"% needs \usepackage{booktabs}",
                r"\begin{table}",
                r"\centering",
                r"\small",
                *([rf"\caption{{{caption.translate(_LATEX)}}}"] if caption else []),
                rf"\label{{tab:{stem}}}",
                rf"\begin{{tabular}}{{{alignment}}}",
                r"\toprule",
                line(shown.columns),
                r"\midrule",
                *map(line, shown.itertuples(index=False)),
                r"\bottomrule",
                r"\end{tabular}",
                *([rf"\par\smallskip{{\footnotesize {note.translate(_LATEX)}}}"] if note else []),
                r"\end{table}",
            ]
        )
        + "\n"
    )


# --- the paper's values ---------------------------------------------------------------------------


def paper_value(table, model, column, **keys) -> float:
    """A value the paper prints, NaN where it has none for this model.

    `paper_values.json` names each table's columns and keys; the key class is written `class_`.
    ValueError, naming what there is, for a table, column or key that the paper does not have."""
    tables = paper()["tables"]
    if str(table) not in tables:
        raise ValueError(
            f"the paper's values are kept of tables {', '.join(tables)}, not {table!r}"
        )
    names, columns, rows = (tables[str(table)][part] for part in ("keys", "columns", "rows"))
    keys = {name.rstrip("_"): value for name, value in keys.items()}
    wanted, known = (
        "|".join(str(keys.get(name)) for name in names[1:]),
        {row.split("|", 1)[1] for row in rows},
    )
    if column not in columns or set(keys) != set(names[1:]) or wanted not in known:
        raise ValueError(
            f"Table {table} has the columns {', '.join(columns)} and, by {', '.join(names[1:])}, "
            f"the rows "
            f"{', '.join(sorted(known))}; got {column!r} and {keys}"
        )
    row = rows.get(f"{_ALIASES.get(model, model)}|{wanted}")
    value = row[columns.index(column)] if row else None
    return np.nan if value is None else float(value)


def without_empty_paper_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of the paper's values (`..._paper`) are dropped where it has none; ours stay,
    undefined or not."""
    return frame.drop(
        columns=[name for name in frame if name.endswith("_paper") and frame[name].isna().all()]
    )


def paper_notes(table, model) -> list[str]:
    """What to know about the paper's printed values of a table for a model (misprints); nothing for
    other models."""
    model = _ALIASES.get(model, model)
    if model not in PAPER_MODELS:
        return []
    return list(
        dict.fromkeys(
            note["text"]
            for note in paper()["notes"]
            if str(note["table"]) == str(table) and note["model"] in ("*", model)
        )
    )


@cache
def paper() -> dict:
    """`paper_values.json`: the values of the paper's tables, notes on misprints, its experimental
    settings."""
    return json.loads(Path(__file__).with_name("paper_values.json").read_text("utf-8"))
