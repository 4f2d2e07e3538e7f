"""The two assumptions the study is about, as a drawing of our own (the idea of the paper's Figure 2)."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .plots import WIDE

_QUERIES = ("#0072B2", "#E69F00", "#009E73")
_GREY, _INK = "#c9ced4", "#1c2024"
_ROWS, _COLUMNS = 5, 8


def two_assumptions():
    """A figure of three panels: one fact, one set of neurons; one query, one set; attention helps to select it."""
    fig, axes = plt.subplots(1, 3, figsize=(WIDE, 2.6))
    shared = {(1, 1), (1, 5), (3, 2), (3, 6)}
    own = [{(0, 1), (1, 4), (2, 2)}, {(1, 6), (2, 5), (3, 1)}, {(2, 2), (4, 4), (4, 6)}]
    titles = ("(a) localisation: one fact,\none set of neurons",
              "(b) query localisation: one\nquery, one set of neurons",
              "(c) attention helps to\nselect the query's set")
    for ax, title in zip(axes, titles):
        ax.set(xlim=(0, 10), ylim=(-0.4, 8.6))
        ax.set_aspect("equal")
        ax.axis("off")
        ax.add_patch(FancyBboxPatch((0.9, 0.1), 8.2, 4.6, boxstyle="round,pad=0.1", facecolor="#f7f8f9",
                                    edgecolor="none"))
        ax.set_title(title, fontsize=7.5)
    _neurons(axes[0], {place: [_INK] for place in shared})
    for query, color in enumerate(_QUERIES):
        _query(axes[0], query, color)
        _arrow(axes[0], _foot(query), (5, 4.8), color)
    held = {}
    for color, places in zip(_QUERIES, own):
        for place in places:
            held.setdefault(place, []).append(color)
    _neurons(axes[1], held)
    for query, (color, places) in enumerate(zip(_QUERIES, own)):
        _query(axes[1], query, color)
        for place in places:
            _arrow(axes[1], _foot(query), _at(place), color, 0.7, shrink=3)
    _neurons(axes[2], {place: [_QUERIES[0]] for place in own[0]})
    for query, color in enumerate(_QUERIES):
        _query(axes[2], query, color, faded=query > 0)
    axes[2].add_patch(FancyBboxPatch((1.2, 4.85), 7.6, 0.75, boxstyle="round,pad=0.1", facecolor="#f3e6f1",
                                     edgecolor="#882255", linewidth=0.8))
    axes[2].text(5, 5.22, "attention", ha="center", va="center", fontsize=6.5, color="#882255")
    _arrow(axes[2], _foot(0), (1.9, 5.75), _QUERIES[0])
    for place in own[0]:
        _arrow(axes[2], (_at(place)[0], 4.72), _at(place), "#882255", 0.8, shrink=3)
    for ax, text in zip(axes, ("MLP neurons, a layer a row: the same for all", "the sets overlap little",
                               "from which one query reads its own")):
        ax.text(5, -0.35, text, ha="center", fontsize=6, color="#59636e")
    return fig


def _foot(query):
    return 1.9 + 3.1 * query, 7.1


def _at(place):
    row, column = place
    return 1.5 + column, 4.2 - 0.9 * row


def _query(ax, query, color, faded=False):
    x, y = _foot(query)
    alpha = 0.25 if faded else 1.0
    ax.add_patch(FancyBboxPatch((x - 1.05, y + 0.1), 2.1, 0.85, boxstyle="round,pad=0.08", facecolor="white",
                                edgecolor=color, linewidth=1, alpha=alpha))
    ax.text(x, y + 0.52, f"query $q_{query + 1}$", ha="center", va="center", fontsize=6.5, color=color, alpha=alpha)


def _neurons(ax, held):
    """A layer a row; each neuron that is held gets the colours of its holders, side by side."""
    for row in range(_ROWS):
        for column in range(_COLUMNS):
            x, y = _at((row, column))
            colors = held.get((row, column), [_GREY])
            for part, color in enumerate(colors):
                angle = np.linspace(0, 2 * np.pi / len(colors), 40) + 2 * np.pi * part / len(colors) + np.pi / 2
                size = 0.27 if color != _GREY else 0.17
                ax.fill(x + size * np.cos(angle), y + size * np.sin(angle), color=color, linewidth=0)


def _arrow(ax, start, end, color, width=1.0, shrink=1):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=6, color=color, linewidth=width,
                                 alpha=0.85, shrinkA=0, shrinkB=shrink))
