"""What the fast paths assume of a model, checked at load: what makes "any causal LM" honest.

Each layer's replayed rows are compared with the layer's own whole sequences, and the logits with
the model's own. In half precision a wrong replay hides in the rounding, so such a model computes in
float32 meanwhile, one layer at a time.

Shapes: Q queries of equal length T, d the residual width, W the width of what a layer's site module
gives (see `passes.site_module`), V the vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlutils.model.answer import answer_probabilities, final_logits
from qlutils.model.architecture import UnsupportedModel, refusing
from qlutils.model.passes import (
    SITES,
    CleanPass,
    clean_pass,
    join_passes,
    replaying,
    run_layer,
    site_module,
    start_rows,
)
from qlutils.model.trace import Trace, edited, first

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
    with lm.in_use, torch.inference_mode(False), torch.no_grad():
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
    problem = None
    for layout in ("sequence", "batch"):  # the first is faster
        lm.layout, lm.adds_mlp_output = layout, False
        try:
            with refusing("A replay"):
                lm.adds_mlp_output = _check_replay(lm, ids, own)
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


def _check_replay(lm, ids: Tensor, own: Tensor) -> bool:
    """`UnsupportedModel` unless rows in the layout that `lm` has now are what whole sequences give;
    `own` (Q, V): the model's logits. Whether every layer adds what its MLP writes as it is."""
    with sharply(lm) as tolerance:
        adds = _check_layers(lm, ids, tolerance)
        _check_logits(lm, clean_pass(lm, ids), own, tolerance)
        if lm.layout == "sequence":
            _check_joined(lm, ids, tolerance)
    if lm.dtype.itemsize == 2:  # as it will run
        own = lm.model(input_ids=ids, use_cache=False).logits[:, -1]
        _check_logits(lm, clean_pass(lm, ids), own, TOLERANCE[lm.dtype])
    return adds


@dataclass
class _Change:
    """Another output `new` of a layer's site module at the last token, instead of `old`, both
    (Q, 1, W)."""

    layer: int
    site: str
    old: Tensor
    new: Tensor

    @classmethod
    def of(cls, lm, clean: CleanPass, layer: int, site: str) -> _Change:
        old = clean.written[layer]
        if site == "pre_activation":  # a fused gate_up_proj gives more
            old = old[..., : lm.num_neurons]
        return cls(layer, site, old, old + old.std() * torch.linspace(-1, 1, old.shape[-1]).to(old))


def _check_layers(lm, ids: Tensor, tolerance: float) -> bool:
    """`UnsupportedModel` unless each layer gives for rows what it gives for whole sequences, from
    its input on and from changed neurons on. Whether every layer adds what its MLP writes.

    Whole sequences run in 1 + 2 L passes at once: pass 0 is clean, pass 1 + l has another
    output of layer l's down-projection, pass 1 + L + l other pre-activations there. At layer l the
    passes that are changed elsewhere are rows for `run_layer`, and the two that are changed here
    rows for `start_rows`, between two clean ones, so that what leaks from row to row shows."""
    clean = {site: clean_pass(lm, ids, site) for site in SITES}
    layers = range(lm.num_layers)
    changes = [_Change.of(lm, clean[site], layer, site) for site in SITES for layer in layers]
    adds = tolerance < 0.01  # else a multiplier of 1.05 would pass
    for layer, (inputs, wanted) in enumerate(_changed_passes(lm, ids, changes)):
        added = wanted[:, :1] - inputs[:, :1]
        here = [n for n, change in enumerate(changes, 1) if change.layer == layer]
        others = [n for n in range(len(changes) + 1) if n not in here]
        with replaying(lm):
            rows = run_layer(lm, clean["down_input"], layer, inputs[:, others])
            if differ(rows, wanted[:, others], added, tolerance):
                raise UnsupportedModel(f"Layer {layer}: rows differ from whole sequences.")
            for n in here:
                site, old, new = changes[n - 1].site, changes[n - 1].old, changes[n - 1].new
                rows = start_rows(lm, clean[site], layer, torch.cat([old, new, old], 1), site)
                if differ(rows, wanted[:, [0, n, 0]], added, tolerance):
                    raise UnsupportedModel(
                        f"Layer {layer}: rows of changed neurons ({site}) differ from whole "
                        "sequences."
                    )
        down = changes[layer]
        more = down.new - down.old
        added_as_it_is = not differ(wanted[:, [1 + layer]], wanted[:, :1] + more, more, tolerance)
        adds = adds and added_as_it_is and _has_value_vectors(lm, layer)
    return adds


def _has_value_vectors(lm, layer: int) -> bool:
    """Whether they can be read, as rows need where a layer does not run."""
    try:
        lm.value_vectors(layer)
    except UnsupportedModel:
        return False
    return True


def _changed_passes(lm, ids: Tensor, changes: list[_Change]) -> list[tuple[Tensor, Tensor]]:
    """Input and output of each layer at the last token, (Q, 1 + C, d) each, in passes over whole
    sequences: a clean one, and one for each of C changes."""
    shape = len(ids), 1 + len(changes)

    def at_last(call):
        ends = call.hidden[:, -1], first(call.output)[:, -1]
        return tuple(one.unflatten(0, shape).clone() for one in ends)

    def putting(n, new):
        def put(_, __, output):
            output = output.contiguous().clone()  # of which the next line takes a view
            rows = output.view(*shape, ids.shape[1], -1)  # OPT flattens batch and sequence
            rows[:, n, -1, : new.shape[-1]] = new[:, 0]
            return output

        return put

    with ExitStack() as stack:
        for n, change in enumerate(changes, 1):
            module = site_module(lm, change.layer, change.site)
            stack.enter_context(edited([module], after=putting(n, change.new)))
        with Trace(lm.layers, at_last) as trace:
            lm.model.base_model(input_ids=ids.repeat_interleave(shape[1], 0), use_cache=False)
    return trace.kept


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


def _check_joined(lm, ids: Tensor, tolerance: float) -> None:
    """`UnsupportedModel` unless rows of prompts of two lengths give together what each gives
    alone."""
    passes = [clean_pass(lm, ids[:1, 1:]), clean_pass(lm, ids)]
    joined = join_passes(passes)
    with replaying(lm):
        for layer in range(lm.num_layers):
            rows = torch.cat([joined.inputs[layer], joined.inputs[layer] / 2], 1)
            parts = zip(passes, rows.split([1, len(ids)]))
            alone = torch.cat([run_layer(lm, one, layer, part) for one, part in parts])
            together = run_layer(lm, joined, layer, rows)
            if differ(together, alone, alone - rows, tolerance):
                raise UnsupportedModel(f"Layer {layer}: prompts of two lengths change one another.")
