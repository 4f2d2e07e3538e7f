"""Facts that a model knows: which are kept, what stands beside results, what is refused."""

import json
import time
from dataclasses import asdict, replace
from functools import lru_cache
from threading import Thread

import pandas as pd
import pytest
import torch

from qlutils import Fact, load_facts, load_model, paths, run
from qlutils.driver.arguments import parser
from qlutils.driver.jobs import plan_jobs
from qlutils.experiments.localize import localise
from qlutils.experiments.report import SavedResults, work
from qlutils.study import known, store
from qlutils.study.notebook import Study
from qlutils.study.results import read_record

pytestmark = pytest.mark.usefixtures("one_thread")
RELATIONS = ["P36", "P103"]


@lru_cache(maxsize=2)
def bundled(name):
    return load_model(name, device="cpu")


@torch.no_grad()
def answered(lm, prompt, answer):
    """Whether plain greedy decoding, a whole forward pass a token, gives the answer."""
    ids = lm.tokenizer(prompt).input_ids
    wanted = lm.tokenizer(f"{prompt} {answer}").input_ids[len(ids) :]
    for _ in wanted:
        ids = [*ids, int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-len(wanted) :] == wanted


@lru_cache(maxsize=8)
def number_answered(model, fact):
    return sum(answered(bundled(model), prompt, fact.object) for prompt in fact.prompts)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of bundled facts, of which two in three have an object that is not theirs."""
    lines = []
    for relation in RELATIONS:
        facts = load_facts("demo", relations=[relation])[:12]
        for place, fact in enumerate(facts):
            others = [f.object for f in facts[place::-1] + facts[::-1] if f.object != fact.object]
            wrong = {"object": others[0]} if place % 3 else {}
            lines.append(json.dumps(asdict(replace(fact, prompts=fact.prompts[:3], **wrong))))
    file = tmp_path_factory.mktemp("facts") / "mixed.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


@pytest.fixture
def study(data, runs, monkeypatch):
    """Makes studies of these facts, looked through four at a time."""
    monkeypatch.setattr(known, "SCAN_UNIT", 4)
    usual = dict(model="demo/gpt2", method="ig", data=data, device="cpu")
    usual |= dict(facts_per_relation=2, known_prompts=2)
    return lambda **changes: Study("01_localize", **{**usual, **changes})


@pytest.fixture
def nobody_asks(monkeypatch):
    """Calling it ends the test where a model is asked from then on."""

    def asked(*_, **__):
        pytest.fail("the model was asked again")

    return lambda: monkeypatch.setattr(store, "run_units", asked)


def seeded(data, relation, seed=0):
    """A relation's facts in the order in which samples of growing size take them."""
    order = []
    for n in range(1, 13):
        sample = load_facts(data, relations=[relation], facts_per_relation=n, seed=seed)
        order += [fact for fact in sample if fact not in order]
    return order


@pytest.mark.parametrize("seed, wanted, prompts", [(0, 2, 2), (3, 2, 1), (0, None, 2), (0, 12, 3)])
def test_the_first_facts_that_greedy_decoding_answers_are_kept_in_the_seeded_order(
    data, study, seed, wanted, prompts
):
    one = study(seed=seed, facts_per_relation=wanted, known_prompts=prompts)
    found, expected = one.facts(), []
    for relation, row in zip(RELATIONS, one.scan.set_index("relation").loc[RELATIONS].itertuples()):
        order = seeded(data, relation, seed)
        right = [number_answered("demo/gpt2", fact) >= prompts for fact in order]
        keep = [fact for fact, good in zip(order, right) if good][:wanted]
        expected += keep
        enough = len(keep) == wanted
        last = order.index(keep[-1]) if enough else 11
        assert row.scanned == (min(12, 4 * (last // 4 + 1)) if enough else 12) and row.facts == 12
        assert row.kept == len(keep) and row.known == sum(right[: row.scanned])
        assert row.queries == 3 * row.scanned
        asked = order[: row.scanned]
        assert row.answered == sum(number_answered("demo/gpt2", fact) for fact in asked)
    assert 0 < len(expected) < 24
    assert found == [fact for fact in load_facts(data) if fact in expected]


def test_a_relation_that_the_model_hardly_knows_is_not_scanned_to_its_end(study, monkeypatch):
    every = study(facts_per_relation=12, known_prompts=3)
    every.facts()
    monkeypatch.setattr(known, "SCAN_PER_FACT", 1)  # of 4 wanted, in a unit of 4: one unit
    few = study(facts_per_relation=4, known_prompts=3)
    facts = few.facts()
    assert few.scan["scanned"].tolist() == [4, 4] and every.scan["scanned"].tolist() == [12, 12]
    assert few.scan["kept"].sum() == len(facts) < every.scan["kept"].sum()


def test_all_notebooks_of_a_run_use_the_facts_that_were_found_once(study, nobody_asks, capsys):
    first = study()
    facts = first.facts()
    [done] = first.work.values()
    assert done["units"] == done["computed"] > 0
    known_of = f"{first.scan['known'].sum()} known of {first.scan['scanned'].sum()} scanned"
    assert f"demo/gpt2 {len(facts)} kept, {known_of}" in capsys.readouterr().out
    more = study(facts_per_relation=None, method="sig")
    assert len(more.facts()) > len(facts)
    [all_units] = more.work.values()
    assert all_units["units"] == 6 and all_units["computed"] == 6 - done["units"]
    study().facts()  # one file a model: it is that of the first again
    nobody_asks()
    for changes in (dict(method="sig"), dict(method=None, methods=["ig"])):
        assert study(**changes).facts() == facts


def test_notebooks_that_start_together_wait_for_the_one_that_looks(study, monkeypatch):
    whole, calls, found = known.scan, [], []

    def slow(*given):
        calls.append(given)
        time.sleep(3.5)  # longer than a lock is waited for elsewhere
        return whole(*given)

    monkeypatch.setattr(known, "scan", slow)
    studies = [study(method=method) for method in ("ig", "sig")]
    threads = [Thread(target=lambda one=one: found.append(one.facts())) for one in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(found) == 2 and found[0] == found[1]


def test_how_many_were_scanned_and_kept_stands_beside_every_result_for_each_model(study):
    counts, frame = {}, pd.DataFrame({"n": [1]})
    for model in ("demo/gpt2", "demo/llama2"):
        one = study(model=model)
        localise(one, steps=2)
        one.table(frame, "t", "A caption", "A note.")
        one.record()
        counts[model] = one.scan.drop(columns="relation").sum().to_dict()
        entry = read_record(one.results / "run.json")["01_localize"]
        assert entry["known_facts"] == {model: counts[model]}
        assert entry["facts"] == counts[model]["kept"]
        assert entry["parameters"]["known_prompts"] == 2
    both = study(model=None, method=None, models=list(counts))
    both.table(frame, "t", "A caption")
    notes = {"one": (one.results / "t.md").read_text(), "both": (both.results / "t.md").read_text()}
    for model, n in counts.items():
        said = f"{model} {n['kept']} kept, {n['known']} known of {n['scanned']} scanned"
        assert said in notes["both"] and (said in notes["one"]) == (model == "demo/llama2")
    assert "A note. Facts with at least 2 prompts answered" in notes["one"]
    table = work(SavedResults(both, list(counts), ["ig"], []))
    assert table["scanned"].tolist() == [n["scanned"] for n in counts.values()]
    assert table["facts"].tolist() == [n["kept"] for n in counts.values()]


def test_the_report_names_what_was_not_looked_for_and_does_not_look(study, nobody_asks):
    one, models = study(), ["demo/gpt2", "demo/llama2"]
    localise(one, steps=2)
    one.record()
    nobody_asks()
    both = study(model=None, method=None, models=models, known_prompts=1)
    found, missing = SavedResults(both, models, ["ig"], []).frames("queries")
    assert found == {} and len(missing) == 2
    assert all("not looked for with these parameters" in why for why in missing)
    assert both.facts_note() == "" and both.known_counts() == {}


def test_a_run_of_all_facts_says_nothing_of_known_ones(study):
    one = study(known_prompts=0)
    assert one.facts_note() == "" and len(one.facts()) == 4
    one.record()
    assert "known_facts" not in read_record(one.results / "run.json")["01_localize"]


def test_a_query_that_cannot_be_read_is_not_answered():
    facts = [Fact("r", "s", "Paris", ("it is in", "x")), Fact("r", "t", "Paris", ("x", "y"))]
    frame = known.count_known(bundled("demo/gpt2"), [asdict(fact) for fact in facts])
    assert frame["queries"].tolist() == [2, 2] and frame["answered"].iloc[1] == 0


@pytest.mark.parametrize(
    "given, said",
    [
        (-1, "want an integer"),
        (True, "want an integer"),
        (1.5, "want an integer"),
        (4, r"want a number of prompts \(0: all facts; no fact has more than 3"),
    ],
)
def test_a_number_of_prompts_that_means_nothing_is_refused(study, given, said):
    with pytest.raises(ValueError, match=f"known_prompts {given}: {said}"):
        study(known_prompts=given).facts()


def test_a_model_that_knows_none_of_the_facts_is_named_with_what_was_asked(study, tmp_path):
    prompts = ["the capital of France is", "it lies in"]
    lines = [dict(subject=f"s{i}", object="zebra", prompts=prompts) for i in range(5)]
    (tmp_path / "none.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = "known_prompts=1 prompts of none of the 5 facts of .*none.jsonl; it answers 0 of 10"
    for _ in range(2):  # found out, and read back
        with pytest.raises(ValueError, match=said):
            study(data=str(tmp_path / "none.jsonl"), known_prompts=1).facts()


def test_the_driver_takes_known_prompts_and_its_plan_says_what_it_cannot_know(data, runs, capsys):
    options = ["--models", "demo/gpt2", "--methods", "ig", "--data", data]
    args = parser().parse_args([*options, "--known-prompts", "2"])
    jobs, every = plan_jobs(args, paths.NOTEBOOKS)
    assert all(job.parameters["known_prompts"] == 2 for job in jobs)
    said = capsys.readouterr().err
    assert "24 facts of 2 relations" in said and "of which it answers 2 prompts or more" in said
    args.facts_per_relation = 1
    assert plan_jobs(args, paths.NOTEBOOKS)[1] == every  # it depends on all that may be looked at
    assert run.main(["--plan", *options]) == 0
    assert "known" not in capsys.readouterr().out
    assert run.main(["--plan", *options, "--known-prompts", "2"]) == 0
    said = capsys.readouterr().out
    for part in ("scan hours", "is not known before it is asked", "hours a model at most"):
        assert part in said
