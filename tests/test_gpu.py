"""On a GPU the study computes what it computes on a CPU, waits for nothing within a batch, and
survives a full memory.

Skipped where there is no CUDA device; QLUTILS_TEST_DEVICE=cpu rehearses what does not need one."""

import os

import pandas as pd
import pytest
import torch
from tiny import tiny_lm, tiny_model, word_tokenizer

from qlutils import attribute, knowledge_neurons, load_model
from qlutils.attribution import attribute as attribution
from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.change.scaling import answer_probability, scale_neurons
from qlutils.change.synapses import find_synapses
from qlutils.checks import METHODS, RULES, SITES
from qlutils.experiments.attention_predominance import attend
from qlutils.experiments.effects import units
from qlutils.experiments.kn_modification import run_edits
from qlutils.experiments.knowledge_synapses import scale_synapse_columns
from qlutils.experiments.localize import localise
from qlutils.experiments.query_kn_mapping import scale_kns
from qlutils.model.language_model import LanguageModel
from qlutils.run import main
from qlutils.study.notebook import Study

GPU = os.environ.get("QLUTILS_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    GPU == "cuda" and not torch.cuda.is_available(), reason="no CUDA device here"
)
needs_cuda = pytest.mark.skipif(GPU != "cuda", reason="about CUDA's memory and streams")
FAMILIES = "gpt2 gptj neox opt llama2 llama3 qwen3 gemma2 phi3 bloom mistral".split()
QUERIES = [([5, 6, 7, 8], [9]), ([9, 5, 4], [10, 11])]
QUERIES += [([7, 7, 8, 9, 6], [12]), ([8, 6, 5, 4], [9, 7, 5])]


def on_gpu(lm):
    return LanguageModel(lm.model.to(GPU), lm.tokenizer, lm.name)


def relative(found, wanted):
    return float((found.cpu().double() - wanted.double()).abs().max() / wanted.double().abs().max())


def scaled(scores):
    return scores.cpu().double() / scores.cpu().double().flatten(1).norm(dim=1)[:, None, None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_is_that_of_the_cpu(family, method):
    """Most families round to float32 in transformers' own code (norms, rotary angles, attention),
    and two devices round differently. Scores are compared up to a query's scale: amig divides by a
    sum in which digits cancel; and so do gaps, which are what two sums differ by."""
    exact, rounding = (1e-10, 0) if family in ("gpt2", "opt") else (1e-4, 3e-6)
    lm = tiny_lm(family)
    cases = [Spec(method, 4, rule, site=site) for rule in RULES for site in SITES]
    wanted = [attribute_encoded(lm, QUERIES, spec) for spec in cases]
    lm = on_gpu(lm)
    for spec, one in zip(cases, wanted):
        found = attribute_encoded(lm, QUERIES, spec)
        assert found.scores.device.type == GPU
        assert relative(scaled(found.scores), scaled(one.scores)) <= exact, spec
        off = (found.completeness_gap.cpu() - one.completeness_gap).abs().max()
        largest = one.completeness_gap.max()
        assert off <= 10 * exact * largest + rounding * one.probability.max(), spec
        assert found.probability.tolist() == pytest.approx(one.probability.tolist(), rel=exact)
        assert found.known.tolist() == one.known.tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_bfloat16_is_close_to_float64_of_the_same_weights(family, method):
    rounded, exact = tiny_model(family, torch.bfloat16, scale=2), tiny_model(family)
    exact.load_state_dict(rounded.state_dict())
    lms = [LanguageModel(one, word_tokenizer(), family) for one in (rounded.to(GPU), exact)]
    found, wanted = (attribute_encoded(lm, QUERIES, Spec(method, 8)).cpu() for lm in lms)
    assert found.scores.dtype == torch.float32 and bool(torch.isfinite(found.scores).all())
    assert relative(scaled(found.scores), scaled(wanted.scores)) < 0.1
    assert found.probability.tolist() == pytest.approx(wanted.probability.tolist(), rel=0.03)


def test_the_public_calls_take_and_give_what_they_do_on_a_cpu():
    here = load_model("demo/gpt2", device="cpu", dtype="float64")
    prompts, answers = ["Oslo is the capital of", "The capital of Italy is"], ["Norway", "Rome"]
    wanted = attribute(here, prompts, answers, steps=6)
    with torch.device(GPU):  # what many set once and for all
        there = load_model("demo/gpt2", dtype="float64")
        found = attribute(there, prompts, answers, steps=6)
    assert found.scores.device.type == "cpu" and relative(found.scores, wanted.scores) <= 1e-10
    encoded = there.encode_all(prompts, answers)
    sets = knowledge_neurons(attribute_encoded(there, encoded, Spec(steps=6)).scores)
    assert sets == knowledge_neurons(wanted.scores)
    changed = []
    for lm in (here, there):
        with torch.device(lm.device), scale_neurons(lm, sets[0], 0.0):
            changed.append(answer_probability(lm, prompts, answers).cpu())
    assert relative(changed[1], changed[0]) <= 1e-10
    assert find_synapses(here, prompts[0]) == find_synapses(there, prompts[0])


def assert_alike(found, wanted, rel):
    both = [one.drop(columns=["row_budget", "seconds"], errors="ignore") for one in (found, wanted)]
    pd.testing.assert_frame_equal(*both, rtol=rel, atol=rel / 1e3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("model", ["demo/gpt2", "demo/llama3"])
def test_the_whole_study_is_that_of_the_cpu(model, runs):
    frames, parameters = [], dict(model=model, method="ig", dtype="float64", t=0.2, corpus="demo")
    parameters |= dict(relations=["P19", "P36"], facts_per_relation=2, n_locality=6)
    parameters |= dict(ppl_max_tokens=16, lambda1=2.0, lambda2=2.0, embedding="input")
    for device in ("cpu", GPU):
        study = Study("01_localize", device=device, output=f"on-{device}", **parameters)
        queries = localise(study, steps=8)
        sets, controls = ["local", "global"], ["random", "matched"]
        edits, _ = run_edits(study, queries, sets, controls=controls, ppl_entries=2)
        found = [queries, edits, study.run(attend, units(queries))]
        for task, other in ((scale_kns, "other"), (scale_synapse_columns, "irrelevant")):
            found.append(study.run(task, units(queries, 0.2, **{other: 0}), dict(seed=0)))
        frames.append(found)
    for wanted, found in zip(*frames):
        assert len(wanted) > 3
        assert_alike(found, wanted, 1e-7 if model == "demo/gpt2" else 1e-2)


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_the_host_waits_for_nothing_within_a_batch(family, method, monkeypatch):
    lm, seen = on_gpu(tiny_lm(family, torch.float32)), []
    integrate = attribution.integrate

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen.append(1)
            return integrate(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(attribution, "integrate", watched)
    attribute_encoded(lm, QUERIES, Spec(method, 4))
    assert seen


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
def test_a_memory_that_is_really_full_halves_the_batches(method):
    """The process may have so little of the GPU that the wanted batch does not fit."""
    lm = on_gpu(tiny_lm("gpt2", n_embd=256, vocab_size=5000))
    queries = [([5 + i, 6, 7, 8, 9], [10]) for i in range(64)]
    wanted = attribute_encoded(lm, queries, Spec(method, 8, row_budget=300))
    assert wanted.row_budget == 300
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 60e6) / total)
        found = attribute_encoded(lm, queries, Spec(method, 8, row_budget=2**16))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.row_budget < 2**16, "it fitted: the test says nothing"
    assert relative(found.scores, wanted.scores.cpu()) <= 1e-9


@needs_cuda
def test_autocast_changes_no_number_and_tf32_is_refused():
    lm = on_gpu(tiny_lm("llama3", torch.float32))
    expected = attribute_encoded(lm, QUERIES, Spec(steps=3)).scores
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(attribute_encoded(lm, QUERIES, Spec(steps=3)).scores, expected)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="set_float32_matmul_precision"):
            attribute_encoded(lm, QUERIES, Spec(steps=3))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_notebooks_run_on_the_gpu(runs):
    """What a cell shows may lie on the device, where pandas cannot read it."""
    asked = "--models demo/gpt2 --methods ig --relations P36 --facts-per-relation 2 --jobs 4"
    parameters = "-p n_locality 4 -p ppl_max_tokens 16 -p sweep_facts 1 -p more_controls_facts 1"
    status = main([*asked.split(), *parameters.split(), "--device", GPU, "--output", "on-gpu"])
    assert status == 0
