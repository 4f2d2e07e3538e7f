"""Interventions of notebooks 04 and 06 in batches, against one query and one set at a time.

    python tests/benchmarks/bench_interventions.py [model] [facts]

Prints both times, their ratio, and the largest difference of the probabilities. The reference is a
plain forward pass of the prompt (and one of the answer, where it has several tokens) for each query
and set, inside `scale_neurons` or `scale_synapses`.
"""

import sys
import time
from dataclasses import asdict
from functools import partial

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


def encoded_facts(lm, facts):
    """(fact, its tokenised queries, their prompts)."""
    for fact in facts:
        queries = [lm.encode(prompt, fact["object"]) for prompt in fact["prompts"]]
        yield fact, queries, [prompt for prompt, _ in queries]


def neuron_rows(lm, facts):
    """(prompt ids, answer ids, neurons, factor) of notebook 04."""
    rows, rng = [], np.random.default_rng(0)
    for fact, queries, prompts in encoded_facts(lm, facts):
        sets = [set(zip(*kns)) for kns in zip(fact["layer"], fact["neuron"])]
        for i, (query, active) in enumerate(zip(queries, activations(lm, prompts))):
            chosen = query_sets(sets, i, active, rng).values()
            rows += [(*query, frozenset(one), factor) for one in chosen for factor in (0.0, 2.0)]
    return rows


def synapse_rows(lm, facts):
    """Rows of notebook 06."""
    rows, rng = [], np.random.default_rng(0)
    for _, queries, prompts in encoded_facts(lm, facts):
        for query, scores in zip(queries, column_scores(lm, prompts)):
            own = above_threshold(*scores, 0.3)
            chosen = synapse_sets(own, own[..., ::-1].copy(), rng).values()
            rows += [Row(*query, columns, factor) for columns in chosen for factor in (0.0, 2.0)]
    return rows


def main(model="demo/gpt2", count=12):
    lm = load_model(model)
    facts = load_facts("demo", facts_per_relation=1)[: int(count)]
    queries = localise_unit(lm, [asdict(fact) for fact in facts])
    queries = queries[queries["left_out"].isna()]
    facts = [fact for part in units(queries, 0.2) for fact in part]

    def one_neuron_set(prompt, answer, neurons, factor):
        with scale_neurons(lm, neurons, factor):
            return probability(lm, prompt, answer)

    def one_synapse_set(row):
        layers, heads, columns = (one.tolist() for one in np.nonzero(row.columns))
        with scale_synapses(lm, set(zip(columns, layers, heads)), row.factor):
            return probability(lm, row.prompt, row.answer)

    def compared(name, rows, fast, slow):
        clock(lambda: fast(rows))  # warm up
        seconds, ours = clock(lambda: fast(rows))
        plain, theirs = clock(lambda: [slow(row) for row in rows])
        times = dict(batched_s=seconds, one_at_a_time_s=plain, ratio=plain / seconds)
        gap = np.abs(ours - theirs).max()
        return dict(experiment=name, rows=len(rows), **times, largest_difference=gap)

    neurons, synapses = neuron_rows(lm, facts), synapse_rows(lm, facts)
    batched = partial(scaled_answer_probabilities, lm)
    found = [
        compared("neurons (04)", neurons, batched, lambda row: one_neuron_set(*row)),
        compared("synapses (06)", synapses, lambda rows: run_rows(lm, rows)[:, 0], one_synapse_set),
    ]
    print(f"{model}, {len(queries)} queries, {torch.get_num_threads()} threads, {lm.device.type}")
    print(pd.DataFrame(found).round(3).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
