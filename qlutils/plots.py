"""Figures of the study. Plot functions take a tidy frame and an `ax`, return the `ax` and compute nothing.

One colour per method, class and model everywhere, from palettes that colour-blind readers can tell apart
(Okabe & Ito for methods and classes, Tol's muted scheme for models).
"""

import io
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.patches import Patch

from qlutils.files import write_bytes

NARROW, WIDE = 3.5, 7.0  # inches: one and two columns of a paper
METHOD_COLORS = {"ig": "#0072B2", "sig": "#E69F00", "amig": "#009E73"}
CLASS_COLORS = {"I": "#56B4E9", "II": "#D55E00"}
_FAMILY_COLORS = ["#332288", "#44AA99", "#DDCC77"]
MODEL_COLORS = {name: color for family in (("demo/gpt2", "demo/llama2", "demo/llama3"),
                                           ("gpt2", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"))
                for name, color in zip(family, _FAMILY_COLORS)}
_OTHER_COLORS = ["#CC6677", "#999933", "#882255", "#88CCEE", "#117733", "#AA4499"]
MAX_PNG = 150_000  # bytes
FEW = 10  # up to this many values are drawn as lines too: a shape alone would say more than is known


def use_style():
    """Use the study's look for every figure from here on; importing this module does it."""
    plt.style.use(Path(__file__).with_name("study.mplstyle"))


use_style()


def model_colors(models) -> dict:
    """{model: colour}; models without a colour of their own get one by their place in the list."""
    others = [name for name in models if name not in MODEL_COLORS]
    extra = {name: _OTHER_COLORS[i % len(_OTHER_COLORS)] for i, name in enumerate(others)}
    return {name: MODEL_COLORS.get(name) or extra[name] for name in models}


def violins_by_relation(frame, ax, *, value="cs2", line=0.3, models=None):
    """Figures 3, 8, 9: CS2 by relation, models side by side, with the paper's example threshold as a line.

    frame: one row a fact, columns relation, model and `value`; NaNs are not drawn. The number of facts drawn
    stands below each relation (a range where models differ).
    """
    relations = list(dict.fromkeys(frame["relation"]))
    models = list(models or dict.fromkeys(frame["model"]))
    colors, width = model_colors(models), 0.8 / len(models)
    drawn = frame.dropna(subset=[value])
    groups = {key: part[value].to_numpy(float) for key, part in drawn.groupby(["relation", "model"])}
    labels = []
    for x, relation in enumerate(relations):
        counts = []
        for place, model in enumerate(models):
            values = groups.get((relation, model), np.zeros(0))
            _violin(ax, values, x + (place - (len(models) - 1) / 2) * width, 0.95 * width, colors[model])
            counts.append(len(values))
        n = str(max(counts)) if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"
        labels.append(f"{relation} ({n})")
    ax.set_xticks(range(len(relations)), labels, rotation=90)
    ax.set_xlim(-0.6, len(relations) - 0.4)
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel(_label(value))
    ax.set_xlabel("relation (number of facts)")
    handles = [Patch(color=colors[model], label=model) for model in models]
    if line is not None:
        handles.append(ax.axhline(line, color="black", linestyle="--", linewidth=0.7,
                                  label=f"threshold {line}"))
    ax.legend(handles=handles, ncols=len(handles), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


def violins_by_class(frame, ax, *, value="predominance", models=None):
    """Figure 5: a violin for each model and class, n above it.

    frame: one row a fact, columns model, class ("I", "II") and `value`; NaNs and facts without a class are
    not drawn, and an empty class shows as n = 0.
    """
    models = list(models or dict.fromkeys(frame["model"]))
    for x, model in enumerate(models):
        for place, (name, color) in enumerate(CLASS_COLORS.items()):
            part = frame[(frame["model"] == model) & (frame["class"] == name)][value].dropna().to_numpy(float)
            at = x + (place - 0.5) * 0.42
            _violin(ax, part, at, 0.38, color)
            ax.annotate(f"n = {len(part)}", (at, 1.0), xycoords=("data", "axes fraction"), fontsize=5,
                        ha="center", va="bottom")
    ax.set_xticks(range(len(models)), models)
    ax.set_xlim(-0.6, len(models) - 0.4)
    ax.set_ylabel(_label(value))
    handles = [Patch(color=color, label=f"$K_{{{name}}}$") for name, color in CLASS_COLORS.items()]
    ax.legend(handles=handles, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.04))
    return ax


def bars_with_intervals(frame, ax, *, x, hue, y="mean", colors=None, interval="95 % bootstrap over facts"):
    """Figures 4 and 6: grouped bars of column `y` with the interval `y`_low to `y`_high, and n where there
    is one.

    frame: one row a bar, with columns x, hue, y, y_low, y_high and perhaps n. A bar that is undefined is
    left out and marked "–". What the interval is stands in the legend's title.
    """
    groups, hues = list(dict.fromkeys(frame[x])), list(dict.fromkeys(frame[hue]))
    colors = colors or (CLASS_COLORS if set(hues) <= set(CLASS_COLORS) else
                        METHOD_COLORS if set(hues) <= set(METHOD_COLORS) else dict(zip(hues, _OTHER_COLORS)))
    width = 0.8 / len(hues)
    for row in frame.to_dict("records"):
        at = groups.index(row[x]) + (hues.index(row[hue]) - (len(hues) - 1) / 2) * width
        top = 0.0
        if pd.isna(row[y]):
            ax.annotate("–", (at, 0), ha="center", va="bottom")
        else:
            low, high = row[f"{y}_low"], row[f"{y}_high"]
            ax.bar(at, row[y], width * 0.92, color=colors[row[hue]])
            if not (pd.isna(low) or pd.isna(high)):
                ax.vlines(at, low, high, color="black", linewidth=0.7)  # the mean may lie outside
            top = np.nanmax([0.0, row[y], high])
        if "n" in row:
            ax.annotate(f"n = {row['n']:.0f}", (at, top), xytext=(0, 6 if pd.isna(row[y]) else 2), fontsize=5,
                        textcoords="offset points", ha="center", va="bottom", rotation=90)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.margins(y=0.2)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.set_ylabel(_label(y))
    names = {name: f"$K_{{{name}}}$" for name in CLASS_COLORS}
    ax.legend(handles=[Patch(color=colors[name], label=names.get(name, name)) for name in hues],
              title=f"line: {interval}", title_fontsize=5, ncols=len(hues), loc="lower center",
              bbox_to_anchor=(0.5, 1.0))
    return ax


def pool_neurons(values, bins=200) -> pd.DataFrame:
    """(layers, neurons) values as a tidy frame of at most `bins` columns: layer, first, last, value.

    Single neurons among thousands are narrower than a pixel, so each bin keeps its value of largest
    magnitude, with its sign. `first` and `last` are the neurons a bin covers.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"values must be finite and of shape (layers, neurons), not {values.shape}")
    rows = []
    for part in np.array_split(np.arange(values.shape[1]), min(bins, values.shape[1])):
        block = values[:, part]
        strongest = block[np.arange(len(block)), np.abs(block).argmax(1)]
        rows.append(pd.DataFrame(dict(layer=range(len(block)), first=part[0], last=part[-1],
                                      value=strongest)))
    return pd.concat(rows, ignore_index=True).sort_values(["layer", "first"], ignore_index=True)


def shared_norm(*frames) -> Normalize:
    """One colour scale for several pooled frames: symmetric about 0 if a value is negative, else from 0."""
    values = np.concatenate([frame["value"].to_numpy(float) for frame in frames])
    top = np.abs(values).max(initial=0.0) or 1.0
    return Normalize(-top if (values < 0).any() else 0.0, top)


def heatmap_neurons(frame, ax, *, norm=None, label="attribution", colorbar=True):
    """Figures 1, 7, 10: layer by neuron, from a frame of `pool_neurons`; darker is larger in magnitude.

    norm: from `shared_norm` over all panels that are to be compared; of this frame alone by default.
    """
    norm = norm or shared_norm(frame)
    table = frame.pivot(index="layer", columns="first", values="value")
    edges = [*table.columns, frame["last"].max() + 1]
    mesh = ax.pcolormesh(edges, np.arange(len(table) + 1) - 0.5, table.to_numpy(), norm=norm, rasterized=True,
                         cmap="RdBu_r" if norm.vmin < 0 else "magma_r")
    ax.set_xlabel("neuron")
    ax.set_ylabel("layer")
    ax.yaxis.get_major_locator().set_params(integer=True)
    if colorbar:
        ax.figure.colorbar(mesh, ax=ax, label=label, pad=0.02)
    return ax


def figure_1(maps, layout=("attribution", "activation")):
    """Figures 1, 7 and 10: (L, N) maps of two queries of each of two facts, a row a fact.

    maps: dicts with fact, prompt and one (L, N) array for each name in layout; one colour scale a name. Returns the
    figure and the plotted numbers as a tidy frame."""
    facts = list(dict.fromkeys(one["fact"] for one in maps))
    columns = max(sum(one["fact"] == fact for one in maps) for fact in facts)
    fig = plt.figure(figsize=(WIDE, 1.5 * len(facts) + 0.2))
    frames = []
    for part, kind in zip(np.atleast_1d(fig.subfigures(1, len(layout))), layout):
        axes = part.subplots(len(facts), columns, squeeze=False, sharex=True, sharey=True)
        pooled = [pool_neurons(one[kind], bins=100) for one in maps]
        norm = shared_norm(*pooled)
        for place, (one, frame) in enumerate(zip(maps, pooled)):
            row, column = facts.index(one["fact"]), sum(other["fact"] == one["fact"] for other in maps[:place])
            ax = heatmap_neurons(frame, axes[row, column], norm=norm, colorbar=False)
            ax.set_title("\n".join(textwrap.wrap(f"{one['prompt']} …", 30)[:3]), fontsize=5)
            ax.set_xlabel("neuron" if row == len(facts) - 1 else "")
            ax.set_ylabel(f"{' | '.join(one['fact'].split('|')[1:])}\nlayer" if not column else "", fontsize=6)
            frames.append(frame.assign(fact=one["fact"], prompt=one["prompt"], kind=kind))
        part.colorbar(axes[0, 0].collections[0], ax=axes, label=kind, shrink=0.8, pad=0.02)
    return fig, pd.concat(frames, ignore_index=True)


def figure_cs2(frames, method, line=0.3):
    """Figure 3, 8 or 9: `violins_by_relation` of several models' facts (a frame a model, with a column model)."""
    frame = pd.concat(frames, ignore_index=True)[["model", "relation", "fact", "cs2"]]
    fig, ax = plt.subplots(figsize=(7, 2.6))
    violins_by_relation(frame, ax, line=line)
    ax.set_title(f"localised by {method}", loc="left")
    return fig, frame


def save_figure(fig, stem, folder, data) -> dict[str, Path]:
    """Write `stem`.png (at most 150 KB where 100 dpi can do it), .pdf and the plotted numbers as .csv.

    The same figure gives the same bytes: no dates in the files. Returns {"png": path, "pdf": ..., "csv":
    ...}.
    """
    folder = Path(folder)
    paths = {kind: folder / f"{stem}.{kind}" for kind in ("png", "pdf", "csv")}
    pdf = io.BytesIO()
    fig.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    write_bytes(paths["png"], _small_png(fig))
    write_bytes(paths["pdf"], pdf.getvalue())
    write_bytes(paths["csv"], data.to_csv(index=False, lineterminator="\n").encode("utf-8"))
    return paths


def _small_png(fig):
    from PIL import Image

    for dpi, palette in ((200, False), (150, False), (150, True), (100, True)):
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        if palette:  # 256 colours
            image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            buffer = io.BytesIO()
            image.save(buffer, format="png", optimize=True, dpi=(dpi, dpi))
        if buffer.tell() <= MAX_PNG:
            break
    return buffer.getvalue()


def _violin(ax, values, at, width, color):
    """A violin from the smallest to the largest value; a bar at their value where all are equal."""
    if len(values) == 0:
        return
    if np.ptp(values) > 0:
        parts = ax.violinplot([values], [at], widths=width, showextrema=False)
        for body in parts["bodies"]:
            body.set(facecolor=color, edgecolor=color, alpha=0.8, linewidth=0.3)
    if len(values) <= FEW or np.ptp(values) == 0:
        ax.hlines(values, at - width / 3, at + width / 3, color="black", linewidth=0.4)
    ax.hlines(np.median(values), at - width / 2, at + width / 2, color="black", linewidth=0.9)


def _label(name):
    return {"cs1": "$CS_1$", "cs2": "$CS_2$", "predominance": r"predominance $\mathcal{P}$"}.get(name, name)
