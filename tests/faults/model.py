"""A three-layer Llama-like decoder in plain torch, so that a run starts as fast as torch is imported.

It has dropout, so that a step depends on the generator's state. Shapes: B rows, T tokens, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

VOCAB, WIDTH, INNER, HEADS, LAYERS = 512, 64, 128, 4, 3


@dataclass
class Output:
    logits: torch.Tensor  # [B, T, VOCAB]


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv:2104.09864) for queries or keys [B, H, T, D/H]."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(length), frequencies)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.mlp, self.dropout = Attention(), MLP(), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """Called as a Hugging Face causal language model is."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
            self.norm = nn.RMSNorm(WIDTH)
            self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Output:
        length = input_ids.shape[1]
        past = torch.ones(length, length, dtype=torch.bool).tril()
        own = torch.eye(length, dtype=torch.bool)  # a padded position sees itself, so that no softmax is empty
        mask = (past & attention_mask[:, None, :].bool()) | own
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, mask[:, None])
        return Output(self.lm_head(self.norm(x)))
