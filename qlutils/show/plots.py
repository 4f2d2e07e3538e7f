"""Figures of the study. Plot functions take a tidy frame and an `ax`, return the `ax` and compute
nothing; `figure_...` put them together and return the figure, and the plotted numbers where a
notebook does not have them in this shape.

One colour per method, class and model everywhere, from palettes that colour-blind readers can tell
apart (Okabe & Ito for methods and classes, Tol's muted scheme for models).
"""

import io
import textwrap
from itertools import cycle, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogFormatterMathtext, LogLocator
from PIL import Image

from qlutils.show.stats import LEAST, STATISTICS
from qlutils.show.tables import csv_bytes, format_value, write_files

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
    "pretrained/smollm2-135m": "#AA4499",
    "pretrained/gemma-3-270m": "#999933",
    "pretrained/qwen2.5-coder-1.5b": "#117733",
    "gpt2": "#332288",
    "meta-llama/Llama-2-7b-hf": "#44AA99",
    "meta-llama/Meta-Llama-3-8B": "#DDCC77",
}
_OTHER_COLORS = ("#CC6677", "#882255", "#88CCEE", "#117733")
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
CONTROLS = {
    "self_random": "self",
    "union_random": "union",
    "irrelevant": "self",
}
CHANGE = {  # what a bar of Figure 4 and 6 is, by what stands at its ticks
    "set": "ΔProb: change of P(answer),\nas claimed (1 = 100 %)",
    "direction": "change, positive as claimed:\nup if enhanced, down\nif suppressed (1 = 100 %)",
}
WIDE_TICKS = (-100, -10, -1, -0.5, 0, 0.5, 1, 10, 100, 1000, 10_000)  # of changes far above 1
MAX_PNG = 150_000  # bytes
INTERVAL = f"line: 95 % bootstrap over facts; ×: of fewer than {LEAST} facts"
FEW = 5  # facts from which on a median is drawn


plt.style.use(Path(__file__).with_name("study.mplstyle"))  # for every figure from here on


def model_colors(models):
    """{model: colour}; models without a colour of their own get one by their place in the list."""
    others = cycle(_OTHER_COLORS)
    return {name: MODEL_COLORS.get(name) or next(others) for name in models}


def _label(name):
    return LABELS.get(name, name)


def _panels(rows, columns, height, **grid):
    """A figure as wide as a page, wider for more than three columns, and its axes, a row a row of
    panels."""
    return plt.subplots(
        rows,
        columns,
        figsize=(WIDE * max(1, columns / 3), height),
        squeeze=False,
        **grid,
    )


def _legend(fig, colors, title="", hollow=""):
    """One legend above all panels: {name: colour}, and what hollow bars are, if any."""
    handles = [Patch(color=color, label=_label(name)) for name, color in colors.items()]
    if hollow:
        handles.append(Patch(facecolor="none", edgecolor="0.3", label=hollow))
    fig.legend(
        handles=handles,
        title=title,
        loc="outside upper center",
        ncols=len(handles),
    )


# --- facts ----------------------------------------------------------------------------------------


def figure_cs2(frames, method, names, line=0.3):
    """Figure 3, 8 or 9: CS2 of several models' facts (rows of `classified_facts` a model, with a
    column model), a dot each, by relation, from the lowest median to the highest; the thresholds
    and the paper's example as lines. names: {code of a relation: its name}."""
    columns = ["model", "relation", "fact", "cs2", "threshold_static", "threshold_otsu"]
    frame = pd.concat(frames, ignore_index=True)[columns]
    drawn = frame.dropna(subset="cs2").sort_values("cs2", kind="stable")
    colors = model_colors(frame["model"].unique())
    medians = drawn.groupby("relation")["cs2"].median().sort_values(kind="stable")
    fig, ax = plt.subplots(figsize=(WIDE, 3.8))
    _draw_cs2(ax, drawn, medians.index, colors)
    counts = pd.crosstab(drawn["relation"], drawn["model"])
    counts = counts.reindex(index=medians.index, columns=list(colors), fill_value=0)
    ticks = [f"{names.get(code, code)} ({_slashed(n)})" for code, *n in counts.itertuples()]
    ax.set_xticks(
        range(len(ticks)),
        ticks,
        rotation=90 if len(ticks) > 20 else 40,
        rotation_mode="anchor",
        ha="right",
    )
    ax.set(
        xlim=(-0.6, len(ticks) - 0.4),
        ylim=(-0.03, 1.03),
        xlabel="relation (n facts)" if len(colors) == 1 else "relation (n facts, by model)",
        ylabel="$CS_2$ of a fact",
    )
    several = colors if len(colors) > 1 else {}
    title = f"localised by {method}"
    ax.set_title(title if several else f"{', '.join(colors)}, {title}", loc="left")
    _thresholds(ax, frame.drop_duplicates("model"), line, several)
    if several:
        _legend(fig, several)
    return fig, frame


def _draw_cs2(ax, drawn, order, palette):
    """A dot a fact, by relation and beside it by model; a line at the median of `FEW` or more."""
    shared = dict(
        x="relation",
        y="cs2",
        hue="model",
        hue_order=list(palette),
        order=order,
        legend=False,
        ax=ax,
    )
    models = len(palette)
    crowded = len(drawn) > 40 * models * len(order)
    np.random.seed(0)  # whose numbers seaborn's jitter takes
    sns.stripplot(
        drawn,
        **shared,
        palette=palette,
        dodge=True,
        jitter=0.4,
        size=1.5 if crowded else 3,
        alpha=0.5 if crowded else 0.8,
        rasterized=True,
    )
    n = drawn.groupby(["relation", "model"])["cs2"].transform("size")
    sns.pointplot(
        drawn[n >= FEW],
        **shared,
        palette=dict.fromkeys(palette, "black"),
        estimator="median",
        errorbar=None,
        linestyle="none",
        dodge=0.8 - 0.8 / models,
        marker="_",
        markersize=340 / models / max(1, len(order)),  # points: as wide as the dots
        zorder=4,  # above them
    )


def _slashed(counts):
    """ "62 / 52"; one number where all are equal."""
    counts = list(map(str, counts))
    return counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def _thresholds(ax, models, line, colors):
    """The thresholds on CS2, a row a model, and the example line, named on the right; Otsu's in the
    colour of its model."""
    static = models["threshold_static"].iloc[0]
    lines = [
        (static, f"static threshold, {static:g}", "black"),
        (line, f"paper's example, {line:g}", "black"),
    ]
    for model, otsu in models.set_index("model")["threshold_otsu"].dropna().items():
        lines.append((otsu, f"Otsu's, {otsu:.2f}", colors.get(model, "black")))
    free = 0.0  # where a name stands on no other
    for value, name, color in sorted(lines):
        ax.axhline(
            value,
            color=color,
            linestyle="--",
            linewidth=0.7,
            zorder=0,
        )
        height = max(value, free)
        ax.text(
            1.01,
            height,
            name,
            transform=ax.get_yaxis_transform(),
            va="center",
            color=color,
        )
        free = height + 0.08


def figure_thresholds(frame, otsu, t=0.2, static=0.1):
    """Share of the facts in K_II by the KN threshold and the static threshold on CS2 (see
    `threshold_sensitivity`); marked are the paper's static one and `otsu`, Otsu's at this t."""
    fig, ax = plt.subplots(figsize=(5.2, 2.8))
    shares = frame.pivot(index="t", columns="static", values="R_II")
    sns.heatmap(
        shares,
        ax=ax,
        vmin=0,
        vmax=1,
        cmap="cividis_r",
        cbar_kws={"label": "share of facts in $K_{II}$"},
        annot=True,
        annot_kws={"fontsize": 8},
        fmt=".2f",
    )
    ax.set(xlabel="static threshold on $CS_2$", ylabel="t: share of the largest attribution")
    ax.tick_params("y", rotation=0)
    middles = np.arange(len(shares.columns) + 1) + 0.5
    ours, papers = np.interp([otsu, static], [*shares.columns, 1.0], middles)
    ax.autoscale(False)  # which the marks would stretch
    above = dict(ha="center", va="bottom")
    ax.text(
        papers,
        -0.12,
        f"paper's, {static:g}",
        **above,
    )
    ax.plot(ours, -0.12, "v", color="black", clip_on=False)
    ax.text(ours, -0.5, f"Otsu's at t = {t:g}: {otsu:.2f}", **above)  # higher: both may lie close
    ax.axvspan(
        papers - 0.5,
        papers + 0.5,
        fill=False,
        color="#D55E00",
        linewidth=2,
        clip_on=False,
    )
    return fig, frame


def figure_predominance(facts):
    """Figure 5: how many facts have which `predominance` and `predominance_rest`, a row a model and
    threshold by which each class has `LEAST` facts (the static one where none is so); a smaller
    class is not drawn."""
    rows = {}
    short = {name: name.rpartition("/")[2] for name in facts["model"].unique()}
    if len(set(short.values())) < len(short):  # demo/gpt2 and gpt2
        short = {}
    for model, part in facts.groupby("model", sort=False):
        divides = [
            name for name in ("static", "otsu") if len(_large_classes(part[f"class_{name}"])) == 2
        ]
        for threshold in divides or ["static"]:
            name = f"{short.get(model, model)}\n{_label(threshold)}"
            rows[name] = part.assign(label=part[f"class_{threshold}"])
    fig, axes = _panels(
        len(rows),
        2,
        0.8 + 1.45 * len(rows),
        sharex=True,
        sharey=True,
    )
    for (name, part), (left, right) in zip(rows.items(), axes):
        _draw_shares(left, part, "predominance")
        _draw_shares(right, part, "predominance_rest")
        n = " / ".join(part["label"].value_counts().sort_index().astype(str))
        left.set_ylabel(f"{name}\nn = {n} facts")
    axes[0, 0].set(title="most attended token", ylim=(0, 1.25), yticks=(0, 0.5, 1))
    axes[0, 0].yaxis.set_major_formatter(_percent)
    axes[0, 1].set_title("without the first token")
    fig.supylabel("share of the facts of a class")
    classes = {name for part in rows.values() for name in _large_classes(part["label"])}
    _legend(fig, {name: CLASS_COLORS[name] for name in CLASS_COLORS if name in classes})
    columns = "model fact relation class_static class_otsu predominance predominance_rest n_queries"
    return fig, facts[columns.split()]


def _large_classes(labels):
    counts = labels.value_counts()
    return sorted(counts.index[counts >= LEAST])


def _draw_shares(ax, facts, value):
    """The distribution of a share in tenths, of the facts of each class of `LEAST` or more."""
    sns.histplot(
        x=facts[value] - 1e-9,  # a bin has its upper end
        hue=facts["label"].fillna(""),  # all may lack one
        hue_order=_large_classes(facts["label"]),
        palette=CLASS_COLORS,
        bins=np.linspace(0, 1, 11),
        stat="probability",
        common_norm=False,
        element="step",
        alpha=0.35,
        legend=False,
        ax=ax,
    )
    least = (1 / facts["n_queries"]).mean()
    ax.axvline(
        least,
        color="black",
        linestyle=":",
        zorder=3,
    )
    ax.text(least + 0.015, 1.06, f"1 of k wordings, on average {least:.2f}")
    ax.set_xlabel("predominance")


def _percent(share, _=None):
    return f"{100 * share:.0f} %"


# --- bars -----------------------------------------------------------------------------------------


def bars_with_intervals(frame, ax, *, x, hue, y="mean", base=0):
    """Grouped bars of column `y` from `base` on, with the interval `y`_low to `y`_high, in the
    frame's order.

    frame: one row a bar, with columns x, hue (in BAR_COLORS), y, y_low, y_high and hollow. A bar
    that is undefined, or whose interval is, is left out and marked "×"."""
    groups = frame.groupby(x, sort=False)
    n = groups[x].transform("size")
    width = 0.8 / n.max()
    middles = groups.ngroup() + width * (groups.cumcount() - (n - 1) / 2)
    low = f"{y}_low"
    high = f"{y}_high"
    drawn = frame.dropna(subset=[y, low, high])
    for middle in middles.drop(drawn.index):
        ax.plot(middle, base, "x", color="0.6", markersize=3, clip_on=False)
    middles = middles[drawn.index]
    colors = drawn[hue].map(BAR_COLORS)
    ax.bar(
        middles,
        drawn[y] - base,
        0.86 * width,
        base,
        color=colors.mask(drawn["hollow"], "white"),
        edgecolor=colors,
    )
    ax.vlines(middles, drawn[low], drawn[high], color="black", linewidth=0.7)
    ax.axhline(base, color="black", linewidth=0.6)
    names = frame[x].unique()
    room = max(7, 50 // len(names) // ax.get_gridspec().ncols)  # letters of a line
    ticks = [textwrap.fill(_label(name), room, break_long_words=False) for name in names]
    ax.set_xticks(range(len(names)), ticks, fontsize=7)
    ax.set_xlim(-0.6, len(names) - 0.4)
    return ax


def _counted(frame, hue, of):
    """n of the bars that are not hollow, of each level of column `hue`, in words; once where all
    have the same."""
    ends = frame[~frame["hollow"]].groupby(hue, sort=False)["n"].agg(["min", "max"])
    counts = ["–".join(dict.fromkeys(f"{n:.0f}" for n in both)) for both in ends.to_numpy()]
    return f"n = {_slashed(counts)} {of}"


def _as_bars(frame):
    """The rows of a table of `effects.summary` that become bars, with `bar`, the class, and after
    each the same of known queries ("I, known"), if any, and `hollow`, of a control, which stands
    right after what it controls."""
    known = np.where(frame["queries"] == "known", ", known", "")
    bars = frame.assign(
        bar=pd.Categorical(frame["class"] + known, BAR_COLORS),
        hollow=frame["set"].isin(CONTROLS),
        set=frame["set"].replace(CONTROLS),
    )
    bars = bars[bars["n"] > 0].sort_values("bar", kind="stable", ignore_index=True)
    return bars.astype({"bar": object})


def _empty_classes(frame):
    largest = frame.groupby(["threshold", "class"], sort=False)["n"].max()
    empty = largest.index[largest == 0]
    return "; ".join(f"{_label(at)}: no fact is in {_label(name)}" for at, name in empty)


def figure_bars(frame, *, row, column, x="set", y="trimmed", control=""):
    """Figures 4 and 6: bars of a table of `effects.summary` by `x` and class, those of known
    queries beside where there are any, `control` (what it is, in words) hollow; a row of panels
    each level of column `row` of the frame, a column each of `column` (one column lies down)."""
    bars = _as_bars(frame)
    if x == "direction":
        bars = bars[bars["direction"] != "average"]  # in which both cancel
    if frame[column].nunique() == 1:
        row, column = column, row
    tops = frame[row].unique()
    sides = frame[column].unique()
    shared = "col" if column == "direction" else "row"  # enhanced, bars are many times as high
    fig, axes = _panels(len(tops), len(sides), 1.3 + 1.75 * len(tops), sharey=shared)
    wide = bool(bars[y].abs().max() > 10)  # of answers of tiny probability
    told = {}
    for (top, side), ax in zip(product(tops, sides), axes.flat):
        part = bars[(bars[row] == top) & (bars[column] == side)]
        ax.set_ylabel(_label(top) if side == sides[0] else "")
        if shared == "row":
            ax.label_outer()
        if part.empty:
            continue
        drawn = _with_sizes(part) if x == "set" else part
        bars_with_intervals(drawn, ax, x=x, hue="bar", y=y)
        if wide:
            _far_above_1(ax)
        name = textwrap.fill(_label(side), 20, break_on_hyphens=False, break_long_words=False)
        title = [name] if ax in axes[0] else []
        n = _counted(part, "bar", "queries")
        if n != told.get(side):
            title.append(textwrap.fill(n, 90 // len(sides)))
        told[side] = n
        ax.set_title("\n".join(title))
    fig.supylabel(CHANGE[x] + "\n(logarithmic above 1)" * wide)
    shown = {name: color for name, color in BAR_COLORS.items() if name in set(bars["bar"])}
    title = f"{STATISTICS[y]} over queries; {INTERVAL}\n{_empty_classes(frame)}".strip()
    _legend(fig, shown, title, control if bars["hollow"].any() else "")
    return fig


def _far_above_1(ax):
    """Make an axis of changes logarithmic above 1."""
    ax.set_yscale("symlog", linthresh=1)
    ax.yaxis.set_major_locator(FixedLocator(WIDE_TICKS))
    ax.yaxis.set_major_formatter("{x:g}")


def _with_sizes(part):
    """A panel's bars whose sets are named with their mean number of neurons."""
    counted = part[(part["queries"] == "all") & ~part["hollow"]]
    sizes = _mean_size(counted["size"], counted["n"], counted["set"])
    names = {name: f"{_label(name)} ({size:.0f})" for name, size in sizes.items()}
    return part.assign(set=part["set"].map(names))


def _mean_size(sizes, n, by):
    """The mean over the n of all rows, by the levels of `by`."""
    return (sizes * n).groupby(by).sum() / n.groupby(by).sum()


def figure_edits(table, threshold, sets):
    """(figure, plotted numbers) of Table 2 or 3: a row an operation; Rel, Gen, Loc and Avg of each
    class, then the median perplexity after an edit over that before; random neurons hollow."""
    drawn = table["neurons"].str.removesuffix(" (random)").isin(sets)
    table = table[drawn & (table["n"] > 0)]
    by_class = table[table["threshold"] == threshold]
    few = by_class["n"].min() < LEAST  # a panel of dashes would tell nothing
    table = table[table["threshold"] == "all"] if few else by_class
    plotted = _by_metric(table)
    own = plotted["neurons"].str.removesuffix(" (random)")
    bars = plotted.assign(neurons=own, hollow=own != plotted["neurons"])
    classes = table["class"].unique()
    ops = table["op"].unique()
    measured = table["dppl"].notna().any()
    widths = [3] * len(classes) + [2] * int(measured)
    height = 0.8 + 2.1 * len(ops)
    fig, axes = _panels(len(ops), len(widths), height, width_ratios=widths, sharey="col")
    for op, panels in zip(ops, axes):
        of_op = bars[bars["op"] == op]
        shares = of_op[of_op["metric"] != "dppl"]
        for ax, name in zip(panels, classes):
            part = shares[shares["class"] == name]
            bars_with_intervals(part, ax, x="metric", hue="neurons")
            ax.set_title(f"{op}, {_label(name)}\n{_counted(part, 'metric', 'edits')}")
            ax.set_ylim(0, 1.02)
        panels[0].set_ylabel("share")
        if measured:
            factors = of_op[of_op["metric"] == "dppl"].copy()
            factors[["mean", "mean_low", "mean_high"]] += 1
            bars_with_intervals(factors, panels[-1], x="class", hue="neurons", base=1)
            panels[-1].set_title(f"{op}, perplexity\n× before (median)")
    if measured:
        _factors(axes[:, -1])
    sizes = _mean_size(table["neurons_edited"], table["n"], table["neurons"])
    named = {f"{_label(name)} ({sizes[name]:.0f} neurons)": SET_COLORS[name] for name in sets}
    _legend(fig, named, INTERVAL, "random neurons" if bars["hollow"].any() else "")
    return fig, plotted


def _factors(axes):
    """A logarithmic axis of factors, shared by the panels, from 1 to 2 at least."""
    low, high = axes[0].get_ylim()
    axes[0].set(yscale="log", ylim=(min(low, 0.9), max(high, 2.2)))
    subs = (1, 2, 5) if high < 100 else (1,)  # of many powers of ten all would be left out
    for ax in axes:
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
        ax.yaxis.set_major_formatter("{x:g}×" if high < 1e5 else LogFormatterMathtext())
        ax.yaxis.minorticks_off()


def _by_metric(table):
    """A row a metric and row of a table of edits: its value as `mean`, its interval and n."""
    parts = []
    for metric in ("rel", "gen", "loc", "avg", "dppl"):
        part = table[["threshold", "class", "op", "neurons"]].copy()
        for end in ("", "_low", "_high"):
            part[f"mean{end}"] = table[f"{metric}{end}"]
        part["n"] = table.get(f"n_{metric}", table["n"])
        parts.append(part.assign(metric=metric))
    return pd.concat(parts, ignore_index=True)


# --- maps of neurons ------------------------------------------------------------------------------


def strong_neurons(values, signed, t):
    """The neurons whose value in a (layers, neurons) map, in magnitude if `signed`, exceeds `t`:
    layer, neuron, value."""
    layer, neuron = np.nonzero((np.abs(values) if signed else values) > t)
    return pd.DataFrame(dict(layer=layer, neuron=neuron, value=values[layer, neuron]))


def _draw_maps(fig, panels, kind, t):
    """Panels, each a dict of its `row`, its place in it (`panel`), its query's fact and prompt, a
    title, and the query's state `now` and `before` any change: dots for the neurons above `t` of
    the largest value before, of the query or, as activations, of all; filled those that more than
    one of a row's prompts of a fact has. Returns the dots, values as shares of the largest."""
    signed = kind == "activation"
    columns = panels[-1]["panel"] + 1
    most = max(np.abs(panel["before"][kind]).max() for panel in panels)
    dots = []
    for panel in panels:
        largest = most if signed else panel["before"][kind].max()
        found = strong_neurons(panel["now"][kind] / (largest or 1.0), signed, t)
        place = {name: panel[name] for name in ("row", "fact", "prompt", "panel")}
        dots.append(found.assign(**place))
    dots = pd.concat(dots, keys=range(len(panels)), names=["number"])
    dots["shared"] = dots.duplicated(["row", "fact", "layer", "neuron"], keep=False)
    dots["kind"] = kind
    rows = len(panels) // columns
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    cmap = "RdBu_r" if signed else "viridis_r"
    scale = ScalarMappable(Normalize(-1 if signed else 0, 1), cmap)
    for number, (panel, ax) in enumerate(zip(panels, axes.flat)):
        _draw_map(ax, dots.query(f"number == {number}"), panel, scale)
    layers, neurons = panel["now"][kind].shape
    ax.set(xlim=(-0.5, neurons), ylim=(-0.5, layers))
    fig.suptitle(f"{kind}, neurons above {t:g} of the largest\n(filled: in both wordings)")
    fig.colorbar(
        scale,
        ax=axes,
        location="bottom",
        shrink=0.7,
        aspect=40,
        pad=0.02,
        label=f"share of the largest {'of all queries' if signed else 'of the query'}",
    )
    return dots.reset_index(drop=True)


def _draw_map(ax, dots, panel, scale):
    """The dots of one query, the larger and darker the larger in magnitude; filled where `shared`,
    rings elsewhere."""
    colors = scale.to_rgba(dots["value"])
    ax.scatter(
        dots["neuron"],
        dots["layer"],
        s=6 + 40 * dots["value"].abs().clip(upper=1),
        facecolors=np.where(dots[["shared"]], colors, 0.0),  # transparent elsewhere
        edgecolors=colors,
        linewidth=1,
        clip_on=False,
    )
    if dots.empty:
        ax.text(
            0.5,
            0.5,
            "none so large",
            transform=ax.transAxes,
            ha="center",
        )
    ax.set(xlabel="neuron", ylabel=f"{panel['row']}\nlayer")
    probability = format_value(panel["now"]["probability"])
    ax.set_title(f"{panel['title']}\nP(answer) = {probability}".strip(), fontsize=8)
    ax.label_outer()


def _wrapped(text):
    return textwrap.fill(
        text,
        22,
        max_lines=3,
        placeholder=" …",
    )


def _subject(one):
    return _wrapped(" → ".join(one["fact"].split("|")[1:]))


def figure_1(maps, t=0.2):
    """Figure 1: two queries of each of two facts, a row a fact: the neurons above `t` of the
    query's largest attribution, as shares of it, since a confident query's is a thousand times an
    unsure one's; beside them those of the largest activations, on one scale.

    maps: from `localize.example_maps`. Returns the figure and its dots as a tidy frame."""
    panels = [
        one
        | dict(
            row=_subject(one),
            panel=number % 2,
            title=_wrapped(one["prompt"]),
            now=one,
            before=one,
        )
        for number, one in enumerate(maps)
    ]
    fig = plt.figure(figsize=(WIDE, 1.05 * len(maps) + 0.9))
    left, right = fig.subfigures(1, 2)
    found = [
        _draw_maps(left, panels, "attribution", t),
        _draw_maps(right, panels, "activation", t),
    ]
    return fig, pd.concat(found, ignore_index=True).drop(columns="row")


def figure_conditions(maps, conditions, kind, t):
    """Figures 7 and 10: the neurons of queries as in Figure 1, a column a query and a row a
    condition, all by the scale of the unmodified one.

    maps: from `knowledge_synapses.scaled_maps`. kind: "attribution" or "activation". Returns the
    figure and its dots."""
    panels = []
    for name, (number, one) in product(conditions, enumerate(maps)):
        title = f"{_subject(one)}\n{_wrapped(one['prompt'])}" if name == conditions[0] else ""
        panel = dict(
            row=name,
            panel=number,
            title=title,
            now=one[name],
            before=one["unmodified"],
        )
        panels.append(one | panel)
    fig = plt.figure(figsize=(WIDE, 1.6 + 1.6 * len(conditions)))
    dots = _draw_maps(fig, panels, kind, t)
    return fig, dots.assign(condition=dots.pop("row"))


def figure_places(found, num_heads):
    """Where synapses sit: the share of all that each column (token of the prompt) has, and the mean
    number of a query in each layer and head."""
    heads = np.stack(found["by_head"]).mean(0).reshape(-1, num_heads)
    columns = pd.DataFrame(list(map(pd.Series, found["by_column"])))  # prompts differ in length
    columns /= heads.size
    places = pd.DataFrame({"share": columns.mean(), "n": columns.count()}).rename_axis("column")
    places["of_all"] = columns.sum() / (columns.sum().sum() or 1.0)
    fig, [(left, right)] = _panels(1, 2, 2.8)
    shares = places["of_all"][places["of_all"] >= 0.005]
    names = [f"token {column + 1}" if column else "first token" for column in shares.index]
    left.bar_label(left.barh(names, shares, color="0.4"), map(_percent, shares), padding=3)
    left.set_title(f"first token: {_percent(places['of_all'][0])} of all queries' synapses")
    left.set(xlabel="share of all synapses", xlim=(0, 1.1))
    left.xaxis.set_major_formatter(_percent)
    left.invert_yaxis()
    typical = np.median(heads)
    grid = pd.DataFrame(heads).rename_axis(index="layer", columns="head")
    sns.heatmap(
        grid,
        center=typical,
        cmap="PuOr",
        cbar_kws={"label": "synapses a query"},
        ax=right,
    )
    right.invert_yaxis()
    right.tick_params("y", rotation=0)
    right.set_title(f"each head (white: the median, {typical:.2f})")
    numbers = grid.stack().rename("synapses").reset_index()
    return fig, pd.concat([numbers, places.reset_index()], ignore_index=True)


# --- files ----------------------------------------------------------------------------------------


def save_figure(fig, stem, folder, data):
    """Write `stem`.png (at most 150 KB where 100 dpi can do it), .pdf and the plotted numbers as
    .csv; their paths. The same figure gives the same bytes: no dates in the files."""
    # the PDF first: a layout moves a little each time it is drawn
    pdf = rendered(fig, format="pdf", metadata={"CreationDate": None})
    contents = {"png": _small_png(fig), "pdf": pdf.getvalue(), "csv": csv_bytes(data)}
    return write_files(stem, folder, contents)


def rendered(fig, **options):
    """The buffer that `savefig` writes into."""
    buffer = io.BytesIO()
    fig.savefig(buffer, **options)
    return buffer


def _small_png(fig):
    for dpi in (200, 150, 100):
        small = io.BytesIO()
        image = Image.open(rendered(fig, format="png", dpi=dpi)).convert("RGB")
        # of the usual palette a colour bar gets colours that are not in it
        image = image.quantize(method=Image.Quantize.MAXCOVERAGE)
        image.save(
            small,
            format="png",
            optimize=True,
            dpi=(dpi, dpi),
        )
        if small.tell() <= MAX_PNG:
            break
    return small.getvalue()
