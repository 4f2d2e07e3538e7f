"""Tables 2 and 3, their comparisons, and one edited fact to be read."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pandas as pd

from qlutils.experiments.consistency import cells
from qlutils.show.stats import bootstrap_difference, bootstrap_mean
from qlutils.show.tables import paper_value, verdict, with_interval, without_empty_paper_columns

PAPER_SETS = {
    2: ("local", "global"),
    3: ("local", "global", "cas"),
}  # those for which a table of the paper has values
METRICS = ("rel", "gen", "loc", "avg", "dppl", "broken")
MEDIANS = ("dppl",)  # a few broken texts decide its mean
AVG_NOTE = (
    "Rel, Gen, Loc and Avg are means over the edits for which each is defined (n_rel, n_gen, "
    "n_loc, n_avg). Avg is that of the edits with all three: where n_avg is less than the others, "
    "it is not the mean of the columns beside it. dPPL is the median; broken, the share of texts "
    "whose perplexity an edit multiplies by more than ten; dppl_mean, "
    "the mean, where no text is."
)
PAPER_OP = {"erase": "erasure", "update": "update"}


def edit_table(
    frame, classes, model, *, table=2, sets=("local", "global"), controls=("random",), seed=0
):
    """Table 2 or 3: a row a split of the facts, operation and neuron set; its random control right
    below it.

    classes: a frame with fact, class_static, class_otsu. Rel, Gen, Loc and Avg are means over
    edits with 95 % intervals (facts resampled within relations), and so is broken; dppl is the
    median, dppl_mean the mean where no text is broken. n edits, of which n_rel, n_gen, n_loc and
    n_avg have a defined Rel, Gen, Loc and Avg (see AVG_NOTE); n_empty had no neurons to edit.
    Classes without a fact show n = 0. Columns ending in _paper hold the paper's values, for its
    models and methods; they are left out for others."""
    classes = classes[["fact", "class_static", "class_otsu"]]
    frame, rows = frame[frame["note"].isna()].merge(classes, on="fact", how="left"), []
    levels = {
        "threshold": ("all", "static", "otsu"),
        "class": ("all", "I", "II"),
        "op": PAPER_OP,
        "neurons": sets,
        "control": ("none", *controls),
    }
    for keys, part in cells(frame, levels):
        control, operation, neurons = keys.pop("control"), PAPER_OP[keys["op"]], keys["neurons"]
        if control != "none" and part.empty:  # a class without a fact is one row, n = 0
            continue
        row = keys | {
            "op": operation,
            "neurons": neurons if control == "none" else f"{neurons} ({control})",
            "n": len(part),
            "n_empty": int((part["n_neurons"] == 0).sum()),
            "neurons_edited": part["n_neurons"].mean(),
        }
        for metric in METRICS:
            estimate = bootstrap_mean(part, metric, seed=seed, share=metric not in MEDIANS)
            row |= estimate.row("median" if metric in MEDIANS else "mean", metric)
            if metric in ("rel", "gen", "loc", "avg"):
                row[f"n_{metric}"] = estimate.n
        broken = part["broken"].fillna(0).any()
        row |= {"dppl_mean": np.nan if broken else part["dppl"].mean(), "n": len(part)}
        if control == "none" and keys["threshold"] == "static" and neurons in PAPER_SETS[table]:
            given = dict(operation=operation, neurons=neurons, class_=keys["class"])
            row |= {
                f"{name}_paper": paper_value(table, model, name, **given)
                for name in METRICS
                if name != "broken"
            }
        rows.append(row)
    return without_empty_paper_columns(pd.DataFrame(rows))


def contrasts(frame, by, levels, metrics=METRICS, within=("op", "neurons"), seed=0) -> pd.DataFrame:
    """Mean (of dPPL: median) where `by` is levels[0] less that where it is levels[1], for every
    metric within every group: columns of `within`, metric, difference with its 95 % interval, n
    facts of the first and n_other of the second."""
    rows = []
    for keys, part in frame[frame["note"].isna()].groupby(list(within), sort=False):
        for metric in metrics:
            estimate = bootstrap_difference(
                part, metric, by, levels, seed=seed, share=metric not in MEDIANS
            )
            rows.append(
                {
                    **dict(zip(within, keys)),
                    "metric": metric,
                    **estimate.row("median" if metric in MEDIANS else "mean", "difference"),
                    "n": estimate.n_clusters,
                    "n_other": estimate.n_clusters_other,
                }
            )
    return pd.DataFrame(rows)


def tell(frame, what) -> None:
    """Print the rows of `contrasts` as sentences; `what` says which difference it is, n counts the
    facts of both sides."""
    for row in frame.to_dict("records"):
        metric = "median dPPL" if row["metric"] == "dppl" else row["metric"]
        subject = ", ".join(filter(None, [PAPER_OP[row["op"]], row.get("neurons"), metric]))
        print(f"{subject}: {what} {with_interval(row, 'difference')}, {verdict(row, 'difference')}")


def sweep_table(frame, sweep, classes, seed=0) -> pd.DataFrame:
    """Rel, Gen, Loc and Avg over all facts for every CAS setting of a `cas_sweep`, with 95 %
    intervals."""
    parts = []
    for kind, part in sweep.groupby("varied", sort=False):
        rows = edit_table(frame, classes, "", sets=list(part["name"]), controls=[], seed=seed)
        parts.append(rows[rows["threshold"] == "all"].assign(varied=kind))
    columns = [f"{metric}{end}" for metric in METRICS[:4] for end in ("", "_low", "_high")]
    return pd.concat(parts, ignore_index=True)[
        [
            "varied",
            "op",
            "neurons",
            "n",
            *(f"n_{metric}" for metric in METRICS[:4]),
            "n_empty",
            "neurons_edited",
            *columns,
        ]
    ]


def tell_sweep(table) -> None:
    """Print the range of Avg over each setting that a `sweep_table` varies."""
    for (kind, op), part in (
        table.dropna(subset="avg").sort_values("avg", kind="stable").groupby(["varied", "op"])
    ):
        low, high = (
            f"{row['avg']:.2f} ({row['neurons']}, {row['neurons_edited']:.1f} neurons)"
            for row in (part.iloc[0], part.iloc[-1])
        )
        print(f"{op}, {kind} varied: Avg from {low} to {high}")


# --- one fact, to be read -------------------------------------------------------------------------


def worked_example(lm, plan, tokens=12, **options):
    """(answers, side effects, texts) of erasing and updating one planned fact by each of its sets,
    in the weights.

    answers: op, neurons, prompt, the probability of the object an operation is about before and
    after, and the greedy answers. side effects: locality queries whose greedy answer changes.
    texts: `tokens` tokens after q_i."""
    from qlutils.change.editing import edit_weights
    from qlutils.change.scaling import answer_probability, greedy_answers

    prompts, goals = plan["prompts"], {"erase": plan["object"], "update": plan["new_object"]}
    own, far = {}, [lm.encode(one["prompt"], one["object"]) for one in plan["locality"]]
    for op, goal in goals.items():
        with suppress(ValueError):  # an object that cannot follow every prompt is left out
            if goal:
                own[op] = [lm.encode(prompt, goal) for prompt in prompts]

    def look(op):
        asked = [*own[op], *far, (own["erase"][plan["query"]][0], [None] * tokens)]
        said = greedy_answers(
            lm, [prompt for prompt, _ in asked], [len(answer) for _, answer in asked]
        )
        said = [lm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
        p = answer_probability(lm, prompts, [goals[op]] * len(prompts)).tolist()
        return p, said[: len(prompts)], said[len(prompts) : -1], said[-1]

    answers, effects, texts = [], [], [dict(op="none", neurons="", text=look("erase")[-1])]
    for op in own:
        before, target = look(op), own[op][plan["query"]][1]
        for edit in plan["edits"]:
            with edit_weights(
                lm, edit["set"], op, old=own["erase"][plan["query"]][1], new=target, **options
            ):
                after = look(op)
            keys = dict(op=PAPER_OP[op], neurons=edit["neurons"], n_neurons=len(edit["set"]))
            answers += [
                keys
                | dict(
                    prompt=prompt,
                    object=goals[op],
                    edited_on=k == plan["query"],
                    p_before=before[0][k],
                    answer_before=before[1][k],
                    p_after=after[0][k],
                    answer_after=after[1][k],
                )
                for k, prompt in enumerate(prompts)
            ]
            effects += [
                keys | dict(prompt=one["prompt"], answer_before=old, answer_after=new)
                for one, old, new in zip(plan["locality"], before[2], after[2])
                if old != new
            ]
            texts.append(dict(op=PAPER_OP[op], neurons=edit["neurons"], text=after[3]))
    columns = ["op", "neurons", "n_neurons", "prompt", "answer_before", "answer_after"]
    return pd.DataFrame(answers), pd.DataFrame(effects, columns=columns), pd.DataFrame(texts)


def example_table(answers) -> pd.DataFrame:
    """The answers of `worked_example`, a row a prompt and operation: the answer, and P of the
    operation's object."""

    def shown(when):
        return [
            f"{answer}; P({goal}) = {p:.2f}"
            for answer, goal, p in zip(
                answers[f"answer_{when}"], answers["object"], answers[f"p_{when}"]
            )
        ]

    frame = answers.assign(
        before=shown("before"),
        after=shown("after"),
        prompt=answers["prompt"] + np.where(answers["edited_on"], "  ← q_i", ""),
    )
    wide = frame.pivot(
        index=["op", "object", "prompt", "before"], columns="neurons", values="after"
    )
    return (
        wide[list(dict.fromkeys(answers["neurons"]))]
        .reset_index("before")
        .rename_axis(columns=None)
    )
