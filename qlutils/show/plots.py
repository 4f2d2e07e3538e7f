"""Figures of the study. Plot functions take a tidy frame and an `ax`, return the `ax` and compute
nothing; `figure_...` put them together and return the figure, and the plotted numbers where these
are not the frame they got.

One colour per method, class and model everywhere, from palettes that colour-blind readers can tell
apart (Okabe & Ito for methods and classes, Tol's muted scheme for models).
"""

import io
import textwrap
from dataclasses import dataclass
from itertools import cycle, groupby, product, zip_longest
from operator import itemgetter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from qlutils.files import write_bytes
from qlutils.show.stats import LEAST, STATISTICS
from qlutils.show.tables import csv_text, files_of

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
    "self": "Self",
    "union": "Union",
    "intersection": "Inter.",
    "refine": "Refine",
    "irrelevant": "Irrelevant",
    "enhance": "enhanced",
    "suppress": "suppressed",
    "average": "average of both",
    "probability": r"$\Delta$Prob",
    "value": r"$\Delta$Value",
    "static": "static threshold",
    "otsu": "Otsu's threshold",
    "cs1": "$CS_1$",
    "cs2": "$CS_2$",
    "predominance": r"predominance $\mathcal{P}$",
    "rel": "Rel",
    "gen": "Gen",
    "loc": "Loc",
    "avg": "Avg",
    "I": "$K_{I}$",
    "II": "$K_{II}$",
    "all": "all facts",
    "I, known": "$K_{I}$, known queries",
    "II, known": "$K_{II}$, known queries",
    "broken": "broken texts",
}
MAX_PNG = 150_000  # bytes
INTERVAL = f"line: 95 % bootstrap over facts; –: fewer than {LEAST} facts"
FEW = 10  # up to this many values are drawn as such: a shape alone would say more than is known


plt.style.use(Path(__file__).with_name("study.mplstyle"))  # for every figure from here on


def model_colors(models) -> dict:
    """{model: colour}; models without a colour of their own get one by their place in the list."""
    others = cycle(_OTHER_COLORS)
    return {name: MODEL_COLORS.get(name) or next(others) for name in models}


def _label(name):
    return LABELS.get(name, name)


def _patches(colors):
    return [Patch(color=color, label=_label(name)) for name, color in colors.items()]


def _legend(fig, colors, title=None):
    """One legend above all panels."""
    where = dict(loc="outside upper center", ncols=len(colors))
    fig.legend(
        handles=_patches(colors),
        title=title,
        title_fontsize=6.5,
        **where,
    )


# --- violins --------------------------------------------------------------------------------------


def violins(frame, ax, *, x, hue, value, colors):
    """Violins of `value` for each level of column `x`, those of column `hue` side by side in their
    `colors`.

    frame: one row a fact; NaNs are not drawn. The numbers of facts drawn stand after each level of
    x, one where all are equal; a group without facts shows as 0."""
    levels = list(dict.fromkeys(frame[x]))
    width = 0.8 / len(colors)
    labels = []
    frame = frame.dropna(subset=[value])
    for at, level in enumerate(levels):
        counts = []
        for place, (name, color) in enumerate(colors.items()):
            values = frame.loc[(frame[x] == level) & (frame[hue] == name), value].to_numpy(float)
            _violin(ax, values, at + (place - (len(colors) - 1) / 2) * width, 0.95 * width, color)
            counts.append(str(len(values)))
        labels.append(f"{level} ({' / '.join(counts if len(set(counts)) > 1 else counts[:1])})")
    ax.set_xticks(range(len(levels)), labels)
    ax.set(
        xlim=(-0.6, len(levels) - 0.4),
        ylim=(-0.03, 1.03),
        ylabel=_label(value),
    )
    return ax


def _violin(ax, values, at, width, color):
    """A violin from the smallest to the largest value; a bar as wide as its share for each of a few
    different values, between which a violin would show facts that there are not."""
    if len(values) == 0:
        return
    found, counts = np.unique(np.round(values, 9), return_counts=True)
    if len(found) <= FEW and len(found) < len(values):
        wide = width * counts / counts.max()
        high = max(0.012, 0.6 * np.diff(found).min(initial=0.03))
        ax.barh(
            found,
            wide,
            high,
            left=at - wide / 2,
            color=color,
            alpha=0.8,
        )
    elif len(found) > 1:
        [body] = ax.violinplot([values], [at], widths=width, showextrema=False)["bodies"]
        body.set(
            facecolor=color,
            edgecolor=color,
            alpha=0.8,
            linewidth=0.3,
        )
    if len(values) <= FEW or len(found) == 1:
        ax.hlines(values, at - width / 3, at + width / 3, color="black", linewidth=0.4)
    ax.hlines(np.median(values), at - width / 2, at + width / 2, color="black", linewidth=0.9)


def figure_thresholds(frame):
    """Share of the facts in K_II by the KN threshold and the static threshold on CS2 (see
    `threshold_sensitivity`)."""
    fig, ax = plt.subplots(figsize=(WIDE / 2, 2.0))
    shares = frame.pivot(
        index="t",
        columns="static",
        values="R_II",
    )
    scale = dict(
        vmin=0,
        vmax=1,
        cmap="magma_r",
        cbar_kws={"label": "share of $K_{II}$"},
    )
    sns.heatmap(
        shares,
        ax=ax,
        annot=True,
        fmt=".2f",
        annot_kws={"fontsize": 6.5},
        **scale,
    )
    ax.set(xlabel="static threshold on $CS_2$", ylabel="KN threshold $t$")
    return fig, frame


def figure_cs2(frames, method, line=0.3):
    """Figure 3, 8 or 9: CS2 of several models' facts (a frame a model, with a column model) by
    relation, with the paper's example threshold as a line."""
    frame = pd.concat(frames, ignore_index=True)[["model", "relation", "fact", "cs2"]]
    fig, ax = plt.subplots(figsize=(WIDE, 2.6))
    colors = model_colors(dict.fromkeys(frame["model"]))
    violins(
        frame,
        ax,
        x="relation",
        hue="model",
        value="cs2",
        colors=colors,
    )
    where = dict(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(colors),
        borderaxespad=0.2,
    )
    ax.legend(handles=_patches(colors), **where)
    ax.axhline(
        line,
        color="black",
        linestyle="--",
        linewidth=0.7,
    )
    ax.tick_params("x", rotation=90)
    ax.set_xlabel("relation (number of facts)")
    ax.set_title(f"localised by {method}", loc="left")
    return fig, frame


def figure_predominance(facts):
    """Figure 5: `predominance` and `predominance_rest` by model and class (number of facts), by
    both thresholds."""
    fig, axes = plt.subplots(2, 2, figsize=(WIDE, 4.0), sharey=True)
    values = {"predominance": "as in the paper", "predominance_rest": "without the first token"}
    named = facts.assign(model=facts["model"].str.replace("/", "/\n") + "\n")  # to fit
    for threshold, row in zip(("static", "otsu"), axes):
        for (value, title), ax in zip(values.items(), row):
            by = dict(
                x="model",
                hue=f"class_{threshold}",
                colors=CLASS_COLORS,
            )
            violins(named, ax, value=value, **by)
            ax.set(title=title if ax in axes[0] else "", ylabel="")
        row[0].set_ylabel(f"{_label('predominance')}\n{_label(threshold)}")
    _legend(fig, CLASS_COLORS)
    columns = ["model", "fact", "relation", "class_static", "class_otsu", *values, "n_queries"]
    return fig, facts[columns]


# --- bars -----------------------------------------------------------------------------------------


def bars_with_intervals(frame, ax, *, x, hue, y="mean"):
    """Figures 4 and 6: grouped bars of column `y` with the interval `y`_low to `y`_high, and n
    where there is one.

    frame: one row a bar, with columns x, hue (in BAR_COLORS), y, y_low, y_high and perhaps n. A
    bar that is undefined, or whose interval is, is left out and marked "–"; n stands once where it
    depends on one of x and hue, else at every bar."""
    groups = list(dict.fromkeys(frame[x]))
    hues = list(dict.fromkeys(frame[hue]))
    width = 0.8 / len(hues)
    ticks = [_label(group) for group in groups]
    hanging = frame[y].max() < 0  # all bars point down
    n_of_hue = _counts(frame, hue)
    n_of_group = _counts(frame, x)
    if n_of_hue:
        counts = n_of_hue if len(set(n_of_hue)) > 1 else n_of_hue[:1]
        ax.annotate(
            f"n = {' / '.join(counts)}",
            (0.99, 0.02 if hanging else 0.98),
            xycoords="axes fraction",
            ha="right",
            va="bottom" if hanging else "top",
            fontsize=6,
        )
    elif n_of_group:
        ticks = [f"{tick}\nn = {count}" for tick, count in zip(ticks, n_of_group)]
    for row in frame.to_dict("records"):
        at = groups.index(row[x]) + (hues.index(row[hue]) - (len(hues) - 1) / 2) * width
        bar = [row[y], row[f"{y}_low"], row[f"{y}_high"]]
        top = _bar(ax, at, bar, width * 0.92, BAR_COLORS[row[hue]], hanging)
        if "n" in row and not (n_of_hue or n_of_group):
            _upright(ax, at, top, f"n = {row['n']:.0f}")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.margins(y=0.2)
    ax.set_xticks(range(len(groups)), ticks)
    ax.set(xlim=(-0.6, len(groups) - 0.4), ylabel=_label(y))
    return ax


def _bar(ax, at, bar, width, color, hanging):
    """A bar (value, low, high) with its interval, in which the value need not lie; "–" where it is
    undefined. Its top, None without a bar."""
    if pd.isna(bar).any():
        ax.annotate("–", (at, 0), ha="center", va="top" if hanging else "bottom")
        return None
    value, low, high = bar
    ax.bar(at, value, width, color=color)
    ax.vlines(at, low, high, color="black", linewidth=0.7)
    return max(0.0, value, high)


def _upright(ax, at, top, text):
    """A number above a bar, or above the sign that there is none."""
    ax.annotate(
        text,
        (at, top or 0.0),
        xytext=(0, 6 if top is None else 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=90,
        fontsize=6,
    )


def _counts(frame, by) -> list[str]:
    """n of each level of column `by`; empty where a level has several, or there is no n."""
    levels = frame.groupby(by, sort=False)["n"].unique() if "n" in frame else []
    single = all(len(values) == 1 for values in levels)
    return [f"{values[0]:.0f}" for values in levels] if single else []


def _beside_known(frame) -> pd.DataFrame:
    """A table of `effects.summary` with `bar`: the class, and after each the same of known queries
    ("I, known"), if any."""
    known = frame["queries"] == "known"
    frame = frame.assign(bar=frame["class"] + np.where(known, ", known", ""))
    if not (known & (frame["n"] > 0)).any():
        frame = frame[~known]
    order = list(BAR_COLORS)
    return frame.sort_values("bar", key=lambda bars: bars.map(order.index), kind="stable")


def figure_bars(frame, *, row, column, x="set", y="trimmed", ylabel=""):
    """Figures 4 and 6: bars of a table of `effects.summary` by `x` and class, those of known
    queries beside where there are any; a row of panels each level of column `row` of the frame, a
    column each of `column`. `ylabel` stands before the row's level."""
    tops, sides = (list(dict.fromkeys(frame[name])) for name in (row, column))
    bars = _beside_known(frame)
    ways = column == "direction"
    fig, axes = plt.subplots(
        len(tops),
        len(sides),
        figsize=(WIDE, 0.7 + 1.75 * len(tops)),
        squeeze=False,
        sharey="col" if ways else "row",  # enhancing does far less
    )
    for (top, side), ax in zip(product(tops, sides), axes.flat):
        part = bars[(bars[row] == top) & (bars[column] == side)]
        bars_with_intervals(
            part,
            ax,
            x=x,
            hue="bar",
            y=y,
        )
        ax.set_title(_label(side) if ax in axes[0] else "", pad=8)
        ax.set_ylabel(f"{ylabel}{_label(top)}" if ax in axes[:, 0] else "")
    for ax in axes[0] if ways else axes[:, 0]:
        ax.set_ylim(top=1.15 * ax.get_ylim()[1])  # room for the numbers on the bars
    shown = {name: BAR_COLORS[name] for name in BAR_COLORS if (bars["bar"] == name).any()}
    _legend(fig, shown, f"{STATISTICS[y]} over queries (n); {INTERVAL}")
    return fig


def figure_edits(table, threshold, sets):
    """(figure, plotted numbers) of Table 2 or 3: a row an operation; Rel, Gen, Loc and Avg of each
    class, each with the n edits for which it is defined, then the median dPPL."""
    table = table[(table["threshold"] == threshold) & table["neurons"].isin(sets)]
    plotted = _by_metric(table)
    classes = list(dict.fromkeys(table["class"]))
    ops = list(dict.fromkeys(table["op"]))
    widths = [4] * len(classes) + [len(classes) + 1]
    size = (WIDE, 2.3 * len(ops))
    grid = dict(width_ratios=widths, squeeze=False)
    fig, axes = plt.subplots(len(ops), len(widths), figsize=size, **grid)
    for op, (*panels, last) in zip(ops, axes):
        here = plotted[plotted["op"] == op]
        is_dppl = here["metric"] == "dppl"
        for ax, name in zip(panels, classes):
            part = here[~is_dppl & (here["class"] == name)]
            bars_with_intervals(part, ax, x="metric", hue="neurons")
            ax.set(
                title=f"{op}, {_label(name)}",
                ylabel="",
                ylim=(0, 1.02),
            )
        dppl = here[is_dppl]
        bars_with_intervals(dppl, last, x="class", hue="neurons")
        unbounded = dppl["mean"].abs().max() > 1  # broken texts
        last.set(title=f"{op}, median dPPL{' (log)' if unbounded else ''}", ylabel="")
        if unbounded:
            last.set_yscale("symlog", linthresh=0.1)
        last.margins(y=0.4)  # room for the numbers on the bars, on either scale
    _legend(fig, {name: SET_COLORS[name] for name in dict.fromkeys(table["neurons"])}, INTERVAL)
    return fig, plotted


def _by_metric(table) -> pd.DataFrame:
    """A row a metric and row of a table of edits: its value as `mean`, its interval and n."""
    keys = ["threshold", "class", "op", "neurons"]
    parts = []
    for metric in ("rel", "gen", "loc", "avg", "dppl"):
        n = f"n_{metric}" if f"n_{metric}" in table else "n"
        part = table[[*keys, metric, f"{metric}_low", f"{metric}_high", n]]
        part = part.set_axis([*keys, "mean", "mean_low", "mean_high", "n"], axis=1)
        parts.append(part.assign(metric=_label(metric)))
    return pd.concat(parts, ignore_index=True)


# --- heatmaps -------------------------------------------------------------------------------------


def pool_neurons(values, bins=100) -> pd.DataFrame:
    """(layers, neurons) values as a tidy frame of at most `bins` columns: layer, first, last,
    value.

    Single neurons among thousands are narrower than a pixel, so each bin keeps its value of largest
    magnitude, with its sign. `first` and `last` are the neurons a bin covers."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        shape = values.shape
        raise ValueError(f"values must be finite and of shape (layers, neurons), not {shape}")
    parts = []
    layers = range(len(values))
    for bin in np.array_split(np.arange(values.shape[1]), min(bins, values.shape[1])):
        block = values[:, bin]
        strongest = block[layers, np.abs(block).argmax(1)]
        parts.append(
            dict(
                layer=layers,
                first=bin[0],
                last=bin[-1],
                value=strongest,
            )
        )
    pooled = pd.concat(map(pd.DataFrame, parts), ignore_index=True)
    return pooled.sort_values(["layer", "first"], ignore_index=True)


def shared_norm(*frames) -> Normalize:
    """One colour scale for several pooled frames: symmetric about 0 if a value is negative, else
    from 0."""
    values = np.concatenate([frame["value"].to_numpy(float) for frame in frames])
    top = np.abs(values).max(initial=0.0) or 1.0
    return Normalize(-top if (values < 0).any() else 0.0, top)


def heatmap_neurons(frame, ax, norm):
    """Layer by neuron, from a frame of `pool_neurons`; darker is larger in magnitude.

    norm: from `shared_norm` over all panels that are to be compared."""
    table = frame.pivot(
        index="layer",
        columns="first",
        values="value",
    )
    edges = [*table.columns, frame["last"].max() + 1], np.arange(len(table) + 1) - 0.5
    cmap = "RdBu_r" if norm.vmin < 0 else "magma_r"
    ax.pcolormesh(
        *edges,
        table.to_numpy(),
        norm=norm,
        cmap=cmap,
        rasterized=True,
    )
    ax.set(xlabel="neuron", ylabel="layer")
    ax.yaxis.get_major_locator().set_params(integer=True)
    return ax


@dataclass
class _Panel:
    """A map (layers, neurons) to draw; those of one `norm` share a colour scale."""

    values: np.ndarray
    title: str
    label: str
    norm: Normalize


def _norms(values, kind) -> list[Normalize]:
    """The colour scale of each query, given all its maps: its own for attributions, one for all
    activations."""
    frames = [[pool_neurons(one) for one in maps] for maps in values]
    if kind == "attribution":
        return [shared_norm(*of_query) for of_query in frames]
    return [shared_norm(*sum(frames, []))] * len(frames)


def _heatmaps(fig, panels, kind) -> list[pd.DataFrame]:
    """Draw the rows of `panels`; their pooled frames."""
    axes = fig.subplots(
        len(panels),
        len(panels[0]),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    frames = []
    scales = {}  # the panels of each colour scale
    for one, ax in zip(sum(panels, []), axes.flat):
        frames.append(pool_neurons(one.values))
        heatmap_neurons(frames[-1], ax, one.norm)
        ax.set_title(one.title, fontsize=6.5)
        ax.set_ylabel(f"{one.label}\nlayer", fontsize=6.5)
        ax.label_outer()
        scales.setdefault(id(one.norm), []).append(ax)
    for group in scales.values():
        _colorbar(fig, group, kind, alone=len(scales) == 1)
    return frames


def _colorbar(fig, axes, kind, alone):
    """The scale of the panels `axes`: beside all of them where there is no other, beside a single
    one, below a column."""
    mesh = axes[0].collections[0]
    one = len(axes) == 1
    bar = fig.colorbar(
        mesh,
        ax=axes,
        location="right" if one or alone else "bottom",
        label="" if one else kind,
        pad=0.03,
        shrink=0.8,
    )
    if alone:
        return
    bar.ax.tick_params(labelsize=6)
    bar.locator = MaxNLocator(3)
    bar.update_ticks()


def _prompt(one, width) -> str:
    text = f"{one['prompt']}\xa0…"
    return "\n".join(textwrap.wrap(text, width, max_lines=4, placeholder=" …"))


def _subject(one) -> str:
    return " | ".join(one["fact"].split("|")[1:])


def _noted(frame, one, **notes) -> pd.DataFrame:
    """A pooled frame with the query it is of."""
    return frame.assign(
        fact=one["fact"],
        prompt=one["prompt"],
        **notes,
    )


def figure_1(maps):
    """Figure 1: (L, N) maps of two queries of each of two facts, a row a fact; attribution on a
    colour scale for each query, since a confident query's is a thousand times an unsure one's;
    beside it activation, on one scale.

    maps: from `localize.example_maps`. Returns the figure and the plotted numbers as a tidy
    frame."""
    facts = [list(group) for _, group in groupby(maps, key=itemgetter("fact"))]
    titles = {
        "attribution": "attribution, each query on a scale of its own",
        "activation": "activation",
    }
    fig = plt.figure(figsize=(WIDE, 1.5 * len(facts) + 0.2))
    frames = []
    for part, (kind, title) in zip(fig.subfigures(1, 2), titles.items()):
        norms = iter(_norms([[one[kind]] for one in maps], kind))
        rows = []
        for fact in facts:
            label = _subject(fact[0]).replace(" | ", "\n")
            rows.append([_Panel(one[kind], _prompt(one, 22), label, next(norms)) for one in fact])
        pooled = _heatmaps(part, rows, kind)
        part.suptitle(title, fontsize=8)
        frames += [_noted(frame, one, kind=kind) for frame, one in zip(pooled, maps)]
    return fig, pd.concat(frames, ignore_index=True)


def figure_conditions(maps, conditions, kind):
    """Figures 7 and 10: (L, N) maps of queries, a column a query and a row a condition, on the
    scale of all conditions: of the query, for the attribution; of all queries, for the activation.

    maps: from `knowledge_synapses.scaled_maps`. kind: "attribution" or "activation". Returns the
    figure and its numbers."""
    fig = plt.figure(figsize=(WIDE, 0.9 + 1.15 * len(conditions)))
    every = []  # the maps of all conditions there are, of each query
    for one in maps:
        every.append([value[kind] for value in one.values() if isinstance(value, dict)])
    norms = _norms(every, kind)
    rows = []
    for name in conditions:
        rows.append([])
        for one, norm in zip(maps, norms):
            title = f"{_subject(one)}\n{_prompt(one, 28)}" if name == conditions[0] else ""
            rows[-1].append(_Panel(one[name][kind], title, name, norm))
    pooled = _heatmaps(fig, rows, kind)
    frames = []
    for frame, (name, one) in zip(pooled, product(conditions, maps)):
        frames.append(_noted(frame, one, condition=name, kind=kind))
    return fig, pd.concat(frames, ignore_index=True)


def figure_places(found, num_heads):
    """Where synapses sit: mean number in each layer and head, and how likely each column is one in
    a layer and head."""
    by_head = np.array(found["by_head"].tolist())  # (queries, layers * heads)
    heads = by_head.mean(0).reshape(-1, num_heads)
    by_column = [*zip_longest(*found["by_column"], fillvalue=np.nan)]  # prompts differ in length
    by_column = np.array(by_column, float).T.copy() / heads.size  # (queries, columns)
    shares = np.nanmean(by_column, 0)
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 2.2), gridspec_kw=dict(wspace=0.12))
    rows = np.arange(heads.shape[0] + 1) - 0.5
    columns = np.arange(num_heads + 1) - 0.5
    mesh = left.pcolormesh(columns, rows, heads, cmap="magma_r", vmin=0)
    fig.colorbar(mesh, ax=left, label="synapses a query")
    left.set(xlabel="head", ylabel="layer")
    for axis in (left.xaxis, left.yaxis):
        axis.get_major_locator().set_params(integer=True)
    right.bar(range(len(shares)), shares, color="0.4")
    right.set_xlim(-0.6, 0.6 + max(np.flatnonzero(shares > 0.002 * shares.max()), default=0))
    right.set_xlabel("column (token of the prompt)")
    right.set_ylabel("share of layers and heads\nin which it is a synapse")
    cells = [(l, h, heads[l, h]) for l, h in np.ndindex(heads.shape)]
    numbers = pd.DataFrame(cells, columns=["layer", "head", "synapses"])
    counts = (~np.isnan(by_column)).sum(0)
    places = pd.DataFrame({"column": range(len(shares)), "share": shares, "n": counts})
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
