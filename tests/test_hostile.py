"""Whatever is fed in ends in the right result or in one ValueError that names the culprit.

The tables below list every kind of hostile input, each in one row: TEXTS (facts that must come out
right), TWINS, FILES (data sets, right or refused) and CALLS (parameters, refused or right).
"""

import csv
import io
import json
import re
import runpy
import sys
import unicodedata
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import mistune
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import save_checkpoint, tiny_lm

from qlutils import (
    Fact,
    answer_probability,
    attribute,
    consistency,
    edit_weights,
    find_synapses,
    knowledge_neurons,
    load_facts,
    load_model,
    paths,
    perplexity,
    save_edited,
    scale_neurons,
    scale_synapses,
)
from qlutils.change.editing import virtual_edit
from qlutils.change.rows import score_queries, score_rows
from qlutils.change.synapses import Row, column_scores, run_rows
from qlutils.checks import METHODS
from qlutils.experiments import effects
from qlutils.experiments.kn_modification import edit_facts, plan_edits
from qlutils.experiments.knowledge_synapses import scale_synapse_columns
from qlutils.experiments.localize import localise, localise_unit
from qlutils.experiments.query_kn_mapping import scale_kns
from qlutils.explorer.fact import change, look, next_token
from qlutils.facts import perplexity_texts
from qlutils.model.language_model import LanguageModel
from qlutils.model.passes import neuron_vectors
from qlutils.neurons.cas import cas_candidates, cas_neurons
from qlutils.show.tables import write_table
from qlutils.study.notebook import Study

PATTERNS = ["[X] lies in [Y].", "the home of [X] is [Y] .", "as [X] was found, it was in [Y]"]
near = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-37)  # below: float32's grid
pytestmark = pytest.mark.usefixtures("one_thread")


@lru_cache(maxsize=1)
def gpt2():
    return load_model("demo/gpt2", device="cpu")


@lru_cache(maxsize=1)
def tiny():
    return tiny_lm("gpt2", torch.float32)


# --- texts that are odd and must come out right ---------------------------------------------------
CITIES = ("Ångström", "Việt Nam", "İstanbul")
# kind -> names, each used as a subject and as an object; the first also in tables and in a run
TEXTS = {
    "combining marks": ["\u0301abc", "\u0345abc", "ab \u0301\u20dd\u0903 cd"],
    "decomposed letters": [unicodedata.normalize("NFD", city) for city in CITIES],
    "composed letters, compatibility forms": [*CITIES, "ﬁn", "①②", "Ⅻ", "ｆｕｌｌ", "㎏"],
    "astral planes": ["\U00010000\U0001f9ff", "\U0001d11e"],
    "code points that are no characters": [f"ab {c} cd" for c in "\uffff\u0378\ue000\U0010ffff"],
    "the replacement character": ["ab \ufffd cd", "ab \ufffd\ufffd cd"],
    "right to left": ["abc מדינה 123", "\u05ea", "ab \u202a\u202e cd", "ab \u2066\u2069\u200e cd"],
    "emoji": ["👨‍👩‍👧‍👦", "👍🏽", "🇫🇷", "☃⚠️", "☃️"],
    "zero-width characters": ["ab \u200b\u200c\u200d cd", "ab \u2060\ufeff\u00ad cd"],
    "nothing visible": ["\u200b", "\u2060\u200d", "\u3164"],
    "control characters": ["ab \0 cd", "ab \x01\x1b cd", "ab \x7f\x9f cd"],
    "newline": ["ab \n cd", "ab \n\n cd", "ab \n-  cd"],
    "carriage return": ["ab \r cd", "ab \r\n cd"],
    "tab": ["ab \t cd", "ab \t\t cd"],
    "line and paragraph separators": [f"ab {sign} cd" for sign in "\u2028\u2029\x85\x0b\x0c"],
    "other spaces": ["ab \u00a0\u2007\u202f cd", "ab \u3000\u1680\u2003 cd"],
    "several spaces": ["ab    cd", "ab       cd"],
    "scripts without spaces": ["東京", "กรุงเทพ", "ᄒ\u1161ᆫ", "葛󠄀", "٣٤"],
    "letters that change length with case": ["STRASSE ß", "İi̇", "ŉ", "ﬃ"],
    "the slots of a pattern": ["[X]", "[Y]", "a [Y] b [X]", "[X][Y]"],
    "regular expression": [r"^a.*(b|c)+$", r"(?P<x>", r"[a-", "*?+"],
    "format braces": ["{}", "{0}", "{subject!r}", "}{", "%s %(a)s %d", "${HOME}"],
    "backslashes": ["\\", "a\\b", r"\1 \g<0>", r"\u0041", "ends in \\"],
    "pipes": ["a|b", "|", r"a\|b", r"\\|"],
    "quotes and commas": ['"', "'", 'a,"b",c', "`", "a;b"],
    "markup": ["<b>a</b>", "&amp;", "[a](b)", "**a**", "<!-- a -->", "# a"],
    "LaTeX": [r"\end{tabular}", "a & b", "50 %", "$x_1^2$", "~", r"\\", "[1cm]"],
    "spreadsheet formula": ["=1+1", "+1", "-1", "@a"],
    "looks like no text": "nan NaN NA null None True 1e5 007 1.0 inf -".split(),
    "looks like a path": ["../../etc/passwd", "/", "..", "C:\\x", "~", "con"],
    "spells a special token": ["<|endoftext|>", "a <|endoftext|> b", "</s>", "[MASK]"],
    "one character": ["x", "\u0e01", "\u4e00"],
    "space at the ends": [" a ", "\u00a0b\u00a0", "\tc\n"],
    "long, within the context": ["word " * 40 + "end", "x" * 200],
}
NAMES = {kind: unicodedata.normalize("NFC", texts[0].strip()) for kind, texts in TEXTS.items()}


def fact_line(subject, answer, ensure_ascii=True):
    return json.dumps({"sub_label": subject, "obj_label": answer}, ensure_ascii=ensure_ascii)


def write(folder, patterns, pairs, relation="P1", ensure_ascii=True):
    """A data set in ParaRel's layout; returns its folder."""
    for kind, lines in (
        ("pattern_data/graphs_json", [json.dumps({"pattern": one}) for one in patterns]),
        ("trex_lms_vocab", [fact_line(*pair, ensure_ascii) for pair in pairs]),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        text = "".join(line + "\n" for line in lines)
        (folder / kind / f"{relation}.jsonl").write_bytes(text.encode("utf-8"))
    return folder


@torch.no_grad()
def by_hand(lm, prompt, answer, gap=" "):
    """P(answer | prompt) from one plain forward pass over the joint tokenisation, float64."""
    asked, joint = (
        lm.tokenizer(text, split_special_tokens=True).input_ids
        for text in (prompt, f"{prompt}{gap}{answer}")
    )
    assert joint[: len(asked)] == asked
    log_p = torch.log_softmax(lm.model(torch.tensor([joint])).logits[0].double(), -1)
    places = range(len(asked) - 1, len(joint) - 1)
    return float(torch.exp(sum(log_p[place, joint[place + 1]] for place in places)))


def check_probabilities(prompts, answers):
    found = answer_probability(gpt2(), prompts, answers)
    near(found, [by_hand(gpt2(), *pair) for pair in zip(prompts, answers)])
    return found


@pytest.mark.parametrize("kind", TEXTS)
def test_a_fact_of_odd_text_is_read_asked_and_attributed_right(kind, tmp_path):
    lm, pairs, wanted = gpt2(), [], []
    for name in TEXTS[kind]:
        clean = unicodedata.normalize("NFC", name.strip())  # one name, however it is spelled
        pairs += [(name, "Paris"), ("Ann", name)]
        wanted += [(clean, "Paris"), ("Ann", clean)]
    facts = load_facts(write(tmp_path / "ascii", PATTERNS, pairs))
    assert facts == load_facts(write(tmp_path / "utf-8", PATTERNS, pairs, ensure_ascii=False))
    assert [(fact.subject, fact.object) for fact in facts] == wanted
    for fact in facts:
        name = fact.subject
        asked = f"{name} lies in", f"the home of {name} is", f"as {name} was found, it was in"
        assert fact.prompts == asked and Fact(**json.loads(json.dumps(asdict(fact)))) == fact
    prompts = [facts[0].prompts[1], *(fact.prompts[0] for fact in facts)]
    answers = ["Paris", *(fact.object for fact in facts)]
    found = check_probabilities(prompts, answers)
    some = dict(steps=2, answer="first")  # a name may have a hundred tokens
    together = attribute(lm, prompts, answers, **some)
    assert torch.isfinite(together.scores).all() and torch.isfinite(together.completeness_gap).all()
    near(together.probability, found)
    alone = attribute(lm, prompts[:1], answers[:1], **some).scores[0]
    assert (together.scores[0] - alone).abs().max() <= 1e-3 * alone.abs().max() + 1e-37


GLUED = {  # text that an answer follows without a space, and answers
    "scripts without spaces": (["法国的首都是", "日本の首都は"], "東", "巴"),
    "after an opening quote": (['She was born in "', "He wrote the book ("], "Paris", "Madrid"),
    "after a newline": (["Question: where is Rome?\n", "Capital of Italy:\t"], "Italy", "Spain"),
}


@pytest.mark.parametrize("kind", GLUED)
def test_an_answer_that_no_space_comes_before_is_scored_so_by_every_part_of_a_run(kind, runs):
    lm, (texts, right, other) = gpt2(), GLUED[kind]
    wanted = [by_hand(lm, text, right, gap="") for text in texts]
    wrong = [by_hand(lm, text.rstrip(), right) for text in texts]
    updated = [by_hand(lm, text, other, gap="") for text in texts]
    assert not np.allclose(wanted, wrong, rtol=0.05, atol=0)
    prompts = tuple(f"{text}[Y]" for text in texts)
    spaced = "the home of ann is", "ann lies in"
    facts = [Fact("r", "a", right, prompts), Fact("r", "b", other, spaced)]
    near(answer_probability(lm, prompts, [right] * 2), wanted)
    near(attribute(lm, prompts, [right] * 2, steps=2).probability, wanted)
    queries = localise_unit(lm, [asdict(fact) for fact in facts], steps=2).drop(columns="left_out")
    near(queries["probability"], wanted + [by_hand(lm, prompt, other) for prompt in spaced])
    [unit] = effects.units(queries, 0.2, irrelevant=0, other=0)
    for frame in (scale_kns(lm, unit), scale_synapse_columns(lm, unit)):
        of_first = frame[frame["fact"] == facts[0].id].drop_duplicates("prompt_index")
        near(of_first["probability_before"], wanted)
    plans, _ = plan_edits(queries, facts, num_neurons=lm.num_neurons, n_locality=1, ppl_entries=0)
    edits, query = edit_facts(lm, plans[:1]).drop_duplicates("op"), plans[0]["query"]
    near(edits["p_before"], [wanted[query], updated[query]])
    view = look(lm, facts[0], steps=2)
    near(view.predictions["probability"], wanted)
    shown = change(view, {(0, 1)}, "update", new=other)
    near(shown["before"], wanted)
    near(shown["new_before"], updated)


def test_white_space_at_the_end_of_a_prompt_is_dropped_shown_or_refused():
    lm = gpt2()
    for same in ("it is in  ", "it is in [Y]"):
        assert lm.encode(same, "Paris") == lm.encode("it is in", "Paris")
    assert lm.encode("it is in\n [Y]", "Paris")[0] == lm.tokenizer("it is in\n").input_ids


# --- the same texts through the store and the tables ----------------------------------------------
def test_odd_facts_go_through_a_run_and_its_store_unchanged(tmp_path, runs):
    names = list(NAMES.values())
    folder = write(tmp_path / "data", PATTERNS[:2], [(name, "Paris") for name in names])
    study = Study("01_localize", model="demo/gpt2", method="ig", data=str(folder), device="cpu")
    study.facts = lambda facts=load_facts(folder, min_patterns=2): facts
    queries = localise(study, steps=2, answer="first")
    assert queries["subject"].unique().tolist() == list(dict.fromkeys(names))
    assert len(study.load("left_out")) == 0 and queries["fact"].nunique() == len(set(names))
    for row in queries.itertuples():
        asked = f"{row.subject} lies in", f"the home of {row.subject} is"
        assert row.prompt == asked[row.prompt_index]
    again = study.load("queries")
    assert again[["prompt", "fact"]].equals(queries[["prompt", "fact"]])
    some = queries[::5]
    near(some["probability"], check_probabilities(some["prompt"].tolist(), some["object"].tolist()))
    assert len(gpt2().encode("it is in", "Paris")[1]) == 1  # then "first" is "all"


def test_odd_texts_do_not_break_a_table_apart(tmp_path):
    """In CSV they are kept to the character."""
    texts = [text for texts in TEXTS.values() for text in texts] + ["a\rb", r"a\|b"]
    rows = [[text, str(row)] for row, text in enumerate(texts)]
    table = pd.DataFrame({"text": texts, "n": range(len(texts))})
    files = write_table(table, "t", tmp_path)
    content = {kind: path.read_bytes().decode("utf-8") for kind, path in files.items()}
    assert list(csv.reader(io.StringIO(content["csv"], newline="")))[1:] == rows
    frame = pd.read_csv(files["csv"], dtype=str, keep_default_na=False)
    assert frame.to_numpy().tolist() == rows
    parsed = mistune.create_markdown(renderer="ast", plugins=["table"])(content["md"])
    [body] = [part for part in parsed[0]["children"] if part["type"] == "table_body"]
    cells = [[cell["children"] for cell in row["children"]] for row in body["children"]]
    assert [number[0]["raw"] for _, number in cells] == [number for _, number in rows]
    latex = content["tex"].split("\\midrule\n")[1].split("\n\\bottomrule")[0].split("\n")
    assert len(latex) == len(rows)
    for line, (_, number) in zip(latex, rows):
        text, end = re.split(r"(?<!\\) & ", line)
        assert end == rf"{number} \\" and not re.search(r"(?<!\\)[&%#_^~]|\\\\|^\[", text)


# Facts that are easily mixed up: answers that are prefixes, case, what is invisible, what looks
# alike, parts that join to one text.
TWINS = [("ann", "New"), ("ann", "New York"), ("Paris Hilton", "Paris"), ("Paris", "Paris")]
TWINS += [("Ann", "Oslo"), ("ann", "Oslo"), ("a\u200bnn", "Oslo"), ("\u0410nn", "Oslo")]
TWINS += [("a|b", "c"), ("a", "b|c"), ("a\\", "|b|c"), ("a\\|", "b|c")]


def test_facts_that_look_alike_stay_apart(tmp_path):
    facts = load_facts(write(tmp_path, PATTERNS, TWINS))
    assert [(fact.subject, fact.object) for fact in facts] == TWINS
    assert len({fact.id for fact in facts}) == len(facts)
    unit = localise_unit(gpt2(), [asdict(fact) for fact in facts], steps=2)
    assert unit.groupby("fact", sort=False).size().tolist() == [3] * len(facts)
    assert unit["cas_layer"].notna().sum() == len(facts)
    check_probabilities(unit["prompt"].tolist(), unit["object"].tolist())


# --- files ----------------------------------------------------------------------------------------
GOOD = [("ann", "Oslo"), ("bob", "Rome")]
LINES = [fact_line(*pair) for pair in GOOD]
PLAIN = "\n".join(LINES) + "\n"
ANN = '{"subject": "ann", "object": "Oslo", "prompts": ["ann lies in", "c d", "e f"]}'
SPELLED = [ANN.replace('"ann"', f'"{name}"') for name in ("Malmo\u0308", "Malm\u00f6")]
BACKWARDS = [f"[Y] holds [X] {i}." for i in range(3)]
RIGHT = "right"


def data_set(*patterns, content=None, relations=("P1",)):
    """Makes a data set of good facts with these patterns; `content`: of its file of facts, text or
    bytes."""

    def make(folder):
        for relation in relations:
            write(folder, patterns or PATTERNS, GOOD, relation)
        if content is not None:
            data = content if isinstance(content, bytes) else content.encode("utf-8")
            (folder / "trex_lms_vocab" / "P1.jsonl").write_bytes(data)
        return folder

    return make


def own_facts(*lines, name="own.jsonl", plain=ANN):
    """A file of one's own facts: a good line, then these."""

    def make(folder):
        (folder / name).write_bytes("\n".join([plain, *lines]).encode("utf-8"))
        return folder / name

    return make


def own_line(**changes):
    line = {"subject": "bob", "object": "Rome", "prompts": ["bob lies in", "e f", "g h"], **changes}
    return own_facts(json.dumps({key: value for key, value in line.items() if value != "absent"}))


def renamed(old, new):
    """Makes a good data set, of which one part has another name."""

    def make(folder):
        (write(folder, PATTERNS, GOOD) / old).rename(folder / new)
        return folder

    return make


def twice(folder):
    file = write(folder, PATTERNS, GOOD) / "trex_lms_vocab" / "P1.JSONL"
    file.write_text(PLAIN)
    return folder


# kind -> (data set, what is right: the facts' subjects, or what the error says)
FILES = {
    "own facts": (own_line(relation="P1"), ["bob", "ann"]),
    "own facts without a relation": (own_line(), ["ann", "bob"]),
    "own facts, .JSONL": (own_facts(name="own.JSONL"), ["ann"]),
    "own facts with fields of their own": (own_line(relation="r", id=3, note="x"), ["ann", "bob"]),
    "own facts, one twice": (own_facts(ANN), ["ann"]),
    "own facts, one twice, spelled otherwise": (own_facts(*SPELLED), ["ann", "Malm\u00f6"]),
    "own facts, one prompt each": (own_line(prompts=["c d", "c d "]), ["ann"]),
    "own facts, none of two prompts": (
        own_facts(plain=ANN.replace(', "c d", "e f"', "")),
        "no fact with 2 prompts",
    ),
    "own facts, no JSON": (own_facts("ann"), "own.jsonl:2: not a JSON object"),
    "own facts, an empty file": (own_facts(plain=""), "own.jsonl is empty"),
    "own facts, no such file": (lambda folder: folder / "none.jsonl", "missing data file .*none"),
    "BOM at the start": (data_set(content=b"\xef\xbb\xbf" + PLAIN.encode()), ["ann", "bob"]),
    "BOM in the middle": (data_set(content=f"{LINES[0]}\n\ufeff{LINES[1]}"), "P1.jsonl:2"),
    "CRLF lines": (data_set(content=PLAIN.replace("\n", "\r\n")), ["ann", "bob"]),
    "no newline at the end": (data_set(content=PLAIN.rstrip()), ["ann", "bob"]),
    "blank lines": (data_set(content="\n   \n\t\n".join(["", *LINES, ""])), ["ann", "bob"]),
    "only blank lines": (data_set(content="\n \n"), "P1.jsonl is empty"),
    "only a BOM": (data_set(content=b"\xef\xbb\xbf"), "P1.jsonl is empty"),
    "truncated JSON": (data_set(content=PLAIN[:-20]), "P1.jsonl:2: not a JSON object"),
    "a whole surrogate pair, escaped": (data_set(content=fact_line("a😀", "x")), ["a😀"]),
    "a missing field": (data_set(content='{"sub_label": "a"}'), "jsonl:1: field 'obj_label'.*None"),
    "extra fields": (data_set(content=LINES[0][:-1] + ', "more": {"x": [1, null]}}'), ["ann"]),
    "a fact twice": (data_set(content=PLAIN + PLAIN), ["ann", "bob"]),
    "a fact twice, spelled otherwise": (
        data_set(content=fact_line("Malmo\u0308", "x") + "\n" + fact_line("Malm\u00f6", "x")),
        ["Malm\u00f6"],
    ),
    "a pattern twice": (data_set(*PATTERNS, *PATTERNS), ["ann", "bob"]),
    "one pattern three times": (data_set(*[PATTERNS[0]] * 3), "no fact with 2 prompts"),
    "two patterns": (data_set(*PATTERNS[:2]), "no fact with 2 prompts.*min_patterns=3"),
    "a pattern without [X]": (data_set(*PATTERNS, "it is [Y]."), r"P1.jsonl:4: pattern 'it is \[Y"),
    "a pattern without [Y]": (data_set("[X] is.", *PATTERNS), r"P1.jsonl:1: pattern '\[X\] is.'"),
    "slots in small letters": (data_set(*PATTERNS, "[x] is [y]."), "P1.jsonl:4: pattern"),
    "an empty pattern": (data_set(*PATTERNS, ""), "P1.jsonl:4: field 'pattern'"),
    "[Y] before [X]": (data_set(*PATTERNS, "[Y] holds [X]."), ["ann", "bob"]),
    "[Y] before [X] everywhere": (data_set(*BACKWARDS), "no fact with 2 prompts"),
    "two [Y]": (data_set(*PATTERNS[:2], "[X] saw [Y] and [Y]."), ["ann", "bob"]),
    "two [X]": (data_set(*PATTERNS[:2], "[X] and [X] saw [Y]."), ["ann", "bob"]),
    "only slots": (data_set(*PATTERNS, "[X][Y]", "[X] [Y]"), ["ann", "bob"]),
    "a subject that would be taken for the answer's place": (
        data_set("[X] [Y]", *PATTERNS, content=fact_line("a [Y]", "Oslo")),
        r"P1.jsonl:1: the subject 'a \[Y\]' ends a prompt with",
    ),
    "a relation file in capitals": (
        renamed("trex_lms_vocab/P1.jsonl", "trex_lms_vocab/P1.JSONL"),
        ["ann", "bob"],
    ),
    "two files of one relation": (twice, "relation P1 has two files"),
    "no folder of facts": (renamed("trex_lms_vocab", "moved"), "missing data file .*P1.jsonl"),
    "no folder of patterns": (renamed("pattern_data", "moved"), "unknown dataset.*pattern_data"),
    "a relation named by a digit that is none": (data_set(relations="²³"), ["ann", "bob"] * 2),
    "relations in other scripts": (data_set(relations=["город", "العاصمة"]), ["ann", "bob"] * 2),
    "dots and spaces": (data_set(relations=["P1.old copy", "..P2"]), ["ann", "bob"] * 2),
    "a file name that is no Unicode": (data_set(relations=["P\udcff"]), "file in .*surrogate"),
}
for kind, content in {  # of which the first line is no JSON object
    "CR lines of an old Mac": PLAIN.replace("\n", "\r"),
    "UTF-16": PLAIN.encode("utf-16"),
    "Latin-1": '{"sub_label": "é", "obj_label": "x"}'.encode("latin-1"),
    "a surrogate encoded in UTF-8": b'{"sub_label": "\xed\xa0\x80", "obj_label": "x"}',
    "a JSON array": f"[{LINES[0]}]",
    "JSON null": "null",
    "a huge integer": '{"sub_label": ' + "9" * 5000 + ', "obj_label": "b"}',
    "JSON nested too deep": "[" * 100_000,
    "two objects on a line": LINES[0] + LINES[1],
    "HTML, as from a failed download": "<!DOCTYPE html><html></html>",
}.items():
    FILES[kind] = data_set(content=content), "P1.jsonl:1: not a JSON object"
for name, said in {  # as JSON writes them, and what the error says
    r'"a\ud83d b"': "surrogate",
    "NaN": "nan",
    "null": "None",
    "1789": "1789",
    '["a"]': r"\['a'\]",
    "true": "True",
    '""': "''",
    '" \u00a0\\t\u2003"': "not empty",
}.items():
    content = f'{{"sub_label": {name}, "obj_label": "b"}}'
    FILES[f"{name!a} as a name"] = data_set(content=content), f"jsonl:1: field 'sub_label'.*{said}"
for kind, (changes, said) in {
    "no subject": (dict(subject="absent"), "field 'subject'"),
    "an empty object": (dict(object=" "), "field 'object'"),
    "a relation that is no text": (dict(relation=36), "field 'relation'"),
    "a misspelt relation": (dict(relation="absent", relaton="r"), "field 'relaton': name it 'rela"),
    "no prompts": (dict(prompts="absent"), "field 'prompts' must be a list"),
    "one text for prompts": (dict(prompts="b is"), "field 'prompts' must be a list.*'b is'"),
    "an empty prompt": (dict(prompts=["a b", " "]), ".*holds ' '"),
    "a number for a prompt": (dict(prompts=["a b", 1]), ".*holds 1"),
    "text after the answer's place": (dict(prompts=["a b", "[Y] b"]), r".*text follows \[Y\]"),
    "a pattern": (dict(prompts=["a b", "the b of [X] is"]), r".*\[X\] is' is a pattern"),
    "a newline at the end": (dict(prompts=["a b", "a b\n"]), r".*ends with '\\n'"),
    "half of a surrogate pair": (dict(prompts=["a b", "a \ud83d"]), ".*surrogate"),
    "other prompts": (dict(subject="ann", object="Oslo"), "the fact of .*own.jsonl:1"),
}.items():
    FILES[f"own facts, {kind}"] = own_line(**changes), f"own.jsonl:2: {said}"


@pytest.mark.parametrize("kind", FILES)
def test_a_data_set_is_read_right_or_refused_by_file_and_line(kind, tmp_path):
    make, outcome = FILES[kind]
    folder = make(tmp_path)
    if isinstance(outcome, str):
        with pytest.raises(ValueError, match=outcome):
            load_facts(folder)
        return
    facts = load_facts(folder)
    assert [fact.subject for fact in facts] == outcome
    prompts = facts[0].prompts
    texts = [prompt.removesuffix("[Y]") for prompt in prompts]  # "[X][Y]" has no space there
    assert all(text == text.strip() and "  " not in text and "[" not in text for text in texts)
    assert prompts[0] == f"{facts[0].subject} lies in"
    assert len(prompts) == (5 if kind == "only slots" else 3) == len(set(prompts))
    assert load_facts(folder) == facts  # also the order


def test_equally_ranked_relations_come_in_one_order_wherever_the_files_were_written_first(tmp_path):
    orders = []
    for place, names in enumerate((["P1", "P01", "P001"], ["P001", "P01", "P1"])):
        facts = load_facts(data_set(relations=names)(tmp_path / str(place)))
        orders.append([fact.relation for fact in facts])
    assert orders[0] == orders[1] and len(orders[0]) == 6


@pytest.mark.parametrize(
    "content, outcome",
    [
        (b"\xef\xbb\xbfOne line.\nTwo.", ["One line.", "Two."]),
        (b"One.\r\nTwo.\r\n", ["One.", "Two."]),
        (b"caf\xe9", "text.txt is not UTF-8"),
        (b"\xef\xbb\xbf\n", "no paragraph"),
        (PLAIN.encode("utf-16"), "text.txt is not UTF-8"),
    ],
    ids=["BOM", "CRLF", "Latin-1", "only a BOM", "UTF-16"],
)
def test_a_text_for_perplexity_is_read_right_or_refused_by_name(content, outcome, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    if isinstance(outcome, list):
        assert perplexity_texts(tmp_path / "text.txt") == outcome
    else:
        with pytest.raises(ValueError, match=outcome):
            perplexity_texts(tmp_path / "text.txt")


# --- calls ----------------------------------------------------------------------------------------
SCORES = np.array([[[0.1, 0.9, 0.5]]])


def ask(prompts, answers=("x",), **options):
    return answer_probability(gpt2(), prompts, answers, **options)


def entered(context):
    with context:
        return RIGHT


def scaled(neurons, factor=0.0):
    return entered(scale_neurons(tiny(), neurons, factor))


def scaled_synapses(columns, factor=0.0):
    return entered(scale_synapses(tiny(), columns, factor))


def edited(lm=None, neurons=((0, 1),), op="update", old=(5,), new=(6,), **options):
    return entered(edit_weights(lm or tiny(), neurons, op, old=old, new=new, **options))


# calls by the name of the parameter that is tried out
asked = dict(prompts=["the home of ann is"], answers=["Oslo"], steps=2)
attributed = lambda name: lambda value: attribute(gpt2(), **{**asked, name: value})  # noqa: E731
sample = dict(relations=["P36"], facts_per_relation=1)
facts = lambda name: lambda value: load_facts("demo", **{**sample, name: value})  # noqa: E731
found = lambda name: lambda v: find_synapses(tiny(), **{"prompt": "5 6 7", name: v})  # noqa: E731
edit = lambda name: lambda value: edited(**{name: value})  # noqa: E731
cas = lambda name: lambda value: cas_neurons(cas_candidates(SCORES), **{name: value})  # noqa: E731
on_gpt2 = lambda name: lambda value: load_model("demo/gpt2", **{name: value})  # noqa: E731

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
LONG, IS, SAMPLE = "word " * 600, "ann is in", "facts_per_relation"
NO_NUMBER = ("0", None, NAN, True)
NO_FACTOR = (*NO_NUMBER, INF, 1e39, HUGE, 1j, [0])
NO_COUNT = (*NO_NUMBER, -1, 0, 1.5)
NO_INDEX = (True, NAN, INF, None, "a", [1], -1, 10**30, 0.5, 1.0)
NO_TEXT = ("", " \u00a0\n")
PLACES = (None, 3, b"x", __file__)
NOWHERE = (3, None, b"demo", ["demo"], "", "nowhere", "a\0b", "~nosuchuser/x", "x" * 5000, "\ud800")
ENDS = [f"it is in{end}" for end in ("\n", "\t", " \n ", "\u3000", "\u00a0")]
ON_LM = {
    "attribute": lambda lm: attribute(lm, [IS], ["x"]),
    "answer_probability": lambda lm: answer_probability(lm, [IS], ["x"]),
    "scale_neurons": lambda lm: entered(scale_neurons(lm, [(0, 1)], 0.0)),
    "edit_weights": lambda lm: edited(lm),
    "save_edited": lambda lm: save_edited(lm, "nowhere", [(0, 0)], "erase"),
    "find_synapses": lambda lm: find_synapses(lm, IS),
    "scale_synapses": lambda lm: entered(scale_synapses(lm, {(0, 1, 2)}, 0.0)),
    "perplexity": lambda lm: perplexity(lm, [IS]),
}
# (kind, call, what the error says or RIGHT where the value must be taken, values)
CALLS = [
    ("prompt", lambda v: ask([v]), "prompt is empty", [*NO_TEXT, "[Y]"]),
    ("prompt", lambda v: ask([v]), r"prompt 'it is in.*' ends with '.*': remove it, or show", ENDS),
    ("prompt", lambda v: ask([v], ["6"]), "prompt '5' is a single token", ["5"]),
    ("prompt", lambda v: ask([v]), "prompt 'word word.*reads at most 512", [LONG]),
    ("prompt", lambda v: ask([v]), r"ann \\ud800 is in.*surrogate", ["ann \ud800 is in"]),
    ("prompt", lambda v: ask([v]), "prompt must be text, got (bytes|int)", [IS.encode(), 3]),
    ("answer", lambda v: ask([IS], [v]), "answer to 'ann is in'", [*NO_TEXT, None]),
    ("answer", lambda v: ask([IS], [v]), "'ann is in'.*reads 512", [LONG]),
    ("answer", lambda v: ask([IS], [v]), r"\\udfff.*surrogate", ["\udfff"]),
    ("prompts", ask, "prompts must be a list", [IS, None, {IS: 3}, {IS}, pd.DataFrame([IS])]),
    ("prompts", ask, RIGHT, [(IS,), np.array([IS]), pd.Series([IS])]),
    ("prompts", ask, "2 prompts but 1 answers", [["a b", "c d"]]),
    ("answers", lambda v: ask([IS], v), "answers must be a list.*3", [3]),
    ("kind", lambda v: ask([IS], answer=v), "answer .* is unknown", ["last", ["all"]]),
    ("steps", attributed("steps"), "steps is", [*NO_COUNT, 1, 2.0, np.float64(3), [20]]),
    ("steps", attributed("steps"), RIGHT, [np.int64(3)]),
    ("rule", attributed("rule"), "rule .* use one of right", ["simpson", None, 3, ["right"]]),
    ("method", attributed("method"), "method .* use one of ig", ["IG"]),
    ("site", attributed("site"), "site .*is unknown", ["output"]),
    ("amig_factor", attributed("amig_factor"), "amig_factor 'b' is unknown", ["b"]),
    ("row_budget", attributed("row_budget"), "row_budget is", [0, 1.5, "x", True]),
    ("t", partial(knowledge_neurons, SCORES), "t must lie strictly between", [*NO_FACTOR, 0, 1]),
    ("t", partial(knowledge_neurons, SCORES), "t must lie strictly between", [1.5, np.ones(2)]),
    ("scores", knowledge_neurons, "scores must be real", [None, "abc", [[["a"]]], [[[1j]]]]),
    ("scores", knowledge_neurons, "must have the shape", [[[1, 2], [3]], np.zeros((1, 0, 3))]),
    ("scores", knowledge_neurons, r"must have the shape.*\(1, 1\)", [[[1.0]]]),
    ("scores", knowledge_neurons, "query 1 has non-finite", [[[[1.0]], [[-INF]]]]),
    ("KN sets", consistency, "consistency needs", [None, 3, [], [set()], [None, None], [3, 4]]),
    ("KN sets", consistency, "consistency needs", [[[[1]], [[1]]]]),
    ("CAS weights", cas("b1"), "is not offered", [*NO_NUMBER, 0.75]),
    ("CAS threshold", cas("threshold"), "threshold .*not offered", [*NO_NUMBER, 0, 0.05, 1]),
    ("CAS score", cas("score"), "CAS score 'mean' is unknown", ["mean"]),
    ("neurons", scaled, "neuron", ["ab", b"ab", [5], 5, (3, 17), [(1, 2, 3)], [(1,)], None]),
    ("neurons", scaled, "neuron", [[(one, 1)] for one in (*NO_INDEX, 3)] + [[(0, 128)], [(0, -1)]]),
    ("neurons", scaled, "neurons must be a set", [{(0, 1): 2.0}, pd.DataFrame([[0, 1]])]),
    ("factor", lambda v: scaled([(0, 1)], v), "factor is", [*NO_FACTOR, -INF]),
    ("factor", lambda v: scaled([(0, 1)], v), RIGHT, [-1, 0, 2, np.float64(0.5), np.float32(0.5)]),
    ("synapses", scaled_synapses, "synapse", [5, None, "abc", [5], (0, 1, 2), [(0, 0)]]),
    ("synapses", scaled_synapses, "synapse", [[(one, 0, 0)] for one in (*NO_INDEX, 64)]),
    ("synapses", scaled_synapses, "synapse", [[(0, 3, 0)], [(0, 0, 4)], [(0, 0, 0.5)]]),
    ("factor", lambda v: scaled_synapses({(0, 1, 2)}, v), "factor is", [*NO_FACTOR, -1]),
    ("alpha", found("alpha"), "alpha is", [*NO_FACTOR, 0, -0.1, 1.01, [0.3]]),
    ("score", found("score"), "score .* is unknown", [["sum"]]),
    ("op", edit("op"), "op .* use one of erase", ["zero", None]),
    ("lambda1", edit("lambda1"), "lambda1 is", NO_FACTOR),
    ("lambda1", lambda v: edited(lm=overflowing(), lambda1=v), "lambda1.*overflows", [3e38]),
    ("old", edit("old"), "token|object", [5, b"x", [5.7], [True], ["a"], [[1]], [-1], [97]]),
    ("old", edit("old"), "token|object", [[10**30], [], "", " ", "\ud800", [None]]),
    ("old", edit("old"), "needs both objects", [None]),
    ("embedding", edit("embedding"), "embedding .* is unknown", [["input"]]),
    ("texts", lambda v: perplexity(tiny(), v), "text", [None, 3, "5 6 7", [], [None], [3]]),
    ("texts", lambda v: perplexity(tiny(), v), "text", [[b"5 6"], [""], ["5"], ["5 \ud800 6"]]),
    ("texts", lambda v: perplexity(tiny(), v, 65), "65 tokens.*reads at most 64", [["5 " * 65]]),
    ("length", lambda v: perplexity(tiny(), ["5 6 7"], v), "max_tokens is", [*NO_COUNT, 1, INF]),
    ("sample", facts(SAMPLE), f"{SAMPLE} .*: want an integer, at least 1", [*NO_COUNT[3:], 1.0]),
    ("sample", facts(SAMPLE), RIGHT, [10**30, np.int64(1), None]),
    ("seed", facts("seed"), "seed .*: want", [*NO_NUMBER, -1, 0.0]),
    ("seed", facts("seed"), RIGHT, [10**30]),
    ("min_patterns", facts("min_patterns"), "min_patterns .*: want", NO_COUNT),
    ("min_patterns", lambda v: load_facts(min_patterns=v), "min_patterns=1000000000", [10**9]),
    ("middle", facts("middle"), "middle .* is unknown", ["CUT", None]),
    ("relations", facts("relations"), "relation", ["P36", [], 7, [3], [None], ["P36.jsonl"]]),
    ("relations", facts("relations"), "relation", [["P36", "../P36"], ["/etc/passwd"], ["P36\0"]]),
    ("dataset", load_facts, "dataset", [*NOWHERE, "DEMO", "demo/"]),
    ("text for perplexity", perplexity_texts, "perplexity text", NOWHERE),
    ("fact", lambda v: Fact(*v), "fact ", [(1, "s", "o", ("a",)), ("P", None, "o", ("a",))]),
    ("fact", lambda v: Fact(*v), "fact ", [("P", "s", b"o", ("a",)), ("P", "s", "o", {"a": 1})]),
    ("prompts", lambda v: Fact("P", "s", "o", v), "fact ", [None, "one text", [1], ["a", None]]),
    ("device", on_gpt2("device"), "device .*use cpu", ["gpu", "meta", "xpu", "cuda:99", "cuda:-1"]),
    ("device", on_gpt2("device"), "device .*use cpu", ["", 0, True, [1], {}]),
    ("dtype", on_gpt2("dtype"), "dtype .* is unknown", ["float8", torch.int32, 32, True, {}]),
    ("model", load_model, "model|folder", [*NOWHERE, " ", "demo/", "demo/gpt9", "demo/../gpt2"]),
    ("model", load_model, "could not load.*offline, pass the folder of a downloaded", ["some/one"]),
    ("model", load_model, "model|folder", ["demo/gpt2/", "demo/gpt2\n", "\ud800/x/y", "./none"]),
    ("model", load_model, "model|folder", ["..", "/", "../../etc/passwd", "a/b/c", "..\\a\\b"]),
    ("model", load_model, "model|folder", ["https://a/b/c", "file:///etc/passwd"]),
    ("output", paths.run_folder, "output", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", "a\n"]),
    ("output", paths.run_folder, "output", [" a", "-a", ".a", "a:b", "\u202ea", "😀", 3, None]),
    ("model's folder name", paths.slug, "model", ["", " \n", None, 3]),
    ("folder", lambda v: save_edited(tiny(), v, [(0, 0)], "erase"), "folder|is a file", PLACES),
    ("lm", lambda v: ON_LM[v]("demo/gpt2"), "lm is a str: give what load_model", ON_LM),
]
EACH = [(call, said, value) for _, call, said, values in CALLS for value in values]
IDS = [f"{kind} {ascii(value):.40}" for kind, _, _, values in CALLS for value in values]


def overflowing():
    return tiny_lm("gpt2", torch.float32, scale=40.0)


@contextmanager
def untouched(lm):
    """Nothing that is refused leaves a mark on the model."""
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    yield
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@pytest.mark.filterwarnings("ignore:relation .* has . patterns")
@pytest.mark.parametrize("call, said, value", EACH, ids=IDS)
def test_a_call_gives_the_right_result_or_names_what_is_wrong(call, said, value, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with untouched(tiny()):
        if said == RIGHT:
            call(value)
        else:
            with pytest.raises(ValueError, match="(?s)" + said) as caught:
                call(value)
            own = type(caught.value).__module__ != "builtins"
            assert own or type(caught.value) is ValueError  # no UnicodeError


def test_values_that_are_taken_mean_what_they_say():
    lm, query, pairs = tiny(), (["5 6 7"], ["8"]), {(1, 2), (0, 5)}
    with scale_neurons(lm, pairs, 0):
        wanted = answer_probability(lm, *query)
    assert not torch.equal(wanted, answer_probability(lm, *query))
    one_twice, integers = [(1, 2), (1, 2), (0, 5)], {(np.int64(1), np.int32(2)), (0, 5)}
    for same in (one_twice, integers, torch.tensor([[1, 2], [0, 5]])):
        with scale_neurons(lm, same, np.float64(0.0)):
            assert torch.equal(answer_probability(lm, *query), wanted)
    with edit_weights(lm, pairs, "update", old=[5, 6], new=[7]):
        wanted = lm.value_vectors(1)[2].clone()
    for same in (np.array([5, 6]), torch.tensor([5, 6]), "5 6", (5, 6)):
        with edit_weights(lm, pairs, "update", old=same, new=[7]):
            assert torch.equal(lm.value_vectors(1)[2], wanted)
    for t in (0.2, np.float32(0.2)):
        assert knowledge_neurons(SCORES, t) == [{(0, 1), (0, 2)}]
    assert perplexity(lm, ["5 6 7"], 10**30) == perplexity(lm, ["5 6 7"])
    assert answer_probability(lm, [], []).shape == (0,)
    assert attribute(lm, [], []).scores.shape == (0, lm.num_layers, lm.num_neurons)


# --- settings of the process ----------------------------------------------------------------------
def every_number(lm):
    """A result of each kind of computation."""
    query, ids = (["10 11 12 13 14"], ["15 16"]), lm.encode("10 11 12 13 14", "15 16")
    found = [attribute(lm, *query, method=method, steps=3).scores for method in METHODS]
    found.append(attribute(lm, *query, rule="converged", steps=3).scores)
    found.append(answer_probability(lm, *query))
    with scale_neurons(lm, {(0, 1), (2, 3)}, 2.0):
        found.append(answer_probability(lm, *query))
    with edit_weights(lm, {(0, 1)}, "update", old=[20, 21], new=[30]):
        found.append(answer_probability(lm, *query))
    change = virtual_edit(lm, {(1, 2), (2, 3)}, "update", old=[20, 21], new=[30])
    found.append(score_rows(lm, [ids], [(0, change)], everywhere=True).log_probability)
    found += [perplexity(lm, ["10 11 12 13"]), column_scores(lm, [ids[0]])[0][0]]
    found.append(run_rows(lm, [Row(*ids, neurons=((0, 1),))]))
    found.append(neuron_vectors(lm, torch.tensor([ids[0]], device=lm.device)))
    found.append(next_token(lm, query[0][0]))
    return [np.asarray(one) for one in found]


@contextmanager
def setting(change, value, usual):
    change(value)
    try:
        yield
    finally:
        change(usual)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default bfloat16": partial(setting, torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default float64": partial(setting, torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": partial(setting, torch.use_deterministic_algorithms, True, False),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("family", ["llama3", "gpt2"])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_caller_has_set_in_torch_changes_no_number(name, family):
    lm = tiny_lm(family, torch.float32)
    expected = every_number(lm)
    for own in (lm, None):  # a model of before, and one loaded in it
        with SETTINGS[name]():
            other = own or LanguageModel(lm.model, lm.tokenizer, lm.name)
            with torch.device("cpu"):
                ids = lm.model(torch.tensor([[5, 6]]))  # the caller's own passes stay as set
            found = every_number(other)
        wanted = torch.bfloat16 if name == "autocast" else torch.float32
        assert ids.logits.dtype == wanted
        assert all(np.array_equal(one, other) for one, other in zip(found, expected))


def test_products_of_another_precision_than_their_dtype_are_refused():
    """TF32 and bfloat16 products keep the dtype's name and not its numbers."""
    lm, query = tiny_lm("llama3", torch.float32), (["10 11 12"], ["13"])
    with setting(torch.set_float32_matmul_precision, "high", "highest"):
        for use in (
            lambda: attribute(lm, *query),
            lambda: answer_probability(lm, *query),
            lambda: find_synapses(lm, *query[0]),
            lambda: LanguageModel(lm.model, lm.tokenizer, "again"),
        ):
            with pytest.raises(ValueError, match="set_float32_matmul_precision..highest.."):
                use()
    assert float(answer_probability(lm, *query)[0]) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="about GNU's OpenMP")
@pytest.mark.parametrize("threads, set_by", [(2, "OTHER"), (1, "OTHER"), (2, "GOMP_SPINCOUNT")])
def test_torch_loaded_first_is_said_where_threads_will_spin(threads, set_by, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(set_by, "1000")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    said = threads > 1 and set_by == "OTHER"
    with pytest.warns(match="torch was imported before qlutils") if said else nullcontext():
        runpy.run_path(str(paths.PACKAGE / "__init__.py"))


def test_a_model_in_a_linked_or_oddly_named_folder_is_the_model(tmp_path):
    plain = Path(save_checkpoint(tmp_path / "plain", "gpt2"))
    expected = score_queries(load_model(str(plain), device="cpu"), [([5, 6], [7])]).log_probability
    (tmp_path / "link").symlink_to(plain, target_is_directory=True)
    odd = "sp ace,{brace} %s,-dash,caf\u00e9,مدينة,😀,a'b\"c,new\nline,..hidden..".split(",")
    for name in ["link", *odd]:
        folder = tmp_path / name
        if name != "link":
            plain = plain.rename(folder)
        lm = load_model(str(folder), device="cpu")
        assert score_queries(lm, [([5, 6], [7])]).log_probability == expected
        slug = paths.slug(str(folder))
        assert Path(slug).name == slug
