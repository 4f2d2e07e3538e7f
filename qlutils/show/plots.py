"""Figures of the study. Plot functions take a tidy frame and an `ax`, return the `ax` and compute
nothing; `figure_...` put them together and return the figure, and the plotted numbers where these
are not the frame they got.

One colour per method, class and model everywhere, from palettes that colour-blind readers can tell
apart (Okabe & Ito for methods and classes, Tol's muted scheme for models).
"""

import io
import textwrap
from itertools import product, zip_longest
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from qlutils.files import write_bytes
from qlutils.show.stats import LEAST, STATISTICS
from qlutils.show.tables import csv_text, files_of

WIDE = 7.0  # inches: two columns of a paper
CLASS_COLORS = {"I": "#56B4E9", "II": "#D55E00"}
SET_COLORS = {"local": "#CC6677", "global": "#882255", "cas": "#117733"}
KNOWN_COLORS = {"I, known": "#BBDFF6", "II, known": "#EFBF99"}  # the classes' colours, lighter
BAR_COLORS = CLASS_COLORS | KNOWN_COLORS | SET_COLORS
_FAMILY_COLORS = ["#332288", "#44AA99", "#DDCC77"]
MODEL_COLORS = {
    name: color
    for family in (
        ("demo/gpt2", "demo/llama2", "demo/llama3"),
        ("gpt2", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"),
    )
    for name, color in zip(family, _FAMILY_COLORS)
}
_OTHER_COLORS = ["#CC6677", "#999933", "#882255", "#88CCEE", "#117733", "#AA4499"]
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
    others = [name for name in models if name not in MODEL_COLORS]
    extra = {name: _OTHER_COLORS[i % len(_OTHER_COLORS)] for i, name in enumerate(others)}
    return {name: MODEL_COLORS.get(name) or extra[name] for name in models}


# --- violins --------------------------------------------------------------------------------------


def violins(frame, ax, *, x, hue, value, colors):
    """Violins of `value` for each level of column `x`, those of column `hue` side by side in their
    `colors`.

    frame: one row a fact; NaNs are not drawn. The numbers of facts drawn stand after each level of
    x, one where all are equal; a group without facts shows as 0."""
    levels, width, labels = list(dict.fromkeys(frame[x])), 0.8 / len(colors), []
    groups = {
        key: part.to_numpy(float)
        for key, part in frame.dropna(subset=[value]).groupby([x, hue])[value]
    }
    for at, level in enumerate(levels):
        values = [groups.get((level, name), np.zeros(0)) for name in colors]
        for place, (one, color) in enumerate(zip(values, colors.values())):
            _violin(ax, one, at + (place - (len(colors) - 1) / 2) * width, 0.95 * width, color)
        counts = [str(len(one)) for one in values]
        labels.append(f"{level} ({counts[0] if len(set(counts)) == 1 else ' / '.join(counts)})")
    ax.set_xticks(range(len(levels)), labels)
    ax.set(xlim=(-0.6, len(levels) - 0.4), ylim=(-0.03, 1.03), ylabel=_label(value))
    return ax


def _violin(ax, values, at, width, color):
    """A violin from the smallest to the largest value; a bar as wide as its share for each of a few
    different values, between which a violin would show facts that there are not."""
    if len(values) == 0:
        return
    found, counts = np.unique(np.round(values, 9), return_counts=True)
    if len(found) <= FEW and len(found) < len(values):
        reach = width * counts / counts.max()
        ax.barh(
            found,
            reach,
            0.6 * np.diff(found).min(initial=0.1),
            left=at - reach / 2,
            color=color,
            alpha=0.8,
        )
    elif len(found) > 1:
        parts = ax.violinplot([values], [at], widths=width, showextrema=False)
        for body in parts["bodies"]:
            body.set(facecolor=color, edgecolor=color, alpha=0.8, linewidth=0.3)
    if len(values) <= FEW or len(found) == 1:
        ax.hlines(values, at - width / 3, at + width / 3, color="black", linewidth=0.4)
    ax.hlines(np.median(values), at - width / 2, at + width / 2, color="black", linewidth=0.9)


def figure_thresholds(frame):
    """Share of the facts in K_II by the KN threshold and the static threshold on CS2 (see
    `threshold_sensitivity`)."""
    import seaborn as sns

    fig, ax = plt.subplots(figsize=(WIDE / 2, 2.0))
    sns.heatmap(
        frame.pivot(index="t", columns="static", values="R_II"),
        ax=ax,
        vmin=0,
        vmax=1,
        cmap="magma_r",
        annot=True,
        fmt=".2f",
        annot_kws={"fontsize": 6},
        cbar_kws={"label": "share of $K_{II}$"},
    )
    ax.set(xlabel="static threshold on $CS_2$", ylabel="KN threshold $t$")
    return fig, frame


def figure_cs2(frames, method, line=0.3):
    """Figure 3, 8 or 9: CS2 of several models' facts (a frame a model, with a column model) by
    relation, with the paper's example threshold as a line."""
    frame = pd.concat(frames, ignore_index=True)[["model", "relation", "fact", "cs2"]]
    fig, ax = plt.subplots(figsize=(WIDE, 2.6))
    colors = model_colors(dict.fromkeys(frame["model"]))
    violins(frame, ax, x="relation", hue="model", value="cs2", colors=colors)
    ax.legend(
        handles=_patches(colors), ncols=len(colors), loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    ax.axhline(line, color="black", linestyle="--", linewidth=0.7)
    ax.tick_params("x", rotation=90)
    ax.set_xlabel("relation (number of facts)")
    ax.set_title(f"localised by {method}", loc="left")
    return fig, frame


def figure_predominance(facts):
    """Figure 5: `predominance` and `predominance_rest` by model and class (number of facts), by
    both thresholds."""
    fig, axes = plt.subplots(2, 2, figsize=(WIDE, 4.0), sharey=True, squeeze=False)
    values = {"predominance": "as in the paper", "predominance_rest": "without the first token"}
    for (row, threshold), (column, value) in product(
        enumerate(("static", "otsu")), enumerate(values)
    ):
        ax = violins(
            facts,
            axes[row, column],
            x="model",
            hue=f"class_{threshold}",
            value=value,
            colors=CLASS_COLORS,
        )
        ax.set_title(values[value] if row == 0 else "", pad=10)
        ax.set_ylabel(f"{_label('predominance')}\n{_label(threshold)}" if column == 0 else "")
    _legend(fig, CLASS_COLORS)
    return fig, facts[
        ["model", "fact", "relation", "class_static", "class_otsu", *values, "n_queries"]
    ]


# --- bars -----------------------------------------------------------------------------------------


def bars_with_intervals(frame, ax, *, x, hue, y="mean"):
    """Figures 4 and 6: grouped bars of column `y` with the interval `y`_low to `y`_high, and n
    where there is one.

    frame: one row a bar, with columns x, hue (in BAR_COLORS), y, y_low, y_high and perhaps n. A
    bar that is undefined, or whose interval is, is left out and marked "–"; n stands once where it
    depends on one of x and hue, else at every bar."""
    groups, hues = list(dict.fromkeys(frame[x])), list(dict.fromkeys(frame[hue]))
    width, n, ticks = 0.8 / len(hues), {}, [_label(group) for group in groups]
    for by in (hue, x) if "n" in frame else ():
        counts = {level: set(part) for level, part in frame.groupby(by, sort=False)["n"]}
        if not n and all(len(one) == 1 for one in counts.values()):
            n = {by: [f"{counts[level].pop():.0f}" for level in (hues if by == hue else groups)]}
    if hue in n:
        ax.annotate(
            "n = " + " / ".join(n[hue] if len(set(n[hue])) > 1 else n[hue][:1]),
            (0.99, 0.98),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=5.5,
        )
    elif n:
        ticks = [f"{tick}\nn = {count}" for tick, count in zip(ticks, n[x])]
    for row in frame.to_dict("records"):
        at = groups.index(row[x]) + (hues.index(row[hue]) - (len(hues) - 1) / 2) * width
        top, low, high = 0.0, row[f"{y}_low"], row[f"{y}_high"]
        undefined = pd.isna([row[y], low, high]).any()
        if undefined:
            ax.annotate("–", (at, 0), ha="center", va="bottom")
        else:
            ax.bar(at, row[y], width * 0.92, color=BAR_COLORS[row[hue]])
            ax.vlines(at, low, high, color="black", linewidth=0.7)  # the mean may lie outside
            top = max(0.0, row[y], high)
        if "n" in row and not n:
            ax.annotate(
                f"n = {row['n']:.0f}",
                (at, top),
                xytext=(0, 6 if undefined else 2),
                fontsize=6,
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90,
            )
    ax.axhline(0, color="black", linewidth=0.6)
    ax.margins(y=0.2)
    ax.set_xticks(range(len(groups)), ticks)
    ax.set(xlim=(-0.6, len(groups) - 0.4), ylabel=_label(y))
    return ax


def _beside_known(frame) -> pd.DataFrame:
    """A table of `effects.summary` with `bar`: the class, and after each the same of known queries
    ("I, known"), if any."""
    known = frame["queries"] == "known"
    frame = frame.assign(bar=frame["class"] + np.where(known, ", known", ""))
    if not (known & (frame["n"] > 0)).any():
        frame = frame[~known]
    return frame.sort_values(
        "bar", key=lambda bars: bars.map(list(BAR_COLORS).index), kind="stable"
    )


def figure_bars(frame, *, row, column, x="set", y="trimmed", ylabel=""):
    """Figures 4 and 6: bars of a table of `effects.summary` by `x` and class, those of known
    queries beside where there are any; a row of panels each level of column `row` of the frame, a
    column each of `column`. `ylabel` stands before the row's level."""
    tops, sides = (list(dict.fromkeys(frame[name])) for name in (row, column))
    bars = _beside_known(frame)
    fig, axes = plt.subplots(
        len(tops),
        len(sides),
        figsize=(WIDE, 0.7 + 1.75 * len(tops)),
        squeeze=False,
        sharey="col" if column == "direction" else "row",
    )  # enhancing does far less
    for (i, top), (j, side) in product(enumerate(tops), enumerate(sides)):
        part = bars[(bars[row] == top) & (bars[column] == side)]
        ax = bars_with_intervals(part, axes[i, j], x=x, hue="bar", y=y)
        ax.set_title(_label(side) if i == 0 else "", pad=8)
        ax.set_ylabel(f"{ylabel}{_label(top)}" if j == 0 else "")
    for ax in axes[0] if column == "direction" else axes[:, 0]:
        ax.set_ylim(top=1.15 * ax.get_ylim()[1])  # room for the numbers on the bars
    shown = {name: BAR_COLORS[name] for name in BAR_COLORS if (bars["bar"] == name).any()}
    _legend(fig, shown, f"{STATISTICS[y]} over queries (n); {INTERVAL}")
    return fig


def figure_edits(table, threshold, sets):
    """(figure, plotted numbers) of Table 2 or 3: a row an operation; Rel, Gen, Loc and Avg of each
    class, each with the n edits for which it is defined, then the median dPPL."""
    table = table[(table["threshold"] == threshold) & table["neurons"].isin(sets)]
    keys, parts = ["threshold", "class", "op", "neurons"], []
    for metric in ("rel", "gen", "loc", "avg", "dppl"):
        n = f"n_{metric}" if f"n_{metric}" in table else "n"
        part = table[[*keys, metric, f"{metric}_low", f"{metric}_high", n]]
        parts.append(
            part.set_axis([*keys, "mean", "mean_low", "mean_high", "n"], axis=1).assign(
                metric=_label(metric)
            )
        )
    plotted = pd.concat(parts, ignore_index=True)
    classes, ops = list(dict.fromkeys(table["class"])), list(dict.fromkeys(table["op"]))
    fig, axes = plt.subplots(
        len(ops),
        len(classes) + 1,
        figsize=(WIDE, 2.3 * len(ops)),
        squeeze=False,
        width_ratios=[4] * len(classes) + [len(classes) + 1],
    )
    for op, (*panels, last) in zip(ops, axes):
        rates, dppl = (
            plotted[(plotted["op"] == op) & ((plotted["metric"] == "dppl") == is_dppl)]
            for is_dppl in (False, True)
        )
        for ax, name in zip(panels, classes):
            part = rates[rates["class"] == name]
            bars_with_intervals(part, ax, x="metric", hue="neurons")
            ax.set(title=f"{op}, {_label(name)}", ylabel="", ylim=(0, 1.02))
        broken = dppl["mean"].abs().max() > 1  # whose perplexity has no bound
        bars_with_intervals(dppl, last, x="class", hue="neurons").set(
            title=f"{op}, median dPPL{' (log)' if broken else ''}", ylabel=""
        )
        if broken:
            last.set_yscale("symlog", linthresh=0.1)
        last.margins(y=0.4)  # room for the numbers on the bars, on either scale
    _legend(fig, {name: SET_COLORS[name] for name in dict.fromkeys(table["neurons"])}, INTERVAL)
    return fig, plotted


def _legend(fig, colors, title=None):
    """One legend above all panels."""
    fig.legend(
        handles=_patches(colors),
        title=title,
        title_fontsize=6,
        ncols=len(colors),
        loc="outside upper center",
    )


def _patches(colors):
    return [Patch(color=color, label=_label(name)) for name, color in colors.items()]


# --- heatmaps -------------------------------------------------------------------------------------


def pool_neurons(values, bins=100) -> pd.DataFrame:
    """(layers, neurons) values as a tidy frame of at most `bins` columns: layer, first, last,
    value.

    Single neurons among thousands are narrower than a pixel, so each bin keeps its value of largest
    magnitude, with its sign. `first` and `last` are the neurons a bin covers."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(
            f"values must be finite and of shape (layers, neurons), not {values.shape}"
        )
    rows = []
    for part in np.array_split(np.arange(values.shape[1]), min(bins, values.shape[1])):
        block = values[:, part]
        strongest = block[np.arange(len(block)), np.abs(block).argmax(1)]
        rows.append(
            pd.DataFrame(
                dict(layer=range(len(block)), first=part[0], last=part[-1], value=strongest)
            )
        )
    return pd.concat(rows, ignore_index=True).sort_values(["layer", "first"], ignore_index=True)


def shared_norm(*frames) -> Normalize:
    """One colour scale for several pooled frames: symmetric about 0 if a value is negative, else
    from 0."""
    values = np.concatenate([frame["value"].to_numpy(float) for frame in frames])
    top = np.abs(values).max(initial=0.0) or 1.0
    return Normalize(-top if (values < 0).any() else 0.0, top)


def heatmap_neurons(frame, ax, norm):
    """Layer by neuron, from a frame of `pool_neurons`; darker is larger in magnitude.

    norm: from `shared_norm` over all panels that are to be compared."""
    table = frame.pivot(index="layer", columns="first", values="value")
    edges = [*table.columns, frame["last"].max() + 1]
    ax.pcolormesh(
        edges,
        np.arange(len(table) + 1) - 0.5,
        table.to_numpy(),
        norm=norm,
        rasterized=True,
        cmap="RdBu_r" if norm.vmin < 0 else "magma_r",
    )
    ax.set(xlabel="neuron", ylabel="layer")
    ax.yaxis.get_major_locator().set_params(integer=True)
    return ax


def _heatmaps(fig, panels, kind, beside=()) -> list[pd.DataFrame]:
    """Panels by row, each a dict of values (L, N), title, label (of its row) and scale; those of
    one scale, and the (scale, array) pairs `beside`, share a colour scale; pooled frames."""
    axes = fig.subplots(len(panels), max(map(len, panels)), squeeze=False, sharex=True, sharey=True)
    groups: dict = {}
    for i, row in enumerate(panels):
        for j, one in enumerate(row):
            groups.setdefault(one["scale"], []).append(
                (axes[i, j], one, pool_neurons(one["values"]))
            )
    for scale, group in groups.items():
        others = (pool_neurons(values) for name, values in beside if name == scale)
        norm = shared_norm(*(frame for *_, frame in group), *others)
        for ax, one, frame in group:
            heatmap_neurons(frame, ax, norm)
            ax.set_title(one["title"], fontsize=6)
            last, first = ax in axes[-1], ax in axes[:, 0]
            ax.set_xlabel("neuron" if last else "")
            ax.set_ylabel(f"{one['label']}\nlayer" if first else "", fontsize=6)
        _colorbar(fig, [ax for ax, *_ in group], kind, alone=len(groups) == 1)
    found = {id(one): frame for group in groups.values() for _, one, frame in group}
    return [found[id(one)] for row in panels for one in row]


def _colorbar(fig, axes, kind, alone):
    """The scale of the panels `axes`: beside all of them where there is no other, beside a single
    one, below a column."""
    if alone:
        fig.colorbar(axes[0].collections[0], ax=axes, label=kind, pad=0.02, shrink=0.8)
        return
    bar = fig.colorbar(
        axes[0].collections[0],
        ax=axes,
        location="right" if len(axes) == 1 else "bottom",
        pad=0.03,
        shrink=0.9,
        label="" if len(axes) == 1 else kind,
    )
    bar.ax.tick_params(labelsize=5)
    bar.locator = MaxNLocator(3)
    bar.update_ticks()


def _prompt(one, width=30) -> str:
    return "\n".join(textwrap.wrap(f"{one['prompt']}\xa0…", width, max_lines=4, placeholder=" …"))


def _scale(one, kind):
    """What shares a colour scale with a map: all of the same query for the attribution, every
    other for the activation."""
    return (one["fact"], one["prompt"]) if kind == "attribution" else None


def _subject(one) -> str:
    return " | ".join(one["fact"].split("|")[1:])


def figure_1(maps):
    """Figure 1: (L, N) maps of two queries of each of two facts, a row a fact; attribution on a
    colour scale for each query, since a confident query's is a thousand times an unsure one's;
    beside it activation, on one scale.

    maps: from `localize.example_maps`. Returns the figure and the plotted numbers as a tidy
    frame."""
    facts = [
        [one for one in maps if one["fact"] == fact]
        for fact in dict.fromkeys(one["fact"] for one in maps)
    ]
    fig, frames = plt.figure(figsize=(WIDE, 1.5 * len(facts) + 0.2)), []
    for part, kind in zip(fig.subfigures(1, 2), ("attribution", "activation")):
        pooled = _heatmaps(
            part,
            [
                [
                    dict(
                        values=one[kind],
                        title=_prompt(one, 22),
                        label=_subject(one),
                        scale=_scale(one, kind),
                    )
                    for one in row
                ]
                for row in facts
            ],
            kind,
        )
        part.suptitle(
            "attribution, each query on a scale of its own" if kind == "attribution" else kind,
            fontsize=7,
        )
        frames += [
            frame.assign(fact=one["fact"], prompt=one["prompt"], kind=kind)
            for frame, one in zip(pooled, sum(facts, []))
        ]
    return fig, pd.concat(frames, ignore_index=True)


def figure_conditions(maps, conditions, kind):
    """Figures 7 and 10: (L, N) maps of queries, a column a query and a row a condition, on the
    scale of all conditions: of the query, for the attribution; of all queries, for the activation.

    maps: from `synapses.scaled_maps`. kind: "attribution" or "activation". Returns the figure and
    its numbers."""
    fig = plt.figure(figsize=(WIDE, 0.9 + 1.15 * len(conditions)))
    panels = [
        [
            dict(
                values=one[name][kind],
                label=name,
                title="" if row else f"{_subject(one)}\n{_prompt(one)}",
                scale=_scale(one, kind),
            )
            for one in maps
        ]
        for row, name in enumerate(conditions)
    ]
    every = [
        (_scale(one, kind), value[kind])
        for one in maps
        for value in one.values()
        if isinstance(value, dict)
    ]
    pooled = _heatmaps(fig, panels, kind, every)
    return fig, pd.concat(
        [
            frame.assign(fact=one["fact"], prompt=one["prompt"], condition=name, kind=kind)
            for frame, (name, one) in zip(pooled, product(conditions, maps))
        ],
        ignore_index=True,
    )


def figure_places(found, num_heads):
    """Where synapses sit: mean number in each layer and head, and how likely each column is one in
    a layer and head."""
    heads = (
        np.stack(found["by_head"].map(np.asarray).to_list())
        .reshape(len(found), -1, num_heads)
        .mean(0)
    )
    columns = (
        np.array([*zip_longest(*found["by_column"], fillvalue=np.nan)], float).T.copy() / heads.size
    )
    shares, counts = np.nanmean(columns, 0), (~np.isnan(columns)).sum(0)
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 2.2), gridspec_kw=dict(wspace=0.12))
    mesh = left.pcolormesh(heads, cmap="magma_r", vmin=0)
    left.set(
        xlabel="head",
        ylabel="layer",
        xticks=np.arange(num_heads) + 0.5,
        xticklabels=range(num_heads),
        yticks=np.arange(len(heads)) + 0.5,
        yticklabels=range(len(heads)),
    )
    fig.colorbar(mesh, ax=left, label="synapses a query")
    right.bar(range(len(shares)), shares, color="0.4")
    right.set_xlim(-0.6, 0.6 + max(np.flatnonzero(shares > 0.002 * shares.max()), default=0))
    right.set(
        xlabel="column (token of the prompt)",
        ylabel="share of layers and heads\nin which it is a synapse",
    )
    frame = pd.DataFrame(
        [dict(layer=l, head=h, synapses=heads[l, h]) for l, h in np.ndindex(heads.shape)]
        + [dict(column=c, share=share, n=int(counts[c])) for c, share in enumerate(shares)]
    )
    return fig, frame


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
    from PIL import Image

    for dpi in (200, 150, 100):
        drawn, small = io.BytesIO(), io.BytesIO()
        fig.savefig(drawn, format="png", dpi=dpi)
        image = (
            Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        )  # 256 colours
        image.save(small, format="png", optimize=True, dpi=(dpi, dpi))
        if small.tell() <= MAX_PNG:
            break
    return small.getvalue()


def _label(name):
    return LABELS.get(name, name)
