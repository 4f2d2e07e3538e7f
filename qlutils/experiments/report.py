"""All models and methods of a run together: what is there, what is missing, and its tables and
figures side by side.

Reads saved results only; nothing here imports torch. Whatever a run did not make is named, never an
error.
"""

from __future__ import annotations

import html
import shutil
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd
from IPython.display import HTML, Image, display

from qlutils import paths
from qlutils.experiments.claims import NEIGHBOURS, Missing
from qlutils.experiments.edit_tables import METRICS
from qlutils.experiments.effects import query_gaps, summary
from qlutils.files import write_bytes
from qlutils.show.page import export_html, missing_html, shown
from qlutils.show.plots import figure_bars
from qlutils.show.stats import STATISTICS
from qlutils.show.tables import format_value, paper, paper_notes
from qlutils.study.notebook import Study
from qlutils.study.results import read_record

NOTEBOOKS = {
    "01": "01_localize",
    "02": "02_consistency",
    "03": "03_kn_modification",
    "04": "04_query_kn_mapping",
    "05": "05_attention_predominance",
    "06": "06_knowledge_synapses",
    "07": "07_cas_editing",
}
PAPER_SETS = ("self", *NEIGHBOURS)
SET_ORDER = (
    "self",
    "self_random",
    "self_same_relation",
    "self_other_relation",
    "self_active",
    "union",
    "union_others",
    "union_matched",
    "self_as_union",
    "union_random",
    "intersection",
    "intersection_others",
    "intersection_matched",
    "self_as_intersection",
    "refine",
    "refine_others",
    "refine_matched",
    "self_as_refine",
)
SETTINGS = (
    "t",
    "static_threshold",
    "middle",
)  # those of the report, wherever a notebook has them, too
COMPARES = "02"  # the notebook that compares methods: its results stand in the model's folder `all`
# The frames that claims and figures read: {name under which it was saved: notebook}.
FRAMES = {
    "queries": "01",
    "edits": "03",
    "query_kn_mapping": "04",
    "attention_predominance": "05",
    "knowledge_synapses": "06",
    "cas_edits": "07",
}


# --- what is there --------------------------------------------------------------------------------


class Run:
    """What a run saved for its models and methods, read with checks: only results made from the
    report's own inputs."""

    def __init__(self, study, models, methods, downstream):
        self.study, self.models, self.methods, self.downstream = (
            study,
            list(models),
            list(methods),
            list(downstream),
        )
        self.of, self.entry, self.frame = (
            cache(self.of),
            cache(self.entry),
            cache(self.frame),
        )  # each is read once

    def of(self, model, method=None) -> Study:
        """The study of a model and method, with the report's parameters; for what it saved and for
        new units."""
        given = {**self.study.parameters, "model": model, "method": method}
        found = Study(self.study.notebook, **given)
        found.may_scan = False
        return found

    def entry(self, number, model, method=None) -> dict:
        """The record of a notebook; `Missing` where it was not run, or on other facts, model or
        settings."""
        study, notebook = self.of(model, method), NOTEBOOKS[number]
        try:
            inputs = study.inputs()
            entry = read_record(study.results / "run.json")[notebook]
        except KeyError:
            raise Missing(f"notebook {number} was not run") from None
        except ValueError as error:
            raise Missing(str(error)) from None
        differ = [name for name, ours in inputs.items() if entry["inputs"].get(name) != ours]
        differ += [
            name
            for name in SETTINGS
            if self.study.parameters.get(name)
            != entry["parameters"].get(name, self.study.parameters.get(name))
        ]
        if differ:
            raise Missing(f"notebook {number} was run with other {', '.join(differ)}")
        return entry

    def frame(self, model, method, name) -> pd.DataFrame:
        """A saved frame of FRAMES; `Missing` says why there is none."""
        self.entry(FRAMES[name], model, method)
        try:
            return self.of(model, method).load(name)
        except ValueError as error:
            raise Missing(str(error)) from None

    def file(self, number, name, model, method=None) -> Path:
        """A table or figure that a notebook wrote."""
        self.entry(number, model, method)
        path = self.of(model, method).results / name
        if not path.is_file():
            raise Missing(f"notebook {number} wrote no {name}")
        return path

    def methods_of(self, number) -> list:
        return {"01": self.methods, COMPARES: [None]}.get(number, self.downstream)

    def read_all(self, number, read) -> dict:
        """{(model, method): read(model, method), or the `Missing` it raises} of all that notebook
        `number` runs for."""
        found = {}
        for pair in product(self.models, self.methods_of(number)):
            try:
                found[pair] = read(*pair)
            except Missing as missing:
                found[pair] = missing
        return found

    def csvs(self, number, stem) -> dict:
        """A table that a notebook wrote for each model and method, or the `Missing`."""
        return self.read_all(
            number, lambda *pair: pd.read_csv(self.file(number, f"{stem}.csv", *pair))
        )

    def table(self, number, stem) -> tuple[pd.DataFrame, list[str]]:
        """A notebook's table of all models (and methods, if several) under one another, and what is
        missing."""
        found, missing = _apart(self.csvs(number, stem))
        return together(found, len(self.methods_of(number)) > 1), missing

    def frames(self, name) -> tuple[dict, list[str]]:
        """{(model, method): a saved frame of FRAMES}, and what is missing."""
        return _apart(
            self.read_all(FRAMES[name], lambda model, method: self.frame(model, method, name))
        )

    def label(self, model, method) -> str:
        return f"{paths.label(model)} {method}" if len(self.downstream) > 1 else paths.label(model)


def _apart(results: dict) -> tuple[dict, list[str]]:
    """What is there, and a text on each thing that is missing."""
    missing = {pair: why for pair, why in results.items() if isinstance(why, Missing)}
    return (
        {pair: found for pair, found in results.items() if pair not in missing},
        [f"{_name(pair)}: {why}" for pair, why in missing.items()],
    )


def _name(pair) -> str:
    """A (model, method) in words; the method may be None."""
    return " ".join(filter(None, [paths.label(pair[0]), pair[1]]))


def together(found: dict, methods=True) -> pd.DataFrame:
    """{(model, method): frame} as one frame, with the model and, if asked for, the method in its
    first columns."""
    parts = [
        pd.DataFrame(
            {"model": paths.label(model), **({"method": method} if methods else {})},
            index=frame.index,
        ).join(frame)
        for (model, method), frame in found.items()
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def inventory(run: Run) -> pd.DataFrame:
    """The paper's 13 experimental settings for every model: number, section, setting, shown in,
    notebook, file, model, status. The paper counts them (times 3 models: 39) without listing them;
    `paper_values.json` has our list."""
    rows = []
    for number, (section, setting, notebook, where, stem, keys) in enumerate(
        paper()["settings"], 1
    ):
        for (model, method), table in run.csvs(notebook, stem).items():
            if isinstance(table, Missing):
                status = f"missing: {table}"
            else:
                absent = [
                    value for column, value in keys.items() if not (table[column] == value).any()
                ]
                status = f"missing: {stem} has no {absent[0]}" if absent else "present"
            rows.append(
                {
                    "setting": number,
                    "section": section,
                    "what": setting,
                    "shown in": where,
                    "notebook": NOTEBOOKS[notebook],
                    "model": paths.label(model),
                    "method": method or keys.get("method", ""),
                    "file": f"{paths.slug(model)}/{method or 'all'}/{stem}.csv",
                    "status": status,
                }
            )
    return pd.DataFrame(rows)


def work(run: Run) -> pd.DataFrame:
    """Every notebook that was run: model, method, data, facts, device, dtype, seconds, units of
    work, when and how."""
    rows = []
    for model, number in product(run.models, NOTEBOOKS):
        for method in run.methods_of(number):
            with suppress(Missing):
                entry = run.entry(number, model, method)
                done = entry["work"].values()
                rows.append(
                    {
                        "model": paths.label(model),
                        "notebook": NOTEBOOKS[number],
                        "method": method or "all",
                        "data": Path(entry["parameters"]["data"]).name,
                        "facts": entry["facts"],
                        **{"scanned": n["scanned"] for n in entry.get("known_facts", {}).values()},
                        "device": entry["model"].get("device", "–"),
                        "dtype": entry["model"].get("dtype", "–"),
                        "seconds": entry["seconds"],
                        "units": sum(one["units"] for one in done),
                        "computed": sum(one["computed"] for one in done),
                        "finished": entry["finished"],
                    }
                )
    return pd.DataFrame(rows)


# --- what the controls need beside the queries ----------------------------------------------------


def query_outcomes(run: Run, model, method) -> dict[str, pd.DataFrame]:
    """{name: frame with fact, prompt_index, value}: what was measured a query beside CS2, as far as
    it was run. Gen has a row a known neighbour of the query that was `edited`."""
    found, columns = {}, ["fact", "prompt_index", "edited", "value"]
    with suppress(Missing):
        groups = dict(list(run.frame(model, method, "queries").groupby("fact", sort=False)))
        edits = run.frame(model, method, "edits")
        edits = edits[
            (edits["neurons"] == "local") & (edits["control"] == "none") & edits["note"].isna()
        ]
        for name, op in (("Gen of a local erasure", "erase"), ("Gen of a local update", "update")):
            rows = []
            for fact, prompt, reached in edits.loc[
                edits["op"] == op, ["fact", "prompt", "reached"]
            ].itertuples(index=False):
                known = groups[fact][["prompt_index", "prompt"]].assign(value=reached)[
                    groups[fact]["known"].to_numpy(bool)
                ]
                own = (
                    known["prompt"] == prompt
                )  # nowhere, where the edited query is not known: then it has no Gen
                rows += [
                    (fact, at, known.loc[own, "prompt_index"].item(), value)
                    for at, value in known.loc[~own, ["prompt_index", "value"]].itertuples(
                        index=False
                    )
                    if own.any()
                ]
            found[name] = pd.DataFrame(rows, columns=columns)
        gaps = query_gaps(run.frame(model, method, "query_kn_mapping"), "self")
        found["dProb of own KNs"] = gaps.rename(columns={"gap": "value"})[
            ["fact", "prompt_index", "value"]
        ]
    return found


def other_neurons(run: Run, seed=0) -> tuple[pd.DataFrame, list[str]]:
    """Trimmed mean dProb (both directions averaged) of every set that notebook 04 scales, by
    class; all queries."""
    found, missing = run.frames("query_kn_mapping")
    for pair, frame in found.items():
        table, columns = (
            summary(frame, SET_ORDER, directions=("average",), populations=("all",), seed=seed),
            {},
        )
        for (threshold, name), part in table.groupby(["threshold", "class"], sort=False):
            part, label = part.set_index("set"), f"K_{name}, {threshold}"
            columns |= {f"{label}{end}": part[f"trimmed{end}"] for end in ("", "_low", "_high")}
            columns |= {f"n_{label}": part["n"], f"n_facts_{label}": part["n_facts"]}
        found[pair] = pd.DataFrame(columns).reset_index()
    return together(found), missing


# --- showing --------------------------------------------------------------------------------------


def keep(study, frame, stem, caption, missing=(), digits=2) -> HTML:
    """Write a table of the report, unless there is nothing in it, and show it with what is
    missing."""
    if len(frame):
        study.table(frame, stem, caption, digits=digits)
    return shown(frame, missing, digits=digits)


def edit_table(frame: pd.DataFrame, threshold: str, missing=()) -> HTML:
    """The rows of Table 2 or 3 of one split of the facts, without the controls, and the columns to
    read first."""
    if len(frame):
        frame = frame[
            (frame["threshold"] == threshold) & ~frame["neurons"].str.contains("(", regex=False)
        ]
        counts = [f"n_{metric}" for metric in ("rel", "gen", "loc", "avg")]
        first = ("model", "method", "op", "neurons", "class", "n", *counts, "neurons_edited")
        first = [name for name in first if name in frame]
        numbers = [
            f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high", "_paper")
        ]
        frame = frame.sort_values("op", kind="stable")[
            first + [name for name in numbers if name in frame]
        ]
    return shown(frame, missing, f"{threshold.title()} threshold")


def notes(table, models) -> HTML:
    """What is known about misprints in a table of the paper, where its values stand beside ours."""
    found = dict.fromkeys(note for model in models for note in paper_notes(table, model))
    return HTML(
        "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in found) + "</ul>"
        if found
        else ""
    )


def show_pictures(run: Run, number, stem) -> None:
    """The PNGs of a figure of every model under one another, each named, and what is missing."""
    found, missing = _apart(
        run.read_all(number, lambda *pair: run.file(number, f"{stem}.png", *pair))
    )
    for pair, path in found.items():
        display(
            HTML(f"<p><b>{html.escape(_name(pair))}</b></p>"),
            Image(data=path.read_bytes(), width=760),
        )
    display(HTML(missing_html(missing)))


def figure_4(run: Run, threshold="static", seed=0):
    """dProb of a query's own and its neighbours' KNs (trimmed mean), a row of panels a direction,
    a column a model; all queries, and beside them the known ones.

    Returns the figure (None where nothing was run), the plotted numbers and what is missing."""
    found, missing = run.frames("query_kn_mapping")
    parts = [
        summary(frame, PAPER_SETS, thresholds=(threshold,), seed=seed).assign(
            model=run.label(*pair)
        )
        for pair, frame in found.items()
    ]
    return *_bars(parts, "direction", "set", "dProb, "), missing


def figure_6(run: Run, threshold="static", seed=0):
    """dValue and dProb of scaling a query's own synapses S and those of an irrelevant query, as
    `figure_4`."""
    found, missing = run.frames("knowledge_synapses")
    parts, short = (
        [],
        {"self": "S", "irrelevant": "S_ir", "enhance": "enh", "suppress": "sup", "average": "avg"},
    )
    for (pair, frame), (name, quantity) in product(
        found.items(), (("dValue", "value"), ("dProb", "probability"))
    ):
        rows = frame[(frame["quantity"] == quantity) & ~frame["renormalise"].astype(bool)]
        part = summary(rows, ("self", "irrelevant"), thresholds=(threshold,), seed=seed)
        part["scaled"] = part["set"].map(short) + "\n" + part["direction"].map(short)
        parts.append(part.assign(model=run.label(*pair), quantity=name))
    return *_bars(parts, "quantity", "scaled"), missing


def _bars(parts, row, x, ylabel=""):
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return (
        figure_bars(frame, row=row, column="model", x=x, ylabel=ylabel) if parts else None
    ), frame


def averages(plotted: pd.DataFrame) -> str:
    """Sentences that read Figure 4 or 6: trimmed means of both directions, a line a model,
    quantity, class and queries counted (all or known) with facts; "–" where there are too few for
    an interval."""
    if plotted.empty:
        return ""
    lines, names = (
        [],
        [name for name in ("model", "quantity", "class", "queries") if name in plotted],
    )
    plotted = plotted[(plotted["direction"] == "average") & (plotted["n"] > 0)]
    for keys, rows in plotted.groupby(names, sort=False):
        told = rows["trimmed"].where(rows["trimmed_low"].notna())
        values = ", ".join(
            f"{name} {format_value(value, digits=3)}" for name, value in zip(rows["set"], told)
        )
        counts = f"{rows['n'].max():.0f} {keys[-1]} queries of {rows['n_facts'].max():.0f} facts"
        lines.append(f"{', '.join(keys[:-2])}, K_{keys[-2]} ({counts}): {values}")
    return "\n".join([f"{STATISTICS['trimmed']}:", *lines])


# --- the page and the figures folder --------------------------------------------------------------


def publish(notebook, output) -> list[Path]:
    """After the report notebook ran: write `report.html` into the run's folder and, for a run with
    a name of its own, copy its tables and figures to figures/<output>. Returns the files of the
    run's folder that were made."""
    root = paths.run_folder(output)
    page = export_html(notebook, root / "report.html")
    if output != "default":
        copy_results(root / "results", paths.figures_folder(output))
    return [page]


def copy_results(results, folder) -> None:
    """The tables and figures under `results` as they are, in their folders, listed in
    `published.txt`. Of what the last such list names, that which is gone is removed; nothing else
    is."""
    results, folder = Path(results), Path(folder)
    kinds, listed = (".csv", ".md", ".tex", ".png", ".pdf"), folder / "published.txt"
    wanted = {
        path.relative_to(results).as_posix() for path in results.rglob("*") if path.suffix in kinds
    }
    for old in set(listed.read_text("utf-8").splitlines() if listed.is_file() else ()) - wanted:
        if (
            folder.resolve() in (folder / old).resolve().parents
        ):  # the list may have been written by another hand
            (folder / old).unlink(missing_ok=True)
    write_bytes(listed, "".join(f"{name}\n" for name in sorted(wanted)).encode())
    for name in sorted(wanted):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results / name, folder / name)
