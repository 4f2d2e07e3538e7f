"""The report: what is missing is named, what is claimed is computed, and the page needs nothing but
itself."""

import html
import json
import re
import shutil
from itertools import product

import nbformat
import numpy as np
import pandas as pd
import pytest

from qlutils import paths, run
from qlutils.experiments import claims, controls, in_short, report
from qlutils.experiments.consistency import classified_facts, otsu_null
from qlutils.facts import load_facts
from qlutils.show import page
from qlutils.show.page import shown
from qlutils.study.notebook import Study
from qlutils.study.parameters import declared_parameters
from qlutils.study.results import Missing

MODELS = ["demo/gpt2", "demo/llama2", "demo/llama3"]
SAMPLE = dict(relations=["P36", "P19"], facts_per_relation=12)


# --- one file -------------------------------------------------------------------------------------


def write_notebook(path, *cells):
    """cells: Markdown texts, or (source, outputs) of executed code."""
    book = nbformat.v4.new_notebook()
    for number, cell in enumerate(cells, 1):
        if isinstance(cell, str):
            book.cells.append(nbformat.v4.new_markdown_cell(cell))
        else:
            book.cells.append(
                nbformat.v4.new_code_cell(
                    cell[0],
                    execution_count=number,
                    outputs=[nbformat.v4.new_output(**output) for output in cell[1]],
                )
            )
    nbformat.write(book, path)
    return path


TEXT = (
    "secret_code = 1",
    [
        dict(output_type="stream", name="stdout", text="1 fact\n"),
        dict(output_type="stream", name="stderr", text="units: 50%|#####     |"),
    ],
)


def test_the_page_hides_code_and_sets_formulas_without_a_network(tmp_path):
    book = write_notebook(
        tmp_path / "a.ipynb",
        "# Title\n\n$CS_2$ and $$\\frac{|\\bigcap_i \\mathcal N_i|}{2}$$ not `$x$`",
        "## Part one\n\n| a |\n|--|\n| $a|b$ |",
        TEXT,
    )
    text = page.export_html(book, tmp_path / "out" / "a.html").read_text("utf-8")
    assert "secret_code" not in text and "1 fact" in text and "50%" not in text
    assert "<title>Title</title>" in text and re.search(
        r'<a href="#part-1">Part one</a>.*<h2 id="part-1">', text, re.S
    )
    assert (
        "<i>CS<sub>2</sub></i>" in text
        and "<code>$x$</code>" in text
        and "<td><i>a|b</i></td>" in html.unescape(text)
    )
    assert r"<code>\frac{|\bigcap_i \mathcal N_i|}{2}</code>" in html.unescape(text)
    assert page.external_addresses(text) == []


@pytest.mark.parametrize(
    "snippet",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<script>fetch('x')</script>",
        '<img src="//cdn.example/x.png">',
        '<img src="fig1.png">',
        '<link rel="stylesheet" href="style.css">',
        "<a href='http://example.org'>x</a>",
        '<style>@import "https://example.org/a.css";</style>',
        "<style>p { background: url(http://example.org/a.png) }</style>",
        '<p style="background: url(https://example.org/a.png)">',
        "<img srcset=https://example.org/a.png>",
    ],
)
def test_every_kind_of_outside_address_is_found(snippet):
    assert page.external_addresses(f"<html><body>{snippet}</body></html>")


def test_data_in_the_file_anchors_and_plain_text_are_inside():
    inside = '<a href="#part-1">x</a><img src="data:image/png;base64,AA==">'
    inside += "<p>see https://example.org, url(x)</p>"
    assert page.external_addresses(inside) == []


def test_a_page_that_would_refer_elsewhere_is_refused_by_name(tmp_path):
    book = write_notebook(tmp_path / "a.ipynb", "# T\n\n[link](https://example.org/paper)", TEXT)
    with pytest.raises(ValueError, match="a.ipynb.*https://example.org/paper"):
        page.export_html(book, tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_a_notebook_that_was_not_executed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not been executed"):
        page.export_html(
            paths.NOTEBOOKS / "report.ipynb"
            if not _executed()
            else write_notebook(tmp_path / "a.ipynb", "# T"),
            tmp_path / "a.html",
        )


def _executed():
    cells = json.loads((paths.NOTEBOOKS / "report.ipynb").read_text("utf-8"))["cells"]
    return any(cell.get("execution_count") for cell in cells)


def test_a_figure_is_described_by_the_words_before_it(tmp_path):
    pixel = (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAAB"
        "JRU5ErkJggg=="
    )
    picture = ("1", [dict(output_type="display_data", data={"image/png": pixel})])
    book = write_notebook(tmp_path / "a.ipynb", "# T", "**Figure 4.** What is drawn.", picture)
    text = page.export_html(book, tmp_path / "a.html").read_text("utf-8")
    assert re.search(r'<img[^>]*alt="Figure 4\."', text)


@pytest.mark.parametrize(
    "tex, shown",
    [
        (r"$K_\mathrm{II}$", "<i>K<sub>II</sub></i>"),
        (r"$\mathcal{N}_i$", "<i>N<sub>i</sub></i>"),
        (r"$\beta_1\mu < x^{10}$", "<i>&beta;<sub>1</sub>&mu; &lt; x<sup>10</sup></i>"),
        (r"$\begin{pmatrix}1\end{pmatrix}$", r"<code>\begin{pmatrix}1\end{pmatrix}</code>"),
        (r"$\frac12$", r"<code>\frac12</code>"),
        ("`$x_1$`", "`$x_1$`"),
        (r"\$5 and \$6", r"\$5 and \$6"),
    ],
)
def test_simple_formulas_become_html_and_others_stay_readable(tex, shown):
    assert page.formulas(tex) == shown


def test_the_reports_formulas_are_simple_enough_for_its_page():
    cells = json.loads((paths.NOTEBOOKS / "report.ipynb").read_text("utf-8"))["cells"]
    texts = [
        page.formulas("".join(cell["source"])) for cell in cells if cell["cell_type"] == "markdown"
    ]
    assert sum(text.count("<i>") for text in texts) > 10 and not [
        text for text in texts if "<code>" in text
    ]


# --- a run made by hand ---------------------------------------------------------------------------


def made_queries(facts, seed=0):
    """Facts of even number agree in their neurons, the others do not."""
    rng, rows = np.random.default_rng(seed), []
    for f, fact in enumerate(facts):
        for p, prompt in enumerate(fact.prompts):
            common = rng.random() < (0.99 if f % 2 == 0 else 0.02)
            neurons = list(range(3)) if common else [10 + 10 * p + j for j in range(3)]
            rows.append(
                dict(
                    fact=fact.id,
                    relation=fact.relation,
                    subject=fact.subject,
                    object=fact.object,
                    prompt_index=p,
                    prompt=prompt,
                    prompt_tokens=5,
                    answer_tokens=1,
                    probability=0.3 + 0.1 * rng.random(),
                    known=True,
                    row_budget=1,
                    gap=[0.0] * 2,
                    layer=[f % 2] * 3,
                    neuron=neurons,
                    score=[1.0] * 3,
                )
            )
    return pd.DataFrame(rows)


def study_of(model, method="ig", output="made", notebook="report", **changed):
    return Study(notebook, model=model, method=method, output=output, **{**SAMPLE, **changed})


def save(model, number, frames, output="made", method="ig"):
    study = study_of(model, method, output, report.NOTEBOOKS[number])
    study.parameters |= dict(steps=20, rule="right")
    for name, frame in frames.items():
        study.save(frame, name)
    study.record()
    return study


def the_run(output="made", models=("demo/gpt2",), methods=("ig",), **changed):
    study = Study("report", output=output, **{**SAMPLE, **changed})
    return report.SavedResults(study, models, methods, ["ig"])


@pytest.fixture(scope="module")
def queries():
    return made_queries(load_facts("demo", **SAMPLE))


def test_only_results_of_these_facts_and_settings_are_read(runs, queries):
    save("demo/gpt2", "01", {"queries": queries})
    assert len(the_run().frame("demo/gpt2", "ig", "queries")) == len(queries)
    for changed, why in (
        (dict(facts_per_relation=5), "facts"),
        (dict(dtype="bfloat16"), "dtype"),
        (dict(seed=1), "seed"),
    ):
        with pytest.raises(Missing, match=f"other .*{why}"):
            the_run(**changed).frame("demo/gpt2", "ig", "queries")
    with pytest.raises(Missing, match="notebook 01 was not run"):
        the_run().frame("demo/gpt2", "sig", "queries")
    with pytest.raises(Missing, match="there is no model 'demo/none'"):
        the_run(models=["demo/none"]).entry("01", "demo/none", "ig")


def test_a_record_that_was_changed_is_not_read(runs, queries):
    save("demo/gpt2", "01", {"queries": queries})
    path = study_of("demo/gpt2").results / "run.json"
    entry = the_run().entry("01", "demo/gpt2", "ig")
    text = path.read_text()
    assert text.count(f'"facts": {entry["facts"]}') == 1
    path.write_text(text.replace(f'"facts": {entry["facts"]}', '"facts": 99999'))
    with (
        pytest.warns(UserWarning, match="run.json is damaged"),
        pytest.raises(Missing, match="01 was not run"),
    ):
        the_run().entry("01", "demo/gpt2", "ig")


def test_the_inventory_has_13_settings_a_model_and_says_what_is_missing(runs):
    study = study_of("demo/gpt2", None, notebook="02_consistency")
    study.table(pd.DataFrame({"method": ["ig", "sig"], "R_II": [0.5, 0.5]}), "table1")
    study.record()
    found = report.inventory(the_run(models=MODELS, methods=["ig", "sig", "amig"]))
    assert len(found) == 39 and found.groupby("model").size().tolist() == [13, 13, 13]
    present = found[found["status"] == "present"]
    assert present["method"].tolist() == ["ig", "sig"] and set(present["model"]) == {"demo/gpt2"}
    assert found.loc[
        (found["model"] == "demo/gpt2") & (found["setting"] == 3), "status"
    ].item() == ("missing: table1 has no amig")
    assert (paths.RUNS / "made" / "results" / present["file"].iloc[0]).is_file()


def test_named_runs_leave_their_tables_and_figures_and_only_those(runs, tmp_path):
    results = paths.run_folder("made") / "results" / "demo--gpt2" / "ig"
    results.mkdir(parents=True)
    for name in ("table2.csv", "table2.tex", "fig4.png", "queries.parquet", "run.json"):
        (results / name).write_text(name)
    book = write_notebook(tmp_path / "r.ipynb", "# T", TEXT)
    folder = paths.figures_folder("made")
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "mine.csv").write_text("mine")  # not of a run: left alone
    (folder / "demo--gpt2").mkdir()
    (folder / "demo--gpt2" / "gone.csv").write_text("x")
    outside = folder.parent / "outside.csv"
    outside.write_text("x")
    (folder / "published.txt").write_text("demo--gpt2/gone.csv\nnever/there.csv\n../outside.csv\n")
    assert report.publish(book, "made") == [paths.run_folder("made") / "report.html"]
    left = sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )
    made = [f"demo--gpt2/ig/{name}" for name in ("fig4.png", "table2.csv", "table2.tex")]
    assert left == [*made, "old/mine.csv", "published.txt"] and outside.exists()
    assert (folder / "published.txt").read_text().splitlines() == made
    shutil.rmtree(folder.parent)
    report.publish(book, "default")
    assert not folder.parent.exists() and folder.is_relative_to(tmp_path)


# --- claims ---------------------------------------------------------------------------------------


def edits_frame(queries, lift):
    """Edits in which every measure of class I (even facts) and of CAS lies `lift` above the
    others'."""
    rng, rows = np.random.default_rng(0), []
    for f, (fact, group) in enumerate(queries.groupby("fact", sort=False)):
        for op in ("erase", "update"):
            for neurons in ("local", "global", "cas"):
                one = f % 2 == 0
                good = 0.4 + lift * one + 2 * lift * (neurons == "cas") + 0.01 * rng.random()
                rows.append(
                    dict(
                        fact=fact,
                        relation=group["relation"].iloc[0],
                        prompt=group["prompt"].iloc[0],
                        op=op,
                        neurons=neurons,
                        control="none",
                        note=None,
                        n_neurons=3,
                        reached=[good] * len(group),
                        rel=good,
                        gen=good,
                        loc=good,
                        avg=good,
                        dppl=np.exp(1 - good) - 1,
                        broken=float(one or neurons == "cas")
                        if lift < 0
                        else float(not one and neurons != "cas"),
                    )
                )
    return pd.DataFrame(rows)


def changes_frame(queries, sets, quantities=("probability",)):
    """Rows as notebooks 04 and 06 save them: the average rate of each set is sets[name](class is
    II)."""
    rng, rows = np.random.default_rng(0), []
    names = list(dict.fromkeys(queries["fact"]))
    for row in queries.to_dict("records"):
        second = names.index(row["fact"]) % 2 == 1
        label = "II" if second else "I"
        for (name, rate), quantity in product(sets.items(), quantities):
            up, down = (one + 0.01 * rng.random() for one in np.broadcast_to(rate(second), 2))
            for direction, value in (
                ("enhance", up),
                ("suppress", down),
                ("average", (up + down) / 2),
            ):
                after = {"enhance": 1 + value, "suppress": 1 - value}.get(direction, np.nan)
                rows.append(
                    dict(
                        fact=row["fact"],
                        relation=row["relation"],
                        prompt_index=row["prompt_index"],
                        set=name,
                        size=3,
                        direction=direction,
                        known=True,
                        class_static=label,
                        class_otsu=label,
                        quantity=quantity,
                        renormalise=False,
                        rate=value,
                        value=after,
                        value_before=1.0,
                        probability=after,
                        probability_before=1.0,
                    )
                )
    return pd.DataFrame(rows)


def frames_where_all_holds(queries, sign=1.0):
    """Effects on the claimed side for sign 1, on the other for -1."""
    neurons = {
        "self": lambda two: 0.5,
        "self_random": lambda two: 0.5 - 0.2 * sign,
        "self_as_union": lambda two: 0.5,
        "union_matched": lambda two: 0.5 - sign * (0.3 if two else 0.1),
        **{
            name: (lambda two: 0.5 - sign * (0.3 if two else 0.1))
            for name in ("union", "intersection", "refine")
        },
    }
    synapses = {
        "self": lambda two: 0.5 + sign * (0.1 if two else 0.0),
        "irrelevant": lambda two: 0.5 - 0.3 * sign,
    }
    facts = queries.drop_duplicates("fact")[["fact", "relation"]]
    high = facts.assign(
        predominance=0.5 + 0.2 * sign,
        predominance_rest=0.5 + 0.1 * sign,
        first=0.4,
        same_first=0.6,
        n_queries=4,
    )
    cas = edits_frame(queries, 0.1 * sign)
    if sign > 0:  # claim 13: the same for class I
        even = cas["fact"].isin(list(dict.fromkeys(queries["fact"]))[::2])
        cas.loc[even, "avg"] = 0.5
    return {
        "queries": queries,
        "edits": edits_frame(queries, 0.1 * sign),
        "cas_edits": cas,
        "query_kn_mapping": changes_frame(queries, neurons),
        "attention_predominance": high,
        "knowledge_synapses": changes_frame(queries, synapses, ("value", "probability")),
    }


def board_of(frames, notebook=None):
    """The scoreboard of these frames, or of the claims that one notebook's results decide."""

    def get(model, method, name):
        return frames[name]

    return claims.scoreboard(get, ["a"], ["ig"], ["ig"], static=0.2, notebook=notebook)


@pytest.fixture(scope="module")
def boards(queries):
    return board_of(frames_where_all_holds(queries)), board_of(
        frames_where_all_holds(queries, -1.0)
    )


@pytest.mark.parametrize("number", [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
def test_a_planted_effect_decides_each_claim(boards, number):
    holding, failing = boards
    one = holding[holding["claim"] == number]
    if number == 2:  # these are facts of two relations
        within = one["part"] == "within relations"
        assert (
            one.loc[within, "why"]
            .str.contains("2 relations have facts of both classes.* needs 10", regex=True)
            .all()
        )
        one = one[~within]
    if number == 1:  # half of these facts are K_II, as many as Otsu's threshold makes of noise
        by_otsu = one["threshold"] == "otsu"
        assert "of normal noise K_II" in one.loc[by_otsu, "why"].item()
        one = one[~by_otsu]
    assert len(one) and set(one["verdict"]) == {"holds"}, one[
        ["part", "threshold", "value", "verdict", "why"]
    ]
    if number > 3:
        wanted = (
            "does not hold" if number in (9, 13) else "the opposite holds"
        )  # a bound other than 0 has no opposite
        assert set(failing[failing["claim"] == number]["verdict"]) == {wanted}
        [overall] = claims.overall(failing[failing["claim"] == number])["verdict"]
        assert re.fullmatch(rf"{wanted} \(\d+ of \d+\)", overall) and overall.startswith(
            f"{wanted} (0"
        ) == (number in (9, 13))
    assert (one["value_low"] < one["value"] + 1e-9).all() and (
        one["value_high"] > one["value"] - 1e-9
    ).all()
    assert one["n_facts"].ge(10).all() and one["n_facts_other"].dropna().ge(10).all()


def test_otsus_share_decides_where_it_is_larger_than_that_of_noise(queries):
    """A few facts whose queries agree, many whose queries do not."""
    facts = queries["fact"].unique()
    apart = [one for i, one in enumerate(facts) if classified_facts(queries)["cs2"].iloc[i] < 0.5]
    many = pd.concat(
        [queries[queries["fact"] == facts[0]]]
        + [
            queries[queries["fact"] == one].assign(fact=f"{one} {copy}", relation=f"R{copy}")
            for one in apart
            for copy in range(4)
        ],
        ignore_index=True,
    )
    board = board_of({"queries": many}, "02")
    part = board[(board["claim"] == 1) & (board["threshold"] == "otsu")].iloc[0]
    assert part["value"] > 0.9 and (part["verdict"], part["why"]) == ("holds", "")


def test_sizes_of_changes_that_cancel_do_not(queries):
    """Own synapses push the answer up in both directions, an irrelevant query's hardly move it."""
    frames = frames_where_all_holds(queries)
    sets = {"self": lambda second: (0.5, -0.5), "irrelevant": lambda second: (0.1, 0.1)}
    frames["knowledge_synapses"] = changes_frame(queries, sets, ("value", "probability"))
    board = board_of(frames, "06")
    verdicts = (
        board[(board["claim"] == 10) & (board["queries"] == "all")]
        .set_index("part")["verdict"]
        .to_dict()
    )
    assert verdicts == {
        f"{name}, {way}": "the opposite holds" if (name[0], way) == ("d", "suppress") else "holds"
        for name in ("dValue", "dProb", "|dValue|", "|dProb|")
        for way in ("enhance", "suppress")
    }
    assert (
        claims.overall(board[board["claim"] == 10])["verdict"].item()
        == "mixed (6 of 8, 2 the opposite)"
    )


def test_all_queries_decide_as_in_the_paper_and_the_known_ones_stand_beside(queries):
    """The known queries, a third of them, say the opposite of all."""
    frames = frames_where_all_holds(queries)
    other = frames_where_all_holds(queries, -1.0)
    numbers = dict(query_kn_mapping=[6, 7, 8], knowledge_synapses=[10, 11])
    for name in numbers:
        known = frames[name]["prompt_index"] < 2
        frames[name] = (
            frames[name].assign(known=known).where(~known, other[name].assign(known=True))
        )
    board = pd.concat([board_of(frames, name) for name in ("03", "04", "06")])
    for claim in sum(numbers.values(), []):
        part = board[board["claim"] == claim]
        assert set(part.loc[part["queries"] == "all", "verdict"]) == {"holds"}
        assert set(part.loc[part["queries"] == "known", "verdict"]) == {"the opposite holds"}
        [row] = claims.overall(part).to_dict("records")
        assert row["verdict"].startswith("holds (") and row["known"].startswith(
            "the opposite holds ("
        )
        assert "all queries" in part["text"].iloc[0]
    assert claims.overall(board[board["claim"] == 4])["known"].item() == ""


def test_unknown_queries_leave_nothing_to_say_of_the_known_ones(queries):
    frames = frames_where_all_holds(queries)
    frames["query_kn_mapping"] = frames["query_kn_mapping"].assign(known=False)
    board = board_of(frames, "04")
    board = board[board["claim"].isin([6, 7, 8])]
    assert set(board.loc[board["queries"] == "known", "verdict"]) == {"not testable here"}
    assert set(board.loc[board["queries"] == "all", "verdict"]) == {"holds"}


def test_a_class_of_one_fact_decides_nothing_and_its_n_is_shown(queries):
    """As seen on a pretrained model: 4 facts known in class I, 1 in class II, and "holds in
    part"."""
    frames, names = frames_where_all_holds(queries), list(dict.fromkeys(queries["fact"]))
    few = [*names[:8:2], names[1]]  # of even number: class I
    frames["query_kn_mapping"] = frames["query_kn_mapping"].loc[
        lambda frame: frame["fact"].isin(few)
    ]
    frames["edits"] = frames["edits"].loc[lambda frame: frame["fact"].isin(few)]
    board = pd.concat([board_of(frames, name) for name in ("03", "04")])
    for claim in (4, 5, 8):
        part = board[board["claim"] == claim]
        assert set(part["verdict"]) == {"not testable here"} and part["value"].notna().any()
        assert part["value_low"].isna().all() and part["value_high"].isna().all()
    eight = board[board["claim"] == 8]
    assert set(eight["why"]) == {"1 and 4 facts; an interval needs 10 on each side"}
    assert (eight["n_facts"].tolist()[0], eight["n_facts_other"].tolist()[0]) == (1, 4)
    assert (
        claims.overall(eight)["verdict"].item()
        == "not testable here: 1 and 4 facts; an interval needs 10 on each side"
    )


def test_a_perplexity_that_explodes_is_judged_by_its_median_and_by_broken_texts(queries):
    """One broken model in class I lifts that class's mean above all; the median and the share do
    not follow it."""
    frames = frames_where_all_holds(queries)
    edits = frames["edits"]
    first = (edits["fact"] == queries["fact"].iloc[0]) & (edits["neurons"] == "global")
    frames["edits"] = edits.assign(
        dppl=edits["dppl"].mask(first, 4e10), broken=edits["broken"].mask(first, 1.0)
    )
    five = board_of(frames, "03").loc[lambda board: board["claim"] == 5]
    assert set(five["verdict"]) == {"holds"} and five["value"].between(0, 1).all()
    assert set(five["part"]) == {
        f"{op}, {what}"
        for op in ("erasure", "update")
        for what in ("median dPPL", "share of broken texts")
    }
    none = frames["edits"].assign(broken=0.0)
    five = (
        board_of(frames | {"edits": none}, "03")
        .loc[lambda board: board["claim"] == 5]
        .set_index("part")
    )
    assert set(five.loc["update, share of broken texts", "why"]) == {"no edit breaks a text"}


def test_an_effect_that_cannot_be_told_from_0_is_told_so(queries):
    frames = frames_where_all_holds(queries)
    noise = np.random.default_rng(1).normal(size=len(frames["edits"]))
    frames["edits"] = frames["edits"].assign(gen=noise, avg=noise)
    board = board_of(frames, "03")
    part = board[(board["claim"] == 4) & (board["threshold"] == "static")]
    told = (part["value_low"] > 0) | (part["value_high"] < 0)
    assert ((part["verdict"] == "cannot be told") == ~told).all() and not told.all()
    assert re.search(
        r"cannot be told \(|\d undecided",
        claims.overall(board[board["claim"] == 4])["verdict"].item(),
    )


def test_a_share_whose_interval_holds_the_bound_cannot_be_told_and_one_below_does_not_hold(queries):
    frames = frames_where_all_holds(queries)
    for share, verdict in ((0.5, "cannot be told"), (0.3, "does not hold"), (0.7, "holds")):
        rng = np.random.default_rng(2)
        facts = frames["attention_predominance"]
        frames["attention_predominance"] = facts.assign(
            predominance=share + 0.05 * rng.normal(size=len(facts))
        )
        board = board_of(frames, "05")
        assert (
            board.loc[(board["claim"] == 9) & (board["part"] == "all tokens"), "verdict"].item()
            == verdict
        )


def test_what_is_so_by_construction_or_without_effect_is_not_tested(queries):
    frames = frames_where_all_holds(queries)
    frames["attention_predominance"] = frames["attention_predominance"].assign(
        first=1.0, same_first=1.0
    )
    for name in ("edits", "cas_edits"):
        frames[name].loc[frames[name]["op"] == "update", "rel"] = 0.0
    board = board_of(frames)
    nine = board[board["claim"] == 9].set_index("part")
    assert (
        nine.loc["all tokens", "verdict"] == "not testable here"
        and "always wins" in nine.loc["all tokens", "why"]
    )
    assert nine.loc["without the first token", "verdict"] == "holds"
    edits = board[board["claim"].isin([4, 5, 12, 13])]
    idle = edits["part"].str.startswith("update")
    assert set(edits[idle]["verdict"]) == {"not testable here"} and set(
        edits[~idle]["verdict"]
    ) == {"holds"}
    assert edits[idle]["why"].str.contains("Rel is 0").all()


def test_classes_of_noise_do_not_differ_within_relations_of_two_facts(queries, monkeypatch):
    """Less its relation's mean, one of two facts is the other's negative: facts resampled alone
    would find a difference in half of the cases."""
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        frame = pd.DataFrame(
            dict(
                fact=[str(i) for i in range(72)],
                relation=[f"P{i // 2}" for i in range(72)],
                label=np.where(rng.random(72) < 0.4, "II", "I"),
                value=rng.normal(size=72),
            )
        )
        monkeypatch.setattr(
            claims,
            "split_frames",
            lambda *_, frame=frame, **__: [controls.Split("static", 0.1, "CS2", frame)],
        )
        [one] = [
            part
            for part in claims.Case(lambda *_: queries, "a", "ig", None, 0.2, 0.1, 0).split_half()
            if part["part"] == "within relations"
        ]
        found.append(not one["value_low"] <= 0 <= one["value_high"])
    assert np.mean(found) <= 0.2


def test_classes_that_differ_between_relations_only_do_not_differ_within(queries, monkeypatch):
    """Relation r has CS2 about r / 10, and the more of it the more facts of class I: within a
    relation, nothing differs."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        [
            dict(
                fact=f"{r} {f}",
                relation=f"P{r}",
                label="I" if f < 2 * r + 2 else "II",
                value=r / 10 + 0.05 * rng.normal(),
            )
            for r in range(12)
            for f in range(26)
        ]
    )
    for shift, within in ((0.0, "cannot be told"), (0.1, "holds")):
        shifted = frame.assign(value=frame["value"] + shift * (frame["label"] == "I"))
        monkeypatch.setattr(
            claims,
            "split_frames",
            lambda *_, shifted=shifted, **__: [controls.Split("static", 0.1, "CS2", shifted)],
        )
        board = board_of(frames_where_all_holds(queries), "02")
        two = board[board["claim"] == 2].set_index("part")
        assert two["verdict"].to_dict() == {"all facts": "holds", "within relations": within}
    oracle = [
        shifted[(shifted["relation"] == f"P{r}")].assign(
            value=lambda one: one["value"] - one["value"].mean()
        )
        for r in range(12)
    ]
    oracle = pd.concat(oracle).groupby("label")["value"].mean()
    assert two.loc["within relations", "value"] == pytest.approx(oracle["I"] - oracle["II"])


def test_claim_3_compares_neighbouring_models_in_the_given_order(queries):
    less = queries.assign(
        neuron=[[10 * p, 10 * p + 1, 10 * p + 2] for p in range(len(queries))]
    )  # no two agree
    frames = {"small": queries, "large": less}
    get = lambda model, method, name: frames[model]  # noqa: E731
    board = claims.scoreboard(get, ["small", "large"], ["ig"], [], static=0.5)
    three = board[(board["claim"] == 3) & (board["model"] == "large")]
    assert three.loc[three["part"] == "lower CS", "verdict"].item() == "holds"
    back = claims.scoreboard(get, ["large", "small"], ["ig"], [], static=0.5)
    back = back[(back["claim"] == 3) & (back["model"] == "small")]
    assert back.loc[back["part"] == "lower CS", "verdict"].item() == "the opposite holds"
    first = board[(board["claim"] == 3) & (board["model"] == "small")]
    assert first["verdict"].item() == "not testable here" and "smaller" in first["why"].item()


def test_what_cannot_be_tested_says_why(queries):
    def get(model, method, name):
        if name != "queries":
            raise Missing("notebook 03 was not run")
        return queries

    board = claims.scoreboard(
        get, ["a"], ["ig"], ["ig"], static=0.0
    )  # no fact has CS2 <= 0: K_II is empty
    assert sorted(set(board["claim"])) == list(range(1, 14))
    assert set(board[board["claim"] > 3]["why"]) == {"notebook 03 was not run"}
    two = board[(board["claim"] == 2) & (board["threshold"] == "static")]
    if two["value"].isna().all():
        assert (
            two["verdict"].item() == "not testable here"
            and "empty by the static threshold" in two["why"].item()
        )
    total = claims.overall(board)
    assert len(total) == 13 and total.loc[total["claim"] == 4, "verdict"].item() == (
        "not testable here: notebook 03 was not run"
    )


def cells_of(text):
    """[texts of a row's cells], and the hover of each, of an HTML table."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    hovers = [re.findall(r'title="(.*?)"', row, re.S) for row in rows]
    return [[re.sub("(?s)<.*?>", "", cell) for cell in row] for row in cells], hovers


def test_the_matrix_has_a_row_a_claim_and_a_column_a_model_and_method(queries):
    def get(model, method, name):
        if (model, name) != ("a<b", "queries"):
            raise Missing("notebook 03 was not run")
        return queries

    board = claims.scoreboard(get, ["a<b", "c"], ["ig", "sig"], ["ig"], static=0.5)
    (models, methods, *rows), hovers = cells_of(claims.show_matrix(board).data.split("</table>")[0])
    assert models[1:] == ["a&lt;b", "c"] and methods[1:] == ["ig", "sig"] * 2
    assert [row[0].split(".")[0] for row in rows] == [str(number) for number in range(1, 14)]
    assert {row[3] for row in rows} == {"–"}  # nothing of model c
    assert [row[1] for row in rows[2:]] == ["–"] * 11 and rows[0][1] == "✓ 1/1"
    row = board[board["threshold"] == "static"].iloc[0]
    told = (
        f"static share of K_II {row['value']:.2f} [{row['value_low']:.2f}, {row['value_high']:.2f}]"
    )
    assert hovers[2][0].startswith("holds") and f"{told} (n = 24)" in hovers[2][0]
    assert hovers[5][0] == "not testable here: notebook 03 was not run"


@pytest.mark.parametrize(
    "verdicts, mark",
    [
        (["holds", "holds", "not testable here"], "holds"),
        (["holds", "cannot be told"], "holds in part"),
        (["holds", "cannot be told", "the opposite holds"], "mixed"),
        (["holds", "does not hold"], "mixed"),
        (["the opposite holds", "cannot be told"], "does not hold"),
        (["the opposite holds"], "the opposite holds"),
        (["cannot be told", "not testable here"], "cannot be told"),
        (["not testable here"], "cannot be told"),
    ],
)
def test_a_mark_is_one_word_for_all_parts_of_a_claim(verdicts, mark):
    about = dict(claim=1, text="", method="ig", model="a", queries="", statistic="x", why="few")
    board = pd.DataFrame([about | dict(verdict=verdict) for verdict in verdicts])
    assert claims.overall(board)["mark"].item() == mark and mark in claims.MARKS
    missing = board.assign(statistic="", verdict="not testable here")
    assert claims.overall(missing)["mark"].item() == "not run"


def test_a_notebook_shows_the_verdicts_that_its_own_results_decide(queries):
    class Study:
        model, method, seed = "a", "ig", 0

        def load(self, name, method):
            if name != "queries":
                raise ValueError("run notebook 03 first")
            return queries

    text = html.unescape(claims.judge(Study(), "02", static=0.5).data)
    assert claims.CLAIMS[1].text in text and claims.CLAIMS[4].text not in text
    assert "holds (1 of 1, 1 untestable)" in text and "<summary>Every part</summary>" in text
    assert "not testable here: run notebook 03 first" in claims.judge(Study(), "03").data


# --- in short -------------------------------------------------------------------------------------


class Saved:
    """The saved results of models, given by hand: {model: {name: frame}}."""

    methods, downstream = ["ig", "sig"], ["ig"]  # sig was not run

    def __init__(self, frames):
        self.frames, self.models = frames, list(frames)

    def frame(self, model, method, name):
        if name not in self.frames[model]:
            raise Missing(f"notebook {report.FRAMES[name]} was not run")
        return self.frames[model][name]

    def entry(self, number, model, method=None):
        if method == "sig":
            raise Missing("notebook 01 was not run")
        names = [name for name, notebook in report.FRAMES.items() if notebook == number]
        for name in names:
            self.frame(model, method, name)
        given = dict(data="demo", rule="right", steps=20, known_prompts=3)
        return dict(facts=24, parameters=given)

    methods_of = report.SavedResults.methods_of
    read_all = report.SavedResults.read_all


def told(frames, **options):
    """{(topic, model): [sentences]}"""
    saved, options = Saved(frames), dict(t=0.2, static=0.2, seed=0) | options
    board = claims.scoreboard(saved.frame, saved.models, ["ig"], ["ig"], **options)
    table = in_short.in_short(saved, board, **options)
    assert table.groupby("model")["topic"].nunique().eq(10).all()
    found = {}
    for topic, model, text in table.itertuples(index=False):
        found.setdefault((topic, model), []).append(text)
    return found


def first_numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?= \[)", text)]


def first_percents(text):
    return [float(number) / 100 for number in re.findall(r"-?\d+(?:\.\d+)?(?= % \[)", text)]


@pytest.fixture(scope="module")
def spoken(queries):
    frames = frames_where_all_holds(queries)
    mapping = {"self": lambda two: 0.5, "union": lambda two: 0.2, "self_random": lambda two: 0.6}
    frames["query_kn_mapping"] = changes_frame(queries, mapping)
    few = queries[queries["fact"].isin(queries["fact"].unique()[:1])]
    return told({"a": frames, "b": {"queries": few}, "c": {}}), frames


def sentences(spoken, topic, model="a"):
    [texts] = [texts for (name, of), texts in spoken[0].items() if topic in name and of == model]
    return texts


def test_there_are_ten_topics_and_each_is_told_of_each_model(spoken):
    assert len(in_short.TOPICS) == 10 and len(spoken[0]) == 20  # of two; c was not run
    rows = [(*keys, text) for keys, texts in spoken[0].items() for text in texts]
    table = pd.DataFrame(rows, columns=["topic", "model", "sentence"])
    text = in_short.show(table).data
    assert text.count("<li>") == 10 and text.count("<i>b</i>") == 10
    assert "<i>" not in in_short.show(table[table["model"] == "a"]).data


def test_what_was_run_and_what_holds_is_said(spoken, queries):
    facts, neurons = sentences(spoken, "What was run")
    assert facts.startswith("24 facts (demo) of which the model answers 3 wordings or more; ")
    assert f"{len(queries)} queries, of which it answers {queries['known'].sum()};" in facts
    assert facts.endswith("in 0 % of the facts the answer stands in the subject.")
    assert "largest score, by ig, with the paper's sum of 20 steps; " in neurons
    assert neurons.endswith("what follows is of ig. Notebooks 01, 02, 03, 04, 05, 06, 07.")
    holds = sentences(spoken, "What holds")[0]
    assert re.match(r"Holds: .*not run, or with nothing to compare: 3\.$", holds), holds


def test_answers_that_stand_in_the_subject_are_counted(queries):
    first = queries["fact"].unique()[:6]
    inside = queries["fact"].isin(first)
    subject = queries["subject"].where(~inside, "of " + queries["object"].str.upper())
    frames = {"queries": queries.assign(subject=subject)}
    assert "in 25 % of the facts" in sentences((told({"a": frames}),), "What was run")[0]


def test_groups_of_queries_are_those_of_the_first_control(spoken, queries):
    groups = controls.null_consistency(queries, t=0.2, seed=0)
    means = groups.groupby("kind")["cs2"].mean()
    whole, three = sentences(spoken, "share their neurons")
    facts = classified_facts(queries, 0.2, 0.2)
    wanted = [facts["cs2"].mean(), facts["jaccard"].mean()]
    assert first_numbers(whole) == pytest.approx(wanted, abs=0.005)
    wanted = means[["own", "same pattern", "other relations", "random"]].dropna().tolist()
    assert first_numbers(three) == pytest.approx(wanted, abs=0.005)


def test_the_share_of_the_second_class_is_that_of_the_facts(spoken, queries):
    facts = classified_facts(queries, 0.2, 0.2)
    shares = [(facts[f"class_{name}"] == "II").mean() for name in ("static", "otsu")]
    first, others = sentences(spoken, "How many facts are K_II")
    assert first_percents(first) == pytest.approx(shares, abs=0.005)
    noise = otsu_null(facts, seed=0)
    assert f"{100 * noise['R_II_low']:.0f} % to {100 * noise['R_II_high']:.0f} % K_II" in first
    shares = [
        (classified_facts(queries, t, 0.2)["class_static"] == "II").mean() for t in (0.1, 0.5)
    ]
    shares.append((facts["cs2_3"] <= 0.2).mean())
    assert first_percents(others) == pytest.approx(shares, abs=0.005)
    assert "(n =" not in first + others  # all facts


def test_the_classes_are_compared_on_the_other_half_as_the_claim_does(spoken):
    board = board_of(spoken[1], "02")
    rows = board[(board["claim"] == 2) & (board["part"] == "all facts")]
    [text] = sentences(spoken, "classes more than a cut")
    assert first_numbers(text) == pytest.approx(rows["value"].tolist(), abs=0.005)
    assert re.search(r"by the static threshold 0\.\d+ .* more \(n = 1\d and 1\d\), ", text)
    assert text.count("within relations cannot be told") == 2


def test_own_neurons_are_compared_with_others_as_more_and_less(spoken):
    own, others = sentences(spoken, "Whose neurons")
    signs = first_percents(own)
    assert len(signs) == 2 and signs[0] < 0 < signs[1]
    assert re.search(r"all other wordings' KNs together \(\S+ against \S+\): 0\.3\d? \[", others)
    assert "of the relation: cannot be told (n = 0)" in others
    assert re.search(r"random ones: 0\.1\d? \[0\.\d+, 0\.\d+\] more", others)


def test_what_an_edit_changes_and_what_cas_buys_are_means_over_all_facts(spoken):
    edits = spoken[1]["edits"]
    part = edits[(edits["op"] == "update") & (edits["neurons"] == "global")]
    last = [text for text in sentences(spoken, "an edit") if text.startswith("Update of all")]
    values = [part["rel"].mean(), part["gen"].mean(), 1 - part["loc"].mean()]
    values += [part["broken"].mean(), part["dppl"].median()]
    assert first_percents(last[0]) == pytest.approx(values, abs=0.006)
    cas = spoken[1]["cas_edits"]
    means = cas[cas["op"] == "erase"].groupby("neurons")["gen"].mean()
    text = sentences(spoken, "CAS")[0]
    assert first_numbers(text)[0] == pytest.approx(means["cas"] - means["local"], abs=0.005)
    assert re.search(r"\(Gen\) .* more; against all", text)


def test_a_control_of_edits_is_told_where_it_was_run(spoken):
    edits = spoken[1]["edits"]
    assert not any("random" in text for text in sentences(spoken, "an edit"))
    random = edits[edits["neurons"] == "local"].assign(control="random", rel=0.25)
    frames = spoken[1] | {"edits": pd.concat([edits, random], ignore_index=True)}
    texts = [text for text in sentences((told({"a": frames}),), "an edit") if "random" in text]
    assert len(texts) == 2 and all("this wording 25 % [" in text for text in texts)


def test_predominance_is_told_with_and_without_the_first_token(spoken):
    text = sentences(spoken, "Does attention")[0]
    assert first_percents(text)[1:3] == [0.70, 0.60]
    assert "(at least 25 % by construction)" in text


def test_synapses_are_told_as_changes_of_the_answer(spoken):
    _, suppressed, enhanced, rest = sentences(spoken, "Does attention")
    assert suppressed.startswith("Suppressed, a query's own synapses") and "by -" in suppressed
    assert enhanced.startswith("Enhanced")
    assert re.search(r"claimed: 0\.\d+ \[.*?\] more\.", suppressed)
    assert rest.endswith("both averaged: cannot be told (n = 0).")


def test_of_one_fact_and_without_notebooks_nothing_can_be_told_but_why(spoken):
    for topic in in_short.TOPICS:
        text = " ".join(sentences(spoken, topic, "b"))
        if topic.startswith("What was"):
            continue
        if not topic.startswith("What holds"):
            assert "annot be told" in text
        assert not first_numbers(text) and not first_percents(text), text
    assert "notebook 04 was not run" in sentences(spoken, "Whose neurons", "b")[0]
    missing = [f"Cannot be told: notebook 0{number} was not run." for number in (5, 6)]
    assert sentences(spoken, "Does attention", "b") == missing
    assert "Notebooks 01, 02." in sentences(spoken, "What was run", "b")[1]
    assert "nothing to compare: 4, 5, 6" in sentences(spoken, "What holds", "b")[0].lower()


@pytest.mark.parametrize(
    "row, number, times",
    [
        (dict(value=0.1, value_low=-0.1, value_high=0.3, verdict="cannot be told"), 4, 4),
        (dict(value=0.5, value_low=0.2, value_high=0.8, verdict="cannot be told"), 1, 1.44),
        (dict(value=0.05, value_low=-0.1, value_high=0.2, verdict="cannot be told"), 13, 9),
        (dict(value=0.0, value_low=-0.1, value_high=0.1, verdict="cannot be told"), 4, np.inf),
        (dict(n_facts=40, n_facts_other=4, verdict="not testable here"), 4, 2.5),
        (dict(n_facts=40, n_facts_other=0, verdict="not testable here"), 4, np.inf),
        (dict(n_facts=40, n_facts_other=np.nan, verdict="not testable here"), 4, np.inf),
    ],
)
def test_how_many_times_the_facts_it_would_take(row, number, times):
    """The half-width of the interval must fall to the distance from the bound, as its root of n."""
    row = (
        dict(value=np.nan, value_low=np.nan, value_high=np.nan, n_facts=40, n_facts_other=40) | row
    )
    assert in_short.times_the_facts(claims.CLAIMS[number], row) == pytest.approx(times)


def test_a_table_and_what_is_missing_beside_it_are_both_html():
    page = shown(pd.DataFrame({"a": [1.5]}), ["fig <1>"]).data
    assert "&lt;p&gt;" not in page and "<p>Not in this run: fig &lt;1&gt;.</p>" in page


# --- what controls need beside the queries --------------------------------------------------------


def test_an_edit_is_said_to_reach_the_known_neighbours_in_their_order(queries):
    """The edited query is left out, one that is not known has no Gen, and so has an edit that was
    not made."""
    few = queries[queries["fact"].isin(queries["fact"].unique()[:3])].groupby("fact").head(4)
    few = few.assign(known=few["prompt_index"] != 1)
    one, two, three = few["fact"].unique()
    edit = dict(neurons="local", control="none", note=None, op="erase")
    prompts = few.set_index(["fact", "prompt_index"])["prompt"]
    edits = [
        edit | dict(fact=one, prompt=prompts[one, 2], reached=[1.0, 0.7, 0.0, 0.5]),
        edit | dict(fact=two, prompt=prompts[two, 1], reached=[1.0] * 4),
        edit | dict(fact=three, prompt=prompts[three, 0], reached=[], note="nothing to edit"),
        edit | dict(fact=one, prompt=prompts[one, 2], reached=[9.0] * 4, neurons="global"),
    ]
    saved = Saved({"a": {"queries": few, "edits": pd.DataFrame(edits)}})
    found = report.query_outcomes(saved, "a", "ig")
    assert list(found) == ["Gen of a local erasure", "Gen of a local update"]
    assert found["Gen of a local erasure"].to_dict("list") == dict(
        fact=[one, one], prompt_index=[0, 3], edited=[2, 2], value=[1.0, 0.5]
    )
    assert found["Gen of a local update"].empty


# --- the notebook ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def executed(tmp_path_factory, queries):
    """The report of a run in which only notebook 01 of one model was run, executed as the driver
    executes it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("report")
        patch.setattr(paths, "RUNS", folder / "runs")
        patch.setenv("QLUTILS_RUNS", str(folder / "runs"))
        save(
            "demo/gpt2",
            "01",
            {
                "queries": queries,
                "left_out": queries[["fact", "prompt"]].head(0).assign(left_out=""),
            },
        )
        status = run.main(
            [
                "--models",
                "demo/gpt2",
                "demo/llama2",
                "--relations",
                *SAMPLE["relations"],
                "--facts-per-relation",
                "12",
                "--methods",
                "ig",
                "--output",
                "made",
                "--only",
                "report",
                "-p",
                "control_models",
                "False",
            ]
        )
        yield status, folder / "runs" / "made"


def test_the_report_of_a_run_that_has_hardly_begun_names_what_is_missing(executed):
    status, folder = executed
    assert status == 0, (folder / "run.json").read_text()
    text = (folder / "report.html").read_text("utf-8")
    assert page.external_addresses(text) == [] and "Traceback" not in text and "<img" in text
    assert (
        "demo/gpt2 ig: notebook 03 was not run" in text
        and "demo/llama2 ig: notebook 01 was not run" in text
    )
    assert text.index(">In short<") < text.index(">The paper's claims<") < text.index("Figure 2.")
    assert "Cannot be told: notebook 04 was not run" in text and "SavedResults" not in text


def test_the_scoreboard_file_has_every_claim_and_agrees_with_the_data(executed, queries):
    _, folder = executed
    board = pd.read_csv(folder / "results" / "claims.csv")
    assert sorted(set(board["claim"])) == list(range(1, 14)) and set(board["model"]) == {
        "demo/gpt2",
        "demo/llama2",
    }
    row = board[
        (board["claim"] == 1) & (board["model"] == "demo/gpt2") & (board["threshold"] == "static")
    ].iloc[0]
    # by hand: the share of facts in which at most a tenth of the neurons occurs in two queries
    agree = 0
    for _, group in queries.groupby("fact"):
        sets = [set(zip(a, b)) for a, b in zip(group["layer"], group["neuron"])]
        union = set().union(*sets)
        agree += sum(sum(n in s for s in sets) > 1 for n in union) / len(union) <= 0.1
    assert (
        row["value"] == pytest.approx(agree / queries["fact"].nunique())
        and row["n_facts"] == queries["fact"].nunique()
    )
    assert len(pd.read_csv(folder / "results" / "inventory.csv")) == 26


def test_the_driver_copies_the_named_run_and_does_it_once(executed):
    _, folder = executed
    copies = folder.parent.parent / "figures" / "made"
    assert (copies / "claims.csv").read_bytes() == (folder / "results" / "claims.csv").read_bytes()
    assert (copies / "fig3_all.png").is_file() and not list(copies.rglob("*.parquet"))
    stamp = json.loads((folder / "notebooks" / "report.json").read_text())
    assert "report.html" in stamp["outputs"]


def test_cells_are_short_and_parameters_are_bare_literals():
    cells = json.loads((paths.NOTEBOOKS / "report.ipynb").read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert max(source.count("\n") + 1 for source in sources) <= 25
    assert np.median([source.count("\n") + 1 for source in sources]) <= 8
    assert "models" in declared_parameters(paths.NOTEBOOKS / "report.ipynb")
