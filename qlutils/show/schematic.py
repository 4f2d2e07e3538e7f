"""The two assumptions the study is about, as a drawing of our own (the idea of the paper's Figure
2)."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

from qlutils.show.plots import WIDE

QUERIES = ("#0072B2", "#E69F00", "#009E73")
GREY, INK, ATTENTION = "#c9ced4", "#1c2024", "#882255"
SHARED = {
    (1, 1),
    (1, 5),
    (3, 2),
    (3, 6),
}  # neurons as (row, column): those of all queries in (a), of each in (b)
OWN = ({(0, 1), (1, 4), (2, 2)}, {(1, 6), (2, 5), (3, 1)}, {(2, 2), (4, 4), (4, 6)})
FEET = ((1.9, 7.1), (5.0, 7.1), (8.1, 7.1))  # where the arrows of the queries start


def two_assumptions():
    """A figure of three panels: one fact, one set of neurons; one query, one set; attention helps
    to select it."""
    fig, axes = plt.subplots(1, 3, figsize=(WIDE, 2.6))
    first, second, third = axes
    _panel(
        first,
        "(a) localisation: one fact,\none set of neurons",
        "MLP neurons, a layer a row: the same for all",
        {place: [INK] for place in SHARED},
    )
    _panel(
        second,
        "(b) query localisation: one\nquery, one set of neurons",
        "the sets overlap little",
        {
            place: [color for color, own in zip(QUERIES, OWN) if place in own]
            for place in set().union(*OWN)
        },
    )
    _panel(
        third,
        "(c) attention helps to\nselect the query's set",
        "from which one query reads its own",
        {place: [QUERIES[0]] for place in OWN[0]},
        faded=(1, 2),
    )
    for foot, color, own in zip(FEET, QUERIES, OWN):
        _arrow(first, foot, (5, 4.8), color)
        for place in own:
            _arrow(second, foot, _at(place), color, 0.7)
    _box(third, (1.2, 4.85), (7.6, 0.75), "attention", ATTENTION, "#f3e6f1")
    _arrow(third, FEET[0], (1.9, 5.75), QUERIES[0])
    for place in OWN[0]:
        _arrow(third, (_at(place)[0], 4.72), _at(place), ATTENTION, 0.8)
    return fig


def _panel(ax, title, caption, held, faded=()):
    """Three queries above a layer a row of neurons; each neuron in `held` shows its holders'
    colours side by side."""
    ax.set(xlim=(0, 10), ylim=(-0.4, 8.6), aspect="equal")
    ax.axis("off")
    ax.set_title(title, fontsize=7.5)
    ax.text(5, -0.35, caption, ha="center", fontsize=6, color="#59636e")
    _box(ax, (0.9, 0.1), (8.2, 4.6), "", "none", "#f7f8f9")
    for query, ((x, y), color) in enumerate(zip(FEET, QUERIES)):
        alpha = 0.25 if query in faded else 1.0
        _box(ax, (x - 1.05, y + 0.1), (2.1, 0.85), f"query $q_{query + 1}$", color, "white", alpha)
    for place in np.ndindex(5, 8):
        colors, (x, y) = held.get(place, [GREY]), _at(place)
        size = 0.27 if place in held else 0.17
        for part, color in enumerate(colors):
            angle = (
                np.linspace(0, 2 * np.pi / len(colors), 40)
                + 2 * np.pi * part / len(colors)
                + np.pi / 2
            )
            ax.fill(x + size * np.cos(angle), y + size * np.sin(angle), color=color, linewidth=0)


def _at(place):
    row, column = place
    return 1.5 + column, 4.2 - 0.9 * row


def _box(ax, corner, size, text, color, face, alpha=1.0):
    ax.add_patch(
        FancyBboxPatch(
            corner, *size, boxstyle="round,pad=0.1", facecolor=face, edgecolor=color, alpha=alpha
        )
    )
    ax.text(
        corner[0] + size[0] / 2,
        corner[1] + size[1] / 2,
        text,
        ha="center",
        va="center",
        fontsize=6.5,
        color=color,
        alpha=alpha,
    )


def _arrow(ax, start, end, color, width=1.0):
    ax.annotate(
        "",
        end,
        start,
        arrowprops=dict(
            arrowstyle="-|>",
            mutation_scale=6,
            color=color,
            linewidth=width,
            alpha=0.85,
            shrinkA=0,
            shrinkB=2,
        ),
    )
