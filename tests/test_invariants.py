"""What every change of a model leaves behind: nothing.

One table: every context manager, on every family it serves, left in every way; where several are
nested, the inner one first, as `with` does. Before and after, the model is compared whole: weights
by their bytes, hooks of every kind, what modules carry in their own dictionaries, the attention
implementation, gradients and the global state of torch and NumPy, and its logits by their bits.
"""

import hashlib
import itertools
from contextlib import contextmanager
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
from qlutils.model import answer
from qlutils.model.attention import is_controlled

FAMILIES = ("gpt2", "llama3", "opt", "gptj", "neox", "gemma2", "bloom")
ATTENTION = tuple(
    family for family in FAMILIES if family != "bloom"
)  # BLOOM's attention cannot be replaced
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
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
GLOBAL_HOOKS = [
    getattr(nn.modules.module, name)
    for name in dir(nn.modules.module)
    if name.startswith("_global_") and name.endswith("_hooks")
]


def state(lm):
    """Everything a context could leave behind, as a dict of things that can be compared."""
    found = {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "global hooks": [list(hooks) for hooks in GLOBAL_HOOKS],
        "random state of torch": torch.get_rng_state().numpy().tobytes(),
        "random state of NumPy": hashlib.sha256(np.random.get_state()[1].tobytes()).hexdigest(),
        "active": (list(lm.scales), is_controlled(lm.model), lm.layout, lm.tokenizer, lm.model),
    }
    for name, value in lm.model.state_dict().items():
        digest = hashlib.sha256(
            value.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        found[f"weight {name}"] = digest, value.data_ptr(), value.dtype
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
def factors(lm, factor):
    return {
        layer: torch.full((1, lm.num_heads, 2), factor, dtype=lm.score_dtype) for layer in (0, 2)
    }


# name -> (families, context on a model). Those of `PUBLIC` are in the package's interface.
CONTEXTS = {
    "scale_neurons, off": (FAMILIES, lambda lm: scale_neurons(lm, NEURONS, 0.0)),
    "scale_neurons, others doubled": (FAMILIES, lambda lm: scale_neurons(lm, OTHERS, 2.0)),
    "edit_weights, erase": (FAMILIES, lambda lm: edit_weights(lm, NEURONS, "erase")),
    "edit_weights, update others": (
        FAMILIES,
        lambda lm: edit_weights(lm, OTHERS, "update", old="20", new=[30, 31]),
    ),
    "scale_synapses, off": (ATTENTION, lambda lm: scale_synapses(lm, {(0, 0, 0), (1, 1, 2)}, 0.0)),
    "scale_synapses, renormalised": (
        ATTENTION,
        lambda lm: scale_synapses(lm, {(0, 0, 1)}, 3.0, renormalise=True),
    ),
    "scale_synapses, by one": (ATTENTION, lambda lm: scale_synapses(lm, {(0, 0, 1)}, 1.0)),
    "controlled, watching": (ATTENTION, lambda lm: controlled(lm, observe=lambda *_: None)),
    "controlled, changing": (ATTENTION, lambda lm: controlled(lm, factors(lm, 0.5))),
}
PUBLIC = [name for name in CONTEXTS if name.startswith(("scale_", "edit_"))]
CASES = [(name, family) for name, (families, _) in CONTEXTS.items() for family in families]


def context(name, family):
    return CONTEXTS[name][1](model(family))


# --- the ways of leaving --------------------------------------------------------------------------
@torch.no_grad()
def forward(lm):
    return lm.model(input_ids=IDS, use_cache=False).logits


def leave_at_the_end(lm, enter):
    with enter():
        pass


def leave_after_use(lm, enter):
    with enter():
        forward(lm)


def raising(error):
    def leave(lm, enter):
        with pytest.raises(error, match="on purpose"), enter():
            raise error("on purpose")

    return leave


def leave_through_a_failing_forward_pass(lm, enter):
    """In the middle: layer 1 has begun and layer 2 has not."""

    def fail(*_):
        raise KeyboardInterrupt("on purpose")

    handle = lm.layers[1].register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt, match="on purpose"), enter():
            forward(lm)
    finally:
        handle.remove()


def inside(enter):
    with enter():
        yield


def leave_by_closing_a_generator(lm, enter):
    steps = inside(enter)
    next(steps)
    steps.close()


def leave_by_forgetting_a_generator(lm, enter):
    steps = inside(enter)
    next(steps)
    del steps


def leave_by_return(lm, enter):
    def run():
        with enter():
            return 1

    assert run() == 1


def leave_with_other_gradients(lm, enter):
    with torch.no_grad(), enter():
        pass
    with torch.enable_grad(), enter():
        pass


LEAVING = {
    "at the end": leave_at_the_end,
    "after use": leave_after_use,
    "by return": leave_by_return,
    "by an error": raising(ValueError),
    "by Ctrl-C": raising(KeyboardInterrupt),
    "by exit": raising(SystemExit),
    "through a failing forward pass": leave_through_a_failing_forward_pass,
    "by closing a generator": leave_by_closing_a_generator,
    "by forgetting a generator": leave_by_forgetting_a_generator,
    "with other gradients": leave_with_other_gradients,
}


@pytest.mark.parametrize("name, family", CASES)
def test_the_model_is_as_before_however_a_context_is_left(name, family):
    lm = model(family)
    for way, leave in LEAVING.items():
        try:
            with unchanged(lm):
                leave(lm, lambda: context(name, family))
        except AssertionError as error:
            raise AssertionError(f"left {way}: {error}") from error


def interrupted_everywhere(lm, run, monkeypatch, methods):
    """Run `run` again and again, with Ctrl-C at the k-th hook or attribute that is set, for every k
    there is; their number."""
    for place in itertools.count(1):
        seen, done = [], False

        def interrupting(original, seen=seen, place=place):
            def call(self, *args, **kwargs):
                seen.append(1)
                if len(seen) == place:
                    raise KeyboardInterrupt("on purpose")
                return original(self, *args, **kwargs)

            return call

        with unchanged(lm), monkeypatch.context() as patch:
            for method in methods:
                patch.setattr(nn.Module, method, interrupting(getattr(nn.Module, method)))
            try:
                run()
                done = True
            except KeyboardInterrupt:
                pass
        if done:
            return place - 1


@pytest.mark.parametrize("name, family", CASES)
def test_an_interrupt_while_a_context_is_entered_undoes_what_it_began(name, family, monkeypatch):
    places = interrupted_everywhere(
        model(family),
        lambda: leave_at_the_end(None, lambda: context(name, family)),
        monkeypatch,
        ("register_forward_pre_hook", "register_forward_hook", "__setattr__"),
    )
    assert (
        places or name.startswith("edit") or name.endswith("by one")
    )  # these set nothing but weights, and nothing


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


def test_generation_is_the_class_s_own_again():
    lm = model("gpt2")
    with unchanged(lm):
        with scale_neurons(lm, {(0, 0)}, 2.0):
            with scale_neurons(lm, {(0, 1)}, 2.0):
                generate(lm)
            generate(lm)
            assert "generate" in vars(lm.model)
    assert "generate" not in vars(lm.model)


def generate(lm):
    mask = torch.ones_like(IDS)
    options = dict(max_new_tokens=2, do_sample=False, pad_token_id=0)
    return lm.model.generate(input_ids=IDS, attention_mask=mask, **options)


# --- calls ----------------------------------------------------------------------------------------
def attributing(method, **options):
    return FAMILIES, lambda lm, _: attribute(
        lm, PROMPTS, ANSWERS, method=method, steps=3, **options
    )


def edited_rows(lm, _):
    change = Change(lm, NEURONS, vector=torch.ones(32))
    queries = [([10, 11, 12], [13, 14])]
    return score_rows(lm, queries, [(0, change), (0, None)], everywhere=True)


CALLS = {
    "attribute, ig": attributing("ig"),
    "attribute, sig": attributing("sig"),
    "attribute, amig": attributing("amig"),
    "attribute, converged": attributing("ig", rule="converged"),
    "attribute, pre-activation": attributing("ig", site="pre_activation"),
    "answer_probability": (FAMILIES, lambda lm, _: answer_probability(lm, PROMPTS, ANSWERS)),
    "scaled answers": (
        FAMILIES,
        lambda lm, _: scaled_answer_probabilities(
            lm, [([10, 11], [12, 13], NEURONS, 0.0), ([10, 11], [12, 13], OTHERS, 2.0)]
        ),
    ),
    "greedy_answers": (
        FAMILIES,
        lambda lm, _: greedy_answers(lm, [[10, 11], [12, 13, 14]], [2, 1]),
    ),
    "edited rows": (FAMILIES, edited_rows),
    "perplexity": (FAMILIES, lambda lm, _: perplexity(lm, PROMPTS)),
    "find_synapses": (ATTENTION, lambda lm, _: find_synapses(lm, PROMPTS[0])),
    "save_edited": (
        ("gpt2", "llama3"),
        lambda lm, folder: save_edited(lm, folder, NEURONS, "erase"),
    ),
}


@pytest.mark.parametrize(
    "name, family", [(name, family) for name, (families, _) in CALLS.items() for family in families]
)
def test_the_model_is_as_before_after_every_call_also_one_that_fails_in_the_middle(
    name, family, tmp_path
):
    lm, call, seen, stop_at = model(family), CALLS[name][1], [], None

    def count_and_fail(*_):
        seen.append(1)
        if len(seen) == stop_at:
            raise KeyboardInterrupt("on purpose")

    trusted(count_and_fail)
    handles = [
        lm.layers[1].register_forward_pre_hook(count_and_fail),
        lm.downs[2].register_forward_hook(count_and_fail),
    ]
    try:
        with unchanged(lm):
            seen.clear()
            call(lm, tmp_path / "whole")
            total = len(seen)
        assert total or name == "save_edited"  # which runs no layer
        for stop in sorted({1, 2, 1 + total // 3, total // 2, total} - {0}) if total else ():
            with unchanged(lm):
                seen.clear()
                stop_at = stop
                with pytest.raises(KeyboardInterrupt, match="on purpose"):
                    call(lm, tmp_path / str(stop))
                stop_at = None
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "save_edited"])
def test_an_interrupt_while_a_call_sets_its_hooks_undoes_what_it_began(name, monkeypatch, tmp_path):
    lm = model("gpt2")
    assert (
        interrupted_everywhere(
            lm,
            lambda: CALLS[name][1](lm, tmp_path),
            monkeypatch,
            ("register_forward_pre_hook", "register_forward_hook"),
        )
        > 1
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attribution_that_fails_while_gradients_flow_back_leaves_the_model_as_it_was(
    family, monkeypatch
):
    lm = model(family)
    places = (torch.autograd, "grad"), (answer, "token_probabilities")
    errors = RuntimeError("on purpose"), KeyboardInterrupt("on purpose")
    for (where, name), error in itertools.product(places, errors):

        def fail(*_, error=error, **__):
            raise error

        with unchanged(lm), monkeypatch.context() as patch:
            patch.setattr(where, name, fail)
            with pytest.raises(type(error), match="on purpose"):
                attribute(lm, PROMPTS, ANSWERS, steps=3)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_call_that_is_refused_inside_a_context_leaves_it_in_force(name):
    for family in CONTEXTS[name][0]:
        lm = model(family)
        with unchanged(lm), context(name, family):
            before = forward(lm)
            for wrong in (
                lambda: answer_probability(lm, [""], ["13"]),
                lambda: perplexity(lm, []),
                lambda: scale_neurons(lm, {(9, 9)}, 0.0).__enter__(),
                lambda: edit_weights(lm, NEURONS, "update", old=[5]).__enter__(),
                lambda: scale_synapses(lm, {(0, 9, 0)}, 0.0).__enter__(),
            ):
                with pytest.raises(ValueError):
                    wrong()
            assert torch.equal(forward(lm), before), family
