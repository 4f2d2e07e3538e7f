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
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter
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
    "direction": "change, positive as claimed: up when\nenhanced, down when suppressed (1 = 100 %)",
}
MAX_PNG = 150_000  # bytes
INTERVAL = f"line: 95 % bootstrap over facts; –: fewer than {LEAST} facts"
FEW = 5  # facts from which on a median is drawn
MANY = 40  # facts from which on a violin stands for dots
KINDS = {"attribution": "share of the query's largest", "activation": "activation, one scale"}


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
    column model) by relation, from the lowest median to the highest; the thresholds and the paper's
    example as lines. names: {code of a relation: its name}."""
    columns = ["model", "relation", "fact", "cs2", "threshold_static", "threshold_otsu"]
    frame = pd.concat(frames, ignore_index=True)[columns]
    colors = model_colors(dict.fromkeys(frame["model"]))
    drawn = frame.dropna(subset="cs2")
    fig, ax = plt.subplots(figsize=(WIDE, 3.8))
    width = 0.8 / len(colors)
    ticks = []
    medians = drawn.groupby("relation")["cs2"].median().sort_values(kind="stable")
    for at, code in enumerate(medians.index):
        counts = {}
        for place, (name, color) in enumerate(colors.items()):
            here = (drawn["relation"] == code) & (drawn["model"] == name)
            values = np.sort(drawn.loc[here, "cs2"])
            _strip(ax, values, at + (place - (len(colors) - 1) / 2) * width, width, color)
            counts[len(values)] = str(len(values))
        ticks.append(f"{names.get(code, code)} ({' / '.join(counts.values())})")
    turned = dict(rotation=90 if len(ticks) > 20 else 40, ha="right", rotation_mode="anchor")
    ax.set_xticks(range(len(ticks)), ticks, **turned)
    ax.set(xlim=(-0.6, len(ticks) - 0.4), ylim=(-0.03, 1.03), ylabel="$CS_2$ of a fact")
    ax.set_xlabel("relation (n facts)")
    ax.set_title(f"localised by {method}", loc="left")
    _thresholds(ax, frame.drop_duplicates("model"), line)
    if len(colors) > 1:
        _legend(fig, colors)
    return fig, frame


def _strip(ax, values, at, width, color):
    """A dot a fact, a violin where there are many, and the median where there are enough."""
    if len(values) >= MANY:
        [body] = ax.violinplot([values], [at], widths=0.9 * width, showextrema=False)["bodies"]
        body.set(facecolor=color, alpha=0.8)
    elif len(values):
        aside = np.arange(len(values)) * 0.618 % 1 * 0.8 * width  # neighbours far from each other
        ax.scatter(at + aside - aside.mean(), values, s=9, color=color, alpha=0.8, linewidth=0)
    if len(values) >= FEW:
        ax.hlines(np.median(values), at - width / 2, at + width / 2, color="black", linewidth=1.4)


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
    `threshold_sensitivity`); marked are the paper's static one and, at this t, `otsu`, Otsu's."""
    fig, ax = plt.subplots(figsize=(5.2, 2.8))
    shares = frame.pivot(index="t", columns="static", values="R_II")
    scale = dict(vmin=0, vmax=1, cmap="cividis_r")
    scale["cbar_kws"] = {"label": "share of facts in $K_{II}$"}
    sns.heatmap(shares, ax=ax, annot=True, fmt=".2f", annot_kws={"fontsize": 8}, **scale)
    ax.set(xlabel="static threshold on $CS_2$", ylabel="t: share of the largest attribution")
    ax.tick_params("y", rotation=0)
    top = np.interp(t, shares.index, range(len(shares)))
    at = np.interp(otsu, [*shares.columns, 1.0], np.arange(len(shares.columns) + 1) + 0.5)
    ax.plot([at, at], [top, top + 1], "k", linewidth=4, solid_capstyle="butt")
    ax.text(at, -0.12, f"Otsu's, {otsu:.2f}" if at == at else "", ha="center", va="bottom")
    if static in shares:
        left = shares.columns.get_loc(static)
        box = Rectangle((left, 0), 1, len(shares), fill=False, color="#D55E00", linewidth=2)
        ax.add_patch(box).set_clip_on(False)
        ax.text(left + 0.5, -0.12, f"paper's, {static:g}", ha="center", va="bottom")
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
    for (model, part, threshold), pair in zip(rows, axes):
        least = (1 / part["n_queries"]).mean()
        for value, ax in zip(values, pair):
            n = _histogram(ax, part.dropna(subset=value), value, f"class_{threshold}")
            ax.axvline(least, color="black", linestyle=":", zorder=3)
            ax.text(least + 0.015, 1.06, f"least possible: 1 of k wordings, {least:.2f}")
        pair[0].set_ylabel(f"{model}\n{_label(threshold)}\nn = {n} facts")
    for ax, title in zip(axes[0], values.values()):
        ax.set_title(title)
    for ax in axes[-1]:
        ax.set(xlabel="predominance of a fact", ylim=(0, 1.25), yticks=(0, 0.5, 1))
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    fig.supylabel("share of the facts of a class")
    found = pd.concat(part[f"class_{threshold}"] for _, part, threshold in rows)
    _legend(fig, {name: CLASS_COLORS[name] for name in sorted(found.dropna().unique())})
    columns = ["model", "fact", "relation", "class_static", "class_otsu", *values, "n_queries"]
    return fig, facts[columns]


def _histogram(ax, part, value, label) -> str:
    """Shares of the facts of each class (column `label`) in ten bins; the numbers of facts."""
    edges = np.linspace(0, 1, 11)
    groups = {name: group for name, group in part.groupby(label) if len(group)}
    width = 0.09 / max(1, len(groups))
    for place, (name, group) in enumerate(groups.items()):
        counts, _ = np.histogram(group[value] - 1e-9, edges)  # a bin has its upper end
        left = edges[:-1] + 0.005 + place * width
        ax.bar(left, counts / len(group), width, align="edge", color=CLASS_COLORS[name])
    return " / ".join(str(len(group)) for group in groups.values())


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
            color = BAR_COLORS[row[hue]]
            if np.isnan(bar).any():
                ax.annotate("–", (middle, base), ha="center", va="bottom")
                continue
            look = dict(color=color)
            if row.get("hollow"):
                look = dict(facecolor="white", edgecolor=color)
            ax.bar(middle, bar[0] - base, 0.86 * width, base, linewidth=0.9, **look)
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
    counts = counts if len(set(counts)) > 1 else counts[:1]
    return f"n = {' / '.join(counts)} {of}"


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
        part = bars[(bars[row] == top) & (bars[column] == side)]
        if part.empty:
            continue
        levels = list(dict.fromkeys(frame[x]))
        part = part.sort_values(x, key=lambda sets: sets.map(levels.index), kind="stable")
        part = part.assign(**{x: part[x].map(_label) + _sizes(part) if x == "set" else part[x]})
        bars_with_intervals(part, ax, x=x, hue="bar", y=y)
        n = _counted(part, "bar", "queries")
        ax.set_title(_label(side) if ax in axes[0] else "")
        if n not in (told.get(top), told.get(side)):
            ax.set_title(f"{ax.get_title()}\n{textwrap.fill(n, 90 // len(sides))}".strip())
        told |= {top: n, side: n}
    for (top, _), ax in zip(product(tops, sides), axes.flat):
        ax.set_ylabel(_label(top))
        ax.label_outer()
    fig.supylabel(CHANGE[x])
    shown = {name: BAR_COLORS[name] for name in BAR_COLORS if (bars["bar"] == name).any()}
    title = "\n".join(filter(None, [f"{STATISTICS[y]} over queries; {INTERVAL}", note]))
    _legend(fig, shown, title, control if bars["hollow"].any() else "")
    return fig


def _sizes(part) -> pd.Series:
    """The mean size of each row's set over all queries of both classes, " (23)"."""
    own = part[(part["queries"] == "all") & ~part["hollow"]]
    total = (own["size"] * own["n"]).groupby(own["set"]).sum()
    mean = total / own.groupby("set")["n"].sum()
    return part["set"].map(lambda name: f" ({mean[name]:.0f})")


def figure_edits(table, threshold, sets):
    """(figure, plotted numbers) of Table 2 or 3: a row an operation; Rel, Gen, Loc and Avg of each
    class, then the median perplexity after an edit over that before; random neurons hollow."""
    random = " (random)"
    names = [*sets, *(f"{name}{random}" for name in sets)]
    table = table[(table["threshold"] == threshold) & table["neurons"].isin(names)]
    table = table[table["n"] > 0]
    plotted = _by_metric(table)
    bars = plotted.assign(hollow=plotted["neurons"].str.endswith(random))
    bars["neurons"] = bars["neurons"].str.removesuffix(random)
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
    shown = table[table["neurons"].isin(sets)]
    neurons = (shown["neurons_edited"] * shown["n"]).groupby(shown["neurons"]).sum()
    neurons /= shown.groupby("neurons")["n"].sum()
    named = {f"{_label(name)} ({neurons[name]:.0f} neurons)": SET_COLORS[name] for name in sets}
    _legend(fig, named, INTERVAL, "random neurons" if bars["hollow"].any() else "")
    return fig, plotted


def _factors(axes):
    """A logarithmic axis of factors, shared by the panels, from 1 to 2 at least."""
    low, high = axes[0].get_ylim()
    axes[0].set_yscale("log")
    axes[0].set_ylim(min(low, 0.9), max(high, 2.2))
    for ax in axes:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
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

SHOWN = "neurons above {} of the largest\n(filled: in both wordings of the fact)"


def strong_neurons(values, kind, least) -> pd.DataFrame:
    """The neurons whose value in a (layers, neurons) map exceeds `least`, as an attribution or, as
    an activation, in magnitude: layer, neuron, value."""
    values = np.asarray(values, dtype=np.float64)
    layer, neuron = np.nonzero((np.abs(values) if kind == "activation" else values) > least)
    return pd.DataFrame({"layer": layer, "neuron": neuron, "value": values[layer, neuron]})


def scatter_neurons(frame, ax, norm):
    """Dots of a frame of `strong_neurons`, the larger and darker the larger in magnitude; filled
    where `shared`, rings elsewhere."""
    cmap = plt.get_cmap("RdBu_r" if norm.vmin < 0 else "viridis_r")
    colors = cmap(norm(frame["value"].to_numpy()))
    faces = np.where(frame[["shared"]], colors, 0.0)  # transparent elsewhere
    sizes = 6 + 40 * np.minimum(1, frame["value"].abs() / norm.vmax)
    where = frame["neuron"], frame["layer"], sizes
    ax.scatter(*where, facecolors=faces, edgecolors=colors, linewidth=1, clip_on=False)
    return ScalarMappable(norm, cmap)


def _draw_maps(fig, cells, labels, kind, t) -> pd.DataFrame:
    """A panel each cell of rows of (query, title, its state now, its state unchanged): the neurons
    above `t` of the largest of the unchanged state, of all queries for an activation; filled those
    that more than one of the row's prompts of a fact has. Returns the dots."""
    options = dict(squeeze=False, sharex=True, sharey=True)
    axes = fig.subplots(len(cells), len(cells[0]), **options)
    tops = [np.max(np.abs(before[kind])) for row in cells for *_, before in row]
    norm = Normalize(0, 1) if kind == "attribution" else Normalize(-max(tops), max(tops))
    frames = []
    for row, label, line in zip(cells, labels, axes):
        found = []
        for place, (one, _, state, before) in enumerate(row):
            top = np.max(before[kind]) if kind == "attribution" else norm.vmax
            dots = strong_neurons(state[kind], kind, t * top)
            names = dict(fact=one["fact"], prompt=one["prompt"], panel=place)
            found.append(dots.assign(share=dots["value"] / top, **names))
        found = pd.concat(found, ignore_index=True)
        found["shared"] = found.duplicated(["fact", "layer", "neuron"], keep=False)
        for (place, (_, title, state, _)), ax in zip(enumerate(row), line):
            here = found[found["panel"] == place]
            drawn = here.assign(value=here["share"]) if kind == "attribution" else here
            mesh = scatter_neurons(drawn, ax, norm)
            if here.empty:
                ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center")
            layers, neurons = np.shape(state[kind])
            ax.set(xlim=(-0.5, neurons), ylim=(-0.5, layers), xlabel="neuron", ylabel=label)
            ax.set_title(f"{title}\nP(answer) = {format_value(state['probability'])}".strip())
            ax.title.set_fontsize(8)
            ax.label_outer()
        frames.append(found)
    bar = fig.colorbar(mesh, ax=axes, location="bottom", shrink=0.7, aspect=40, pad=0.02)
    bar.set_label(KINDS[kind])
    return frames


def _wrapped(text, width) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder=" …"))


def _subject(one) -> str:
    return " → ".join(one["fact"].split("|")[1:])


def figure_1(maps, t=0.2):
    """Figure 1: two queries of each of two facts, a row a fact: the neurons above `t` of the
    query's largest attribution, as shares of it, since a confident query's is a thousand times an
    unsure one's; beside them those of the largest activations, on one scale.

    maps: from `localize.example_maps`. Returns the figure and its dots as a tidy frame."""
    facts = [list(group) for _, group in groupby(maps, key=itemgetter("fact"))]
    fig = plt.figure(figsize=(WIDE, 2.1 * len(facts) + 0.9))
    labels = [f"{_wrapped(_subject(fact[0]), 22)}\nlayer" for fact in facts]
    frames = []
    for part, kind in zip(fig.subfigures(1, 2), KINDS):
        cells = [[(one, _wrapped(one["prompt"], 22), one, one) for one in fact] for fact in facts]
        found = _draw_maps(part, cells, labels, kind, t)
        part.suptitle(f"{kind}, {SHOWN.format(t)}", fontsize=9)
        frames += [dots.assign(kind=kind) for dots in found]
    return fig, pd.concat(frames, ignore_index=True)


def figure_conditions(maps, conditions, kind, t=0.2):
    """Figures 7 and 10: the neurons of queries as in Figure 1, a column a query and a row a
    condition, all by the scale of the unmodified one.

    maps: from `knowledge_synapses.scaled_maps`. kind: "attribution" or "activation". Returns the
    figure and its dots."""
    fig = plt.figure(figsize=(WIDE, 1.6 + 1.6 * len(conditions)))
    cells = []
    for name in conditions:
        cells.append([])
        for one in maps:
            title = f"{_wrapped(_subject(one), 22)}\n{_wrapped(one['prompt'], 22)}"
            title = title if name == conditions[0] else ""
            cells[-1].append((one, title, one[name], one["unmodified"]))
    found = _draw_maps(fig, cells, [f"{name}\nlayer" for name in conditions], kind, t)
    fig.suptitle(f"{kind}, {SHOWN.format(t)}", fontsize=9)
    frames = [dots.assign(condition=name, kind=kind) for name, dots in zip(conditions, found)]
    return fig, pd.concat(frames, ignore_index=True)


def figure_places(found, num_heads):
    """Where synapses sit: the share of all that each column (token of the prompt) has, and the mean
    number of a query in each layer and head."""
    by_head = np.array(found["by_head"].tolist())  # (queries, layers * heads)
    heads = by_head.mean(0).reshape(-1, num_heads)
    by_column = [*zip_longest(*found["by_column"], fillvalue=np.nan)]  # prompts differ in length
    by_column = np.array(by_column, float).T.copy() / heads.size  # (queries, columns)
    total = np.nansum(by_column, 0)
    places = pd.DataFrame({"column": range(len(total)), "share": np.nanmean(by_column, 0)})
    places["n"] = (~np.isnan(by_column)).sum(0)
    places["of_all"] = total / max(total.sum(), 1e-30)
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 2.8))
    shown = places[places["of_all"] >= 0.005]
    told = [f"{100 * share:.0f} %" for share in shown["of_all"]]
    names = ["first token", *(f"token {one + 1}" for one in shown["column"][1:])]
    left.bar_label(left.barh(names, shown["of_all"], color="0.4"), told, padding=3)
    title = f"first token: {100 * places['of_all'][0]:.0f} % of all synapses"
    left.set(title=title, xlabel="share of all synapses", xlim=(0, 1.1))
    left.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    left.invert_yaxis()
    typical = np.median(heads)
    mesh = right.imshow(heads, "PuOr", norm=CenteredNorm(typical), aspect="auto", origin="lower")
    fig.colorbar(mesh, ax=right, label="synapses a query")
    right.set(xlabel="head", ylabel="layer", title=f"each head (white: the median, {typical:.2f})")
    for axis in (right.xaxis, right.yaxis):
        axis.get_major_locator().set_params(integer=True)
    cells = [(l, h, heads[l, h]) for l, h in np.ndindex(heads.shape)]
    numbers = pd.DataFrame(cells, columns=["layer", "head", "synapses"])
    return fig, pd.concat([numbers, places], ignore_index=True)


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
