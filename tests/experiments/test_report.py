"""The report: what is missing is named, what is claimed is computed, and the page needs nothing but
itself."""

import html
import json
import re
import shutil
from itertools import product
from types import SimpleNamespace
from unittest.mock import Mock

import nbformat
import numpy as np
import pandas as pd
import pytest
from tiny import query_row

from qlutils import paths, run
from qlutils.experiments import claims, controls, in_short, report
from qlutils.experiments.consistency import classified_facts, otsu_null
from qlutils.facts import load_facts
from qlutils.files import write_json
from qlutils.show import page
from qlutils.show.tables import write_table
from qlutils.study.notebook import Study
from qlutils.study.results import Missing

MODELS = ["demo/gpt2", "demo/llama2", "demo/llama3"]
SAMPLE = dict(relations=["P36", "P19"], facts_per_relation=12)


def executed(path, *cells):
    """An executed notebook of Markdown texts and of outputs of code."""
    book = nbformat.v4.new_notebook()
    for cell in cells:
        if isinstance(cell, str):
            book.cells.append(nbformat.v4.new_markdown_cell(cell))
        else:
            outputs = [nbformat.v4.new_output(**cell)]
            book.cells.append(nbformat.v4.new_code_cell("secret_code = 1", outputs=outputs))
    nbformat.write(book, path)
    return path


def outside(text):
    """What a page would fetch from elsewhere, or link to."""
    addresses = re.findall(r"""(?i)\b(?:src|srcset|href)=["']?(?!data:|#)[^"'>]+""", text)
    return addresses + re.findall(r"(?i)<script|@import|url\(", text)


def test_the_page_hides_code_and_describes_figures_without_a_network(tmp_path):
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAAB"
    book = executed(
        tmp_path / "a.ipynb",
        "# Title & more\n\n<i>CS<sub>2</sub></i>",
        "## Part one's?",
        dict(output_type="stream", name="stdout", text="1 fact\n"),
        dict(output_type="stream", name="stderr", text="units: 50%|#####     |"),
        "**Figure 4.** What is drawn.",
        dict(output_type="display_data", data={"image/png": f"{pixel}JRU5ErkJggg=="}),
    )
    text = page.export_html(book, tmp_path / "out" / "a.html").read_text("utf-8")
    assert "secret_code" not in text and "1 fact" in text and "50%" not in text
    assert "<title>Title &amp; more</title>" in text and "<i>CS<sub>2</sub></i>" in text
    assert re.search(r'<img[^>]*alt="Figure 4\."', text) and not outside(text)
    assert outside(text.replace("data:image/png;base64,", "//cdn.example/"))
    [(part, name)] = re.findall('<a href="#([^"]+)">([^<]+)</a>', text)
    assert name == "Part one's?" and text.index("</h1>") < text.index("<nav>")
    assert html.unescape(text).index(f'<h2 id="{part}"') > text.index("</nav>")


def test_the_report_has_no_formulas_that_only_a_network_would_show():
    cells = nbformat.read(paths.NOTEBOOKS / "report.ipynb", 4)["cells"]
    texts = [cell["source"] for cell in cells if cell["cell_type"] == "markdown"]
    assert len(texts) > 20 and not [text for text in texts if "$" in text]


# --- what a run saved -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def queries():
    """Facts of even number agree in their neurons, the others do not."""
    rng, rows = np.random.default_rng(0), []
    saved = dict(prompt_tokens=5, answer_tokens=1, row_budget=1, gap=[0.0] * 2)
    for f, fact in enumerate(load_facts("demo", **SAMPLE)):
        for p, prompt in enumerate(fact.prompts):
            common = rng.random() < (0.99 if f % 2 == 0 else 0.02)
            first = 0 if common else 10 + 10 * p
            kns = [(f % 2, first + place) for place in range(3)]
            about = saved | dict(prompt=prompt, probability=0.3 + 0.1 * rng.random())
            rows.append(query_row(fact.id, p, kns, **about))
    return pd.DataFrame(rows)


def study_of(model, method="ig", notebook="report"):
    return Study(notebook, model=model, method=method, output="made", **SAMPLE)


def save_queries(queries):
    study = study_of("demo/gpt2", notebook=report.NOTEBOOKS["01"])
    study.parameters |= dict(steps=20, rule="right")
    study.save(queries, "queries")
    study.save(queries[["fact", "prompt"]].head(0).assign(left_out=""), "left_out")
    study.record()


def the_run(models=("demo/gpt2",), methods=("ig",), **changed):
    study = Study("report", output="made", **{**SAMPLE, **changed})
    return report.SavedResults(study, models, methods, ["ig"])


def test_only_results_of_these_facts_and_settings_are_read(runs, queries):
    save_queries(queries)
    assert len(the_run().frame("demo/gpt2", "ig", "queries")) == len(queries)
    for name, value in dict(facts_per_relation=5, dtype="bfloat16", seed=1).items():
        with pytest.raises(Missing, match=f"other .*{name.split('_')[0]}"):
            the_run(**{name: value}).frame("demo/gpt2", "ig", "queries")
    with pytest.raises(Missing, match="notebook 01 was not run"):
        the_run().frame("demo/gpt2", "sig", "queries")
    with pytest.raises(Missing, match="there is no model 'demo/none'"):
        the_run().entry("01", "demo/none", "ig")


def test_what_a_rerun_with_other_parameters_began_is_not_read_as_the_run_before(runs, queries):
    save_queries(queries)
    again = study_of("demo/gpt2", notebook=report.NOTEBOOKS["01"])
    stamp = again.root / "notebooks" / "01_localize--demo--gpt2--ig.json"
    write_json(stamp, {})
    again.parameters |= dict(steps=20, rule="converged")
    again.table(queries[["fact"]], "localisation")  # and was stopped there
    with pytest.raises(Missing, match="notebook 01 was not run"):
        the_run().file("01", "localisation.csv", "demo/gpt2", "ig")
    assert not stamp.exists()


def test_settings_that_differ_between_models_or_methods_are_told(runs):
    for method, rule in (("ig", "right"), ("sig", "converged"), ("amig", "right")):
        study = study_of("demo/gpt2", method, report.NOTEBOOKS["01"])
        study.parameters |= dict(steps=20, rule=rule)
        study.record()
    assert report.unlike_html(the_run(methods=("ig", "amig"))) == ""
    told = (
        "notebook 01 with rule converged (demo/gpt2 sig) and right (demo/gpt2 ig, demo/gpt2 amig)"
    )
    said = report.unlike_html(the_run(methods=("ig", "sig", "amig")))
    assert said == f"<p>Run with unlike settings: {told}.</p>"


def test_the_inventory_has_13_settings_a_model_and_says_what_is_missing(runs):
    study = study_of("demo/gpt2", None, "02_consistency")
    study.table(pd.DataFrame({"method": ["ig", "sig"], "R_II": [0.5, 0.5]}), "table1")
    study.record()
    found = report.inventory(the_run(MODELS, ["ig", "sig", "amig"]))
    assert found.groupby("model").size().tolist() == [13, 13, 13]
    present = found[found["status"] == "present"]
    assert present["method"].tolist() == ["ig", "sig"] and set(present["model"]) == {"demo/gpt2"}
    assert (paths.RUNS / "made" / "results" / present["file"].iloc[0]).is_file()
    third = found[(found["model"] == "demo/gpt2") & (found["setting"] == 3)]
    assert third["status"].item() == "missing: table1 has no amig"


def test_named_runs_leave_their_tables_and_figures_and_only_those(runs, tmp_path):
    results = paths.run_folder("made") / "results" / "demo--gpt2" / "ig"
    folder = paths.figures_folder("made")
    kept = ["fig4.png", "table2.csv", "table2.tex"]
    old = ["old/mine.csv", "demo--gpt2/gone.csv", "../outside.csv"]  # the first is not of a run
    files = [results / name for name in (*kept, "queries.parquet", "run.json")]
    for path in (*files, *(folder / name for name in old)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    listed = folder / "published.txt"
    listed.write_text("\n".join([*old[1:], "never/there.csv"]))
    book = executed(tmp_path / "r.ipynb", "# T")
    assert report.publish(book, "made") == [paths.run_folder("made") / "report.html"]
    made = [f"demo--gpt2/ig/{name}" for name in kept]
    left = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(left) == [*made, "old/mine.csv", "published.txt"]
    assert (folder.parent / "outside.csv").exists()
    assert listed.read_text().splitlines() == made
    shutil.rmtree(folder.parent)
    report.publish(book, "default")
    assert not folder.parent.exists() and folder.is_relative_to(tmp_path)


# --- claims, on results in which they hold, or their opposites ------------------------------------
def edits_frame(queries, lift):
    """Edits in which every measure of class I (even facts) and of CAS lies `lift` above the
    others'."""
    rng, rows = np.random.default_rng(0), []
    for f, (fact, group) in enumerate(queries.groupby("fact", sort=False)):
        about = dict(fact=fact, relation=group["relation"].iloc[0], prompt=group["prompt"].iloc[0])
        for op, neurons in product(("erase", "update"), ("local", "global", "cas")):
            one, cas = f % 2 == 0, neurons == "cas"
            good = 0.4 + lift * one + 2 * lift * cas + 0.01 * rng.random()
            row = about | dict(op=op, neurons=neurons, control="none", note=None, n_neurons=3)
            row |= dict.fromkeys(("rel", "gen", "loc", "avg"), good)
            row |= dict(reached=[good] * len(group), dppl=np.exp(1 - good) - 1)
            row |= dict(loc_new=good / 2 if op == "update" else np.nan)
            rows.append(row | dict(broken=float((one or cas) == (lift < 0))))
    return pd.DataFrame(rows)


def changes_frame(queries, sets, quantities=("probability",)):
    """Rows as notebooks 04 and 06 save them: the average rate of each set is sets[name](class is
    II)."""
    rng, rows = np.random.default_rng(0), []
    names = list(dict.fromkeys(queries["fact"]))
    for query in queries.to_dict("records"):
        second = names.index(query["fact"]) % 2 == 1
        about = {name: query[name] for name in ("fact", "relation", "prompt_index")}
        about |= dict(size=3, known=True, renormalise=False, value_before=1, probability_before=1.0)
        about |= dict.fromkeys(("class_static", "class_otsu"), "II" if second else "I")
        for (name, rate), quantity in product(sets.items(), quantities):
            up, down = (one + 0.01 * rng.random() for one in np.broadcast_to(rate(second), 2))
            for direction, value, after in (
                ("enhance", up, 1 + up),
                ("suppress", down, 1 - down),
                ("average", (up + down) / 2, np.nan),
            ):
                row = about | dict(set=name, direction=direction, quantity=quantity, rate=value)
                rows.append(row | dict(value=after, probability=after))
    return pd.DataFrame(rows)


def frames_where_all_holds(queries, sign=1.0):
    """Effects on the claimed side for sign 1, on the other for -1."""
    neurons = dict.fromkeys(("self", "self_as_union"), lambda second: 0.5)
    neurons["self_random"] = lambda second: 0.5 - 0.2 * sign
    for name in ("union_matched", "union", "intersection", "refine"):
        neurons[name] = lambda second: 0.5 - sign * (0.3 if second else 0.1)
    synapses = {
        "self": lambda second: 0.5 + sign * (0.1 if second else 0.0),
        "irrelevant": lambda second: 0.5 - 0.3 * sign,
    }
    attended = dict(predominance=0.5 + 0.2 * sign, predominance_rest=0.5 + 0.1 * sign)
    attended |= dict(first=0.4, same_first=0.6, n_queries=4)
    cas = edits_frame(queries, 0.1 * sign)
    if sign > 0:  # claim 13: the same for class I
        even = cas["fact"].isin(list(dict.fromkeys(queries["fact"]))[::2])
        cas.loc[even, "avg"] = 0.5
    return {
        "queries": queries,
        "edits": edits_frame(queries, 0.1 * sign),
        "cas_edits": cas,
        "query_kn_mapping": changes_frame(queries, neurons),
        "attention_predominance": queries.drop_duplicates("fact").assign(**attended),
        "knowledge_synapses": changes_frame(queries, synapses, ("value", "probability")),
    }


def test_texts_of_a_table_that_is_read_back_stay_texts(tmp_path):
    saved = report.SavedResults.__new__(report.SavedResults)
    saved.file = lambda number, name, model, method: tmp_path / name
    table = pd.DataFrame({"relation": ["007", "NA", "null"], "answer": ["True", "0123", "None"]})
    table["n"] = [1.0, np.nan, 3.0]
    write_table(table, "table5", tmp_path)
    pd.testing.assert_frame_equal(saved.read_table("02", "table5", "m"), table)


@pytest.fixture
def frames(queries):
    return frames_where_all_holds(queries)


def board_of(frames, *notebooks):
    """The scoreboard of these frames, or of the claims that some notebooks' results decide."""

    def get(model, method, name):
        return frames[name]

    options = [dict(static=0.2, notebook=notebook) for notebook in notebooks or [None]]
    return pd.concat(claims.scoreboard(get, ["a"], ["ig"], ["ig"], **one) for one in options)


def parts_of(board, number, **keys):
    part = board[board["claim"] == number]
    for name, value in keys.items():
        part = part[part[name] == value]
    return part


def overall_of(board, number):
    return claims.overall(parts_of(board, number)).iloc[0]


@pytest.fixture(scope="module")
def boards(queries):
    return [board_of(frames_where_all_holds(queries, sign)) for sign in (1.0, -1.0)]


@pytest.mark.parametrize("number", [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
def test_a_planted_effect_decides_each_claim(boards, number):
    holding, failing = (parts_of(board, number) for board in boards)
    untestable = {  # these are facts of two relations, half of them K_II
        1: ("threshold", "otsu", "of normal noise K_II"),
        2: ("part", "within relations", "2 relations have facts of both classes.* needs 10"),
    }
    if number in untestable:
        column, value, why = untestable[number]
        assert holding.loc[holding[column] == value, "why"].str.contains(why).all()
        holding = holding[holding[column] != value]
    assert len(holding) and set(holding["verdict"]) == {"holds"}
    if number > 3:  # a bound other than 0 has no opposite
        wanted = "does not hold" if number in (9, 13) else "the opposite holds"
        assert set(failing["verdict"]) == {wanted}
        n = 0 if number in (9, 13) else len(failing[failing["queries"] != "known"])
        assert overall_of(failing, number)["verdict"].startswith(f"{wanted} ({n} of ")
    assert (holding["value_low"] < holding["value"] + 1e-9).all()
    assert (holding["value_high"] > holding["value"] - 1e-9).all()
    assert holding["n_facts"].ge(10).all() and holding["n_facts_other"].dropna().ge(10).all()


@pytest.mark.parametrize("second, verdict", [(True, "holds"), (False, "does not hold")])
def test_otsus_share_decides_where_it_is_larger_than_that_of_noise(queries, second, verdict):
    """A few facts whose queries agree, many whose queries do not; or a share so small that it is
    not what is claimed, whatever noise gives."""
    facts = classified_facts(queries)
    few, many = (facts.loc[facts["cs2"] == cs2, "fact"] for cs2 in (second, not second))
    parts = [queries[queries["fact"].isin(few.head(3))]]
    for fact, copy in product(many, range(4)):
        one = queries[queries["fact"] == fact]
        parts.append(one.assign(fact=f"{fact} {copy}", relation=f"R{copy}"))
    board = board_of({"queries": pd.concat(parts, ignore_index=True)}, "02")
    [part] = parts_of(board, 1, threshold="otsu").to_dict("records")
    assert (part["value"] > 0.9) == second and (part["verdict"], part["why"]) == (verdict, "")


def test_sizes_of_changes_that_cancel_do_not(queries, frames):
    """Own synapses push the answer up in both directions, an irrelevant query's hardly move it."""
    sets = {"self": lambda second: (0.5, -0.5), "irrelevant": lambda second: (0.1, 0.1)}
    frames["knowledge_synapses"] = changes_frame(queries, sets, ("value", "probability"))
    board = board_of(frames, "06")
    found = parts_of(board, 10, queries="all").set_index("part")["verdict"].to_dict()
    signed = {"enhance": "holds", "suppress": "the opposite holds"}
    for name, (way, verdict) in product(("dValue", "dProb"), signed.items()):
        assert found.pop(f"{name}, {way}") == verdict
        assert found.pop(f"|{name}|, {way}") == "holds"
    assert not found
    assert overall_of(board, 10)["verdict"] == "mixed (6 of 8, 2 the opposite)"


def test_all_queries_decide_as_in_the_paper_and_the_known_ones_stand_beside(queries, frames):
    """The known queries, a third of them, say the opposite of all."""
    other = frames_where_all_holds(queries, -1.0)
    for name in ("query_kn_mapping", "knowledge_synapses"):
        known = frames[name]["prompt_index"] < 2
        own = frames[name].assign(known=known)
        frames[name] = own.where(~known, other[name].assign(known=True))
    board = board_of(frames, "03", "04", "06")
    for number in (6, 7, 8, 10, 11):
        part = parts_of(board, number)
        assert set(part.loc[part["queries"] == "all", "verdict"]) == {"holds"}
        assert set(part.loc[part["queries"] == "known", "verdict"]) == {"the opposite holds"}
        row = overall_of(board, number)
        assert row["verdict"].startswith("holds (") and "all queries" in row["text"]
        assert row["known"].startswith("the opposite holds (")
    assert overall_of(board, 4)["known"] == ""


def test_a_class_of_one_fact_decides_nothing_and_its_n_is_shown(queries, frames):
    """As seen on a pretrained model: 4 facts known in class I, 1 in class II, and "holds in
    part"."""
    names = list(dict.fromkeys(queries["fact"]))
    few = [*names[:8:2], names[1]]  # of even number: class I
    for name in ("query_kn_mapping", "edits"):
        frames[name] = frames[name][frames[name]["fact"].isin(few)]
    board = board_of(frames, "03", "04")
    part = board[board["claim"].isin([4, 5, 8])]
    assert set(part["verdict"]) == {"not testable here"} and part["value"].notna().any()
    assert part[["value_low", "value_high"]].isna().all(axis=None)
    eight, why = parts_of(board, 8), "1 and 4 facts; an interval needs 10 on each side"
    assert set(eight["why"]) == {why} and set(eight["n_facts"]) == {1}
    assert overall_of(board, 8)["verdict"] == f"not testable here: {why}"


def test_a_perplexity_that_explodes_is_judged_by_its_median_and_by_broken_texts(queries, frames):
    """One broken model in class I lifts that class's mean above all; the median and the share do
    not follow it."""
    edits = frames["edits"]
    first = (edits["fact"] == queries["fact"].iloc[0]) & (edits["neurons"] == "global")
    edits.loc[first, ["dppl", "broken"]] = (4e10, 1.0)
    five = parts_of(board_of(frames, "03"), 5)
    assert set(five["verdict"]) == {"holds"} and five["value"].between(0, 1).all()
    names = product(("erasure", "update"), ("median dPPL", "share of broken texts"))
    assert set(five["part"]) == {", ".join(name) for name in names}
    five = parts_of(board_of({**frames, "edits": edits.assign(broken=0.0)}, "03"), 5)
    assert set(five.loc[five["part"].str.contains("broken"), "why"]) == {"no edit breaks a text"}


def test_what_is_so_by_construction_or_without_effect_is_not_tested(frames):
    facts = frames["attention_predominance"]
    frames["attention_predominance"] = facts.assign(first=1.0, same_first=1.0)
    for name in ("edits", "cas_edits"):
        frames[name].loc[frames[name]["op"] == "update", ["rel", "broken"]] = 0.0
    board = board_of(frames, "03", "05", "07")
    nine = parts_of(board, 9).set_index("part")
    assert nine["verdict"].tolist() == ["not testable here", "holds"]
    assert "always wins" in nine.loc["all tokens", "why"]
    edits = board[board["claim"] != 9]
    idle = edits["part"].str.startswith("update")
    assert set(edits[idle]["verdict"]) == {"not testable here"}
    assert set(edits[~idle]["verdict"]) == {"holds"}
    assert edits[idle]["why"].str.contains("Rel is 0").all()


@pytest.mark.parametrize("rel, tested", [(0.0, "Loc|dPPL|broken"), (np.nan, "Loc|Gen|Avg|dPPL")])
def test_where_own_queries_are_not_reached_what_else_edits_do_is_tested(frames, rel, tested):
    """No update gives its own query the new object, but texts break; or Rel is defined for few."""
    for name in ("edits", "cas_edits"):
        update = frames[name]["op"] == "update"
        few = update & frames[name]["fact"].isin(frames[name]["fact"].unique()[:3])
        frames[name].loc[update, "rel"] = rel
        frames[name].loc[few, "rel"] = 0.0
        if np.isnan(rel):
            frames[name].loc[update, "broken"] = 0.0
    board = board_of(frames, "03", "07")
    update = board[board["part"].str.startswith("update")]
    open_ = ~update["part"].str.contains(tested)
    assert open_.any() and set(update[open_]["verdict"]) == {"not testable here"}
    assert set(update[~open_]["verdict"]) == {"holds"}


def test_classes_of_noise_do_not_differ_within_relations_of_two_facts():
    """Less its relation's mean, one of two facts is the other's negative: facts resampled alone
    would find a difference in half of the cases."""
    found, case = [], claims.Case(None, "a", "ig")
    for rng in map(np.random.default_rng, range(40)):
        names = [(str(number), str(number // 2)) for number in range(72)]
        frame = pd.DataFrame(names, columns=["fact", "relation"])
        frame["label"] = np.where(rng.random(72) < 0.4, "II", "I")
        part = case.within_relations(frame.assign(value=rng.normal(size=72)), "static")
        found.append(not part["value_low"] <= 0 <= part["value_high"])
    assert np.mean(found) <= 0.2


def test_classes_that_differ_between_relations_only_do_not_differ_within(queries, monkeypatch):
    """Relation r has CS2 about r / 10, and the more of it the more facts of class I: within a
    relation, nothing differs."""
    rng, rows = np.random.default_rng(0), []
    for r, f in product(range(12), range(26)):
        row = dict(fact=f"{r} {f}", relation=f"P{r}", label="I" if f < 2 * r + 2 else "II")
        rows.append(row | dict(value=r / 10 + 0.05 * rng.normal()))
    frame = pd.DataFrame(rows)
    for shift, within in ((0.0, "cannot be told"), (0.1, "holds")):
        shifted = frame.assign(value=frame["value"] + shift * (frame["label"] == "I"))
        split = [controls.Split("static", 0.1, "CS2", shifted)]
        monkeypatch.setattr(claims, "split_frames", lambda *_, split=split, **__: split)
        two = parts_of(board_of({"queries": queries}, "02"), 2).set_index("part")
        assert two["verdict"].to_dict() == {"all facts": "holds", "within relations": within}
    centred = shifted["value"] - shifted.groupby("relation")["value"].transform("mean")
    mean = centred.groupby(shifted["label"]).mean()
    assert two.loc["within relations", "value"] == pytest.approx(mean["I"] - mean["II"])


@pytest.mark.parametrize(
    "models, verdict",
    [(["small", "large"], "holds"), (["large", "small"], "the opposite holds")],
)
def test_claim_3_compares_neighbouring_models_in_the_given_order(queries, models, verdict):
    apart = [[10 * p, 10 * p + 1, 10 * p + 2] for p in range(len(queries))]  # no two agree
    frames = {"small": queries, "large": queries.assign(neuron=apart)}
    board = claims.scoreboard(lambda model, *_: frames[model], models, ["ig"], [], static=0.5)
    assert parts_of(board, 3, model=models[1], part="lower CS")["verdict"].item() == verdict
    [first] = parts_of(board, 3, model=models[0]).to_dict("records")
    assert first["verdict"] == "not testable here" and "smaller" in first["why"]
    get = only_queries(queries)
    board = claims.scoreboard(get, ["tiny", "a<b"], ["ig"], [], static=0.5)
    [last] = parts_of(board, 3, model="a<b").to_dict("records")
    assert last["why"] == "tiny: notebook 03 was not run"


def only_queries(queries):
    """A reader of saved results that finds the queries of model "a<b" alone."""

    def get(model, method, name):
        if (model, name) != ("a<b", "queries"):
            raise Missing("notebook 03 was not run")
        return queries

    return get


def test_what_cannot_be_tested_says_why_in_the_report_and_in_a_notebook(queries):
    get = only_queries(queries)
    board = claims.scoreboard(get, ["a<b"], ["ig"], ["ig"], static=-0.1)  # no fact is K_II
    assert sorted(set(board["claim"])) == list(range(1, 14)) and len(claims.overall(board)) == 13
    assert set(board[board["claim"] > 3]["why"]) == {"notebook 03 was not run"}
    assert overall_of(board, 4)["verdict"] == "not testable here: notebook 03 was not run"
    two = parts_of(board, 2, threshold="static")
    assert two["value"].isna().all() and set(two["verdict"]) == {"not testable here"}
    assert two["why"].str.contains("empty by the static threshold").all()
    study = SimpleNamespace(model="a<b", method="ig", seed=0)
    study.load = lambda name, method: get("a<b", method, name)
    text = html.unescape(claims.judge(study, "02", static=0.5).data)
    assert claims.CLAIMS[1].text in text and claims.CLAIMS[4].text not in text
    assert "holds (1 of 1, 1 untestable)" in text and "<summary>Every part</summary>" in text
    study.load = Mock(side_effect=claims.Missing("run notebook 03 first"))
    assert "not testable here: run notebook 03 first" in claims.judge(study, "03").data


def test_the_matrix_has_a_row_a_claim_and_a_column_a_model_and_method(queries):
    get = only_queries(queries)
    board = claims.scoreboard(get, ["a<b", "c"], ["ig", "sig"], ["ig"], static=0.5)
    text = claims.show_matrix(board).data.split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.S)
    hovers = [re.findall(r'title="(.*?)"', row, re.S) for row in rows]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    cells = [[re.sub("(?s)<.*?>", "", cell) for cell in row] for row in cells]
    models, methods, *rows = cells
    assert models[1:] == ["a&lt;b", "c"] and methods[1:] == ["ig", "sig"] * 2
    assert [row[0].split(".")[0] for row in rows] == [str(number) for number in range(1, 14)]
    assert {row[3] for row in rows} == {"–"}  # nothing of model c
    assert [row[1] for row in rows[2:]] == ["–"] * 11 and rows[0][1] == "✓ 1/1"
    row = board[board["threshold"] == "static"].iloc[0]
    interval = f"{row['value']:.2f} [{row['value_low']:.2f}, {row['value_high']:.2f}]"
    assert f"static share of K_II {interval} (n = 24)" in hovers[2][0]
    assert hovers[5][0] == "not testable here: notebook 03 was not run"


@pytest.mark.parametrize(
    "verdicts, mark",
    [
        (["holds", "holds", "not testable here"], "holds"),
        (["holds", "cannot be told"], "holds in part"),
        (["holds", "cannot be told", "the opposite holds"], "mixed"),
        (["the opposite holds", "cannot be told"], "does not hold"),
        (["the opposite holds"], "the opposite holds"),
        (["not testable here"], "cannot be told"),
    ],
)
def test_a_mark_is_one_word_for_all_parts_of_a_claim(verdicts, mark):
    about = dict(claim=1, text="", method="ig", model="a", queries="", statistic="x", why="few")
    board = pd.DataFrame([about | dict(verdict=verdict) for verdict in verdicts])
    assert claims.overall(board)["mark"].item() == mark and mark in claims.MARKS
    missing = board.assign(statistic="", verdict="not testable here")
    assert claims.overall(missing)["mark"].item() == "not run"


# --- In short -------------------------------------------------------------------------------------
class Saved:
    """The saved results of models, given by hand: {model: {name: frame}}."""

    methods, downstream = ["ig", "sig", "amig"], ["ig"]  # sig was not run, amig by another rule
    methods_of, read_all = report.SavedResults.methods_of, report.SavedResults.read_all

    def __init__(self, frames):
        self.frames, self.models = frames, list(frames)

    def frame(self, model, method, name):
        if name not in self.frames[model]:
            raise Missing(f"notebook {report.FRAMES[name]} was not run")
        return self.frames[model][name]

    def entry(self, number, model, method=None):
        if method == "sig":
            raise Missing("notebook 01 was not run")
        for name, notebook in report.FRAMES.items():
            if notebook == number:
                self.frame(model, method, name)
        rule = "converged" if method == "amig" else "right"
        given = dict(data="demo", rule=rule, steps=20, known_prompts=3)
        return dict(facts=24, parameters=given)


def told(frames):
    """The sentences of In short of some models."""
    saved, options = Saved(frames), dict(t=0.2, static=0.2, seed=0)
    board = claims.scoreboard(saved.frame, saved.models, ["ig"], ["ig"], **options)
    return in_short.in_short(saved, board, **options)


def sentences(table, topic, model="a"):
    about = table["topic"].str.contains(topic, regex=False) & (table["model"] == model)
    return table.loc[about, "sentence"].tolist()


def values_in(text):
    """Every value of a sentence that has an interval; percents as shares."""
    found = re.findall(r"(-?\d+(?:\.\d+)?)( %)?(?= \[)", text)
    return [float(number) / (100 if percent else 1) for number, percent in found]


def near(values):
    return pytest.approx(list(values), abs=0.006)


@pytest.fixture(scope="module")
def spoken(queries):
    frames = frames_where_all_holds(queries)
    mapping = {"self": lambda two: 0.5, "union": lambda two: 0.2, "self_random": lambda two: 0.6}
    frames["query_kn_mapping"] = changes_frame(queries, mapping)
    own = frames["edits"].query("neurons == 'local'")
    frames["edits"] = pd.concat([frames["edits"], own.assign(control="random", rel=0.25)])
    few = queries[queries["fact"].isin(queries["fact"].unique()[:1])]
    return told({"a": frames, "b": {"queries": few}, "c": {}}), frames


def test_ten_topics_are_told_of_each_model_what_was_run_and_what_holds_among_them(spoken, queries):
    table, _ = spoken
    facts, neurons = sentences(table, "What was run")
    assert facts == (
        "24 facts (demo) of which the model answers 3 wordings or more; "
        f"{len(queries)} queries, of which it answers {queries['known'].sum()}; "
        "in 0 % of the facts the answer stands in the subject."
    )
    assert neurons == (
        "KNs: neurons with more than 0.2 of a query's largest score, by ig, with the paper's sum "
        "of 20 steps (amig by another rule); what follows is of ig. "
        "Notebooks 01, 02, 03, 04, 05, 06, 07."
    )
    topics = table.groupby("model")["topic"].nunique()
    assert topics.to_dict() == {"a": 10, "b": 10}  # c was not run
    text = in_short.show(table).data
    assert text.count("<li>") == 10 and text.count("<i>b</i>") == 10
    holds = sentences(table, "What holds")[0]
    assert re.match(r"Holds: .*not run, or with nothing to compare: 3\.$", holds), holds
    some = queries.assign(subject="of " + queries["object"].str.upper())
    some = told({"a": {"queries": some[some["fact"].isin(some["fact"].unique()[:6])]}})
    assert "in 100 % of the facts" in sentences(some, "What was run")[0]


def test_sentences_on_consistency_are_those_of_the_facts_and_the_first_control(spoken, queries):
    table, frames = spoken
    whole, relations, three = sentences(table, "share their neurons")
    facts = classified_facts(queries, 0.2, 0.2)
    assert values_in(whole) == near([facts["cs2"].mean(), facts["jaccard"].mean()])
    assert "of facts: cannot be told (n = " in relations  # fewer than ten relations
    means = controls.null_consistency(queries, t=0.2, seed=0).groupby("kind")["cs2"].mean()
    wanted = means[["own", "same pattern", "other relations", "random"]].dropna()
    assert values_in(three) == near(wanted)
    first, most, others = sentences(table, "How many facts are K_II")
    shares = [(facts[f"class_{name}"] == "II").mean() for name in ("static", "otsu")]
    assert values_in(first) == near(shares)
    second = facts[facts["cs2"] <= 0.2]
    share = second["relation"].value_counts().head(3).sum() / len(second)
    assert f"{100 * share:.0f} % of these {len(second)} are of " in most
    some = facts[facts["cs2"].notna()]["relation"].nunique()
    assert most.endswith(f", of {some} relations.")
    noise = otsu_null(facts, seed=0)
    assert f"{100 * noise['R_II_low']:.0f} % to {100 * noise['R_II_high']:.0f} % K_II" in first
    cut = [classified_facts(queries, t, 0.2)["class_static"] for t in (0.1, 0.5)]
    shares = [*((classes == "II").mean() for classes in cut), (facts["cs2_3"] <= 0.2).mean()]
    assert values_in(others) == near(shares) and "(n =" not in first + others  # all facts
    [text] = sentences(table, "classes more than a cut")
    rows = parts_of(board_of(frames, "02"), 2, part="all facts")
    assert values_in(text) == near(rows["value"])
    assert re.search(r"by the static threshold 0\.\d+ .* more \(n = 1\d and 1\d\), ", text)
    assert text.count("within relations cannot be told") == 2


def test_sentences_on_edits_and_cas_are_means_over_all_facts(spoken):
    table, frames = spoken
    edits, texts = frames["edits"], sentences(table, "an edit")
    part = edits.query("op == 'update' and neurons == 'local' and control == 'none'")
    [last] = [text for text in texts if text.startswith("Update of one")]
    wanted = [part["rel"].mean(), part["gen"].mean(), 1 - part["loc"].mean()]
    wanted += [part["broken"].mean(), part["dppl"].median(), part["loc_new"].mean()]
    assert values_in(last) == near(wanted)
    assert not any("new object" in text for text in texts if text.startswith("Erasure"))
    [random, _] = [text for text in texts if "random" in text]
    assert "this wording 25 % [" in random
    cas = frames["cas_edits"]
    means = cas[cas["op"] == "erase"].groupby("neurons")["gen"].mean()
    text = sentences(table, "CAS")[0]
    assert values_in(text)[:1] == near([means["cas"] - means["local"]])
    assert re.search(r"\(Gen\) .* more; against all", text)


def test_sentences_on_neurons_and_attention_tell_changes_of_the_answer(spoken):
    table, _ = spoken
    own, off, others = sentences(table, "Whose neurons")
    down, up = values_in(own)
    assert down < 0 < up
    [random] = values_in(off)  # the other sets were not scaled
    assert -0.7 < random < -0.5 and off.count("cannot be told (n = 0)") == 3
    assert re.search(r"all other wordings' KNs together \(\S+ against \S+\): 0\.3\d? \[", others)
    assert "without what they share: cannot be told (n = 0)" in others
    assert re.search(r"random ones: 0\.1\d? \[0\.\d+, 0\.\d+\] more", others)
    first, suppressed, enhanced, rest = sentences(table, "Does attention")
    assert values_in(first)[1:3] == [0.70, 0.60]
    assert "(at least 25 % by construction)" in first
    assert suppressed.startswith("Suppressed, a query's own synapses") and "by -" in suppressed
    assert enhanced.startswith("Enhanced")
    assert re.search(r"claimed: 0\.\d+ \[.*?\] more\.", suppressed)
    untold = "cannot be told (n = 0)"
    assert rest.endswith(f"claimed: suppressed {untold}, enhanced {untold}.")


def test_of_one_fact_and_without_notebooks_nothing_can_be_told_but_why(spoken):
    table, _ = spoken
    for topic in in_short.TOPICS:
        text = " ".join(sentences(table, topic, "b"))
        if not topic.startswith("What was"):
            assert topic.startswith("What holds") or "annot be told" in text
            assert not values_in(text), text
    assert "notebook 04 was not run" in sentences(table, "Whose neurons", "b")[0]
    missing = [f"Cannot be told: notebook 0{number} was not run." for number in (5, 6)]
    assert sentences(table, "Does attention", "b") == missing
    assert "nothing to compare: 4, 5, 6" in sentences(table, "What holds", "b")[0].lower()


@pytest.mark.parametrize(
    "number, row, times",
    [
        (4, dict(value=0.1, value_low=-0.1, value_high=0.3), 4),
        (1, dict(value=0.5, value_low=0.2, value_high=0.8), 1.44),
        (13, dict(value=0.05, value_low=-0.1, value_high=0.2), 9),
        (4, dict(value=0.0, value_low=-0.1, value_high=0.1), np.inf),
        (4, dict(n_facts_other=4), 2.5),
        (4, dict(n_facts_other=0), np.inf),
    ],
)
def test_how_many_times_the_facts_it_would_take(number, row, times):
    """The half-width of the interval must fall to the distance from the bound, as its root of n."""
    verdict = "cannot be told" if "value" in row else "not testable here"
    unknown = dict.fromkeys(("value", "value_low", "value_high"), np.nan)
    unknown |= dict(n_facts=40, n_facts_other=40, verdict=verdict)
    found = in_short.times_the_facts(claims.CLAIMS[number], unknown | row)
    assert found == pytest.approx(times)


def test_it_never_takes_as_few_facts_as_there_are():
    """144 facts, of which it would take 1.006 times as many: 145, in two digits 140."""
    row = dict(value=0.1, value_low=-0.0003, value_high=0.2, n_facts=144, n_facts_other=144)
    row |= dict(claim=4, text="", method="ig", model="a", queries="", statistic="x", why="")
    board = pd.DataFrame([row | dict(verdict="cannot be told")])
    one = in_short.Reading(None, "a", "ig", saved=None, board=board)
    one.facts = lambda: pd.DataFrame(dict(cs2=[0.5] * 144))
    assert one.more_facts() == ({4: 145}, [])


@pytest.mark.parametrize(
    "share, said",
    [(0.004, "0.4"), (0.996, "99.6"), (-0.996, "-99.6"), (1.0, "100"), (0.0, "0"), (-1e-9, "0")],
)
def test_a_share_next_to_none_or_all_is_not_said_to_be_that(share, said):
    assert in_short.hundred(share) == said and in_short.hundred(0.456) == "46"


# --- the whole report -----------------------------------------------------------------------------
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
    wanted = dict(fact=[one, one], prompt_index=[0, 3], edited=[2, 2], value=[1.0, 0.5])
    assert found["Gen of a local erasure"].to_dict("list") == wanted
    assert found["Gen of a local update"].empty


def test_the_report_of_a_run_that_has_hardly_begun_names_what_is_missing(runs, queries):
    """Only notebook 01 of one model was run; the driver executes the report."""
    save_queries(queries)
    options = """--models demo/gpt2 demo/llama2 --relations P36 P19 --facts-per-relation 12
        --methods ig --output made --only report -p control_models False"""
    folder = runs / "made"
    assert run.main(options.split()) == 0, (folder / "run.json").read_text()
    text = (folder / "report.html").read_text("utf-8")
    assert not outside(text) and "Traceback" not in text and "<img" in text
    assert "demo/gpt2 ig: notebook 03 was not run" in text and "SavedResults" not in text
    assert "demo/llama2 ig: notebook 01 was not run" in text
    assert text.index(">In short<") < text.index(">The paper's claims<") < text.index("Figure 2.")
    assert "Cannot be told: notebook 04 was not run" in text
    board = pd.read_csv(folder / "results" / "claims.csv")
    assert sorted(set(board["claim"])) == list(range(1, 14))
    [row] = parts_of(board, 1, model="demo/gpt2", threshold="static").to_dict("records")
    # by hand: the share of facts in which at most a tenth of the neurons occurs in two queries
    agree = 0
    for _, group in queries.groupby("fact"):
        sets = [set(zip(a, b)) for a, b in zip(group["layer"], group["neuron"])]
        union = set().union(*sets)
        agree += sum(sum(n in s for s in sets) > 1 for n in union) / len(union) <= 0.1
    facts = queries["fact"].nunique()
    assert row["value"] == pytest.approx(agree / facts) and row["n_facts"] == facts
    assert len(pd.read_csv(folder / "results" / "inventory.csv")) == 26
    copies = folder.parent.parent / "figures" / "made"
    assert (copies / "claims.csv").read_bytes() == (folder / "results" / "claims.csv").read_bytes()
    assert (copies / "fig3_all.png").is_file() and not list(copies.rglob("*.parquet"))
    stamp = json.loads((folder / "notebooks" / "report.json").read_text())
    assert "report.html" in stamp["outputs"]
