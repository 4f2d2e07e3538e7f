"""Tables and figures as files: what stands in them is what was given, byte for byte the same."""

import io
from itertools import product

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

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


def texts(found):
    return [text.get_text() for text in found]


def ticks(ax):
    return [" ".join(text.split()) for text in texts(ax.get_xticklabels())]


def bars(ax):
    return sorted(ax.patches, key=lambda bar: bar.get_x())


def heights(ax):
    return [bar.get_height() for bar in bars(ax)]


def hollow(ax):
    return [bar.get_facecolor() == (1, 1, 1, 1) for bar in bars(ax)]


def legend_names(fig):
    return texts(fig.legends[0].get_texts())


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((0.5, 0.474, 0.568), "0.50 [0.47, 0.57]"),
        ((0.5, np.nan, np.nan), "0.50 [–, –]"),
        ((True,), "yes"),
        ((-0.0,), "0.00"),
        ((1.2e-7,), "1.2e-07"),
        ((-0.0042,), "-0.004"),
        ((0.00037, 1e-4, 9e-5), "0.0004 [0.0001, 0.0001]"),
        ((0.004, 0.0003, 0.01), "0.0040 [0.0003, 0.0100]"),
        ((-0.07, -0.14, -0.001), "-0.070 [-0.140, -0.001]"),
        ((68000.0, 6629.7, 160000.0), "6.8e+04 [6.6e+03, 1.6e+05]"),
        ((-2e-5, -1e-3, 9e-4), "0.0000 [-0.0010, 0.0009]"),
        ((np.int64(4),), "4"),
    ],
)
def test_values_are_formatted_for_reading(arguments, text):
    assert format_value(*arguments) == text


def frame():
    columns = {"class": ["K_I", "K_II & more"], "cs2": [1 / 3, np.nan], "cs2_low": [0.3, np.nan]}
    columns |= {"cs2_high": [0.4, np.nan], "n": [12.0, 0.0], "p": [1e-12, np.nan]}
    return pd.DataFrame(columns)


def test_a_table_is_written_three_times_with_full_precision_in_csv(tmp_path):
    shown = display_table(frame())
    assert list(shown.columns) == ["class", "cs2 [95 %]", "n", "p"]
    assert list(shown.iloc[0]) == ["K_I", "0.33 [0.30, 0.40]", "12", "1.0e-12"]
    paths = write_table(frame(), "table1", tmp_path / "new", "Δ of 5 %", "A note_1.")
    assert [path.name for path in paths.values()] == ["table1.csv", "table1.md", "table1.tex"]
    assert set((tmp_path / "new").iterdir()) == set(paths.values())  # nothing half-written
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"], engine="python"), frame())
    lines = paths["md"].read_text("utf-8").split("\n")
    assert lines[0] == "**Δ of 5 %**" and lines[-2] == "A note_1."
    assert lines[2:4] == ["| class | cs2 [95 %] | n | p |", "| :-- | --: | --: | --: |"]
    assert lines[5] == "| K_II & more | – | 0 | – |"
    latex = paths["tex"].read_text("utf-8")
    parts = r"K\_II \& more & -- & 0 & -- \\", r"\caption{$\Delta$ of 5 \%}", r"A note\_1.}"
    parts += r"\begin{tabular}{lrrr}", r"\toprule", r"\label{tab:table1}"
    assert all(part in latex for part in parts)
    assert latex.isascii() and latex.count("{") == latex.count("}")


@pytest.mark.parametrize(
    "table, model, column, keys, value",
    [
        (1, LLAMA2, "cs_II", "otsu ig", 0.062),
        (2, LLAMA2, "avg", "erasure global II", 0.42),  # printed so
        (3, LLAMA3, "avg", "erasure cas II", 0.51),
        (3, "openai-community/gpt2", "rel", "update local I", 0.53),
        (4, "gpt2", "threshold_value", "otsu ig", 0.146),
        (2, "demo/gpt2", "rel", "update local I", np.nan),
        (2, "gpt2", "rel", "update cas I", np.nan),  # of Table 3
        (3, LLAMA3, "dppl", "update local I", np.nan),  # lost in print
    ],
)
def test_the_papers_values(table, model, column, keys, value):
    edits = keys.count(" ") == 2
    names = ("operation", "neurons", "class_") if edits else ("threshold", "method")
    found = paper_value(table, model, column, **dict(zip(names, keys.split(), strict=True)))
    np.testing.assert_equal(found, value)


def test_the_papers_averages_are_the_means_of_their_parts_but_for_the_noted_misprints():
    wrong, cells = set(), []
    for table, sets in ((2, ("local", "global")), (3, ("local", "global", "cas"))):
        cells += product([table], PAPER_MODELS, ("erasure", "update"), sets, ("I", "II"))
    for cell in cells:
        keys = dict(zip(("operation", "neurons", "class_"), cell[2:]))
        values = [paper_value(*cell[:2], name, **keys) for name in ("rel", "gen", "loc", "avg")]
        if abs(sum(values[:3]) / 3 - values[3]) > 0.0051:
            wrong.add(cell)
    assert len(cells) == 24 + 36
    assert wrong == {
        (2, LLAMA2, "erasure", "global", "II"),
        (2, LLAMA3, "erasure", "global", "II"),
        (2, LLAMA2, "update", "global", "I"),
        (3, LLAMA2, "update", "global", "I"),
    }
    for table, model, operation, *_ in wrong:
        assert any(operation in note for note in paper_notes(table, model))
    assert paper_notes(2, "demo/gpt2") == [] and "Table 2" in paper_notes(3, LLAMA3)[0]


def cs2_frame():
    """CS2 of 12, 3 and 6 facts of three relations, of two models; one is undefined."""
    rng = np.random.default_rng(0)
    rows = []
    for relation, n, low in (("P17", 12, 0.6), ("P101", 3, 0.2), ("mine", 6, 0.4)):
        for model, fact in product(("demo/gpt2", "other"), range(n)):
            value = low + 0.1 * rng.random()
            rows.append(dict(relation=relation, model=model, fact=fact, cs2=value))
    rows.append(dict(relation="P17", model="other", fact=99, cs2=np.nan))
    return pd.DataFrame(rows).assign(threshold_static=0.1, threshold_otsu=0.5)


def test_figure_3_has_a_dot_a_fact_by_relation_in_the_order_of_medians():
    fig, plotted = plots.figure_cs2([cs2_frame()], "ig", {"P17": "country", "P101": "field"})
    [ax] = fig.axes
    assert ticks(ax) == ["field (3)", "mine (6)", "country (12)"] and len(plotted) == 43
    assert legend_names(fig) == ["demo/gpt2", "other"]
    dots = np.concatenate([part.get_offsets() for part in ax.collections])
    assert sorted(dots[:, 1]) == pytest.approx(sorted(plotted["cs2"].dropna()))  # 42
    lines = [line.get_xydata() for line in ax.lines if line.get_marker() == "_"]
    points = sorted(point for line in lines for point in line.tolist() if point[1] == point[1])
    assert [round(x) for x, _ in points] == [1, 1, 2, 2]  # no median of three facts
    first = plotted.query("relation == 'mine' and model == 'demo/gpt2'")["cs2"]
    assert points[0][1] == pytest.approx(first.median())


@pytest.mark.parametrize(
    "without, shown",
    [(["other"], ["P101 (3 / 0)", "mine (6 / 0)", "P17 (12 / 0)"]), (["demo/gpt2", "other"], [])],
)
def test_figure_3_is_drawn_of_models_without_a_fact_that_has_a_cs2(without, shown):
    """Such as of own facts with two prompts each."""
    frame = cs2_frame()
    frame.loc[frame["model"].isin(without), "cs2"] = np.nan
    fig, plotted = plots.figure_cs2([frame], "ig", {})
    assert ticks(fig.axes[0]) == shown and len(plotted) == 43


def test_a_median_of_figure_3_stands_at_its_own_models_dots():
    """Also where the lowest dot is of a relation with too few for one, of the other model."""
    frame = cs2_frame()
    frame["cs2"] += 0.2 * ((frame["model"] == "other") & (frame["relation"] != "P101"))
    frame.loc[(frame["model"] == "other") & (frame["relation"] == "P101"), "cs2"] = 0.1
    fig, plotted = plots.figure_cs2([frame], "ig", {})
    dots = np.concatenate([part.get_offsets() for part in fig.axes[0].collections])
    x_of = dict(zip(dots[:, 1].round(9), dots[:, 0]))
    marks = [line.get_xydata() for line in fig.axes[0].lines if line.get_marker() == "_"]
    at = {round(y, 9): x for line in marks for x, y in line.tolist() if y == y}
    groups = plotted[plotted["relation"] != "P101"].dropna().groupby(["relation", "model"])["cs2"]
    assert len(at) == len(groups) == 4
    for _, own in groups:
        near = np.mean([x_of[round(y, 9)] for y in own])
        assert at[round(own.median(), 9)] == pytest.approx(near, abs=0.15)


def test_the_thresholds_of_figure_3_are_lines():
    one = cs2_frame().query("model == 'other'")
    fig, _ = plots.figure_cs2([one], "ig", {}, line=0.3)
    lines = [line for line in fig.axes[0].lines if line.get_linestyle() == "--"]
    assert sorted(line.get_ydata()[0] for line in lines) == [0.1, 0.3, 0.5]
    names = {text.get_text(): text.get_position()[1] for text in fig.axes[0].texts}
    assert names == {"static threshold, 0.1": 0.1, "paper's example, 0.3": 0.3, "Otsu's, 0.50": 0.5}


def steps(ax):
    """Of each class the tenths in which it has facts, with their height."""
    shapes = [path.vertices for one in ax.collections for path in one.get_paths()]
    return [{(round(x, 1), round(y, 2)) for x, y in shape if y > 0} for shape in shapes]


ALL = [{(0.4, 0.25), (0.5, 0.25), (0.9, 0.75), (1.0, 0.75)}]
HALVES = [{(0.9, 1.0), (1.0, 1.0)}, {(0.4, 0.5), (0.5, 0.5), (0.9, 0.5), (1.0, 0.5)}]


@pytest.mark.parametrize(
    "second, label, wanted",
    [
        (0, "m\nstatic threshold\nn = 40 facts", ALL),
        (9, "m\nstatic threshold\nn = 40 facts", ALL),  # too few for a class
        (20, "m\nOtsu's threshold\nn = 20 / 20 facts", HALVES),
    ],
)
def test_figure_5_has_a_row_a_threshold_that_divides_the_facts(second, label, wanted):
    facts = pd.DataFrame(dict(model="m", fact=range(40), relation="P17", n_queries=4))
    facts["predominance"] = np.repeat([0.5, 1, 1, 1], 10)
    facts["predominance_rest"] = np.repeat([0.25, 0.25, 0.5, 0.75], 10)
    otsu = np.repeat(["I", "II"], [40 - second, second])
    fig, plotted = plots.figure_predominance(facts.assign(class_static="I", class_otsu=otsu))
    left, right = fig.axes
    assert left.get_ylabel() == label and len(plotted) == 40
    assert sorted(map(sorted, steps(left))) == sorted(map(sorted, wanted))
    for ax in fig.axes:
        assert [line.get_xdata()[0] for line in ax.lines] == [0.25]
        assert "1 of k wordings, on average 0.25" in texts(ax.texts)
    assert legend_names(fig) == ["$K_{I}$", "$K_{II}$"][: len(wanted)]
    assert right.get_title() == "without the first token"


@pytest.mark.parametrize("class_static", ["I", None])
def test_figure_5_keeps_models_apart_whose_names_end_alike_with_and_without_classes(class_static):
    facts = pd.DataFrame(dict(fact=range(12), relation="P17", n_queries=4, class_otsu=None))
    facts = facts.assign(predominance=0.5, predominance_rest=0.5, class_static=class_static)
    both = pd.concat([facts.assign(model=name) for name in ("demo/gpt2", "gpt2")])
    fig, plotted = plots.figure_predominance(both)
    assert len(plotted) == 24
    assert [ax.get_ylabel().split("\n")[0] for ax in fig.axes[::2]] == ["demo/gpt2", "gpt2"]
    assert steps(fig.axes[0]) == ([{(0.4, 1.0), (0.5, 1.0)}] if class_static else [])


def test_bars_have_their_values_and_intervals_and_controls_are_hollow():
    frame = pd.DataFrame({"set": ["own", "own", "others'", "others'"], "class": ["I", "II"] * 2})
    frame["mean"], frame["hollow"] = [0.5, -0.2, 1, np.nan], [False, True, False, False]
    frame["mean"] = frame["mean"].fillna(1.0)  # without interval it is no bar
    frame["mean_low"], frame["mean_high"] = [0.4, -0.3, 1.05, np.nan], [0.6, -0.1, 1.2, np.nan]
    ax = plots.bars_with_intervals(frame, plt.figure().subplots(), x="set", hue="class")
    assert heights(ax) == [0.5, -0.2, 1] and hollow(ax) == [False, True, False]
    edges = [matplotlib.colors.to_hex(bar.get_edgecolor()).upper() for bar in bars(ax)]
    assert edges == [plots.CLASS_COLORS[name] for name in ("I", "II", "I")]
    spans = [tuple(line[:, 1]) for line in ax.collections[0].get_segments()]
    assert spans == [(0.4, 0.6), (-0.3, -0.1), (1.05, 1.2)]
    crosses = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "x"]
    assert crosses == [[[pytest.approx(1.2), 0]]]


def summarised(sets, counts, known=(0, 0)):
    """A table as of `effects.summary`: n queries of each class, all and known. A class's value is
    by its place: 1 or 2, that of known ones 3 or 4."""
    rows = []
    kinds = [("all", "I", 1), ("all", "II", 2), ("known", "I", 3), ("known", "II", 4)]
    for (queries, kind, value), n in zip(kinds, (*counts, *known)):
        for name, direction in product(sets, ("enhance", "suppress", "average")):
            row = dict(threshold="static", model="m", queries=queries, set=name, n=n, size=23.4)
            signed = (-value if direction == "enhance" else value) if n else np.nan
            row |= {"class": kind, "direction": direction}
            row |= {f"trimmed{end}": signed for end in ("", "_low", "_high")}
            rows.append(row)
    return pd.DataFrame(rows)


@pytest.mark.parametrize("known", [(30, 12), (0, 0)])
def test_figure_4_shows_the_sets_their_sizes_and_random_neurons_beside(known):
    frame = summarised(("self", "union", "intersection", "self_random"), (90, 40), known)
    fig = plots.figure_bars(frame, row="direction", column="model", control="random")
    titles = [ax.get_title().split("\n") for ax in fig.axes]  # one model's panels lie down
    assert [title[0] for title in titles] == ["enhanced", "suppressed", "average of both"]
    n = " / ".join(map(str, (90, 40, *filter(None, known))))
    assert [title[1:] for title in titles] == [[f"n = {n} queries"]] * 3
    middle = fig.axes[1]
    assert ticks(middle) == ["own (23)", "all others' (23)", "in all others (23)"]
    values = [1, 2, 3, 4] if known[0] else [1, 2]
    assert heights(middle) == list(np.repeat(values, 2)) + values * 2
    assert hollow(middle) == [False, True] * len(values) + [False] * 2 * len(values)
    names = legend_names(fig)
    assert names[:2] == ["$K_{I}$", "$K_{II}$"] and names[-1] == "random"
    title = fig.legends[0].get_title().get_text()
    assert "10 % trimmed mean" in title and "no fact" not in title


def test_an_empty_class_has_no_place_and_is_named():
    frame = summarised(("self", "union"), (90, 0))
    fig = plots.figure_bars(frame, row="direction", column="model")
    for ax in fig.axes:
        middles = [bar.get_x() + bar.get_width() / 2 for bar in bars(ax)]
        assert middles == pytest.approx(ax.get_xticks()) and len(middles) == 2 and not ax.texts
    [legend] = fig.legends
    assert texts(legend.get_texts()) == ["$K_{I}$"]
    assert "static threshold: no fact is in $K_{II}$" in legend.get_title().get_text()


def test_figure_6_pairs_own_and_irrelevant_synapses_in_each_direction():
    frame = summarised(("self", "irrelevant"), (90, 40))
    plotted = pd.concat([frame.assign(quantity=name) for name in ("value", "probability")])
    fig = plots.figure_bars(plotted, row="quantity", column="model", x="direction", control="other")
    assert [ax.get_title().split("\n")[0] for ax in fig.axes] == ["ΔValue", "ΔProb"]
    assert ticks(fig.axes[0]) == ["enhanced", "suppressed"]  # no average
    for ax in fig.axes:
        assert heights(ax) == [-1, -1, -2, -2, 1, 1, 2, 2] and hollow(ax) == [False, True] * 4
    assert len({ax.get_ylim() for ax in fig.axes}) == 1
    assert {ax.get_yscale() for ax in fig.axes} == {"linear"}
    two = pd.concat([plotted, plotted.assign(model="b")])
    fig = plots.figure_bars(two, row="quantity", column="model", x="direction")
    assert [ax.get_ylabel() for ax in fig.axes] == ["ΔValue", "", "ΔProb", ""]


def test_where_one_bar_is_far_above_1_all_panels_have_one_kind_of_axis_and_say_so():
    frame = summarised(("self", "union"), (90, 40))
    statistics = ["trimmed", "trimmed_low", "trimmed_high"]
    frame.loc[frame["direction"] == "enhance", statistics] *= -30
    fig = plots.figure_bars(frame, row="direction", column="model")
    assert {ax.get_yscale() for ax in fig.axes} == {"symlog"}
    assert fig._supylabel.get_text().endswith("(logarithmic above 1)")
    fig.canvas.draw()
    assert all(-0.5 < ax.get_ylim()[0] <= 0 for ax in fig.axes)  # no empty half


def edits_table(dppl):
    sets = ("local", "local (random)", "cas", "cas (random)")
    keys = product(("erasure", "update"), sets, ("I", "II"))
    table = pd.DataFrame(keys, columns=["op", "neurons", "class"])
    table = table.assign(threshold="otsu", n=340, neurons_edited=21.3)
    for name in ("rel", "gen", "loc", "avg", "dppl"):
        value = dppl if name == "dppl" else 0.98
        table[[name, f"{name}_low", f"{name}_high"]] = value, 0.9 * value, 1.02 * value
    return table


@pytest.mark.parametrize("dppl", [0.07, 1e5])
def test_a_figure_of_edits_says_what_it_shows(dppl):
    table = edits_table(dppl)
    fig, plotted = plots.figure_edits(table, "otsu", ["local", "cas"])
    [legend] = fig.legends
    names = ["local (21 neurons)", "CAS (21 neurons)", "random neurons"]
    assert texts(legend.get_texts()) == names
    first, _, last = fig.axes[:3]
    assert first.get_title() == "erasure, $K_{I}$\nn = 340 edits" and first.get_ylabel() == "share"
    assert hollow(first) == [False, True] * 8
    assert last.get_yscale() == "log" and last.get_ylim()[1] > max(2, dppl)
    tops = [bar.get_y() + bar.get_height() for bar in last.patches]
    assert tops == pytest.approx([1 + dppl] * 8)  # factors
    assert set(plotted.loc[plotted["metric"] == "dppl", "mean"]) == {dppl}
    few, _ = plots.figure_edits(table.assign(n_gen=12), "otsu", ["local", "cas"])
    assert few.axes[0].get_title().endswith("n = 340 / 12 / 340 / 340 edits")


def test_the_thresholds_of_the_sweep_are_marked():
    sweep = pd.DataFrame(list(product([0.1, 0.2], [0.05, 0.1, 0.3])), columns=["t", "static"])
    sweep["R_II"] = 0.5
    fig, _ = plots.figure_thresholds(sweep, otsu=0.2)
    ax = fig.axes[0]
    marks = {text.get_text(): text.get_position()[0] for text in ax.texts}
    assert (marks["paper's, 0.1"], marks["Otsu's at t = 0.2: 0.20"]) == (1.5, 2)
    assert ax.lines[0].get_xdata().tolist() == [2]  # between two columns
    assert ax.patches[0].get_bbox().intervalx.tolist() == [1, 2]
    plots.figure_thresholds(sweep, otsu=np.nan)[0].canvas.draw()


@pytest.mark.filterwarnings("error::pandas.errors.Pandas4Warning")
def test_places_are_averaged_over_prompts_of_different_lengths():
    found = pd.DataFrame({"by_head": [[4, 0], [0, 2]], "by_column": [[2, 2], [0, 1, 1]]})
    fig, frame = plots.figure_places(found, 2)
    assert frame["synapses"].tolist()[:2] == [2, 1]
    assert frame["share"].tolist()[2:] == [0.5, 0.75, 0.5] and frame["n"].tolist()[2:] == [2, 2, 1]
    assert frame["of_all"].tolist()[2:] == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    left, right = fig.axes[:2]
    assert left.get_title() == "first token: 33 % of all queries' synapses"
    assert texts(left.texts) == ["33 %", "50 %", "17 %"] and "1.50" in right.get_title()


def example_maps():
    """Two prompts each of two facts; of a fact both have neuron (0, 1), each has one of its own."""
    maps = []
    for (fact, scale), p in product((("sure", 0.4), ("unsure", 1e-4)), (0, 1)):
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
    activations = plotted.loc[plotted["kind"] == "activation", "value"]
    assert activations.min() == -1.0 and list(plotted)[:3] == ["layer", "neuron", "value"]


def test_figures_7_and_10_keep_the_scale_of_the_unmodified_query():
    factors = {"unmodified": 1.0, "suppressed": 0.1, "enhanced": 3.0}
    maps = []
    for one in example_maps():
        row = dict(fact=one["fact"], prompt=one["prompt"])
        for name, factor in factors.items():
            scaled = dict(attribution=one["attribution"] * factor, probability=factor / 4)
            row[name] = one | scaled
        maps.append(row)
    fig, plotted = plots.figure_conditions(maps, list(factors), "attribution", 0.2)
    assert [len(drawn_dots(ax)) for ax in fig.axes[:12]] == [2] * 4 + [0] * 4 + [2] * 4
    assert texts(fig.axes[4].texts) == ["none so large"]
    assert fig.axes[4].get_title() == "P(answer) = 0.03" and "sure → o" in fig.axes[0].get_title()
    assert set(plotted["condition"]) == {"unmodified", "enhanced"}
    fig, _ = plots.figure_conditions(maps, list(factors), "activation", 0.2)
    assert {len(drawn_dots(ax)) for ax in fig.axes[:12]} == {8}


def test_a_figure_is_written_with_its_numbers_byte_for_byte_the_same(tmp_path, monkeypatch):
    data = cs2_frame().assign(text="a\rb")
    contents = []
    for folder, epoch in (("a", "100000"), ("b", "900000000")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        fig, _ = plots.figure_cs2([data], "ig", {})
        paths = plots.save_figure(fig, "fig3", tmp_path / folder, data)
        contents.append({kind: path.read_bytes() for kind, path in paths.items()})
    assert contents[0] == contents[1] and set(contents[0]) == {"png", "pdf", "csv"}
    assert contents[0]["png"][:4] == b"\x89PNG" and len(contents[0]["png"]) <= plots.MAX_PNG
    assert contents[0]["pdf"][:5] == b"%PDF-" and b"CreationDate" not in contents[0]["pdf"]
    assert b"/Type3" not in contents[0]["pdf"]  # fonttype 42
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"]), data)


def test_a_crowded_figure_is_made_to_fit_150_kilobytes(tmp_path):
    fig, axes = plt.subplots(2, 2, figsize=(7, 4))
    for seed, ax in enumerate(axes.flat):
        ax.imshow(np.random.default_rng(seed).normal(size=(32, 200)), aspect="auto")
    paths = plots.save_figure(fig, "fig1", tmp_path, pd.DataFrame())
    assert paths["png"].stat().st_size <= plots.MAX_PNG
    assert Image.open(io.BytesIO(paths["png"].read_bytes())).width >= 690
