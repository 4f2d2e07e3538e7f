"""Editing knowledge neurons: erasing or rewriting their value vectors (Eq. 2, 20-25), and
perplexity.

The value vector of neuron (l, p) is what layer l's down-projection multiplies its activation with.
There are two ways to edit, which give the same logits: `edit_weights` changes the weights inside a
context and restores them bit for bit; `virtual_edit` is a `Change` for `rows.score_rows`, which
evaluates many edits in one batch and never touches a weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlutils.change.changes import Change, check_finite
from qlutils.change.rows import score_queries
from qlutils.facts import check_text
from qlutils.model.architecture import UnsupportedModel, check_sole_owner, plain_weight
from qlutils.model.language_model import whole_numbers

OPERATIONS = ("erase", "update")
EMBEDDINGS = ("input", "output")
MIN_TOKENS = 64  # of a paragraph that perplexity may be measured on
CARRIER = "is"  # a word for an object to continue, so that it is tokenised as inside a sentence


@dataclass(frozen=True)
class Edit:
    """What `edit_weights` did: the operation, the neurons edited (sorted, possibly none), and
    whether any of their weights is another now."""

    op: str
    neurons: tuple[tuple[int, int], ...]
    changed: bool


@contextmanager
def edit_weights(
    lm, neurons, op, *, old=None, new=None, lambda1=2.0, lambda2=2.0, embedding="input"
):
    """Edit the value vectors of `neurons`, (layer, index) pairs, in the model's weights while
    inside:

        with edit_weights(lm, {(3, 17)}, "update", old="Paris", new="Rome") as edit:
            text = lm.model.generate(**tokens)

    `op="erase"` sets them to zero (Eq. 2); `op="update"` adds -lambda1 E(old) + lambda2 E(new) to
    each (Eq. 2), E the mean embedding of the object's tokens, which may be ids or text.
    `embedding`: "input" word embedding or "output" (unembedding). Yields an `Edit`. The weights are
    bit-identical afterwards, whatever happens inside. Contexts may be nested, and end as `with`
    ends them, the inner one first. ValueError: a neuron outside the model, an unknown operation or
    embedding, an object without an embedding, weights that no forward pass reads as they stand
    (quantised, offloaded, pruned, parametrised) or that layers share.
    """
    options = dict(old=old, new=new, lambda1=lambda1, lambda2=lambda2, embedding=embedding)
    change = virtual_edit(lm, neurons, op, **options)
    vectors = {layer: lm.value_vectors(layer) for layer in change.by_layer}
    before = {layer: vectors[layer][index].clone() for layer, index in change.by_layer.items()}
    try:
        with torch.no_grad():
            for layer, rows in before.items():  # rows (n, d)
                new = torch.zeros_like(rows) if change.vector is None else rows + change.vector
                vectors[layer][change.by_layer[layer]] = new
        changed = any(
            not torch.equal(vectors[layer][change.by_layer[layer]], rows)
            for layer, rows in before.items()
        )
        yield Edit(op, tuple(change.neurons), changed)
    finally:
        with torch.no_grad():
            for layer, rows in before.items():
                vectors[layer][change.by_layer[layer]] = rows


def save_edited(lm, folder, neurons, op, **options) -> Path:
    """Write the model as `edit_weights(lm, neurons, op, **options)` makes it, with its tokenizer,
    as a checkpoint that `from_pretrained` loads anywhere. `lm` itself is unchanged. ValueError when
    `folder` already holds a checkpoint or when the edit changes no weight."""
    if not isinstance(folder, (str, Path)):
        raise ValueError(f"folder must be a path, not {folder!r}")
    folder = Path(os.path.expanduser(folder))
    if os.path.exists(folder / "config.json") or os.path.isfile(folder):
        raise ValueError(f"{folder} already holds a checkpoint or is a file; name a new folder")
    if getattr(lm.model, "_hf_peft_config_loaded", False):
        raise UnsupportedModel(
            f"{lm.name} carries an adapter, and transformers would save nothing else; merge it "
            "into the weights first"
        )
    with edit_weights(lm, neurons, op, **options) as edit:
        if not edit.changed:
            raise ValueError(
                f"this edit changes no weight of {lm.name} (no neurons, or a change too small for "
                f"{lm.dtype}), so there is no edited model to save"
            )
        lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def virtual_edit(lm, neurons, op, **options) -> Change:
    """The `Change` that scores rows as `edit_weights(lm, neurons, op, **options)` would, with
    `everywhere=True`; what that refuses, this does."""
    delta = edit_vector(lm, op, **options)
    change = Change(lm, neurons, 0.0) if delta is None else Change(lm, neurons, vector=delta)
    for layer in change.by_layer:
        _editable(lm, layer)
    return change


def edit_vector(
    lm, op, *, old=None, new=None, lambda1=2.0, lambda2=2.0, embedding="input"
) -> Tensor | None:
    """What an update adds to every edited value vector, (d,) in the model's dtype; None for an
    erasure."""
    if op not in OPERATIONS:
        raise ValueError(f"op {op!r} is unknown; use one of {', '.join(OPERATIONS)}")
    check_finite(lm, "lambda1", lambda1)
    check_finite(lm, "lambda2", lambda2)
    if embedding not in EMBEDDINGS:
        raise ValueError(f"embedding {embedding!r} is unknown; use one of {', '.join(EMBEDDINGS)}")
    if op == "erase":
        return None
    if old is None or new is None:
        raise ValueError("an update needs both objects: old, which the neurons wrote, and new")
    written = lambda1 * object_embedding(lm, old, embedding)
    delta = lambda2 * object_embedding(lm, new, embedding) - written
    if not torch.isfinite(delta).all():
        raise ValueError(
            f"lambda1 {lambda1} or lambda2 {lambda2} is so large that the edit overflows {lm.dtype}"
        )
    return delta


def object_embedding(lm, words, embedding="input") -> Tensor:
    """(d,) mean embedding of an object's tokens, given as ids or as text (see `object_tokens`); a
    copy."""
    if isinstance(words, str):
        ids = object_tokens(lm, words)
    elif isinstance(words, Iterable) and not isinstance(words, bytes):
        ids = [token for (token,) in whole_numbers(zip(words), ("id",), "token")]
    else:
        raise ValueError(f"object {words!r} must be text or a list of token ids")
    try:
        weight = plain_weight(getattr(lm.model, f"get_{embedding}_embeddings")())
    except UnsupportedModel as error:
        said = f"{lm.name}: its {embedding} embeddings cannot be read: {error}"
        raise UnsupportedModel(said) from None
    if not ids or not all(0 <= token < weight.shape[0] for token in ids):
        raise ValueError(
            f"object {words!r} has no embedding: {lm.name} embeds the tokens 0 to "
            f"{weight.shape[0] - 1}"
        )
    width = _editable(lm, 0).shape[1]
    if weight.shape[1] != width:
        raise ValueError(
            f"{lm.name}: its {embedding} embeddings have {weight.shape[1]} dimensions and its "
            f"value vectors {width}; an update cannot add one to the other"
        )
    return weight[ids].mean(0)


def object_tokens(lm, text: str) -> list[int]:
    """Token ids of `text` as it stands after a word: never with BOS, and without the lone space
    token that SentencePiece puts at the start of a text. ValueError when it does not continue a
    word. For an object that no space comes before, give its ids: `lm.encode("法国的首都是[Y]",
    "巴黎")[1]`."""
    check_text(text, "object")
    options = dict(add_special_tokens=False, split_special_tokens=True)
    before = list(lm.tokenizer(CARRIER, **options).input_ids)
    ids = list(lm.tokenizer(f"{CARRIER} {text.strip()}", **options).input_ids)
    found = ids[len(before) :]
    if not text.strip() or not found or ids[: len(before)] != before:
        raise ValueError(
            f"object {text!r} cannot be tokenised as the continuation of a word; give token ids"
        )
    return found


def _editable(lm, layer) -> Tensor:
    """The value vectors of `layer`. `UnsupportedModel` unless an edit of them reaches the model,
    and this layer alone."""
    try:
        lm.check_parts()
        vectors = lm.value_vectors(layer)
        check_sole_owner(lm.model, lm.downs[layer])
    except ValueError as error:
        raise UnsupportedModel(f"{lm.name}: layer {layer} cannot be edited: {error}") from None
    return vectors


# --- perplexity -----------------------------------------------------------------------------------


def perplexity(lm, texts, max_tokens=256) -> float:
    """exp(sum of NLL / number of scored tokens) over all `texts` together, each cut to its first
    `max_tokens` tokens.

    What the tokenizer puts before a text (BOS), or its first token, is context and not scored.
    ValueError: no text, an empty one or one of a single token, max_tokens that leave none."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        got = "a single text" if isinstance(texts, str) else repr(texts)
        raise ValueError(f"texts is a list of texts; got {got}")
    entries = encode_entries(lm, list(texts), max_tokens)
    nll = -score_queries(lm, entries).log_probability.sum()
    return float(np.exp(nll / sum(len(target) for _, target in entries)))


def encode_entries(lm, texts, max_tokens) -> list[tuple[list[int], list[int]]]:
    """(what precedes the text, or its first token; the tokens to score) of each text."""
    first = max(1, lm.bos_offset)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, Integral) or max_tokens <= first:
        raise ValueError(
            f"max_tokens is {max_tokens!r}; it must be a whole number of at least {first + 1}"
        )
    if not texts:
        raise ValueError("perplexity needs at least one text")
    entries = []
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a text must be a string, got {type(text).__name__}: {text!r}")
        ids = lm.tokenize(text)[:max_tokens]
        if len(ids) <= first:
            raise ValueError(
                f"text {text[:60]!r} has fewer than two tokens, so nothing of it can be scored; "
                "leave it out"
            )
        if len(ids) > lm.context:
            raise ValueError(
                f"text {text[:60]!r}... has {len(ids)} tokens of {max_tokens} allowed; "
                f"{lm.name} reads at most {lm.context}: lower max_tokens"
            )
        entries.append((ids[:first], ids[first:]))
    return entries


def usable_texts(lm, texts, min_tokens=MIN_TOKENS) -> list[str]:
    """The texts of at least `min_tokens` tokens: the entries that perplexity may be measured on."""
    return [text for text in texts if len(lm.tokenize(text)) >= min_tokens]
