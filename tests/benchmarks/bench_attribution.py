"""Speed of the fast exact attribution on this machine: `python
tests/benchmarks/bench_attribution.py`.

One process, one run: the machine's own matmul rate, the fast algorithm and the naive per-layer
full-sequence reference at the same shape, so that the ratios are comparable whatever else the
machine is doing.
"""

import argparse
import statistics
import time
from functools import partial
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.model.answer import VOCAB_CHUNK
from qlutils.model.language_model import LanguageModel


class NoTokenizer:
    bos_token_id = mask_token_id = pad_token_id = None
    eos_token_id = 0

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[1])


def clock(function):
    """(seconds, result)."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def matmul_rate(rows, shapes, repeats=7):
    """FLOP/s of float32 matmuls (rows, k) x (k, n), into memory that is there already: the best
    time of each shape, as if weights and results were always at hand. An upper bound for any
    program that is made of these products."""
    seconds = 0.0
    for k, n in shapes:
        a, b, out = torch.randn(rows, k), torch.randn(k, n), torch.empty(rows, n)
        seconds += min(clock(lambda: torch.mm(a, b, out=out))[0] for _ in range(repeats))
    return sum(2 * rows * k * n for k, n in shapes) / seconds


def products_alone(lm, tokens, points):
    """Seconds for nothing but the matrix products that one query needs, in their order and on the
    model's own weights, which no cache holds: what is left of the matmul rate where few rows meet
    large weights."""
    total, seconds = 1 + points * lm.num_layers, 0.0
    rows = [1 + points * layer if layer else 0 for layer in range(lm.num_layers)]
    blocks = []
    for layer in lm.layers:
        modules = layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj
        blocks.append([module.weight for module in modules])
    head = lm.model.lm_head.weight.T
    todo = [(tokens, w) for block in blocks for w in block] + [(1, head)]
    todo += [(n, w) for n, block in zip(rows, blocks) for w in block]
    for chunk in head.split(VOCAB_CHUNK["cpu"], 1):
        todo += [(total, chunk), (total, chunk.T)]
    todo += [(n, w.T) for n, block in zip(rows[::-1], blocks[::-1]) for w in block[::-1]]
    with torch.no_grad():
        for n, w in todo:
            if n:
                a, out = torch.randn(n, w.shape[0]), torch.empty(n, w.shape[1])
                seconds += clock(lambda: torch.mm(a, w, out=out))[0]
    return seconds


def naive(lm, prompt, answer, steps):
    """One layer at a time, full sequences, all logits, a batch of `steps`: what public code
    does."""
    ids = torch.tensor([prompt])
    vectors = [None] * lm.num_layers

    def watch(layer):
        def hook(module, inputs):
            vectors[layer] = inputs[0][0, -1]

        return lm.downs[layer].register_forward_pre_hook(hook)

    hooks = [watch(layer) for layer in range(lm.num_layers)]
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
    config = GPT2Config()
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
    through_layers = points * layers * (layers - 1) / 2 + layers - 1
    done = 4 * weights * through_layers + 4 * (layers * points + 1) * width * vocab
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    shapes += [(width, 1024), (1024, width)]
    spec = Spec(steps=args.steps)
    work = partial(attribute_encoded, lm, [(prompt, answer)], spec, ["query"])
    work()  # warm up
    fast, slow, rates, alone = [], [], [], []
    for repeat in range(args.repeats):
        rates.append(matmul_rate(rows, shapes))
        seconds, result = clock(work)
        fast.append(seconds)
        alone.append(products_alone(lm, args.tokens, points))
        if repeat % 2 == 0:  # between the fast ones, so that both meet the same machine
            seconds, reference = clock(lambda: naive(lm, prompt, answer, args.steps))
            slow.append(seconds)
    error = (result.scores[0] - reference).abs().max() / reference.abs().max()
    fast, slow, rate, bare = map(statistics.median, (fast, slow, rates, alone))
    speed, executed = must / fast, done / fast
    print(f"threads {torch.get_num_threads()}, T = {args.tokens}, m = {args.steps}, one query")
    print(f"must do          {must / 1e9:8.1f} GFLOP by the definition; executed {done / 1e9:.1f}")
    print(f"matmul rate      {rate / 1e9:8.1f} GFLOP/s at {rows} rows, float32, all in cache")
    print(f"fast             {fast:8.3f} s  ({speed / 1e9:.1f} GFLOP/s), ", end="")
    print(f"{speed / rate:.0%} of the matmul rate, executed {executed / rate:.0%}")
    print(f"products alone   {bare:8.3f} s  on the model's own weights, {bare / fast:.0%} of that")
    print(f"naive reference  {slow:8.3f} s  (ratio {slow / fast:.1f}x, ", end="")
    print(f"largest relative difference {error:.1e})")


if __name__ == "__main__":
    main()
