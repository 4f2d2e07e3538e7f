"""Speed of the fast exact attribution on this machine: `python
tests/benchmarks/bench_attribution.py`.

One process, one run: the machine's own matmul rate, the fast algorithm and the naive per-layer
full-sequence reference at the same shape, so that the ratios are comparable whatever else the
machine is doing.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.model.answer import VOCAB_CHUNK
from qlutils.model.language_model import LanguageModel

SHAPES = {"gpt2": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257)}


class NoTokenizer:
    bos_token_id = mask_token_id = pad_token_id = None
    eos_token_id = 0

    def __call__(self, text, **_):
        return type("Ids", (), {"input_ids": [1]})


def matmul_rate(rows, shapes, repeats=7):
    """FLOP/s of float32 matmuls (rows, k) x (k, n), into memory that is there already: the best
    time of each shape, as if weights and results were always at hand. An upper bound for any
    program that is made of these products."""
    seconds = 0.0
    for k, n in shapes:
        a, b, out = torch.randn(rows, k), torch.randn(k, n), torch.empty(rows, n)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            times.append(time.perf_counter() - start)
        seconds += min(times)
    return sum(2 * rows * k * n for k, n in shapes) / seconds


def products_alone(lm, tokens, points):
    """Seconds for nothing but the matrix products that one query needs, in their order and on the
    model's own weights, which no cache holds: what is left of the matmul rate where few rows meet
    large weights."""
    total, seconds = 1 + points * lm.num_layers, 0.0
    rows = [1 + points * layer if layer else 0 for layer in range(lm.num_layers)]
    blocks = [
        [
            block.attn.c_attn.weight,
            block.attn.c_proj.weight,
            block.mlp.c_fc.weight,
            block.mlp.c_proj.weight,
        ]
        for block in lm.layers
    ]
    head = lm.model.lm_head.weight.T
    todo = [(tokens, w) for block in blocks for w in block] + [(1, head)]
    todo += [(n, w) for n, block in zip(rows, blocks) for w in block]
    todo += [
        (total, part) for chunk in head.split(VOCAB_CHUNK["cpu"], 1) for part in (chunk, chunk.T)
    ]
    todo += [(n, w.T) for n, block in zip(rows[::-1], blocks[::-1]) for w in block[::-1]]
    with torch.no_grad():
        for n, w in todo:
            if n:
                a, out = torch.randn(n, w.shape[0]), torch.empty(n, w.shape[1])
                start = time.perf_counter()
                torch.mm(a, w, out=out)
                seconds += time.perf_counter() - start
    return seconds


def naive(lm, prompt, answer, steps):
    """One layer at a time, full sequences, all logits, a batch of `steps`: what public code
    does."""
    ids = torch.tensor([prompt])
    vectors = {}
    hooks = [
        down.register_forward_pre_hook(
            lambda m, i, layer=layer: vectors.__setitem__(layer, i[0][0, -1])
        )
        for layer, down in enumerate(lm.downs)
    ]
    with torch.no_grad():
        lm.model(ids)
    for hook in hooks:
        hook.remove()
    scores = []
    for layer, down in enumerate(lm.downs):
        path = (torch.arange(1, steps + 1)[:, None] / steps * vectors[layer]).requires_grad_()

        def replace(module, inputs):
            return (torch.cat([inputs[0][:, :-1], path[:, None]], 1),)

        hook = down.register_forward_pre_hook(replace)
        logits = lm.model(ids.expand(steps, -1)).logits[:, -1]
        hook.remove()
        p = torch.softmax(logits, -1)[:, answer[0]]
        (grad,) = torch.autograd.grad(p.sum(), path)
        scores.append(vectors[layer] * grad.mean(0))
    return torch.stack(scores)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = GPT2Config(**SHAPES["gpt2"])
    lm = LanguageModel(AutoModelForCausalLM.from_config(config), NoTokenizer(), "gpt2-shape")
    layers, width, vocab = config.n_layer, config.n_embd, config.vocab_size
    prompt, answer = torch.randint(0, vocab, (args.tokens,)).tolist(), [5]
    rows = layers * args.steps
    weights = 12 * width**2
    # As the definition counts: m rows a layer through their own layer and those above, forward and
    # backward, and the unembedding. What is executed is less: a row appears at the end of its own
    # layer, and all layers share the end row.
    must = 4 * weights * args.steps * layers * (layers + 1) / 2 + 4 * rows * width * vocab
    points = args.steps - 1 + 1  # the path's beginning, for the completeness gap, is one of them
    done = (
        4 * weights * (points * layers * (layers - 1) / 2 + layers - 1)
        + 4 * (layers * points + 1) * width * vocab
    )
    shapes = [
        (width, 3 * width),
        (width, width),
        (width, 4 * width),
        (4 * width, width),
        (width, 1024),
        (1024, width),
    ]
    spec = Spec(steps=args.steps)
    attribute_encoded(lm, [(prompt, answer)], spec, ["warm-up"])
    fast, slow, rates, alone = [], [], [], []
    for repeat in range(args.repeats):
        rates.append(matmul_rate(rows, shapes))
        start = time.perf_counter()
        result = attribute_encoded(lm, [(prompt, answer)], spec, ["query"])
        fast.append(time.perf_counter() - start)
        alone.append(products_alone(lm, args.tokens, points))
        if repeat % 2 == 0:  # between the fast ones, so that both meet the same machine
            start = time.perf_counter()
            reference = naive(lm, prompt, answer, args.steps)
            slow.append(time.perf_counter() - start)
    error = (result.scores[0] - reference).abs().max() / reference.abs().max()
    time_fast, time_slow, rate, bare = (
        statistics.median(times) for times in (fast, slow, rates, alone)
    )
    print(
        f"threads {torch.get_num_threads()}, T = {args.tokens}, m = {args.steps}, one query, "
        f"float32"
    )
    print(f"must do          {must / 1e9:8.1f} GFLOP by the definition; executed {done / 1e9:.1f}")
    print(
        f"matmul rate      {rate / 1e9:8.1f} GFLOP/s at {rows} rows and the model's shapes, "
        f"everything in cache"
    )
    print(
        f"fast             {time_fast:8.3f} s  ({must / time_fast / 1e9:.1f} GFLOP/s, "
        f"{must / time_fast / rate:.0%} of the "
        f"matmul rate; executed: {done / time_fast / rate:.0%})"
    )
    print(
        f"products alone   {bare:8.3f} s  in their order, on the model's own weights: "
        f"{bare / time_fast:.0%} of the time"
    )
    print(
        f"naive reference  {time_slow:8.3f} s  (ratio {time_slow / time_fast:.1f}x, largest "
        f"relative difference {error:.1e})"
    )


if __name__ == "__main__":
    main()
