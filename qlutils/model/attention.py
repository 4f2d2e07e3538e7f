"""Attention written out, the same for every architecture on transformers' interface: it can be
watched and changed, and rows can share a prefix.

Importing this module registers two implementations. `EXACT`, with a mask function (without one a
name gets no mask, and the softmax silently sees the future), is what transformers' "eager"
computes, except that a float64 model keeps float64 (eager rounds the softmax to float32) and that
Gemma 2's soft cap is kept (the fused "sdpa" leaves it out). `PREFIX` is for `passes.run_layer`.

Shapes: B rows of a batch, H query heads, Hkv key heads, R attending positions, K attended-to
positions, C columns, dh width of a head.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from qlutils.model.trace import hooked

EXACT, PREFIX = "qlutils_exact", "qlutils_prefix"
ACTIVE: list[AttentionChange] = []  # those whose contexts are entered, outermost first
SHARED = threading.local()  # `prefix`: keys and values that the layer now running attends to
# What the interface's further arguments may say without changing what is computed here: the window
# is in the mask, positions are in queries and keys, models are evaluated without dropout, and what
# is not causal is refused at load.
HARMLESS = {
    "dropout",
    "is_causal",
    "sliding_window",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "token_type_ids",
}


# --- the two implementations ----------------------------------------------------------------------


def exact_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **other):
    """softmax(query key^T) value, as transformers' attention interface asks.

    query (B, H, R, dh), key and value (B, Hkv, K, dh), Hkv dividing H; attention_mask (B or 1, 1 or
    H, R, K), additive or boolean, None for plain causal. Returns (B, R, H, dh) and the post-softmax
    weights (B, H, R, K), both after the changes active on `module`.
    """
    _check_arguments(module, other)
    (batch, heads, rows, width), kv_heads, columns = query.shape, key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * rows, width)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, rows, columns)
    if attention_mask is None and rows > 1:
        seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        attention_mask = seen.tril(columns - rows)
    if attention_mask is not None:
        attention_mask = attention_mask[..., :columns]
    weights = _weights(module, scores, attention_mask, width, scaling, softcap).to(value.dtype)
    out = weights.view(batch, kv_heads, -1, columns) @ value
    return out.view(batch, heads, rows, -1).transpose(1, 2).contiguous(), weights


def prefix_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, **other
):
    """Attention of P independent rows, each over the shared prefix and itself.

    query (Q, H, P, dh), key and value (Q, Hkv, P, dh) of the rows themselves; `SHARED.prefix` has
    the prefix's, (Q, Hkv, T - 1, dh), and their padding (Q, 1, 1, T) or None. attention_mask (Q or
    1, 1, 1, T) is the window of a sliding-window layer. Returns (Q, P, H, dh).
    """
    _check_arguments(module, other)
    prefix_key, prefix_value, padding = SHARED.prefix
    (queries, heads, rows, width), kv_heads = query.shape, key.shape[1]
    grouped = query.reshape(queries, kv_heads, heads // kv_heads, rows, width)
    key, value = key[:, :, None], value[:, :, None]  # (Q, Hkv, 1, P, dh), one for all of a group
    own = (grouped * key).sum(-1).flatten(2)  # (Q, Hkv, H / Hkv * P)
    before = grouped.flatten(2, 3) @ prefix_key.transpose(-1, -2)
    scores = torch.cat([before, own[..., None]], -1).view(queries, heads, rows, -1)
    if padding is not None:
        attention_mask = _hide(attention_mask, padding)
    weights = _weights(module, scores, attention_mask, width, scaling, softcap).to(value.dtype)
    weights = weights.view(queries, kv_heads, heads // kv_heads * rows, -1)
    before = (weights[..., :-1] @ prefix_value).view(*grouped.shape[:-1], -1)
    out = torch.addcmul(before, weights[..., -1].view(*grouped.shape[:-1], 1), value)
    return out.view(queries, heads, rows, -1).transpose(1, 2), None


def _weights(module, scores: Tensor, mask: Tensor | None, width: int, scaling, softcap) -> Tensor:
    """Post-softmax weights, in float32 at least, of `scores` (B, H, R, K), after the changes
    active on `module`."""
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        # not infinity: a row of padding may see nothing at all
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    for change in tuple(ACTIVE):  # another model's may come or go in another thread
        if module in change.layer_of:
            weights = change.apply(change.layer_of[module], weights, mask)
    return weights


def _hide(mask: Tensor | None, padding: Tensor) -> Tensor:
    """A mask, additive or boolean, that hides the positions `padding` as well."""
    if mask is None:
        return ~padding
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(padding, hidden)


def _check_arguments(module: nn.Module, others: dict) -> None:
    """ValueError for an argument of the attention interface that our attention would leave out:
    logits of attention sinks (`s_aux`), a bias of positions, chosen columns."""
    for name, value in others.items():
        if value is not None and value is not False and name not in HARMLESS:
            raise ValueError(
                f"the attention of {type(module).__name__} takes {name!r} into account, which is "
                "not supported"
            )


AttentionInterface.register(EXACT, exact_attention)
AttentionMaskInterface.register(EXACT, eager_mask)
AttentionInterface.register(PREFIX, prefix_attention)


@contextmanager
def attention_implementation(model: nn.Module, name: str):
    """Run `model` with another attention implementation; its own is back afterwards."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    own = [
        (config, config._attn_implementation)
        for config in configs.values()
        if getattr(config, "_attn_implementation", None)
    ]
    try:
        for config, _ in own:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, before in own:
            config._attn_implementation_internal = before


# --- watching and changing it ---------------------------------------------------------------------


def forward_passes(model: nn.Module, layer: nn.Module, before: Callable, after: Callable):
    """Register hooks on `model`, yielded one by one, that call `before(call)` with the named
    arguments of each forward pass that may reach `layer`, and `after(output)` at its end (None
    after an error).

    A pass is that of the outermost part that is called: the masks that parts inside get are what
    those around them made of the caller's (Gemma 3's text model gets a dict), and some parts are
    passed by (OPT's base model).
    """
    running: list[nn.Module] = []

    def enter(forward):
        def hook(module, args, kwargs):
            if running and running[0] is not module:
                return
            running[:] = [module]
            call = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
            call = {**call, **call.get("kwargs", {})}
            # the cache's old name, which transformers takes until 5.40
            before({"cache": call.get("past_key_values"), **call})

        return hook

    def leave(module, _, output):
        if running and running[0] is module:
            running.clear()
            after(output)

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and any(inner is layer for inner in part.modules()):
            yield part.register_forward_pre_hook(enter(part.forward), with_kwargs=True)
            yield part.register_forward_hook(leave, always_call=True)


def tokens_of(call: dict) -> Tensor | None:
    """The token ids or embeddings (B, S, ...) among the named arguments of a forward pass."""
    tokens = call.get("input_ids")
    return call.get("inputs_embeds") if tokens is None else tokens


def is_controlled(model: nn.Module) -> bool:
    """Whether an `AttentionChange` is active on a part of `model`."""
    return any(part in change.layer_of for change in ACTIVE for part in model.modules())


class AttentionChange:
    """One observation of, or change to, the attention matrices of a model while it is active.

    `factors`: {layer: (B or 1, H, C)} by which column c of each head's matrix is multiplied, in all
    its rows. Columns count a row's real tokens (left padding and what a sliding window has dropped
    from a cache are not counted); a column that a row does not have changes nothing. `renormalise`:
    divide each row by its new sum; a row left with no mass stays zero. `observe(layer, weights,
    visible)` is called with (B, H, R, K) and the boolean mask (B or 1, 1 or H, R, K) of the
    attended positions that a row may see, or None where it sees all.
    """

    def __init__(
        self,
        factors: dict[int, Tensor] | None = None,
        renormalise: bool = False,
        observe: Callable | None = None,
    ):
        self.factors, self.renormalise, self.observe = factors or {}, renormalise, observe
        self.layer_of: dict[nn.Module, int] = {}  # of every module in a layer while active
        self.total = 0  # positions so far, padding included
        self.padding: Tensor | None = None  # (B,) positions of padding on the left

    @contextmanager
    def on(self, model: nn.Module, layers: list[nn.Module]):
        """Active inside, on every forward pass of `model` whose attention is written out here."""
        for index, layer in enumerate(layers):
            self.layer_of |= dict.fromkeys(layer.modules(), index)
        with hooked(forward_passes(model, layers[0], self._locate, lambda output: None)):
            ACTIVE.append(self)
            try:
                yield self
            finally:
                ACTIVE.remove(self)

    def _locate(self, call: dict) -> None:
        """Before a forward pass: how many positions it brings the cache to, and where each row's
        tokens begin."""
        tokens = tokens_of(call)
        if tokens is None:
            return
        cache, mask = call["cache"], call.get("attention_mask")
        self.total = (cache.get_seq_length() if cache is not None else 0) + tokens.shape[1]
        self.padding = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.padding = mask.to(torch.uint8).argmax(-1)  # 0 for padding on the right
        elif mask is not None and self.factors:
            shape = tuple(getattr(mask, "shape", ())) or type(mask).__name__
            raise ValueError(
                "scaling synapses needs an attention mask of shape (batch, tokens), to tell "
                f"columns from padding; got {shape}"
            )

    def apply(self, layer: int, weights: Tensor, mask: Tensor | None) -> Tensor:
        """`weights` (B, H, R, K) of a layer as they are to be; `mask` as `exact_attention`'s."""
        if layer in self.factors:
            weights = weights * self._by_position(self.factors[layer].to(weights), weights)
            if self.renormalise:
                mass = weights.sum(-1, keepdim=True)
                weights = weights / mass.where(mass > 0, 1.0)
        if self.observe is not None:
            if mask is not None and mask.dtype != torch.bool:
                mask = mask > torch.finfo(mask.dtype).min / 2
            self.observe(layer, weights, mask)
        return weights

    def _by_position(self, factors: Tensor, weights: Tensor) -> Tensor:
        """(B or 1, H, 1, K) factors of the attended positions, from those of the columns (B or 1,
        H, C)."""
        columns = factors.shape[-1]
        positions = torch.arange(weights.shape[-1], device=weights.device)[None]  # (B or 1, K)
        positions = positions + max(0, self.total - weights.shape[-1])  # what a window has dropped
        if self.padding is not None:
            positions = positions - self.padding.to(weights.device)[:, None]
        batch = max(len(positions), len(factors))
        index = positions.clamp(0, columns - 1)[:, None].expand(batch, factors.shape[1], -1)
        taken = factors.expand(batch, -1, -1).gather(-1, index)
        inside = (positions >= 0) & (positions < columns)
        return taken.where(inside[:, None], torch.ones_like(taken))[:, :, None]
