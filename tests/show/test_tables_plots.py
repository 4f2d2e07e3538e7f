"""Tables and figures as files: what stands in them is what was given, and equal input gives equal
bytes."""

import io
from itertools import product

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from qlutils.show import plots
from qlutils.show.tables import (
    PAPER_MODELS,
    display_table,
    format_value,
    paper_notes,
    paper_value,
    write_table,
)

LLAMA2, LLAMA3 = PAPER_MODELS[1:]


@pytest.fixture(autouse=True)
def closed_figures():
    with plt.rc_context():
        yield
    plt.close("all")


# --- numbers for reading --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((0.5249,), "0.52"),
        ((0.5, 0.474, 0.568), "0.50 [0.47, 0.57]"),
        ((0.5, 0.474, 0.568, 12), "0.50 [0.47, 0.57] (n = 12)"),
        ((np.nan, 0.1, 0.2), "–"),
        ((np.nan, None, None, 0), "– (n = 0)"),
        ((0.5, np.nan, np.nan), "0.50 [–, –]"),
        ((None,), "–"),
        ((3,), "3"),
        ((True,), "yes"),
        (("K_II",), "K_II"),
        ((0.0,), "0.00"),
        ((-0.0,), "0.00"),
        ((1.2e-7,), "1.2e-07"),
        ((-0.0042,), "-0.004"),
        ((0.00037, 1e-4, 9e-5), "0.0004 [0.0001, 0.0001]"),
        ((0.004, 0.0003, 0.01), "0.0040 [0.0003, 0.0100]"),
        ((-0.07, -0.14, -0.001), "-0.070 [-0.140, -0.001]"),
        ((0.1, 1e-9, 0.2), "0.10 [0.00, 0.20]"),
        ((68000.0, 6629.7, 160000.0), "6.8e+04 [6.6e+03, 1.6e+05]"),
        ((0.5, -np.inf, np.inf), "5.0e-01 [-inf, inf]"),
        ((0.0, 0.0, 0.0), "0.00 [0.00, 0.00]"),
        ((-2e-5, -1e-3, 9e-4), "0.0000 [-0.0010, 0.0009]"),
        ((23456.7,), "2.3e+04"),
        ((np.inf,), "inf"),
        ((pd.NA,), "–"),
        ((np.float32(0.25),), "0.25"),
        ((np.int64(4),), "4"),
    ],
)
def test_values_are_formatted_for_reading(arguments, text):
    assert format_value(*arguments) == text


def frame():
    return pd.DataFrame(
        {
            "class": ["K_I", "K_II & more"],
            "cs2": [1 / 3, np.nan],
            "cs2_low": [0.3, np.nan],
            "cs2_high": [0.4, np.nan],
            "n": [12.0, 0.0],
            "p": [1e-12, np.nan],
        }
    )


def test_intervals_become_one_column_and_counts_stay_whole():
    shown = display_table(frame())
    assert list(shown.columns) == ["class", "cs2 [95 %]", "n", "p"]
    assert list(shown.iloc[0]) == ["K_I", "0.33 [0.30, 0.40]", "12", "1.0e-12"]
    assert list(shown.iloc[1]) == ["K_II & more", "–", "0", "–"]


def test_a_table_is_written_three_times_with_full_precision_in_csv(tmp_path):
    paths = write_table(frame(), "table1", tmp_path / "new", "Δ of 5 %", "A note_1.")
    assert [path.name for path in paths.values()] == ["table1.csv", "table1.md", "table1.tex"]
    assert set((tmp_path / "new").iterdir()) == set(
        paths.values()
    )  # nothing half-written beside them
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"], engine="python"), frame())

    markdown = paths["md"].read_text("utf-8").split("\n")
    assert markdown[0] == "**Δ of 5 %**" and markdown[-2] == "A note_1."
    assert markdown[2:5] == [
        "| class | cs2 [95 %] | n | p |",
        "| :-- | --: | --: | --: |",
        "| K_I | 0.33 [0.30, 0.40] | 12 | 1.0e-12 |",
    ]

    latex = paths["tex"].read_text("utf-8")
    assert r"K\_II \& more & -- & 0 & -- \\" in latex and r"\caption{$\Delta$ of 5 \%}" in latex
    assert (
        r"\begin{tabular}{lrrr}" in latex
        and r"\toprule" in latex
        and r"\label{tab:table1}" in latex
    )
    assert latex.isascii() and latex.count("{") == latex.count("}")


def test_special_characters_do_not_break_a_table(tmp_path):
    table = pd.DataFrame({"a|b": ["x|y\nz", r"50% of $5 #1 {q} ~^ \ <s>"]})
    paths = write_table(table, "t", tmp_path)
    assert r"| x\|y z |" in paths["md"].read_text()
    escaped = (
        r"50\% of \$5 \#1 \{q\} \textasciitilde{}\textasciicircum{} \textbackslash{} "
        r"\textless{}s\textgreater{}"
    )
    assert escaped in paths["tex"].read_text()


def test_an_empty_table_is_written_with_its_header(tmp_path):
    paths = write_table(frame().iloc[:0], "t", tmp_path)
    assert paths["md"].read_text().count("\n") == 2 and len(pd.read_csv(paths["csv"])) == 0


def test_bad_table_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="stem"):
        write_table(frame(), "../t", tmp_path)
    with pytest.raises(ValueError, match="two columns named a"):
        write_table(pd.DataFrame([[1, 2]], columns=["a", "a"]), "t", tmp_path)


# --- the paper's values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table, model, column, keys, value",
    [
        (1, "gpt2", "ratio_II", dict(threshold="static", method="ig"), 0.44),
        (1, LLAMA2, "cs_II", dict(threshold="otsu", method="ig"), 0.062),
        (1, LLAMA3, "ratio_II", dict(threshold="otsu", method="ig"), 0.77),
        (1, LLAMA3, "t", dict(threshold="otsu", method="amig"), 130),
        (1, LLAMA3, "cap_II", dict(threshold="static", method="sig"), 0.77),
        (2, "gpt2", "dppl", dict(operation="erasure", neurons="global", class_="II"), 2.02),
        (
            2,
            LLAMA2,
            "avg",
            dict(operation="erasure", neurons="global", class_="II"),
            0.42,
        ),  # printed so
        (2, LLAMA3, "gen", dict(operation="update", neurons="local", class_="I"), 0.29),
        (3, LLAMA2, "avg", dict(operation="erasure", neurons="global", class_="II"), 0.47),
        (3, LLAMA3, "avg", dict(operation="erasure", neurons="cas", class_="II"), 0.51),
        (3, "gpt2", "rel", dict(operation="update", neurons="local", class_="I"), 0.53),
        (3, LLAMA2, "gen", dict(operation="update", neurons="cas", class_="I"), 0.50),
        (4, "gpt2", "threshold_value", dict(threshold="otsu", method="ig"), 0.146),
        (4, LLAMA2, "threshold_value", dict(threshold="static", method="amig"), 0.1),
        (4, LLAMA3, "threshold_value", dict(threshold="otsu", method="sig"), 0.082),
    ],
)
def test_the_papers_values(table, model, column, keys, value):
    assert paper_value(table, model, column, **keys) == value


def test_the_papers_averages_are_the_means_of_their_parts_but_for_the_noted_misprints():
    wrong = set()
    cells = [
        cell
        for table, sets in ((2, ("local", "global")), (3, ("local", "global", "cas")))
        for cell in product([table], PAPER_MODELS, ("erasure", "update"), sets, ("I", "II"))
    ]
    for table, model, operation, neurons, class_ in cells:
        keys = dict(operation=operation, neurons=neurons, class_=class_)
        *parts, avg = (
            paper_value(table, model, name, **keys) for name in ("rel", "gen", "loc", "avg")
        )
        if abs(sum(parts) / 3 - avg) > 0.0051:
            wrong.add((table, model, operation, neurons, class_))
    assert len(cells) == 24 + 36
    assert wrong == {
        (2, LLAMA2, "erasure", "global", "II"),
        (2, LLAMA3, "erasure", "global", "II"),
        (2, LLAMA2, "update", "global", "I"),
        (3, LLAMA2, "update", "global", "I"),
    }
    for table, model, operation, *_ in wrong:
        assert any(operation in note for note in paper_notes(table, model))


def test_models_the_paper_has_not_and_the_cell_it_lost_are_nan():
    keys = dict(operation="update", neurons="local", class_="I")
    assert (
        np.isnan(paper_value(2, "demo/gpt2", "rel", **keys)) and paper_notes(2, "demo/gpt2") == []
    )
    assert (
        np.isnan(paper_value(3, LLAMA3, "dppl", **keys)) and "Table 2" in paper_notes(3, LLAMA3)[0]
    )
    assert paper_value(2, "openai-community/gpt2", "rel", **keys) == 0.53
    assert np.isnan(paper_value(2, "gpt2", "rel", **{**keys, "neurons": "cas"}))  # of Table 3
    for method in ("ig", "another"):
        found = paper_value(4, "gpt2", "threshold_value", threshold="otsu", method=method)
        assert np.isnan(found) == (method == "another")


@pytest.mark.parametrize(
    "table, column, keys, message",
    [
        (6, "rel", {}, "tables 1, 2, 3, 4"),
        (1, "rel", dict(threshold="otsu", method="ig"), "ratio_I"),
        (1, "t", dict(threshold="otsu"), "threshold, method"),
        (4, "threshold_value", dict(threshold="otsu", methods="ig"), "keys threshold, method; got"),
    ],
)
def test_names_that_the_papers_tables_do_not_have_are_refused(table, column, keys, message):
    with pytest.raises(ValueError, match=message):
        paper_value(table, "gpt2", column, **keys)


# --- figures --------------------------------------------------------------------------------------


def cs2_frame():
    """CS2 of 12, 3 and 6 facts of three relations, of two models; one is undefined."""
    rng = np.random.default_rng(0)
    thresholds = dict(threshold_static=0.1, threshold_otsu=0.5)
    rows = [
        dict(relation=r, model=m, fact=i, cs2=low + 0.1 * rng.random(), **thresholds)
        for r, n, low in (("P17", 12, 0.6), ("P101", 3, 0.2), ("mine", 6, 0.4))
        for m in ("demo/gpt2", "other")
        for i in range(n)
    ]
    return pd.DataFrame(rows + [rows[0] | dict(model="other", fact=99, cs2=np.nan)])


def ticks(ax):
    return [label.get_text() for label in ax.get_xticklabels()]


def test_figure_3_has_a_dot_a_fact_by_relation_in_the_order_of_medians():
    fig, plotted = plots.figure_cs2([cs2_frame()], "ig", {"P17": "country", "P101": "field"})
    [ax] = fig.axes
    assert ticks(ax) == ["field (3)", "mine (6)", "country (12)"] and len(plotted) == 43
    [legend] = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["demo/gpt2", "other"]
    dots, medians = ax.collections
    assert len(dots.get_offsets()) == 42  # the undefined one is none
    assert sorted(dots.get_offsets()[:, 1]) == pytest.approx(sorted(plotted["cs2"].dropna()))
    bars = sorted(bar.tolist() for bar in medians.get_segments())
    assert len(bars) == 4  # no median of three facts
    assert {round(sum(x for x, _ in bar) / 2) for bar in bars} == {1, 2}  # where its dots are
    first = plotted.query("relation == 'mine' and model == 'demo/gpt2'")["cs2"]
    assert bars[0][0][1] == pytest.approx(first.median())


def test_the_thresholds_of_figure_3_are_lines_with_names():
    one = cs2_frame().query("model == 'other'")
    fig, _ = plots.figure_cs2([one], "ig", {}, line=0.3)
    [ax] = fig.axes
    assert not fig.legends and ax.get_legend() is None  # one model
    assert sorted(line.get_ydata()[0] for line in ax.lines) == [0.1, 0.3, 0.5]
    names = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert names == {"static threshold, 0.1": 0.1, "paper's example, 0.3": 0.3, "Otsu's, 0.50": 0.5}
    near = pd.concat([one.assign(threshold_otsu=0.28), one.assign(model="b", threshold_otsu=0.32)])
    [ax] = plots.figure_cs2([near], "ig", {}, line=0.3)[0].axes
    names = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert set(names) > {"Otsu's, 0.28 to 0.32"} and len(ax.lines) == 4
    assert np.diff(sorted(names.values())).min() > 0.06  # no name over another


@pytest.mark.parametrize("split", [True, False])
def test_figure_5_has_a_row_a_threshold_that_divides_the_facts(split):
    classes = dict(class_static="I", class_otsu=["I", "I", "II", "II"] if split else "I")
    facts = pd.DataFrame(
        dict(
            model="m",
            fact=range(4),
            relation="P17",
            predominance=[0.5, 1, 1, 1],
            predominance_rest=[0.25, 0.25, 0.5, 0.75],
            n_queries=4,
            **classes,
        )
    )
    fig, plotted = plots.figure_predominance(facts)
    left, right = fig.axes
    label = left.get_ylabel().split("\n")
    assert label == [
        "m",
        *(
            ["Otsu's threshold", "n = 2 / 2 facts"]
            if split
            else ["static threshold", "n = 4 facts"]
        ),
    ]
    high = [
        (int(10 * bar.get_x()) / 10, bar.get_height()) for bar in left.patches if bar.get_height()
    ]
    assert sorted(high) == (
        [(0.4, 0.5), (0.9, 0.5), (0.9, 1)] if split else [(0.4, 0.25), (0.9, 0.75)]
    )
    for ax in fig.axes:
        assert [line.get_xdata()[0] for line in ax.lines] == [0.25]
        assert "least possible" in ax.texts[0].get_text() and "0.25" in ax.texts[0].get_text()
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names == ["$K_{I}$", "$K_{II}$"][: 1 + split] and len(plotted) == 4
    assert right.get_title() == "without the first token"


def test_bars_have_their_values_and_intervals_and_controls_are_hollow():
    frame = pd.DataFrame(
        {
            "set": ["own", "own", "all others'", "all others'"],
            "class": ["I", "II"] * 2,
            "mean": [0.5, -0.2, 1, np.nan],
            "mean_low": [0.4, -0.3, 1.05, np.nan],
            "mean_high": [0.6, -0.1, 1.2, np.nan],
            "hollow": [False, True, False, False],
        }
    )
    ax = plots.bars_with_intervals(frame, plt.figure().subplots(), x="set", hue="class")
    assert [bar.get_height() for bar in ax.patches] == [0.5, -0.2, 1]
    faces = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in ax.patches]
    assert faces == [plots.CLASS_COLORS["I"], "#FFFFFF", plots.CLASS_COLORS["I"]]
    edge = matplotlib.colors.to_hex(ax.patches[1].get_edgecolor()).upper()
    assert edge == plots.CLASS_COLORS["II"]
    spans = [tuple(line.get_segments()[0][:, 1]) for line in ax.collections]
    assert spans == [(0.4, 0.6), (-0.3, -0.1), (1.05, 1.2)]
    assert [text.get_text() for text in ax.texts] == ["–"]
    few = frame.assign(mean_low=[0.4] + [np.nan] * 3, mean_high=[0.6] + [np.nan] * 3)
    ax = plots.bars_with_intervals(few, plt.figure().subplots(), x="set", hue="class")
    assert [bar.get_height() for bar in ax.patches] == [0.5]  # a value without interval is no bar
    assert [text.get_text() for text in ax.texts] == ["–"] * 3


def summarised(sets, counts, known=(0, 0)):
    """A table as of `effects.summary` by the static threshold: n queries of each class, all and
    known. A class's value is by its place: 1 or 2, that of known ones 3 or 4."""
    rows = []
    for queries, start, numbers in (("all", 1, counts), ("known", 3, known)):
        for name, direction, (place, kind) in product(
            sets, ("enhance", "suppress", "average"), enumerate(("I", "II"))
        ):
            value = (
                (start + place) * (-1 if direction == "enhance" else 1)
                if numbers[place]
                else np.nan
            )
            row = dict(
                threshold="static", model="m", queries=queries, set=name, direction=direction
            )
            row |= {"class": kind, "n": numbers[place], "size": 23.4}
            for statistic in ("mean", "trimmed"):
                row |= {f"{statistic}{end}": value for end in ("", "_low", "_high")}
            rows.append(row)
    return pd.DataFrame(rows)


@pytest.mark.parametrize("known", [(30, 12), (0, 0)])
def test_figure_4_shows_the_sets_their_sizes_and_random_neurons_beside(known):
    sets = ("self", "union", "intersection", "self_random")
    frame = summarised(sets, (90, 40), known)
    fig = plots.figure_bars(frame, row="direction", column="model", control="random")
    assert [ax.get_title().split("\n")[0] for ax in fig.axes] == [  # one model's panels lie down
        "enhanced",
        "suppressed",
        "average of both",
    ]
    n = " / ".join(map(str, (90, 40, *filter(None, known))))
    assert (
        fig.axes[0].get_title().endswith(f"n = {n} queries")
        and "n =" not in fig.axes[1].get_title()
    )
    assert [" ".join(tick.split()) for tick in ticks(fig.axes[1])] == [
        "own (23)",
        "all others' (23)",
        "in all others (23)",
    ]
    heights = [bar.get_height() for bar in fig.axes[1].patches]
    values = [1, 2, 3, 4] if known[0] else [1, 2]
    assert heights == [value for value in values for _ in range(2)] + values * 2
    hollow = [bar.get_facecolor() == (1, 1, 1, 1) for bar in fig.axes[1].patches]
    assert hollow == [False, True] * len(values) + [False] * 2 * len(values)
    assert fig._supylabel.get_text().split() == (
        "ΔProb: change of P(answer), as claimed (1 = 100 %)".split()
    )
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names[:2] == ["$K_{I}$", "$K_{II}$"] and names[-1] == "random"
    title = fig.legends[0].get_title().get_text()
    assert (
        "10 % trimmed mean" in title and "fewer than 10 facts" in title and "no fact" not in title
    )


def test_an_empty_class_has_no_place_and_is_named():
    frame = summarised(("self", "union"), (90, 0))
    fig = plots.figure_bars(frame, row="direction", column="model")
    for ax in fig.axes:
        assert len(ax.patches) == 2 and not ax.texts
        middles = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
        assert middles == pytest.approx(ax.get_xticks())
    [legend] = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["$K_{I}$"]
    assert "static threshold: no fact is in $K_{II}$" in legend.get_title().get_text()


def test_figure_6_pairs_own_and_irrelevant_synapses_in_each_direction():
    parts = [
        summarised(("self", "irrelevant"), (90, 40)).assign(quantity=q)
        for q in ("value", "probability")
    ]
    plotted = pd.concat(parts)
    fig = plots.figure_bars(plotted, row="quantity", column="model", x="direction", control="other")
    assert [ax.get_title().split("\n")[0] for ax in fig.axes] == ["ΔValue", "ΔProb"]
    for ax in fig.axes:
        assert ticks(ax) == ["enhanced", "suppressed"] if ax is fig.axes[0] else True
        assert [bar.get_height() for bar in ax.patches] == [
            -1,
            -1,
            -2,
            -2,
            1,
            1,
            2,
            2,
        ]  # no average
        assert [bar.get_facecolor() == (1, 1, 1, 1) for bar in ax.patches] == [False, True] * 4
    assert len({ax.get_ylim() for ax in fig.axes}) == 1
    assert "up if enhanced, down\nif suppressed" in fig._supylabel.get_text()
    two = pd.concat([plotted, plotted.assign(model="b")])
    fig = plots.figure_bars(two, row="quantity", column="model", x="direction")
    assert [ax.get_ylabel() for ax in fig.axes] == ["ΔValue", "", "ΔProb", ""]


def edits_table(dppl):
    keys = [
        dict(threshold="otsu", op=op, neurons=name, n=340, neurons_edited=21.3) | {"class": kind}
        for op in ("erasure", "update")
        for name in ("local", "local (random)", "cas", "cas (random)")
        for kind in ("I", "II")
    ]
    table = pd.DataFrame(keys)
    for name in ("rel", "gen", "loc", "avg", "dppl"):
        value = dppl if name == "dppl" else 0.98
        columns = {name: value, f"{name}_low": 0.9 * value, f"{name}_high": 1.02 * value}
        table = table.assign(**columns)
    return table


@pytest.mark.parametrize("dppl", [0.07, 1e5])
def test_a_figure_of_edits_says_what_it_shows_and_nothing_lies_over_a_title(dppl):
    table = edits_table(dppl)
    fig, plotted = plots.figure_edits(table, "otsu", ["local", "cas"])
    fig.canvas.draw()
    [legend] = fig.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["local (21 neurons)", "CAS (21 neurons)", "random neurons"]
    first, _, last = fig.axes[:3]
    assert first.get_title() == "erasure, $K_{I}$\nn = 340 edits" and first.get_ylabel() == "share"
    assert [" ".join(tick.split()) for tick in ticks(first)] == [
        "this wording changed",
        "other wordings changed",
        "other facts kept",
        "mean of the three",
    ]
    assert [bar.get_facecolor() == (1, 1, 1, 1) for bar in first.patches] == [False, True] * 8
    assert last.get_yscale() == "log" and last.get_ylim()[1] > max(2, dppl)
    tops = [bar.get_y() + bar.get_height() for bar in last.patches]
    assert tops == pytest.approx([1 + dppl] * 8)  # factors
    assert set(plotted.loc[plotted["metric"] == "dppl", "mean"]) == {dppl}
    few, _ = plots.figure_edits(table.assign(n_gen=12), "otsu", ["local", "cas"])
    assert few.axes[0].get_title().endswith("n = 340 / 12 / 340 / 340 edits")
    for ax in fig.axes:
        title = ax.title.get_window_extent()
        assert ax.get_legend() is None and not legend.get_window_extent().overlaps(title)
        assert all(text.get_window_extent().y1 <= title.y0 for text in ax.texts)


def test_the_thresholds_of_the_sweep_are_marked():
    frame = pd.DataFrame(list(product([0.1, 0.2], [0.05, 0.1, 0.3])), columns=["t", "static"])
    fig, _ = plots.figure_thresholds(frame.assign(R_II=0.5), otsu=0.2)
    ax = fig.axes[0]
    marks = {
        text.get_text(): text.get_position()[0]
        for text in ax.texts
        if text.get_text()[-3:] != ".50"
    }
    assert marks.pop("paper's, 0.1") == 1.5
    assert marks == {"Otsu's at t = 0.2: 0.20": 2}
    [otsu] = ax.lines
    assert otsu.get_xdata().tolist() == [2]  # between two columns
    [static] = ax.patches
    assert static.get_bbox().bounds == (1, 0, 1, 2)
    assert ax.get_ylabel() == "t: share of the largest attribution"
    assert fig.axes[1].get_ylabel() == "share of facts in $K_{II}$"
    plots.figure_thresholds(frame.assign(R_II=0.5), otsu=np.nan)[0].canvas.draw()


def test_places_are_averaged_over_prompts_of_different_lengths(recwarn):
    found = pd.DataFrame({"by_head": [[4, 0], [0, 2]], "by_column": [[2, 2], [0, 1, 1]]})
    fig, frame = plots.figure_places(found, 2)
    assert frame["synapses"].tolist()[:2] == [2, 1]
    assert frame["share"].tolist()[2:] == [0.5, 0.75, 0.5] and frame["n"].tolist()[2:] == [2, 2, 1]
    assert frame["of_all"].tolist()[2:] == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    left, right = fig.axes[:2]
    assert left.get_title() == "first token: 33 % of all synapses"
    assert [text.get_text() for text in left.texts] == ["33 %", "50 %", "17 %"]
    assert "1.50" in right.get_title()
    assert not [
        one
        for one in recwarn
        if issubclass(one.category, (FutureWarning, DeprecationWarning))
        or "Pandas" in one.category.__name__
    ]


@pytest.mark.parametrize("text", ["a\rb", "a\r\nb"], ids=ascii)
def test_the_numbers_beside_a_figure_keep_their_texts(text, tmp_path):
    fig, data = plt.figure(), pd.DataFrame({"text": [text, "next"], "x": [0.1, np.nan]})
    paths = plots.save_figure(fig, "f", tmp_path, data)
    plt.close(fig)
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"]), data)


def test_the_strong_neurons_of_a_map_are_those_above_the_least():
    values = np.zeros((3, 1003))
    values[1, 517], values[2, 0], values[2, 1] = -2.0, 0.5, 0.3
    found = plots.strong_neurons(values, True, 0.4)
    assert found.to_numpy().tolist() == [[1, 517, -2.0], [2, 0, 0.5]]
    assert plots.strong_neurons(values, False, 0.4)["neuron"].tolist() == [0]
    assert plots.strong_neurons(np.zeros((2, 2)), False, 0.0).empty


def example_maps():
    """Two prompts each of two facts; of a fact both have neuron (0, 1), each has one of its own."""
    maps = []
    for fact, scale in (("sure", 0.4), ("unsure", 1e-4)):
        for p in (0, 1):
            attribution = np.zeros((2, 4))
            attribution[0, 1], attribution[1, p] = scale, 0.5 * scale
            one = dict(fact=f"P|{fact}|o", prompt=f"{fact} {p}", probability=scale)
            maps.append(one | dict(attribution=attribution, activation=attribution - 0.3))
    return maps


def drawn_dots(ax):
    """(neuron, layer, filled) of a panel."""
    [dots] = ax.collections
    filled = dots.get_facecolors()[:, 3] > 0
    return [(*place, full) for place, full in zip(dots.get_offsets().tolist(), filled.tolist())]


def test_figure_1_fills_the_neurons_of_both_wordings_on_a_scale_of_each_query():
    fig, plotted = plots.figure_1(example_maps(), 0.2)
    panels = [ax for ax in fig.subfigs[0].axes if ax.get_title()]
    for place, ax in enumerate(panels):
        assert drawn_dots(ax) == [(1, 0, True), (place % 2, 1, False)]
    titles = [ax.get_title().split("\n")[-1] for ax in panels]
    assert titles == ["P(answer) = 0.40"] * 2 + ["P(answer) = 0.0001"] * 2
    shares = plotted[plotted["kind"] == "attribution"].groupby("prompt")["value"]
    assert shares.max().tolist() == [1.0] * 4 and shares.min().tolist() == [0.5] * 4
    assert set(plotted["kind"]) == {"attribution", "activation"}
    assert "filled: in both wordings" in fig.subfigs[0].get_suptitle()


def test_figures_7_and_10_keep_the_scale_of_the_unmodified_query():
    changed = {"unmodified": 1.0, "suppressed": 0.1, "enhanced": 3.0}
    maps = []
    for one in example_maps():
        states = {
            name: dict(
                attribution=one["attribution"] * factor,
                activation=one["activation"],
                probability=factor / 4,
            )
            for name, factor in changed.items()
        }
        maps.append(dict(fact=one["fact"], prompt=one["prompt"], **states))
    for names in (list(changed)[:2], list(changed)):
        fig, plotted = plots.figure_conditions(maps, names, "attribution", 0.2)
        panels = fig.axes[: 4 * len(names)]
        assert [len(drawn_dots(ax)) for ax in panels] == ([2] * 4 + [0] * 4 + [2] * 4)[
            : len(panels)
        ]
        assert [text.get_text() for text in panels[4].texts] == ["none"]
        assert panels[4].get_title() == "P(answer) = 0.03" and "sure → o" in panels[0].get_title()
        assert set(plotted["condition"]) == {"unmodified", "enhanced"} & set(names)
        fig, _ = plots.figure_conditions(maps, names, "activation", 0.2)
        assert {len(drawn_dots(ax)) for ax in fig.axes[: 4 * len(names)]} == {8}


def test_no_text_of_a_figure_is_small():
    figures = [plots.figure_1(example_maps())[0], plots.figure_cs2([cs2_frame()], "ig", {})[0]]
    figures.append(plots.figure_edits(edits_table(0.1), "otsu", ["local"])[0])
    frame = summarised(("self", "union"), (90, 40))
    figures.append(plots.figure_bars(frame, row="direction", column="model"))
    for fig in figures:
        texts = [text for text in fig.findobj(matplotlib.text.Text) if text.get_text().strip()]
        assert texts and min(text.get_fontsize() for text in texts) >= 8


def test_models_get_fixed_and_different_colours():
    assert plots.model_colors(["gpt2"])["gpt2"] == plots.model_colors(["demo/gpt2"])["demo/gpt2"]
    names = ["demo/gpt2", "demo/llama2", "demo/llama3", "mine", "yours"]
    assert len(set(plots.model_colors(names).values())) == 5


def test_a_figure_is_written_with_its_numbers_small_and_byte_for_byte_the_same(
    tmp_path, monkeypatch
):
    data = cs2_frame()
    contents = []
    for folder, epoch in (("a", "100000"), ("b", "900000000")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        fig, _ = plots.figure_cs2([data], "ig", {})
        paths = plots.save_figure(fig, "fig3", tmp_path / folder, data)
        contents.append({kind: path.read_bytes() for kind, path in paths.items()})
        plt.close(fig)
    assert contents[0] == contents[1] and set(contents[0]) == {"png", "pdf", "csv"}
    assert contents[0]["png"][:4] == b"\x89PNG" and len(contents[0]["png"]) <= plots.MAX_PNG
    assert contents[0]["pdf"][:5] == b"%PDF-" and b"CreationDate" not in contents[0]["pdf"]
    assert b"/Type3" not in contents[0]["pdf"]  # fonttype 42
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"], engine="python"), data)


def test_a_crowded_figure_is_made_to_fit_150_kilobytes(tmp_path):
    fig, axes = plt.subplots(2, 2, figsize=(7, 4))
    for seed, ax in enumerate(axes.flat):
        ax.imshow(np.random.default_rng(seed).normal(size=(32, 200)), aspect="auto")
    paths = plots.save_figure(fig, "fig1", tmp_path, pd.DataFrame())
    assert paths["png"].stat().st_size <= plots.MAX_PNG
    from PIL import Image

    assert Image.open(io.BytesIO(paths["png"].read_bytes())).width >= 690
