"""Train the bundled tokenizers and models from scratch: ``python -m demo_models.train [--only
NAME]`` in ``tests``.

One recipe for the three models; what differs between them is in ``RECIPES``. A model sees each row
from its first position, as at inference: a fact's sentence alone, or one to four paragraphs of
general text. Rows end with the end-of-text token, and start with BOS where the tokenizer adds one.
Nothing is downloaded.
"""

import argparse
import math
import random
import time
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from demo_models import corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

MODELS = corpus.FOLDER / "models"
CONTEXT = 512
PARAGRAPHS = 1500  # of general text for training
PARAGRAPHS_PER_EPOCH = 300
TOKENS_PER_BATCH = 1280  # padded
LEARNING_RATE = 2e-3
SEED = 0


class Recipe(NamedTuple):
    """What differs between the bundled models."""

    vocabulary: int
    bos: str | None
    eos: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    tied: bool
    epochs: int


RECIPES = {
    "gpt2": Recipe(4000, None, "<|endoftext|>", 128, 6, 4, 4, 512, True, 30),
    "llama2": Recipe(4000, "<s>", "</s>", 128, 6, 4, 4, 352, False, 26),
    "llama3": Recipe(5000, "<|begin_of_text|>", "<|end_of_text|>", 144, 7, 8, 4, 384, False, 20),
}


# ---- tokenizers and models -----------------------------------------------------------------------
def build_tokenizer(recipe: Recipe, texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the post-processor adds BOS where there is one; no pad token, as in the
    originals."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [token for token in (recipe.bos, recipe.eos) if token]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=recipe.vocabulary, **options)
    tokenizer.train_from_iterator(texts, trainer)
    if recipe.bos:
        bos_id = tokenizer.token_to_id(recipe.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{recipe.bos} $A",
            pair=f"{recipe.bos} $A {recipe.bos}:1 $B:1",
            special_tokens=[(recipe.bos, bos_id)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=recipe.bos or recipe.eos,
        eos_token=recipe.eos,
        model_max_length=CONTEXT,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast):
    """A causal language model of the recipe's shape with random weights."""
    shape = dict(vocab_size=len(tokenizer), tie_word_embeddings=recipe.tied)
    shape |= dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    if recipe.bos is None:
        shape |= dict(n_positions=CONTEXT, n_embd=recipe.width, n_layer=recipe.layers)
        shape |= dict(n_head=recipe.heads, n_inner=recipe.mlp)
        shape |= dict(activation_function="gelu_pytorch_tanh")  # gelu_new, faster
        shape |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return GPT2LMHeadModel(GPT2Config(**shape))
    shape |= dict(max_position_embeddings=CONTEXT, hidden_size=recipe.width)
    shape |= dict(intermediate_size=recipe.mlp, num_hidden_layers=recipe.layers)
    shape |= dict(num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads)
    return LlamaForCausalLM(LlamaConfig(**shape))


# ---- rows and batches ----------------------------------------------------------------------------
def fact_rows(tokenizer, pairs: list[dict]) -> list[list[int]]:
    """Token ids of each pair's full sentence, ended by EOS."""
    sentences = [f"{pair['prompt']} {pair['answer']}." for pair in pairs]
    return [ids + [tokenizer.eos_token_id] for ids in tokenizer(sentences).input_ids]


def text_rows(tokenizer, paragraphs: list[list[int]], rng: random.Random) -> list[list[int]]:
    """This epoch's general text: paragraphs, alone or in runs of up to four, cut to the context."""
    chosen, rows, start = rng.sample(paragraphs, PARAGRAPHS_PER_EPOCH), [], 0
    while start < len(chosen):
        length = rng.choice((1, 1, 1, 2, 4))
        rows.append([token for ids in chosen[start : start + length] for token in ids][:CONTEXT])
        start += length
    return rows


def batches(rows: list[list[int]], rng: random.Random) -> list[list[list[int]]]:
    """Rows of similar length together, at most TOKENS_PER_BATCH with padding, in random order."""
    groups = [[]]
    for row in sorted(rows, key=lambda row: (len(row), rng.random())):
        if groups[-1] and (len(groups[-1]) + 1) * len(row) > TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    return groups


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    """(rows, longest), filled on the right: in a causal model padding after a row cannot touch
    it."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


# ---- measures ------------------------------------------------------------------------------------
@torch.no_grad()
def knows(model, tokenizer, pairs: list[dict], batch_size: int = 128) -> list[bool]:
    """Per pair: is the whole answer the greedy continuation? One forward decides it: the
    continuation is the answer exactly when every answer token is the argmax after the prompt and
    the tokens before it."""
    prompts = tokenizer([pair["prompt"] for pair in pairs]).input_ids
    wholes = tokenizer([f"{pair['prompt']} {pair['answer']}" for pair in pairs]).input_ids
    order, right = sorted(range(len(pairs)), key=lambda i: len(wholes[i])), [False] * len(pairs)
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        guesses = model(padded([wholes[i] for i in some], 0)).logits.argmax(-1).tolist()
        for i, guess in zip(some, guesses):
            n, whole = len(prompts[i]), wholes[i]
            right[i] = whole[:n] == prompts[i] and guess[n - 1 : len(whole) - 1] == whole[n:]
    return right


@torch.no_grad()
def heldout_perplexity(model, tokenizer, texts: list[str], max_tokens: int = 256) -> float:
    """exp(mean NLL of all tokens but each paragraph's first), over the paragraphs together."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids[:max_tokens]])
        loss = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        total, count = total + loss.item(), count + ids.shape[1] - 1
    return math.exp(total / count)


def measure(model, tokenizer, pairs: list[dict]) -> dict[str, float]:
    """Accuracy on trained and on held-out pairs, by greedy decoding of the whole answer."""
    model.eval()
    right = knows(model, tokenizer, pairs)
    found = {}
    for name, held in (("trained", False), ("heldout", True)):
        those = [r for r, pair in zip(right, pairs) if pair["held_out"] == held]
        found[f"{name}_accuracy"] = sum(those) / len(those)
    texts = corpus.HELDOUT_TEXT.read_text(encoding="utf-8").splitlines()
    return found | {"heldout_perplexity": heldout_perplexity(model, tokenizer, texts)}


# ---- training ------------------------------------------------------------------------------------
def optimiser(model) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def train_epoch(model, groups, optimizer, schedule) -> float:
    """One pass over the batches; the mean loss per token."""
    model.train()
    total, count = 0.0, 0
    for group in groups:
        ids = padded(group, 0)
        # shifting the logits would copy them
        targets = F.pad(padded(group, -100)[:, 1:], (0, 1), value=-100).flatten()
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), targets, ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens = int((targets != -100).sum())
        total, count = total + loss.item() * tokens, count + tokens
    return total / count


def train(name: str) -> None:
    """Train one bundled model and write its folder."""
    recipe, started = RECIPES[name], time.perf_counter()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # so that the result does not depend on the number of cores
    rng = random.Random(SEED)
    pairs = corpus.pairs()
    trained = [pair for pair in pairs if not pair["held_out"]]
    general = corpus.training_paragraphs(PARAGRAPHS)
    texts = general + [f"{pair['prompt']} {pair['answer']}." for pair in trained]
    tokenizer = build_tokenizer(recipe, texts)
    model = build_model(recipe, tokenizer)
    facts = fact_rows(tokenizer, trained)
    paragraphs = [ids + [tokenizer.eos_token_id] for ids in tokenizer(general).input_ids]
    epochs = [
        batches(facts + text_rows(tokenizer, paragraphs, rng), rng) for _ in range(recipe.epochs)
    ]
    steps = sum(map(len, epochs))
    optimizer = optimiser(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # linear warm-up, then cosine to a hundredth
        optimizer,
        lambda step: min(step / 100, 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2),
    )
    log = []
    for epoch, groups in enumerate(epochs, start=1):
        row = {"epoch": epoch, "loss": train_epoch(model, groups, optimizer, schedule)}
        if epoch % 5 == 0 or epoch == recipe.epochs:
            row |= measure(model, tokenizer, pairs)
        row["seconds"] = time.perf_counter() - started
        log.append({key: round(value, 4) for key, value in row.items()})
        print(name, log[-1], flush=True)
    save(model, tokenizer, log, MODELS / name)  # a stopped run leaves the old model whole


def save(model, tokenizer, log: list[dict], folder) -> None:
    """Write a model's folder: weights, config, tokenizer, training_log.csv."""
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)
    columns = list(log[-1])  # the last epoch was measured
    pd.DataFrame(log, columns=columns).to_csv(folder / "training_log.csv", index=False)


def main() -> None:
    """Train the models named on the command line; all by default."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", choices=sorted(RECIPES), help="train this model only")
    only = parser.parse_args().only
    for name in [only] if only else RECIPES:
        train(name)


if __name__ == "__main__":
    main()
