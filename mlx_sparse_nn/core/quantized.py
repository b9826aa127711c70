"""MLX's affine packing of blocks: what the shapes of its arrays say, and the values it stands for.

Each row of a block is cut into groups, and ``value = scale * q + bias`` with one scale and one bias
for each group. The integers q lie in uint32 words, one after the other, the lowest bits first.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import check_array

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (64, 32, 128)  # the first that divides the block size is the default


def check_quantized(
    owner: str, packed: mx.array, scales: mx.array, biases: mx.array, shape: tuple[int, ...]
) -> None:
    """Raise unless three arrays are the packing of blocks ``shape``, ``(n_blocks, B, B)``.

    ``bits`` and ``group_size`` are what the last axes say.
    """
    block_size = shape[-1] if len(shape) == 3 else 1
    if block_size % min(GROUP_SIZES):
        raise ValueError(
            f"[{owner}] the pattern's block_size {block_size} is not a multiple of 32, the "
            "smallest group"
        )
    for name, a in (("packed", packed), ("scales", scales), ("biases", biases)):
        check_array(owner, name, a)
    if packed.dtype != mx.uint32:
        raise TypeError(f"[{owner}] packed must be uint32, got {packed.dtype}")
    if packed.shape not in [(*shape[:2], block_size * bits // 32) for bits in BITS]:
        raise ValueError(
            f"[{owner}] packed has shape {packed.shape}, the pattern needs {shape[:2]} and a last "
            f"axis of {block_size} * bits / 32, bits in {BITS}"
        )
    groups = [(*shape[:2], block_size // size) for size in GROUP_SIZES if block_size % size == 0]
    if scales.shape not in groups:
        raise ValueError(
            f"[{owner}] scales has shape {scales.shape}, the pattern needs {shape[:2]} and a last "
            f"axis of {block_size} / group_size, group_size in {tuple(sorted(GROUP_SIZES))}"
        )
    if biases.shape != scales.shape:
        raise ValueError(f"[{owner}] biases has shape {biases.shape}, scales {scales.shape}")


def bits_of(packed: mx.array) -> int:
    """Return the bits of a value of ``packed (..., B, B * bits / 32)``."""
    return 32 * packed.shape[-1] // packed.shape[-2]


def dequantize(packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """Return the values of blocks ``(..., B, B)``, of the dtype of the scales."""
    block_size = packed.shape[-2]
    if packed.size == 0:  # mx.dequantize refuses empty arrays
        return mx.zeros((*packed.shape[:-1], block_size), scales.dtype)
    group_size = block_size // scales.shape[-1]
    return mx.dequantize(packed, scales, biases, group_size, bits_of(packed))


def unpack(packed: mx.array) -> np.ndarray:
    """Return the integers of ``packed``, ``(..., B, B)``, which NumPy reads bit by bit.

    No backend reads this: the oracle and ``verify`` do.
    """
    bits = np.unpackbits(np.array(packed)[..., None].view(np.uint8), axis=-1, bitorder="little")
    width = bits_of(packed)
    return bits.reshape(*packed.shape[:-1], -1, width) @ (1 << np.arange(width))


def gradients(packed: mx.array, scales: mx.array, d_blocks: mx.array) -> tuple[mx.array, mx.array]:
    """Return the gradients to scales and biases, by that to the values, ``(..., B, B)``."""
    grouped, ones = (*scales.shape, -1), mx.ones(scales.shape)
    if 0 in scales.shape:
        return mx.zeros_like(scales), mx.zeros_like(scales)
    integers = mx.stop_gradient(dequantize(packed, ones, mx.zeros_like(ones)))
    wide = d_blocks.astype(mx.float32)
    both = ((wide * integers).reshape(grouped), wide.reshape(grouped))
    d_scales, d_biases = (a.sum(axis=-1).astype(scales.dtype) for a in both)
    return d_scales, d_biases
