"""More families than `tiny.FAMILIES`, by transformers' `model_type`: what works, what is refused,
and small models of all that work.

As there, the place of each MLP is written down and not taken from `qlutils.model.architecture`."""

from functools import lru_cache

import torch
from tiny import (
    ALTERNATING,
    FAMILIES,
    GPT,
    GROUPED,
    SMALL,
    VOCABULARY,
    Family,
    sized,
    tiny_model,
    word_tokenizer,
)

from qlutils.model.language_model import LanguageModel

HEADS = dict(GROUPED, head_dim=8)
LATENT = dict(SMALL, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4)
LATENT |= dict(qk_nope_head_dim=8, v_head_dim=8)
DENSE = dict(LATENT, first_k_dense_replace=3, n_routed_experts=4, moe_intermediate_size=8)
WINDOW = dict(HEADS, sliding_window=3, layer_types=ALTERNATING)
LEARNED = dict(max_position_embeddings=64)
DECODER = sized("d_model", "decoder_layers", "decoder_attention_heads", decoder_ffn_dim=48)
DECODER |= dict(LEARNED, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=48)
# as deep as the text model, with modules of the same names
VISION = dict(SMALL, patch_size=4)
GEMMA_3 = dict(text_config=WINDOW, vision_config=dict(VISION, image_size=8), mm_tokens_per_image=4)
PER_LAYER = dict(vocab_size_per_layer_input=VOCABULARY)
TEXT_4 = dict(WINDOW, **PER_LAYER, hidden_size_per_layer_input=0)
TEXT_4 |= dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"])
VISION_4 = dict(VISION, num_key_value_heads=4, head_dim=8, position_embedding_size=64)
GEMMA_4 = dict(text_config=TEXT_4, audio_config=None, vision_config=VISION_4)
GRANITE_4 = dict(GROUPED, num_local_experts=0, shared_intermediate_size=48, mamba_n_heads=4)
GRANITE_4 |= dict(position_embedding_type="rope", residual_multiplier=0.5, logits_scaling=3.0)
NEOX = dict(down="mlp.dense_4h_to_h", up="mlp.dense_h_to_4h")
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
BIGCODE = dict(down="mlp.c_proj", up="mlp.c_fc")
MPT = sized("d_model", "n_layers", "n_heads", max_seq_len=64)
XGLM = sized("d_model", "num_layers", "attention_heads", ffn_dim=48, **LEARNED)
MOE_HYBRID = dict(down="shared_mlp.output_linear", up="shared_mlp.input_linear")
PLAIN = dict(up="mlp.up_proj")  # ungated
FUSED = dict(up="mlp.gate_up_proj")
FC = dict(down="fc2", up="fc1")

MORE = {
    "apertus": Family("ApertusConfig", GROUPED, **PLAIN),
    "arcee": Family("ArceeConfig", GROUPED, **PLAIN),
    "biogpt": Family("BioGptConfig", SMALL, "biogpt.layers.{}", **FC),
    "bitnet": Family("BitNetConfig", GROUPED),
    "cohere2": Family("Cohere2Config", WINDOW),
    "cwm": Family("CwmConfig", WINDOW),
    "deepseek_v2 without experts": Family("DeepseekV2Config", DENSE),
    "deepseek_v3 without experts": Family("DeepseekV3Config", dict(DENSE, n_group=1, topk_group=1)),
    "diffllama": Family("DiffLlamaConfig", GROUPED),
    "ernie4_5": Family("Ernie4_5Config", GROUPED),
    "exaone4": Family("Exaone4Config", WINDOW),
    "gemma3 with a vision tower": Family("Gemma3Config", GEMMA_3, "model.language_model.layers.{}"),
    "gemma4_text": Family("Gemma4TextConfig", TEXT_4),
    "gemma4 with a vision tower": Family("Gemma4Config", GEMMA_4, "model.language_model.layers.{}"),
    "glm": Family("GlmConfig", dict(HEADS, pad_token_id=0), **FUSED),
    "glm4": Family("Glm4Config", dict(HEADS, pad_token_id=0), **FUSED),
    "gemma4_unified_text": Family("Gemma4UnifiedTextConfig", TEXT_4),
    "gpt_bigcode": Family("GPTBigCodeConfig", GPT, "transformer.h.{}", **BIGCODE),
    "gpt_neox_japanese": Family(
        "GPTNeoXJapaneseConfig", SMALL, "gpt_neox_japanese.layers.{}", **NEOX
    ),
    "granitemoehybrid without experts": Family(
        "GraniteMoeHybridConfig", dict(GRANITE_4, layer_types=3 * ["full_attention"]), **MOE_HYBRID
    ),
    "helium": Family("HeliumConfig", HEADS),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Config", HEADS),
    "hyperclovax": Family("HyperCLOVAXConfig", GROUPED),
    "jais2": Family("Jais2Config", HEADS, **PLAIN),
    "minicpm3": Family("MiniCPM3Config", LATENT),
    "ministral": Family("MinistralConfig", WINDOW),
    "ministral3": Family("Ministral3Config", HEADS),
    "mpt": Family("MptConfig", MPT, "transformer.blocks.{}", "ffn.down_proj", "ffn.up_proj"),
    "nanochat": Family("NanoChatConfig", GROUPED, down="mlp.fc2", up="mlp.fc1"),
    "nemotron": Family("NemotronConfig", GROUPED, **PLAIN),
    "olmo": Family("OlmoConfig", GROUPED),
    "olmo3": Family("Olmo3Config", dict(GROUPED, sliding_window=3, layer_types=ALTERNATING)),
    "persimmon": Family("PersimmonConfig", SMALL, **NEOX),
    "seed_oss": Family("SeedOssConfig", HEADS),
    "smollm3": Family("SmolLM3Config", dict(GROUPED, pad_token_id=0)),
    "vaultgemma": Family("VaultGemmaConfig", WINDOW),
    "xglm": Family("XGLMConfig", XGLM, **FC),
    "youtu": Family("YoutuConfig", LATENT),
}
SUPPORTED = {**FAMILIES, **MORE}

EXPERTS = dict(SMALL, num_experts=2, num_experts_per_tok=1)
STATES = dict(GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
PADDED = dict(GROUPED, pad_token_id=0)
GEMMA_3N = dict(WINDOW, **PER_LAYER, hidden_size_per_layer_input=8, num_kv_shared_layers=0)
GEMMA_3N |= dict(activation_sparsity_pattern=3 * [0.0], laurel_rank=4)
BARE = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
SOME = dict(DENSE, first_k_dense_replace=1, n_group=1, topk_group=1, num_experts_per_tok=1)
REFUSED = {
    "mixtral": ("MixtralConfig", dict(SMALL, num_local_experts=2)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(EXPERTS, moe_intermediate_size=8)),
    "gpt_oss": ("GptOssConfig", dict(HEADS, num_local_experts=2)),
    "olmoe": ("OlmoeConfig", EXPERTS),
    "granitemoe": ("GraniteMoeConfig", dict(SMALL, num_local_experts=2, num_experts_per_tok=1)),
    "phimoe": ("PhimoeConfig", dict(GROUPED, num_local_experts=2)),
    "llama4_text": ("Llama4TextConfig", dict(HEADS, num_local_experts=2, intermediate_size_mlp=48)),
    "deepseek_v3 with experts": ("DeepseekV3Config", SOME),
    "bart": ("BartConfig", DECODER),
    "mbart": ("MBartConfig", DECODER),
    "pegasus": ("PegasusConfig", DECODER),
    "t5": ("T5Config", sized("d_model", "num_layers", "num_heads", d_kv=8, d_ff=48)),
    "granitemoehybrid with recurrent layers": (
        "GraniteMoeHybridConfig",
        dict(GRANITE_4, layer_types=HYBRID, mamba_d_state=8),
    ),
    "qwen3_5_text": ("Qwen3_5TextConfig", dict(HEADS, layer_types=HYBRID)),
    "falcon_h1": ("FalconH1Config", STATES),
    "bert": ("BertConfig", dict(SMALL, is_decoder=True)),
    "mamba": ("MambaConfig", dict(BARE, state_size=4)),
    "recurrent_gemma": ("RecurrentGemmaConfig", dict(SMALL, pad_token_id=0)),
    "lfm2": ("Lfm2Config", dict(PADDED, full_attn_idxs=[1])),
    "olmo_hybrid": ("OlmoHybridConfig", dict(PADDED, layer_types=HYBRID)),
    "jamba": ("JambaConfig", PADDED),
    "gemma3n_text": ("Gemma3nTextConfig", GEMMA_3N),
    "modernbert-decoder": (
        "ModernBertDecoderConfig",
        dict(SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=0),
    ),
    "rwkv": ("RwkvConfig", dict(BARE, context_length=64)),
    "ctrl": ("CTRLConfig", dict(GPT, dff=48)),
    "xlnet": ("XLNetConfig", sized("d_model", "n_layer", "n_head", d_inner=48)),
    "openai-gpt": ("OpenAIGPTConfig", GPT),
}

# --- models of them -------------------------------------------------------------------------------
# Smaller weights where the model itself, naive or not, is far from float64 in bfloat16.
SCALE = dict.fromkeys(["gemma4", "gemma4_text", "gemma4_unified_text"], 0.5)
SCALE |= dict.fromkeys(["gemma4 with a vision tower", "minicpm3", "youtu"], 0.7)
SCALE |= dict.fromkeys(["exaone4", "persimmon", "qwen3"], 1.0)
# Whose attention, in transformers' own code, rounds to float32 whatever the model's dtype, and then
# not always the same sums.
ROUNDED = ("gptj", "codegen", "gpt-neo", "bloom", "granite-swa", "gemma4", "gemma2")
# around whose text model are parts that hand it other masks than the caller's
TOWERS = ("gemma3 with a vision tower", "gemma4 with a vision tower")
NOT_IN_FLOAT64 = ("xglm",)  # its softmax does not run in it


def precise(family):
    """(dtype, relative tolerance of a probability) of the most precise passes of a family."""
    if family in NOT_IN_FLOAT64:
        return torch.float32, 2e-5
    return torch.float64, 1e-6 if family in ROUNDED or family in MORE else 1e-10


@lru_cache(None)
def model_of(family, dtype):
    """The same weights in every dtype: they have bfloat16's 8 bits. Rotary frequencies stay
    float32, as they do when a checkpoint is loaded."""
    model = tiny_model(SUPPORTED[family], torch.float32, scale=SCALE.get(family, 2.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    kept = {name: one.clone() for name, one in model.named_buffers() if "inv_freq" in name}
    model.to(dtype)
    for name, frequencies in kept.items():
        where, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(where), buffer, frequencies)
    return model.eval()


@lru_cache(None)
def lm_of(family, dtype):
    return LanguageModel(model_of(family, dtype), word_tokenizer(), f"tiny {family}")
