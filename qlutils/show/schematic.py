"""The two assumptions the study is about, as a drawing of our own (the idea of the paper's Figure
2)."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

from qlutils.show.plots import WIDE

QUERIES = ("#0072B2", "#E69F00", "#009E73")
GREY, INK, ATTENTION = "#c9ced4", "#1c2024", "#882255"
# neurons as (row, column): those of all queries in (a), of each query in (b)
SHARED = {(1, 1), (1, 5), (3, 2), (3, 6)}
OWN = ({(0, 1), (1, 4), (2, 2)}, {(1, 6), (2, 5), (3, 1)}, {(2, 2), (4, 4), (4, 6)})
FEET = ((1.9, 7.1), (5.0, 7.1), (8.1, 7.1))  # where the arrows of the queries start


def two_assumptions():
    """A figure of three panels: one fact, one set of neurons; one query, one set; attention helps
    to select it."""
    fig, (first, second, third) = plt.subplots(1, 3, figsize=(WIDE, 2.5))
    owners = {place: [] for place in set().union(*OWN)}
    for color, own in zip(QUERIES, OWN):
        for place in own:
            owners[place].append(color)
    everyone, one = dict.fromkeys(SHARED, [INK]), dict.fromkeys(OWN[0], [QUERIES[0]])
    _panel(first, "(a) localisation: one fact,\none set of neurons", everyone)
    _panel(second, "(b) query localisation: one\nquery, one set of neurons", owners)
    _panel(third, "(c) attention helps to\nselect the query's set", one, faded=(1, 2))
    first.set_xlabel("MLP neurons, a layer a row: the same for all")
    second.set_xlabel("the sets overlap little")
    third.set_xlabel("from which one query reads its own")
    for foot, color, own in zip(FEET, QUERIES, OWN):
        _arrow(first, foot, (5, 4.8), color)
        for place in own:
            _arrow(second, foot, _at(place), color, 0.7)
    _box(third, (1.2, 4.85), (7.6, 0.75), "attention", ATTENTION, "#f3e6f1")
    _arrow(third, FEET[0], (1.9, 5.75), QUERIES[0])
    for place in OWN[0]:
        _arrow(third, (_at(place)[0], 4.72), _at(place), ATTENTION, 0.8)
    return fig


def _panel(ax, title, owners, faded=()):
    """Three queries above a layer a row of neurons; each neuron in `owners` shows the colours it
    has there side by side."""
    ax.set(xlim=(0, 10), ylim=(-0.1, 8.3), aspect="equal", xticks=[], yticks=[])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_title(title, fontsize=7.5)
    ax.xaxis.label.set(fontsize=6, color="#59636e")
    _box(ax, (0.9, 0.1), (8.2, 4.6), "", "none", "#f7f8f9")
    for query, ((x, y), color) in enumerate(zip(FEET, QUERIES)):
        alpha = 0.25 if query in faded else 1.0
        _box(ax, (x - 1.05, y + 0.1), (2.1, 0.85), f"query $q_{query + 1}$", color, "white", alpha)
    for place in np.ndindex(5, 8):
        colors, radius = owners.get(place, [GREY]), 0.27 if place in owners else 0.17
        ax.pie(np.ones(len(colors)), radius=radius, colors=colors, center=_at(place), startangle=90)
    ax.set(xlim=(0, 10), ylim=(-0.1, 8.3))  # a pie has set others


def _at(place):
    row, column = place
    return 1.5 + column, 4.2 - 0.9 * row


def _box(ax, corner, size, text, color, face, alpha=1.0):
    style = dict(boxstyle="round,pad=0.1", facecolor=face, edgecolor=color, alpha=alpha)
    ax.add_patch(FancyBboxPatch(corner, *size, **style))
    middle = np.add(corner, np.divide(size, 2))
    ax.text(*middle, text, ha="center", va="center", fontsize=6.5, color=color, alpha=alpha)


def _arrow(ax, start, end, color, width=1.0):
    style = dict(arrowstyle="-|>", mutation_scale=6, shrinkA=0, shrinkB=2, alpha=0.85)
    ax.annotate("", end, start, arrowprops=style | dict(color=color, linewidth=width))
