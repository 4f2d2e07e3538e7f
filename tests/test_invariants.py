"""What every change of a model leaves behind: nothing.

One table: every context manager, on every family it serves, left in every way; where several are
nested, the inner one first, as `with` does. Before and after, the model is compared whole: weights
by their bytes, hooks of every kind, what modules carry in their own dictionaries, the attention
implementation, gradients and the global state of torch and NumPy, and its logits by their bits.
"""

import itertools
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np
import pytest
import torch
from tiny import tiny_lm, trusted
from torch import nn

from qlutils import (
    answer_probability,
    attribute,
    edit_weights,
    find_synapses,
    perplexity,
    save_edited,
    scale_neurons,
    scale_synapses,
)
from qlutils.change.changes import Change
from qlutils.change.rows import score_rows
from qlutils.change.scaling import greedy_answers, scaled_answer_probabilities
from qlutils.change.synapses import controlled
from qlutils.model.attention import is_controlled

FAMILIES = ("gpt2", "llama3", "opt", "gptj", "neox", "gemma2", "bloom")
ATTENTION = FAMILIES[:-1]  # BLOOM's cannot be replaced
NEURONS, OTHERS = {(0, 3), (1, 7), (1, 9), (2, 0)}, {(1, 7), (1, 9), (0, 5)}  # they overlap
PROMPTS, ANSWERS = ["10 11 12", "20 21 22 23"], ["13 14", "24"]
IDS = torch.tensor([[10, 11, 12, 13]])


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def model(family):
    """Shared by all tests of a family, and that is a test of its own. Every once-a-model check is
    behind it."""
    lm = tiny_lm(family, torch.float32)
    answer_probability(lm, PROMPTS, ANSWERS)
    if family in ATTENTION:
        find_synapses(lm, PROMPTS[0])
    return lm


# --- the whole state of a model -------------------------------------------------------------------
def hook_kinds(names, start):
    return [name for name in names if name.startswith(start) and "hooks" in name]


HOOKS = hook_kinds(vars(nn.Module()), "_")
GLOBAL_HOOKS = hook_kinds(dir(nn.modules.module), "_global_")


def state(lm):
    """Everything a context could leave behind, as a dict of things that can be compared."""
    found = {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "global hooks": [list(getattr(nn.modules.module, name) or ()) for name in GLOBAL_HOOKS],
        "random state of torch": torch.get_rng_state().numpy().tobytes(),
        "random state of NumPy": np.random.get_state()[1].tobytes(),
        "active": (list(lm.scales), is_controlled(lm.model), lm.layout, lm.tokenizer, lm.model),
    }
    for name, value in lm.model.state_dict().items():
        content = value.detach().contiguous().view(torch.uint8).numpy().tobytes()
        found[f"weight {name}"] = hash(content), value.data_ptr(), value.dtype
    for name, parameter in lm.model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = id(parameter), parameter.requires_grad, parameter.grad is None
    for name, module in lm.model.named_modules():
        for kind in HOOKS:
            found[f"{kind} of {name}"] = list(getattr(module, kind))
        found[f"mode of {name}"] = module.training
        found[f"dictionary of {name}"] = {
            key: id(value)
            for key, value in vars(module).items()
            if key not in HOOKS and not key.startswith("_is_full")
        }
        if hasattr(module, "config"):
            found[f"attention of {name}"] = module.config._attn_implementation
    with torch.no_grad():
        found["logits"] = lm.model(input_ids=IDS, use_cache=False).logits.numpy().tobytes()
    return found


@contextmanager
def unchanged(lm):
    before = state(lm)
    try:
        yield
    finally:
        after = state(lm)
        moved = [key for key in before | after if before.get(key) != after.get(key)]
        if moved:
            model.cache_clear()  # no other test shall see this model
        assert not moved


# --- the contexts ---------------------------------------------------------------------------------
def halved(lm):
    half = torch.full((1, lm.num_heads, 2), 0.5, dtype=lm.score_dtype)
    return controlled(lm, {0: half, 2: half})


def updated(lm):
    return edit_weights(lm, OTHERS, "update", old="20", new=[30, 31])


def divided(lm):
    return scale_synapses(lm, {(0, 0, 1), (1, 1, 2)}, 3.0, renormalise=True)


# name -> (families, context on a model). Those of `PUBLIC` are in the package's interface.
CONTEXTS = {
    "scale_neurons": (FAMILIES, lambda lm: scale_neurons(lm, NEURONS, 0.0)),
    "scale_neurons, others": (FAMILIES, lambda lm: scale_neurons(lm, OTHERS, 2.0)),
    "edit_weights, erase": (FAMILIES, lambda lm: edit_weights(lm, NEURONS, "erase")),
    "edit_weights, update": (FAMILIES, updated),
    "scale_synapses": (ATTENTION, divided),
    "scale_synapses, by one": (ATTENTION, lambda lm: scale_synapses(lm, {(0, 0, 1)}, 1.0)),
    "controlled, watching": (ATTENTION, lambda lm: controlled(lm, observe=lambda *_: None)),
    "controlled, changing": (ATTENTION, halved),
}
PUBLIC = [name for name in CONTEXTS if name.startswith(("scale_", "edit_"))]
CASES = [(name, family) for name, (families, _) in CONTEXTS.items() for family in families]


def context(name, family):
    return CONTEXTS[name][1](model(family))


# --- the ways of leaving --------------------------------------------------------------------------
@torch.no_grad()
def forward(lm):
    return lm.model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name, family", CASES)
def test_a_forward_pass_that_fails_inside_a_context_leaves_the_model_as_before(name, family):
    """In the middle: layer 1 has begun and layer 2 has not."""

    def fail(*_):
        raise KeyboardInterrupt("on purpose")

    lm = model(family)
    with unchanged(lm), lm.layers[1].register_forward_hook(fail):
        with pytest.raises(KeyboardInterrupt, match="on purpose"), context(name, family):
            forward(lm)


METHODS = "register_forward_pre_hook", "register_forward_hook", "__setattr__"


@pytest.mark.parametrize("name, family", CASES)
def test_an_interrupt_while_a_context_is_entered_undoes_what_it_began(name, family, monkeypatch):
    """Ctrl-C at the k-th hook or attribute that is set, for every k there is."""
    lm, left = model(family), None
    for place in itertools.count(1):

        def interrupting(original):
            def call(self, *args, **kwargs):
                nonlocal left
                left -= 1
                if not left:
                    raise KeyboardInterrupt
                return original(self, *args, **kwargs)

            return call

        left, done = place, False
        with unchanged(lm), monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            for method in METHODS:
                patch.setattr(nn.Module, method, interrupting(getattr(nn.Module, method)))
            with context(name, family):
                pass
            done = True
        if done:
            break
    # edits set nothing but weights, and a factor of one sets nothing
    assert place > 1 or name.startswith("edit") or name.endswith("by one")


@pytest.mark.parametrize("outer, inner", itertools.product(CONTEXTS, repeat=2))
def test_a_context_that_ends_leaves_the_outer_one_in_force(outer, inner):
    for family in FAMILIES:
        if family in CONTEXTS[outer][0] and family in CONTEXTS[inner][0]:
            lm = model(family)
            with unchanged(lm), context(outer, family):
                before = forward(lm)
                with context(inner, family):
                    forward(lm)
                assert torch.equal(forward(lm), before), family
                with pytest.raises(KeyboardInterrupt), context(inner, family):
                    raise KeyboardInterrupt
                assert torch.equal(forward(lm), before), family


@pytest.mark.parametrize("name", PUBLIC)
def test_a_context_changes_the_model_while_it_lasts(name):
    """Else the tests above would pass for contexts that do nothing."""
    for family in CONTEXTS[name][0]:
        lm = model(family)
        before = forward(lm)
        with context(name, family):
            assert torch.equal(forward(lm), before) == name.endswith("by one"), family


# --- calls ----------------------------------------------------------------------------------------
def attributing(**options):
    return lambda lm, _: attribute(lm, PROMPTS, ANSWERS, steps=3, **options)


def edited_rows(lm, _):
    change = Change(lm, NEURONS, vector=torch.ones(32))
    return score_rows(lm, [([10, 11, 12], [13, 14])], [(0, change), (0, None)], everywhere=True)


def scaled_rows(lm, _):
    rows = [([10, 11], [12, 13], NEURONS, 0.0), ([10, 11], [12, 13], OTHERS, 2.0)]
    return scaled_answer_probabilities(lm, rows)


CALLS = {
    "attribute, ig": (FAMILIES, attributing()),
    "attribute, sig": (FAMILIES, attributing(method="sig")),
    "attribute, amig": (FAMILIES, attributing(method="amig")),
    "attribute, converged": (FAMILIES, attributing(rule="converged")),
    "attribute, pre-activation": (FAMILIES, attributing(site="pre_activation")),
    "answer_probability": (FAMILIES, lambda lm, _: answer_probability(lm, PROMPTS, ANSWERS)),
    "scaled answers": (FAMILIES, scaled_rows),
    "greedy_answers": (FAMILIES, lambda lm, _: greedy_answers(lm, [[10, 11], [12, 13]], [2, 1])),
    "edited rows": (FAMILIES, edited_rows),
    "perplexity": (FAMILIES, lambda lm, _: perplexity(lm, PROMPTS)),
    "find_synapses": (ATTENTION, lambda lm, _: find_synapses(lm, PROMPTS[0])),
    "save_edited": (("gpt2",), lambda lm, folder: save_edited(lm, folder, NEURONS, "erase")),
}
CALLED = [(name, family) for name, (families, _) in CALLS.items() for family in families]


@pytest.mark.parametrize("name, family", CALLED)
def test_the_model_is_as_before_after_every_call_also_one_that_fails_in_the_middle(
    name, family, tmp_path
):
    lm, call, seen, stop_at = model(family), CALLS[name][1], [], None

    def count_and_fail(*_):
        seen.append(1)
        if len(seen) == stop_at:
            raise KeyboardInterrupt("on purpose")

    before = lm.layers[1].register_forward_pre_hook(trusted(count_and_fail))
    with before, lm.downs[2].register_forward_hook(count_and_fail):
        with unchanged(lm):
            seen.clear()
            call(lm, tmp_path / "whole")
            total = len(seen)
        assert total or name == "save_edited"  # which runs no layer
        for stop in {1, 1 + total // 3, total} if total else ():
            with unchanged(lm):
                seen.clear()
                stop_at = stop
                with pytest.raises(KeyboardInterrupt, match="on purpose"):
                    call(lm, tmp_path / str(stop))
                stop_at = None
