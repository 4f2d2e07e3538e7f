"""Facts and prompts: hand-made folders in ParaRel's layout, a local download, ParaRel itself where
it is."""

import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from tiny import save_dataset

from qlutils import facts as data
from qlutils.facts import Fact, load_facts, perplexity_texts, prompt_template

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_pararel = pytest.mark.skipif(
    not (SHARED / "pararel").is_dir(), reason="no ../shared/data/pararel here"
)

CAPITAL = [
    "The capital of [X] is [Y].",
    "[X]'s capital is [Y] .",
    "[X],  with the capital [Y]",
    "[Y] governs [X].",
]


@pytest.fixture
def folder(tmp_path):
    patterns = {
        "P36": CAPITAL,
        "P101": ["[X] works on [Y]."] * 2 + ["[X] is in [Y] [X]"],
        "P9": ["[X] was born in [Y].", "[X] is from [Y]"],
    }
    facts = {
        "P36": [("France", "Paris"), ("Italy", "Rome"), ("France", "Paris")],
        "P101": [(f"s{i}", f"o{i}") for i in range(40)],
        "P9": [("a", "b")],
    }
    return save_dataset(tmp_path, patterns, facts)


def test_prompts_end_where_the_object_goes_and_duplicates_are_dropped(folder):
    facts = load_facts(folder, relations=["P36"])
    prompts = "The capital of France is", "France's capital is", "France, with the capital"
    assert facts[0] == Fact("P36", "France", "Paris", prompts)
    assert [fact.id for fact in facts] == ["P36|France|Paris", "P36|Italy|Rome"]
    assert load_facts(folder, relations=["P101"])[0].prompts == ("s0 works on", "s0 is in")


def test_relations_come_in_natural_order_and_small_ones_are_left_out(folder):
    relations = lambda facts: list(dict.fromkeys(fact.relation for fact in facts))  # noqa: E731
    with pytest.warns(UserWarning, match="relation P9 has 2 patterns"):
        assert relations(load_facts(folder)) == ["P36", "P101"]
    assert relations(load_facts(folder, min_patterns=2)) == ["P9", "P36", "P101"]


def test_drop_keeps_only_patterns_that_end_with_the_object(folder):
    with pytest.raises(ValueError, match="no fact with 2 prompts"):  # "[X] is in [Y] [X]" goes too
        load_facts(folder, relations=["P101"], middle="drop")
    with pytest.warns(UserWarning, match="40 facts of P101 left out"):
        facts = load_facts(folder, middle="drop")
    assert {f.relation for f in facts} == {"P36"} and len(facts[0].prompts) == 3


def test_the_sample_of_a_relation_does_not_depend_on_the_others_and_is_nested(folder):
    alone = load_facts(folder, relations=["P101"], facts_per_relation=5, seed=3)
    together = [f for f in load_facts(folder, facts_per_relation=5, seed=3) if f.relation == "P101"]
    larger = load_facts(folder, relations=["P101"], facts_per_relation=9, seed=3)
    assert alone == together and len(alone) == 5 and set(alone) < set(larger)
    assert [int(f.subject[1:]) for f in larger] == sorted(int(f.subject[1:]) for f in larger)
    assert alone != load_facts(folder, relations=["P101"], facts_per_relation=5, seed=4)
    assert len(load_facts(folder, relations=["P36"], facts_per_relation=99)) == 2


def test_the_parent_of_data_is_accepted_too(tmp_path):
    save_dataset(tmp_path / "data")
    assert load_facts(tmp_path) == load_facts(str(tmp_path / "data"))


@pytest.mark.parametrize(
    "relations, message",
    [(["P36", "P5"], "unknown relation 'P5'.*P9, P36, P101"), (["P9"], "P9 has 2 patterns")],
)
def test_relations_that_are_not_there_or_too_small_are_named(folder, relations, message):
    """Whatever else can be wrong with parameters or files is in test_hostile.py."""
    with pytest.raises(ValueError, match=message):
        load_facts(folder, relations=relations)


# --- download -------------------------------------------------------------------------------------
NOBODY = "http://127.0.0.1:9/"  # only the cache can answer


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def published(tmp_path, monkeypatch):
    """ParaRel served from this machine: the same code path as the real download, with another
    address."""
    site, cache = tmp_path / "site", tmp_path / "cache"
    save_dataset(site, {"P36": CAPITAL}, {"P36": [("France", "Paris")]})
    files = [f"{kind}/P36.jsonl" for kind in (data.PATTERNS, data.FACTS)]
    registry = {name: hashlib.sha256((site / name).read_bytes()).hexdigest() for name in files}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "PARAREL_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(data, "PARAREL_RETRIES", 0)
    monkeypatch.setattr(data, "pararel_registry", lambda: registry)
    monkeypatch.setenv("QLUTILS_CACHE", str(cache))
    yield site, cache
    server.shutdown()
    server.server_close()


def test_pararel_is_downloaded_once_and_read_from_the_cache_afterwards(published, monkeypatch):
    site, _ = published
    facts = load_facts("pararel")
    assert facts == load_facts(site)
    monkeypatch.setattr(data, "PARAREL_URL", NOBODY)
    assert load_facts("pararel") == facts


def test_a_download_with_the_wrong_checksum_names_the_file_and_is_not_kept(published):
    site, cache = published
    with (site / data.FACTS / "P36.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="trex_lms_vocab/P36.jsonl.*local copy.*SHA256"):
        load_facts("pararel")
    assert not list(cache.rglob("trex*/P36.jsonl"))


def test_being_offline_says_what_to_do(published, monkeypatch):
    monkeypatch.setattr(data, "PARAREL_URL", NOBODY)
    with pytest.raises(ValueError, match="P36.jsonl.*go online.*local copy"):
        load_facts("pararel")


@needs_pararel
def test_the_registry_holds_the_published_files():
    registry = data.pararel_registry()
    assert len(registry) == 2 * 39
    for name, digest in registry.items():
        content = (SHARED / "pararel/data" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, name


# --- ParaRel itself -------------------------------------------------------------------------------
@needs_pararel
def test_pararel_has_the_measured_numbers():
    """25,436 facts and 177,412 queries are what the files list; 16 facts are there twice, and some
    patterns (P106, P136) coincide after the cut, so that 25,420 facts and 173,893 queries are
    distinct.
    """
    root = SHARED / "pararel"
    lines = {}
    for file in (root / "data").rglob("*.jsonl"):
        kind = str(file.parent.relative_to(root / "data"))
        lines[kind, file.stem] = file.read_text("utf-8").split("\n")[:-1]
    patterns = {}
    for (kind, relation), rows in lines.items():
        if kind == data.PATTERNS:
            patterns[relation] = [json.loads(row)["pattern"] for row in rows]
    every = [pattern for rows in patterns.values() for pattern in rows]
    assert (len(patterns), len(every)) == (39, 329)
    large = {relation: rows for relation, rows in patterns.items() if len(rows) > 2}
    kept = {name: list(filter(None, map(prompt_template, rows))) for name, rows in large.items()}
    n_facts = {relation: len(lines[data.FACTS, relation]) for relation in kept}
    assert sum(n_facts.values()) == 25_436
    assert sum(n_facts[relation] * len(rows) for relation, rows in kept.items()) == 177_412
    assert sum(len(set(rows)) for rows in kept.values()) == 253
    last = [p for p in every if not any(c.isalnum() for c in p.split("[Y]")[1])]
    dropped = [p for p in last if prompt_template(p, "drop") is None]
    assert len(last) == 217 and dropped == [p for p in last if "[X]" not in p]

    facts, prompts = load_facts(root), {}
    for fact in facts:
        prompts.setdefault(fact.relation, []).append(len(fact.prompts))
    assert len(prompts) == 36 and len(facts) == 25_420 == 25_436 - 16
    assert sum(map(sum, prompts.values())) == 173_893 and min(map(min, prompts.values())) == 2
    two = [relation for relation, counts in prompts.items() if 2 in counts]
    assert two == ["P103", "P127", "P136", "P190"]
    assert len({fact.id for fact in facts}) == len(facts)
    texts = [prompt for fact in facts if "  " not in fact.subject for prompt in fact.prompts]
    assert not [text for text in texts if "  " in text or text != text.strip()]
    # the paper's Table 5
    asked = {(prompt, fact.object) for fact in facts for prompt in fact.prompts}
    assert ("Adrian IV has the position of", "pope") in asked
    assert ("Somalia is located in", "Africa") in asked
    assert ("The official language of Republic of Ingushetia is", "Russian") in asked


# --- perplexity -----------------------------------------------------------------------------------
def test_perplexity_texts_leave_out_headings_and_empty_lines(tmp_path):
    file = tmp_path / "test.txt"
    text = " \n = Robert = \n \n One = two . \n = = Career = = \n Another one . \n"
    file.write_text(text, "utf-8")
    assert perplexity_texts(file) == ["One = two .", "Another one ."]
    assert perplexity_texts(str(tmp_path)) == perplexity_texts(file)


def test_wikitext_from_the_hub_reads_parquet(tmp_path, monkeypatch):
    texts = pd.DataFrame({"text": ["", " = Title = \n", " A paragraph . \n"]})
    texts.to_parquet(tmp_path / "t.parquet")
    download = "huggingface_hub.hf_hub_download"
    monkeypatch.setattr(download, lambda *_, **__: str(tmp_path / "t.parquet"))
    assert perplexity_texts("wikitext-2") == ["A paragraph ."]


@pytest.mark.skipif(not (SHARED / "wikitext-2").is_dir(), reason="no ../shared/data/wikitext-2")
def test_wikitext_paragraphs_hold_no_heading():
    file = SHARED / "wikitext-2" / "test.txt"
    lines = list(filter(None, map(str.strip, file.read_text("utf-8").split("\n"))))
    headings = [line for line in lines if line.startswith("= ") and line.endswith(" =")]
    assert len(perplexity_texts(file)) + len(headings) == len(lines) and len(headings) > 500
