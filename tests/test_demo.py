"""The bundled facts, text and models: their shape, and that the models know what the card says they
know."""

import random
import re
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import transformers
from demo_models import corpus
from demo_models.train import measure

ROOT = Path(__file__).resolve().parents[1]
PARAREL = ROOT.parent / "shared" / "data" / "pararel" / "data" / "pattern_data" / "graphs_json"
MODELS = corpus.FOLDER / "models"
NAMES = ("gpt2", "llama2", "llama3")


@pytest.fixture(scope="module")
def pairs():
    return corpus.pairs()


@pytest.fixture(scope="module")
def loaded():
    """Each model by transformers alone, loaded once."""

    @cache
    def load(name):
        model = transformers.AutoModelForCausalLM.from_pretrained(MODELS / name).eval()
        return model, transformers.AutoTokenizer.from_pretrained(MODELS / name)

    return load


def letters(pattern):
    return re.sub(r"[^a-z]", "", pattern.lower())


def patterns(folder):
    rows = [row for path in folder.glob("*.jsonl") for row in corpus.read_jsonl(path)]
    return [row["pattern"] for row in rows]


def test_dataset_has_36_relations_of_20_facts_and_at_least_6_patterns_each():
    names = corpus.relations()
    assert len(names) == 36
    for name in names:
        facts = corpus.read_jsonl(corpus.VOCAB / f"{name}.jsonl")
        rows = corpus.read_jsonl(corpus.PATTERNS / f"{name}.jsonl")
        assert len({row["sub_label"] for row in facts}) == 20 == len(facts), name
        assert len({letters(row["pattern"]) for row in rows}) == len(rows) >= 6, name
        assert all(set(row) == {"sub_label", "obj_label", "uuid"} for row in facts)
        assert all(set(row) == {"pattern", "lemma", "extended_lemma", "tense"} for row in rows)
        for row in rows:  # each holds the subject once and ends with the object
            words = row["pattern"].split(" ")
            assert row["pattern"].count("[X]") == row["pattern"].count("[Y]") == 1, row
            assert words[-1] == "[Y]." and all(words), row


def test_a_prompt_determines_its_answer_and_no_prompt_occurs_twice(pairs):
    prompts = [pair["prompt"] for pair in pairs]
    assert len(set(prompts)) == len(prompts) == 36 * 20 * 7
    assert all(prompt.split(" ") == prompt.split() for prompt in prompts)
    for name in corpus.relations():
        facts = corpus.read_jsonl(corpus.VOCAB / f"{name}.jsonl")
        mine = [pair for pair in pairs if pair["relation"] == name]
        assert all(facts[pair["fact_index"]]["sub_label"] in pair["prompt"] for pair in mine)


def test_one_pair_in_five_is_held_out_evenly(pairs):
    pairs = pd.DataFrame(pairs)
    assert pairs["held_out"].mean() == 1 / 5
    assert pairs.groupby(["relation", "prompt_index"])["held_out"].sum().eq(4).all()
    assert pairs.groupby(["relation", "fact_index"])["held_out"].sum().isin([1, 2]).all()


def test_no_pattern_is_one_of_pararels():
    if not PARAREL.is_dir():
        pytest.skip(f"ParaRel is not at {PARAREL.relative_to(ROOT.parent)} beside the project")
    theirs = {letters(pattern) for pattern in patterns(PARAREL)}
    assert len(theirs) > 250
    assert not [pattern for pattern in patterns(corpus.PATTERNS) if letters(pattern) in theirs]


def test_heldout_text_is_what_the_generator_writes_and_shares_no_sentence_with_training():
    held = corpus.heldout_paragraphs()
    lines = corpus.HELDOUT_TEXT.read_text(encoding="utf-8").splitlines()
    assert lines == [" ".join(sentences) for sentences in held] and len(lines) == 120
    training = "\n".join(corpus.training_paragraphs(400))
    assert not [sentence for sentences in held for sentence in sentences if sentence in training]


def test_general_text_never_holds_a_subject_with_its_object():
    texts = corpus.training_paragraphs(1500) + corpus.HELDOUT_TEXT.read_text("utf-8").splitlines()
    words = [" " + re.sub(r"\W+", " ", text) + " " for text in texts]
    for relation in corpus.relations():
        for fact in corpus.read_jsonl(corpus.VOCAB / f"{relation}.jsonl"):
            names = [re.sub(r"\W+", " ", fact[key]).strip() for key in ("sub_label", "obj_label")]
            assert not [text for text in words if all(f" {name} " in text for name in names)], fact


def test_weights_of_all_three_are_at_most_30_mb_and_safetensors_only():
    weights = list(MODELS.glob("*/model.safetensors"))
    assert {path.parent.name for path in weights} == set(NAMES)
    assert sum(path.stat().st_size for path in weights) <= 30e6
    assert not [path for path in MODELS.rglob("*") if path.suffix in {".bin", ".pt", ".pth"}]


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_adds_bos_only_for_llama_and_answers_continue_prompts(name, loaded, pairs):
    _, tokenizer = loaded(name)
    ids = tokenizer("The market opens").input_ids
    assert (ids[0] == tokenizer.bos_token_id) == (name != "gpt2")
    assert ids.count(tokenizer.eos_token_id) == 0 and tokenizer.pad_token is None
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The market opens"
    prompts = tokenizer([pair["prompt"] for pair in pairs]).input_ids
    wholes = tokenizer([f"{pair['prompt']} {pair['answer']}" for pair in pairs]).input_ids
    for prompt, whole in zip(prompts, wholes):
        assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)
    lines = corpus.HELDOUT_TEXT.read_text(encoding="utf-8").splitlines()
    assert min(map(len, tokenizer(lines, add_special_tokens=False).input_ids)) >= 64


@pytest.mark.parametrize("name", NAMES)
def test_generation_gives_the_answers_of_trained_and_heldout_prompts(name, loaded, pairs):
    """Real generation, one prompt at a time, on a seeded sample; the log is over all pairs."""
    model, tokenizer = loaded(name)
    rng = random.Random(0)
    for held, least in ((False, 0.95), (True, 0.85)):
        sample = rng.sample([pair for pair in pairs if pair["held_out"] == held], 75)
        right = 0
        for pair in sample:
            inputs = tokenizer(pair["prompt"], return_tensors="pt")
            length = inputs.input_ids.shape[1]
            answer = tokenizer(f"{pair['prompt']} {pair['answer']}").input_ids[length:]
            options = dict(max_new_tokens=len(answer), pad_token_id=tokenizer.eos_token_id)
            output = model.generate(**inputs, **options, do_sample=False)
            right += output[0, length:].tolist() == answer
        # The sample may fall two answers short of a share that all pairs together reach.
        assert right >= least * len(sample) - 2, (name, held, right)


@pytest.mark.parametrize("name", NAMES)
def test_the_log_and_the_card_state_what_the_weights_do(name, loaded, pairs):
    found = measure(*loaded(name), pairs)
    logged = pd.read_csv(MODELS / name / "training_log.csv").iloc[-1]
    card = (corpus.FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert found["trained_accuracy"] >= 0.95 and found["heldout_accuracy"] >= 0.85
    for key in ("trained_accuracy", "heldout_accuracy"):
        assert found[key] == pytest.approx(logged[key], abs=0.002)
        assert f"{100 * logged[key]:.1f} %" in card, (name, key)
    assert found["heldout_perplexity"] == pytest.approx(logged["heldout_perplexity"], rel=0.01)
    assert f"{logged['heldout_perplexity']:.2f}" in card
