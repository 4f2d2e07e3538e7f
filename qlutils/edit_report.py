"""Tables 2 and 3, their figure and comparisons, and one edited fact to be read."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd

from .edit_study import Book, PlannedFact
from .stats import bootstrap_difference, bootstrap_mean
from .tables import paper_value

SETS = ("local", "global", "cas")
METRICS = ("rel", "gen", "loc", "avg", "dppl")
SET_COLORS = {"local": "#CC6677", "global": "#882255", "cas": "#117733"}
PAPER_OP = {"erase": "erasure", "update": "update"}


def edit_table(frame, classes, model, *, table=2, sets=("local", "global"), controls=("random",), seed=0):
    """Table 2 or 3: a row a split of the facts, operation and neuron set; its random control right below it.

    classes: a frame with fact, class_static, class_otsu. Rel, Gen, Loc, Avg and dPPL are means over edits
    with 95 % intervals (facts resampled within relations); dppl_median beside the mean; n edits, of which
    n_rel and n_gen have a defined Rel and Gen; n_empty had no neurons to edit. Classes without a fact show n
    = 0. Columns ending in _paper hold the paper's values, for its models and methods; they are left out for
    others."""
    classes = classes[["fact", "class_static", "class_otsu"]]
    frame = frame[frame["note"].isna()].merge(classes, on="fact", how="left")
    known_sets, rows = SETS if table == 3 else SETS[:2], []
    for split, name in [("all", "all"), *((s, c) for s in ("static", "otsu") for c in ("I", "II"))]:
        part = frame if split == "all" else frame[frame[f"class_{split}"] == name]
        for op, neurons, control in product(PAPER_OP, sets, ("none", *controls)):
            chosen = part[(part[["op", "neurons", "control"]] == [op, neurons, control]).all(axis=1)]
            label = neurons if control == "none" else f"{neurons} ({control})"
            keys = {"threshold": split, "class": name, "op": PAPER_OP[op], "neurons": label}
            rows.append(_table_row(chosen, keys, seed))
            if control == "none" and split == "static" and neurons in known_sets:
                keys = dict(operation=PAPER_OP[op], neurons=neurons, class_=name)
                rows[-1] |= {f"{name}_paper": paper_value(table, model, name, **keys) for name in METRICS}
    frame = pd.DataFrame(rows)
    empty = [name for name in frame if name.endswith("_paper") and frame[name].isna().all()]
    return frame.drop(columns=empty)


def _table_row(part, keys, seed) -> dict:
    row = {**keys, "n": len(part), "n_empty": int((part["n_neurons"] == 0).sum()),
           "neurons_edited": part["n_neurons"].mean() if len(part) else np.nan}
    for metric in METRICS:
        estimate = bootstrap_mean(part, metric, seed=seed)
        row |= {k: v for k, v in estimate.row("mean", metric).items() if k != "n"}
        if metric in ("rel", "gen"):
            row[f"n_{metric}"] = estimate.n
        if metric == "dppl":
            row["dppl_median"] = estimate.median
    return row


def long_metrics(table, metrics=METRICS[:4]) -> pd.DataFrame:
    """The table with one row a metric: metric, mean, mean_low, mean_high, n beside the table's keys; for bar
    plots."""
    keys, names = ["threshold", "class", "op", "neurons"], ["mean", "mean_low", "mean_high", "n"]
    parts = [table[[*keys, metric, f"{metric}_low", f"{metric}_high", "n"]].set_axis([*keys, *names], axis=1)
             .assign(metric=metric) for metric in metrics]
    return pd.concat(parts, ignore_index=True)


def contrasts(frame, by, levels, metrics=METRICS, within=("op", "neurons"), seed=0) -> pd.DataFrame:
    """Mean where `by` is levels[0] less the mean where it is levels[1], with its 95 % interval, for every
    metric within every group: columns of `within`, metric, difference, low, high, n facts, and `verdict`
    (higher, lower, not told apart, undefined)."""
    rows = []
    for keys, part in frame[frame["note"].isna()].groupby(list(within), sort=False):
        for metric in metrics:
            e = bootstrap_difference(part, metric, by, levels, seed=seed)
            verdict = ("undefined" if np.isnan(e.mean) else "higher" if e.mean_low > 0
                       else "lower" if e.mean_high < 0 else "not told apart")
            rows.append({**dict(zip(within, keys)), "metric": metric, "difference": e.mean,
                         "difference_low": e.mean_low, "difference_high": e.mean_high, "n": e.n_clusters,
                         "verdict": verdict})
    return pd.DataFrame(rows)


def tell(frame, what) -> None:
    """Print the rows of `contrasts` as sentences; `what` says which difference it is."""
    for row in frame.to_dict("records"):
        subject = ", ".join(filter(None, [PAPER_OP[row["op"]], row.get("neurons"), row["metric"]]))
        interval = f"[{row['difference_low']:.2f}, {row['difference_high']:.2f}]"
        print(f"{subject}: {what} {row['difference']:+.2f} {interval} "
              f"({row['n']} facts): {row['verdict']}")


def sweep_table(frame, sweep, classes, seed=0) -> pd.DataFrame:
    """Rel, Gen, Loc and Avg over all facts for every CAS setting of a `cas_sweep`, with 95 % intervals."""
    parts = []
    for kind, part in sweep.groupby("varied", sort=False):
        rows = edit_table(frame, classes, "", sets=list(part["name"]), controls=[], seed=seed)
        parts.append(rows[rows["threshold"] == "all"].assign(varied=kind))
    columns = [f"{metric}{end}" for metric in METRICS[:4] for end in ("", "_low", "_high")]
    columns = ["varied", "op", "neurons", "n", "n_empty", "neurons_edited", *columns]
    return pd.concat(parts, ignore_index=True)[columns]


def tell_sweep(table) -> None:
    """Print the range of Avg over each setting that a `sweep_table` varies."""
    for (kind, op), part in table.groupby(["varied", "op"], sort=False):
        part = part.dropna(subset="avg").sort_values("avg", kind="stable")
        ends = [f"{r.avg:.2f} ({r.neurons}, {r.neurons_edited:.1f} neurons)" for r in part.itertuples()]
        said = f"Avg from {ends[0]} to {ends[-1]}" if ends else "Avg is undefined"
        print(f"{op}, {kind} varied: {said}")


def figure_edits(table, threshold, sets):
    """(figure, plotted numbers) of Table 2 or 3: a row an operation; Rel, Gen, Loc and Avg of each class,
    then dPPL."""
    import matplotlib.pyplot as plt

    from .plots import WIDE, bars_with_intervals

    table = table[(table["threshold"] == threshold) & table["neurons"].isin(sets)]
    classes, ops = list(dict.fromkeys(table["class"])), list(dict.fromkeys(table["op"]))
    plotted = long_metrics(table, METRICS).replace({"metric": {name: name.title() for name in METRICS[:4]}})
    figure, axes = plt.subplots(len(ops), len(classes) + 1, figsize=(WIDE, 2.3 * len(ops)), squeeze=False,
                                width_ratios=[4] * len(classes) + [len(classes) + 1], layout="constrained")
    for row, op in zip(axes, ops):
        here = plotted[plotted["op"] == op]
        for ax, name in zip(row, classes):
            part = here[(here["class"] == name) & (here["metric"] != "dppl")]
            bars_with_intervals(part, ax, x="metric", hue="neurons", colors=SET_COLORS)
            group = f"$K_{{{name}}}$" if name != "all" else "all facts"
            ax.set(title=f"{op}, {group}", ylabel="", ylim=(0, 1.35))
        here = here[here["metric"] == "dppl"]
        bars_with_intervals(here, row[-1], x="class", hue="neurons", colors=SET_COLORS)
        row[-1].set(title="dPPL", ylabel="")
        if here["mean"].abs().max() > 1:  # a broken model's perplexity has no bound
            row[-1].set_yscale("symlog", linthresh=0.1)
    legend = axes[0, 0].get_legend()
    figure.legend(legend.legend_handles, [text.get_text() for text in legend.get_texts()],
                  title=legend.get_title().get_text(), title_fontsize=5, ncols=len(sets),
                  loc="outside upper center")
    for ax in axes.flat:
        ax.get_legend().remove()
    return figure, plotted


# --- one fact, to be read --------------------------------------------------------------------------------

def worked_example(lm, plan, **options):
    """(answers, side effects) of erasing and updating one planned fact by each of its sets.

    answers: op, neurons, prompt, the probability of the object an operation is about before and after, and
    the greedy answers. side effects: the locality queries whose greedy answer an edit changes."""
    book = Book(lm)
    fact = PlannedFact(book, plan, ("erase", "update"))
    before = book.add_locality([fact])
    made, answers, effects = {}, [], []
    options = dict(old=fact.old, new=fact.new, **options)
    text = lambda ids: lm.tokenizer.decode(ids).strip()  # noqa: E731
    for op, own in fact.targets.items():
        for edit in plan["edits"]:
            keys = dict(op=PAPER_OP[op], neurons=edit["neurons"], n_neurons=len(edit["set"]))
            change = book.change(edit["set"], op, options, made)
            after = book.score([(q, change) for q in own + fact.locality])
            for k, (q, prompt) in enumerate(zip(own, plan["prompts"])):
                answers.append({
                    **keys, "prompt": prompt, "object": text(book.queries[q][1]),
                    "edited_on": k == plan["query"],
                    "p_before": np.exp(before.log_probability[q]), "answer_before": text(before.greedy[q]),
                    "p_after": np.exp(after.log_probability[k]), "answer_after": text(after.greedy[k])})
            for k, (q, local) in enumerate(zip(fact.locality, plan["locality"]), len(own)):
                if not after.exact[k]:
                    effects.append((*keys.values(), local["prompt"], text(book.queries[q][1]),
                                    text(after.greedy[k])))
    columns = ["op", "neurons", "n_neurons", "prompt", "answer_before", "answer_after"]
    return pd.DataFrame(answers), pd.DataFrame(effects, columns=columns)


def example_table(answers) -> pd.DataFrame:
    """The answers of `worked_example` for reading: a row a prompt and operation, "answer (probability of its
    object)"."""
    def shown(when):
        return answers[f"answer_{when}"] + answers[f"p_{when}"].map(" ({:.2f})".format)

    frame = answers.assign(before=shown("before"), after=shown("after"),
                           prompt=answers["prompt"] + np.where(answers["edited_on"], "  ← q_i", ""))
    wide = frame.pivot(index=["op", "object", "prompt", "before"], columns="neurons", values="after")
    return wide[list(dict.fromkeys(answers["neurons"]))].reset_index("before").rename_axis(columns=None)


def continuations(lm, plan, tokens=12, **options) -> pd.DataFrame:
    """Greedy text after q_i by the unedited model and after each real weight edit of a planned fact."""
    import torch

    from .editing import edit_weights

    prompt, old = lm.encode(plan["prompts"][plan["query"]], plan["object"])
    ids = torch.tensor([prompt], device=lm.device)

    def write():
        out = lm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                                do_sample=False, pad_token_id=lm.tokenizer.eos_token_id)
        return lm.tokenizer.decode(out[0, len(prompt):], skip_special_tokens=True).strip()

    rows = [dict(op="none", neurons="", text=write())]
    for op in ("erase", "update") if plan["new_object"] else ("erase",):
        new = lm.encode(plan["prompts"][plan["query"]], plan["new_object"])[1] if op == "update" else None
        for edit in plan["edits"]:
            with edit_weights(lm, edit["set"], op, old=old, new=new, **options):
                rows.append(dict(op=PAPER_OP[op], neurons=edit["neurons"], text=write()))
    return pd.DataFrame(rows)
