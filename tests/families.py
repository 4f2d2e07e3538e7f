"""More families than `tiny.FAMILIES`, by transformers' `model_type`: what works, what is refused.

As there, the place of each MLP is written down and not taken from `qlutils.model.architecture`."""

from tiny import ALTERNATING, FAMILIES, GROUPED, SMALL, VOCABULARY, Family

HEADS = dict(GROUPED, head_dim=8)
LATENT = dict(
    SMALL,
    num_key_value_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
DENSE = dict(LATENT, first_k_dense_replace=3, n_routed_experts=4, moe_intermediate_size=8)
WINDOW = dict(HEADS, sliding_window=3, layer_types=ALTERNATING)
DECODER = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    decoder_layers=3,
    decoder_attention_heads=4,
    decoder_ffn_dim=48,
    encoder_layers=3,
    encoder_attention_heads=4,
    encoder_ffn_dim=48,
    max_position_embeddings=64,
)
# as deep as the text model, with modules of the same names
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=4
)
GEMMA_3 = dict(text_config=WINDOW, vision_config=dict(VISION, image_size=8), mm_tokens_per_image=4)
TEXT_4 = dict(
    WINDOW,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=VOCABULARY,
)
GEMMA_4 = dict(
    text_config=TEXT_4,
    audio_config=None,
    vision_config=dict(VISION, num_key_value_heads=4, head_dim=8, position_embedding_size=64),
)
GRANITE_4 = dict(
    GROUPED,
    num_local_experts=0,
    shared_intermediate_size=48,
    mamba_n_heads=4,
    position_embedding_type="rope",
    residual_multiplier=0.5,
    logits_scaling=3.0,
)
HYBRID = ["linear_attention", "full_attention", "linear_attention"]


def _plain(config, options, up="mlp.up_proj"):
    return Family(config, options, up=up)


MORE = {
    "apertus": _plain("ApertusConfig", GROUPED),
    "arcee": _plain("ArceeConfig", GROUPED),
    "biogpt": Family("BioGptConfig", SMALL, "biogpt.layers.{}", "fc2", "fc1"),
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
    "glm": Family("GlmConfig", dict(HEADS, pad_token_id=0), up="mlp.gate_up_proj"),
    "glm4": Family("Glm4Config", dict(HEADS, pad_token_id=0), up="mlp.gate_up_proj"),
    "gemma4_unified_text": Family("Gemma4UnifiedTextConfig", TEXT_4),
    "gpt_bigcode": Family(
        "GPTBigCodeConfig",
        dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        "transformer.h.{}",
        "mlp.c_proj",
        "mlp.c_fc",
    ),
    "gpt_neox_japanese": Family(
        "GPTNeoXJapaneseConfig",
        SMALL,
        "gpt_neox_japanese.layers.{}",
        "mlp.dense_4h_to_h",
        "mlp.dense_h_to_4h",
    ),
    "granitemoehybrid without experts": Family(
        "GraniteMoeHybridConfig",
        dict(GRANITE_4, layer_types=3 * ["full_attention"]),
        down="shared_mlp.output_linear",
        up="shared_mlp.input_linear",
    ),
    "helium": Family("HeliumConfig", HEADS),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Config", HEADS),
    "hyperclovax": Family("HyperCLOVAXConfig", GROUPED),
    "jais2": _plain("Jais2Config", HEADS),
    "minicpm3": Family("MiniCPM3Config", LATENT),
    "ministral": Family("MinistralConfig", WINDOW),
    "ministral3": Family("Ministral3Config", HEADS),
    "mpt": Family(
        "MptConfig",
        dict(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=3, max_seq_len=64),
        "transformer.blocks.{}",
        "ffn.down_proj",
        "ffn.up_proj",
    ),
    "nanochat": Family("NanoChatConfig", GROUPED, down="mlp.fc2", up="mlp.fc1"),
    "nemotron": _plain("NemotronConfig", GROUPED),
    "olmo": Family("OlmoConfig", GROUPED),
    "olmo3": Family("Olmo3Config", dict(GROUPED, sliding_window=3, layer_types=ALTERNATING)),
    "persimmon": Family("PersimmonConfig", SMALL, down="mlp.dense_4h_to_h", up="mlp.dense_h_to_4h"),
    "seed_oss": Family("SeedOssConfig", HEADS),
    "smollm3": Family("SmolLM3Config", dict(GROUPED, pad_token_id=0)),
    "vaultgemma": Family("VaultGemmaConfig", WINDOW),
    "xglm": Family(
        "XGLMConfig",
        dict(
            vocab_size=VOCABULARY,
            d_model=32,
            ffn_dim=48,
            num_layers=3,
            attention_heads=4,
            max_position_embeddings=64,
        ),
        "model.layers.{}",
        "fc2",
        "fc1",
    ),
    "youtu": Family("YoutuConfig", LATENT),
}
SUPPORTED = {**FAMILIES, **MORE}

REFUSED = {
    "mixtral": ("MixtralConfig", dict(SMALL, num_local_experts=2)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(SMALL, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8),
    ),
    "gpt_oss": ("GptOssConfig", dict(HEADS, num_local_experts=2)),
    "olmoe": ("OlmoeConfig", dict(SMALL, num_experts=2, num_experts_per_tok=1)),
    "granitemoe": ("GraniteMoeConfig", dict(SMALL, num_local_experts=2, num_experts_per_tok=1)),
    "phimoe": ("PhimoeConfig", dict(GROUPED, num_local_experts=2)),
    "llama4_text": ("Llama4TextConfig", dict(HEADS, num_local_experts=2, intermediate_size_mlp=48)),
    "deepseek_v3 with experts": (
        "DeepseekV3Config",
        dict(DENSE, first_k_dense_replace=1, n_group=1, topk_group=1, num_experts_per_tok=1),
    ),
    "bart": ("BartConfig", DECODER),
    "mbart": ("MBartConfig", DECODER),
    "pegasus": ("PegasusConfig", DECODER),
    "t5": (
        "T5Config",
        dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    ),
    "granitemoehybrid with recurrent layers": (
        "GraniteMoeHybridConfig",
        dict(GRANITE_4, layer_types=HYBRID, mamba_d_state=8),
    ),
    "qwen3_5_text": ("Qwen3_5TextConfig", dict(HEADS, layer_types=HYBRID)),
    "falcon_h1": (
        "FalconH1Config",
        dict(GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    ),
    "bert": ("BertConfig", dict(SMALL, is_decoder=True)),
    "mamba": (
        "MambaConfig",
        dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
    ),
    "recurrent_gemma": ("RecurrentGemmaConfig", dict(SMALL, pad_token_id=0)),
    "lfm2": ("Lfm2Config", dict(GROUPED, full_attn_idxs=[1], pad_token_id=0)),
    "olmo_hybrid": ("OlmoHybridConfig", dict(GROUPED, pad_token_id=0, layer_types=HYBRID)),
    "jamba": ("JambaConfig", dict(GROUPED, pad_token_id=0)),
    "gemma3n_text": (
        "Gemma3nTextConfig",
        dict(
            WINDOW,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=3 * [0.0],
            laurel_rank=4,
        ),
    ),
    "modernbert-decoder": (
        "ModernBertDecoderConfig",
        dict(SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=0),
    ),
    "rwkv": (
        "RwkvConfig",
        dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=64),
    ),
    "ctrl": (
        "CTRLConfig",
        dict(vocab_size=VOCABULARY, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4),
    ),
    "xlnet": (
        "XLNetConfig",
        dict(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48),
    ),
    "openai-gpt": (
        "OpenAIGPTConfig",
        dict(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    ),
}
