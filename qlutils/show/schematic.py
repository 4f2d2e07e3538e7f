"""The two assumptions the study is about, as a drawing of our own (the idea of the paper's Figure
2)."""

import matplotlib.pyplot as plt
import numpy as np

from qlutils.show.plots import WIDE

BLUE, ORANGE, GREEN = COLORS = ("#0072B2", "#E69F00", "#009E73")  # of the queries
PLACES = (1.2, 4.5, 7.8)  # of the queries, above a grid of 8 neurons in each of 5 layers
GREY = "#c9ced4"
INK = "#1c2024"
ATTENTION = "#882255"
# places of neurons, x and y: of those of all queries in (a), of each query in (b)
SHARED = ([2, 6, 3, 7], [3, 3, 1, 1])
OWN = (
    ([2, 5, 3], [4, 3, 2]),
    ([7, 6, 2], [3, 2, 1]),
    ([3, 5, 7], [2, 0, 0]),
)


def two_assumptions():
    """A figure of three panels: one fact, one set of neurons; one query, one set; attention helps
    to select it."""
    fig, (first, second, third) = plt.subplots(1, 3, figsize=(WIDE, 2.5))
    _panel(
        first,
        "(a) localisation: one fact,\none set of neurons",
        "MLP neurons, a layer a row: the same for all",
    )
    first.scatter(*SHARED, color=INK)
    _panel(
        second,
        "(b) query localisation: one\nquery, one set of neurons",
        "the sets overlap little",
    )
    for x, color, own in zip(PLACES, COLORS, OWN):
        _arrow(first, (x, 6.8), (4.5, 4.6), color)
        second.scatter(*own, color=color)
        for neuron in zip(*own):
            _arrow(second, (x, 6.8), neuron, color)
    second.scatter(3, 2, color=GREEN, edgecolor=BLUE, linewidth=2)  # of two
    _panel(
        third,
        "(c) attention helps to\nselect the query's set",
        "from which one query reads its own",
        colors=(BLUE, GREY, GREY),
    )
    third.scatter(*OWN[0], color=BLUE)
    _box(third, 4.5, 5.3, f"{'attention':^44}", ATTENTION)
    _arrow(third, (1.2, 6.8), (1.2, 5.8), BLUE)
    for x, y in zip(*OWN[0]):
        _arrow(third, (x, 4.9), (x, y), ATTENTION)
    return fig


def _panel(ax, title, below, colors=COLORS):
    """Three queries in their colours above a layer a row of neurons."""
    ax.set(
        xlim=(0, 9),
        ylim=(-0.6, 8),
        xticks=[],
        yticks=[],
    )
    ax.set_title(title, fontsize=8)
    ax.set_xlabel(below, fontsize=6.5)
    ax.spines[:].set_visible(False)
    ax.axhspan(-0.5, 4.5, color="#f7f8f9")
    ax.scatter(*np.mgrid[1:9, 0:5], s=9, color=GREY)
    for number, (x, color) in enumerate(zip(PLACES, colors), start=1):
        _box(ax, x, 7.3, f"query $q_{number}$", color)


def _box(ax, x, y, text, color):
    ax.text(
        x,
        y,
        text,
        fontsize=7,
        color=color,
        ha="center",
        va="center",
        bbox=dict(boxstyle="round", facecolor="white", edgecolor=color),
    )


def _arrow(ax, start, end, color):
    ax.annotate(
        "",
        end,
        start,
        arrowprops=dict(arrowstyle="-|>", color=color, linewidth=0.8, shrinkA=0, shrinkB=2),
    )
