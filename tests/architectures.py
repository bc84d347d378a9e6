"""One tiny random model of each kind of attention that transformers' decoders have, in float32 and eval mode."""

from __future__ import annotations

import torch

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip

# name -> transformers' class stem and what differs from SMALL
KINDS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "mistral_window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text:Gemma3", {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "granite": ("Granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "olmo2": ("Olmo2", {}),
    "gpt_oss": ("GptOss", {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm": ("Glm", {"head_dim": 8}),
    "cohere": ("Cohere", {}),
    "llama4": ("Llama4Text:Llama4", {"attention_chunk_size": 4, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"]}),
}  # fmt: skip


def config_of(name: str, **changes):
    import transformers

    stem, differences = KINDS[name]
    settings = {k: v for k, v in {**SMALL, **differences, **changes}.items() if v is not None}
    return getattr(transformers, stem.split(":")[0] + "Config")(**settings)


def small(name: str, attention: str = "eager", seed: int = 0, move: bool = True, **changes):
    """The model of a kind, its weights moved off the symmetric start that norms and sinks have."""
    import transformers

    stem = KINDS[name][0].split(":")[-1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cls = getattr(transformers, "GPT2LMHeadModel" if stem == "GPT2" else stem + "ForCausalLM")
        model = cls._from_config(config_of(name, **changes), attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters() if move else ():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
