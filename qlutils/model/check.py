"""What the fast paths assume of a model, checked at load: what makes "any causal LM" honest.

Each layer's replayed rows are compared with the layer's own whole sequences, and the logits with
the model's own. In half precision a wrong replay hides in the rounding, so such a model computes in
float32 meanwhile, one layer at a time.

Shapes: Q queries of equal length T, d the residual width, W the width of what a layer's site module
gives (see `passes.site_module`), V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from qlutils.model.answer import answer_probabilities, final_logits
from qlutils.model.architecture import UnsupportedModel, refusing
from qlutils.model.passes import (
    SITES,
    Arguments,
    CleanPass,
    call_layer,
    clean_pass,
    replaying,
    run_layer,
    site_module,
    start_rows,
)
from qlutils.model.trace import Call, Trace, edited

# By how much, relative to the largest number, two ways of computing the same may differ in a dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}


def differ(found: Tensor, wanted: Tensor, size: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ, or one has NaN: by more than `tolerance` of the largest number in
    `size`, and by more than the numbers themselves are rounded."""
    rounding = 16 * torch.finfo(wanted.dtype).eps * wanted.abs().max()
    return not bool((found - wanted).abs().max() <= tolerance * size.abs().max() + rounding)


def sample_ids(lm, length: int) -> Tensor:
    """(2, `length`) tokens to check a model on, drawn from its vocabulary."""
    generator, shape = torch.Generator().manual_seed(0), (2, min(length, lm.context))
    ids = torch.randint(0, lm.num_embeddings, shape, generator=generator, device="cpu")
    return ids.to(lm.device)


# --- computing in float32 -------------------------------------------------------------------------


@contextmanager
def sharply(lm):
    """Inside, the model computes in float32 at least, without gradients, from weights that are cast
    while the layer they belong to runs; gives the tolerance for numbers computed inside. Weights
    are the same tensors afterwards.

    Quantised or offloaded weights have to stay what they are, and with them the model's dtype."""
    tensors = _tensors(lm.model)
    ordinary = all(type(one) in (nn.Parameter, Tensor) and not one.is_meta for one in tensors)
    ordinary &= all(one.is_floating_point() for one in lm.model.parameters())
    with torch.inference_mode(False), torch.no_grad():
        if lm.dtype.itemsize > 2 or not ordinary:
            yield TOLERANCE[lm.dtype]
        else:
            with _widened(lm):
                yield TOLERANCE[torch.float32]


@contextmanager
def _widened(lm):
    """Inside, the model computes in float32: what is outside its decoder layers is cast, and one
    layer at a time while it runs."""
    inside = {id(one) for layer in lm.layers for one in _tensors(layer)}
    cast: dict[Tensor, Tensor] = {}  # {tensor: what it held}

    def widen(tensors):
        for one in tensors:
            if one.is_floating_point() and one.dtype.itemsize < 4:
                cast[one], one.data = one.data, one.data.float()

    def restore(tensors):
        for one in tensors:
            one.data = cast.pop(one, one.data)

    def before(layer, args, kwargs):
        widen(_tensors(layer))

    def after(layer, args, output):
        restore(_tensors(layer))

    try:
        widen(one for one in _tensors(lm.model) if id(one) not in inside)
        with edited(lm.layers, before=before, after=after):
            yield
    finally:
        restore(list(cast))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


# --- the check at load ----------------------------------------------------------------------------


@torch.no_grad()
def verify(lm) -> None:
    """Find the layout of rows that replays the model exactly, and whether layers add what their
    MLPs write as it is: `lm.layout` and `lm.adds_mlp_output`, which nobody else sets.
    `UnsupportedModel` where there is none."""
    ids = sample_ids(lm, 5)
    ids[0, :2] = ids[1, :2]
    with refusing("a pass over a few tokens"), sharply(lm) as tolerance:
        own = _causal_logits(lm, ids, tolerance)
    step = "a pass in which layers hand on nothing but hidden states (no shared keys and values)"
    with refusing(step), sharply(lm):
        calls = _whole_calls(lm, ids)
    problem = None
    for layout in ("sequence", "batch"):  # the first is faster
        lm.layout, lm.adds_mlp_output = layout, False
        try:
            with refusing("A replay"):
                lm.adds_mlp_output = _check_replay(lm, ids, calls, own)
            return
        except UnsupportedModel as error:
            problem = error
    raise UnsupportedModel(
        f"{type(lm.model).__name__}: its last token cannot be replayed exactly, so its neurons "
        f"would be attributed wrongly. {problem}"
    )


def _causal_logits(lm, ids, tolerance) -> Tensor:
    """(Q, V) logits at the last token; `UnsupportedModel` where it changes earlier ones'."""
    other = ids.clone()
    other[:, -1] = ids.flip(0)[:, -1]
    own, changed = (lm.model(input_ids=one, use_cache=False).logits for one in (ids, other))
    if not torch.isfinite(own).all():
        raise UnsupportedModel(
            f"gives infinite or NaN logits in {lm.dtype}; check its weights, or try float32"
        )
    if differ(changed[:, :-1], own[:, :-1], own, tolerance):
        raise UnsupportedModel(
            "not causal: a later token changes an earlier position's prediction (of itself, or as "
            "activations are quantised together)"
        )
    return own[:, -1]


def _whole_calls(lm, ids) -> list[Call]:
    """What each layer is called with in a pass over whole sequences.

    A layer may write into a mapping among its arguments for later layers to read (Gemma 4's shared
    keys and values). A row that starts in between would not find there what its earlier layers
    wrote: so here nobody finds anything."""
    given = {}  # {id of a mapping: it, and its content when first given}

    def forget(_, args, kwargs):
        for name, value in kwargs.items():
            if isinstance(value, Mapping):
                _, content = given.setdefault(id(value), (value, copy(value)))
                kwargs[name] = copy(content)
        return args, kwargs

    with edited(lm.layers, before=forget), Trace(lm.layers) as trace:
        lm.model.base_model(input_ids=ids, use_cache=True, cache=DynamicCache())
    return trace.kept


def _check_replay(lm, ids, calls, own) -> bool:
    """`UnsupportedModel` unless rows in the layout that `lm` has now are what whole sequences give.
    Whether every layer adds what its MLP writes as it is."""
    adds = True
    with sharply(lm) as tolerance:
        clean = clean_pass(lm, ids)
        for index, call in enumerate(calls):
            layer = _Layer(lm, index, call, clean.calls[index], tolerance)
            layer.check()
            adds = adds and layer.adds_mlp_output()
        _check_logits(lm, clean, own, tolerance)
    if lm.dtype.itemsize == 2:  # as it will run
        own = lm.model(input_ids=ids, use_cache=False).logits[:, -1]
        _check_logits(lm, clean_pass(lm, ids), own, TOLERANCE[lm.dtype])
    return adds


class _Layer:
    """One decoder layer, run on whole sequences and on rows at the last token, which should agree.

    `call`: what the model calls it with for whole sequences, hidden states (Q, T, d); `arguments`:
    for one more token. `last` (Q, 1, d): the last token's hidden states; `own` (Q, 1, d): its
    output there; `written`: {site: (Q, 1, W)}."""

    def __init__(self, lm, index: int, call: Call, arguments: Arguments, tolerance: float):
        self.lm, self.index, self.call, self.tolerance = lm, index, call, tolerance
        self.last, cache = call.hidden[:, -1:], DynamicCache()
        self.sites = {site: site_module(lm, index, site) for site in SITES}
        with Trace(self.sites.values(), lambda site: self._at_last(site.output).clone()) as trace:
            self.own = self.whole(self.last, cache)
        down, up = reversed(trace.kept)  # the down-projection runs last
        self.written = {"down_input": down, "pre_activation": up[..., : lm.num_neurons]}
        keys, values = cache.layers[index].keys, cache.layers[index].values
        self.clean = CleanPass(
            calls={index: arguments},
            inputs={0: self.last, index: self.last, index + 1: self.own},
            neurons={},
            written={index: down},
            prefix={index: (keys[..., :-1, :], values[..., :-1, :])},
        )

    def whole(self, token: Tensor, cache=None) -> Tensor:
        """(Q, 1, d) output at the last position of whole sequences with `token` (Q, 1, d) there."""
        hidden = torch.cat([self.call.hidden[:, :-1], token], 1)
        cache = DynamicCache() if cache is None else cache
        return call_layer(self.call.module, hidden, Arguments.of(self.call), cache)[:, -1:]

    def changed(self, site: str) -> tuple[Tensor, Tensor]:
        """A change of what a site's module gives at the last token, (Q, 1, W) as it is then, and
        the layer's output (Q, 1, d) with it."""
        out = self.written[site]
        new = out + out.std() * torch.linspace(-1, 1, out.shape[-1]).to(out)

        def put(_, __, output):
            output = output.contiguous().clone()  # of which the next line takes a view
            self._at_last(output)[..., : new.shape[-1]] = new
            return output

        with edited([self.sites[site]], after=put):
            return new, self.whole(self.last)

    def _at_last(self, output: Tensor) -> Tensor:  # OPT flattens batch and sequence
        return output.reshape(len(self.last), -1, output.shape[-1])[:, -1:]

    def check(self) -> None:
        """`UnsupportedModel` unless rows of this layer are right: of three, not as many as there
        are queries, the middle one is changed."""
        lm, other = self.lm, self.last.flip(0) + self.last / 2
        with replaying(lm):
            rows = torch.cat([self.last, other, self.last], 1)
            rows = run_layer(lm, self.clean, self.index, rows)
        self._compare(rows, self.whole(other), "rows at the last token")
        for site, out in self.written.items():
            new, wanted = self.changed(site)
            with replaying(lm):
                rows = torch.cat([out, new, out], 1)
                rows = start_rows(lm, self.clean, self.index, rows, site)
            self._compare(rows, wanted, f"rows of changed neurons ({site})")

    def _compare(self, rows: Tensor, wanted: Tensor, what: str) -> None:
        wanted = torch.cat([self.own, wanted, self.own], 1)
        added = self.own - self.last
        if rows.shape != wanted.shape or differ(rows, wanted, added, self.tolerance):
            raise UnsupportedModel(f"Layer {self.index}: {what} differ from whole sequences.")

    def adds_mlp_output(self) -> bool:
        """Whether the layer adds its down-projection's output to the residual stream as it is (no
        norm, no multiplier): then what changed neurons write can be added to the layer's clean
        output instead of running the layer."""
        if self.tolerance > 0.01:  # a multiplier of 1.05 would pass
            return False
        try:
            self.lm.value_vectors(self.index)  # which rows need where the layer does not run
        except UnsupportedModel:
            return False
        new, moved = self.changed("down_input")
        more = new - self.written["down_input"]
        return not differ(moved, self.own + more, more, self.tolerance)


def _check_logits(lm, clean: CleanPass, own: Tensor, tolerance: float) -> None:
    """`UnsupportedModel` unless the replay of the whole model gives its logits `own` (Q, V)."""
    own, target = own.to(lm.score_dtype), own.argmax(-1)
    if differ(final_logits(lm, clean.inputs[lm.num_layers][:, -1]), own, own, tolerance):
        raise UnsupportedModel("A pass with a key-value cache gives other logits.")
    hidden = torch.cat([clean.inputs[0], clean.inputs[0] / 2], 1)
    with replaying(lm):
        for layer in range(lm.num_layers):
            hidden = run_layer(lm, clean, layer, hidden)
    log_p = answer_probabilities(lm, hidden[:, :1], target, need_grad=False).log()
    wanted = torch.log_softmax(own, -1).gather(1, target[:, None])
    error = float((log_p - wanted).abs().max())  # that of the logits, which grows with them
    if not error <= tolerance * max(1.0, float(own.abs().max())):
        raise UnsupportedModel(
            f"The replayed row gives another probability (relative error {error:.1e})."
        )
