"""LoRABlockSparseLinear: trainable low-rank adapters over a frozen block-sparse layer."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_sparse_nn.core import ops
from mlx_sparse_nn.core.checks import check_size
from mlx_sparse_nn.layers.linear import BlockSparseLinear
from mlx_sparse_nn.layers.quantized import QuantizedBlockSparseLinear


class LoRABlockSparseLinear(nn.Module):
    r"""Adds a dense low-rank update to a block-sparse layer, which it freezes.

    .. math:: y = x A^\top + b + s \, \mathrm{dropout}(x) L_a L_b

    The names, the initial values and the formula are those of mlx-lm's ``LoRALinear`` (Hu et al.,
    "LoRA: Low-Rank Adaptation of Large Language Models", 2021), so that its adapter files fit.
    ``mlx_lm.tuner.utils.linear_to_lora_layers`` makes these of block-sparse layers, through their
    ``to_lora``.

    Args:
        linear: The layer under the adapters; it is frozen, and not copied.
        r: Rank of the update.
        dropout: Probability with which an input of the adapters is dropped in training.
        scale: Factor s of the update.

    Attributes:
        lora_a: ``(input_dims, r)``, uniform within ``1 / sqrt(input_dims)`` at first.
        lora_b: ``(r, output_dims)``, zero at first.

    Raises:
        TypeError: ``linear`` is not a block-sparse layer, or ``r`` is not an integer.
        ValueError: ``r`` is less than 1.
    """

    def __init__(
        self,
        linear: BlockSparseLinear | QuantizedBlockSparseLinear,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
    ):
        super().__init__()
        if not isinstance(linear, BlockSparseLinear | QuantizedBlockSparseLinear):
            raise TypeError(
                "[LoRABlockSparseLinear] linear must be a BlockSparseLinear or a "
                f"QuantizedBlockSparseLinear, got {type(linear).__name__}"
            )
        r = check_size("LoRABlockSparseLinear", "r", r, minimum=1)
        linear.freeze()
        self.linear = linear
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        bound = 1 / math.sqrt(max(1, linear.input_dims))
        self.lora_a = mx.random.uniform(-bound, bound, (linear.input_dims, r))
        self.lora_b = mx.zeros((r, linear.output_dims))

    def __call__(self, x: mx.array) -> mx.array:
        """Return the adapted output: ``(..., input_dims)`` -> ``(..., output_dims)``."""
        y = self.linear(x)
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        return y + (self.scale * z).astype(x.dtype)

    def fuse(self, dequantize: bool = False, *, keep_pattern: bool = False) -> nn.Module:
        """Return one layer that does what base and adapters do together.

        The update is dense. Fused exactly, as ``mlx_lm.fuse`` asks for it, the layer is a dense
        ``nn.Linear``. With ``keep_pattern`` it stays block-sparse, and the part of the update that
        falls outside the stored blocks is dropped; what remains is the closest update on the
        pattern in the Frobenius norm, and it is computed on the stored blocks alone.

        Args:
            dequantize: Whether to leave the layer unquantized where the base is quantized. Else it
                is quantized again with the base's ``group_size`` and ``bits``.
            keep_pattern: Whether to keep the pattern of the base.

        Raises:
            ValueError: With ``keep_pattern``, the pattern stores a block more than once.
        """
        linear = self.linear
        quantized = isinstance(linear, QuantizedBlockSparseLinear)
        lora_b, bias = self.scale * self.lora_b, "bias" in linear
        if keep_pattern:
            linear.pattern.check_unique("LoRABlockSparseLinear.fuse")
            weight = linear.dequantized_weight() if quantized else linear.weight
            delta = ops.sddmm(linear.pattern, lora_b, self.lora_a.T)
            fused = BlockSparseLinear(
                linear.input_dims, linear.output_dims, linear.pattern, bias=bias
            )
        else:
            weight = linear.todense()
            delta = lora_b.T @ self.lora_a.T
            fused = nn.Linear(linear.input_dims, linear.output_dims, bias=bias)
        fused.weight = weight + delta.astype(weight.dtype)
        if bias:
            fused.bias = linear.bias
        if quantized and not dequantize:
            return fused.to_quantized(linear.group_size, linear.bits)
        return fused

    def _extra_repr(self) -> str:
        return f"r={self.lora_b.shape[0]}, scale={self.scale}"
