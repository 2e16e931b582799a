# SPDX-License-Identifier: Apache-2.0
"""Use the operation in a model of your own.

    python examples/own_model.py                    in seconds, on the CPU
    python examples/own_model.py --device cuda      on a GPU

The model below is a single attention layer with a learned prefix. To use the operation in a real model, call
``peftkern.prefix_attention`` where that model calls ``scaled_dot_product_attention``, after rotary embedding.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import peftkern


class PrefixAttention(nn.Module):
    """Causal self-attention with grouped heads and a learned prefix of P keys and values."""

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int, prefix_len: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, embed_dim // num_heads
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias=False)
        self.prefix = nn.Parameter(0.02 * torch.randn(2, num_kv_heads, prefix_len, self.head_dim))  # keys and values

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # [B, Hq, S, D]
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)  # [B, Hkv, S, D]
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        prefix_k, prefix_v = self.prefix.unbind(0)  # [Hkv, P, D] each, read in place
        out = peftkern.prefix_attention(q, k, v, prefix_k, prefix_v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def main(arguments: list[str] | None = None) -> None:
    """Fit the prefix to random targets; everything else is frozen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    layer = PrefixAttention(embed_dim=64, num_heads=4, num_kv_heads=2, prefix_len=8).to(options.device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == "prefix")
    x, target = torch.randn(2, 4, 32, 64, device=options.device)  # [B, S, E] each
    optimizer = torch.optim.AdamW([layer.prefix], lr=1e-1)
    for step in range(options.steps):
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    q = torch.randn(4, 4, 32, 16, device=options.device)
    k, prefix_k = torch.randn(4, 2, 32, 16, device=options.device), layer.prefix[0]
    print(peftkern.explain(q, k, k, prefix_k, prefix_k))


if __name__ == "__main__":
    main()
