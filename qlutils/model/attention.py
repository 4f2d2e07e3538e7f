"""An attention that can be watched and changed, the same for every architecture on transformers'
interface.

Importing this module registers it as "qlutils_exact", with its mask function: without one a name
gets no mask, and the softmax silently sees the future. It is what transformers' "eager" computes,
except that a float64 model keeps float64 (eager rounds the softmax to float32) and that Gemma 2's
soft cap is kept (the fused "sdpa" leaves it out).

Shapes: B rows of a batch, H query heads, Hkv key heads, R attending positions, K attended-to
positions, C columns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import eager_mask

NAME = "qlutils_exact"
_CONTROLS: WeakKeyDictionary[nn.Module, list[tuple[Control, int]]] = WeakKeyDictionary()
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
_REPLACED: WeakKeyDictionary[nn.Module, int] = (
    WeakKeyDictionary()
)  # contexts of `replaced_methods` a module is in


def check_arguments(module: nn.Module, others: dict) -> None:
    """ValueError for an argument of the attention interface that our attention would leave out:
    logits of attention sinks (`s_aux`), a bias of positions, chosen columns."""
    for name, value in others.items():
        if value is not None and value is not False and name not in HARMLESS:
            raise ValueError(
                f"the attention of {type(module).__name__} takes {name!r} into "
                "account, which is not supported"
            )


def exact_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **other):
    """softmax(query key^T) value, as transformers' attention interface asks.

    query (B, H, R, dh), key and value (B, Hkv, K, dh), Hkv dividing H; attention_mask (B or 1, 1 or
    H, R, K), additive or boolean, None for plain causal. Returns (B, R, H, dh) and the post-softmax
    weights (B, H, R, K), both after the `Control`s active on `module`. No dropout: models are
    evaluated."""
    check_arguments(module, other)
    (batch, heads, rows, width), kv_heads, columns = query.shape, key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * rows, width)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, rows, columns)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None and rows > 1:
        attention_mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(
            columns - rows
        )
    if attention_mask is not None:
        attention_mask = attention_mask[..., :columns]
        if (
            attention_mask.dtype == torch.bool
        ):  # not infinity: a row of padding may see nothing at all
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = controlled_weights(module, weights, attention_mask).to(value.dtype)
    out = weights.view(batch, kv_heads, -1, columns) @ value
    return out.view(batch, heads, rows, -1).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, exact_attention)
AttentionMaskInterface.register(NAME, eager_mask)


def with_cache(model: nn.Module, cache: Cache) -> dict:
    """The keyword argument by which `model` takes a key-value cache; transformers 5.24 renamed
    it."""
    return {
        "cache"
        if "cache" in inspect.signature(model.forward).parameters
        else "past_key_values": cache
    }


def cache_of(given) -> Cache | None:
    """The key-value cache among the named arguments or outputs `given` of a forward pass, under its
    new or old name."""
    cache = given.get("cache")
    return given.get("past_key_values") if cache is None else cache


def forward_passes(model: nn.Module, layer: nn.Module, before: Callable, after: Callable):
    """Register hooks on `model`, yielded one by one, that call `before(call)` with the named
    arguments of each forward pass that may reach `layer`, and `after(output)` at its end (None
    after an error).

    A pass is that of the outermost part that is called: the masks that parts inside get are what
    those around them made of the caller's (Gemma 3's text model gets a dict), and some parts are
    passed by (OPT's base model)."""
    running: list[nn.Module] = []

    def enter(forward):
        def hook(module, args, kwargs):
            if running and running[0] is not module:
                return
            running[:] = [module]
            call = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
            before({**call, **call.get("kwargs", {})})

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
    return next((call[k] for k in ("input_ids", "inputs_embeds") if call.get(k) is not None), None)


def is_controlled(model: nn.Module) -> bool:
    """Whether a `Control` is active on a part of `model`."""
    return any(module in _CONTROLS for module in model.modules())


def controlled_weights(module, weights: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Post-softmax `weights` (B, H, R, K) of `module` after the controls active on it, outermost
    first."""
    for control, layer in _CONTROLS.get(module, ()):
        weights = control.apply(layer, weights, attention_mask)
    return weights


class Control:
    """One observation of, or change to, the attention matrices of a model while it is active.

    `factors`: {layer: (B or 1, H, C)} by which column c of each head's matrix is multiplied, in all
    its rows. Columns count a row's real tokens (left padding and what a sliding window has dropped
    from a cache are not counted); a column that a row does not have changes nothing. `renormalise`:
    divide each row by its new sum; a row left with no mass stays zero. `observe(layer, weights,
    visible)` is called with (B, H, R, K) and the boolean mask (B or 1, 1 or H, R, K) of the
    attended positions that a row may see, or None where it sees all."""

    def __init__(
        self,
        factors: dict[int, Tensor] | None = None,
        renormalise: bool = False,
        observe: Callable | None = None,
    ):
        self.factors, self.renormalise, self.observe = factors or {}, renormalise, observe
        self.total, self.padding = (
            0,
            None,
        )  # positions so far, padding included; (B,) padding on the left

    def locate(self, call: dict) -> None:
        """Before a forward pass: how many positions it brings the cache to, and where each row's
        tokens begin."""
        tokens = tokens_of(call)
        if tokens is None:
            return
        cache, mask = cache_of(call), call.get("attention_mask")
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

    def apply(self, layer: int, weights: Tensor, attention_mask: Tensor | None) -> Tensor:
        if layer in self.factors:
            weights = weights * self._by_position(self.factors[layer].to(weights), weights)
            if self.renormalise:
                mass = weights.sum(-1, keepdim=True)
                weights = weights / mass.where(mass > 0, 1.0)
        if self.observe is not None:
            if attention_mask is not None and attention_mask.dtype != torch.bool:
                attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
            self.observe(layer, weights, attention_mask)
        return weights

    def _by_position(self, factors: Tensor, weights: Tensor) -> Tensor:
        """(B or 1, H, 1, K) factors of the attended positions, from those of the columns (B or 1,
        H, C)."""
        positions = torch.arange(weights.shape[-1], device=weights.device)[None]  # (B or 1, K)
        positions = positions + max(0, self.total - weights.shape[-1])  # what a window has dropped
        if self.padding is not None:
            positions = positions - self.padding.to(weights.device)[:, None]
        inside = (positions >= 0) & (positions < factors.shape[-1])
        batch = max(len(positions), len(factors))
        index = positions.clamp(0, factors.shape[-1] - 1)[:, None].expand(
            batch, factors.shape[1], -1
        )
        taken = factors.expand(batch, -1, -1).gather(-1, index)
        return taken.where(inside[:, None], torch.ones_like(taken))[:, :, None]

    @contextmanager
    def on(self, model: nn.Module, layers: list[nn.Module]):
        """Active inside, on every forward pass of `model` whose attention is `exact_attention`."""
        handles, inside = [], []
        try:
            for handle in forward_passes(model, layers[0], self.locate, lambda output: None):
                handles.append(handle)
            for index, layer in enumerate(layers):
                for module in layer.modules():
                    inside.append((module, (self, index)))
                    _CONTROLS.setdefault(module, []).append(inside[-1][1])
            yield self
        finally:
            for handle in handles:
                handle.remove()
            for module, entry in inside:
                _CONTROLS[module].remove(entry)
                if not _CONTROLS[module]:
                    del _CONTROLS[module]


@contextmanager
def replaced_methods(layers: list[nn.Module], path: str):
    """Inside, `exact_attention` stands in for the method that a family without the interface
    computes attention with.

    `path` is where it sits in a layer ("attn._attn" in GPT-J before transformers 5.24): a method of
    (query, key, value, attention_mask) that divides by the attribute `scale_attn` and returns (B,
    H, R, dh) and the weights. Contexts nest, and may end in any order: the class's method shows
    again when the last one does."""
    *where, name = path.split(".")
    owners = [layer.get_submodule(".".join(where)) for layer in layers]

    def stand_in(owner):
        def attend(query, key, value, attention_mask=None):
            wide = torch.promote_types(query.dtype, torch.float32)  # as GPT-J does
            out, weights = exact_attention(
                owner,
                query.to(wide),
                key.to(wide),
                value,
                attention_mask,
                scaling=1 / float(owner.scale_attn),
            )
            return out.transpose(1, 2), weights

        return attend

    inside = []
    try:
        for owner in owners:
            inside.append(owner)
            _REPLACED[owner] = _REPLACED.get(owner, 0) + 1
            setattr(owner, name, stand_in(owner))
        yield
    finally:
        for owner in inside:
            _REPLACED[owner] -= 1
            if not _REPLACED[owner]:
                del _REPLACED[owner]
                owner.__dict__.pop(name, None)
