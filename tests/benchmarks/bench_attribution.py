"""Speed of the fast exact attribution on this machine: `python tests/benchmarks/bench_attribution.py`.

One process, one run: the machine's own matmul rate, the fast algorithm and the naive per-layer full-sequence reference
at the same shape, so that the ratios are comparable whatever else the machine is doing.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from qlutils.attribution import Spec, attribute_encoded
from qlutils.models import LanguageModel

SHAPES = {"gpt2": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257)}


class NoTokenizer:
    bos_token_id = mask_token_id = pad_token_id = None
    eos_token_id = 0

    def __call__(self, text):
        return type("Ids", (), {"input_ids": [1]})


def matmul_rate(rows, shapes, seconds=1.0):
    """FLOP/s of float32 matmuls (rows, k) x (k, n) over the model's own (k, n), best of repeated passes."""
    pairs = [(torch.randn(rows, k), torch.randn(k, n)) for k, n in shapes]
    flops = sum(2 * rows * k * n for k, n in shapes)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for a, b in pairs:
            a @ b
        best = max(best, flops / (time.perf_counter() - start))
    return best


def naive(lm, prompt, answer, steps):
    """One layer at a time, full sequences, all logits, a batch of `steps`: what public code does."""
    ids = torch.tensor([prompt])
    vectors = {}
    hooks = [down.register_forward_pre_hook(lambda m, i, layer=layer: vectors.__setitem__(layer, i[0][0, -1]))
             for layer, down in enumerate(lm.downs)]
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
        grad, = torch.autograd.grad(p.sum(), path)
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
    # What the algorithm must do: m rows a layer through the layers above, forward and backward, and the unembedding.
    must = 4 * weights * args.steps * layers * (layers + 1) / 2 + 4 * rows * width * vocab
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * layers + [(width, vocab)] * 2
    spec = Spec(steps=args.steps)
    fast = []
    attribute_encoded(lm, [(prompt, answer)], spec, ["warm-up"])
    rates = []
    for _ in range(args.repeats):
        rates.append(matmul_rate(rows, shapes))
        start = time.perf_counter()
        result = attribute_encoded(lm, [(prompt, answer)], spec, ["query"])
        fast.append(time.perf_counter() - start)
    start = time.perf_counter()
    reference = naive(lm, prompt, answer, args.steps)
    slow = time.perf_counter() - start
    error = (result.scores[0] - reference).abs().max() / reference.abs().max()
    time_fast, rate = statistics.median(fast), statistics.median(rates)
    print(f"threads {torch.get_num_threads()}, T = {args.tokens}, m = {args.steps}, one query, float32")
    print(f"must do          {must / 1e9:8.1f} GFLOP")
    print(f"matmul rate      {rate / 1e9:8.1f} GFLOP/s at the same shapes")
    print(f"fast             {time_fast:8.3f} s  ({must / time_fast / 1e9:.1f} GFLOP/s, {must / time_fast / rate:.0%} of the matmul rate)")
    print(f"naive reference  {slow:8.3f} s  (ratio {slow / time_fast:.1f}x, largest relative difference {error:.1e})")


if __name__ == "__main__":
    main()
