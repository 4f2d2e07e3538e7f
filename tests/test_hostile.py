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
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import mistune
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import save_checkpoint, tiny_lm, word_tokenizer

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
from qlutils.attribution.attribute import METHODS
from qlutils.change.editing import virtual_edit
from qlutils.change.rows import score_queries, score_rows
from qlutils.change.synapses import Row, column_scores, run_rows
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
# kind -> names; each is used as a subject and as an object
TEXTS = {
    "combining marks": ["ab \u0301\u20dd\u0903 cd"],
    "a combining mark first": ["\u0301abc", "\u0345abc"],
    "decomposed letters (NFD)": [unicodedata.normalize("NFD", city) for city in CITIES],
    "composed letters (NFC)": [unicodedata.normalize("NFC", city) for city in CITIES],
    "compatibility forms (NFKC twins)": ["ﬁn", "①②", "Ⅻ", "ｆｕｌｌ", "㎏"],
    "astral planes": ["\U00010000\U0001f9ff", "\U0001d11e"],
    "unassigned code points": ["ab \u0378 cd", "ab \U000e0080 cd"],
    "noncharacters": [f"ab {sign} cd" for sign in "\ufdd0\ufffe\uffff\U0010ffff"],
    "private use": ["ab \ue000\U000f0000 cd"],
    "the replacement character": ["ab \ufffd cd", "ab \ufffd\ufffd cd"],
    "right-to-left script": ["\u05d0\u05ea\u05d1", "\u05ea"],
    "mixed directions": ["abc מדינה 123", "القاهرة (Cairo)"],
    "bidi controls": ["ab \u202a\u202e cd", "ab \u2066\u2069\u200e cd"],
    "emoji": ["😀🎉🚀", "☃⚠️"],
    "ZWJ sequences and skin tones": ["👩‍🚀", "👨‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈"],
    "flags and tag sequences": [
        "🇫🇷",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    ],
    "zero-width characters": ["ab \u200b\u200c\u200d cd", "ab \u2060\ufeff\u00ad cd"],
    "nothing visible": ["\u200b", "\u2060\u200d", "\u3164", "\u115f"],
    "control characters": ["ab \x01\x1b cd", "ab \x7f\x9f cd"],
    "NUL": ["ab \0 cd", "ab \0\0 cd"],
    "newline": ["ab \n cd", "ab \n\n cd", "ab \n-  cd"],
    "carriage return": ["ab \r cd", "ab \r\n cd"],
    "tab": ["ab \t cd", "ab \t\t cd"],
    "line and paragraph separators": [f"ab {sign} cd" for sign in "\u2028\u2029\x85\x0b\x0c"],
    "non-breaking and other spaces": ["ab \u00a0\u2007\u202f cd", "ab \u3000\u1680\u2003 cd"],
    "several spaces": ["ab    cd", "ab       cd"],
    "variation selectors": ["☃︎", "☃️", "葛󠄀"],
    "scripts without spaces": ["東京", "กรุงเทพ", "한국", "ᄒ\u1161ᆫ"],
    "letters that change length with case": ["STRASSE ß", "İi̇", "ŉ", "ﬃ"],
    "digits of other scripts": ["٣٤", "四", "²³", "Ⅷ", "½"],
    "the slots of a pattern": ["[X]", "[Y]", "a [Y] b [X]", "[X][Y]"],
    "regular expression": [r"^a.*(b|c)+$", r"(?P<x>", r"[a-", "*?+"],
    "format braces": ["{}", "{0}", "{subject!r}", "}{", "%s %(a)s %d", "${HOME}", "{{7*7}}"],
    "backslashes": ["\\", "a\\b", r"\1 \g<0>", r"\u0041", "\\n", "ends in \\"],
    "pipes": ["a|b", "|", "a||b", r"a\|b", r"\\|"],
    "quotes and commas": ['"', "'", 'a,"b",c', '"""', "`", "a;b"],
    "markup": ["<b>a</b>", "<script>x()</script>", "&amp;", "[a](b)", "**a**", "<!-- a -->", "# a"],
    "LaTeX": [r"\end{tabular}", "a & b", "50 %", "$x_1^2$", "#1", "~", r"\\", "[1cm]"],
    "spreadsheet formula": ["=1+1", "+1", "-1", "@a", "=HYPERLINK(1)"],
    "looks like no text": "nan NaN NA null None True 1e5 007 1.0 inf -".split(),
    "looks like a path": ["../../etc/passwd", "/", "..", "a/b", "C:\\x", "~", "con"],
    "spells a special token": ["<|endoftext|>", "a <|endoftext|> b", "<s>", "</s>", "[MASK]"],
    "one character": ["x", "\u0e01", "\u4e00"],
    "space at the ends": [" a ", "\u00a0b\u00a0", "\tc\n"],
    "long, within the context": ["word " * 40 + "end", "x" * 200],
}
NAMES = {kind: unicodedata.normalize("NFC", texts[0].strip()) for kind, texts in TEXTS.items()}


def write(folder, patterns, pairs, relation="P1", ensure_ascii=True):
    """A data set in ParaRel's layout; returns its folder."""
    for kind, records in (
        ("pattern_data/graphs_json", [{"pattern": pattern} for pattern in patterns]),
        ("trex_lms_vocab", [{"sub_label": s, "obj_label": o} for s, o in pairs]),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record, ensure_ascii=ensure_ascii) + "\n" for record in records]
        (folder / kind / f"{relation}.jsonl").write_bytes("".join(lines).encode("utf-8"))
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
        subject = fact.subject
        asked = (
            f"{subject} lies in",
            f"the home of {subject} is",
            f"as {subject} was found, it was in",
        )
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


def test_white_space_at_the_end_of_a_prompt_is_refused_where_it_says_nothing_about_the_answer():
    lm = gpt2()
    for end in ("\n", "\t", " \n ", "\u3000", "\u00a0"):
        said = r"prompt 'it is in.*' ends with '.*': remove it, or show where.*\[Y\]'"
        with pytest.raises(ValueError, match=said):
            attribute(lm, [f"it is in{end}"], ["Paris"])
    for same in ("it is in  ", "it is in [Y]"):
        assert lm.encode(same, "Paris") == lm.encode("it is in", "Paris")
    assert lm.encode("it is in\n [Y]", "Paris")[0] == lm.tokenizer("it is in\n").input_ids
    with pytest.raises(ValueError, match="a prompt is empty"):
        lm.encode("[Y]", "Paris")


def test_a_subject_that_would_be_taken_for_the_answers_place_is_refused(tmp_path):
    data = write(tmp_path, ["[X] [Y]", "[X] is [Y]", "so [X] is [Y]"], [("a [Y]", "Oslo")])
    with pytest.raises(ValueError, match=r"P1.jsonl:1: the subject 'a \[Y\]' ends a prompt with"):
        load_facts(data)


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


LATEX = {
    "\\textbackslash{}": "\\",
    "\\textasciitilde{}": "~",
    "\\textasciicircum{}": "^",
    "\\textless{}": "<",
    "\\textgreater{}": ">",
    "\\textbar{}": "|",
    **{f"\\{sign}": sign for sign in "&%$#_{}"},
}


def in_tables(texts, folder):
    """The texts read back from a table: {"csv": by the csv module, "pandas", "md", "tex": lists of
    texts}."""
    count = len(texts)
    files = write_table(pd.DataFrame({"text": texts, "n": range(count)}), "t", folder)
    kinds = {kind: path.read_bytes().decode("utf-8") for kind, path in files.items()}
    (_, name), *rows = csv.reader(io.StringIO(kinds["csv"], newline=""))
    assert name == "n" and [n for _, n in rows] == list(map(str, range(count)))
    frame = pd.read_csv(files["csv"], dtype=str, keep_default_na=False)
    read = {"csv": [text for text, _ in rows], "pandas": frame["text"].tolist()}

    parsed = mistune.create_markdown(renderer="ast", plugins=["table"])(kinds["md"])
    [body] = [part for part in parsed[0]["children"] if part["type"] == "table_body"]
    assert [len(row["children"]) for row in body["children"]] == [2] * count
    lines = re.split(r"\r\n|\r|\n", kinds["md"])[2:-1]
    assert len(lines) == count
    read["md"] = [line[2 : line.rindex(" | ")].replace(r"\|", "|") for line in lines]

    lines = kinds["tex"].split("\\midrule\n")[1].split("\n\\bottomrule")[0].split("\n")
    cells = [re.fullmatch(r"(?s)(.*) & (\d+) \\\\", line).groups() for line in lines]
    assert [int(n) for _, n in cells] == list(range(count))
    macros = "|".join(map(re.escape, LATEX))
    texts = [cell.removeprefix("{}") for cell, _ in cells]
    read["tex"] = [re.sub(macros, lambda found: LATEX[found[0]], text) for text in texts]
    return read


def test_odd_texts_are_kept_by_tables(tmp_path):
    """In CSV to the character; where a table is for reading, a line break becomes a space."""
    texts = [name for kind, name in NAMES.items() if kind != "carriage return"]
    read = in_tables(texts, tmp_path)
    assert read["csv"] == read["pandas"] == texts
    read["tex"] = [text.replace("{[}", "[").replace("{]}", "]") for text in read["tex"]]
    assert read["md"] == read["tex"] == [text.replace("\n", " ") for text in texts]


@pytest.mark.parametrize(
    "text, shown", [("a\rb", "a b"), ("a\r\nb", "a b"), (r"a\|b", r"a\\|b")], ids=ascii
)
def test_texts_that_break_a_table_apart_are_kept_too(text, shown, tmp_path):
    read = in_tables([text, "next"], tmp_path)
    assert read["csv"] == read["pandas"] == [text, "next"]
    assert [one.split() for one in read["tex"]] == [text.split(), ["next"]]
    assert read["md"] == [shown, "next"]


# --- facts that are easily mixed up ---------------------------------------------------------------
TWINS = {
    "answers that are prefixes": [("ann", "New"), ("ann", "New York"), ("ann", "New York City")],
    "an answer inside its subject": [("Paris Hilton", "Paris"), ("Paris", "Paris")],
    "names that differ in case only": [("Ann", "Oslo"), ("ann", "Oslo"), ("ANN", "oslo")],
    "invisible differences": [("ann", "Oslo"), ("a\u200bnn", "Oslo"), ("ann\u2060", "Oslo")],
    "names that look alike": [("Аnn", "Oslo"), ("Ann", "Oslo")],
    "parts that join to one text": [("a|b", "c"), ("a", "b|c"), ("a\\", "|b|c"), ("a\\|", "b|c")],
}


@pytest.mark.parametrize("kind", TWINS)
def test_facts_that_look_alike_stay_apart(kind, tmp_path):
    facts = load_facts(write(tmp_path, PATTERNS, TWINS[kind]))
    assert [(fact.subject, fact.object) for fact in facts] == TWINS[kind]
    assert len({fact.id for fact in facts}) == len(facts)
    unit = localise_unit(gpt2(), [asdict(fact) for fact in facts], steps=2)
    assert unit.groupby("fact", sort=False).size().tolist() == [3] * len(facts)
    assert unit["cas_layer"].notna().sum() == len(facts)
    check_probabilities(unit["prompt"].tolist(), unit["object"].tolist())


def test_a_name_in_composed_and_in_decomposed_letters_is_one_fact_with_one_set_of_prompts(tmp_path):
    composed, apart = "Malm\u00f6", "Malmo\u0308"
    pairs = [(apart, "Oslo"), (composed, "Oslo"), ("ann", composed), ("ann", apart)]
    facts = load_facts(write(tmp_path / "data", PATTERNS, pairs))
    found = [(fact.subject, fact.object) for fact in facts]
    assert found == [(composed, "Oslo"), ("ann", composed)]
    assert facts[0].prompts[0] == f"{composed} lies in"
    lines = [{"subject": s, "object": o, "prompts": ["a b", "c d"]} for s, o in pairs]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    own = [fact.id for fact in load_facts(tmp_path / "own.jsonl")]
    assert own == [f"facts|{composed}|Oslo", f"facts|ann|{composed}"]


# --- files ----------------------------------------------------------------------------------------
GOOD = [("ann", "Oslo"), ("bob", "Rome")]
LINES = [json.dumps({"sub_label": s, "obj_label": o}) for s, o in GOOD]
PLAIN = "\n".join(LINES) + "\n"
ANN = '{"subject": "ann", "object": "Oslo", "prompts": ["ann lies in", "c d", "e f"]}'
HALF = r'{"sub_label": "a", "obj_label": "\ude00"}'
PAIR = r'{"sub_label": "a\ud83d\ude00", "obj_label": "x"}'
BACKWARDS = [f"[Y] holds [X] {i}." for i in range(3)]
ONE_PROMPT = ANN.replace(', "c d", "e f"', "")
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


def changed(change):
    """Makes a good data set, whose file of facts is changed; `change` may name another place."""

    def make(folder):
        file = write(folder, PATTERNS, GOOD) / "trex_lms_vocab" / "P1.jsonl"
        return change(folder, file) or folder

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


def symlinked_file(folder, file):
    file.rename(folder / "elsewhere")
    file.symlink_to(folder / "elsewhere")


def symlinked(folder, file):
    (folder / "link").symlink_to(folder, target_is_directory=True)
    return folder / "link"


def dangling(folder, file):
    file.unlink()
    file.symlink_to(folder / "nowhere")


def a_folder_for_a_file(folder, file):
    file.unlink()
    file.mkdir()


def in_capitals(folder, file):
    for file in list(folder.rglob("*.jsonl")):
        file.rename(file.with_suffix(".JSONL"))


def without(part):
    def move(folder, file):
        (folder / part).rename(folder / "moved")

    return move


def link_to_itself(folder):
    (folder / "pattern_data").symlink_to(folder / "pattern_data")
    return folder


def a_file_for_a_folder(folder):
    (folder / "data").write_text("{}")
    return folder / "data"


NO_OBJECT = {  # contents of which the first line is no JSON object
    "CR lines of an old Mac": PLAIN.replace("\n", "\r"),
    "zero bytes": b"\0" * 64,
    "UTF-16": PLAIN.encode("utf-16"),
    "Latin-1": '{"sub_label": "é", "obj_label": "x"}'.encode("latin-1"),
    "overlong UTF-8": b'{"sub_label": "\xc0\xaf", "obj_label": "x"}',
    "a surrogate encoded in UTF-8": b'{"sub_label": "\xed\xa0\x80", "obj_label": "x"}',
    "a JSON array": json.dumps([{"sub_label": "a", "obj_label": "b"}]),
    "a JSON number": "3",
    "a JSON string": '"a"',
    "JSON null": "null",
    "a huge integer": '{"sub_label": ' + "9" * 5000 + ', "obj_label": "b"}',
    "JSON nested too deep": "[" * 100_000,
    "single quotes": "{'sub_label': 'a', 'obj_label': 'b'}",
    "two objects on a line": LINES[0] + LINES[1],
    "HTML, as from a failed download": "<!DOCTYPE html><html></html>",
}
BAD_NAMES = {  # as JSON writes them, and what the error says
    "half of a surrogate pair, escaped": (r'"a\ud83d b"', "surrogate"),
    "JSON NaN": ("NaN", "nan"),
    "JSON Infinity": ("-Infinity", "-inf"),
    "null": ("null", "None"),
    "a number": ("1789", "1789"),
    "a list": ('["a"]', r"\['a'\]"),
    "a bool": ("true", "True"),
    "an empty text": ('""', "''"),
    "spaces": ('" \u00a0\\t\u2003"', "not empty"),
}
OWN = {  # changes of a line of one's own facts, and what the error says
    "no subject": (dict(subject="absent"), "field 'subject'"),
    "an empty object": (dict(object=" "), "field 'object'"),
    "a relation that is no text": (dict(relation=36), "field 'relation'"),
    "no prompts": (dict(prompts="absent"), "field 'prompts' must be a list"),
    "one text for prompts": (dict(prompts="b is"), "field 'prompts' must be a list.*'b is'"),
    "an empty prompt": (dict(prompts=["a b", " "]), ".*holds ' '"),
    "a number for a prompt": (dict(prompts=["a b", 1]), ".*holds 1"),
    "text after the answer's place": (dict(prompts=["a b", "[Y] b"]), r".*text follows \[Y\]"),
    "a newline at the end": (dict(prompts=["a b", "a b\n"]), r".*ends with '\\n'"),
    "half of a surrogate pair": (dict(prompts=["a b", "a \ud83d"]), ".*surrogate"),
    "other prompts": (dict(subject="ann", object="Oslo"), "the fact of .*own.jsonl:1"),
}
# kind -> (data set, what is right: the facts' subjects, or what the error says)
FILES = {
    "own facts": (own_line(relation="P1"), ["bob", "ann"]),
    "own facts without a relation": (own_line(), ["ann", "bob"]),
    "own facts, .JSONL": (own_facts(name="own.JSONL"), ["ann"]),
    "own facts with fields of their own": (own_line(relation="r", id=3, note="x"), ["ann", "bob"]),
    "own facts, one twice": (own_facts(ANN), ["ann"]),
    "own facts, one prompt each": (own_line(prompts=["c d", "c d "]), ["ann"]),
    "own facts, none of two prompts": (own_facts(plain=ONE_PROMPT), "no fact with 2 prompts"),
    "own facts, no JSON": (own_facts("ann"), "own.jsonl:2: not a JSON object"),
    "own facts, an empty file": (own_facts(plain=""), "own.jsonl is empty"),
    "own facts, no such file": (lambda folder: folder / "none.jsonl", "missing data file .*none"),
    "BOM at the start": (data_set(content=b"\xef\xbb\xbf" + PLAIN.encode()), ["ann", "bob"]),
    "BOM in the middle": (data_set(content=f"{LINES[0]}\n\ufeff{LINES[1]}"), "P1.jsonl:2"),
    "CRLF lines": (data_set(content=PLAIN.replace("\n", "\r\n")), ["ann", "bob"]),
    "no newline at the end": (data_set(content=PLAIN.rstrip()), ["ann", "bob"]),
    "blank lines": (data_set(content="\n   \n\t\n".join(["", *LINES, ""])), ["ann", "bob"]),
    "empty file": (data_set(content=""), "P1.jsonl is empty"),
    "only blank lines": (data_set(content="\n \n"), "P1.jsonl is empty"),
    "only a BOM": (data_set(content=b"\xef\xbb\xbf"), "P1.jsonl is empty"),
    "truncated JSON": (data_set(content=PLAIN[:-20]), "P1.jsonl:2: not a JSON object"),
    "truncated UTF-8": (data_set(content=LINES[0].encode() + b'\n{"a": "\xe2\x82'), "P1.jsonl:2"),
    "half of a pair, as an object": (data_set(content=HALF), "field 'obj_label'.*surrogate"),
    "a whole surrogate pair, escaped": (data_set(content=PAIR), ["a😀"]),
    "a missing field": (data_set(content='{"sub_label": "a"}'), "jsonl:1: field 'obj_label'.*None"),
    "extra fields": (data_set(content=LINES[0][:-1] + ', "more": {"x": [1, null]}}'), ["ann"]),
    "a fact twice": (data_set(content=PLAIN + PLAIN), ["ann", "bob"]),
    "one fact": (data_set(content=LINES[0]), ["ann"]),
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
    "relation files in capitals": (changed(in_capitals), ["ann", "bob"]),
    "two files of one relation": (
        changed(lambda folder, file: file.with_suffix(".JSONL").write_text(PLAIN) and None),
        "relation P1 has two files",
    ),
    "no folder of facts": (changed(without("trex_lms_vocab")), "missing data file .*P1.jsonl"),
    "no folder of patterns": (changed(without("pattern_data/graphs_json")), "unknown dataset"),
    "an empty folder": (lambda folder: folder, "unknown dataset.*pattern_data"),
    "a file for a folder": (a_file_for_a_folder, "unknown dataset"),
    "a folder for a file": (changed(a_folder_for_a_file), "missing data file .*P1.jsonl"),
    "a symbolic link to the folder": (changed(symlinked), ["ann", "bob"]),
    "a symbolic link to a file": (changed(symlinked_file), ["ann", "bob"]),
    "a dangling link": (changed(dangling), "missing data file .*P1.jsonl"),
    "a link to itself": (link_to_itself, "unknown dataset"),
    "a relation named by a digit that is none": (data_set(relations="²³"), ["ann", "bob"] * 2),
    "relations in other scripts": (data_set(relations=["город", "العاصمة"]), ["ann", "bob"] * 2),
    "dots and spaces": (data_set(relations=["P1.old copy", "..P2"]), ["ann", "bob"] * 2),
    "a file name that is no Unicode": (data_set(relations=["P\udcff"]), "file in .*surrogate"),
}


for kind, content in NO_OBJECT.items():
    FILES[kind] = data_set(content=content), "P1.jsonl:1: not a JSON object"
for kind, (name, said) in BAD_NAMES.items():
    content = f'{{"sub_label": {name}, "obj_label": "b"}}'
    FILES[f"{kind} as a name"] = data_set(content=content), f"jsonl:1: field 'sub_label'.*{said}"
for kind, (changes, said) in OWN.items():
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
        assert [fact.subject for fact in facts] == ["ann", "bob"] * 3
        orders.append([fact.relation for fact in facts])
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    "content, outcome",
    [
        (b"\xef\xbb\xbfOne line.\nTwo.", ["One line.", "Two."]),
        (b"One.\r\nTwo.\r\n", ["One.", "Two."]),
        (b"caf\xe9", "text.txt is not UTF-8"),
        (b"a\xe2\x82", "text.txt is not UTF-8"),
        (b"", "no paragraph"),
        (b"\xef\xbb\xbf\n", "no paragraph"),
        (PLAIN.encode("utf-16"), "text.txt is not UTF-8"),
    ],
    ids=["BOM", "CRLF", "Latin-1", "truncated UTF-8", "empty", "only a BOM", "UTF-16"],
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


def kns(t):
    return knowledge_neurons(SCORES, t)


def ask(prompts, answers=("x",), **options):
    return answer_probability(gpt2(), prompts, answers, **options)


def attributed(name):
    usual = dict(prompts=["the home of ann is"], answers=["Oslo"], steps=2)
    return lambda value: attribute(gpt2(), **{**usual, name: value})


def entered(context):
    with context:
        return RIGHT


def scaled(neurons, factor=0.0):
    return entered(scale_neurons(tiny(), neurons, factor))


def scaled_synapses(columns, factor=0.0):
    return entered(scale_synapses(tiny(), columns, factor))


def found(name):
    return lambda value: find_synapses(tiny(), **{"prompt": "5 6 7", name: value})


def edited(name):
    usual = dict(neurons=[(0, 1)], op="update", old=[5], new=[6])
    return lambda value: entered(edit_weights(tiny(), **{**usual, name: value}))


def cas(name):
    return lambda value: cas_neurons(cas_candidates(SCORES), **{name: value})


def facts(name):
    some = dict(relations=["P36"], facts_per_relation=1)
    return lambda value: load_facts("demo", **{**some, name: value})


def overflowing(lambda1):
    lm = tiny_lm("gpt2", torch.float32, scale=40.0)
    return entered(edit_weights(lm, [(0, 1)], "update", old=[5], new=[6], lambda1=lambda1))


def on_gpt2(name):
    return lambda value: load_model("demo/gpt2", **{name: value})


NAN, INF, HUGE = float("nan"), float("inf"), 10**400
LONG, IS, SAMPLE = "word " * 600, "ann is in", "facts_per_relation"
NO_NUMBER = ("0", None, NAN, True)
NO_FACTOR = (*NO_NUMBER, INF, 1e39, HUGE, 1j, [0])
NO_COUNT = (*NO_NUMBER, -1, 0, 1.5)
PLACES = (None, 3, b"x", __file__)
NOWHERE = (3, None, b"demo", ["demo"], "", "nowhere", "a\0b", "~nosuchuser/x", "x" * 5000, "\ud800")
# (kind, call, what the error says or RIGHT where the value must be taken, values)
CALLS = [
    ("prompt", lambda v: ask([v]), "prompt is empty", ["", " \u00a0\n"]),
    ("prompt", lambda v: ask([v], ["6"]), "prompt '5' is a single token", ["5"]),
    ("prompt", lambda v: ask([v]), "prompt 'word word.*reads at most 512", [LONG]),
    ("prompt", lambda v: ask([v]), r"ann \\ud800 is in.*surrogate", ["ann \ud800 is in"]),
    ("prompt", lambda v: ask([v]), "prompt must be text, got (bytes|int)", [IS.encode(), 3]),
    ("answer", lambda v: ask([IS], [v]), "answer to 'ann is in'", ["", "\u00a0 \t", None]),
    ("answer", lambda v: ask([IS], [v]), "'ann is in'.*reads 512", [LONG]),
    ("answer", lambda v: ask([IS], [v]), r"\\udfff.*surrogate", ["\udfff"]),
    ("prompts", ask, "prompts must be a list", [IS, None, {IS: 3}, {IS}, pd.DataFrame([IS])]),
    ("prompts", ask, RIGHT, [(IS,), np.array([IS]), pd.Series([IS])]),
    ("prompts", ask, "2 prompts but 1 answers", [["a b", "c d"]]),
    ("answers", lambda v: ask([IS], v), "answers must be a list.*3", [3]),
    ("kind", lambda v: ask([IS], answer=v), "answer .* is unknown", ["last", ["all"]]),
    ("attributed prompts", attributed("prompts"), "prompts", [None, IS]),
    ("attributed answers", attributed("answers"), "answers", [7]),
    ("steps", attributed("steps"), "steps is", [*NO_COUNT, 1, 2.0, np.float64(3), [20]]),
    ("steps", attributed("steps"), RIGHT, [np.int64(3)]),
    ("rule", attributed("rule"), "rule .* use one of right", ["simpson", None, 3, ["right"]]),
    ("method", attributed("method"), "method .* use one of ig", ["IG", None, 0, []]),
    ("site", attributed("site"), "site .*is unknown", ["output", None]),
    ("amig_factor", attributed("amig_factor"), "amig_factor 'b' is unknown", ["b"]),
    ("row_budget", attributed("row_budget"), "row_budget is", [0, -1, 1.5, "x", True, NAN]),
    ("t", kns, "t must lie strictly between 0 and 1, not ", [*NO_FACTOR, 0, 1, -0.1, 1.5, -INF]),
    ("t", kns, "t must lie strictly between 0 and 1, not ", [[0.2], np.array([0.1, 0.2])]),
    ("t", kns, RIGHT, [np.float32(0.2), np.float64(0.2)]),
    ("scores", knowledge_neurons, "scores must be real", [None, "abc", [[["a"]]], [[[1j]]]]),
    ("scores", knowledge_neurons, "must have the shape", [[[1, 2], [3]], np.zeros((1, 0, 3))]),
    ("scores", knowledge_neurons, r"must have the shape.*\(1, 1\)", [[[1.0]]]),
    ("scores", knowledge_neurons, "query 0 has non-finite", [[[[NAN]]]]),
    ("scores", knowledge_neurons, "query 1 has non-finite", [[[[1.0]], [[-INF]]]]),
    ("KN sets", consistency, "consistency needs", [None, 3, [], [set()], [None, None], [3, 4]]),
    ("KN sets", consistency, "consistency needs", [[[[1]], [[1]]]]),
    ("CAS weights", cas("b1"), "is not offered", [*NO_NUMBER, 0.75]),
    ("CAS threshold", cas("threshold"), "threshold .*not offered", [*NO_NUMBER, 0, 1]),
    ("CAS score", cas("score"), "CAS score 'mean' is unknown", ["mean"]),
    ("neurons", scaled, "neuron", ["ab", b"ab", [5], 5, (3, 17), [(1, 2, 3)], [(1,)], None]),
    ("neurons", scaled, "neuron", [[(one, 1)] for one in (True, NAN, INF, None, "a", [1], -1, 3)]),
    ("neurons", scaled, "neuron", [[(0, -1)], [(0, 128)], [(10**30, 0)], [(1.0, 2.0)], [(0.5, 1)]]),
    ("neurons", scaled, "neurons must be a set", [{(0, 1): 2.0}, pd.DataFrame([[0, 1]])]),
    ("neurons", scaled, RIGHT, [[(np.int64(1), np.int32(2))], torch.tensor([[1, 2]]), []]),
    ("factor", lambda v: scaled([(0, 1)], v), "factor is", [*NO_FACTOR, -INF]),
    ("factor", lambda v: scaled([(0, 1)], v), RIGHT, [-1, 0, 2, np.float64(0.5), np.float32(0.5)]),
    ("synapses", scaled_synapses, "synapse", [5, None, "abc", [5], (0, 1, 2), [(0, 0)]]),
    ("synapses", scaled_synapses, "synapse", [[(one, 0, 0)] for one in (-1, 64, NAN, 10**30, 0.5)]),
    ("synapses", scaled_synapses, "synapse", [[(one, 0, 0)] for one in (True, "0", None)]),
    ("synapses", scaled_synapses, "synapse", [[(0, 3, 0)], [(0, 0, 4)], [(0, 0, 0.5)]]),
    ("factor", lambda v: scaled_synapses({(0, 1, 2)}, v), "factor is", [*NO_FACTOR, -1]),
    ("alpha", found("alpha"), "alpha is", [*NO_FACTOR, 0, -0.1, 1.01, [0.3]]),
    ("score", found("score"), "score .* is unknown", [["sum"]]),
    ("prompt", found("prompt"), "prompt must be text, got list", [["5 6 7"]]),
    ("op", edited("op"), "op .* use one of erase", ["zero", None, 3, ["erase"]]),
    ("lambda1", edited("lambda1"), "lambda1 is", NO_FACTOR),
    ("lambda1", overflowing, "lambda1.*overflows", [3e38]),
    ("old", edited("old"), "token|object", [5, b"x", [5.7], [True], ["a"], [[1]], [-1], [97]]),
    ("old", edited("old"), "token|object", [[10**30], [], "", " ", "\ud800", [None]]),
    ("old", edited("old"), "needs both objects", [None]),
    ("old", edited("old"), RIGHT, [np.array([5, 6]), torch.tensor([5]), "20 21", (5,)]),
    ("embedding", edited("embedding"), "embedding .* is unknown", [["input"]]),
    ("texts", lambda v: perplexity(tiny(), v), "text", [None, 3, "5 6 7", [], [None], [3]]),
    ("texts", lambda v: perplexity(tiny(), v), "text", [[b"5 6"], [""], ["5"], ["5 \ud800 6"]]),
    ("texts", lambda v: perplexity(tiny(), v, 65), "65 tokens.*reads at most 64", [["5 " * 65]]),
    ("length", lambda v: perplexity(tiny(), ["5 6 7"], v), "max_tokens is", [*NO_COUNT, 1, INF]),
    ("length", lambda v: perplexity(tiny(), ["5 6 7"], v), RIGHT, [10**30]),
    ("sample", facts(SAMPLE), f"{SAMPLE} .*: want an integer, at least 1", [0, -1, 1.0, "2", [1]]),
    ("sample", facts(SAMPLE), f"{SAMPLE} .*: want an integer, at least 1", [True, NAN]),
    ("sample", facts(SAMPLE), RIGHT, [10**30, np.int64(1), None]),
    ("seed", facts("seed"), "seed .*: want", [*NO_NUMBER, -1, 0.0]),
    ("seed", facts("seed"), RIGHT, [10**30]),
    ("min_patterns", facts("min_patterns"), "min_patterns .*: want", NO_COUNT),
    ("min_patterns", lambda v: load_facts(min_patterns=v), "min_patterns=1000000000", [10**9]),
    ("middle", facts("middle"), "middle .* is unknown", ["CUT", None, 3, ["cut"]]),
    ("relations", facts("relations"), "relation", ["P36", [], 7, [3], [None], ["P36.jsonl"]]),
    ("relations", facts("relations"), "relation", [["P36", "../P36"], ["/etc/passwd"], ["p36"]]),
    ("relations", facts("relations"), "relation", [[""], ["P36\0"], ["*"]]),
    ("dataset", load_facts, "dataset", [*NOWHERE, "DEMO", "demo/"]),
    ("text for perplexity", perplexity_texts, "perplexity text", NOWHERE),
    ("fact", lambda v: Fact(*v), "fact ", [(1, "s", "o", ("a",)), ("P", None, "o", ("a",))]),
    ("fact", lambda v: Fact(*v), "fact ", [("P", "s", b"o", ("a",)), ("P", "s", "o", {"a": 1})]),
    ("prompts", lambda v: Fact("P", "s", "o", v), "fact ", [None, "one text", [1], ["a", None]]),
    ("device", on_gpt2("device"), "device .*use cpu", ["gpu", "meta", "xpu", "cuda:99", "cuda:-1"]),
    ("device", on_gpt2("device"), "device .*use cpu", ["", 0, 3, True, 1.5, [1], {}]),
    ("dtype", on_gpt2("dtype"), "dtype .* is unknown", ["float8", "FLOAT32", "torch.float32", {}]),
    ("dtype", on_gpt2("dtype"), "dtype .* is unknown", [torch.int32, 32, True, [1]]),
    ("model", load_model, "model|folder", [*NOWHERE, " ", "demo/", "demo/gpt9", "demo/../gpt2"]),
    ("model", load_model, "model|folder", ["demo/gpt2/", "demo/gpt2\n", "x" * 300, "\ud800/x/y"]),
    ("model", load_model, "model|folder", ["..", "/", "../../etc/passwd", "a/b/c", "..\\a\\b"]),
    ("model", load_model, "model|folder", ["./none", "https://a/b/c", "file:///etc/passwd"]),
    ("output", paths.run_folder, "output", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", "a\n"]),
    ("output", paths.run_folder, "output", [" a", "-a", ".a", "a b", "a:b", "\u202ea", "😀", 3]),
    ("output", paths.run_folder, "output", [None]),
    ("model's folder name", paths.slug, "model", ["", " \n", None, 3]),
    ("folder", lambda v: save_edited(tiny(), v, [(0, 0)], "erase"), "folder|is a file", PLACES),
]
EACH = [(call, said, value) for _, call, said, values in CALLS for value in values]
IDS = [f"{kind} {ascii(value):.40}" for kind, _, _, values in CALLS for value in values]


@contextmanager
def untouched(lm):
    """Nothing that is refused leaves a mark on the model."""
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    yield
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules()]
    assert not any(hooks)


@pytest.mark.filterwarnings("ignore:relation .* has . patterns")
@pytest.mark.parametrize("call, said, value", EACH, ids=IDS)
def test_a_call_gives_the_right_result_or_names_what_is_wrong(call, said, value, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with untouched(tiny()):
        if said == RIGHT:
            call(value)
        else:
            with pytest.raises(ValueError, match="(?s)" + said) as caught:
                call(value)
            own = type(caught.value).__module__ != "builtins"
            assert own or type(caught.value) is ValueError  # no UnicodeError


def test_values_that_are_taken_mean_what_they_say():
    lm, query = tiny(), (["5 6 7"], ["8"])
    for same in (
        [(1, 2), (1, 2), (0, 5)],
        {(np.int64(1), np.int32(2)), (0, 5)},
        torch.tensor([[1, 2], [0, 5]]),
    ):
        with scale_neurons(lm, same, np.float64(0.0)):
            found = answer_probability(lm, *query)
        with scale_neurons(lm, {(1, 2), (0, 5)}, 0):
            assert torch.equal(found, answer_probability(lm, *query))
    assert not torch.equal(found, answer_probability(lm, *query))
    for same in (np.array([5, 6]), torch.tensor([5, 6]), "5 6", (5, 6)):
        with edit_weights(lm, [(1, 2)], "update", old=same, new=[7]):
            found = lm.value_vectors(1)[2].clone()
        with edit_weights(lm, [(1, 2)], "update", old=[5, 6], new=[7]):
            assert torch.equal(lm.value_vectors(1)[2], found)
    for t in (0.2, np.float32(0.2)):
        assert kns(t) == [{(0, 1), (0, 2)}]
    assert perplexity(lm, ["5 6 7"], 10**30) == perplexity(lm, ["5 6 7"])


def test_no_queries_give_an_empty_result():
    assert answer_probability(tiny(), [], []).shape == (0,)
    assert attribute(tiny(), [], []).scores.shape == (0, tiny().num_layers, tiny().num_neurons)


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


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_products_of_another_precision_than_their_dtype_are_refused(precision):
    """TF32 and bfloat16 products keep the dtype's name and not its numbers."""
    lm, query = tiny_lm("llama3", torch.float32), (["10 11 12"], ["13"])
    with setting(torch.set_float32_matmul_precision, precision, "highest"):
        for use in (
            lambda: attribute(lm, *query),
            lambda: answer_probability(lm, *query),
            lambda: perplexity(lm, ["10 11"]),
            lambda: find_synapses(lm, *query[0]),
            lambda: LanguageModel(lm.model, lm.tokenizer, "again"),
        ):
            with pytest.raises(ValueError, match="set_float32_matmul_precision..highest.."):
                use()
    assert float(answer_probability(lm, *query)[0]) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="about GNU's OpenMP")
@pytest.mark.parametrize(
    "threads, given, said",
    [
        (2, {}, True),
        (1, {}, False),
        (2, {"GOMP_SPINCOUNT": "1000"}, False),
        (2, {"OMP_WAIT_POLICY": "PASSIVE"}, False),
    ],
)
def test_torch_loaded_first_is_said_where_threads_will_spin(threads, given, said, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(str(paths.PACKAGE / "__init__.py"))
    assert len(caught) == said
    assert all("torch was imported before qlutils" in str(one.message) for one in caught)


# --- models that do not fit together --------------------------------------------------------------
def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_named_by_text_and_token(tmp_path):
    """Else the embedding is read out of its bounds."""
    words = [str(i) for i in range(4, 97)] + ["beyond"]
    lm = load_model(save_checkpoint(tmp_path, "gpt2", word_tokenizer(words)), device="cpu")
    assert 0 < float(answer_probability(lm, ["5 6"], ["7"])[0]) < 1
    for call in (
        lambda: attribute(lm, ["5 beyond"], ["7"]),
        lambda: answer_probability(lm, ["5 6"], ["beyond"]),
        lambda: perplexity(lm, ["5 6 beyond"]),
        lambda: find_synapses(lm, "5 beyond"),
    ):
        with pytest.raises(ValueError, match=r"'beyond' \(97\).*embeds only the tokens 0 to 96"):
            call()


def test_a_model_in_a_linked_or_oddly_named_folder_is_the_model(tmp_path):
    plain = Path(save_checkpoint(tmp_path / "plain", "gpt2"))
    expected = score_queries(load_model(str(plain), device="cpu"), [([5, 6], [7])]).log_probability
    odd = "sp ace,{brace} %s,-dash,caf\u00e9,مدينة,😀,a'b\"c,new\nline,..hidden..".split(",")
    (tmp_path / "link").symlink_to(plain, target_is_directory=True)
    for name in ["link", *odd]:
        folder = tmp_path / name
        if name != "link":
            plain = plain.rename(folder)
        lm = load_model(str(folder), device="cpu")
        assert score_queries(lm, [([5, 6], [7])]).log_probability == expected
        slug = paths.slug(str(folder))
        assert Path(slug).name == slug


def test_a_fact_past_the_context_is_left_out_by_name_and_the_others_stay(tmp_path, runs):
    folder = write(tmp_path / "data", PATTERNS, [(LONG, "Paris"), ("ann", "Oslo")])
    study = Study("01_localize", model="demo/gpt2", method="ig", data=str(folder), device="cpu")
    queries = localise(study, steps=2)
    assert queries["subject"].unique().tolist() == ["ann"] and len(queries) == 3
    lost = study.load("left_out")
    assert len(lost) == 3 and lost["left_out"].str.contains("reads at most 512").all()
