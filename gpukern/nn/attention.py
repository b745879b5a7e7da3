from __future__ import annotations

from typing import Any

import torch

from gpukern.nn.rebinding import with_ours

_multi_head_attention = with_ours(torch.nn.functional.multi_head_attention_forward)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Its projections on gpukern's kernels, and its softmax where weights are asked for; the products are torch's.

    Without the one-operator path of evaluation, which would leave all of it to torch."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise NotImplementedError("MultiheadAttention: gpukern takes no nested tensors")
        batched = query.dim() == 3
        if self.batch_first and batched:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        separate: dict[str, Any] = {}
        if not self._qkv_same_embed_dim:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            separate = {"use_separate_proj_weight": True, **{name: getattr(self, name) for name in names}}
        output, weights = _multi_head_attention(
            *(query, key, value, self.embed_dim, self.num_heads),
            *(self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v, self.add_zero_attn),
            *(self.dropout, self.out_proj.weight, self.out_proj.bias),
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            is_causal=is_causal,
            average_attn_weights=average_attn_weights,
            **separate,
        )
        return output.transpose(0, 1) if self.batch_first and batched else output, weights
