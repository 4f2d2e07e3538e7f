"""The bundled text: facts in their phrasings, and general English written by a small seeded
grammar.

The general text is about invented people and places, so it says nothing about the bundled facts;
its words and templates are in ``grammar.json``. A paragraph is a run of sentences on one topic
about one cast of characters. No sentence of the held-out paragraphs (``heldout.txt``, the bundled
perplexity corpus, written by ``python -m demo_models.corpus`` in ``tests``) occurs in the training
text.
"""

import json
import random
import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "qlutils" / "demo"
PATTERNS = FOLDER / "pararel" / "data" / "pattern_data" / "graphs_json"
VOCAB = FOLDER / "pararel" / "data" / "trex_lms_vocab"
HELDOUT_TEXT = FOLDER / "heldout.txt"
SEED = 0
HELDOUT_EVERY = 5  # one (fact, prompt) pair in five is never trained on
HELDOUT_PARAGRAPHS = 120


# ---- facts ---------------------------------------------------------------------------------------
def relations() -> list[str]:
    """Names of the bundled relations, in numerical order ("P17" first)."""
    return sorted((path.stem for path in PATTERNS.glob("P*.jsonl")), key=lambda name: int(name[1:]))


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def held_out(relation: str, fact_index: int, prompt_index: int) -> bool:
    """Whether this pair is kept from training; indices are line numbers in the relation's two
    files.

    The facts of a relation are shuffled (seeded by the relation's name) and laid against its
    prompts in a Latin pattern: each prompt is held out for exactly a fifth of the facts, each fact
    for one or two prompts.
    """
    rows = list(range(len(read_jsonl(VOCAB / f"{relation}.jsonl"))))
    random.Random(f"{SEED} {relation}").shuffle(rows)
    return (rows[fact_index] + prompt_index) % HELDOUT_EVERY == 0


def pairs() -> list[dict]:
    """Every (fact, prompt) pair: relation, fact_index, prompt_index, prompt, answer, held_out."""
    found = []
    for relation in relations():
        facts = read_jsonl(VOCAB / f"{relation}.jsonl")
        patterns = [row["pattern"] for row in read_jsonl(PATTERNS / f"{relation}.jsonl")]
        for f, fact in enumerate(facts):
            for p, pattern in enumerate(patterns):
                prompt = pattern[: pattern.index("[Y]")].strip().replace("[X]", fact["sub_label"])
                where = dict(relation=relation, fact_index=f, prompt_index=p)
                asked = dict(prompt=prompt, answer=fact["obj_label"])
                found.append(where | asked | dict(held_out=held_out(relation, f, p)))
    return found


# ---- general text --------------------------------------------------------------------------------
# lists: what a {slot} draws from (a paragraph's cast keeps its own draws); topics: sentence
# templates.
GRAMMAR = json.loads(Path(__file__).with_name("grammar.json").read_text(encoding="utf-8"))
LISTS, TOPICS = GRAMMAR["lists"], GRAMMAR["topics"]


def _sentence(rng: random.Random, template: str, cast: dict[str, str]) -> str:
    def fill(match: re.Match) -> str:
        return cast.get(match[1]) or rng.choice(LISTS[match[1]])

    text = re.sub(r"\{(\w+)\}", fill, template)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def paragraph(rng: random.Random) -> list[str]:
    """Sentences of one paragraph: five or six of one topic, in the topic's order, then one of
    another."""
    name, friend = rng.sample(LISTS["name"], 2)
    cast = {key: rng.choice(LISTS[key]) for key in ("town", "day", "dish", "game", "craft")}
    cast |= {"name": name, "friend": friend}
    topic, other = rng.sample(sorted(TOPICS), 2)
    chosen = sorted(rng.sample(range(len(TOPICS[topic])), rng.randint(5, 6)))
    templates = [TOPICS[topic][i] for i in chosen] + [rng.choice(TOPICS[other])]
    return [_sentence(rng, template, cast) for template in templates]


def heldout_paragraphs() -> list[list[str]]:
    """The paragraphs, as lists of sentences, that no model is trained on."""
    rng = random.Random(f"{SEED} held out")
    return [paragraph(rng) for _ in range(HELDOUT_PARAGRAPHS)]


def training_paragraphs(count: int) -> list[str]:
    """``count`` paragraphs, none of which shares a sentence with the held-out ones."""
    banned = {sentence for sentences in heldout_paragraphs() for sentence in sentences}
    rng, kept = random.Random(f"{SEED} train"), []
    while len(kept) < count:
        sentences = paragraph(rng)
        if not banned.intersection(sentences):
            kept.append(" ".join(sentences))
    return kept


if __name__ == "__main__":
    text = "".join(" ".join(sentences) + "\n" for sentences in heldout_paragraphs())
    HELDOUT_TEXT.write_text(text, encoding="utf-8")
