"""Attribution on a GPU at the true shapes of the paper's models: `python
tests/benchmarks/bench_gpu.py [--shapes ...]`.

Weights are random and made on the device, nothing is downloaded; plain torch, transformers and this
package are enough. For each shape and method, a unit of a run as `localise` computes it, from text
to the frame that is stored: milliseconds a query at T tokens, TFLOP/s reached, its share of the
device's own matmul rate (8,192 rows through the MLP's first matrix), and peak memory. Prints a
table and, with --output, writes it as Markdown. Without a GPU it says so and does nothing, unless
--device cpu asks for a rehearsal.
"""

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from bench_attribution import NoTokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from qlutils.checks import METHODS, RULES
from qlutils.driver.plan import SHAPES, matmul_rate, query_flops
from qlutils.experiments.localize import localise_unit
from qlutils.facts import Fact
from qlutils.model.language_model import LanguageModel

CONFIGS = {
    "gpt2": GPT2Config(),
    "meta-llama/Llama-2-7b-hf": LlamaConfig(),  # its defaults are LLaMA-2-7B's shape
    "meta-llama/Meta-Llama-3-8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0),
    ),
}
FACTS, PROMPTS = {"ig": 20, "sig": 3, "amig": 20}, 7  # a unit of a run


class Numbers(NoTokenizer):
    """Text is token ids: "17 5" is the tokens 17 and 5."""

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[int(word) for word in text.split() if word.isdigit()])


def facts(count, tokens):
    """`count` facts of `PROMPTS` prompts of `tokens` tokens and an answer of one, as
    `localise_unit` takes them."""
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30000, (count, PROMPTS, tokens), generator=seeded).tolist()
    texts = [tuple(" ".join(map(str, prompt)) for prompt in prompts) for prompts in ids]
    return [asdict(Fact("P1", str(i), "5", prompts)) for i, prompts in enumerate(texts)]


def clock(function, device, repeats):
    """Median seconds of some runs after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def measured(shape, args, device, dtype):
    """The table's line for each method at one shape."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(CONFIGS[shape], dtype=dtype)
    lm, cuda = LanguageModel(model, Numbers(), shape), device.type == "cuda"
    rate = matmul_rate(args.device, args.dtype, SHAPES[shape])[2]
    for method in args.methods:
        unit = facts(args.facts or FACTS[method], args.tokens)
        spec = dict(method=method, rule=args.rule, steps=args.steps, row_budget=args.row_budget)
        work = partial(localise_unit, lm, unit, **spec)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = clock(work, device, args.repeats) / (PROMPTS * len(unit))
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.0f}" if cuda else "–"
        speed = query_flops(SHAPES[shape], method, args.steps, args.tokens) / seconds
        yield (
            f"| `{shape}` | `{method}` | {1e3 * seconds:,.1f} | {speed / 1e12:,.2f} | "
            f"{speed / rate:.0%} | {peak} |"
        )


def options():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--facts", type=int, help="of seven prompts, a unit (default: 20, sig 3)")
    parser.add_argument("--rule", default="right", choices=RULES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--row-budget", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a Markdown file to write the table to")
    return parser.parse_args()


def main():
    args = options()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured (--device cpu --shapes gpt2 rehearses)")
        return
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    lines = [
        f"{name}, {args.dtype} weights, T = {args.tokens}, rule {args.rule}, m = {args.steps}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; random weights at "
        f"the models' shapes",
        "",
        "| shape | method | ms a query | TFLOP/s | of the matmul rate | peak memory, GB |",
        "| --- | --- | --: | --: | --: | --: |",
    ]
    print("\n".join(lines), flush=True)
    for shape in args.shapes:
        for line in measured(shape, args, device, dtype):
            lines.append(line)
            print(line, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
