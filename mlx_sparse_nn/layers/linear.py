"""Linear layers whose weight stores only some blocks: BlockSparseLinear and its quantized form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.core import draw, edges, ops
from mlx_sparse_nn.core.blocks import block_sources, blocks_of, move_blocks
from mlx_sparse_nn.core.checks import (
    check_absent,
    check_block_dtype,
    check_density,
    check_dims,
    check_size,
)
from mlx_sparse_nn.core.fit import DAMPING, choose_by_moments, fit_pattern
from mlx_sparse_nn.core.least_squares import LeastSquares
from mlx_sparse_nn.core.moments import InputMoments, check_damping, check_moments
from mlx_sparse_nn.core.pattern import CSRPattern, check_pattern
from mlx_sparse_nn.core.quantized import BITS, GROUP_SIZES, dequantize
from mlx_sparse_nn.core.scores import Balance, Score, choose_blocks
from mlx_sparse_nn.layers.lora import SparseLinear
from mlx_sparse_nn.layers.pattern_module import carry_mode, check_layer_pattern
from mlx_sparse_nn.patterns import covering

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATTERN_DECIDES = "pattern says which blocks are stored"


class BlockSparseLinear(SparseLinear):
    r"""Applies a linear transformation whose weight stores only some square blocks.

    .. math:: y = x A^\top + b

    where A has shape ``(output_dims, input_dims)`` and is zero outside its pattern. The stored
    values are trained like any weight; the pattern stays. Use it in place of ``nn.Linear``.

    Initially, values are uniform within ``1 / sqrt(stored inputs of their row)``. That is the rule
    of ``nn.Linear`` for the inputs that a row has, so outputs have the variance of a dense layer's.

    The pattern is saved with the weights, as ``indptr`` and ``indices``, and ``load_weights``
    brings it back. These two are never trained: they stay frozen whatever is unfrozen.

    Dims need not be multiples of the block size: the last blocks may reach past the weight, and
    what they hold there is never read.

    Args:
        input_dims: Number of input features.
        output_dims: Number of output features.
        pattern: Which blocks to store, of shape ``(output_dims, input_dims)``; its ``block_size``
            is the layer's. By default a balanced random one with a block in every block-row and
            every block-column, drawn with MLX's random seed.
        block_size: Side of the blocks of the default pattern, 32 by default.
        density: Stored fraction of the default pattern, 0.1 by default; higher where covering every
            block-row and block-column needs more blocks.
        bias: Whether to add a trainable bias.

    Attributes:
        weight: ``(n_blocks, block_size, block_size)``, or ``(nnz,)`` for ``block_size`` 1.
        bias: ``(output_dims,)``, if there is one.

    Raises:
        TypeError: A size is not an integer, ``density`` is not a number, or ``pattern`` is not a
            CSRPattern.
        ValueError: A dim is 0, ``density`` is not in (0, 1], ``pattern`` has another shape, or
            ``block_size`` or ``density`` is given with it.

    Example:
        >>> layer = BlockSparseLinear(512, 256, block_size=32, density=0.125)
        >>> layer(mx.zeros((8, 512))).shape
        (8, 256)
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        pattern: CSRPattern | None = None,
        *,
        block_size: int | None = None,
        density: float | None = None,
        bias: bool = True,
    ):
        owner = "BlockSparseLinear"
        if pattern is None:
            block_size = 32 if block_size is None else block_size
            density = 0.1 if density is None else density
            check_size(owner, "block_size", block_size, minimum=1)
            check_dims(owner, (output_dims, input_dims))
            check_density(owner, density)
            # On the host: a pattern is drawn there, once, when a layer is made.
            seed = int(mx.random.randint(0, 2**31 - 1).item())  # type: ignore[arg-type]
            pattern = covering(output_dims, input_dims, density, block_size, seed)
        else:
            check_absent(owner, PATTERN_DECIDES, block_size=block_size, density=density)
            check_layer_pattern(owner, pattern, (output_dims, input_dims))
        stored_inputs = np.maximum(1, _stored_inputs(pattern))
        bound = mx.array((1 / np.sqrt(stored_inputs)).astype(np.float32))  # (block rows,)
        blocks = mx.random.uniform(-1, 1, (pattern.n_blocks, pattern.block_size**2))
        blocks = blocks * bound[mx.array(pattern.row_indices)][:, None]
        biases = None
        if bias:
            bound = mx.repeat(bound, pattern.block_size)[:output_dims]
            biases = mx.random.uniform(-1, 1, (output_dims,)) * bound
        weight = edges.clear(pattern.layout, blocks.reshape(pattern.data_shape))
        self._initialise(pattern, weight, biases)

    def _initialise(self, pattern: CSRPattern, weight: mx.array, bias: mx.array | None) -> None:
        check_block_dtype("BlockSparseLinear", weight.dtype, pattern.block_size)
        super().__init__(pattern)
        self.weight = weight
        if bias is not None:
            self.bias = bias

    @classmethod
    def _of(cls, pattern: CSRPattern, weight: mx.array, bias: mx.array | None) -> BlockSparseLinear:
        """Return the layer of these arrays. The class itself would draw random numbers."""
        layer = cls.__new__(cls)
        layer._initialise(pattern, weight, bias)
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``x Aᵀ + b``: ``(..., input_dims)`` -> ``(..., output_dims)``."""
        # By key: for self.weight, Python would first search the class in vain.
        return self._multiply(self["weight"], x, self.get("bias"))

    def todense(self) -> mx.array:
        """Return the dense ``(output_dims, input_dims)`` weight."""
        return ops.todense(self.weight, self._bound_layout())

    def plot(self, ax: Axes | None = None, *, cmap: str = "Blues") -> Axes:
        """Draw the weight on matplotlib's axes: blocks are the darker the larger their values.

        The colour is the root mean square of the stored values of a block, or of the blocks that a
        cell merges where there are more than 1024 a side. ``ax.images[0]`` takes a colour bar.

        Args:
            ax: Where to draw; by default new axes.
            cmap: Name of a colour map, light for what is not stored.

        Raises:
            ImportError: matplotlib is not installed.
        """
        labels = ("inputs", "outputs")
        values = edges.clear(self.pattern.layout, self.weight)
        return draw.plot(self.pattern, ax, cmap=cmap, values=values, labels=labels)

    def _repr_svg_(self) -> str:
        values = edges.clear(self.pattern.layout, self.weight)
        return draw.svg(self.pattern, values, self._caption())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        block_size: int | None = None,
        density: float | None = None,
        pattern: CSRPattern | None = None,
        score: Score | None = None,
        balance: Balance | None = None,
        moments: InputMoments | None = None,
        damping: float | None = None,
    ) -> BlockSparseLinear:
        """Return the layer that keeps the strongest blocks of a dense one.

        The kept values are unchanged, unless ``moments`` say what the inputs are: then values and
        bias are those whose outputs are closest to the dense layer's, by least squares.

        The bias, the dtype, the training mode and what is frozen are those of ``linear``. No random
        number is drawn.

        Args:
            linear: An ``nn.Linear``. Not a subclass, which may compute something else, and not a
                quantized layer: dequantize it first.
            block_size: Side of the blocks, 32 by default.
            density: Stored fraction, in (0, 1], 0.1 by default, rounded to whole blocks and to at
                least one.
            pattern: Store exactly these blocks, ``(output_dims, input_dims)``, in place of the
                strongest; the other options are left out then.
            score: What makes a block strong: ``"l1"``, ``"l2"`` (the default) or ``"max"``, the
                norm of its entries; or a function of the blocks, ``(n_blocks, B, B)`` float32, or
                of these and their :class:`BlockPlaces`, that returns ``(n_blocks,)`` numbers. It is
                told by how many positional arguments the function needs. With ``moments`` the
                default is ``"obs"``: what the outputs lose without the block when all others are
                fitted anew.
            balance: ``"row"``, the default, keeps the same number of blocks in every block-row,
                give or take one; ``"global"`` keeps the strongest wherever they lie. Either may
                leave a block-row or a block-column without blocks.
            moments: Of the layer's inputs, as :func:`layer_moments` returns them.
            damping: How much the fit holds on to the dense values, as a fraction of the mean square
                of the inputs: 0.01 by default. For ``moments`` alone.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``, or an option is of the wrong type.
            ValueError: An option is out of range, does not fit the weight or is given beside
                ``pattern``, the weight is not finite, or the moments are not positive definite.

        Example:
            >>> linear = nn.Linear(512, 256)
            >>> BlockSparseLinear.from_linear(linear, density=0.25).pattern
            CSRPattern(256 x 512, block_size=32, 32 blocks, density 0.25)
        """
        owner = f"{cls.__name__}.from_linear"
        if reason := why_not_linear(linear):
            raise TypeError(f"[{owner}] linear must be an nn.Linear: {reason}")
        weight, bias = linear.weight, linear.get("bias")
        problem = None
        if moments is None:
            check_absent(owner, "it is for moments", damping=damping)
        else:
            damping = DAMPING if damping is None else damping
            check_moments(owner, moments, weight.shape[1])
            check_damping(owner, damping)
            problem = LeastSquares(moments, damping, bias is not None)
        if pattern is None:
            block_size = 32 if block_size is None else block_size
            density = 0.1 if density is None else density
            balance = "row" if balance is None else balance
            if problem is None or score not in (None, "obs"):
                score = "l2" if score is None else score
                pattern = choose_blocks(owner, weight, block_size, density, score, balance, moments)
            else:
                pattern = choose_by_moments(owner, weight, problem, block_size, density, balance)
        else:
            options = dict(block_size=block_size, density=density, score=score, balance=balance)
            check_absent(owner, PATTERN_DECIDES, **options)
            check_layer_pattern(owner, pattern, weight.shape)
            pattern.check_unique(owner)
        values, error = blocks_of(weight, pattern), None
        if problem is not None:
            fit = fit_pattern(owner, weight, bias, pattern, problem)
            values, bias, error = fit.weight, fit.bias, fit.error_after
        layer = carry_mode(linear, cls._of(pattern, values, bias))
        layer.output_error = error
        return layer

    def to_linear(self) -> nn.Linear:
        """Return the ``nn.Linear`` of the same product: its weight is :meth:`todense`, exactly.

        The bias, the dtype, the training mode and what is frozen are those of this layer.
        """
        return carry_mode(self, super().to_linear())

    def to_block_sparse(self) -> BlockSparseLinear:
        """Return another layer of the same arrays, in the same mode."""
        layer = BlockSparseLinear._of(self.pattern, self.weight, self.get("bias"))
        return carry_mode(self, layer)

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> QuantizedBlockSparseLinear:
        """Return this layer with quantized blocks; ``nn.quantize`` calls this.

        See :class:`QuantizedBlockSparseLinear` for the arguments. Other modes than "affine" and
        quantized inputs, which ``nn.quantize`` has too, are not offered.
        """
        if quantize_input:
            raise ValueError(
                "[QuantizedBlockSparseLinear] quantize_input must be False, got "
                f"{quantize_input!r}; leave the layer out with nn.quantize's class_predicate, or "
                "make it dense first"
            )
        return QuantizedBlockSparseLinear.from_linear(self, group_size, bits, mode)

    def set_pattern(self, pattern: CSRPattern) -> np.ndarray:
        """Change which blocks are stored: those of both patterns keep their values, new ones are 0.

        The shape of ``weight`` changes with the number of blocks. Call it between training steps,
        not in a compiled function; steps compiled before go on with the new pattern. An optimizer's
        state for ``weight`` has to follow: :func:`prune` and :func:`regrow` see to that.

        Args:
            pattern: Of the layer's shape and block size, with no block repeated.

        Returns:
            ``(pattern.n_blocks,)`` int64: which stored block each one was before, -1 for new ones.

        Raises:
            TypeError: ``pattern`` is not a CSRPattern.
            ValueError: ``pattern`` has another shape or block size, or repeats a block, or the
                present pattern does.
        """
        source = block_sources("BlockSparseLinear", self.pattern, pattern)
        weight = move_blocks(self.weight, source)
        self.__dict__.pop("_rollback", None)  # arrays of the old shapes cannot come back
        # Not through PatternModule's __setitem__, which holds every array to its present shape.
        dict.__setitem__(self, "weight", weight)
        self._lay_out(pattern)
        return source


def write_values(layer: BlockSparseLinear, weight: mx.array, bias: mx.array | None) -> None:
    """Write the stored values of a layer, and its bias if one is given."""
    layer.weight = weight
    if bias is not None:
        layer.bias = bias


class QuantizedBlockSparseLinear(SparseLinear):
    r"""Applies :math:`y = x A^\top + b` with quantized blocks: a sparse ``nn.QuantizedLinear``.

    Each row of a stored block is quantized in groups along the input axis, by ``mx.quantize`` in
    its affine mode. The product is :func:`qspmm`, which never holds all blocks dequantized.
    Gradients go to ``x`` and, unless it is frozen, to ``bias``; the quantized blocks stay frozen
    whatever is unfrozen.

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
        TypeError: ``pattern`` is not a CSRPattern, or ``group_size`` or ``bits`` not an integer.
        ValueError: ``group_size`` or ``bits`` is not one of these, ``group_size`` does not divide
            the block size, or ``pattern`` has no rows or no columns.
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
        check_dims(owner, pattern.shape)
        super().__init__(pattern, pinned=("weight", "scales", "biases"))
        n_blocks, block_size = pattern.n_blocks, pattern.block_size
        self.group_size = _group_size(block_size, group_size)
        self.mode = "affine"  # as nn.QuantizedLinear has it, for who asks
        self.bits = 4 if bits is None else check_size(owner, "bits", bits)
        if self.bits not in BITS:
            raise ValueError(f"[{owner}] bits must be one of {BITS}, got {bits!r}")
        self.weight = mx.zeros((n_blocks, block_size, block_size * self.bits // 32), mx.uint32)
        self.scales = mx.zeros((n_blocks, block_size, block_size // self.group_size))
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
            TypeError: ``linear`` is not a BlockSparseLinear, or as for the class.
            ValueError: ``mode`` is not "affine", or as for the class.
        """
        check_layer("QuantizedBlockSparseLinear", linear, "linear")
        if mode != "affine":
            raise ValueError(
                f"[QuantizedBlockSparseLinear] mode must be 'affine', got {mode!r}; "
                "leave the layer out with nn.quantize's class_predicate"
            )
        layer = cls(linear.pattern, bias=False, group_size=group_size, bits=bits)
        layer.weight, layer.scales, layer.biases = mx.quantize(
            edges.clear(linear.pattern.layout, linear.weight), layer.group_size, layer.bits
        )
        if "bias" in linear:
            layer.bias = linear.bias
        layer.freeze()
        return carry_mode(linear, layer)

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``x Aᵀ + b``: ``(..., input_dims)`` -> ``(..., output_dims)``."""
        matrix = self["weight"], self["scales"], self["biases"]
        return self._multiply_quantized(matrix, x, self.get("bias"))

    def dequantized_weight(self) -> mx.array:
        """Return the stored blocks, ``(n_blocks, block_size, block_size)`` of the scales' dtype."""
        self._check_whole()
        return dequantize(self.weight, self.scales, self.biases)

    def todense(self) -> mx.array:
        """Return the dense ``(output_dims, input_dims)`` weight, dequantized."""
        return ops.todense(self.dequantized_weight(), self._bound_layout())

    def to_block_sparse(self) -> BlockSparseLinear:
        """Return the layer of the dequantized blocks, all of it trainable."""
        layer = BlockSparseLinear._of(self.pattern, self.dequantized_weight(), self.get("bias"))
        layer.train(self.training)
        return layer

    def _extra_repr(self) -> str:
        return f"{super()._extra_repr()}, group_size={self.group_size}, bits={self.bits}"

    def _checked(self, key: str, value: Any, shape: tuple[int, ...]) -> mx.array:
        value = super()._checked(key, value, shape)
        if key == "weight" and value.dtype != mx.uint32:
            raise TypeError(
                f"[QuantizedBlockSparseLinear] weight must stay uint32, got {value.dtype}"
            )
        return value


def check_layer(owner: str, layer: object, name: str = "layer") -> None:
    """Raise unless ``layer`` is a :class:`BlockSparseLinear`."""
    if not isinstance(layer, BlockSparseLinear):
        kind = type(layer).__name__
        raise TypeError(f"[{owner}] {name} must be a BlockSparseLinear, got {kind}")


def why_not_linear(module: nn.Module) -> str | None:
    """Return in words why ``from_linear`` does not take a module, or None if it does."""
    kind = type(module)
    if kind is nn.Linear:
        return None
    if isinstance(module, nn.QuantizedLinear | nn.QQLinear):
        return f"{kind.__name__} holds a packed weight; dequantize it first"
    if isinstance(module, BlockSparseLinear):
        return f"{kind.__name__} is sparse already"
    if isinstance(module, nn.Linear):
        return f"{kind.__name__}, a subclass of nn.Linear, may compute something else"
    return f"got {kind.__name__}"


def _stored_inputs(pattern: CSRPattern) -> np.ndarray:
    """Return how many inputs each block-row has, ``(n_block_rows,)``."""
    widths = np.full(pattern.grid[1], pattern.block_size)
    widths[-1:] -= -pattern.shape[1] % pattern.block_size
    return np.bincount(pattern.row_indices, widths[pattern.indices], pattern.grid[0])


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
    check_size(owner, "group_size", group_size)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"[{owner}] group_size must be 32, 64 or 128, got {group_size!r}")
    if group_size not in fitting:
        raise ValueError(
            f"[{owner}] group_size {group_size} does not divide block_size {block_size}; "
            f"it can be {' or '.join(map(str, sorted(fitting)))}"
        )
    return group_size
