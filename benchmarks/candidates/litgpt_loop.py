"""litgpt's GPT with its own LoRA and its chunked cross-entropy, holding the same weights and start as PEFT's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.candidates.peft_loop import in_order, num_tokens, padded
from benchmarks.work import LR, adapter_folder, read_rows, read_shape


def weights(folder: Path, adapter: Path, layers: int) -> dict[str, Any]:
    """litgpt's names for the folder's tensors and the adapter's: query, key and value are one matrix there."""
    import torch
    from safetensors.torch import load_file

    base, lora = load_file(folder / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    given = {
        "transformer.wte.weight": base["model.embed_tokens.weight"], "transformer.ln_f.weight": base["model.norm.weight"],
        "lm_head.linear.weight": base["lm_head.weight"],
    }  # fmt: skip
    for i in range(layers):
        theirs, ours = f"model.layers.{i}.", f"transformer.h.{i}."
        given[ours + "norm_1.weight"] = base[theirs + "input_layernorm.weight"]
        given[ours + "norm_2.weight"] = base[theirs + "post_attention_layernorm.weight"]
        qkv = [f"self_attn.{x}_proj" for x in "qkv"]
        groups = {"attn.qkv": qkv, "attn.proj": ["self_attn.o_proj"], "mlp.fc_1": ["mlp.gate_proj"], "mlp.fc_2": ["mlp.up_proj"], "mlp.proj": ["mlp.down_proj"]}
        for name, parts in groups.items():
            given[f"{ours}{name}.linear.weight"] = torch.cat([base[f"{theirs}{p}.weight"] for p in parts])
            for side in "AB":
                tensors = [lora[f"base_model.model.{theirs}{p}.lora_{side}.weight"] for p in parts]
                given[f"{ours}{name}.lora_{side}"] = torch.cat(tensors)
    return given


def train(pacer: Any, spec: dict[str, Any], began: float) -> None:
    import torch
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    folder = Path(spec["folder"])
    shape = read_shape(folder)
    config = Config(
        n_layer=shape.layers, n_embd=shape.hidden, n_head=shape.heads, n_query_groups=shape.kv_heads, block_size=shape.positions,
        vocab_size=shape.vocab, padded_vocab_size=shape.vocab, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=1e-6, mlp_class_name="LLaMAMLP", intermediate_size=shape.inter,
        lora_r=spec["rank"], lora_alpha=2 * spec["rank"], lora_query=True, lora_key=True, lora_value=True, lora_projection=True,
        lora_mlp=True,
    )  # fmt: skip
    model = GPT(config).to(getattr(torch, spec["dtype"]))
    model.load_state_dict(weights(folder, adapter_folder(folder, spec["adapter"], spec["rank"]), shape.layers))
    mark_only_lora_as_trainable(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    batches = in_order(read_rows(Path(spec["rows"])), spec["micro_batch"])
    pacer.ready(before_first_step=time.process_time() - began)
    while True:
        rows = next(batches)
        batch = padded(rows)
        logits = model(batch["input_ids"], lm_head_chunk_size=128)
        logits[-1] = logits[-1][:, :-1]
        loss = chunked_cross_entropy(logits, batch["labels"][:, 1:], chunk_size=128)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pacer.ended(loss.item(), num_tokens(rows))
