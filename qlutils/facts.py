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
No torch or transformers here: tokenisation belongs to `models.py`.
"""

import codecs
import json
import logging
import os
import re
import unicodedata
import zlib
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd

from qlutils.paths import DEMO

log = logging.getLogger(__name__)

PATTERNS, FACTS = "pattern_data/graphs_json", "trex_lms_vocab"
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
    """A fact <subject, relation, object> and its neighbour prompts, distinct and in the dataset's
    order.

    `dataclasses.asdict(fact)` is JSON-able, and `Fact(**that)` gives the fact back.
    """

    relation: str
    subject: str
    object: str
    prompts: tuple[str, ...]

    def __post_init__(self):
        for name in ("relation", "subject", "object"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"fact {self!r}: {name} must be a text")
        if not isinstance(self.prompts, (list, tuple)) or not all(
            isinstance(text, str) for text in self.prompts
        ):
            raise ValueError(
                f"fact {self.id}: prompts must be a list of texts, not {self.prompts!r}"
            )
        object.__setattr__(self, "prompts", tuple(self.prompts))  # JSON has lists only

    @property
    def id(self) -> str:
        r"""For example `P36|France|Paris`. Results are grouped by it, so no two facts share one:
        where a name itself holds "|" or a backslash, a backslash stands before it."""
        return "|".join(
            re.sub(r"([\\|])", r"\\\1", part) for part in (self.relation, self.subject, self.object)
        )


def load_facts(
    dataset="demo",
    *,
    relations=None,
    facts_per_relation=None,
    seed=0,
    min_patterns=3,
    middle="cut",
    warn=True,
) -> list[Fact]:
    """Facts with at least two prompts, sorted by relation (P17 before P101), then in the dataset's
    order.

    dataset: "demo" (bundled), "pararel" (downloaded once into the user's cache, or the folder
        QLUTILS_CACHE, and checked against its SHA-256), a folder in ParaRel's layout (the one that
        holds `pattern_data` and `trex_lms_vocab`, or its parent), or a `.jsonl` file of facts,
        whose prompts are used as they stand: `min_patterns` and `middle` do not concern it.
    relations: names to keep, None for all.
    facts_per_relation: size of a seeded sample of each relation, None for all. The sample of one
        relation does not depend on the others asked for, and a larger sample contains the smaller
        one.
    min_patterns: relations with fewer patterns are left out (ParaRel: 36 have at least 3).
    middle: "cut" ends a prompt at the object's place wherever that is; "drop" keeps only the
        patterns where nothing but punctuation follows it.
    warn: False where another call has said what is left out.

    Duplicate facts are dropped, and so are duplicate prompts of a fact. Facts left with fewer than
    two prompts are left out, and so are relations with too few patterns; warnings count or name
    them. Raises ValueError naming the parameter, or the file and line.
    """
    _check_count("facts_per_relation", facts_per_relation, optional=True)
    _check_count("min_patterns", min_patterns)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, not {seed!r}")
    if middle not in ("cut", "drop"):
        raise ValueError(f"middle must be 'cut' or 'drop', not {middle!r}")
    facts, left_out, short = [], {}, []
    if _is_facts_file(dataset):
        found = _read_facts_file(Path(os.path.expanduser(dataset)))
        chosen = _choose_relations(relations, _natural(found))
        found = {relation: found[relation] for relation in chosen}
    else:
        found, short = _read_pararel(dataset, relations, min_patterns, middle)
    for relation, every in found.items():
        usable = [fact for fact in every if len(fact.prompts) >= 2]
        if len(usable) < len(every):
            left_out[relation] = len(every) - len(usable)
        facts += _sample(usable, relation, facts_per_relation, seed)
    if short and warn:
        log.warning(
            "%d relations left out, having fewer than %d patterns: %s",
            len(short),
            min_patterns,
            ", ".join(short),
        )
    if left_out and warn:
        log.warning(
            "%d facts left out, having fewer than 2 prompts: %s",
            sum(left_out.values()),
            ", ".join(f"{relation} {n}" for relation, n in left_out.items()),
        )
    if not facts:
        raise ValueError(
            f"dataset {str(dataset)!r} has no fact with 2 prompts for these settings "
            f"(min_patterns={min_patterns}, middle={middle!r})"
        )
    return facts


def seeded_order(facts: list[Fact], relation: str, seed: int) -> list[int]:
    """The places of one relation's facts in the order in which a run draws them: a sample is its
    beginning."""
    rng = np.random.default_rng([seed, zlib.crc32(relation.encode())])
    return rng.permutation(len(facts)).tolist()


def continuation(prompt: str) -> tuple[str, str]:
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
            f"prompt {prompt[-60:]!r} ends with {bare[-1]!r}: remove it, or show "
            f"where the answer stands, right after it ({(bare + ANSWER)[-20:]!r}) or "
            f"after a space ({(bare + ' ' + ANSWER)[-20:]!r})"
        )
    return bare, " "


def prompt_template(pattern: str, middle: str = "cut") -> str | None:
    """The part of a pattern before `[Y]`, with `[X]` still in it; None when the pattern gives no
    prompt.

    Runs of spaces count as one (two ParaRel patterns have "[X],  a type of [Y]"), and the space
    before `[Y]`
    goes: the answer brings its own. Where anything else stands there, `[Y]` stays (see
    `continuation`).
    """
    left, found, right = pattern.partition(ANSWER)
    if not found or "[X]" not in left + right:
        raise ValueError(f"pattern {pattern!r} needs both [X] and [Y]")
    if "[X]" not in left or (middle == "drop" and re.search(r"\w", right)):
        return None
    left = re.sub(" {2,}", " ", left).lstrip()
    text = left.rstrip(" ")
    return text if text != left and not text[-1:].isspace() else left + ANSWER


def prompt_tokens(text: str) -> float:
    """About how many tokens a text has, to tell what it costs."""
    return TOKENS_A_WORD * len(text.split())


def perplexity_texts(source="demo") -> list[str]:
    """Paragraphs to measure perplexity on; the caller leaves out those that are too short for its
    tokenizer.

    source: "demo" (the bundled held-out text), "wikitext-2" (test split, from the Hugging Face hub
        or its cache), or a text file, or a folder with `test.txt`, with one paragraph a line
        (headings and empty lines are dropped).
    """
    if not isinstance(source, (str, Path)):
        raise ValueError(
            f"perplexity text must be 'demo', 'wikitext-2', a file or a folder, not {source!r}"
        )
    if source == "wikitext-2":
        lines = _wikitext_lines()
    else:
        path = DEMO / "heldout.txt" if source == "demo" else Path(source)
        path = path / "test.txt" if os.path.isdir(path) else path
        if not os.path.isfile(path):
            raise ValueError(
                f"no perplexity text at {str(source)!r}: use 'demo', 'wikitext-2', or a text "
                "file with one paragraph a line"
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except ValueError as error:
            raise ValueError(f"perplexity text {path} is not UTF-8: {error}") from None
    texts = [line.strip() for line in lines]
    texts = [text for text in texts if text and not re.fullmatch(r"=( .* )=", text)]
    if not texts:
        raise ValueError(f"perplexity text {str(source)!r} has no paragraph")
    return texts


def check_text(text: str, where: str) -> None:
    """ValueError for a text that is no Unicode: half of a surrogate pair, which no tokenizer and no
    file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {text[:60]!r} is not valid Unicode: character {error.start} is half of a "
            f"surrogate "
            "pair; repair it where it comes from"
        ) from None


def _check_count(name, value, optional=False):
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(
            f"{name} must be an integer of at least 1{' or None' if optional else ''}, "
            f"not {value!r}"
        )


def _read_pararel(dataset, relations, min_patterns, middle):
    """({relation: its facts}, the relations left out for want of patterns) of data in ParaRel's
    layout."""
    known, fetch = _open_dataset(dataset)
    found, short = {}, []
    for relation in _choose_relations(relations, known):
        templates, n_patterns = _read_patterns(fetch(PATTERNS, relation), middle)
        if n_patterns >= min_patterns:
            found[relation] = _read_facts(fetch(FACTS, relation), relation, templates)
        elif relations is None:
            short.append(relation)
        else:
            raise ValueError(
                f"relation {relation} has {n_patterns} patterns, fewer than "
                f"min_patterns={min_patterns}: lower min_patterns or leave the "
                "relation out"
            )
    return found, short


def _open_dataset(dataset):
    """(relation names in natural order, function (kind, relation) -> local file)."""
    if not isinstance(dataset, (str, Path)):
        raise ValueError(
            f"dataset must be 'demo', 'pararel', a folder or a .jsonl file, not {dataset!r}"
        )
    if dataset == "pararel":
        names = [Path(file).stem for file in _pararel_registry() if file.startswith(PATTERNS)]
        return _natural(names), _fetch_pararel
    root = DEMO / "pararel" if dataset == "demo" else Path(os.path.expanduser(dataset))
    for folder in (root, root / "data"):
        if os.path.isdir(
            folder / PATTERNS
        ):  # False, where `Path.is_dir` raises, for what cannot be a path
            files = {kind: _relation_files(folder / kind) for kind in (PATTERNS, FACTS)}
            return _natural(files[PATTERNS]), lambda kind, relation: files[kind].get(
                relation, folder / kind / f"{relation}.jsonl"
            )
    raise ValueError(
        f"unknown dataset {str(dataset)!r}: use 'demo', 'pararel', a folder that "
        f"holds {PATTERNS} and {FACTS}, or a .jsonl file of facts"
    )


def _relation_files(folder):
    """{relation: its file}. Names as on any system: `.JSONL` counts, and letters are composed."""
    found = {}
    for file in folder.iterdir() if os.path.isdir(folder) else ():
        if file.suffix.lower() == ".jsonl":
            name = unicodedata.normalize("NFC", file.stem)
            check_text(name, f"relation file in {folder}")
            if name in found:
                raise ValueError(
                    f"relation {name} has two files, {found[name]} and {file.name}: keep one"
                )
            found[name] = file
    return found


def _natural(names):
    return sorted(
        sorted(names),
        key=lambda name: [
            (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
        ],
    )


def _choose_relations(relations, known):
    if relations is None:
        return known
    if (
        not isinstance(relations, (list, tuple, set))
        or not relations
        or not all(isinstance(name, str) for name in relations)
    ):
        raise ValueError(f"relations must be a list of relation names or None, not {relations!r}")
    unknown = [name for name in relations if name not in known]
    if unknown:
        raise ValueError(
            f"unknown relation {', '.join(map(repr, unknown))}: the dataset has {', '.join(known)}"
        )
    return [name for name in known if name in relations]


def _read_jsonl(path):
    """Yield ("file:line", object) for the lines of a JSON-lines file; an empty file is an error."""
    if not path.is_file():
        raise ValueError(f"missing data file {path}")
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = lines.split(b"\n")  # not splitlines: a label may hold a Unicode line separator
    empty = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a thousand brackets
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: not a JSON object: {record!r}")
        empty = False
        yield f"{path}:{number}", record
    if empty:
        raise ValueError(f"data file {path} is empty")


def _field(record, name, where):
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: field {name!r} must be a text that is not empty, not {value!r}")
    check_text(value, f"{where}: field {name!r}")
    return unicodedata.normalize("NFC", value.strip())


def _read_patterns(path, middle):
    """(prompt templates in order, number of patterns in the file)."""
    templates, n_patterns = [], 0
    for where, record in _read_jsonl(path):
        n_patterns += 1
        pattern = _field(record, "pattern", where)
        try:
            template = prompt_template(pattern, middle)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if template is not None:
            templates.append(template)
    return templates, n_patterns


def _read_facts(path, relation, templates):
    facts = {}
    for where, record in _read_jsonl(path):
        subject, answer = _field(record, "sub_label", where), _field(record, "obj_label", where)
        # str.join, because a subject may itself hold "[X]", "[Y]" or a backslash
        prompts = {subject.join(template.split("[X]")): template for template in templates}
        for prompt, template in prompts.items():
            if prompt.endswith(ANSWER) != template.endswith(ANSWER):
                raise ValueError(
                    f"{where}: the subject {subject!r} ends a prompt with {ANSWER}, "
                    "which marks the answer's place there: leave this fact out"
                )
        facts.setdefault((subject, answer), Fact(relation, subject, answer, tuple(prompts)))
    return list(facts.values())


def _is_facts_file(dataset):
    named = isinstance(dataset, (str, Path)) and str(dataset).lower().endswith(".jsonl")
    return named and not os.path.isdir(os.path.expanduser(dataset))


def _read_facts_file(path):
    """{relation: its facts} of a file with a line a fact."""
    facts, lines = {}, {}
    for where, record in _read_jsonl(path):
        relation = _field({"relation": NO_RELATION, **record}, "relation", where)
        subject, answer = _field(record, "subject", where), _field(record, "object", where)
        fact = Fact(relation, subject, answer, _read_prompts(record, where))
        known = facts.setdefault(relation, {}).setdefault((subject, answer), fact)
        if known != fact:
            raise ValueError(
                f"{where}: the fact of {lines[fact.id]} again, with other prompts: "
                "give all of a fact's prompts in one line"
            )
        lines.setdefault(fact.id, where)
    return {relation: list(some.values()) for relation, some in facts.items()}


def _read_prompts(record, where):
    """The distinct prompts of a fact's line."""
    prompts, name, given = {}, "field 'prompts'", record.get("prompts")
    if not isinstance(given, list) or not given:
        raise ValueError(
            f"{where}: {name} must be a list of texts, the prompts of the fact, not {given!r}"
        )
    for prompt in given:
        if not isinstance(prompt, str) or not prompt.removesuffix(ANSWER).strip():
            raise ValueError(
                f"{where}: {name} holds {prompt!r}; a prompt is a text that is not empty"
            )
        check_text(prompt, f"{where}: {name}")
        if ANSWER in prompt.removesuffix(ANSWER):
            raise ValueError(
                f"{where}: {name} has {prompt!r}, where text follows {ANSWER}, the "
                "answer's place: a prompt ends there"
            )
        try:
            same = continuation(unicodedata.normalize("NFC", prompt))
            prompts.setdefault(same, prompt)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return tuple(prompts.values())


def _sample(facts, relation, size, seed):
    if size is None or size >= len(facts):
        return facts
    return [facts[i] for i in sorted(seeded_order(facts, relation, seed)[:size])]


def _pararel_registry():
    """{file: SHA-256} of the ParaRel files the study reads, at the pinned commit."""
    return json.loads(Path(__file__).with_name("pararel_sha256.json").read_text(encoding="utf-8"))


def _fetch_pararel(kind, relation):
    import pooch

    pooch.get_logger().setLevel("WARNING")
    store = pooch.create(
        path=pooch.os_cache("qlutils") / f"pararel-{PARAREL_COMMIT[:8]}",
        base_url=PARAREL_URL,
        registry=_pararel_registry(),
        env="QLUTILS_CACHE",
        retry_if_failed=PARAREL_RETRIES,
    )
    name = f"{kind}/{relation}.jsonl"
    try:
        return Path(store.fetch(name))
    except ValueError as error:
        raise ValueError(
            f"ParaRel file {name}: the download's SHA-256 is not the published one; try again, "
            f"or give a local copy's folder as the dataset ({error})"
        ) from None
    except OSError as error:
        raise ConnectionError(
            f"ParaRel file {name} could not be downloaded from {PARAREL_URL}: go online, "
            f"or give a local copy's folder as the dataset ({error})"
        ) from error


def _wikitext_lines():
    from huggingface_hub import hf_hub_download

    repository, file = WIKITEXT
    try:
        path = hf_hub_download(repository, file, repo_type="dataset", revision=WIKITEXT_COMMIT)
    except Exception as error:  # the hub has a class for every way of being offline
        raise ValueError(
            f"WikiText-2 ({repository}, {file}) is neither in the cache nor to be downloaded: "
            "go online once, or give a text file with one paragraph a line, or 'demo' "
            f"({type(error).__name__}: {error})"
        ) from error
    return pd.read_parquet(path)["text"].tolist()
