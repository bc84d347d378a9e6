"""A model and a tokenizer small enough for a test, made from nothing: a two-layer Llama and a byte-level vocabulary."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    """One token a byte, then <pad> <s> </s>: 259 tokens, round trip exact for any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = chat_template
    return fast


def tiny_config(**changes):
    from transformers import LlamaConfig

    settings = dict(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257, pad_token_id=258,
        tie_word_embeddings=False,
    )
    return LlamaConfig(**(settings | changes))


def tiny_model(seed: int = 0, **changes):
    """A random Llama with two layers of width 32, in float32 and eval mode."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**changes)).eval()


def save_tiny(folder: Path, seed: int = 0, **changes) -> Path:
    """A model folder as Hugging Face writes it."""
    tiny_model(seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def refuse_weight_files(monkeypatch) -> None:
    """Have the test fail if a weight file is opened. What imports the opener by name is patched by name: imported first
    while it is patched, it would keep the refusal for every later test."""
    import safetensors
    import transformers.modeling_layers
    import transformers.modeling_utils

    def refuse(*_, **__):
        raise AssertionError("a weight file was opened")

    for module in (safetensors, transformers.modeling_utils, transformers.modeling_layers):
        monkeypatch.setattr(module, "safe_open", refuse)
