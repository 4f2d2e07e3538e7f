"""Tables as CSV (full precision), Markdown and LaTeX, and the paper's own values to stand beside ours."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from qlutils.files import write_bytes

UNDEFINED = "–"
PAPER_MODELS = ("gpt2", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B")
_ALIASES = {"openai-community/gpt2": "gpt2"}
_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
          ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "—": "---", "−": "$-$", "Δ": r"$\Delta$",
          "∩": r"$\cap$", "×": r"$\times$", "±": r"$\pm$", "≥": r"$\geq$", "≤": r"$\leq$",
          "λ": r"$\lambda$", "β": r"$\beta$", "α": r"$\alpha$", "τ": r"$\tau$", "σ": r"$\sigma$", "μ": r"$\mu$",
          "→": r"$\rightarrow$", "’": "'", "“": "``", "”": "''", "…": r"\ldots{}", "\n": " "}


def format_value(value, low=None, high=None, n=None, digits=2) -> str:
    """One number for reading: "0.52 [0.47, 0.57] (n = 12)"; the interval and n are optional.

    "–" where undefined; an undefined interval shows as [–, –], since a number without one is not a result.
    Numbers that would round to zero are written as 1.2e-07, numbers from 10,000 on as 1.2e+04.
    """
    text = _number(value, digits)
    if text != UNDEFINED and low is not None and high is not None:
        text += f" [{_number(low, digits)}, {_number(high, digits)}]"
    return text if n is None else f"{text} (n = {_number(n, 0)})"


def display_table(frame, headers=None, digits=2) -> pd.DataFrame:
    """The table as texts: columns x, x_low, x_high become one column "x [95 %]"; headers renames columns."""
    frame, headers = _flat(frame), headers or {}
    unknown = [name for name in headers if name not in frame]
    if unknown:
        raise ValueError(f"headers names columns that are not in the table: {', '.join(map(str, unknown))}")
    bounds = _bounds(frame)
    shown = {}
    for name in frame:
        if name in bounds:
            continue
        header, values = headers.get(name, name), frame[name].tolist()
        if f"{name}_low" in bounds:
            low, high = frame[f"{name}_low"].tolist(), frame[f"{name}_high"].tolist()
            shown[f"{header} [95 %]"] = [format_value(*row, digits=digits) for row in zip(values, low, high)]
        else:  # counts may have become floats where one is missing
            places = 0 if re.fullmatch(r"n|n_.*|.*_n", name) else digits
            shown[header] = [format_value(value, digits=places) for value in values]
    return pd.DataFrame(shown, index=frame.index)


def write_table(frame, stem, folder, caption="", note="", *, headers=None, digits=2) -> dict[str, Path]:
    """Write `stem`.csv (every column, full precision), .md and .tex (as `display_table`) into folder.

    A named index becomes columns. caption and note are plain text. Returns {"csv": path, "md": ..., "tex":
    ...}.
    """
    if not re.fullmatch(r"[\w.-]+", stem):
        raise ValueError(f"stem must be a plain file name without folder, not {stem!r}")
    flat = _flat(frame)
    shown = display_table(frame, headers, digits)
    numeric = [pd.api.types.is_numeric_dtype(flat[name]) for name in flat if name not in _bounds(flat)]
    texts = {"csv": flat.to_csv(index=False, lineterminator="\n"),
             "md": _markdown(shown, numeric, caption, note),
             "tex": _latex(shown, numeric, caption, note, stem)}
    paths = {}
    for kind, text in texts.items():
        paths[kind] = Path(folder) / f"{stem}.{kind}"
        write_bytes(paths[kind], text.encode("utf-8"))
    return paths


def paper_value(table, model, column, **keys) -> float:
    """A value the paper prints, NaN where it has none for this model.

    Table 1: column ratio_I, cs_I, ratio_II, cs_II, t or cap_II; keys threshold ("static", "otsu") and
    method ("ig", "sig", "amig"). Table 4: column threshold_value, the same keys. Tables 2 and 3 (localised
    by `ig`): column rel, gen, loc, avg or dppl; keys operation ("erasure", "update"), neurons ("local",
    "global", in Table 3 also "cas") and class_ ("I", "II"). ValueError for a table, column or key that the
    paper does not have.
    """
    tables = _paper()["tables"]
    if str(table) not in tables:
        raise ValueError(f"the paper's values are kept of tables {', '.join(tables)}, not {table!r}")
    names, columns, rows = (tables[str(table)][part] for part in ("keys", "columns", "rows"))
    keys = {name.rstrip("_"): value for name, value in keys.items()}
    if column not in columns or set(keys) != set(names[1:]):
        raise ValueError(f"Table {table} has the columns {', '.join(columns)} and the keys "
                         f"{', '.join(names[1:])}; got {column!r} and {', '.join(keys) or 'no key'}")
    for place, name in enumerate(names[1:], 1):
        known = sorted({row.split("|")[place] for row in rows})
        if keys[name] not in known:
            raise ValueError(f"Table {table} has {name} {', '.join(known)}, not {keys[name]!r}")
    row = rows.get("|".join([_ALIASES.get(model, model), *(keys[name] for name in names[1:])]))
    value = row[columns.index(column)] if row else None
    return np.nan if value is None else float(value)


def paper_notes(table, model=None) -> list[str]:
    """What to know about the paper's printed values of a table (misprints), for a model or for all."""
    model = _ALIASES.get(model, model)
    if model is not None and model not in PAPER_MODELS:
        return []
    texts = [note["text"] for note in _paper()["notes"]
             if str(note["table"]) == str(table) and (model is None or note["model"] in ("*", model))]
    return list(dict.fromkeys(texts))


@cache
def _paper():
    return json.loads(Path(__file__).with_name("paper_values.json").read_text("utf-8"))


def _number(value, digits):
    if value is None or value is pd.NA or (isinstance(value, (float, np.floating)) and np.isnan(value)):
        return UNDEFINED
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if not isinstance(value, (float, np.floating)):
        return str(value)
    vanishes = 0 < abs(value) < 0.5 * 10**-digits
    if digits and (vanishes or abs(value) >= 1e4):
        return f"{value:.1e}"
    return f"{value + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def _bounds(frame):
    """The columns x_low and x_high that belong to a column x."""
    return {f"{name}{end}" for name in frame for end in ("_low", "_high")
            if {f"{name}_low", f"{name}_high"} <= set(frame)}


def _flat(frame):
    """A named index as columns, column levels joined, columns named by texts."""
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = [" ".join(str(part) for part in name if part != "") if isinstance(name, tuple) else str(name)
             for name in frame.columns]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ValueError(f"the table has two columns named {', '.join(sorted(doubled))}")
    return frame.set_axis(names, axis=1).reset_index(drop=True)


def _markdown(shown, numeric, caption, note):
    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    lines = [f"**{caption}**", ""] if caption else []
    lines += [line(shown.columns), line("--:" if right else ":--" for right in numeric)]
    lines += [line(row) for row in shown.itertuples(index=False)]
    return "\n".join(lines + (["", note] if note else [])) + "\n"


def _latex(shown, numeric, caption, note, stem):
    def escape(text):
        return "".join(_LATEX.get(character, character) for character in str(text))

    def line(cells):
        text = " & ".join(map(escape, cells)) + r" \\"
        return "{}" + text if text.startswith("[") else text  # else an argument of the row end before it

    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\caption{{{escape(caption)}}}"] if caption else []
    alignment = "".join("r" if right else "l" for right in numeric)
    lines += [rf"\label{{tab:{stem}}}", rf"\begin{{tabular}}{{{alignment}}}", r"\toprule",
              line(shown.columns), r"\midrule"]
    lines += [line(row) for row in shown.itertuples(index=False)]
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip{{\footnotesize {escape(note)}}}"] if note else []
    return "\n".join(lines + [r"\end{table}"]) + "\n"
