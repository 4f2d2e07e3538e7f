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
    rng = np.random.default_rng(0)
    rows = [
        dict(relation=r, model=m, fact=i, cs2=rng.random())
        for r, n in (("P17", 12), ("P101", 3))
        for m in ("demo/gpt2", "other")
        for i in range(n)
    ]
    return pd.DataFrame(rows + [dict(relation="P17", model="other", fact=99, cs2=np.nan)])


def test_violins_show_every_relation_and_model_with_n_and_the_threshold():
    fig, plotted = plots.figure_cs2([cs2_frame()], "ig", line=0.3)
    [ax] = fig.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["P17 (12)", "P101 (3)"] and len(
        plotted
    ) == 31
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["demo/gpt2", "other"]
    assert [line.get_ydata()[0] for line in ax.lines] == [0.3]
    bodies = [
        body
        for body in ax.collections
        if body.get_paths() and len(body.get_paths()[0].vertices) > 20
    ]
    assert len(bodies) == 4
    low, high = (
        bodies[0].get_paths()[0].vertices[:, 1].min(),
        bodies[0].get_paths()[0].vertices[:, 1].max(),
    )
    values = cs2_frame().query("relation == 'P17' and model == 'demo/gpt2'").cs2
    assert (low, high) == pytest.approx((values.min(), values.max()))  # cut = 0


def test_violins_of_equal_few_or_no_values_do_not_fail():
    frame = pd.DataFrame(
        dict(relation=["P1", "P1", "P2", "P3"], model="gpt2", cs2=[0.5, 0.5, 1.0, np.nan])
    )
    ax = plots.violins(
        frame,
        plt.figure().subplots(),
        x="relation",
        hue="model",
        value="cs2",
        colors={"gpt2": "red"},
    )
    assert [label.get_text() for label in ax.get_xticklabels()] == ["P1 (2)", "P2 (1)", "P3 (0)"]
    classes = pd.DataFrame(
        {"model": "gpt2", "predominance": [0.5, 0.6, 0.9], "class": ["I", "I", None]}
    )
    ax = plots.violins(
        classes,
        plt.figure().subplots(),
        x="model",
        hue="class",
        value="predominance",
        colors=plots.CLASS_COLORS,
    )
    assert [label.get_text() for label in ax.get_xticklabels()] == ["gpt2 (2 / 0)"]
    ax.figure.canvas.draw()


def test_a_violin_of_a_few_values_is_a_bar_at_each_as_wide_as_its_share():
    frame = pd.DataFrame(
        dict(model="gpt2", share=[1 / 7] * 6 + [2 / 7] * 12 + [4 / 7] * 3, **{"class": "I"})
    )
    ax = plots.violins(
        frame,
        plt.figure().subplots(),
        x="model",
        hue="class",
        value="share",
        colors=plots.CLASS_COLORS,
    )
    bars = [
        (bar.get_y() + bar.get_height() / 2, bar.get_width(), bar.get_x() + bar.get_width() / 2)
        for bar in ax.patches
    ]
    assert [y for y, *_ in bars] == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert [width / bars[1][1] for _, width, _ in bars] == pytest.approx([0.5, 1, 0.25])
    assert (
        len({round(middle, 9) for *_, middle in bars}) == 1 and ax.patches[0].get_height() < 1 / 7
    )
    plt.close(ax.figure)


def test_bars_have_their_values_intervals_and_n():
    frame = pd.DataFrame(
        {
            "set": ["Self", "Self", "Union", "Union"],
            "class": ["I", "II"] * 2,
            "mean": [0.5, -0.2, 1, np.nan],
            "mean_low": [0.4, -0.3, 1.05, np.nan],
            "mean_high": [0.6, -0.1, 1.2, np.nan],
            "n": [9, 8, 7, 0],
        }
    )
    ax = plots.bars_with_intervals(frame, plt.figure().subplots(), x="set", hue="class")
    assert [bar.get_height() for bar in ax.patches] == [0.5, -0.2, 1]
    assert [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in ax.patches][:2] == [
        plots.CLASS_COLORS["I"],
        plots.CLASS_COLORS["II"],
    ]
    spans = [tuple(line.get_segments()[0][:, 1]) for line in ax.collections]
    assert spans == [(0.4, 0.6), (-0.3, -0.1), (1.05, 1.2)]
    assert [text.get_text() for text in ax.texts] == ["n = 9", "n = 8", "n = 7", "–", "n = 0"]
    few = frame.assign(
        mean_low=[0.4, np.nan, np.nan, np.nan], mean_high=[0.6, np.nan, np.nan, np.nan]
    )
    ax = plots.bars_with_intervals(few, plt.figure().subplots(), x="set", hue="class")
    assert [bar.get_height() for bar in ax.patches] == [
        0.5
    ]  # a value without an interval is no bar
    assert [text.get_text() for text in ax.texts] == [
        "n = 9",
        "–",
        "n = 8",
        "–",
        "n = 7",
        "–",
        "n = 0",
    ]


def summarised(known):
    """A table as of `effects.summary`: one set and direction, both classes, and the known queries
    if there are `known`."""
    rows = [
        dict(panel="p", direction="average", set="self", queries=queries, n=n)
        | {"class": name}
        | {
            f"{statistic}{end}": value + place + shift
            for place, statistic in enumerate(("mean", "trimmed"))
            for end, shift in (("", 0), ("_low", -0.1), ("_high", 0.1))
        }
        for queries, value, counts in (
            ("all", 0.2, (90, 40)),
            ("known", 0.6, (30, 12) if known else (0, 0)),
        )
        for name, n in zip(("I", "II"), counts)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("known", [True, False])
def test_figures_4_and_6_show_all_queries_and_the_known_ones_beside_where_there_are_any(known):
    fig = plots.figure_bars(summarised(known), row="panel", column="direction")
    [ax], [legend] = fig.axes, fig.legends
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx(
        [1.2, 1.2, 1.6, 1.6] if known else [1.2, 1.2]
    )  # the trimmed means
    colors = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in ax.patches]
    assert len(set(colors)) == len(colors) and colors[:2] == list(plots.CLASS_COLORS.values())
    assert [text.get_text() for text in ax.texts] == [
        "n = 90 / 40 / 30 / 12" if known else "n = 90 / 40"
    ]
    names = [text.get_text() for text in legend.get_texts()]
    assert (
        names[:2] == ["$K_{I}$", "$K_{II}$"]
        and [("known" in name) for name in names[2:]] == [True] * 2 * known
    )
    assert (
        "10 % trimmed mean" in legend.get_title().get_text()
        and "fewer than 10 facts" in legend.get_title().get_text()
    )


@pytest.mark.parametrize("dppl", [0.07, 1e5])
def test_no_legend_or_number_of_a_figure_of_edits_lies_over_a_title(dppl):
    keys = [
        dict(threshold="otsu", op=op, neurons=name, n=340) | {"class": kind}
        for op in ("erasure", "update")
        for name in ("local", "global")
        for kind in ("I", "II")
    ]
    table = pd.DataFrame(keys)
    for name in ("rel", "gen", "loc", "avg", "dppl"):
        value = dppl if name == "dppl" else 0.98
        table = table.assign(
            **{name: value, f"{name}_low": 0.9 * value, f"{name}_high": 1.02 * value}
        )
    fig, _ = plots.figure_edits(table, "otsu", ["local", "global"])
    fig.canvas.draw()
    [legend] = fig.legends
    assert "bootstrap" in legend.get_title().get_text()
    shown = [[text.get_text() for text in ax.texts] for ax in fig.axes]
    assert [sum("n = 340" in text for text in texts) for texts in shown] == [1] * 6
    few = plots.figure_edits(table.assign(n_gen=12, n_avg=12), "otsu", ["local", "global"])[
        0
    ]  # fewer have Gen, and so Avg
    ticks = [label.get_text() for label in few.axes[0].get_xticklabels()]
    assert [tick.split("\n")[-1] for tick in ticks] == ["n = 340", "n = 12", "n = 340", "n = 12"]
    assert "median dPPL" in few.axes[2].get_title()
    for ax in fig.axes:
        title = ax.title.get_window_extent()
        assert ax.get_legend() is None and not legend.get_window_extent().overlaps(title)
        assert all(text.get_window_extent().y1 <= title.y0 for text in ax.texts)
    plt.close(fig)


def test_places_are_averaged_over_prompts_of_different_lengths(recwarn):
    found = pd.DataFrame({"by_head": [[4, 0], [0, 2]], "by_column": [[2, 2], [0, 1, 1]]})
    fig, frame = plots.figure_places(found, 2)
    plt.close(fig)
    assert frame["synapses"].tolist()[:2] == [2, 1]
    assert frame["share"].tolist()[2:] == [0.5, 0.75, 0.5] and frame["n"].tolist()[2:] == [2, 2, 1]
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


def test_pooling_keeps_single_neurons_and_covers_every_neuron_once():
    values = np.zeros((3, 1003))
    values[1, 517], values[2, 0], values[2, 1] = -2.0, 0.5, 0.3
    pooled = plots.pool_neurons(values)
    assert len(pooled) == 3 * 100
    hit = pooled[pooled.value != 0]
    assert [tuple(row) for row in hit[["layer", "value"]].to_numpy()] == [(1, -2.0), (2, 0.5)]
    assert hit["first"].iloc[0] <= 517 <= hit["last"].iloc[0]
    one = pooled[pooled.layer == 0]
    assert one["first"].iloc[0] == 0 and one["last"].iloc[-1] == 1002
    assert (one["first"].to_numpy()[1:] == one["last"].to_numpy()[:-1] + 1).all()
    small = np.arange(6.0).reshape(2, 3)
    assert plots.pool_neurons(small).value.tolist() == small.ravel().tolist()
    with pytest.raises(ValueError, match="shape"):
        plots.pool_neurons(np.zeros(3))


def test_heatmaps_are_centred_on_zero_when_signed_and_share_a_scale():
    signed, unsigned = plots.pool_neurons([[0.0, -1.0, 0.5]]), plots.pool_neurons([[0.0, 3.0, 0.5]])
    assert (plots.shared_norm(signed).vmin, plots.shared_norm(signed).vmax) == (-1, 1)
    assert (plots.shared_norm(unsigned).vmin, plots.shared_norm(unsigned).vmax) == (0, 3)
    norm = plots.shared_norm(signed, unsigned)
    assert (norm.vmin, norm.vmax) == (-3, 3)
    ax = plots.heatmap_neurons(signed, plt.figure().subplots(), norm)
    mesh = ax.collections[0]
    assert list(mesh.get_array().ravel()) == [0, -1, 0.5] and mesh.get_clim() == (-3, 3)
    assert plots.shared_norm(plots.pool_neurons(np.zeros((2, 2)))).vmax == 1


def example_maps():
    return [
        dict(
            fact=f"P|{fact}|o",
            prompt=f"{fact} {p}",
            attribution=np.full((2, 4), scale * (p + 1)),
            activation=np.full((2, 4), float(scale > 0.1) + p),
        )
        for fact, scale in (("sure", 0.4), ("unsure", 1e-4))
        for p in (0, 1)
    ]


def test_attributions_have_a_colour_scale_a_query_and_activations_one_for_all():
    fig, plotted = plots.figure_1(example_maps())
    attribution, activation = (
        [
            ax.collections[0].get_clim()[1]
            for ax in part.axes
            if ax.get_title() or ax.get_xlabel() == "neuron"
        ]
        for part in fig.subfigs
    )
    assert attribution == pytest.approx([0.4, 0.8, 1e-4, 2e-4]) and activation == [2.0] * 4
    assert "scale of its own" in fig.subfigs[0].get_suptitle() and set(plotted["kind"]) == {
        "attribution",
        "activation",
    }
    changed = {"unmodified": 1.0, "suppressed": 0.5, "enhanced": 3.0}
    maps = [
        one
        | {
            name: dict(attribution=one["attribution"] * factor, activation=one["activation"])
            for name, factor in changed.items()
        }
        for one in example_maps()
    ]
    for names in (
        list(changed)[:2],
        list(changed),
    ):  # Figure 7 has two conditions, on Figure 10's scale
        fig, _ = plots.figure_conditions(maps, names, "attribution")
        limits = [ax.collections[0].get_clim()[1] for ax in fig.axes[: 4 * len(names)]]
        assert limits == pytest.approx([1.2, 2.4, 3e-4, 6e-4] * len(names))
        fig, _ = plots.figure_conditions(maps, names, "activation")
        assert [ax.collections[0].get_clim()[1] for ax in fig.axes[: 4 * len(names)]] == [
            2.0
        ] * 4 * len(names)


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
        fig, _ = plots.figure_cs2([data], "ig")
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
        pooled = plots.pool_neurons(np.random.default_rng(seed).normal(size=(32, 4096)), bins=200)
        plots.heatmap_neurons(pooled, ax, plots.shared_norm(pooled))
    paths = plots.save_figure(fig, "fig1", tmp_path, pd.DataFrame())
    assert paths["png"].stat().st_size <= plots.MAX_PNG
    from PIL import Image

    assert Image.open(io.BytesIO(paths["png"].read_bytes())).width >= 690
