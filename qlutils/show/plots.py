"""Figures of the study. Plot functions take a tidy frame and an `ax`, return the `ax` and compute
nothing; `figure_...` put them together and return the figure, and the plotted numbers where these
are not the frame they got.

One colour per method, class and model everywhere, from palettes that colour-blind readers can tell
apart (Okabe & Ito for methods and classes, Tol's muted scheme for models).
"""

import io
import textwrap
from itertools import cycle, groupby, product, zip_longest
from operator import itemgetter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator
from PIL import Image

from qlutils.files import write_bytes
from qlutils.show.stats import LEAST, STATISTICS
from qlutils.show.tables import csv_text, files_of, format_value

WIDE = 7.0  # inches: two columns of a paper
CLASS_COLORS = {"I": "#56B4E9", "II": "#D55E00"}
SET_COLORS = {
    "local": "#CC6677",
    "global": "#882255",
    "cas": "#117733",
}
KNOWN_COLORS = {"I, known": "#BBDFF6", "II, known": "#EFBF99"}  # the classes' colours, lighter
BAR_COLORS = CLASS_COLORS | KNOWN_COLORS | SET_COLORS
MODEL_COLORS = {
    "demo/gpt2": "#332288",
    "demo/llama2": "#44AA99",
    "demo/llama3": "#DDCC77",
    "gpt2": "#332288",
    "meta-llama/Llama-2-7b-hf": "#44AA99",
    "meta-llama/Meta-Llama-3-8B": "#DDCC77",
}
_OTHER_COLORS = ("#CC6677", "#999933", "#882255", "#88CCEE", "#117733", "#AA4499")
LABELS = {
    "self": "own",
    "union": "all others'",
    "intersection": "in all others",
    "refine": "in several others",
    "enhance": "enhanced",
    "suppress": "suppressed",
    "average": "average of both",
    "probability": "ΔProb",
    "value": "ΔValue",
    "static": "static threshold",
    "otsu": "Otsu's threshold",
    "rel": "this wording changed",
    "gen": "other wordings changed",
    "loc": "other facts kept",
    "avg": "mean of the three",
    "cas": "CAS",
    "I": "$K_{I}$",
    "II": "$K_{II}$",
    "all": "all facts",
    "I, known": "$K_{I}$, known queries",
    "II, known": "$K_{II}$, known queries",
}
# Sets that are drawn as hollow bars, beside the set that they control.
CONTROLS = {"self_random": "self", "union_random": "union", "irrelevant": "self"}
CHANGE = {  # what a bar of Figure 4 and 6 is, by what stands at its ticks
    "set": "ΔProb: change of P(answer),\nas claimed (1 = 100 %)",
    "direction": "change, positive as claimed:\nup if enhanced, down\nif suppressed (1 = 100 %)",
}
MAX_PNG = 150_000  # bytes
INTERVAL = f"line: 95 % bootstrap over facts; –: fewer than {LEAST} facts"
FEW = 5  # facts from which on a median is drawn


plt.style.use(Path(__file__).with_name("study.mplstyle"))  # for every figure from here on


def model_colors(models) -> dict:
    """{model: colour}; models without a colour of their own get one by their place in the list."""
    others = cycle(_OTHER_COLORS)
    return {name: MODEL_COLORS.get(name) or next(others) for name in models}


def _label(name):
    return LABELS.get(name, name)


def _legend(fig, colors, title="", hollow=""):
    """One legend above all panels: {name: colour}, and what hollow bars are, if any."""
    handles = [Patch(color=color, label=_label(name)) for name, color in colors.items()]
    if hollow:
        handles.append(Patch(facecolor="none", edgecolor="0.3", label=hollow))
    fig.legend(handles=handles, title=title, loc="outside upper center", ncols=len(handles))


# --- facts ----------------------------------------------------------------------------------------


def figure_cs2(frames, method, names, line=0.3):
    """Figure 3, 8 or 9: CS2 of several models' facts (rows of `classified_facts` a model, with a
    column model), a dot each, by relation, from the lowest median to the highest; the thresholds
    and the paper's example as lines. names: {code of a relation: its name}."""
    columns = ["model", "relation", "fact", "cs2", "threshold_static", "threshold_otsu"]
    frame = pd.concat(frames, ignore_index=True)[columns]
    colors = model_colors(dict.fromkeys(frame["model"]))
    drawn = frame.dropna(subset="cs2").sort_values("cs2", kind="stable")
    relations = drawn.groupby("relation")["cs2"].median().sort_values(kind="stable").index
    width = 0.8 / len(colors)
    groups = drawn.groupby(["relation", "model"])["cs2"]
    middle = drawn["relation"].map(relations.get_loc)
    middle += (drawn["model"].map(list(colors).index) - (len(colors) - 1) / 2) * width
    aside = groups.cumcount() * 0.618 % 1 - 0.5  # neighbours far from each other
    n = groups.transform("size")
    fig, ax = plt.subplots(figsize=(WIDE, 3.8))
    look = dict(color=drawn["model"].map(colors), alpha=0.8, linewidth=0, rasterized=True)
    ax.scatter(middle + (n > 1) * aside * 0.8 * width, drawn["cs2"], 9, **look)
    medians = drawn.assign(middle=middle)[n >= FEW].groupby("middle")["cs2"].median()
    ends = medians.index - width / 2, medians.index + width / 2
    ax.hlines(medians, *ends, color="black", linewidth=1.4)
    counts = groups.size().unstack(fill_value=0)[list(colors)].loc[relations]
    ticks = [f"{names.get(code, code)} ({_slashed(found)})" for code, *found in counts.itertuples()]
    turned = dict(rotation=90 if len(ticks) > 20 else 40, ha="right", rotation_mode="anchor")
    ax.set_xticks(range(len(ticks)), ticks, **turned)
    ax.set(xlim=(-0.6, len(ticks) - 0.4), ylim=(-0.03, 1.03), ylabel="$CS_2$ of a fact")
    ax.set_xlabel("relation (n facts)")
    ax.set_title(f"localised by {method}", loc="left")
    _thresholds(ax, frame.drop_duplicates("model"), line)
    if len(colors) > 1:
        _legend(fig, colors)
    return fig, frame


def _slashed(counts) -> str:
    """ "62 / 52"; one number where all are equal."""
    counts = list(map(str, counts))
    return " / ".join(counts if len(set(counts)) > 1 else counts[:1])


def _thresholds(ax, models, line):
    """The thresholds on CS2, a row a model, and the example line, named on the right."""
    static = models["threshold_static"].iloc[0]
    otsu = models["threshold_otsu"].dropna().sort_values()
    lines = {f"static threshold, {static:g}": static, f"paper's example, {line:g}": line}
    if len(otsu):
        found = dict.fromkeys(f"{value:.2f}" for value in (otsu.iloc[0], otsu.iloc[-1]))
        lines[f"Otsu's, {' to '.join(found)}"] = otsu.mean()
    for value in (static, line, *otsu):
        ax.axhline(value, color="black", linestyle="--", linewidth=0.7, zorder=0)
    lowest = 0.0
    for name, value in sorted(lines.items(), key=itemgetter(1)):
        lowest = max(value, lowest)
        ax.text(1.01, lowest, name, transform=ax.get_yaxis_transform(), va="center")
        lowest += 0.08


def figure_thresholds(frame, otsu, t=0.2, static=0.1):
    """Share of the facts in K_II by the KN threshold and the static threshold on CS2 (see
    `threshold_sensitivity`); marked are the paper's static one and `otsu`, Otsu's at this t."""
    fig, ax = plt.subplots(figsize=(5.2, 2.8))
    shares = frame.pivot(index="t", columns="static", values="R_II")
    scale = dict(vmin=0, vmax=1, cmap="cividis_r")
    scale["cbar_kws"] = {"label": "share of facts in $K_{II}$"}
    sns.heatmap(shares, ax=ax, annot=True, fmt=".2f", annot_kws={"fontsize": 8}, **scale)
    ax.set(xlabel="static threshold on $CS_2$", ylabel="t: share of the largest attribution")
    ax.tick_params("y", rotation=0)
    places = np.interp([otsu, static], [*shares.columns, 1.0], np.arange(len(shares.T) + 1) + 0.5)
    ax.text(places[1], -0.12, f"paper's, {static:g}", ha="center", va="bottom")
    ax.plot(places[0], -0.12, "v", color="black", clip_on=False)
    name = f"Otsu's at t = {t:g}: {otsu:.2f}"
    ax.text(places[0], -0.5, name, ha="center", va="bottom")  # above, as both may lie close
    box = Rectangle((places[1] - 0.5, 0), 1, len(shares), fill=False, color="#D55E00", linewidth=2)
    ax.add_patch(box).set_clip_on(False)
    return fig, frame


def figure_predominance(facts):
    """Figure 5: how many facts have which `predominance` and `predominance_rest`, a row a model and
    threshold that leaves no class empty (the static one where none does)."""
    values = {"predominance": "most attended token", "predominance_rest": "without the first token"}
    rows = []
    for model, part in facts.groupby("model", sort=False):
        split = [name for name in ("static", "otsu") if part[f"class_{name}"].nunique() == 2]
        rows += [(model, part, threshold) for threshold in split or ["static"]]
    size = (WIDE, 0.8 + 1.45 * len(rows))
    fig, axes = plt.subplots(len(rows), 2, figsize=size, squeeze=False, sharex=True, sharey=True)
    classes = {}
    for (model, part, threshold), pair in zip(rows, axes):
        label, least = part[f"class_{threshold}"], (1 / part["n_queries"]).mean()
        counts = label.value_counts(sort=False).sort_index()
        classes |= {name: CLASS_COLORS[name] for name in counts.index}
        for value, ax in zip(values, pair):
            drawn = dict(x=part[value] - 1e-9, hue=label, hue_order=counts.index, ax=ax)
            look = dict(palette=CLASS_COLORS, multiple="dodge", shrink=0.9, alpha=1, linewidth=0)
            bins = dict(bins=np.linspace(0, 1, 11), stat="probability", common_norm=False)
            sns.histplot(**drawn, **look, **bins, legend=False)  # a bin has its upper end
            ax.axvline(least, color="black", linestyle=":", zorder=3)
            ax.text(least + 0.015, 1.06, f"least possible: 1 of k wordings, {least:.2f}")
            ax.set(title=values[value] if part is rows[0][1] else "", xlabel="predominance")
        n = " / ".join(map(str, counts))
        pair[0].set_ylabel(f"{model}\n{_label(threshold)}\nn = {n} facts")
    pair[0].set(ylim=(0, 1.25), yticks=(0, 0.5, 1))
    pair[0].yaxis.set_major_formatter(_percent)
    fig.supylabel("share of the facts of a class")
    _legend(fig, dict(sorted(classes.items())))
    columns = ["model", "fact", "relation", "class_static", "class_otsu", *values, "n_queries"]
    return fig, facts[columns]


def _percent(share, _=None) -> str:
    return f"{100 * share:.0f} %"


# --- bars -----------------------------------------------------------------------------------------


def bars_with_intervals(frame, ax, *, x, hue, y="mean", base=0):
    """Grouped bars of column `y` from `base` on, with the interval `y`_low to `y`_high, in the
    frame's order.

    frame: one row a bar, with columns x, hue (in BAR_COLORS), y, y_low, y_high and perhaps hollow.
    A bar that is undefined, or whose interval is, is left out and marked "–"."""
    groups = list(frame.groupby(x, sort=False))
    width = 0.8 / max(len(part) for _, part in groups)
    for at, (_, part) in enumerate(groups):
        for place, row in enumerate(part.to_dict("records")):
            middle = at + (place - (len(part) - 1) / 2) * width
            bar = np.array([row[y], row[f"{y}_low"], row[f"{y}_high"]], float)
            face = edge = BAR_COLORS[row[hue]]
            if row.get("hollow"):
                face = "white"
            if np.isnan(bar).any():
                ax.annotate("–", (middle, base), ha="center", va="bottom")
                continue
            ax.bar(middle, bar[0] - base, 0.86 * width, base, color=face, edgecolor=edge)
            ax.vlines(middle, *bar[1:], color="black", linewidth=0.7)
    ax.axhline(base, color="black", linewidth=0.6)
    width = max(7, 50 // len(groups) // ax.get_subplotspec().get_gridspec().ncols)
    ticks = [textwrap.fill(_label(name), width, break_long_words=False) for name, _ in groups]
    ax.set_xticks(range(len(groups)), ticks)
    ax.set_xlim(-0.6, len(groups) - 0.4)
    return ax


def _counted(frame, hue, of) -> str:
    """n of the bars that are not hollow, of each level of column `hue`, in words; once where all
    have the same."""
    own = frame[~frame["hollow"]].groupby(hue, sort=False)["n"]
    counts = [f"{n.min():.0f}" + f"–{n.max():.0f}" * (n.nunique() > 1) for _, n in own]
    return f"n = {_slashed(counts)} {of}"


def _drawn(frame) -> tuple[pd.DataFrame, str]:
    """The rows of a table of `effects.summary` that become bars, with `bar`, the class, and after
    each the same of known queries ("I, known"), if any, and `hollow`, of a control, which stands
    right after what it controls; and in words which classes are empty."""
    empty = frame.groupby(["threshold", "class"], sort=False)["n"].max()
    told = [f"{_label(at)}: no fact is in {_label(name)}" for at, name in empty.index[empty == 0]]
    known = np.where(frame["queries"] == "known", ", known", "")
    frame = frame.assign(bar=frame["class"] + known, hollow=frame["set"].isin(CONTROLS))
    frame["set"] = frame["set"].replace(CONTROLS)
    order = list(BAR_COLORS).index
    frame = frame.sort_values("bar", key=lambda bars: bars.map(order), kind="stable")
    return frame[frame["n"] > 0], "; ".join(told)


def figure_bars(frame, *, row, column, x="set", y="trimmed", control=""):
    """Figures 4 and 6: bars of a table of `effects.summary` by `x` and class, those of known
    queries beside where there are any, `control` (what it is, in words) hollow; a row of panels
    each level of column `row` of the frame, a column each of `column` (one column lies down)."""
    bars, note = _drawn(frame)
    if x == "direction":
        bars = bars[bars["direction"] != "average"]  # in which both cancel
    if frame[column].nunique() == 1:
        row, column = column, row
    tops, sides = (list(dict.fromkeys(frame[name])) for name in (row, column))
    size = (WIDE, 1.3 + 1.75 * len(tops))
    fig, axes = plt.subplots(len(tops), len(sides), figsize=size, squeeze=False, sharey="row")
    told = {}
    for (top, side), ax in zip(product(tops, sides), axes.flat):
        part = bars[(bars[row] == top) & (bars[column] == side)].copy()
        ax.set_ylabel(_label(top))
        ax.label_outer()
        if part.empty:
            continue
        if x == "set":
            sizes = _mean_size(part[(part["queries"] == "all") & ~part["hollow"]], "set", "size")
            part["set"] = part["set"].map(lambda name: f"{_label(name)} ({sizes[name]:.0f})")
        bars_with_intervals(part, ax, x=x, hue="bar", y=y)
        n = _counted(part, "bar", "queries")
        title = [_label(side)] if ax in axes[0] else []
        if n not in (told.get(top), told.get(side)):
            title.append(textwrap.fill(n, 90 // len(sides)))
        ax.set_title("\n".join(title))
        told |= {top: n, side: n}
    fig.supylabel(CHANGE[x])
    shown = {name: BAR_COLORS[name] for name in BAR_COLORS if (bars["bar"] == name).any()}
    title = "\n".join(filter(None, [f"{STATISTICS[y]} over queries; {INTERVAL}", note]))
    _legend(fig, shown, title, control if bars["hollow"].any() else "")
    return fig


def _mean_size(frame, by, size) -> pd.Series:
    """The mean of column `size` over the n of all rows, by the levels of column `by`."""
    sums = frame.assign(total=frame[size] * frame["n"]).groupby(by)[["total", "n"]].sum()
    return sums["total"] / sums["n"]


def figure_edits(table, threshold, sets):
    """(figure, plotted numbers) of Table 2 or 3: a row an operation; Rel, Gen, Loc and Avg of each
    class, then the median perplexity after an edit over that before; random neurons hollow."""
    own = table["neurons"].str.removesuffix(" (random)")
    table = table[(table["threshold"] == threshold) & own.isin(sets) & (table["n"] > 0)]
    plotted = _by_metric(table)
    bars = plotted.assign(neurons=plotted["neurons"].str.removesuffix(" (random)"))
    bars["hollow"] = bars["neurons"] != plotted["neurons"]
    classes, ops = (list(dict.fromkeys(table[name])) for name in ("class", "op"))
    size = (WIDE, 0.8 + 2.1 * len(ops))
    grid = dict(width_ratios=[3] * len(classes) + [2], squeeze=False, sharey="col")
    fig, axes = plt.subplots(len(ops), len(classes) + 1, figsize=size, **grid)
    for op, (*panels, last) in zip(ops, axes):
        is_dppl = bars["metric"] == "dppl"
        for ax, name in zip(panels, classes):
            part = bars[~is_dppl & (bars["op"] == op) & (bars["class"] == name)]
            bars_with_intervals(part, ax, x="metric", hue="neurons")
            ax.set_title(f"{op}, {_label(name)}\n{_counted(part, 'metric', 'edits')}")
            ax.set(ylabel="share" if ax in axes[:, 0] else "", ylim=(0, 1.02))
        dppl = bars[is_dppl & (bars["op"] == op)]
        factors = {name: 1 + dppl[name] for name in ("mean", "mean_low", "mean_high")}
        bars_with_intervals(dppl.assign(**factors), last, x="class", hue="neurons", base=1)
        last.set_title(f"{op}, perplexity\n(median factor)")
    _factors(axes[:, -1])
    sizes = _mean_size(table, "neurons", "neurons_edited")
    named = {f"{_label(name)} ({sizes[name]:.0f} neurons)": SET_COLORS[name] for name in sets}
    _legend(fig, named, INTERVAL, "random neurons" if bars["hollow"].any() else "")
    return fig, plotted


def _factors(axes):
    """A logarithmic axis of factors, shared by the panels, from 1 to 2 at least."""
    low, high = axes[0].get_ylim()
    axes[0].set(yscale="log", ylim=(min(low, 0.9), max(high, 2.2)))
    for ax in axes:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}×")
        ax.yaxis.minorticks_off()


def _by_metric(table) -> pd.DataFrame:
    """A row a metric and row of a table of edits: its value as `mean`, its interval and n."""
    keys = ["threshold", "class", "op", "neurons"]
    parts = []
    for metric in ("rel", "gen", "loc", "avg", "dppl"):
        n = f"n_{metric}" if f"n_{metric}" in table else "n"
        part = table[[*keys, metric, f"{metric}_low", f"{metric}_high", n]]
        part = part.set_axis([*keys, "mean", "mean_low", "mean_high", "n"], axis=1)
        parts.append(part.assign(metric=metric))
    return pd.concat(parts, ignore_index=True)


# --- maps of neurons ------------------------------------------------------------------------------


def strong_neurons(values, signed, t) -> pd.DataFrame:
    """The neurons whose value in a (layers, neurons) map, in magnitude if `signed`, exceeds `t`:
    layer, neuron, value."""
    layer, neuron = np.nonzero((np.abs(values) if signed else values) > t)
    return pd.DataFrame({"layer": layer, "neuron": neuron, "value": values[layer, neuron]})


def scatter_neurons(frame, ax, signed):
    """Dots of a frame of `strong_neurons` whose values are shares, the larger and darker the larger
    in magnitude; filled where `shared`, rings elsewhere. Returns the scale."""
    cmap = plt.get_cmap("RdBu_r" if signed else "viridis_r")
    scale = ScalarMappable(Normalize(-1 if signed else 0, 1), cmap)
    colors = scale.to_rgba(frame["value"])
    faces = np.where(frame[["shared"]], colors, 0.0)  # transparent elsewhere
    where = frame["neuron"], frame["layer"], 6 + 40 * frame["value"].abs().clip(upper=1)
    ax.scatter(*where, facecolors=faces, edgecolors=colors, linewidth=1, clip_on=False)
    return scale


def _draw_maps(fig, cells, kind, t) -> list[pd.DataFrame]:
    """A panel each cell of rows of (query, title, its state now, its state unchanged, y label): the
    neurons above `t` of the largest value unchanged, of the query or, as activations, of all;
    filled those that more than one of the row's prompts of a fact has. Returns the dots of each
    row, with their value as a share."""
    signed = kind == "activation"
    axes = fig.subplots(len(cells), len(cells[0]), squeeze=False, sharex=True, sharey=True)
    most = max(np.abs(before[kind]).max() for _, _, _, before, _ in cells[0]) if signed else None
    fig.suptitle(f"{kind}, neurons above {t:g} of the largest\n(filled: in both wordings)")
    frames = []
    for row, line in zip(cells, axes):
        found = []
        for panel, (one, _, state, before, _) in enumerate(row):
            dots = strong_neurons(state[kind] / (most or before[kind].max() or 1.0), signed, t)
            found.append(dots.assign(fact=one["fact"], prompt=one["prompt"], panel=panel))
        found = pd.concat(found, ignore_index=True)
        found["shared"] = found.duplicated(["fact", "layer", "neuron"], keep=False)
        for panel, ((_, title, state, _, label), ax) in enumerate(zip(row, line)):
            here = found[found["panel"] == panel]
            scale = scatter_neurons(here, ax, signed)
            ax.text(0.5, 0.5, "" if len(here) else "none", transform=ax.transAxes, ha="center")
            layers, neurons = state[kind].shape
            ax.set(xlim=(-0.5, neurons), ylim=(-0.5, layers), xlabel="neuron")
            ax.set_ylabel(f"{label}\nlayer")
            title += f"\nP(answer) = {format_value(state['probability'])}"
            ax.set_title(title.strip(), fontsize=8)
            ax.label_outer()
        frames.append(found.assign(kind=kind))
    bar = fig.colorbar(scale, ax=axes, location="bottom", shrink=0.7, aspect=40, pad=0.02)
    bar.set_label(f"share of the largest {'of all queries' if signed else 'of the query'}")
    return frames


def _wrapped(text) -> str:
    return "\n".join(textwrap.wrap(text, 22, max_lines=3, placeholder=" …"))


def _subject(one) -> str:
    return _wrapped(" → ".join(one["fact"].split("|")[1:]))


def figure_1(maps, t=0.2):
    """Figure 1: two queries of each of two facts, a row a fact: the neurons above `t` of the
    query's largest attribution, as shares of it, since a confident query's is a thousand times an
    unsure one's; beside them those of the largest activations, on one scale.

    maps: from `localize.example_maps`. Returns the figure and its dots as a tidy frame."""
    cells = [
        [(one, _wrapped(one["prompt"]), one, one, _subject(one)) for one in group]
        for _, group in groupby(maps, key=itemgetter("fact"))
    ]
    fig = plt.figure(figsize=(WIDE, 2.1 * len(cells) + 0.9))
    frames = []
    for part, kind in zip(fig.subfigures(1, 2), ("attribution", "activation")):
        frames += _draw_maps(part, cells, kind, t)
    return fig, pd.concat(frames, ignore_index=True)


def figure_conditions(maps, conditions, kind, t=0.2):
    """Figures 7 and 10: the neurons of queries as in Figure 1, a column a query and a row a
    condition, all by the scale of the unmodified one.

    maps: from `knowledge_synapses.scaled_maps`. kind: "attribution" or "activation". Returns the
    figure and its dots."""
    fig = plt.figure(figsize=(WIDE, 1.6 + 1.6 * len(conditions)))
    titles = [f"{_subject(one)}\n{_wrapped(one['prompt'])}" for one in maps]
    cells = []
    for name in conditions:
        cells.append(
            [(one, above, one[name], one["unmodified"], name) for one, above in zip(maps, titles)]
        )
        titles = [""] * len(maps)  # once
    found = _draw_maps(fig, cells, kind, t)
    frames = [dots.assign(condition=name) for name, dots in zip(conditions, found)]
    return fig, pd.concat(frames, ignore_index=True)


def figure_places(found, num_heads):
    """Where synapses sit: the share of all that each column (token of the prompt) has, and the mean
    number of a query in each layer and head."""
    heads = np.stack(found["by_head"]).mean(0).reshape(-1, num_heads)
    columns = pd.DataFrame(zip_longest(*found["by_column"], fillvalue=np.nan)).T  # prompts differ
    columns /= heads.size
    places = pd.DataFrame({"share": columns.mean(), "n": columns.count()}).rename_axis("column")
    places["of_all"] = columns.sum() / (columns.sum().sum() or 1.0)
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 2.8))
    shares = places["of_all"][places["of_all"] >= 0.005]
    names = [f"token {one + 1}" if one else "first token" for one in shares.index]
    left.bar_label(left.barh(names, shares, color="0.4"), map(_percent, shares), padding=3)
    title = f"first token: {_percent(places['of_all'][0])} of all synapses"
    left.set(title=title, xlabel="share of all synapses", xlim=(0, 1.1))
    left.xaxis.set_major_formatter(_percent)
    left.invert_yaxis()
    typical = np.median(heads)
    mesh = right.imshow(heads, "PuOr", norm=CenteredNorm(typical), aspect="auto", origin="lower")
    fig.colorbar(mesh, ax=right, label="synapses a query")
    right.set(xlabel="head", ylabel="layer", title=f"each head (white: the median, {typical:.2f})")
    right.locator_params(integer=True)
    index = pd.MultiIndex.from_product(map(range, heads.shape), names=["layer", "head"])
    numbers = pd.Series(heads.ravel(), index, name="synapses")
    return fig, pd.concat([numbers.reset_index(), places.reset_index()], ignore_index=True)


# --- files ----------------------------------------------------------------------------------------


def save_figure(fig, stem, folder, data) -> dict[str, Path]:
    """Write `stem`.png (at most 150 KB where 100 dpi can do it), .pdf and the plotted numbers as
    .csv; their paths. The same figure gives the same bytes: no dates in the files."""
    paths = files_of(stem, folder, ("png", "pdf", "csv"))
    pdf = io.BytesIO()
    fig.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    write_bytes(paths["png"], _small_png(fig))
    write_bytes(paths["pdf"], pdf.getvalue())
    write_bytes(paths["csv"], csv_text(data).encode("utf-8"))
    return paths


def _small_png(fig):
    for dpi in (200, 150, 100):
        drawn = io.BytesIO()
        small = io.BytesIO()
        fig.savefig(drawn, format="png", dpi=dpi)
        image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        image.save(
            small,
            format="png",
            optimize=True,
            dpi=(dpi, dpi),
        )
        if small.tell() <= MAX_PNG:
            break
    return small.getvalue()
