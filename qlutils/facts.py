"""Facts, their prompts, and the texts perplexity is measured on.

A *fact* <s, r, o> is queried by several *prompts*, paraphrases that end where the object goes. One
loader reads every dataset, because all of them have ParaRel's layout (Elazar et al. 2021):

    pattern_data/graphs_json/P36.jsonl   {"pattern": "The capital of [X] is [Y].", ...}
    trex_lms_vocab/P36.jsonl             {"sub_label": "France", "obj_label": "Paris", ...}

A file of one's own facts has a line a fact, and its prompts as they stand:

    {"relation": "capital", "subject": "France", "object": "Paris",
     "prompts": ["The capital of France is", ...]}

An answer follows its prompt after one space. Where it must not (scripts without spaces, after an
opening quote), the prompt says so: it ends with `[Y]`, the answer's place, right after its text,
"法国的首都是[Y]".

Subjects, objects and relations are read in Unicode's composed form (NFC), so that two spellings of
one name are one fact.
"""

import codecs
import json
import os
import re
import unicodedata
import warnings
import zlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pooch

from qlutils import paths
from qlutils.checks import CHOICES, check, one_of

PATTERNS = "pattern_data/graphs_json"
FACTS = "trex_lms_vocab"
ANSWER = "[Y]"  # the answer's place in a pattern, and at the end of a prompt that no space follows
NO_RELATION = "facts"  # of a fact in a file of one's own that names none
PARAREL_COMMIT = "cb5554678457beb5ac163d888f1ce8cf174b3f0b"
PARAREL_URL = f"https://raw.githubusercontent.com/yanaiela/pararel/{PARAREL_COMMIT}/data/"
PARAREL_RETRIES = 2
# Where the tokenizer is not at hand; measured on ParaRel: 1.3-1.4 for the paper's models.
TOKENS_A_WORD = 1.35
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet")
WIKITEXT_COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"


@dataclass(frozen=True)
class Fact:
    """A fact <subject, relation, object> and its distinct prompts, in the dataset's order.

    `dataclasses.asdict(fact)` is JSON-able, and `Fact(**that)` gives the fact back.
    """

    relation: str
    subject: str
    object: str
    prompts: tuple[str, ...]

    def __post_init__(self):
        listed = self.prompts if isinstance(self.prompts, (list, tuple)) else [None]
        texts = [self.relation, self.subject, self.object, *listed]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"fact {self!r}: want texts, and of prompts a list of them")
        object.__setattr__(self, "prompts", tuple(self.prompts))  # JSON has lists only

    @property
    def id(self):
        r"""For example `P36|France|Paris`. Results are grouped by it, so no two facts share one:
        where a name itself holds "|" or a backslash, a backslash stands before it."""
        parts = (self.relation, self.subject, self.object)
        return "|".join(re.sub(r"([\\|])", r"\\\1", part) for part in parts)


def load_facts(
    dataset="demo",
    *,
    relations=None,
    facts_per_relation=None,
    seed=0,
    min_patterns=3,
    middle="cut",
):
    """Facts with at least two prompts, by relation (P17 before P101), in the dataset's order.

    dataset: "demo" (bundled), "pararel" (downloaded once, checked against its SHA-256), a folder
        in ParaRel's layout or its parent, or a `.jsonl` file of facts, whose prompts are used as
        they stand: `min_patterns` and `middle` do not concern it.
    relations: names to keep, None for all. min_patterns: those with fewer patterns are left out.
    facts_per_relation: size of a seeded sample of each relation, None for all. A sample does not
        depend on the other relations, and a larger one contains it.
    middle: "cut" ends a prompt at the object's place wherever that is; "drop" keeps only the
        patterns where nothing but punctuation follows it.

    Duplicate facts, and duplicate prompts of a fact, count once. A warning tells what is left out.
    ValueError names the parameter, or the file and line."""
    if facts_per_relation is not None:
        check("facts_per_relation", facts_per_relation, 1)
    check("seed", seed, 0)
    facts = []
    for relation, every in _read(dataset, relations, min_patterns, middle).items():
        usable = [fact for fact in every if len(fact.prompts) >= 2]
        if few := len(every) - len(usable):
            warnings.warn(
                f"{few} facts of {relation} left out, having fewer than 2 prompts",
                stacklevel=2,
            )
        sample = seeded_order(usable, relation, seed)[:facts_per_relation]
        facts += [usable[place] for place in sorted(sample)]
    if not facts:
        raise ValueError(
            f"dataset {str(dataset)!r} has no fact with 2 prompts for {min_patterns=}, {middle=}"
        )
    return facts


def seeded_order(facts, relation, seed):
    """The places of a relation's facts in the order in which a run draws them: a sample is its
    beginning."""
    rng = np.random.default_rng([seed, zlib.crc32(relation.encode())])
    return rng.permutation(len(facts)).tolist()


def seeded(seed, *what):
    """The random numbers with which a choice for `what` is made, whatever else is drawn."""
    return np.random.default_rng([seed, *" ".join(map(str, what)).encode()])


# -- prompts ---------------------------------------------------------------------------------------
def continuation(prompt):
    """(text, gap): what a model reads of a prompt, and what stands between that and the answer.

    The gap is one space, and spaces at the end of the prompt are dropped. A prompt that ends with
    `[Y]` shows where its answer stands: there is no gap unless a space stands before it.
    ValueError: other white space at the end, of which nobody can tell whether a space should
    follow."""
    text = prompt.removesuffix(ANSWER)
    bare = text.rstrip(" ")
    if text != prompt:
        return bare, " " * (bare != text)
    if bare and bare[-1].isspace() and not bare.isspace():
        raise ValueError(
            f"prompt {prompt[-60:]!r} ends with {bare[-1]!r}: remove it, or show where the answer "
            f"stands, right after it ({(bare + ANSWER)[-20:]!r}) or after a space "
            f"({(bare + ' ' + ANSWER)[-20:]!r})"
        )
    return bare, " "


def check_filled(prompt):
    """ValueError for a prompt that is a pattern still, not filled in."""
    text = str(prompt).removesuffix(ANSWER)
    if ANSWER in text or "[X]" in text:
        raise ValueError(
            f"prompt {prompt!r} is a pattern, or text follows {ANSWER} in it: a prompt names its "
            "subject, and ends where the answer stands"
        )


def prompt_template(pattern, middle="cut"):
    """The part of a pattern before `[Y]`, with `[X]` still in it; None when it gives no prompt.

    Runs of spaces count as one (two ParaRel patterns have "[X],  a type of [Y]"), and the space
    before `[Y]` goes: the answer brings its own. Where anything else stands there, `[Y]` stays (see
    `continuation`)."""
    left, found, right = pattern.partition(ANSWER)
    if not found or "[X]" not in left + right:
        raise ValueError(f"pattern {pattern!r} needs both [X] and [Y]")
    if "[X]" not in left or (middle == "drop" and re.search(r"\w", right)):
        return None
    left = re.sub(" {2,}", " ", left).lstrip()
    text = left.rstrip(" ")
    return text if text != left and not text[-1:].isspace() else left + ANSWER


def prompt_tokens(text):
    """About how many tokens a text has, to tell what it costs."""
    return TOKENS_A_WORD * len(text.split())


def check_text(text, where):
    """ValueError for a text that is no Unicode: half of a surrogate pair, which no tokenizer and no
    file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {text[:60]!r} is not valid Unicode: character {error.start} is half of a "
            "surrogate pair; repair it where it comes from"
        ) from None


# -- datasets --------------------------------------------------------------------------------------
def _read(dataset, relations, min_patterns, middle):
    """{relation: its facts}, in natural order; a warning tells which have too few patterns."""
    check("min_patterns", min_patterns, 1)
    one_of("middle", middle, CHOICES["middle"])
    if not isinstance(dataset, (str, Path)):
        raise ValueError(f"dataset {dataset!r}: want 'demo', 'pararel', a folder or a .jsonl file")
    file = Path(os.path.expanduser(dataset))
    if file.suffix.lower() == ".jsonl" and not os.path.isdir(file):
        every = _read_facts_file(file)
        return {relation: every[relation] for relation in _choose(relations, every)}
    folder = _folder_of(dataset)
    patterns, facts = (_relation_files(folder / kind) for kind in (PATTERNS, FACTS))
    found = {}
    for relation in _choose(relations, patterns):
        templates = _read_templates(patterns[relation], middle)
        if len(templates) >= min_patterns:
            path = facts.get(relation, folder / FACTS / f"{relation}.jsonl")
            found[relation] = _read_facts(path, relation, templates)
            continue
        few = f"relation {relation} has {len(templates)} patterns, fewer than {min_patterns=}"
        if relations is not None:
            raise ValueError(f"{few}: lower min_patterns or leave the relation out")
        warnings.warn(f"{few}: it is left out", stacklevel=3)
    return found


def _folder_of(dataset):
    """The folder that holds PATTERNS and FACTS."""
    if dataset == "pararel":
        return _fetch_pararel()
    root = paths.DEMO / "pararel" if dataset == "demo" else Path(os.path.expanduser(dataset))
    for folder in (root, root / "data"):
        if os.path.isdir(folder / PATTERNS):  # False, where `Path.is_dir` raises: it is no path
            return folder
    raise ValueError(
        f"unknown dataset {str(dataset)!r}: use 'demo', 'pararel', a folder that holds {PATTERNS} "
        f"and {FACTS}, or a .jsonl file of facts"
    )


def _relation_files(folder):
    """{relation: its file}. Names as on any system: `.JSONL` counts, and letters are composed."""
    found = {}
    for file in folder.glob("?*.[jJ][sS][oO][nN][lL]"):
        name = unicodedata.normalize("NFC", file.stem)
        check_text(name, f"relation file in {folder}")
        if name in found:
            raise ValueError(
                f"relation {name} has two files, {found[name]} and {file.name}: keep one"
            )
        found[name] = file
    return found


def _choose(relations, known):
    """The wanted of the known relations, in natural order: P17 before P101."""
    known = sorted(known, key=lambda name: (_natural(name), name))
    if relations is None:
        return known
    if not isinstance(relations, (list, tuple, set)) or not relations:
        raise ValueError(f"relations must be a list of relation names or None, not {relations!r}")
    if unknown := [repr(name) for name in relations if name not in known]:
        raise ValueError(
            f"unknown relation {', '.join(unknown)}: the dataset has {', '.join(known)}"
        )
    return [name for name in known if name in relations]


def _natural(name):
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _read_jsonl(path, parse):
    """Yield ("file:line", parse(object)) for the lines of a JSON-lines file. Its ValueErrors say
    where; an empty file is one."""
    if not path.is_file():
        raise ValueError(f"missing data file {path}")
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        raise ValueError(f"data file {path} is empty")
    # not splitlines: a label may hold a Unicode line separator
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                parsed = parse(_json_object(line))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            yield where, parsed


def _json_object(line):
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a thousand brackets
        raise ValueError(f"not a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: {record!r}")
    return record


def _field(record, name):
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} must be a text that is not empty, not {value!r}")
    check_text(value, f"field {name!r}")
    return unicodedata.normalize("NFC", value.strip())


def _read_templates(path, middle):
    """The templates of a relation's patterns, in order; None of those that give no prompt."""
    found = _read_jsonl(path, lambda record: prompt_template(_field(record, "pattern"), middle))
    return [template for _, template in found]


def _read_facts(path, relation, templates):
    """The distinct facts of a relation's file, with the prompts its templates give."""

    def fact(record):
        subject = _field(record, "sub_label")
        answer = _field(record, "obj_label")
        prompts = []
        for template in filter(None, templates):
            # str.join, because a subject may itself hold "[X]", "[Y]" or a backslash
            prompts.append(subject.join(template.split("[X]")))
            if prompts[-1].endswith(ANSWER) != template.endswith(ANSWER):
                raise ValueError(
                    f"the subject {subject!r} ends a prompt with {ANSWER}, "
                    "which marks the answer's place there: leave this fact out"
                )
        return Fact(relation, subject, answer, tuple(dict.fromkeys(prompts)))

    return list(dict.fromkeys(found for _, found in _read_jsonl(path, fact)))


def _read_facts_file(path):
    """{relation: its facts} of a file with a line a fact."""
    facts = {}  # {id: the fact, and where it stands}
    of_relation = {}
    for where, fact in _read_jsonl(path, _own_fact):
        known, line = facts.setdefault(fact.id, (fact, where))
        if fact is known:
            of_relation.setdefault(fact.relation, []).append(fact)
        elif fact != known:
            raise ValueError(
                f"{where}: the fact of {line} again, with other prompts: "
                "give all of a fact's prompts in one line"
            )
    return of_relation


def _own_fact(record):
    """The fact of a line, with its distinct prompts."""
    misspelt = get_close_matches("relation", record, cutoff=0.8)
    if misspelt and "relation" not in record:  # it would be a fact of no relation, without a word
        raise ValueError(f"field {misspelt[0]!r}: name it 'relation', or leave it out")
    record = {"relation": NO_RELATION, **record}
    named = [_field(record, name) for name in ("relation", "subject", "object")]
    prompts = {}
    given = record.get("prompts")
    if not isinstance(given, list) or not given:
        raise ValueError(f"field 'prompts' must be a list of the fact's prompts, not {given!r}")
    for prompt in given:
        text = prompt.removesuffix(ANSWER) if isinstance(prompt, str) else ""
        if not text.strip():
            raise ValueError(f"field 'prompts' holds {prompt!r}; a prompt is a text, not empty")
        check_text(prompt, "field 'prompts'")
        check_filled(prompt)
        prompts.setdefault(continuation(unicodedata.normalize("NFC", prompt)), prompt)
    return Fact(*named, tuple(prompts.values()))


# -- downloads -------------------------------------------------------------------------------------
def pararel_registry():
    """{file: SHA-256} of the ParaRel files the study reads, at the pinned commit."""
    return json.loads(paths.packaged("pararel_sha256.json"))


def _fetch_pararel():
    """The folder of the ParaRel files, each of the published SHA-256."""
    pooch.get_logger().setLevel("WARNING")
    store = pooch.create(
        path=pooch.os_cache("qlutils") / f"pararel-{PARAREL_COMMIT[:8]}",
        base_url=PARAREL_URL,
        registry=pararel_registry(),
        env="QLUTILS_CACHE",
        retry_if_failed=PARAREL_RETRIES,
    )
    for name in store.registry:
        try:
            store.fetch(name)
        except (ValueError, OSError) as error:  # another SHA-256, or offline
            raise ValueError(
                f"ParaRel file {name} could not be had from {PARAREL_URL}: go online, "
                f"or give a local copy's folder as the dataset ({error})"
            ) from error
    return store.abspath


def perplexity_texts(source):
    """Paragraphs to measure perplexity on; the caller leaves out those too short for its tokenizer.

    source: "demo" (the bundled held-out text), "wikitext-2" (test split, from the Hugging Face hub
        or its cache), or a text file, or a folder with `test.txt`, with one paragraph a line
        (headings and empty lines are dropped).
    """
    lines = _wikitext_lines() if source == "wikitext-2" else _lines_of(source)
    texts = [text for text in map(str.strip, lines) if not re.fullmatch(r"(=( .* )=)?", text)]
    if not texts:
        raise ValueError(f"perplexity text {str(source)!r} has no paragraph")
    return texts


def text_file(source):
    """The file of a text for perplexity, there or not: `source`, or a folder's `test.txt`."""
    path = paths.DEMO / "heldout.txt" if source == "demo" else Path(source)
    return path / "test.txt" if os.path.isdir(path) else path


def _lines_of(source):
    path = text_file(source) if isinstance(source, (str, Path)) else ""
    if not os.path.isfile(path):
        raise ValueError(
            f"no perplexity text at {source!r}: use 'demo', 'wikitext-2', or a text file with one "
            "paragraph a line"
        )
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except ValueError as error:
        raise ValueError(f"perplexity text {path} is not UTF-8: {error}") from None


def _wikitext_lines():
    try:
        path = huggingface_hub.hf_hub_download(
            *WIKITEXT, repo_type="dataset", revision=WIKITEXT_COMMIT
        )
    except Exception as error:  # the hub has a class for every way of being offline
        raise ValueError(
            f"WikiText-2 {WIKITEXT} is neither in the cache nor to be downloaded: go online once, "
            "or give a text file with one paragraph a line, or 'demo' "
            f"({type(error).__name__}: {error})"
        ) from error
    return pd.read_parquet(path)["text"].tolist()
