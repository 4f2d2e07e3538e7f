"""Whatever is fed in ends in the right result or in one ValueError that names the culprit.

The tables below list every kind of hostile input, each in one row: TEXTS (facts that must come out
right), FILES (data sets, right or refused), CALLS (parameters, refused or right) and MODELS. Text
kinds are generators: Hypothesis draws from them, always the same draws.
"""

import csv
import io
import json
import os
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
from qlutils.files import read_parquet, write_parquet
from qlutils.model.language_model import LanguageModel
from qlutils.model.passes import neuron_vectors
from qlutils.neurons.cas import cas_candidates, cas_neurons
from qlutils.show.tables import write_table
from qlutils.study.notebook import Study

PATTERNS = ["[X] lies in [Y].", "the home of [X] is [Y] .", "as [X] was found, it was in [Y]"]
WITH = settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


pytestmark = pytest.mark.usefixtures("one_thread")


@lru_cache(maxsize=1)
def gpt2():
    return load_model("demo/gpt2", device="cpu")


@lru_cache(maxsize=1)
def tiny():
    return tiny_lm("gpt2", torch.float32)


# --- texts that are odd and must come out right ---------------------------------------------------
def around(inner, before="ab ", after=" cd"):
    """Text of the kind inside a name, so that stripping the ends of a name cannot take it away."""
    return st.builds(lambda one: f"{before}{one}{after}", inner)


def of(*examples):
    return st.sampled_from(examples)


def some(alphabet, size=4):
    return st.text(alphabet=alphabet, min_size=1, max_size=size)


def category(*names):
    return st.characters(categories=names)


ANY = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).map(
    lambda t: t.strip() or "x"
)

# kind -> generator of names; each is used as a subject and as an object
TEXTS = {
    "combining marks": around(some(category("Mn", "Me", "Mc"))),
    "a combining mark first": some(category("Mn"), 1).map(lambda mark: mark + "abc"),
    "decomposed letters (NFD)": of(
        *(unicodedata.normalize("NFD", t) for t in ("Ångström", "Việt Nam", "İstanbul"))
    ),
    "composed letters (NFC)": of(
        *(unicodedata.normalize("NFC", t) for t in ("Ångström", "Việt Nam", "İstanbul"))
    ),
    "compatibility forms (NFKC twins)": of("ﬁn", "①②", "Ⅻ", "ｆｕｌｌ", "㎏"),
    "astral planes": some(
        st.characters(min_codepoint=0x10000, max_codepoint=0x1FFFF, exclude_categories=("Cs", "Cn"))
    ),
    "unassigned code points": around(
        some(st.characters(categories=("Cn",), max_codepoint=0xEFFFF))
    ),
    "noncharacters": around(of("\ufdd0", "\ufffe", "\uffff", "\U0010ffff")),
    "private use": around(some(category("Co"))),
    "the replacement character": around(of("\ufffd", "\ufffd\ufffd")),
    "right-to-left script": some(st.characters(min_codepoint=0x5D0, max_codepoint=0x5EA), 6),
    "mixed directions": of("abc מדינה 123", "القاهرة (Cairo)"),
    "bidi controls": around(
        some("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")
    ),
    "emoji": some("😀🎉🚀☃⚠️"),
    "ZWJ sequences and skin tones": of("👩‍🚀", "👨‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈"),
    "flags and tag sequences": of(
        "🇫🇷", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
    ),
    "zero-width characters": around(some("\u200b\u200c\u200d\u2060\ufeff\u00ad")),
    "nothing visible": of("\u200b", "\u2060\u200d", "\u3164", "\u115f"),
    "control characters": around(
        some(st.characters(categories=("Cc",), exclude_characters="\0\n\r\t"))
    ),
    "NUL": around(of("\0", "\0\0")),
    "newline": around(of("\n", "\n\n", "\n- ")),
    "carriage return": around(of("\r", "\r\n")),
    "tab": around(of("\t", "\t\t")),
    "line and paragraph separators": around(of("\u2028", "\u2029", "\x85", "\x0b", "\x0c")),
    "non-breaking and other spaces": around(some("\u00a0\u2007\u202f\u3000\u1680\u2003")),
    "several spaces": around(of("  ", "     ")),
    "variation selectors": of("☃︎", "☃️", "葛󠄀"),
    "scripts without spaces": of("東京", "กรุงเทพ", "한국", "ᄒ\u1161ᆫ"),
    "letters that change length with case": of("STRASSE ß", "İi̇", "ŉ", "ﬃ"),
    "digits of other scripts": of("٣٤", "四", "²³", "Ⅷ", "½"),
    "the slots of a pattern": of("[X]", "[Y]", "a [Y] b [X]", "[X][Y]"),
    "regular expression": of(r"^a.*(b|c)+$", r"(?P<x>", r"[a-", "*?+"),
    "format braces": of("{}", "{0}", "{subject!r}", "}{", "%s %(a)s %d", "${HOME}", "{{7*7}}"),
    "backslashes": of("\\", "a\\b", r"\1 \g<0>", r"\u0041", "\\n", "ends in \\"),
    "pipes": of("a|b", "|", "a||b", r"a\|b", r"\\|"),
    "quotes and commas": of('"', "'", 'a,"b",c', '"""', "`", "a;b"),
    "markup": of(
        "<b>a</b>", "<script>x()</script>", "&amp;", "[a](b)", "**a**", "<!-- a -->", "# a", "- a"
    ),
    "LaTeX": of(r"\end{tabular}", "a & b", "50 %", "$x_1^2$", "#1", "~", r"\\", "[1cm]"),
    "spreadsheet formula": of("=1+1", "+1", "-1", "@a", "=HYPERLINK(1)"),
    "looks like no text": of(
        "nan", "NaN", "NA", "null", "None", "True", "1e5", "007", "1.0", "inf", "-"
    ),
    "looks like a path": of("../../etc/passwd", "/", "..", "a/b", "C:\\x", "~", "con"),
    "spells a special token": of("<|endoftext|>", "a <|endoftext|> b", "<s>", "</s>", "[MASK]"),
    "one character": st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp")),
    "space at the ends": of(" a ", "\u00a0a\u00a0", "\ta\n"),
    "long, within the context": of("word " * 40 + "end", "x" * 200),
    "any text": ANY,
}


def write(folder, patterns, pairs, relation="P1", encode=json.dumps):
    """A data set in ParaRel's layout; returns its folder."""
    for kind, records in (
        ("pattern_data/graphs_json", [{"pattern": pattern} for pattern in patterns]),
        ("trex_lms_vocab", [{"sub_label": s, "obj_label": o} for s, o in pairs]),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        text = "".join(encode(record) + "\n" for record in records)
        (folder / kind / f"{relation}.jsonl").write_bytes(text.encode("utf-8"))
    return folder


@torch.no_grad()
def by_hand(lm, prompt, answer, gap=" "):
    """P(answer | prompt) from one plain forward pass over the joint tokenisation, float64."""
    tokens = [
        lm.tokenizer(text, split_special_tokens=True).input_ids
        for text in (prompt, f"{prompt}{gap}{answer}")
    ]
    assert tokens[1][: len(tokens[0])] == tokens[0]
    log_p = torch.log_softmax(lm.model(torch.tensor([tokens[1]])).logits[0].double(), -1)
    places = range(len(tokens[0]) - 1, len(tokens[1]) - 1)
    return float(torch.exp(sum(log_p[place, tokens[1][place + 1]] for place in places)))


def check_probabilities(lm, prompts, answers):
    found = answer_probability(lm, prompts, answers)
    for place, (prompt, answer) in enumerate(zip(prompts, answers)):
        wanted = by_hand(lm, prompt, answer)
        assert float(found[place]) == pytest.approx(
            wanted, rel=1e-3, abs=1e-37
        )  # below that float32 rounds to a grid
    return found


@pytest.mark.parametrize("kind", TEXTS)
def test_a_fact_of_odd_text_is_read_asked_and_attributed_right(kind, tmp_path_factory):
    lm = gpt2()

    @WITH
    @given(name=TEXTS[kind], ascii_only=st.booleans())
    def check(name, ascii_only):
        folder = write(
            tmp_path_factory.mktemp("data"),
            PATTERNS,
            [(name, "Paris"), ("Ann", name)],
            encode=lambda record: json.dumps(record, ensure_ascii=ascii_only),
        )
        clean = unicodedata.normalize("NFC", name.strip())  # one name, however it is spelled
        facts = load_facts(folder)
        if clean == "Ann" or clean == "Paris":
            return
        wanted = [(clean, "Paris"), ("Ann", clean)]
        assert [(fact.subject, fact.object) for fact in facts] == wanted
        for fact in facts:
            assert fact.prompts == (
                fact.subject + " lies in",
                "the home of " + fact.subject + " is",
                "as " + fact.subject + " was found, it was in",
            )
            assert Fact(**json.loads(json.dumps(asdict(fact)))) == fact
        prompts, answers = (
            [facts[0].prompts[0], facts[0].prompts[1], facts[1].prompts[0]],
            ["Paris", "Paris", clean],
        )
        check_probabilities(lm, prompts, answers)
        first = answer_probability(lm, prompts, answers)
        together = attribute(
            lm, prompts, answers, steps=2, answer="first"
        )  # a name may have a hundred tokens
        assert (
            torch.isfinite(together.scores).all()
            and torch.isfinite(together.completeness_gap).all()
        )
        torch.testing.assert_close(together.probability, first, rtol=1e-3, atol=1e-37)
        alone = attribute(lm, prompts[:1], answers[:1], steps=2, answer="first")
        size = float(alone.scores.abs().max())
        assert float((together.scores[0] - alone.scores[0]).abs().max()) <= 1e-3 * size + 1e-37

    check()


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
    facts = [
        Fact("r", "a", right, prompts),
        Fact("r", "b", other, ("the home of ann is", "ann lies in")),
    ]
    near = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-37)
    near(answer_probability(lm, prompts, [right] * 2), wanted)
    near(attribute(lm, prompts, [right] * 2, steps=2).probability, wanted)
    queries = localise_unit(lm, [asdict(fact) for fact in facts], steps=2).drop(columns="left_out")
    near(queries["probability"][:2], wanted)
    near(queries["probability"][2:], [by_hand(lm, prompt, other) for prompt in facts[1].prompts])
    [unit] = effects.units(queries, 0.2, irrelevant=0, other=0)
    for frame in (scale_kns(lm, unit), scale_synapse_columns(lm, unit)):
        of_first = frame[frame["fact"] == facts[0].id].drop_duplicates("prompt_index")
        near(of_first["probability_before"], wanted)
    plans, _ = plan_edits(queries, facts, num_neurons=lm.num_neurons, n_locality=1, ppl_entries=0)
    edits = edit_facts(lm, plans[:1]).drop_duplicates("op").set_index("op")
    near(edits["p_before"], [wanted[plans[0]["query"]], updated[plans[0]["query"]]])
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
def first_draw(strategy):
    drawn = []

    @settings(WITH, max_examples=1)
    @given(strategy)
    def draw(name):
        drawn.append(unicodedata.normalize("NFC", name.strip()))

    draw()
    return drawn[0]


@pytest.fixture(scope="module")
def names():
    """{kind: a name of it}."""
    return {kind: first_draw(strategy) for kind, strategy in TEXTS.items()}


def test_odd_facts_go_through_a_run_and_its_store_unchanged(names, tmp_path, runs):
    folder = write(tmp_path / "data", PATTERNS[:2], [(name, "Paris") for name in names.values()])
    study = Study("01_localize", model="demo/gpt2", method="ig", data=str(folder), device="cpu")
    study.facts = lambda facts=load_facts(folder, min_patterns=2): facts
    queries = localise(study, steps=2, answer="first")
    assert list(dict.fromkeys(queries["subject"])) == list(dict.fromkeys(names.values()))
    assert len(study.load("left_out")) == 0 and queries["fact"].nunique() == len(
        set(names.values())
    )
    for _, row in queries.iterrows():
        assert (
            row["prompt"]
            == (f"{row['subject']} lies in", f"the home of {row['subject']} is")[
                row["prompt_index"]
            ]
        )
    again = study.load("queries")
    assert (
        again["prompt"].tolist() == queries["prompt"].tolist()
        and again["fact"].tolist() == queries["fact"].tolist()
    )
    found = check_probabilities(
        gpt2(), queries["prompt"].tolist()[::5], queries["object"].tolist()[::5]
    )
    assert len(gpt2().encode("it is in", "Paris")[1]) == 1  # then "first" is "all"
    np.testing.assert_allclose(queries["probability"][::5], found, rtol=1e-3, atol=1e-37)


def test_odd_texts_are_kept_by_a_result_file(names, tmp_path):
    frame = pd.DataFrame({"text": list(names.values())})
    write_parquet(frame, tmp_path / "t.parquet", "key")
    assert read_parquet(tmp_path / "t.parquet", "key")[0].to_pandas()["text"].tolist() == list(
        names.values()
    )


def in_tables(texts, folder):
    """The texts read back from a table: {"csv": by the csv module, "pandas", "md", "tex": lists of
    texts}."""
    frame = pd.DataFrame({"text": texts, "n": range(len(texts))})
    files = write_table(frame, "t", folder)
    kinds = {kind: path.read_bytes().decode("utf-8") for kind, path in files.items()}
    rows = list(csv.reader(io.StringIO(kinds["csv"], newline="")))
    assert all(len(row) == 2 for row in rows) and [row[1] for row in rows] == [
        "n",
        *map(str, range(len(texts))),
    ]
    read = {
        "csv": [row[0] for row in rows[1:]],
        "pandas": pd.read_csv(files["csv"], dtype=str, keep_default_na=False)["text"].tolist(),
    }

    parsed = mistune.create_markdown(renderer="ast", plugins=["table"])(kinds["md"])
    [body] = [part for part in parsed[0]["children"] if part["type"] == "table_body"]
    assert [len(row["children"]) for row in body["children"]] == [2] * len(texts)
    lines = re.split(r"\r\n|\r|\n", kinds["md"])[2:-1]
    assert len(lines) == len(texts)
    read["md"] = [line[2 : line.rindex(" | ")].replace(r"\|", "|") for line in lines]

    lines = kinds["tex"].split("\\midrule\n")[1].split("\n\\bottomrule")[0].split("\n")
    cells = [re.fullmatch(r"(?s)(.*) & (\d+) \\\\", line).groups() for line in lines]
    assert [int(n) for _, n in cells] == list(range(len(texts)))
    macros = "|".join(map(re.escape, sorted(LATEX, key=len, reverse=True)))
    read["tex"] = [
        re.sub(macros, lambda m: LATEX[m[0]], cell.removeprefix("{}")) for cell, _ in cells
    ]
    return read


LATEX = {
    r"\textbackslash{}": "\\",
    r"\&": "&",
    r"\%": "%",
    r"\$": "$",
    r"\#": "#",
    r"\_": "_",
    r"\{": "{",
    r"\}": "}",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
}


def test_odd_texts_are_kept_by_tables(names, tmp_path):
    """In CSV to the character; where a table is for reading, a line break becomes a space."""
    texts = [name for kind, name in names.items() if kind != "carriage return"]
    read = in_tables(texts, tmp_path)
    assert read["csv"] == read["pandas"] == texts
    read["tex"] = [text.replace("{[}", "[").replace("{]}", "]") for text in read["tex"]]
    assert read["md"] == read["tex"] == [text.replace("\n", " ") for text in texts]


@pytest.mark.parametrize("text", ["a\rb", "a\r\nb", r"a\|b"], ids=ascii)
def test_texts_that_break_a_table_apart_are_kept_too(text, tmp_path):
    read = in_tables([text, "next"], tmp_path)
    assert read["csv"] == read["pandas"] == [text, "next"]
    assert [one.split() for one in read["tex"]] == [text.split(), ["next"]]
    assert read["md"] == [{"a\rb": "a b", "a\r\nb": "a b", r"a\|b": r"a\\|b"}[text], "next"]


# --- facts that are easily mixed up ---------------------------------------------------------------
TWINS = {
    "answers that are prefixes of each other": [
        ("ann", "New"),
        ("ann", "New York"),
        ("ann", "New York City"),
    ],
    "an answer inside its subject": [("Paris Hilton", "Paris"), ("Paris", "Paris")],
    "names that differ in case only": [("Ann", "Oslo"), ("ann", "Oslo"), ("ANN", "oslo")],
    "names that differ in what is invisible": [
        ("ann", "Oslo"),
        ("a\u200bnn", "Oslo"),
        ("ann\u2060", "Oslo"),
    ],
    "names that look alike": [("Аnn", "Oslo"), ("Ann", "Oslo")],
    "names whose parts join to the same text": [
        ("a|b", "c"),
        ("a", "b|c"),
        ("a\\", "|b|c"),
        ("a\\|", "b|c"),
    ],
}


@pytest.mark.parametrize("kind", TWINS)
def test_facts_that_look_alike_stay_apart(kind, tmp_path):
    facts = load_facts(write(tmp_path, PATTERNS, TWINS[kind]))
    assert [(fact.subject, fact.object) for fact in facts] == TWINS[kind]
    assert len({fact.id for fact in facts}) == len(facts)
    unit = localise_unit(gpt2(), [asdict(fact) for fact in facts], steps=2)
    assert unit.groupby("fact", sort=False).size().tolist() == [3] * len(facts)
    assert unit["cas_layer"].notna().sum() == len(facts)
    check_probabilities(gpt2(), unit["prompt"].tolist(), unit["object"].tolist())


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
RIGHT = "right"


def facts_file(content):
    """A data set whose file of facts has this content, text or bytes."""

    def make(folder):
        write(folder, PATTERNS, GOOD)
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (folder / "trex_lms_vocab" / "P1.jsonl").write_bytes(data)
        return folder

    return make


def patterns(*given):
    return lambda folder: write(folder, given, GOOD)


LINES = [json.dumps({"sub_label": s, "obj_label": o}) for s, o in GOOD]
PLAIN = "\n".join(LINES) + "\n"


def symlinked(folder):
    write(folder / "real", PATTERNS, GOOD)
    (folder / "link").symlink_to(folder / "real", target_is_directory=True)
    return folder / "link"


def symlinked_file(folder):
    write(folder, PATTERNS, GOOD)
    file = folder / "trex_lms_vocab" / "P1.jsonl"
    file.rename(folder / "elsewhere")
    file.symlink_to(folder / "elsewhere")
    return folder


def dangling(folder):
    write(folder, PATTERNS, GOOD)
    file = folder / "trex_lms_vocab" / "P1.jsonl"
    file.unlink()
    file.symlink_to(folder / "nowhere")
    return folder


def loop(folder):
    (folder / "pattern_data").symlink_to(folder / "pattern_data")
    return folder


def a_folder_for_a_file(folder):
    write(folder, PATTERNS, GOOD)
    (folder / "trex_lms_vocab" / "P1.jsonl").unlink()
    (folder / "trex_lms_vocab" / "P1.jsonl").mkdir()
    return folder


def a_file_for_a_folder(folder):
    (folder / "data").write_text("{}")
    return folder / "data"


def file_names(*relations):
    def make(folder):
        for relation in relations:
            write(folder, PATTERNS, GOOD, relation)
        return folder

    return make


def without(part):
    def make(folder):
        write(folder, PATTERNS, GOOD)
        for file in (folder / part).iterdir():
            file.unlink()
        (folder / part).rmdir()
        return folder

    return make


def in_capitals(folder):
    for file in list(write(folder, PATTERNS, GOOD).rglob("*.jsonl")):
        file.rename(file.with_suffix(".JSONL"))
    return folder


def twice(folder):
    (write(folder, PATTERNS, GOOD) / "trex_lms_vocab" / "P1.JSONL").write_text(PLAIN)
    return folder


ANN = '{"subject": "ann", "object": "Oslo", "prompts": ["ann lies in", "c d", "e f"]}'


def own_facts(*lines, name="own.jsonl", plain=ANN):
    """A file of one's own facts: a good line, then these."""

    def make(folder):
        (folder / name).write_bytes("\n".join([plain, *lines]).encode("utf-8"))
        return folder / name

    return make


def own_line(**changes):
    line = {"subject": "bob", "object": "Rome", "prompts": ["bob lies in", "e f", "g h"], **changes}
    return own_facts(json.dumps({key: value for key, value in line.items() if value != "absent"}))


# kind -> (data set, what is right: the facts' subjects, or what the error says)
FILES = {
    "own facts": (own_line(relation="P1"), ["bob", "ann"]),
    "own facts without a relation": (own_line(), ["ann", "bob"]),
    "own facts, .JSONL": (own_facts(name="own.JSONL"), ["ann"]),
    "own facts with fields of their own": (own_line(relation="r", id=3, note="x"), ["ann", "bob"]),
    "own facts, no subject": (own_line(subject="absent"), "own.jsonl:2: field 'subject'"),
    "own facts, an empty object": (own_line(object=" "), "own.jsonl:2: field 'object'"),
    "own facts, a relation that is no text": (own_line(relation=36), "jsonl:2: field 'relation'"),
    "own facts, no prompts": (
        own_line(prompts="absent"),
        "jsonl:2: field 'prompts' must be a list",
    ),
    "own facts, one text for prompts": (
        own_line(prompts="b is"),
        "'prompts' must be a list.*'b is'",
    ),
    "own facts, an empty prompt": (own_line(prompts=["a b", " "]), "own.jsonl:2: .*holds ' '"),
    "own facts, a number for a prompt": (own_line(prompts=["a b", 1]), "own.jsonl:2: .*holds 1"),
    "own facts, text after the answer's place": (
        own_line(prompts=["a b", "a [Y] b"]),
        r"own.jsonl:2: .*text follows \[Y\]",
    ),
    "own facts, a newline at the end": (
        own_line(prompts=["a b", "a b\n"]),
        r"own.jsonl:2: .*ends with '\\n'",
    ),
    "own facts, half of a surrogate pair": (
        own_line(prompts=["a b", "a \ud83d"]),
        "own.jsonl:2: .*surrogate",
    ),
    "own facts, one twice": (own_facts(ANN), ["ann"]),
    "own facts, one twice with other prompts": (
        own_line(subject="ann", object="Oslo"),
        "own.jsonl:2: the fact of .*own.jsonl:1",
    ),
    "own facts, one prompt each": (own_line(prompts=["c d", "c d "]), ["ann"]),
    "own facts, none of two prompts": (
        own_facts(plain=ANN.replace(', "c d", "e f"', "")),
        "no fact with 2 prompts",
    ),
    "own facts, no JSON": (own_facts("ann"), "own.jsonl:2: not a JSON object"),
    "own facts, an empty file": (own_facts(plain=""), "own.jsonl is empty"),
    "own facts, no such file": (lambda folder: folder / "none.jsonl", "missing data file .*none"),
    "relation files in capitals": (in_capitals, ["ann", "bob"]),
    "two files of one relation": (twice, "relation P1 has two files"),
    "BOM at the start": (facts_file(b"\xef\xbb\xbf" + PLAIN.encode()), ["ann", "bob"]),
    "BOM in the middle": (facts_file(LINES[0] + "\n\ufeff" + LINES[1]), "P1.jsonl:2"),
    "CRLF lines": (facts_file(PLAIN.replace("\n", "\r\n")), ["ann", "bob"]),
    "CR lines of an old Mac": (
        facts_file(PLAIN.replace("\n", "\r")),
        "P1.jsonl:1: not a JSON object",
    ),
    "no newline at the end": (facts_file(PLAIN.rstrip()), ["ann", "bob"]),
    "blank lines": (facts_file(f"\n\n{LINES[0]}\n   \n\t\n{LINES[1]}\n\n"), ["ann", "bob"]),
    "empty file": (facts_file(""), "P1.jsonl is empty"),
    "only blank lines": (facts_file("\n \n"), "P1.jsonl is empty"),
    "only a BOM": (facts_file(b"\xef\xbb\xbf"), "P1.jsonl is empty"),
    "zero bytes": (facts_file(b"\0" * 64), "P1.jsonl:1: not a JSON object"),
    "truncated JSON": (facts_file(PLAIN[:-20]), "P1.jsonl:2: not a JSON object"),
    "truncated UTF-8": (facts_file(LINES[0].encode() + b'\n{"sub_label": "\xe2\x82'), "P1.jsonl:2"),
    "Latin-1": (facts_file('{"sub_label": "é", "obj_label": "x"}'.encode("latin-1")), "P1.jsonl:1"),
    "UTF-16": (facts_file(PLAIN.encode("utf-16")), "P1.jsonl:1"),
    "overlong UTF-8": (facts_file(b'{"sub_label": "\xc0\xaf", "obj_label": "x"}'), "P1.jsonl:1"),
    "a surrogate encoded in UTF-8": (
        facts_file(b'{"sub_label": "\xed\xa0\x80", "obj_label": "x"}'),
        "P1.jsonl:1",
    ),
    "half of a surrogate pair, escaped": (
        facts_file(r'{"sub_label": "a\ud83d b", "obj_label": "x"}'),
        "P1.jsonl:1: field 'sub_label'.*surrogate",
    ),
    "the other half, as an object": (
        facts_file(r'{"sub_label": "a", "obj_label": "\ude00"}'),
        "P1.jsonl:1: field 'obj_label'.*surrogate",
    ),
    "a whole surrogate pair, escaped": (
        facts_file(r'{"sub_label": "a\ud83d\ude00", "obj_label": "x"}'),
        ["a😀"],
    ),
    "a JSON array": (
        facts_file(json.dumps([{"sub_label": "a", "obj_label": "b"}])),
        "P1.jsonl:1: not a JSON object",
    ),
    "a JSON number": (facts_file("3"), "P1.jsonl:1: not a JSON object"),
    "a JSON string": (facts_file('"a"'), "P1.jsonl:1: not a JSON object"),
    "JSON null": (facts_file("null"), "P1.jsonl:1: not a JSON object"),
    "JSON NaN as a name": (
        facts_file('{"sub_label": NaN, "obj_label": "b"}'),
        "P1.jsonl:1: field 'sub_label'.*nan",
    ),
    "JSON Infinity as a name": (
        facts_file('{"sub_label": "a", "obj_label": -Infinity}'),
        "field 'obj_label'.*-inf",
    ),
    "a huge integer": (
        facts_file('{"sub_label": ' + "9" * 5000 + ', "obj_label": "b"}'),
        "P1.jsonl:1: not a JSON object",
    ),
    "JSON nested too deep": (facts_file("[" * 100_000), "P1.jsonl:1: not a JSON object"),
    "single quotes": (
        facts_file("{'sub_label': 'a', 'obj_label': 'b'}"),
        "P1.jsonl:1: not a JSON object",
    ),
    "two objects on a line": (facts_file(LINES[0] + LINES[1]), "P1.jsonl:1: not a JSON object"),
    "HTML, as from a failed download": (
        facts_file("<!DOCTYPE html><html></html>"),
        "P1.jsonl:1: not a JSON object",
    ),
    "a missing field": (facts_file('{"sub_label": "a"}'), "P1.jsonl:1: field 'obj_label'.*None"),
    "a null field": (
        facts_file('{"sub_label": null, "obj_label": "b"}'),
        "P1.jsonl:1: field 'sub_label'.*None",
    ),
    "a number as a name": (
        facts_file('{"sub_label": "a", "obj_label": 1789}'),
        "P1.jsonl:1: field 'obj_label'.*1789",
    ),
    "a list as a name": (
        facts_file('{"sub_label": ["a"], "obj_label": "b"}'),
        "P1.jsonl:1: field 'sub_label'",
    ),
    "a bool as a name": (
        facts_file('{"sub_label": true, "obj_label": "b"}'),
        "P1.jsonl:1: field 'sub_label'.*True",
    ),
    "an empty name": (
        facts_file('{"sub_label": "", "obj_label": "b"}'),
        "P1.jsonl:1: field 'sub_label'",
    ),
    "a name of spaces": (
        facts_file('{"sub_label": "a", "obj_label": " \u00a0\\t\u2003"}'),
        "P1.jsonl:1: field 'obj_label'",
    ),
    "extra fields": (
        facts_file('{"sub_label": "a", "obj_label": "b", "more": {"x": [1, null]}}'),
        ["a"],
    ),
    "a fact twice": (facts_file(PLAIN + PLAIN), ["ann", "bob"]),
    "one fact": (facts_file(LINES[0]), ["ann"]),
    "a pattern twice": (patterns(*PATTERNS, *PATTERNS), ["ann", "bob"]),
    "one pattern three times": (patterns(*[PATTERNS[0]] * 3), "no fact with 2 prompts"),
    "two patterns": (patterns(*PATTERNS[:2]), "no fact with 2 prompts.*min_patterns=3"),
    "a pattern without [X]": (
        patterns(*PATTERNS, "it is [Y]."),
        r"P1.jsonl:4: pattern 'it is \[Y\].' needs both",
    ),
    "a pattern without [Y]": (
        patterns("[X] is.", *PATTERNS),
        r"P1.jsonl:1: pattern '\[X\] is.' needs both",
    ),
    "slots in small letters": (patterns(*PATTERNS, "[x] is [y]."), "P1.jsonl:4: pattern"),
    "an empty pattern": (patterns(*PATTERNS, ""), "P1.jsonl:4: field 'pattern'"),
    "[Y] before [X]": (patterns(*PATTERNS, "[Y] holds [X]."), ["ann", "bob"]),
    "[Y] before [X] everywhere": (
        patterns(*["[Y] holds [X] %d." % i for i in range(3)]),
        "no fact with 2 prompts",
    ),
    "two [Y]": (patterns(*PATTERNS[:2], "[X] saw [Y] and [Y]."), ["ann", "bob"]),
    "two [X]": (patterns(*PATTERNS[:2], "[X] and [X] saw [Y]."), ["ann", "bob"]),
    "only slots": (patterns("[X][Y]", "[X] [Y]", *PATTERNS), ["ann", "bob"]),
    "no folder of facts": (without("trex_lms_vocab"), "missing data file .*P1.jsonl"),
    "no folder of patterns": (without("pattern_data/graphs_json"), "unknown dataset"),
    "an empty folder": (lambda folder: folder, "unknown dataset.*pattern_data"),
    "a file for a folder": (a_file_for_a_folder, "unknown dataset"),
    "a folder for a file": (a_folder_for_a_file, "missing data file .*P1.jsonl"),
    "a symbolic link to the folder": (symlinked, ["ann", "bob"]),
    "a symbolic link to a file": (symlinked_file, ["ann", "bob"]),
    "a dangling link": (dangling, "missing data file .*P1.jsonl"),
    "a link to itself": (loop, "unknown dataset"),
    "a relation named by a digit that is none": (file_names("²", "P²"), ["ann", "bob"] * 2),
    "relation names of equal rank": (file_names("P1", "P01", "P001"), ["ann", "bob"] * 3),
    "a relation named in another script": (file_names("город", "العاصمة"), ["ann", "bob"] * 2),
    "a relation with dots and spaces": (file_names("P1.old copy", "..P2"), ["ann", "bob"] * 2),
    "a file name that is no Unicode": (file_names("P\udcff"), "relation file in .*surrogate"),
}


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
    first = facts[0]
    texts = [prompt.removesuffix("[Y]") for prompt in first.prompts]  # "[X][Y]" has no space there
    assert all(text == text.strip() and "  " not in text and "[" not in text for text in texts)
    assert first.prompts[-1 if kind == "only slots" else 0] == (
        "as ann was found, it was in" if kind == "only slots" else f"{first.subject} lies in"
    )
    assert len(first.prompts) == (5 if kind == "only slots" else 3) == len(set(first.prompts))
    assert load_facts(folder) == facts  # also the order


def test_equally_ranked_relations_come_in_one_order_wherever_the_files_were_written_first(tmp_path):
    orders = []
    for place, names_ in enumerate((("P1", "P01", "P001"), ("P001", "P01", "P1"))):
        folder = file_names(*names_)(tmp_path / str(place))
        orders.append([fact.relation for fact in load_facts(folder)])
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
def entered(context):
    with context:
        return RIGHT


def scores(values=((0.1, 0.9, 0.5),)):
    return np.array([values])


def ask(prompts, answers, **options):
    return lambda: answer_probability(gpt2(), prompts, answers, **options)


def attributed(prompts=("the home of ann is",), answers=("Oslo",), **options):
    return lambda: attribute(gpt2(), prompts, answers, **{"steps": 2, **options})


def scaled(neurons=frozenset({(0, 1)}), factor=0.0):
    return lambda: entered(scale_neurons(tiny(), neurons, factor))


def edited(neurons=frozenset({(0, 1)}), op="update", **options):
    return lambda: entered(
        edit_weights(tiny(), neurons, op, **{**dict(old=[5], new=[6]), **options})
    )


def synapses(columns=frozenset({(0, 1, 2)}), factor=0.0):
    return lambda: entered(scale_synapses(tiny(), columns, factor))


def cas(**options):
    return lambda: cas_neurons(cas_candidates(scores()), **options)


def facts(**options):
    return lambda: load_facts("demo", **options)


NAN, INF, HUGE = float("nan"), float("inf"), 10**400
LONG = "word " * 600
# (kind, call, what the error says; RIGHT where the value is good and must be taken)
CALLS = [
    ("an empty prompt", ask([""], ["x"]), "prompt is empty"),
    ("a prompt of spaces", ask([" \u00a0\n"], ["x"]), "prompt is empty"),
    (
        "a prompt of one token",
        ask(
            ["5"],
            ["6"],
        ),
        "prompt '5' is a single token",
    ),
    ("an empty answer", ask(["ann is in"], [""]), "answer to 'ann is in' is ''"),
    ("an answer of spaces", ask(["ann is in"], ["\u00a0 \t"]), "answer to 'ann is in'"),
    ("a prompt past the context", ask([LONG], ["x"]), "prompt 'word word.*reads at most 512"),
    ("an answer past the context", ask(["ann is in"], [LONG]), "'ann is in'.*reads 512"),
    (
        "half of a surrogate pair in a prompt",
        ask(["ann \ud800 is in"], ["x"]),
        r"ann \\ud800 is in.*surrogate",
    ),
    (
        "half of a surrogate pair in an answer",
        ask(["ann is in"], ["\udfff"]),
        r"\\udfff.*surrogate",
    ),
    ("bytes for a prompt", ask([b"ann is in"], ["x"]), "prompt must be text, got bytes"),
    ("a number for a prompt", ask([3], ["x"]), "prompt must be text, got int"),
    ("None for an answer", ask(["ann is in"], [None]), "answer to 'ann is in' is None"),
    ("one text for prompts", ask("ann is in", ["x"]), "prompts must be a list.*'ann is in'"),
    ("None for prompts", ask(None, ["x"]), "prompts must be a list.*None"),
    ("a number for answers", ask(["ann is in"], 3), "answers must be a list.*3"),
    *(
        (f"{kind} for prompts", ask(value, ["x"]), f"prompts must be a list.*{kind}")
        for kind, value in (
            ("dict", {"ann is in": "x"}),
            ("set", {"ann is in"}),
            ("DataFrame", pd.DataFrame({"prompt": ["ann is in"]})),
        )
    ),
    *(
        (f"{type(value).__name__} for prompts", ask(value, ["x"]), RIGHT)
        for value in (("ann is in",), np.array(["ann is in"]), pd.Series(["ann is in"]))
    ),
    *(
        (f"{type(value).__name__} for neurons", scaled(value), "neurons must be a set")
        for value in ({(0, 1): 2.0}, pd.DataFrame([[0, 1]]))
    ),
    ("steps of NumPy", attributed(steps=np.int64(3)), RIGHT),
    ("factor of NumPy", scaled(factor=np.float32(0.5)), RIGHT),
    ("more prompts than answers", ask(["a b", "c d"], ["x"]), "2 prompts but 1 answers"),
    ("an unknown kind of answer", ask(["a b"], ["x"], answer="last"), "answer 'last' is unknown"),
    (
        "a list for the kind of answer",
        ask(["a b"], ["x"], answer=["all"]),
        "answer .*'all'.* is unknown",
    ),
    ("attribute: None for prompts", attributed(prompts=None), "prompts"),
    ("attribute: a number for answers", attributed(answers=7), "answers"),
    ("attribute: one text for prompts", attributed(prompts="ann is in"), "single text|prompts"),
    *(
        (f"steps {value!r}", attributed(steps=value), "steps is " + re.escape(repr(value)))
        for value in (0, 1, -1, True, 2.0, "20", None, NAN, np.float64(3), [20])
    ),
    *(
        (f"rule {value!r}", attributed(rule=value), "rule .*is unknown; use one of right")
        for value in ("simpson", None, 3, ["right"])
    ),
    *(
        (f"method {value!r}", attributed(method=value), "method .*is unknown; use one of ig")
        for value in ("IG", None, 0, [])
    ),
    *(
        (f"site {value!r}", attributed(site=value), "site .*is unknown")
        for value in ("output", None)
    ),
    ("amig_factor 'b'", attributed(amig_factor="b"), "amig_factor 'b' is unknown"),
    *(
        (f"row_budget {value!r}", attributed(row_budget=value), "row_budget is")
        for value in (0, -1, 1.5, "x", True, NAN)
    ),
    *(
        (
            f"t {value!r}",
            lambda value=value: knowledge_neurons(scores(), value),
            "t must lie strictly between 0 and 1, not ",
        )
        for value in (
            0,
            1,
            -0.1,
            1.5,
            NAN,
            INF,
            -INF,
            True,
            "0.2",
            None,
            [0.2],
            1j,
            np.array([0.1, 0.2]),
            HUGE,
        )
    ),
    *(
        (f"t {value!r}", lambda value=value: knowledge_neurons(scores(), value), RIGHT)
        for value in (np.float32(0.2), np.float64(0.2))
    ),
    *(
        (f"scores {value!r}"[:40], lambda value=value: knowledge_neurons(value), message)
        for value, message in (
            (None, "scores must be real numbers"),
            ("abc", "scores must be"),
            ([[["a"]]], "scores must be real numbers"),
            ([[[1j]]], "scores must be real numbers"),
            ([[1, 2], [3]], "scores must have the shape"),
            ([[1.0]], r"scores must have the shape.*\(1, 1\)"),
            ([[[NAN]]], "query 0 has non-finite"),
            ([[[1.0]], [[-INF]]], "query 1 has non-finite"),
            (np.zeros((1, 0, 3)), r"shape.*\(1, 0, 3\)"),
        )
    ),
    *(
        (f"KN sets {value!r}", lambda value=value: consistency(value), "consistency needs")
        for value in (None, 3, [], [set()], [None, None], [3, 4], [[[1]], [[1]]])
    ),
    *(
        (f"CAS weights {value!r}", cas(b1=value), r"is not offered")
        for value in (0.75, "0.7", None, True, NAN)
    ),
    *(
        (f"CAS threshold {value!r}", cas(threshold=value), "threshold .*not offered")
        for value in (0, 1, "0.3", None, NAN, True)
    ),
    ("CAS score 'mean'", cas(score="mean"), "CAS score 'mean' is unknown"),
    *(
        (f"neurons {value!r}", scaled(value), "neuron")
        for value in (
            5,
            None,
            "ab",
            b"ab",
            [5],
            (3, 17),
            [(1, 2, 3)],
            [(1,)],
            [(0.5, 1)],
            [(1.0, 2.0)],
            [(True, 1)],
            [(NAN, 1)],
            [(INF, 1)],
            [(None, 1)],
            [("a", "b")],
            [([1], 2)],
            [(-1, 0)],
            [(0, -1)],
            [(3, 0)],
            [(0, 128)],
            [(10**30, 0)],
        )
    ),
    ("neurons of NumPy integers", scaled([(np.int64(1), np.int32(2))]), RIGHT),
    ("neurons of a tensor", scaled(torch.tensor([[1, 2], [0, 5]])), RIGHT),
    ("no neurons", scaled([]), RIGHT),
    *(
        (f"factor {value!r}", scaled(factor=value), "factor is")
        for value in (True, "0", None, NAN, INF, -INF, 1e39, 1j, [0])
    ),
    *((f"factor {value!r}", scaled(factor=value), RIGHT) for value in (-1, 0, 2, np.float64(0.5))),
    *(
        (f"synapses {value!r}", synapses(value), "synapse")
        for value in (
            [(-1, 0, 0)],
            [(0, 3, 0)],
            [(0, 0, 4)],
            [(64, 0, 0)],
            [(NAN, 0, 0)],
            [(10**30, 0, 0)],
        )
    ),
    *(
        (f"synapse factor {value!r}", synapses(factor=value), "factor is")
        for value in (True, "0", None, NAN, INF, -1, 1j, [0])
    ),
    *(
        (f"alpha {value!r}", lambda value=value: find_synapses(tiny(), "5 6 7", value), "alpha is")
        for value in (0, -0.1, 1.01, True, "0.3", None, NAN, INF, HUGE, [0.3], 1j)
    ),
    (
        "an unknown synapse score",
        lambda: find_synapses(tiny(), "5 6 7", score=["sum"]),
        "score .* is unknown",
    ),
    (
        "a list for a prompt",
        lambda: find_synapses(tiny(), ["5 6 7"]),
        "prompt must be text, got list",
    ),
    *(
        (f"op {value!r}", edited(op=value), "op .* is unknown; use one of erase")
        for value in ("zero", None, 3, ["erase"])
    ),
    *(
        (f"lambda1 {value!r}", edited(lambda1=value), "lambda1 is")
        for value in (True, "2", None, NAN, INF, HUGE, 1e39, 1j, [2])
    ),
    (
        "a lambda that overflows",
        lambda: entered(
            edit_weights(
                tiny_lm("gpt2", torch.float32, scale=40.0),
                [(0, 1)],
                "update",
                old=[5],
                new=[6],
                lambda1=3e38,
            )
        ),
        "lambda1.*overflows",
    ),
    *(
        (f"old {value!r}", edited(old=value), "token|object")
        for value in (
            5,
            b"x",
            [5.7],
            [True],
            ["a"],
            [[1]],
            [-1],
            [97],
            [10**30],
            [],
            "",
            " ",
            "\ud800",
            [None],
        )
    ),
    *(
        (f"old {value!r}", edited(old=value), RIGHT)
        for value in (np.array([5, 6]), torch.tensor([5]), "20 21", (5,))
    ),
    ("no old object", edited(old=None), "needs both objects"),
    ("an unknown embedding", edited(embedding=["input"]), "embedding .* is unknown"),
    *(
        (f"texts {value!r}"[:30], lambda value=value: perplexity(tiny(), value), "text")
        for value in (None, 3, "5 6 7", [], [None], [3], [b"5 6"], [""], ["5"], ["5 \ud800 6"])
    ),
    *(
        (
            f"max_tokens {value!r}",
            lambda value=value: perplexity(tiny(), ["5 6 7"], value),
            "max_tokens is",
        )
        for value in (0, 1, -1, True, 2.5, "256", None, NAN, INF)
    ),
    (
        "a text past the context",
        lambda: perplexity(tiny(), ["5 " * 65], 65),
        "65 tokens.*reads at most 64",
    ),
    ("max_tokens far past the text", lambda: perplexity(tiny(), ["5 6 7"], 10**30), RIGHT),
    *(
        (
            f"facts_per_relation {value!r}",
            facts(facts_per_relation=value),
            "facts_per_relation .*: want an integer, at least 1",
        )
        for value in (0, -1, 1.0, True, "2", NAN, [1])
    ),
    (
        "facts_per_relation far above what there is",
        facts(relations=["P36"], facts_per_relation=10**30),
        RIGHT,
    ),
    (
        "facts_per_relation of NumPy",
        facts(relations=["P36"], facts_per_relation=np.int64(1)),
        RIGHT,
    ),
    *(
        (f"seed {value!r}", facts(seed=value), "seed .*: want")
        for value in (-1, 0.0, True, "0", None, NAN)
    ),
    ("a huge seed", facts(relations=["P36"], facts_per_relation=1, seed=10**30), RIGHT),
    *(
        (f"min_patterns {value!r}", facts(min_patterns=value), "min_patterns .*: want")
        for value in (0, -1, 1.5, None, True)
    ),
    ("min_patterns above all", facts(min_patterns=10**9), "min_patterns=1000000000"),
    *(
        (f"middle {value!r}", facts(middle=value), "middle must be")
        for value in ("CUT", None, 3, ["cut"])
    ),
    *(
        (f"relations {value!r}", facts(relations=value), "relation")
        for value in (
            "P36",
            [],
            7,
            [3],
            [None],
            ["P36", "../P36"],
            ["/etc/passwd"],
            ["P36.jsonl"],
            ["p36"],
            [""],
            ["P36\0"],
            ["*"],
        )
    ),
    *(
        (f"dataset {value!r}"[:40], lambda value=value: load_facts(value), "dataset")
        for value in (
            3,
            None,
            b"demo",
            ["demo"],
            "",
            "nowhere",
            "a\0b",
            "~nosuchuser/x",
            "x" * 5000,
            "\ud800",
            "DEMO",
            "demo/",
        )
    ),
    *(
        (
            f"perplexity text {value!r}"[:40],
            lambda value=value: perplexity_texts(value),
            "perplexity text",
        )
        for value in (
            3,
            None,
            b"demo",
            ["demo"],
            "",
            "nowhere",
            "a\0b",
            "~nosuchuser/x",
            "x" * 5000,
            "\ud800",
        )
    ),
    *(
        (f"a fact of {value!r}", lambda value=value: Fact(*value), "fact ")
        for value in (
            (1, "s", "o", ("a",)),
            ("P", None, "o", ("a",)),
            ("P", "s", b"o", ("a",)),
            ("P", "s", "o", None),
            ("P", "s", "o", "one text"),
            ("P", "s", "o", [1]),
            ("P", "s", "o", ["a", None]),
            ("P", "s", "o", {"a": 1}),
        )
    ),
    *(
        (
            f"device {value!r}",
            lambda value=value: load_model("demo/gpt2", device=value),
            "device .*use cpu",
        )
        for value in ("gpu", "meta", "xpu", "cuda:99", "cuda:-1", "", 0, 3, True, 1.5, [1], {})
    ),
    *(
        (
            f"dtype {value!r}",
            lambda value=value: load_model("demo/gpt2", dtype=value),
            "dtype .* is unknown",
        )
        for value in ("float8", "FLOAT32", "torch.float32", torch.int32, 32, True, [1], {})
    ),
    *(
        (f"model {value!r}"[:40], lambda value=value: load_model(value), "model|folder")
        for value in (
            "",
            " ",
            None,
            3,
            True,
            [],
            b"demo/gpt2",
            "demo/",
            "demo/gpt9",
            "demo/../gpt2",
            "demo/gpt2/",
            "demo/gpt2\n",
            "a\0b",
            "~nosuchuser/x",
            "x" * 300,
            "x" * 5000,
            "\ud800/x/y",
            "..",
            "/",
            "../../etc/passwd",
            "a/b/c",
            "..\\a\\b",
            "./nowhere",
            "https://a/b/c",
            "file:///etc/passwd",
        )
    ),
    *(
        (f"output {value!r}"[:40], lambda value=value: paths.run_folder(value), "output")
        for value in (
            "",
            ".",
            "..",
            "a/b",
            "/a",
            "a\\b",
            "a\0",
            "a\n",
            " a",
            "-a",
            ".a",
            "a b",
            "a:b",
            "\u202ea",
            "😀",
            None,
            3,
        )
    ),
    *(
        (f"model's folder name {value!r}", lambda value=value: paths.slug(value), "model")
        for value in ("", " \n", None, 3)
    ),
    *(
        (
            f"an edited checkpoint in {value!r}",
            lambda value=value: save_edited(tiny(), value, [(0, 0)], "erase"),
            "folder|is a file",
        )
        for value in (None, 3, b"x", __file__)
    ),
]
CALLS += [
    (f"factor {HUGE!r}"[:12], scaled(factor=HUGE), "factor is"),
    *(
        (f"synapses {value!r}", synapses(value), "synapse")
        for value in (
            5,
            None,
            "abc",
            [5],
            (0, 1, 2),
            [(0, 0)],
            [(0.5, 0, 0)],
            [(0, 0, 0.5)],
            [(True, 0, 0)],
            [("0", 0, 0)],
            [(None, 0, 0)],
        )
    ),
    *(
        (f"synapse factor {value!r}"[:20], synapses(factor=value), "factor is")
        for value in (1e39, HUGE)
    ),
]


@contextmanager
def untouched(lm):
    """Nothing that is refused leaves a mark on the model."""
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    yield
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )


@pytest.mark.parametrize(
    "kind, call, outcome", [pytest.param(*case, id=ascii(case[0])[1:-1]) for case in CALLS]
)
def test_a_call_gives_the_right_result_or_names_what_is_wrong(kind, call, outcome, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with untouched(tiny()):
        if outcome == RIGHT:
            call()
        else:
            with pytest.raises(ValueError, match="(?s)" + outcome) as caught:
                call()
            assert (
                type(caught.value).__module__ != "builtins" or type(caught.value) is ValueError
            )  # no UnicodeError


def test_values_that_are_taken_mean_what_they_say():
    lm = tiny()
    prompts, answers = ["5 6 7"], ["8"]
    for same in (
        [(1, 2), (0, 5)],
        {(np.int64(1), np.int32(2)), (0, 5)},
        torch.tensor([[1, 2], [0, 5]]),
        [(1, 2), (1, 2), (0, 5)],
    ):
        with scale_neurons(lm, same, np.float64(0.0)):
            found = answer_probability(lm, prompts, answers)
        with scale_neurons(lm, {(1, 2), (0, 5)}, 0):
            assert torch.equal(found, answer_probability(lm, prompts, answers))
    assert not torch.equal(found, answer_probability(lm, prompts, answers))
    for same in (np.array([5, 6]), torch.tensor([5, 6]), "5 6", (5, 6)):
        with edit_weights(lm, [(1, 2)], "update", old=same, new=[7]):
            found = lm.value_vectors(1)[2].clone()
        with edit_weights(lm, [(1, 2)], "update", old=[5, 6], new=[7]):
            assert torch.equal(lm.value_vectors(1)[2], found)
    assert (
        knowledge_neurons(scores(), np.float32(0.2))
        == knowledge_neurons(scores(), 0.2)
        == [{(0, 1), (0, 2)}]
    )
    assert perplexity(lm, ["5 6 7"], 10**30) == perplexity(lm, ["5 6 7"])


def test_no_queries_give_an_empty_result():
    assert answer_probability(tiny(), [], []).shape == (0,)
    assert attribute(tiny(), [], []).scores.shape == (0, tiny().num_layers, tiny().num_neurons)


# --- settings of the process ----------------------------------------------------------------------
def every_number(lm):
    """A result of each kind of computation."""
    query, ids = (["10 11 12 13 14"], ["15 16"]), lm.encode("10 11 12 13 14", "15 16")
    found = [attribute(lm, *query, method=method, steps=3).scores for method in METHODS]
    found += [
        attribute(lm, *query, rule="converged", steps=3).scores,
        answer_probability(lm, *query),
    ]
    with scale_neurons(lm, {(0, 1), (2, 3)}, 2.0):
        found.append(answer_probability(lm, *query))
    with edit_weights(lm, {(0, 1)}, "update", old=[20, 21], new=[30]):
        found.append(answer_probability(lm, *query))
    change = virtual_edit(lm, {(1, 2), (2, 3)}, "update", old=[20, 21], new=[30])
    found += [
        score_rows(lm, [ids], [(0, change)], everywhere=True).log_probability,
        perplexity(lm, ["10 11 12 13"]),
    ]
    found += [column_scores(lm, [ids[0]])[0][0], run_rows(lm, [Row(*ids, neurons=((0, 1),))])]
    found += [
        neuron_vectors(lm, torch.tensor([ids[0]], device=lm.device)),
        next_token(lm, query[0][0]),
    ]
    return [np.asarray(one) for one in found]


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", ["llama3", "gpt2"])
@pytest.mark.parametrize(
    "setting",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: default_dtype(torch.bfloat16),
        lambda: default_dtype(torch.float64),
        deterministic,
        lambda: torch.device("meta"),
    ],
    ids=["autocast", "default bfloat16", "default float64", "deterministic", "default device"],
)
def test_what_the_caller_has_set_in_torch_changes_no_number(setting, family):
    lm = tiny_lm(family, torch.float32)
    expected = every_number(lm)
    for own in (lm, None):  # a model of before, and one loaded in it
        with setting():
            other = own or LanguageModel(lm.model, lm.tokenizer, lm.name)
            with torch.device("cpu"):
                ids = lm.model(
                    torch.tensor([[5, 6]])
                )  # the caller's own passes stay as they were set
            found = every_number(other)
        assert ids.logits.dtype == (
            torch.bfloat16 if setting().__class__ is torch.autocast else torch.float32
        )
        assert all(np.array_equal(one, other) for one, other in zip(found, expected))


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_products_of_another_precision_than_their_dtype_are_refused(precision):
    """TF32 and bfloat16 products keep the dtype's name and not its numbers."""
    lm, query = tiny_lm("llama3", torch.float32), (["10 11 12"], ["13"])
    torch.set_float32_matmul_precision(precision)
    try:
        for use in (
            lambda: attribute(lm, *query),
            lambda: answer_probability(lm, *query),
            lambda: perplexity(lm, ["10 11"]),
            lambda: find_synapses(lm, *query[0]),
            lambda: LanguageModel(lm.model, lm.tokenizer, "again"),
        ):
            with pytest.raises(ValueError, match="set_float32_matmul_precision..highest.."):
                use()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert float(answer_probability(lm, *query)[0]) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="about GNU's OpenMP")
@pytest.mark.parametrize(
    "threads, variable, said",
    [
        (2, None, True),
        (1, None, False),
        (2, "GOMP_SPINCOUNT", False),
        (2, "OMP_WAIT_POLICY", False),
    ],
)
def test_torch_loaded_first_is_said_where_threads_will_spin(threads, variable, said, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1000" if variable == "GOMP_SPINCOUNT" else "PASSIVE")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(paths.__file__.replace("paths.py", "__init__.py"))
    assert [("torch was imported before qlutils" in str(one.message)) for one in caught] == [
        True
    ] * said


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
    plain = save_checkpoint(tmp_path / "plain", "gpt2")
    (tmp_path / "link").symlink_to(plain, target_is_directory=True)
    expected = score_queries(load_model(plain, device="cpu"), [([5, 6], [7])]).log_probability
    for name in (
        "link",
        "sp ace",
        "{brace} %s",
        "-dash",
        "caf\u00e9",
        "مدينة",
        "😀",
        "a'b\"c",
        "new\nline",
        "..hidden..",
    ):
        folder = tmp_path / name
        if name != "link":
            os.rename(plain, folder)
            plain = str(folder)
            (tmp_path / "link").unlink()
            (tmp_path / "link").symlink_to(plain, target_is_directory=True)
        lm = load_model(str(folder), device="cpu")
        assert score_queries(lm, [([5, 6], [7])]).log_probability == expected
        assert Path(paths.slug(str(folder))).name == paths.slug(str(folder))


def test_a_fact_past_the_context_is_left_out_by_name_and_the_others_stay(tmp_path, runs):
    folder = write(tmp_path / "data", PATTERNS, [("word " * 600, "Paris"), ("ann", "Oslo")])
    study = Study("01_localize", model="demo/gpt2", method="ig", data=str(folder), device="cpu")
    queries = localise(study, steps=2)
    assert queries["subject"].unique().tolist() == ["ann"] and len(queries) == 3
    lost = study.load("left_out")
    assert len(lost) == 3 and lost["left_out"].str.contains("reads at most 512").all()


def test_there_are_at_least_sixty_kinds_and_each_is_listed_once():
    kinds = [*TEXTS, *TWINS, *FILES, *(kind for kind, *_ in CALLS)]
    assert len(TEXTS) + len(TWINS) + len(FILES) >= 60 and len(kinds) >= 200
    assert all(len(table) == len(set(table)) for table in (TEXTS, TWINS, FILES))
