"""Facts and prompts: hand-made folders in ParaRel's layout, a local download, ParaRel itself where
it is."""

import hashlib
import json
import threading
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

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


def write(folder, relation, patterns, pairs):
    for kind, rows in (
        ("pattern_data/graphs_json", [{"pattern": p, "lemma": "x"} for p in patterns]),
        ("trex_lms_vocab", [{"sub_label": s, "obj_label": o} for s, o in pairs]),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / kind / f"{relation}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "P36", CAPITAL, [("France", "Paris"), ("Italy", "Rome"), ("France", "Paris")])
    write(
        tmp_path,
        "P101",
        ["[X] works on [Y]."] * 2 + ["[X] is in [Y] [X]"],
        [(f"s{i}", f"o{i}") for i in range(40)],
    )
    write(tmp_path, "P9", ["[X] was born in [Y].", "[X] is from [Y]"], [("a", "b")])
    return tmp_path


def test_prompts_end_where_the_object_goes_and_keep_the_order(folder):
    fact = load_facts(folder, relations=["P36"])[0]
    assert fact == Fact(
        "P36",
        "France",
        "Paris",
        ("The capital of France is", "France's capital is", "France, with the capital"),
    )
    assert fact.id == "P36|France|Paris"


def test_a_fact_survives_json():
    fact = Fact("P36", "France", "Paris", ("a", "b"))
    assert Fact(**json.loads(json.dumps(asdict(fact)))) == fact
    with pytest.raises(ValueError, match="France"):
        Fact("P36", "France", "Paris", "one text")


def test_relations_come_in_natural_order_and_small_ones_are_left_out(folder):
    relations = lambda facts: list(dict.fromkeys(fact.relation for fact in facts))  # noqa: E731
    assert relations(load_facts(folder)) == ["P36", "P101"]
    assert relations(load_facts(folder, min_patterns=2)) == ["P9", "P36", "P101"]


def test_duplicate_facts_and_prompts_are_dropped(folder):
    assert [f.subject for f in load_facts(folder, relations=["P36"])] == ["France", "Italy"]
    assert load_facts(folder, relations=["P101"])[0].prompts == ("s0 works on", "s0 is in")


def test_drop_keeps_only_patterns_that_end_with_the_object(folder, caplog):
    with pytest.raises(ValueError, match="no fact with 2 prompts"):  # "[X] is in [Y] [X]" goes too
        load_facts(folder, relations=["P101"], middle="drop")
    assert len(load_facts(folder, relations=["P36"], middle="drop")[0].prompts) == 3
    facts = load_facts(folder, middle="drop")
    assert {f.relation for f in facts} == {"P36"}
    assert "40 facts left out" in caplog.text and "P101" in caplog.text


def test_subjects_may_hold_slots_and_backslashes(tmp_path):
    subject = r"a\1 [Y]  [X] \g<0>"
    write(tmp_path, "P36", CAPITAL, [(subject, "Paris")])
    assert load_facts(tmp_path)[0].prompts[0] == f"The capital of {subject} is"


def test_the_sample_of_a_relation_does_not_depend_on_the_others_and_is_nested(folder):
    alone = load_facts(folder, relations=["P101"], facts_per_relation=5, seed=3)
    together = [f for f in load_facts(folder, facts_per_relation=5, seed=3) if f.relation == "P101"]
    larger = load_facts(folder, relations=["P101"], facts_per_relation=9, seed=3)
    assert alone == together and len(alone) == 5 and set(alone) < set(larger)
    assert [int(f.subject[1:]) for f in larger] == sorted(int(f.subject[1:]) for f in larger)
    assert alone != load_facts(folder, relations=["P101"], facts_per_relation=5, seed=4)
    assert len(load_facts(folder, relations=["P36"], facts_per_relation=99)) == 2


def test_the_parent_of_data_is_accepted_too(tmp_path):
    write(tmp_path / "data", "P36", CAPITAL, [("France", "Paris")])
    assert load_facts(tmp_path) == load_facts(str(tmp_path / "data"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dataset="nowhere"), "unknown dataset 'nowhere'"),
        (dict(dataset=3), "dataset must be"),
        (dict(relations=["P36", "P5"]), "unknown relation 'P5'.*P9, P36, P101"),
        (dict(relations="P36"), "relations must be a list"),
        (dict(relations=[]), "relations must be a list"),
        (dict(relations=7), "relations must be a list"),
        (dict(relations=["P9"]), "P9 has 2 patterns.*min_patterns=3"),
        (dict(facts_per_relation=0), "facts_per_relation"),
        (dict(facts_per_relation=2.0), "facts_per_relation"),
        (dict(facts_per_relation=True), "facts_per_relation"),
        (dict(min_patterns=0), "min_patterns"),
        (dict(seed=-1), "seed"),
        (dict(middle="skip"), "middle must be 'cut' or 'drop'"),
    ],
)
def test_bad_parameters_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_facts(**{"dataset": folder, **arguments})


@pytest.mark.parametrize(
    "kind, text, message",
    [
        (
            "pattern_data/graphs_json",
            '{"pattern": "[X] a [Y]"}\n{"pattern": "[X] b"}\n',
            r"P36.jsonl:2: .*\[Y\]",
        ),
        ("pattern_data/graphs_json", '{"pattern": "the [Y]"}\n', r"P36.jsonl:1: .*\[X\]"),
        ("pattern_data/graphs_json", '{"lemma": "the"}\n', "P36.jsonl:1: field 'pattern'"),
        ("pattern_data/graphs_json", "\n", "P36.jsonl is empty"),
        (
            "trex_lms_vocab",
            '{"sub_label": "a", "obj_label": "b"}\n{"sub_la',
            "P36.jsonl:2: not a JSON object",
        ),
        ("trex_lms_vocab", "[1]\n", "P36.jsonl:1: not a JSON object"),
        ("trex_lms_vocab", b"\xff\n", "P36.jsonl:1: not a JSON object"),
        ("trex_lms_vocab", '{"sub_label": "a"}\n', "P36.jsonl:1: field 'obj_label'"),
        (
            "trex_lms_vocab",
            '{"sub_label": 3, "obj_label": "b"}\n',
            "P36.jsonl:1: field 'sub_label'",
        ),
        (
            "trex_lms_vocab",
            '{"sub_label": "a", "obj_label": " "}\n',
            "P36.jsonl:1: field 'obj_label'",
        ),
        ("trex_lms_vocab", None, "missing data file .*P36.jsonl"),
    ],
)
def test_bad_files_are_named_with_their_line(folder, kind, text, message):
    file = folder / kind / "P36.jsonl"
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_facts(folder)


def test_a_line_separator_inside_a_label_is_not_a_new_line(tmp_path):
    write(tmp_path, "P36", CAPITAL, [])
    file = tmp_path / "trex_lms_vocab" / "P36.jsonl"
    file.write_text('{"sub_label": "a\u2028b", "obj_label": "c"}\r\n', "utf-8")
    assert load_facts(tmp_path)[0].subject == "a\u2028b"


# --- download -------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def published(tmp_path, monkeypatch):
    """ParaRel served from this machine: the same code path as the real download, with another
    address."""
    site, cache = tmp_path / "site", tmp_path / "cache"
    write(site, "P36", CAPITAL, [("France", "Paris")])
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
    monkeypatch.setattr(
        data, "PARAREL_URL", "http://127.0.0.1:9/"
    )  # nobody there: only the cache can answer
    assert load_facts("pararel") == facts


def test_a_download_with_the_wrong_checksum_names_the_file_and_is_not_kept(published):
    site, cache = published
    with (site / data.FACTS / "P36.jsonl").open("a") as file:
        file.write(json.dumps(dict(sub_label="Italy", obj_label="Milan")) + "\n")
    with pytest.raises(ValueError, match="trex_lms_vocab/P36.jsonl.*SHA-256.*local copy"):
        load_facts("pararel")
    assert not (cache / data.FACTS / "P36.jsonl").exists()


def test_being_offline_says_what_to_do(published, monkeypatch):
    monkeypatch.setattr(data, "PARAREL_URL", "http://127.0.0.1:9/")
    with pytest.raises(ConnectionError, match="P36.jsonl.*local copy"):
        load_facts("pararel")


@needs_pararel
def test_the_registry_holds_the_published_files():
    registry = data.pararel_registry()
    assert len(registry) == 2 * 39
    for name, digest in registry.items():
        assert (
            hashlib.sha256((SHARED / "pararel/data" / name).read_bytes()).hexdigest() == digest
        ), name


# --- ParaRel itself -------------------------------------------------------------------------------


@needs_pararel
def test_pararel_has_the_measured_numbers():
    """25,436 facts and 177,412 queries are what the files list; 16 facts are there twice, and some
    patterns (P106, P136) coincide after the cut, so that 25,420 facts and 173,893 queries are
    distinct.
    """
    root = SHARED / "pararel"
    lines = {
        kind: {
            file.stem: file.read_text("utf-8").split("\n")[:-1]
            for file in (root / "data" / kind).iterdir()
        }
        for kind in (data.PATTERNS, data.FACTS)
    }
    patterns = {
        r: [json.loads(line)["pattern"] for line in rows]
        for r, rows in lines[data.PATTERNS].items()
    }
    assert (len(patterns), sum(map(len, patterns.values()))) == (39, 329)
    kept = {
        r: [prompt_template(p) for p in rows if prompt_template(p)]
        for r, rows in patterns.items()
        if len(rows) > 2
    }
    n_facts = {r: len(lines[data.FACTS][r]) for r in kept}
    assert sum(n_facts.values()) == 25_436
    assert sum(n_facts[r] * len(rows) for r, rows in kept.items()) == 177_412
    assert sum(len(set(rows)) for rows in kept.values()) == 253
    last = [
        p
        for rows in patterns.values()
        for p in rows
        if not any(c.isalnum() for c in p.split("[Y]")[1])
    ]
    assert len(last) == 217 and all(
        (prompt_template(p, "drop") is None) == ("[X]" not in p) for p in last
    )

    prompts = {}
    for fact in load_facts(root):
        prompts.setdefault(fact.relation, []).append(len(fact.prompts))
    assert len(prompts) == 36 and sum(map(len, prompts.values())) == 25_420 == 25_436 - 16
    assert sum(map(sum, prompts.values())) == 173_893 and min(map(min, prompts.values())) == 2
    assert {relation for relation, counts in prompts.items() if 2 in counts} == {
        "P103",
        "P127",
        "P136",
        "P190",
    }


@needs_pararel
def test_pararel_has_no_double_space_from_patterns_and_no_colliding_names():
    facts = load_facts(SHARED / "pararel")
    assert len({fact.id for fact in facts}) == len(facts)
    assert not [
        p for f in facts if "  " not in f.subject for p in f.prompts if "  " in p or p != p.strip()
    ]
    # the paper's Table 5
    prompts = {(p, f.object) for f in facts for p in f.prompts}
    for prompt, answer in [
        ("Adrian IV has the position of", "pope"),
        ("Somalia is located in", "Africa"),
        ("The official language of Republic of Ingushetia is", "Russian"),
    ]:
        assert (prompt, answer) in prompts


# --- perplexity -----------------------------------------------------------------------------------


def test_perplexity_texts_leave_out_headings_and_empty_lines(tmp_path):
    file = tmp_path / "test.txt"
    file.write_text(
        " \n = Robert = \n \n One = two . \n = = Career = = \n Another one . \n", "utf-8"
    )
    assert (
        perplexity_texts(file)
        == ["One = two .", "Another one ."]
        == perplexity_texts(str(tmp_path))
    )


def test_a_perplexity_text_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.txt"):
        perplexity_texts("nowhere.txt")
    (tmp_path / "empty.txt").write_text(" = Only a heading = \n")
    with pytest.raises(ValueError, match="empty.txt.*no paragraph"):
        perplexity_texts(tmp_path / "empty.txt")


def test_wikitext_from_the_hub_reads_parquet_and_says_what_to_do_offline(tmp_path, monkeypatch):
    import huggingface_hub
    import pandas as pd

    pd.DataFrame({"text": ["", " = Title = \n", " A paragraph . \n"]}).to_parquet(
        tmp_path / "t.parquet"
    )
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: str(tmp_path / "t.parquet")
    )
    assert perplexity_texts("wikitext-2") == ["A paragraph ."]

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match="go online once.*no route"):
        perplexity_texts("wikitext-2")


@pytest.mark.skipif(
    not (SHARED / "wikitext-2").is_dir(), reason="no ../shared/data/wikitext-2 here"
)
def test_wikitext_paragraphs_hold_no_heading():
    texts = perplexity_texts(SHARED / "wikitext-2" / "test.txt")
    lines = [
        line.strip() for line in (SHARED / "wikitext-2" / "test.txt").read_text("utf-8").split("\n")
    ]
    headings = [line for line in lines if line.startswith("= ") and line.endswith(" =")]
    assert (
        len(texts) + len(headings) == len([line for line in lines if line]) and len(headings) > 500
    )
