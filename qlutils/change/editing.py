"""Editing knowledge neurons: erasing or rewriting their value vectors (Eq. 2, 20-25), and
perplexity.

The value vector of neuron (l, p) is what layer l's down-projection multiplies its activation with.
There are two ways to edit, which give the same logits: `edit_weights` changes the weights inside a
context and restores them bit for bit; `virtual_edit` is a `Change` for `rows.score_rows`, which
evaluates many edits in one batch and never touches a weight.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from qlutils.change.changes import Change, check_finite
from qlutils.change.rows import score_queries
from qlutils.checks import CHOICES, check, one_of
from qlutils.facts import check_text
from qlutils.model.architecture import UnsupportedModel, check_sole_owner, plain_weight
from qlutils.model.language_model import check_loaded, whole_numbers

OPERATIONS = ("erase", "update")
MIN_TOKENS = 64  # of a paragraph that perplexity may be measured on
CARRIER = "is"  # a word for an object to continue, so that it is tokenised as inside a sentence


@contextmanager
def edit_weights(
    lm, neurons, op, *, old=None, new=None, lambda1=2.0, lambda2=2.0, embedding="input"
):
    """Edit the value vectors of `neurons`, (layer, index) pairs, in the model's weights while
    inside:

        with edit_weights(lm, {(3, 17)}, "update", old="Paris", new="Rome"):
            text = lm.model.generate(**tokens)

    `op="erase"` sets them to zero (Eq. 2); `op="update"` adds -lambda1 E(old) + lambda2 E(new) to
    each (Eq. 2), E the mean embedding of the object's tokens, which may be ids or text.
    `embedding`: the "input" word embedding or the "output" one (unembedding). Yields whether any
    weight is another now. The weights are bit-identical afterwards, whatever happens inside.
    Contexts may be nested, and end as `with` ends them, the inner one first. ValueError: a neuron
    outside the model, an unknown operation or embedding, an object without an embedding, weights
    that no forward pass reads as they stand (quantised, offloaded, pruned, parametrised) or that
    layers share.
    """
    check_loaded(lm)
    options = dict(old=old, new=new, lambda1=lambda1, lambda2=lambda2, embedding=embedding)
    change = virtual_edit(lm, neurons, op, **options)
    places = [(lm.value_vectors(layer), index) for layer, index in change.by_layer.items()]
    before = [vectors[index] for vectors, index in places]  # copies, (n, d) each
    if op == "erase":
        after = [torch.zeros_like(rows) for rows in before]
    else:
        after = [rows + change.vector for rows in before]

    def write(values):
        with torch.no_grad():
            for (vectors, index), rows in zip(places, values):
                vectors[index] = rows

    try:
        write(after)
        yield not all(map(torch.equal, before, after))
    finally:
        write(before)


def save_edited(lm, folder, neurons, op, **options) -> Path:
    """Write the model as `edit_weights(lm, neurons, op, **options)` makes it, with its tokenizer,
    as a checkpoint that `from_pretrained` loads anywhere. `lm` itself is unchanged. ValueError when
    `folder` already holds a checkpoint or when the edit changes no weight."""
    check_loaded(lm)
    if not isinstance(folder, (str, Path)):
        raise ValueError(f"folder must be a path, not {folder!r}")
    folder = Path(folder).expanduser()
    if folder.is_file() or (folder / "config.json").exists():
        raise ValueError(f"{folder} already holds a checkpoint or is a file; name a new folder")
    if getattr(lm.model, "_hf_peft_config_loaded", False):
        raise UnsupportedModel(
            f"{lm.name} carries an adapter, and transformers would save nothing else; merge it "
            "into the weights first"
        )
    with edit_weights(lm, neurons, op, **options) as changed:
        if not changed:
            raise ValueError(
                f"this edit changes no weight of {lm.name} (no neurons, or a change too small for "
                f"{lm.dtype}), so there is no edited model to save"
            )
        lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def virtual_edit(lm, neurons, op, **options):
    """The `Change` that scores rows as `edit_weights(lm, neurons, op, **options)` would, with
    `everywhere=True`; what that refuses, this does."""
    [change] = virtual_edits(lm, [neurons], op, **options)
    return change


def virtual_edits(lm, sets, op, **options):
    """The `virtual_edit` of each of some sets of neurons; every layer is looked at once."""
    delta = edit_vector(lm, op, **options)
    factor = 0.0 if op == "erase" else 1.0
    changes = [Change(lm, neurons, factor, delta) for neurons in sets]
    for layer in set().union(*(change.by_layer for change in changes)):
        _editable(lm, layer)
    return changes


def edit_vector(lm, op, *, old=None, new=None, lambda1=2.0, lambda2=2.0, embedding="input"):
    """What an update adds to every edited value vector, (d,) in the model's dtype; None for an
    erasure."""
    one_of("op", op, OPERATIONS)
    one_of("embedding", embedding, CHOICES["embedding"])
    check_finite(lm, "lambda1", lambda1)
    check_finite(lm, "lambda2", lambda2)
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


def object_embedding(lm, words, embedding="input"):
    """(d,) mean embedding of an object's tokens, given as ids or as text (see `object_tokens`); a
    copy."""
    if isinstance(words, str):
        ids = object_tokens(lm, words)
    else:
        groups = zip(words) if isinstance(words, Iterable) else words
        ids = [token for (token,) in whole_numbers(groups, ("id",), "token")]
    try:
        weight = plain_weight(getattr(lm.model, f"get_{embedding}_embeddings")())
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"{lm.name}: its {embedding} embeddings cannot be read: {error}"
        ) from None
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


def object_tokens(lm, text):
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


def _editable(lm, layer):
    """The value vectors of `layer`. `UnsupportedModel` unless an edit of them reaches the model,
    and this layer alone."""
    try:
        lm.check_ready()
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
    check_loaded(lm)
    entries = encode_entries(lm, texts, max_tokens)
    scored = sum(len(target) for _, target in entries)
    nll = -score_queries(lm, entries).log_probability.sum()
    return float(np.exp(nll / scored))


def encode_entries(lm, texts, max_tokens):
    """(what precedes the text, or its first token; the tokens to score) of each text."""
    first = max(1, lm.bos_offset)
    check("max_tokens is", max_tokens, first + 1)
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(f"texts must be a list of texts, not {texts!r:.60}")
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
    if not entries:
        raise ValueError("perplexity needs at least one text")
    return entries


def usable_texts(lm, texts, min_tokens=MIN_TOKENS):
    """The texts of at least `min_tokens` tokens: the entries that perplexity may be measured on."""
    return [text for text in texts if len(lm.tokenize(text)) >= min_tokens]
