"""SparseParameter: a sparse array that a model trains, casts and saves."""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core.arrays import COOArray, CSRArray, is_sparse
from mlx_sparse_nn.core.checks import check_dims
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.layers.pattern_module import PatternModule


class SparseParameter(PatternModule):
    """A sparse array in a model: MLX looks for parameters in modules, not in a CSRArray.

    Its values train, are cast by ``set_dtype`` and saved together with the pattern, which never
    trains. A compiled function holds the pattern of :attr:`array` as a constant.

    Args:
        array: The array; coordinates become csr.

    Attributes:
        weight: The stored values, ``(nnz,)`` or ``(n_blocks, B, B)``.

    Raises:
        TypeError: ``array`` is not a sparse array.
        ValueError: It has no rows or no columns.

    Example:
        >>> parameter = SparseParameter(eye(3))
        >>> parameter.array @ mx.ones(3)
        array([1, 1, 1], dtype=float32)
    """

    def __init__(self, array: CSRArray | COOArray):
        if not is_sparse(array):
            kind = type(array).__name__
            raise TypeError(f"[SparseParameter] array must be a CSRArray or COOArray, got {kind}")
        check_dims("SparseParameter", array.shape)
        array = array.tocsr() if isinstance(array, COOArray) else array
        super().__init__(array.pattern)
        self.weight = array.data

    def _lay_out(self, pattern: CSRPattern) -> None:
        super()._lay_out(pattern)
        # Arrays of its own, since `array` reads those of its pattern: MLX refuses to compile a
        # function that reads its inputs, a module's state, by another way. `a[:]` is the same one.
        for key in ("indptr", "indices"):
            dict.__setitem__(self, key, mx.contiguous(self[key]))
        state = {name: mx.contiguous(array) for name, array in self["_layout"].items()}
        dict.__setitem__(self, "_layout", state)
        self.__dict__["_laid_out"] = self["indices"]

    @property
    def array(self) -> CSRArray:
        """The array: the values as they are now, tracers within a transform, on the pattern."""
        return CSRArray(self["weight"], self.pattern)

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``array @ x``."""
        return self.array @ x

    def _extra_repr(self) -> str:
        return repr(self.array).partition("(")[2].rstrip(")")
