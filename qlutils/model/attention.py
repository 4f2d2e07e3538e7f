"""Attention written out, the same for every architecture on transformers' interface: it can be
watched and changed, and rows can share a prefix.

Importing this module registers two implementations. `EXACT`, with a mask function (without one a
name gets no mask, and the softmax silently sees the future), is what transformers' "eager"
computes, except that a float64 model keeps float64 (eager rounds the softmax to float32) and that
Gemma 2's soft cap is kept (the fused "sdpa" leaves it out). `PREFIX` is for `passes.run_layer`.

Shapes: B rows of a batch, H query heads, Hkv key heads, R attending positions, K attended-to
positions, C columns, dh width of a head.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from qlutils.model.trace import by_name, hooked, replaced

EXACT = "qlutils_exact"
PREFIX = "qlutils_prefix"
ACTIVE = []  # every `AttentionChange` whose context is entered, outermost first
SHARED = threading.local()  # `prefix`: keys and values that the layer now running attends to
# What the interface's further arguments may be: `_weights` reads two of them, and the others change
# nothing that is computed here: the window is in the mask, positions are in queries and keys,
# models are evaluated without dropout, and what is not causal is refused at load.
HARMLESS = (
    "dropout is_causal sliding_window position_ids cache_position use_cache output_attentions "
    "output_hidden_states return_dict token_type_ids scaling softcap"
).split()


# --- the two implementations ----------------------------------------------------------------------


def exact_attention(module, query, key, value, attention_mask, **options):
    """softmax(query key^T) value, as transformers' attention interface asks.

    query (B, H, R, dh), key and value (B, Hkv, K, dh), Hkv dividing H; attention_mask (B or 1, 1 or
    H, R, K), additive or boolean, None for plain causal. Returns (B, R, H, dh) and the post-softmax
    weights (B, H, R, K), both after the changes active on `module`.
    """
    _check_options(module, options)
    batch, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    columns = key.shape[2]
    grouped = query.reshape(batch, kv_heads, -1, width)
    scores = (grouped @ key.mT).view(batch, heads, rows, columns)
    if attention_mask is not None:
        attention_mask = attention_mask[..., :columns]
    elif rows > 1:
        seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        attention_mask = seen.tril(columns - rows)
    weights = _weights(module, scores, attention_mask, width, **options).to(value.dtype)
    out = weights.view(batch, kv_heads, -1, columns) @ value
    return out.view(batch, heads, rows, -1).transpose(1, 2).contiguous(), weights


def prefix_attention(module, query, key, value, attention_mask, **options):
    """Attention of P independent rows, each over the shared prefix and itself.

    query (Q, H, P, dh), key and value (Q, Hkv, P, dh) of the rows themselves; `SHARED.prefix` has
    the prefix's, (Q, Hkv, T - 1, dh), and their padding (Q, 1, 1, T) or None. attention_mask (Q or
    1, 1, 1, T) is the window of a sliding-window layer. Returns (Q, P, H, dh).
    """
    _check_options(module, options)
    prefix_key, prefix_value, padding = SHARED.prefix
    queries, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(queries, kv_heads, -1, rows, width)
    key, value = key[:, :, None], value[:, :, None]  # (Q, Hkv, 1, P, dh), one for all of a group
    own = (grouped * key).sum(-1).flatten(2)  # (Q, Hkv, H / Hkv * P)
    before = grouped.flatten(2, 3) @ prefix_key.mT
    scores = torch.cat([before, own[..., None]], -1).view(queries, heads, rows, -1)
    weights = _weights(module, scores, attention_mask, width, padding, **options)
    weights = weights.to(value.dtype).view(*before.shape[:-1], -1)
    before = (weights[..., :-1] @ prefix_value).view(*grouped.shape[:-1], -1)
    out = torch.addcmul(before, weights[..., -1].view(*grouped.shape[:-1], 1), value)
    return out.view(queries, heads, rows, -1).transpose(1, 2), None


def _weights(module, scores, mask, width, padding=None, *, scaling=None, softcap=None, **_):
    """Post-softmax weights, in float32 at least, of `scores` (B, H, R, K), after the changes
    active on `module`; none of what `mask` or `padding` (B, 1, 1, K) hides."""
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.finfo(scores.dtype).min  # not infinity: a row of padding may see nothing at all
    if mask is not None:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, hidden) if boolean else scores + mask
    if padding is not None:
        scores = scores.masked_fill(padding, hidden)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    for change in tuple(ACTIVE):  # another model's may come or go in another thread
        if module in change.layer_of:
            weights = change.apply(change.layer_of[module], weights, mask)
    return weights


def _check_options(module, options):
    """ValueError for an argument of the attention interface that our attention would leave out:
    logits of attention sinks (`s_aux`), a bias of positions, chosen columns."""
    for name, value in options.items():
        if value is not None and value is not False and name not in HARMLESS:
            raise ValueError(
                f"the attention of {type(module).__name__} takes {name!r} into account, which is "
                "not supported"
            )


AttentionInterface.register(EXACT, exact_attention)
AttentionMaskInterface.register(EXACT, eager_mask)
AttentionInterface.register(PREFIX, prefix_attention)


def attention_implementation(model, name):
    """Run `model` with another attention implementation; its own is back afterwards."""
    configs = [part.config for part in model.modules() if hasattr(part, "config")]
    return replaced(configs, "_attn_implementation_internal", lambda own: name)


# --- watching and changing it ---------------------------------------------------------------------


def forward_passes(model, layer, before, after):
    """Register hooks on `model`, yielded one by one, that call `before(tokens, past, mask)` at each
    forward pass that may reach `layer`, with how many tokens it is fed and its cache holds, and its
    attention mask, and `after(output)` at its end (None after an error).

    A pass is that of the outermost part that is called: the masks that parts inside get are what
    those around them made of the caller's (Gemma 3's text model gets a dict), and some parts are
    passed by (OPT's base model).
    """
    running: list[nn.Module] = []

    def enter(module, args, kwargs):
        if running and running[0] is not module:
            return
        running[:] = [module]
        call = by_name(module, args, kwargs)
        fed = call.get("input_ids")
        fed = call.get("inputs_embeds") if fed is None else fed
        if fed is None:  # the model says so itself
            return
        # the second is the cache's old name, which transformers takes until 5.40
        cache = call.get("cache", call.get("past_key_values"))
        past = 0 if cache is None else cache.get_seq_length()
        before(fed.shape[1], past, call.get("attention_mask"))

    def leave(module, _, output):
        if running and running[0] is module:
            running.clear()
            after(output)

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and layer in part.modules():
            yield part.register_forward_pre_hook(enter, with_kwargs=True)
            yield part.register_forward_hook(leave, always_call=True)


def is_controlled(model):
    """Whether an `AttentionChange` is active on a part of `model`."""
    return any(part in change.layer_of for change in ACTIVE for part in model.modules())


@dataclass(eq=False)
class AttentionChange:
    """One observation of, or change to, the attention matrices of a model while it is active.

    `factors`: {layer: (B or 1, H, C)} by which column c of each head's matrix is multiplied, in all
    its rows. Columns count a row's real tokens (left padding and what a sliding window has dropped
    from a cache are not counted); a column that a row does not have changes nothing. `renormalise`:
    divide each row by its new sum; a row left with no mass stays zero. `observe(layer, weights,
    visible)` is called with (B, H, R, K) and the boolean mask (B or 1, 1 or H, R, K) of the
    attended positions that a row may see, or None where it sees all.
    """

    factors: dict[int, Tensor] | None = None
    renormalise: bool = False
    observe: Callable | None = None
    # While active: the layer of every module in one, positions so far, padding included, and (B,)
    # positions of padding on the left.
    layer_of: dict[nn.Module, int] = field(default_factory=dict)
    total: int = 0
    padding: Tensor | None = None

    @contextmanager
    def on(self, model, layers):
        """Active inside, on every forward pass of `model`, which runs `exact_attention`."""
        for index, layer in enumerate(layers):
            self.layer_of |= dict.fromkeys(layer.modules(), index)
        hooks = hooked(forward_passes(model, layers[0], self._locate, lambda output: None))
        with attention_implementation(model, EXACT), hooks:
            ACTIVE.append(self)
            try:
                yield
            finally:
                ACTIVE.remove(self)

    def _locate(self, tokens, past, mask):
        """Before a forward pass: how many positions it brings the cache to, and where each row's
        tokens begin."""
        self.total = past + tokens
        self.padding = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.padding = mask.to(torch.uint8).argmax(-1)  # 0 for padding on the right
        elif mask is not None and self.factors:
            raise ValueError(
                "scaling synapses needs an attention mask of shape (batch, tokens), to tell "
                f"columns from padding; got {getattr(mask, 'shape', type(mask).__name__)}"
            )

    def apply(self, layer, weights, mask):
        """`weights` (B, H, R, K) of a layer as they are to be; `mask` as `exact_attention`'s."""
        factors = (self.factors or {}).get(layer)
        if factors is not None:
            weights = weights * self._by_position(factors.to(weights), weights)
            if self.renormalise:
                mass = weights.sum(-1, keepdim=True)
                weights = weights / mass.where(mass > 0, 1.0)
        if self.observe is not None:
            if mask is not None and mask.dtype != torch.bool:
                mask = mask > torch.finfo(mask.dtype).min / 2
            self.observe(layer, weights, mask)
        return weights

    def _by_position(self, factors, weights):
        """(B or 1, H, 1, K) factors of the attended positions, from those of the columns (B or 1,
        H, C)."""
        attended = weights.shape[-1]
        columns = factors.shape[-1]
        column = torch.arange(attended, device=weights.device)[None]  # (B or 1, K)
        column = column + max(0, self.total - attended)  # what a window has dropped
        if self.padding is not None:
            column = column - self.padding.to(weights.device)[:, None]
        column = column.where((0 <= column) & (column < columns), columns)
        factors = nn.functional.pad(factors, (0, 1), value=1.0)  # of any other column
        return torch.take_along_dim(factors, column[:, None], -1)[:, :, None]
