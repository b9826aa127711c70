"""QuantizedBlockSparseLinear: a block-sparse layer whose stored blocks are quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_sparse_nn.core import ops
from mlx_sparse_nn.core.checks import check_dims
from mlx_sparse_nn.core.pattern import CSRPattern, check_pattern
from mlx_sparse_nn.layers.linear import BlockSparseLinear
from mlx_sparse_nn.layers.pattern_module import PatternModule, carry_mode

if TYPE_CHECKING:
    from mlx_sparse_nn.layers.lora import LoRABlockSparseLinear

GROUP_SIZES = (64, 32, 128)  # the first that divides the block size is the default
BITS = (2, 3, 4, 5, 6, 8)


class QuantizedBlockSparseLinear(PatternModule):
    r"""Applies :math:`y = x A^\top + b` with quantized blocks: a sparse ``nn.QuantizedLinear``.

    Each row of a stored block is quantized in groups along the input axis, by ``mx.quantize`` in
    its affine mode. The product dequantizes all stored blocks first: it saves memory at rest, not
    time. Gradients go to ``x`` and, unless it is frozen, to ``bias``; the quantized blocks stay
    frozen whatever is unfrozen.

    It holds zeros until :meth:`from_linear` or ``load_weights`` fills it.

    Args:
        pattern: Which blocks are stored. Its ``block_size`` is a multiple of ``group_size``.
        bias: Whether there is a bias.
        group_size: 32, 64 or 128 values that share a scale. By default 64, or 32 where 64 does not
            divide the block size.
        bits: Bits of a value: 2 to 6 or 8. By default 4.

    Attributes:
        weight: ``(n_blocks, block_size, block_size * bits / 32)`` uint32, packed.
        scales, biases: ``(n_blocks, block_size, block_size / group_size)``.
        bias: ``(output_dims,)``, if there is one.

    Raises:
        TypeError: ``pattern`` is not a CSRPattern.
        ValueError: ``group_size`` or ``bits`` is not one of these, or ``group_size`` does not
            divide the block size.
    """

    def __init__(
        self,
        pattern: CSRPattern,
        *,
        bias: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
    ):
        owner = "QuantizedBlockSparseLinear"
        check_pattern(owner, pattern)
        check_dims(owner, *pattern.shape, pattern.block_size)
        super().__init__(pattern, pinned=("weight", "scales", "biases"))
        n_blocks, block = pattern.n_blocks, pattern.block_size
        self.group_size = _group_size(block, group_size)
        self.bits = 4 if bits is None else bits
        if self.bits not in BITS:
            raise ValueError(f"[{owner}] bits must be one of {BITS}, got {bits!r}")
        self.weight = mx.zeros((n_blocks, block, block * self.bits // 32), mx.uint32)
        self.scales = mx.zeros((n_blocks, block, block // self.group_size))
        self.biases = mx.zeros(self.scales.shape)
        if bias:
            self.bias = mx.zeros((pattern.shape[0],))
        self.freeze()

    @classmethod
    def from_linear(
        cls,
        linear: BlockSparseLinear,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
    ) -> QuantizedBlockSparseLinear:
        """Quantize the blocks of a layer. What ``nn.quantize`` calls, through ``to_quantized``.

        Raises:
            ValueError: ``mode`` is not "affine", or as for the class.
        """
        if mode != "affine":
            raise ValueError(
                f"[QuantizedBlockSparseLinear] mode must be 'affine', got {mode!r}; "
                "leave the layer out with nn.quantize's class_predicate"
            )
        layer = cls(linear.pattern, bias=False, group_size=group_size, bits=bits)
        layer.weight, layer.scales, layer.biases = mx.quantize(
            linear.weight, layer.group_size, layer.bits
        )
        if "bias" in linear:
            layer.bias = linear.bias
        layer.freeze()
        return carry_mode(linear, layer)

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``x Aᵀ + b``: ``(..., input_dims)`` -> ``(..., output_dims)``."""
        x = self._checked_input(x)
        return ops.spmm(self.dequantized_weight(), self._bound_layout(), x, self.get("bias"))

    def dequantized_weight(self) -> mx.array:
        """Return the stored blocks, ``(n_blocks, block_size, block_size)`` of the scales' dtype."""
        if self.pattern.n_blocks == 0:  # mx.dequantize refuses empty arrays
            return mx.zeros(self.pattern.data_shape, self.scales.dtype)
        return mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)

    def todense(self) -> mx.array:
        """Return the dense ``(output_dims, input_dims)`` weight, dequantized."""
        return ops.todense(self.dequantized_weight(), self._bound_layout())

    def to_lora(
        self, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> LoRABlockSparseLinear:
        """Put low-rank adapters over this layer; see :class:`LoRABlockSparseLinear`."""
        from mlx_sparse_nn.layers.lora import LoRABlockSparseLinear

        return LoRABlockSparseLinear(self, r, dropout, scale)

    def to_linear(self) -> nn.Linear:
        """Return a dense layer of the dequantized weight."""
        linear = nn.Linear(self.input_dims, self.output_dims, bias="bias" in self)
        linear.weight = self.todense()
        if "bias" in self:
            linear.bias = self.bias
        linear.train(self.training)
        return linear

    def _extra_repr(self) -> str:
        return f"{super()._extra_repr()}, group_size={self.group_size}, bits={self.bits}"

    def _checked(self, key: str, current: mx.array, value: Any) -> mx.array:
        value = super()._checked(key, current, value)
        if key == "weight" and value.dtype != mx.uint32:
            raise TypeError(
                f"[QuantizedBlockSparseLinear] weight must stay uint32, got {value.dtype}"
            )
        return value


def _group_size(block_size: int, group_size: int | None) -> int:
    """Return the group size to use, or raise."""
    owner = "QuantizedBlockSparseLinear"
    fitting = [size for size in GROUP_SIZES if block_size % size == 0]
    if not fitting:
        raise ValueError(
            f"[{owner}] block_size {block_size} is not a multiple of 32, the smallest group; "
            "leave the layer out with nn.quantize's class_predicate"
        )
    if group_size is None:
        return fitting[0]
    if group_size not in GROUP_SIZES:
        raise ValueError(f"[{owner}] group_size must be 32, 64 or 128, got {group_size!r}")
    if group_size not in fitting:
        raise ValueError(
            f"[{owner}] group_size {group_size} does not divide block_size {block_size}; "
            f"it can be {' or '.join(map(str, sorted(fitting)))}"
        )
    return group_size
