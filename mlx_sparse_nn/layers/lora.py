"""LoRABlockSparseLinear: trainable low-rank adapters over a frozen block-sparse layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_sparse_nn.core import ops
from mlx_sparse_nn.core.checks import check_number, check_size
from mlx_sparse_nn.layers.pattern_module import Filter, PatternModule, without_indices


class SparseLinear(PatternModule):
    """The base of whole block-sparse layers, quantized or not: what adapters can lie over.

    The part of a layer that a rank holds is a :class:`PatternModule` and no such layer.

    Attributes:
        weight_error: Relative error of the weight when surgery made the layer of a dense one; None
            where nobody knows it. Another pattern, and values that are loaded, make it None; what
            training changes does not.
        output_error: The same of its outputs, over samples of calibration.
    """

    weight: mx.array
    bias: mx.array
    weight_error: float | None = None
    output_error: float | None = None

    def __getattr__(self, key: str) -> Any:
        try:
            return super().__getattr__(key)
        except AttributeError as error:
            # So a tool of dense layers, such as mlx-lm's AWQ, finds out that this is none.
            raise AttributeError(f"{error}; if a tool expects a dense layer, densify") from None

    def todense(self) -> mx.array:
        """Return the dense ``(output_dims, input_dims)`` weight."""
        raise NotImplementedError

    def to_block_sparse(self) -> SparseLinear:
        """Return a new layer of the same pattern and bias, whose blocks are not quantized."""
        raise NotImplementedError

    def to_linear(self) -> nn.Linear:
        """Return a dense layer whose weight is :meth:`todense`, in the same training mode."""
        linear = nn.Linear.__new__(nn.Linear)  # nn.Linear() would draw random numbers
        nn.Module.__init__(linear)
        linear.weight = self.todense()
        if "bias" in self:
            linear.bias = self["bias"]
        linear.train(self.training)
        return linear

    def to_lora(
        self, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> LoRABlockSparseLinear:
        """Freeze this layer and return it under low-rank adapters; mlx-lm calls this.

        See :class:`LoRABlockSparseLinear` for the arguments.
        """
        return LoRABlockSparseLinear(self, r, dropout, scale)


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
        lora_a: ``(input_dims, r)``, initially uniform within ``1 / sqrt(input_dims)``.
        lora_b: ``(r, output_dims)``, initially zero.

    Raises:
        TypeError: ``linear`` is not a block-sparse layer, ``r`` is not an integer, or ``dropout``
            or ``scale`` is not a number.
        ValueError: ``r`` is less than 1, ``dropout`` is not in [0, 1), or ``linear`` was emptied.
    """

    def __init__(
        self,
        linear: SparseLinear,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
    ):
        super().__init__()
        if not isinstance(linear, SparseLinear):
            raise TypeError(
                "[LoRABlockSparseLinear] linear must be a BlockSparseLinear or a "
                f"QuantizedBlockSparseLinear, got {type(linear).__name__}"
            )
        linear._check_whole()
        owner = "LoRABlockSparseLinear"
        r = check_size(owner, "r", r, minimum=1)
        check_number(owner, "dropout", dropout)
        check_number(owner, "scale", scale)
        if not 0 <= dropout < 1:
            raise ValueError(f"[{owner}] dropout must be in [0, 1), got {dropout}")
        linear.freeze()
        self.linear = linear
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        bound = 1 / math.sqrt(max(1, linear.input_dims))
        self.lora_a = mx.random.uniform(-bound, bound, (linear.input_dims, r))
        self.lora_b = mx.zeros((r, linear.output_dims))

    def apply(
        self,
        map_fn: Callable[[mx.array], mx.array],
        filter_fn: Filter | None = None,
    ) -> nn.Module:
        """Map the parameters, as ``nn.Module.apply`` does, but never the pattern's index arrays."""
        return super().apply(map_fn, without_indices(filter_fn))

    def __call__(self, x: mx.array) -> mx.array:
        """Return the adapted output: ``(..., input_dims)`` -> ``(..., output_dims)``."""
        self._check_whole()
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
                is quantized again with the base's ``group_size`` and ``bits``, with a warning: what
                of the update is smaller than a step of that rounding is lost.
            keep_pattern: Whether to keep the pattern of the base.

        Raises:
            ValueError: With ``keep_pattern``, the pattern stores a block more than once.
        """
        self._check_whole()
        linear, lora_b = self.linear, self.scale * self.lora_b
        if keep_pattern:
            linear.pattern.check_unique("LoRABlockSparseLinear.fuse")
            fused: Any = linear.to_block_sparse()
            delta = ops.sddmm(linear.pattern, lora_b, self.lora_a.T)
        else:
            fused = linear.to_linear()
            delta = lora_b.T @ self.lora_a.T
        fused.weight = fused.weight + delta.astype(fused.weight.dtype)
        fused.unfreeze()  # the adapters had frozen it
        if "scales" in linear and not dequantize:
            warnings.warn(
                f"[LoRABlockSparseLinear.fuse] the fused layer is rounded to {linear.bits} bits "
                "again, which may lose the update; dequantize=True keeps it",
                stacklevel=2,
            )
            return fused.to_quantized(linear.group_size, linear.bits)
        return fused

    def _check_whole(self) -> None:
        """Raise if the adapters were emptied; their base says so itself."""
        if self["lora_a"].shape == (0,) or self["lora_b"].shape == (0,):
            self.linear._check_whole()
            raise ValueError(
                "[LoRABlockSparseLinear] the adapters were emptied: mx.array([]) was written into "
                "them; write lora_a and lora_b again"
            )

    def _extra_repr(self) -> str:
        return f"r={self.lora_b.shape[0]}, scale={self.scale}"
