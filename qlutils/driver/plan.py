"""What a run would cost, before anything is started: `./run_all.sh --plan ...`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd

from qlutils import paths
from qlutils.facts import TOKENS_A_WORD, load_facts

# Shapes of the paper's models: layers, width, neurons, vocabulary, key-value width / width, gated
# MLP.
SHAPES = {
    "gpt2": (12, 768, 3072, 50257, 1.0, False),
    "meta-llama/Llama-2-7b-hf": (32, 4096, 11008, 32000, 1.0, True),
    "meta-llama/Meta-Llama-3-8B": (32, 4096, 14336, 128256, 0.25, True),
}
# The same of those fetched by name. A head of Gemma 3 is wider than width / heads: its share makes
# the size of the attention come out right.
PRETRAINED_SHAPES = {
    "pretrained/smollm2-135m": (30, 576, 1536, 49152, 1 / 3, True),
    "pretrained/gemma-3-270m": (18, 640, 2048, 262144, 1.0, True),
}
# of the matmul rate that attribution reaches, on a CPU and on a GPU; tests/benchmarks measures it
FRACTION = 0.7
# a baseline, and twice that a query, beside the arithmetic: most of what a small model costs a GPU
GPU_SECONDS = 0.25e-3
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
BATCH_BYTES = 2**29  # activations of a batch (attribution.CPU_MEMORY)
QUERY_BYTES = 2500  # a stored query: its sparse scores, compressed


def model_shape(name: str) -> tuple:
    """(layers, width, neurons, vocabulary, key-value share, gated) from a local configuration, or
    the paper's table."""
    from transformers import AutoConfig

    from qlutils.model.loading import find_source

    if name in PRETRAINED_SHAPES:
        return PRETRAINED_SHAPES[name]
    bundled_or_file = name.startswith("demo/") or paths.is_gguf_path(name)
    folder = Path(
        find_source(name) if bundled_or_file else name
    ).expanduser()  # a plan needs no weights
    if name in SHAPES and not folder.is_dir():
        return SHAPES[name]
    if not folder.is_dir():
        raise ValueError(
            f"the shape of {name!r} is not known here: plan with a local folder that holds its "
            f"config.json, "
            f"a bundled model, or one of {', '.join(SHAPES)}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        width, heads = config.hidden_size, config.num_attention_heads
        neurons = next(
            (
                n
                for key in ("intermediate_size", "n_inner", "ffn_dim")
                if (n := getattr(config, key, None))
            ),
            4 * width,
        )
        gated = config.model_type not in (
            "gpt2",
            "gpt_neo",
            "gptj",
            "codegen",
            "gpt_neox",
            "opt",
            "bloom",
            "falcon",
            "phi",
            "starcoder2",
        )
        return (
            config.num_hidden_layers,
            width,
            neurons,
            config.vocab_size,
            (getattr(config, "num_key_value_heads", None) or heads) / heads,
            gated,
        )
    except (AttributeError, OSError, ValueError) as error:
        raise ValueError(f"no shape can be read from {folder / 'config.json'}: {error}") from None


def query_flops(shape: tuple, method: str, steps: int, tokens: float) -> float:
    """Floating-point operations of one answer token's attribution: forward and backward of `steps`
    rows a layer (and baseline) through the layers above and the unembedding."""
    layers, width, neurons, vocabulary, kv, gated = shape
    layer = width * width * (2 + 2 * kv) + width * neurons * (3 if gated else 2)
    baselines = tokens if method == "sig" else 1
    rows = steps * baselines
    return 4 * layer * rows * layers * (layers + 1) / 2 + 4 * rows * layers * width * vocabulary


def query_seconds(
    shape: tuple, method: str, steps: int, tokens: float, rate: float, gpu: bool
) -> float:
    """Seconds of one answer token's attribution on a device of `rate` FLOP/s."""
    rest = GPU_SECONDS * (2 + (tokens if method == "sig" else 1)) if gpu else 0.0
    return query_flops(shape, method, steps, tokens) / (FRACTION * rate) + rest


def matmul_rate(
    device: str | None, dtype: str | None, shape: tuple, seconds: float = 2.0
) -> tuple[str, str, float]:
    """(device name, dtype, FLOP/s) of the device's matmul at this model's MLP shape: best of a few
    seconds."""
    import torch

    from qlutils.model.loading import find_device

    device = find_device(device)
    kind = getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    rows = 512 if device.type == "cpu" else 8192
    a = torch.randn(rows, shape[1], device=device, dtype=kind)
    b = torch.randn(shape[1], shape[2], device=device, dtype=kind)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(3):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 6 * rows * shape[1] * shape[2] / (time.perf_counter() - start))
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return name, str(kind).removeprefix("torch."), best


def plan(
    models,
    methods,
    *,
    data="demo",
    relations=None,
    facts_per_relation=None,
    known_prompts=0,
    seed=0,
    device=None,
    dtype=None,
    steps=20,
    middle="cut",
    answer="all",
) -> pd.DataFrame:
    """A row a model and method: queries, rows, FLOPs, hours on this device, memory and disk.

    The tokens are estimated from the words; the hours from the matmul rate measured now, the
    fraction of it that attribution reaches (`FRACTION`) and, on a GPU, `GPU_SECONDS`. Nothing is
    downloaded but the facts. With `known_prompts` the facts are as many as may be kept, and `scan
    hours` is what asking every fact would take: which are known is not known before."""
    facts = load_facts(
        data, relations=relations, facts_per_relation=facts_per_relation, seed=seed, middle=middle
    )
    asked = load_facts(data, relations=relations, middle=middle) if known_prompts else []
    asked_words = sum(
        len(f"{prompt} {fact.object}".split()) for fact in asked for prompt in fact.prompts
    )
    queries = sum(len(fact.prompts) for fact in facts)
    words = np.mean([len(prompt.split()) for fact in facts for prompt in fact.prompts])
    lengths = [
        max(1.0, TOKENS_A_WORD * len(fact.object.split())) for fact in facts for _ in fact.prompts
    ]
    answers = np.mean(lengths) if answer == "all" else 1  # tokens that are attributed
    rows = []
    for model in models:
        shape = model_shape(model)
        name, kind, rate = matmul_rate(device, dtype, shape)
        layers, width, neurons, vocabulary, kv, gated = shape
        weights = (
            layers * (width**2 * (2 + 2 * kv) + width * neurons * (3 if gated else 2))
            + 2 * vocabulary * width
        )
        scan = 2 * weights * TOKENS_A_WORD * asked_words / (FRACTION * rate)
        for method in methods:
            tokens = words * TOKENS_A_WORD
            flops = query_flops(shape, method, steps, tokens) * queries * answers
            seconds = (
                query_seconds(shape, method, steps, tokens, rate, gpu=not name.startswith("cpu"))
                * queries
                * answers
            )
            rows.append(
                {
                    "model": model,
                    "method": method,
                    "facts": len(facts),
                    "queries": queries,
                    "rows": steps * layers * queries * answers * (tokens if method == "sig" else 1),
                    "PFLOP": flops / 1e15,
                    "device": name,
                    "dtype": kind,
                    "TFLOP/s": FRACTION * rate / 1e12,
                    "hours": seconds / 3600,
                    **({"scan hours": scan / 3600} if known_prompts else {}),
                    "memory GB": (weights * DTYPE_BYTES[kind] + BATCH_BYTES) / 1e9,
                    "disk GB": queries * QUERY_BYTES / 1e9,
                }
            )
    return pd.DataFrame(rows)
