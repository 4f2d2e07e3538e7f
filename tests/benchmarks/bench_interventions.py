"""Interventions of notebooks 04 and 06 in batches, against one query and one set at a time.

    python tests/benchmarks/bench_interventions.py [model] [facts]

Prints both times, their ratio, and the largest difference of the probabilities. The reference is a
plain forward pass of the prompt (and one of the answer, where it has several tokens) for each query
and set, inside `scale_neurons` or `scale_synapses`.
"""

import sys
import time

import numpy as np
import pandas as pd
import torch

from qlutils import load_facts, load_model, scale_neurons, scale_synapses
from qlutils.change.scaling import scaled_answer_probabilities
from qlutils.change.synapses import Row, above_threshold, column_scores, run_rows
from qlutils.experiments.effects import units
from qlutils.experiments.knowledge_synapses import synapse_sets
from qlutils.experiments.localize import activations, localise_unit
from qlutils.experiments.query_kn_mapping import query_sets


def clock(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, np.asarray(result, dtype=float)


@torch.no_grad()
def probability(lm, prompt, answer):
    run = lm.model(input_ids=torch.tensor([prompt], device=lm.device), use_cache=len(answer) > 1)
    logits = run.logits[0, -1:]
    if len(answer) > 1:
        rest = torch.tensor([answer[:-1]], device=lm.device)
        logits = torch.cat([logits, lm.model(input_ids=rest, cache=run.cache).logits[0]])
    p = torch.softmax(logits.to(lm.score_dtype), -1)
    return float(p.gather(1, torch.tensor(answer, device=lm.device)[:, None]).prod())


def neuron_rows(lm, facts):
    """(prompt ids, answer ids, neurons, factor) of notebook 04."""
    rows, rng = [], np.random.default_rng(0)
    for fact in facts:
        encoded = [lm.encode(prompt, fact["object"]) for prompt in fact["prompts"]]
        sets = [set(zip(*kns)) for kns in zip(fact["layer"], fact["neuron"])]
        for i, (query, active) in enumerate(
            zip(encoded, activations(lm, [prompt for prompt, _ in encoded]))
        ):
            rows += [
                (*query, frozenset(chosen), factor)
                for chosen in query_sets(sets, i, active, rng).values()
                for factor in (0.0, 2.0)
            ]
    return rows


def synapse_rows(lm, facts):
    """Rows of notebook 06."""
    rows, rng = [], np.random.default_rng(0)
    for fact in facts:
        encoded = [lm.encode(prompt, fact["object"]) for prompt in fact["prompts"]]
        for (prompt, answer), scores in zip(
            encoded, column_scores(lm, [prompt for prompt, _ in encoded])
        ):
            own = above_threshold(*scores, 0.3)
            rows += [
                Row(prompt, answer, columns, factor)
                for columns in synapse_sets(own, own[..., ::-1].copy(), rng).values()
                for factor in (0.0, 2.0)
            ]
    return rows


def main(model="demo/gpt2", count=12):
    lm = load_model(model)
    facts = load_facts("demo", facts_per_relation=1)[: int(count)]
    unit = [
        dict(relation=f.relation, subject=f.subject, object=f.object, prompts=list(f.prompts))
        for f in facts
    ]
    queries = localise_unit(lm, unit)
    queries = queries[queries["left_out"].isna()]
    facts = [fact for part in units(queries, 0.2) for fact in part]
    rows = neuron_rows(lm, facts)
    synapses = synapse_rows(lm, facts)

    def one_neuron_set(prompt, answer, neurons, factor):
        with scale_neurons(lm, neurons, factor):
            return probability(lm, prompt, answer)

    def one_synapse_set(row):
        layers, heads, columns = np.nonzero(row.columns)
        with scale_synapses(
            lm, set(zip(columns.tolist(), layers.tolist(), heads.tolist())), row.factor
        ):
            return probability(lm, row.prompt, row.answer)

    found = []
    for name, number, fast, slow in (
        (
            "neurons (04)",
            len(rows),
            lambda: scaled_answer_probabilities(lm, rows),
            lambda: [one_neuron_set(*row) for row in rows],
        ),
        (
            "synapses (06)",
            len(synapses),
            lambda: run_rows(lm, synapses)[:, 0],
            lambda: [one_synapse_set(row) for row in synapses],
        ),
    ):
        clock(fast)  # warm up
        (seconds, ours), (plain, theirs) = clock(fast), clock(slow)
        found.append(
            dict(
                experiment=name,
                rows=number,
                batched_s=seconds,
                one_at_a_time_s=plain,
                ratio=plain / seconds,
                largest_difference=np.abs(ours - theirs).max(),
            )
        )
    print(f"{model}, {len(queries)} queries, {torch.get_num_threads()} threads, {lm.device.type}")
    print(pd.DataFrame(found).round(3).to_string(index=False))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
