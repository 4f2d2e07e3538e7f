"""All models and methods of a run together: what is there, what is missing, and its tables and
figures side by side.

Reads saved results only; nothing here imports torch. Whatever a run did not make is named, never an
error.
"""

import html
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd
from IPython.display import HTML, Image, display

from qlutils import paths
from qlutils.experiments import controls
from qlutils.experiments.claims import QUANTITIES, synapse_rates
from qlutils.experiments.edit_tables import PAPER_OP, of_neurons
from qlutils.experiments.effects import FIGURE_4_DRAWN, query_gaps, summary
from qlutils.files import write_bytes
from qlutils.show.page import export_html, folded, missing_html, shown
from qlutils.show.plots import figure_bars
from qlutils.show.tables import paper, paper_notes
from qlutils.study.identity import differing
from qlutils.study.results import Missing, read_record

NOTEBOOKS = {  # by number; `paths.NOTEBOOKS` is their folder
    "01": "01_localize",
    "02": "02_consistency",
    "03": "03_kn_modification",
    "04": "04_query_kn_mapping",
    "05": "05_attention_predominance",
    "06": "06_knowledge_synapses",
    "07": "07_cas_editing",
}
# What the report and a notebook must have in common, where the notebook has it.
SETTINGS = ("t", "static_threshold", "middle")
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


@dataclass
class SavedResults:
    """What a run saved for its models and methods, read with checks: only results made from the
    report's own inputs. `downstream`: the methods of notebooks 03 to 07."""

    study: object
    models: list
    methods: list
    downstream: list

    def __post_init__(self):
        # each is read once
        self.of = cache(self.of)
        self.entry = cache(self.entry)
        self.frame = cache(self.frame)

    def of(self, model, method=None):
        """The study of a model and method, with the report's parameters; for what it saved and for
        new units."""
        return self.study.beside(model, method=method)

    def entry(self, number, model, method=None):
        """The record of a notebook; `Missing` where it was not run, or on other facts, model or
        settings."""
        study = self.of(model, method)
        try:
            inputs = study.inputs()
        except ValueError as error:
            raise Missing(str(error)) from None
        entry = read_record(study.results / "run.json").get(NOTEBOOKS[number])
        if entry is None:
            raise Missing(f"notebook {number} was not run")
        theirs = entry["parameters"]
        settings = {name: study.parameters.get(name) for name in SETTINGS if name in theirs}
        if differ := differing(inputs, entry["inputs"]) + differing(settings, theirs):
            raise Missing(f"notebook {number} was run with other {', '.join(differ)}")
        return entry

    def frame(self, model, method, name):
        """A saved frame of FRAMES; `Missing` says why there is none."""
        self.entry(FRAMES[name], model, method)
        return self.of(model, method).load(name)

    def file(self, number, name, model, method=None):
        """A table or figure that a notebook wrote."""
        self.entry(number, model, method)
        path = self.of(model, method).results / name
        if not path.is_file():
            raise Missing(f"notebook {number} wrote no {name}")
        return path

    def read_table(self, number, stem, model, method=None):
        # what is text stays text: a relation 007, an answer NA
        texts = dict.fromkeys(("relation", "meaning", "example query", "answer"), str)
        file = self.file(number, f"{stem}.csv", model, method)
        return pd.read_csv(file, dtype=texts, keep_default_na=False, na_values=[""])

    def methods_of(self, number):
        return {"01": self.methods, paths.COMPARES: [None]}.get(number, self.downstream)

    def read_all(self, number, read, *what):
        """{(model, method): read(number, *what, model, method)} of all that notebook `number` runs
        for, and of which it is `Missing`, and why."""
        found = {}
        missing = []
        for model, method in product(self.models, self.methods_of(number)):
            try:
                found[model, method] = read(number, *what, model, method)
            except Missing as error:
                missing.append(f"{_name(model, method)}: {error}")
        return found, missing

    def table(self, number, stem):
        """A notebook's table of all models (and methods, if several) under one another, and what is
        missing."""
        found, missing = self.read_all(number, self.read_table, stem)
        return together(found, len(self.methods_of(number)) > 1), missing

    def frames(self, name):
        """{(model, method): a saved frame of FRAMES}, and what is missing."""
        return self.read_all(FRAMES[name], lambda _, *pair: self.frame(*pair, name))

    def label(self, model, method):
        return _name(model, method if len(self.downstream) > 1 else None)


def _name(model, method):
    """A model and method in words; the method may be None."""
    return " ".join(filter(None, [paths.label(model), method]))


def together(found, methods=True):
    """{(model, method): frame} as one frame, with the model and, if asked for, the method in its
    first columns."""
    parts = []
    for (model, method), frame in found.items():
        parts.append(frame.copy())
        if methods:
            parts[-1].insert(0, "method", method)
        parts[-1].insert(0, "model", paths.label(model))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def inventory(saved):
    """The paper's 13 experimental settings for every model: number, section, setting, shown in,
    notebook, file, model, status. The paper counts them (times 3 models: 39) without listing them;
    `paper_values.json` has our list."""
    rows = []
    for number, setting in enumerate(paper()["settings"], 1):
        section, what, notebook, where, stem, keys = setting
        for model, method in product(saved.models, saved.methods_of(notebook)):
            status = "present"
            try:
                table = saved.read_table(notebook, stem, model, method)
                for column, value in keys.items():
                    if value not in set(table[column]):
                        status = f"missing: {stem} has no {value}"
            except Missing as error:
                status = f"missing: {error}"
            rows.append(
                {
                    "setting": number,
                    "section": section,
                    "what": what,
                    "shown in": where,
                    "notebook": NOTEBOOKS[notebook],
                    "model": paths.label(model),
                    "method": method or keys.get("method", ""),
                    "file": f"{paths.slug(model)}/{method or 'all'}/{stem}.csv",
                    "status": status,
                }
            )
    return pd.DataFrame(rows)


def work(saved):
    """Every notebook that was run: model, method, data, facts, device, dtype, seconds, units of
    work, when and how."""
    rows = []
    for model, number in product(saved.models, NOTEBOOKS):
        for method in saved.methods_of(number):
            with suppress(Missing):
                entry = saved.entry(number, model, method)
                row = {
                    "model": paths.label(model),
                    "notebook": NOTEBOOKS[number],
                    "method": method or "all",
                    "data": Path(entry["parameters"]["data"]).name,
                    "facts": entry["facts"],
                }
                for counts in entry.get("known_facts", {}).values():
                    row["scanned"] = counts["scanned"]
                for name in ("device", "dtype"):
                    row[name] = entry["model"].get(name, "–")
                row["seconds"] = entry["seconds"]
                for name in ("units", "computed"):
                    row[name] = sum(done[name] for done in entry["work"].values())
                row["finished"] = entry["finished"]
                rows.append(row)
    return pd.DataFrame(rows)


def unlike_html(saved):
    """A sentence on the parameters with which a notebook was not run for all models and methods
    alike, as its rows are then no fair comparison; nothing where all is."""
    told = []
    for number in NOTEBOOKS:
        entries, _ = saved.read_all(number, saved.entry)
        given = {_name(*pair): entry["parameters"] for pair, entry in entries.items()}
        given = pd.DataFrame(given).astype(str).drop(["model", "method", "models"], errors="ignore")
        for name, values in given[given.nunique(axis=1) > 1].iterrows():
            groups = values.index.groupby(values)
            each = [f"{value} ({', '.join(who)})" for value, who in groups.items()]
            told.append(f"notebook {number} with {name} {' and '.join(each)}")
    return f"<p>Run with unlike settings: {html.escape('; '.join(told))}.</p>" if told else ""


# --- controls -------------------------------------------------------------------------------------


def null_groups(saved, t, seed, load_models):
    """Control 1 of every model and method. Without `load_models`, a layer is taken to have as many
    neurons as the largest index among the KNs says."""
    found, _ = saved.frames("queries")
    for (model, method), frame in found.items():
        size = saved.of(model).lm().num_neurons if load_models else None
        groups = controls.null_consistency(frame, size, t, seed)
        found[model, method] = controls.summarise(groups, seed=seed)
    return together(found).replace({"kind": controls.NULLS})


def query_outcomes(saved, model, method):
    """{name: frame with fact, prompt_index, value}: what was measured a query beside CS2, as far as
    it was run. Gen has a row a known neighbour of the query that was `edited`."""
    found = {}
    with suppress(Missing):
        queries = saved.frame(model, method, "queries")
        edits = of_neurons(saved.frame(model, method, "edits"))
        for op, name in PAPER_OP.items():
            own = edits[(edits["neurons"] == "local") & (edits["op"] == op)]
            found[f"Gen of a local {name}"] = _reached(own, queries)
        gaps = query_gaps(saved.frame(model, method, "query_kn_mapping"), "self")
        found["dProb of own KNs"] = gaps.rename(columns={"gap": "value"})
    return found


def _reached(edits, queries):
    """Whether each edit (one a fact) reached the fact's other known queries: `reached` has a value
    for each of its queries, in their order. An edited query that is not known has no Gen."""
    known = queries.loc[queries["known"].astype(bool), ["fact", "prompt", "prompt_index"]]
    edited = known.rename(columns={"prompt_index": "edited"})
    every = queries.groupby("fact")["prompt_index"].agg(list)
    each = edits.merge(edited, on=["fact", "prompt"]).join(every, on="fact")
    each = each.explode(["reached", "prompt_index"]).astype({"prompt_index": int})
    each = each[["fact", "prompt_index", "edited", "reached"]]
    each = each.merge(known[["fact", "prompt_index"]]).rename(columns={"reached": "value"})
    return each[each["edited"] != each["prompt_index"]].astype({"value": float})


def other_neurons(saved, seed):
    """Trimmed mean dProb (both directions averaged) of every set that notebook 04 scales, by
    class; all queries."""
    found, missing = saved.frames("query_kn_mapping")
    few = dict(directions=("average",), populations=("all",), seed=seed)
    for pair, frame in found.items():
        table = summary(frame, frame["set"].unique(), **few)
        parts = []
        for (threshold, name), part in table.groupby(["threshold", "class"], sort=False):
            label = f"K_{name}, {threshold}"
            names = {
                "trimmed": label,
                "trimmed_low": f"{label}_low",
                "trimmed_high": f"{label}_high",
                "n": f"n_{label}",
                "n_facts": f"n_facts_{label}",
            }
            parts.append(part.set_index("set")[list(names)].rename(columns=names))
        found[pair] = pd.concat(parts, axis=1).reset_index()
    return together(found), missing


# --- showing --------------------------------------------------------------------------------------


def write_and_show(study, frame, stem, caption, missing=(), digits=2):
    """Write a table of the report, unless there is nothing in it, and show it with what is
    missing."""
    if len(frame):
        study.table(
            frame,
            stem,
            caption,
            digits=digits,
        )
    return shown(frame, missing, digits=digits)


def show_edits(frame, missing):
    """Table 2 or 3 by the static threshold and by Otsu's, without the controls, and folded below
    every row and column."""
    parts = []
    for threshold in ("static", "otsu") if len(frame) else ():
        own = frame[frame["threshold"] == threshold].sort_values("op", kind="stable")
        own = own[~own["neurons"].str.contains("(", regex=False)]
        own = own.drop(columns=["threshold", "n_empty", "dppl_mean"])
        parts.append(shown(own, caption=f"{threshold.title()} threshold").data)
    parts.append(folded("Every row, with random neurons as a control", frame))
    return HTML("\n".join([*parts, missing_html(missing)]))


def misprints(table, models):
    """What is known about misprints in a table of the paper, where its values stand beside ours."""
    found = dict.fromkeys(note for model in models for note in paper_notes(table, model))
    items = "".join(f"<li>{html.escape(note)}</li>" for note in found)
    return HTML(f"<ul>{items}</ul>" if found else "")


def show_pictures(saved, number, stem):
    """The PNGs of a figure of every model under one another, each named, and what is missing."""
    found, missing = saved.read_all(number, saved.file, f"{stem}.png")
    for pair, path in found.items():
        name = HTML(f"<p><b>{html.escape(_name(*pair))}</b></p>")
        display(name, Image(data=path.read_bytes(), width=900))
    display(HTML(missing_html(missing)))


def show_figure_4(saved, stem, threshold="static", seed=0):
    """ΔProb of a query's own and its neighbours' KNs and of random neurons (trimmed mean), a row
    of panels a direction, a column a model; all queries, and beside them the known ones."""
    return _show_bars(
        saved,
        stem,
        "query_kn_mapping",
        FIGURE_4_DRAWN,
        threshold,
        seed,
        row="direction",
        control="as many random neurons",
    )


def show_figure_6(saved, stem, threshold="static", seed=0):
    """ΔValue and ΔProb of scaling a query's own synapses S and, hollow, those of an irrelevant
    query, by direction, else as Figure 4."""
    return _show_bars(
        saved,
        stem,
        "knowledge_synapses",
        ("self", "irrelevant"),
        threshold,
        seed,
        quantities=QUANTITIES.values(),
        row="quantity",
        x="direction",
        control="synapses of an irrelevant query",
    )


def _show_bars(saved, stem, name, sets, threshold, seed, *, quantities=(None,), **panels):
    """Draw and keep the figure of all frames saved under `name`, of each of their quantities if
    they have several; below it, folded, its numbers and what is missing."""
    found, missing = saved.frames(name)
    tables = []
    for (pair, frame), quantity in product(found.items(), quantities):
        about = {"quantity": quantity} if quantity else {}
        rows = synapse_rates(frame, **about) if about else frame
        table = summary(rows, sets, thresholds=(threshold,), seed=seed)
        tables.append(table.assign(model=saved.label(*pair), **about))
    numbers = ""
    if tables:
        plotted = pd.concat(tables, ignore_index=True)
        saved.study.figure(figure_bars(plotted, column="model", **panels), stem, plotted)
        numbers = folded("Means, medians and trimmed means", plotted, digits=3)
    return HTML(f"{numbers}\n{missing_html(missing)}")


# --- the page and the figures folder --------------------------------------------------------------


def publish(notebook, output):
    """After the report notebook ran: write `report.html` into the run's folder and, for a run with
    a name of its own, copy its tables and figures to figures/<output>. Returns the files of the
    run's folder that were made."""
    root = paths.run_folder(output)
    page = export_html(notebook, root / "report.html")
    if output != "default":
        copy_results(root / "results", paths.figures_folder(output))
    return [page]


def copy_results(results, folder):
    """The tables and figures under `results` as they are, in their folders, listed in
    `published.txt`. Of what the last such list names, that which is gone is removed; nothing else
    is."""
    folder = folder.resolve()
    listed = folder / "published.txt"
    kinds = [".csv", ".md", ".tex", ".png", ".pdf"]
    made = [path for path in results.rglob("*") if path.suffix in kinds]
    names = sorted(path.relative_to(results).as_posix() for path in made)
    before = listed.read_text("utf-8").splitlines() if listed.is_file() else []
    for old in set(before) - set(names):
        path = (folder / old).resolve()
        if path.is_relative_to(folder):  # the list may have been written by another hand
            path.unlink(missing_ok=True)
    write_bytes(listed, "".join(f"{name}\n" for name in names).encode())
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results / name, folder / name)
