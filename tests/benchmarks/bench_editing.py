"""The editing experiment in batches of virtual edits, against one weight edit at a time.

    python tests/benchmarks/bench_editing.py [model] [facts]

The plain way edits the weights, evaluates the edit's queries (q_i, its neighbours, 20 locality
queries) in one padded batch, and restores. It is timed twice: with a single teacher-forced pass,
from which an expert reads everything, and as one would write it down: greedy decoding by `generate`
for the answers, and that pass for their probabilities. Times are of the process (all cores) and of
the clock; ratios of the clock.
"""

import sys
import time
from dataclasses import asdict

import numpy as np
import torch

from qlutils import edit_weights, load_facts, load_model, perplexity
from qlutils.change.editing import usable_texts
from qlutils.experiments.kn_modification import edit_facts, plan_edits
from qlutils.experiments.localize import localise_unit
from qlutils.facts import perplexity_texts

SETS = {"local": None, "global": None, "cas": {}}


def clock(function, repeats=3):
    """The fastest of some runs: its clock time, its process time, and the result."""
    found = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        result = function()
        found.append((time.perf_counter() - start, time.process_time() - cpu))
    return *min(found), result


@torch.no_grad()
def plain(lm, plans, generate):
    """[(rel or gen of each prompt, log P), ...] of every edit, one at a time."""
    found = []
    for plan in plans:
        objects = {"erase": plan["object"], "update": plan["new_object"]}
        for op, goal in objects.items():
            pairs = [(prompt, goal) for prompt in plan["prompts"]] + [
                (q["prompt"], q["object"]) for q in plan["locality"]
            ]
            for edit in plan["edits"]:
                encoded = [lm.encode(*pair) for pair in pairs]
                with edit_weights(lm, edit["set"], op, old=plan["object"], new=plan["new_object"]):
                    if generate:
                        decode(lm, encoded)
                    found += evaluate(lm, encoded)[: len(plan["prompts"])]
    return np.array(found)


def decode(lm, encoded):
    longest = max(len(p) for p, _ in encoded)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in encoded])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in encoded])
    steps = max(len(a) for _, a in encoded)
    return lm.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=0
    )


def evaluate(lm, encoded):
    rows = [p + a[:-1] for p, a in encoded]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits = lm.model(input_ids=ids, attention_mask=mask).logits
    found = []
    for row, (p, a) in enumerate(encoded):
        log_p, gold = (
            torch.log_softmax(logits[row, len(p) - 1 : len(p) - 1 + len(a)], -1),
            torch.tensor(a),
        )
        found.append(
            (bool((log_p.argmax(-1) == gold).all()), float(log_p.gather(1, gold[:, None]).sum()))
        )
    return found


def plain_perplexity(lm, plans, tokens):
    found = []
    for plan in plans:
        for op in ("erase", "update"):
            for edit in plan["edits"]:
                with edit_weights(lm, edit["set"], op, old=plan["object"], new=plan["new_object"]):
                    found.append(perplexity(lm, plan["texts"], tokens))
    return np.array(found)


def main(name="demo/gpt2", count=24, tokens=64):
    lm, facts = load_model(name, device="cpu"), load_facts("demo", facts_per_relation=3)
    queries = localise_unit(lm, [asdict(fact) for fact in facts[: int(count)]])
    texts = usable_texts(lm, perplexity_texts("demo"))
    common = dict(num_neurons=lm.num_neurons, sets=SETS, controls=["random"])
    plans, _ = plan_edits(queries, load_facts("demo"), ppl_entries=0, **common)
    with_texts, _ = plan_edits(queries, load_facts("demo"), texts=texts, **common)
    edits = sum(2 * len(plan["edits"]) for plan in plans)
    wall, cpu, frame = clock(lambda: edit_facts(lm, plans))
    print(f"{name}: {edits} edits of {len(plans)} facts, {torch.get_num_threads()} threads")
    print(f"  virtual edits in batches:           {wall:6.2f} s clock, {cpu:6.2f} s process")
    for generate, label in (
        (False, "one edit, one teacher-forced pass"),
        (True, "one edit, generate and that pass"),
    ):
        slow, slow_cpu, rows = clock(lambda: plain(lm, plans, generate))
        print(
            f"  {label + ':':35} {slow:6.2f} s clock, {slow_cpu:6.2f} s process, "
            f"{slow / wall:.1f} times ours"
        )
    at = np.cumsum(
        [0] + [len(plan["prompts"]) for plan in plans for _ in range(2 * len(plan["edits"]))]
    )
    chosen = [plan["query"] for plan in plans for _ in range(2 * len(plan["edits"]))]
    gap = np.abs(np.log(frame["p_after"]) - rows[at[:-1] + chosen, 1]).max()
    print(f"  largest difference of log P at q_i: {gap:.1e}")
    both, _, frame = clock(lambda: edit_facts(lm, with_texts, ppl_max_tokens=tokens))
    slow, _, values = clock(lambda: plain_perplexity(lm, with_texts, tokens))
    print(
        f"  dPPL, 5 entries of {tokens} tokens: plain {slow:.2f} s, ours {both - wall:.2f} s, "
        f"{slow / (both - wall):.1f} "
        f"times; largest relative difference {np.abs(frame['ppl_after'] / values - 1).max():.1e}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
