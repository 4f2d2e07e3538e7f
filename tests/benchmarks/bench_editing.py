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


def edited(lm, plans):
    """Each plan, inside each of its edits, and the answer that it wants."""
    for plan in plans:
        for op, goal in (("erase", plan["object"]), ("update", plan["new_object"])):
            for edit in plan["edits"]:
                with edit_weights(lm, edit["set"], op, old=plan["object"], new=plan["new_object"]):
                    yield plan, goal


@torch.no_grad()
def plain(lm, plans, generate):
    """[(rel or gen of each prompt, log P), ...] of every edit, one at a time."""
    found = []
    for plan, goal in edited(lm, plans):
        encoded = [lm.encode(prompt, goal) for prompt in plan["prompts"]]
        encoded += [lm.encode(query["prompt"], query["object"]) for query in plan["locality"]]
        if generate:
            decode(lm, encoded)
        found += evaluate(lm, encoded)[: len(plan["prompts"])]
    return np.array(found)


def padded(rows, left=False):
    """Token ids and their mask, as a model takes them."""
    longest, ids, mask = max(map(len, rows)), [], []
    for row in rows:
        fill = [0] * (longest - len(row))
        ids.append(fill + row if left else row + fill)
        mask.append(fill + [1] * len(row) if left else [1] * len(row) + fill)
    return dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


def decode(lm, encoded):
    inputs = padded([prompt for prompt, _ in encoded], left=True)
    steps = max(len(answer) for _, answer in encoded)
    lm.model.generate(**inputs, max_new_tokens=steps, do_sample=False, pad_token_id=0)


def evaluate(lm, encoded):
    logits = lm.model(**padded([p + a[:-1] for p, a in encoded])).logits
    found = []
    for row, (p, a) in zip(logits, encoded):
        log_p, gold = torch.log_softmax(row[len(p) - 1 :][: len(a)], -1), torch.tensor(a)
        exact = bool((log_p.argmax(-1) == gold).all())
        found.append((exact, float(log_p.gather(1, gold[:, None]).sum())))
    return found


def plain_perplexity(lm, plans, tokens):
    return np.array([perplexity(lm, plan["texts"], tokens) for plan, _ in edited(lm, plans)])


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
    for generate, label in enumerate(("a teacher-forced pass", "generate and that pass")):
        slow, slow_cpu, rows = clock(lambda: plain(lm, plans, generate))
        said = f"{slow:6.2f} s clock, {slow_cpu:6.2f} s process, {slow / wall:.1f} times ours"
        print(f"  {'one edit, ' + label + ':':35} {said}")
    each = [plan for plan in plans for _ in range(2 * len(plan["edits"]))]
    at = np.cumsum([0] + [len(plan["prompts"]) for plan in each])[:-1]
    chosen = at + [plan["query"] for plan in each]
    gap = np.abs(np.log(frame["p_after"]) - rows[chosen, 1]).max()
    print(f"  largest difference of log P at q_i: {gap:.1e}")
    both, _, frame = clock(lambda: edit_facts(lm, with_texts, ppl_max_tokens=tokens))
    slow, _, values = clock(lambda: plain_perplexity(lm, with_texts, tokens))
    gap = np.abs(frame["ppl_after"] / values - 1).max()
    times = f"plain {slow:.2f} s, ours {both - wall:.2f} s"
    print(f"  dPPL, 5 entries of {tokens} tokens: {times}, ", end="")
    print(f"{slow / (both - wall):.1f} times; largest relative difference {gap:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
