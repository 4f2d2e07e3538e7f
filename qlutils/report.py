"""All models and methods of a run together: what is there, what is missing, tables, figures, claims, one HTML file.

Reads saved results only; nothing here imports torch. Whatever a run did not make is named, never an error.
"""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from matplotlib.patches import Patch

from . import paths
from .claims import THRESHOLDS, Missing, details_html, query_gaps, scoreboard_html  # noqa: F401
from .effects import figure_predominance, summary
from .page import export_html, table_html
from .plots import CLASS_COLORS, bars_with_intervals
from .study import Study
from .tables import PAPER_MODELS, display_table, paper_notes

NOTEBOOKS = {"01": "01_localize", "02": "02_consistency", "03": "03_kn_modification", "04": "04_query_kn_mapping",
             "05": "05_attention_predominance", "06": "06_knowledge_synapses", "07": "07_cas_editing"}
PAPER_SETS = ("self", "union", "intersection", "refine")
SET_ORDER = ("self", "self_random", "self_active", "union", "union_others", "union_matched", "self_as_union",
             "union_random", "intersection", "intersection_others", "intersection_matched", "self_as_intersection",
             "refine", "refine_others", "refine_matched", "self_as_refine")
COMPARES = "02"  # the notebook that compares methods: its results stand in the model's folder `all`
# The frames that claims and figures read: {name under which it was saved: notebook}.
FRAMES = {"queries": "01", "edits": "03", "query_kn_mapping": "04", "attention_predominance": "05",
          "knowledge_synapses": "06", "cas_edits": "07"}
# The paper counts 13 experimental settings (times 3 models: 39) without listing them; this is our count, in its order:
# (section, setting, notebook, table or figure, the table's rows that answer it).
SETTINGS = (
    ("2.1", "consistency, KNs by Dai et al. (ig)", "02", "Table 1, Fig. 3", "table1", {"method": "ig"}),
    ("2.1", "consistency, KNs by Enguehard (sig)", "02", "Table 1, Fig. 8", "table1", {"method": "sig"}),
    ("2.1", "consistency, KNs by Chen et al. (amig)", "02", "Table 1, Fig. 9", "table1", {"method": "amig"}),
    ("2.2", "erasure of local KNs", "03", "Table 2", "table2", {"op": "erasure", "neurons": "local"}),
    ("2.2", "update of local KNs", "03", "Table 2", "table2", {"op": "update", "neurons": "local"}),
    ("2.2", "erasure of global KNs", "03", "Table 2", "table2", {"op": "erasure", "neurons": "global"}),
    ("2.2", "update of global KNs", "03", "Table 2", "table2", {"op": "update", "neurons": "global"}),
    ("3.1", "suppressing and enhancing own and neighbours' KNs", "04", "Fig. 4", "fig4", {}),
    ("3.2.1", "predominance of the most attended token", "05", "Fig. 5", "fig5", {}),
    ("3.2.2", "synapses: KN activation", "06", "Figs. 6, 7, 10", "fig6", {}),
    ("3.2.2", "synapses: answer probability", "06", "Fig. 6", "fig6", {}),
    ("3.3", "erasure with CAS", "07", "Table 3", "table3", {"op": "erasure", "neurons": "cas"}),
    ("3.3", "update with CAS", "07", "Table 3", "table3", {"op": "update", "neurons": "cas"}),
)


class Run:
    """What a run saved for its models and methods, read with checks: only results made from the report's own inputs."""

    def __init__(self, study, models, methods, downstream):
        self.study, self.models, self.methods, self.downstream = study, list(models), list(methods), list(downstream)
        self._studies, self._entries, self._frames = {}, {}, {}

    def of(self, model, method=None) -> Study:
        """The study of a model and method, with the report's parameters; for what it saved and for new units."""
        key = model, method
        if key not in self._studies:
            given = {**self.study.parameters, "model": model, "method": method}
            self._studies[key] = Study(self.study.notebook, **given)
        return self._studies[key]

    def methods_of(self, number) -> list:
        return {"01": self.methods, COMPARES: [None]}.get(number, self.downstream)

    def entry(self, number, model, method=None) -> dict:
        """The record of a notebook; `Missing` where it was not run, or on other facts, model or settings."""
        key = number, model, method
        if key not in self._entries:
            try:
                self._entries[key] = self._read_entry(*key)
            except Missing as missing:
                self._entries[key] = missing
        if isinstance(self._entries[key], Missing):
            raise self._entries[key]
        return self._entries[key]

    def _read_entry(self, number, model, method):
        notebook = NOTEBOOKS[number]
        try:
            study = self.of(model, method)
            inputs = study.inputs()
            entry = json.loads((study.results / "run.json").read_text(encoding="utf-8"))[notebook]
        except (OSError, KeyError, ValueError) as error:
            why = str(error) if type(error) is ValueError else f"notebook {number} was not run"
            raise Missing(why) from None
        differ = [name for name, ours in inputs.items() if entry["inputs"].get(name) != ours]
        if differ:
            raise Missing(f"notebook {number} was run with other {', '.join(differ)}")
        return entry

    def frame(self, model, method, name) -> pd.DataFrame:
        """A saved frame of FRAMES; `Missing` says why there is none."""
        number = FRAMES[name]
        key = model, method, name
        if key not in self._frames:
            if name != "queries":
                self.entry(number, model, method)
            try:
                self._frames[key] = self.of(model, method).load(name)
            except ValueError as error:
                why = f"notebook {number} was not run" if "not made yet" in str(error) else str(error)
                raise Missing(why) from None
        return self._frames[key]

    def csv(self, number, stem, model, method=None) -> pd.DataFrame:
        """A table or a figure's numbers that a notebook wrote."""
        self.entry(number, model, method)
        path = self.of(model, method).results / f"{stem}.csv"
        if not path.is_file():
            raise Missing(f"notebook {number} wrote no {stem}")
        return pd.read_csv(path)

    def table(self, number, stem) -> tuple[pd.DataFrame, list[str]]:
        """A notebook's table of all models (and downstream methods) under one another, and what is missing."""
        parts, missing = [], []
        for model in self.models:
            for method in self.methods_of(number):
                try:
                    frame = self.csv(number, stem, model, method)
                    first = {"model": model} | ({"method": method} if method and len(self.downstream) > 1 else {})
                    parts.append(pd.concat([pd.DataFrame([first] * len(frame)), frame], axis=1))
                except Missing as why:
                    missing.append(f"{_who(model, method)}: {why}")
        return (pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()), missing

    def frames(self, name, methods=None) -> tuple[dict, list[str]]:
        """{(model, method): frame} of what is there, and what is missing."""
        found, missing = {}, []
        for model in self.models:
            for method in methods or (self.methods if name == "queries" else self.downstream):
                try:
                    found[model, method] = self.frame(model, method, name)
                except Missing as why:
                    missing.append(f"{_who(model, method)}: {why}")
        return found, missing

    def pictures(self, number, stem) -> tuple[dict, list[str]]:
        """{(model, method): PNG file} of a figure that is drawn for each model, and what is missing."""
        found, missing = {}, []
        for model in self.models:
            for method in self.methods_of(number):
                try:
                    self.entry(number, model, method)
                    path = self.of(model, method).results / f"{stem}.png"
                    if not path.is_file():
                        raise Missing(f"notebook {number} drew no {stem}")
                    found[model, method] = path
                except Missing as why:
                    missing.append(f"{_who(model, method)}: {why}")
        return found, missing


def _who(model, method):
    return " ".join(filter(None, [model, method]))


# --- what was run -----------------------------------------------------------------------------------------

def inventory(run: Run) -> pd.DataFrame:
    """The paper's 13 settings for every model: number, section, setting, shown in, notebook, file, model, status."""
    rows = []
    for number, (section, setting, notebook, shown, stem, keys) in enumerate(SETTINGS, 1):
        for model in run.models:
            for method in run.methods_of(notebook):
                try:
                    frame = run.csv(notebook, stem, model, method)
                    for column, value in keys.items():
                        if column not in frame or not (frame[column] == value).any():
                            raise Missing(f"{stem} has no {value}")
                    status = "present"
                except Missing as why:
                    status = f"missing: {why}"
                rows.append({"setting": number, "section": section, "what": setting, "shown in": shown,
                             "notebook": NOTEBOOKS[notebook], "model": model,
                             "method": method or keys.get("method", ""),
                             "file": f"{paths.slug(model)}/{method or 'all'}/{stem}.csv", "status": status})
    return pd.DataFrame(rows)


def work(run: Run) -> pd.DataFrame:
    """Every notebook that was run: model, method, data, facts, device, dtype, seconds, units of work, when and how."""
    rows = []
    for model in run.models:
        for number in NOTEBOOKS:
            for method in run.methods_of(number):
                try:
                    entry = run.entry(number, model, method)
                except Missing:
                    continue
                given, done = entry["parameters"], entry.get("work", {}).values()
                rows.append({"model": model, "notebook": NOTEBOOKS[number], "method": method or "all",
                             "data": Path(str(given.get("data"))).name, "facts": entry["facts"],
                             "device": entry["model"].get("device", "–"), "dtype": entry["model"].get("dtype", "–"),
                             "seconds": entry["seconds"], "units": sum(one["units"] for one in done),
                             "computed": sum(one["computed"] for one in done), "finished": entry["finished"]})
    return pd.DataFrame(rows)


def localisation_spec(run: Run, model, method) -> dict:
    """The choices with which a model's neurons were localised, as `attribution.Spec` takes them."""
    given = run.entry("01", model, method)["parameters"]
    return {name: given[name] for name in ("steps", "rule", "answer", "site", "amig_factor") if name in given}


def num_neurons(run: Run, model, queries, load=True) -> int:
    """MLP neurons a layer: the model's own number, or (not loaded) the largest index among its scores plus one."""
    if load:
        return run.of(model).lm().num_neurons
    return 1 + max(int(max(neurons)) for neurons in queries["neuron"] if len(neurons))


def query_outcomes(run: Run, model, method) -> dict[str, pd.DataFrame]:
    """{name: frame with fact, prompt_index, value}: what was measured a query beside CS2, as far as it was run."""
    found = {}
    try:
        place = run.frame(model, method, "queries").set_index(["fact", "prompt"])["prompt_index"]
        edits = run.frame(model, method, "edits")
        edits = edits[(edits["neurons"] == "local") & (edits["control"] == "none")].join(place, on=["fact", "prompt"])
        for name, op in (("Gen of a local erasure", "erase"), ("Gen of a local update", "update")):
            part = edits[edits["op"] == op]
            found[name] = part[["fact", "prompt_index"]].assign(value=part["gen"])
    except Missing:
        pass
    try:
        gaps = query_gaps(run.frame(model, method, "query_kn_mapping"), "self", PAPER_SETS[1:])
        found["dProb, own less neighbours'"] = gaps[["fact", "prompt_index"]].assign(value=gaps["gap"])
    except Missing:
        pass
    return found


def other_neurons(run: Run, seed=0) -> tuple[pd.DataFrame, list[str]]:
    """Mean dProb (both directions averaged) of every set that notebook 04 scales, by class; known queries."""
    found, missing = run.frames("query_kn_mapping")
    parts = [summary(frame, tuple(dict.fromkeys(frame["set"])), directions=("average",), seed=seed)
             .assign(model=model, method=method) for (model, method), frame in found.items()]
    frame = together(parts)
    if len(frame):
        frame = frame.pivot(index=["model", "method", "set"], columns=["threshold", "class"],
                            values=["mean", "mean_low", "mean_high", "n"])
        order = [(threshold, name) for threshold in THRESHOLDS for name in ("I", "II")]
        columns = {}
        for threshold, name in order:
            label = f"K_{name}, {threshold}"
            for end in ("", "_low", "_high"):
                columns[label + end] = frame["mean" + end, threshold, name].astype(float)
            columns[f"n_{label}"] = frame["n", threshold, name]
        frame = pd.DataFrame(columns).reset_index()
        order = {name: place for place, name in enumerate([*run.models, *run.downstream, *SET_ORDER])}
        frame = frame.sort_values(["model", "method", "set"], key=lambda column: column.map(order), ignore_index=True)
    return frame, missing


def together(parts) -> pd.DataFrame:
    """Frames with columns model and method under one another, those two first."""
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    first = [name for name in ("model", "method") if name in frame]
    return frame[first + [name for name in frame if name not in first]]


def edit_table(frame: pd.DataFrame, threshold: str) -> pd.DataFrame:
    """The rows of Table 2 or 3 of one split of the facts, without the controls, and the columns to read first."""
    if frame.empty:
        return frame
    rows = frame[(frame["threshold"] == threshold) & ~frame["neurons"].str.contains("(", regex=False)]
    numbers = [name for metric in ("rel", "gen", "loc", "avg", "dppl") for name in (
        metric, f"{metric}_low", f"{metric}_high", f"{metric}_paper") if name in rows]
    names = ("model", "method", "op", "neurons", "class", "n", "neurons_edited")
    return rows.sort_values(["op"], kind="stable")[[name for name in names if name in rows] + numbers]


def keep(study, frame, stem, caption, digits=2) -> None:
    """Write a table of the report, unless there is nothing in it."""
    if len(frame):
        study.table(frame, stem, caption, digits=digits)


# --- showing ----------------------------------------------------------------------------------------------

def shown(frame: pd.DataFrame, missing=(), caption="", headers=None, digits=2):
    """A table for the page: intervals in one column, texts on the left, what is missing named below."""
    from IPython.display import HTML

    parts = [table_html(display_table(frame, headers, digits), caption)] if len(frame) else []
    return HTML("\n".join(parts + [missing_html(missing)]))


def folded(title, frame: pd.DataFrame, digits=2):
    """A table that opens when its title is clicked; nothing where it is empty."""
    from IPython.display import HTML

    table = table_html(display_table(frame, digits=digits)) if len(frame) else ""
    return HTML(f"<details><summary>{html.escape(title)}</summary>{table}</details>" if table else "")


def missing_html(missing) -> str:
    """A list of what is not there, for the report's own words."""
    if not missing:
        return ""
    return "<p>Not in this run: " + "; ".join(map(html.escape, missing)) + ".</p>"


def show_pictures(run: Run, number, stem, width=760):
    """The PNGs of a figure of every model under one another, each named, and what is missing."""
    from IPython.display import HTML, Image, display

    found, missing = run.pictures(number, stem)
    for (model, method), path in found.items():
        display(HTML(f"<p><b>{html.escape(_who(model, method))}</b></p>"), Image(data=path.read_bytes(), width=width))
    if missing:
        display(HTML(missing_html(missing)))


def figure_4(run: Run, threshold="static", seed=0):
    """dProb of a query's own and its neighbours' KNs, a row of panels a direction, a column a model; known queries.

    Returns the figure (None where nothing was run), the plotted numbers and what is missing."""
    found, missing = run.frames("query_kn_mapping")
    parts = [summary(frame, PAPER_SETS, thresholds=(threshold,), seed=seed).assign(model=_label(run, model, method))
             for (model, method), frame in found.items()]
    return _bars(parts, "direction", "set", "dProb") + (missing,)


def figure_5(run: Run):
    """Violins of predominance by model and class: by threshold (rows), with and without the first token (columns)."""
    found, missing = run.frames("attention_predominance")
    parts = [frame.assign(model=_label(run, model, method)) for (model, method), frame in found.items()]
    drawn = figure_predominance(pd.concat(parts, ignore_index=True)) if parts else (None, pd.DataFrame())
    return (*drawn, missing)


def figure_6(run: Run, threshold="static", seed=0):
    """dValue and dProb of scaling a query's own synapses S and those of an irrelevant query, as `figure_4`."""
    found, missing = run.frames("knowledge_synapses")
    parts, short = [], {"self": "S", "irrelevant": "S_ir", "enhance": "enh", "suppress": "sup", "average": "avg"}
    for (model, method), frame in found.items():
        for name, quantity in (("dValue", "value"), ("dProb", "probability")):
            rows = frame[(frame["quantity"] == quantity) & ~frame["renormalise"].astype(bool)]
            part = summary(rows, ("self", "irrelevant"), thresholds=(threshold,), seed=seed)
            part["scaled"] = part["set"].map(short) + "\n" + part["direction"].map(short)
            parts.append(part.assign(model=_label(run, model, method), quantity=name))
    return _bars(parts, "quantity", "scaled", "change") + (missing,)


def averages(plotted: pd.DataFrame) -> list[str]:
    """Sentences that read Figure 4 or 6: means of both directions, a line a model, quantity and class with facts."""
    lines = []
    part = plotted[plotted["direction"] == "average"] if len(plotted) else plotted
    names = [name for name in ("model", "quantity", "class") if name in part]
    for keys, rows in part.groupby(names, sort=False) if len(part) else ():
        if rows["n"].max() > 0:
            values = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(rows["set"], rows["mean"]))
            lines.append(f"{', '.join(keys[:-1])}, K_{keys[-1]} ({rows['n'].max():.0f} queries): {values}")
    return lines


def notes(table, models):
    """What is known about misprints in a table of the paper, where its values stand beside ours."""
    from IPython.display import HTML

    found = dict.fromkeys(note for model in models for note in paper_notes(table, model))
    return HTML("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in found) + "</ul>" if found else "")


def _label(run, model, method):
    return _who(model, method) if len(run.downstream) > 1 else model


def _bars(parts, rows, x, label):
    if not parts:
        return None, pd.DataFrame()
    frame = pd.concat(parts, ignore_index=True)
    levels, models = list(dict.fromkeys(frame[rows])), list(dict.fromkeys(frame["model"]))
    fig, axes = plt.subplots(len(levels), len(models), figsize=(7, 1.6 * len(levels) + 0.4), squeeze=False, sharex=True,
                             sharey="row")
    for place, (row, level) in enumerate(zip(axes, levels)):
        for ax, model in zip(row, models):
            bars_with_intervals(frame[(frame[rows] == level) & (frame["model"] == model)], ax, x=x, hue="class")
            ax.set_ylabel(f"{label}, {level}" if ax is row[0] and label != "change" else level if ax is row[0] else "")
            ax.get_legend().remove()
            if place == 0:
                ax.set_title(model, loc="left", pad=14)
    axes[0, -1].legend(handles=[Patch(color=color, label=f"$K_{{{name}}}$") for name, color in CLASS_COLORS.items()],
                       loc="upper right", ncols=2)
    return fig, frame


# --- the page and the figures folder ----------------------------------------------------------------------

def publish(notebook, output) -> list[Path]:
    """After the report notebook ran: write `report.html` into the run's folder and, for a run with a name of its
    own, copy its tables and figures to figures/<output>. Returns the files of the run's folder that were made."""
    root = paths.run_folder(output)
    page = export_html(notebook, root / "report.html")
    if output != "default":
        copy_results(root / "results", paths.figures_folder(output))
    return [page]


def copy_results(results, folder) -> None:
    """The tables and figures under `results` as they are, in their folders; copies of what is gone are removed."""
    results, folder = Path(results), Path(folder)
    kinds = (".csv", ".md", ".tex", ".png", ".pdf")
    wanted = {path.relative_to(results) for path in results.rglob("*") if path.suffix in kinds}
    for old in [path for path in folder.rglob("*") if path.suffix in kinds]:
        if old.relative_to(folder) not in wanted:
            old.unlink()
    for name in sorted(wanted):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results / name, folder / name)


def paper_models(models) -> str:
    """A sentence on which of the models are the paper's."""
    ours = [model for model in models if model in PAPER_MODELS]
    return f"{len(ours)} of the {len(models)} models are the paper's; only beside those stand its values."
