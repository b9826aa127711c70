"""PatternModule: an mlx.nn module whose state carries a sparsity pattern, checked when written."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.core.layout import Layout
from mlx_sparse_nn.core.pattern import CSRPattern, check_indices, check_indptr, check_range
from mlx_sparse_nn.core.transforms import transforming

_INDICES = ("indptr", "indices")


class PatternModule(nn.Module):
    """The base of layers with a pattern: ``indptr`` and ``indices`` are saved, and never trained.

    Arrays keep their shape, whoever writes them, and the pattern follows the index arrays.

    Args:
        pattern: The pattern of the layer's weight.
        pinned: Names of further arrays that stay frozen whatever is unfrozen.
    """

    _pattern: CSRPattern

    def __init__(self, pattern: CSRPattern, pinned: Iterable[str] = ()):
        super().__init__()
        self._no_grad = PinnedKeys((*_INDICES, *pinned))
        self._lay_out(pattern)

    @property
    def pattern(self) -> CSRPattern:
        """The pattern of the weight."""
        return self._pattern

    @property
    def input_dims(self) -> int:
        """Number of input features."""
        return self._pattern.shape[1]

    @property
    def output_dims(self) -> int:
        """Number of output features."""
        return self._pattern.shape[0]

    @property
    def block_size(self) -> int:
        """Side of the stored blocks."""
        return self._pattern.block_size

    @property
    def density(self) -> float:
        """Stored fraction of the weight."""
        return self._pattern.density

    def spy(self, width: int = 64) -> str:
        """Return the pattern drawn in characters; see :meth:`CSRPattern.spy`."""
        return self._pattern.spy(width)

    def _repr_svg_(self) -> str:
        return self._pattern._repr_svg_()

    def _checked_input(self, x: mx.array) -> mx.array:
        """Return ``x``, or raise unless it is ``(..., input_dims)``. Every call begins here."""
        if x.shape[-1:] != self._pattern.shape[1:]:
            raise ValueError(
                f"[{type(self).__name__}] x has shape {x.shape}, "
                f"its last axis must be input_dims = {self.input_dims}"
            )
        self.__dict__.pop("_replaced", None)
        return x

    def _bound_layout(self) -> Layout:
        """Return the layout of the arrays in the module's state.

        They are those of the pattern's own layout, unless a transform has put others in their
        place: ``mx.compile`` puts tracers there, and later the results of its graph.
        """
        layout = self._pattern.layout
        if self["indices"] is self.__dict__.get("_laid_out") or not transforming():
            return layout
        return layout.with_arrays(self["indptr"], self["indices"], self["_layout"])

    def _lay_out(self, pattern: CSRPattern) -> None:
        """Take over a pattern, and all arrays that the products read of it."""
        # These arrays sit in the module's state, so that a compiled step takes them as inputs and
        # follows a pattern that load_weights brings. A plain attribute is a constant of the
        # compiled graph: of the pattern, only the sizes that never change are used there.
        layout = pattern.layout
        for key, array in zip(_INDICES, (layout.rows.indptr, layout.rows.indices), strict=True):
            # An array of its own on the same memory: who writes into it does not change the layout.
            dict.__setitem__(self, key, array[:])
        dict.__setitem__(self, "_layout", layout.state())
        self.__dict__["_pattern"] = pattern
        self.__dict__["_laid_out"] = self["indices"]

    def _extra_repr(self) -> str:
        pattern = self._pattern
        return (
            f"input_dims={self.input_dims}, output_dims={self.output_dims}, "
            f"block_size={pattern.block_size}, density={pattern.density:.3g}, "
            f"blocks={pattern.n_blocks}, bias={'bias' in self}"
        )

    # load_weights, update and apply write into a module item by item, through __setitem__, in any
    # order. Each item is checked by itself, since any valid indptr goes with any valid indices;
    # when one is refused, those that came just before it are put back.

    def __setitem__(self, key: str, value: Any) -> None:
        current = self.get(key)
        if "_layout" not in self or key[0] == "_" or not isinstance(current, mx.array):
            super().__setitem__(key, value)
            return
        replaced = self.__dict__.setdefault("_replaced", {})
        if key in replaced:
            replaced.clear()
        try:
            value = self._checked(key, current, value)
        except (TypeError, ValueError):
            for name, reference_to in replaced.items():
                if (previous := reference_to()) is not None:
                    super().__setitem__(name, previous)
            self._follow_indices()
            raise
        # Weak: load_weights holds what it replaces until it is done, and nobody else need.
        replaced[key] = weakref.ref(current)
        super().__setitem__(key, value)
        if key in _INDICES:
            self._follow_indices()

    def _checked(self, key: str, current: mx.array, value: Any) -> mx.array:
        """Return the array to store as ``key``, or raise."""
        owner = type(self).__name__
        if not isinstance(value, mx.array) or value.shape != current.shape:
            shape = value.shape if isinstance(value, mx.array) else type(value).__name__
            raise ValueError(
                f"[{owner}] {key} must be an array of shape {current.shape}, got {shape}"
            )
        if key not in _INDICES or value is current:
            return value
        if mx.issubdtype(value.dtype, mx.floating):
            # apply() went over all parameters: a cast or an initialiser leaves the pattern alone.
            # Checked on the host, once, as everything that is written into the module is.
            numbers = np.array(value.astype(mx.float32))
            if mx.array_equal(value, current.astype(value.dtype)).item() or np.any(numbers % 1):
                return current
            raise TypeError(f"[{owner}] {key} must be integers, got {value.dtype}")
        host = check_indices(owner, key, value)
        if key == "indptr":
            check_indptr(owner, host, self._pattern.n_blocks)
        else:
            check_range(owner, key, host, self.input_dims // self.block_size)
        return value if value.dtype == mx.int32 else mx.array(host)

    def _follow_indices(self) -> None:
        """Make the pattern and its layout those of ``indptr`` and ``indices``."""
        shape, block_size = self._pattern.shape, self._pattern.block_size
        pattern = CSRPattern(self["indptr"], self["indices"], shape, block_size)
        if pattern != self._pattern:
            self._lay_out(pattern)

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_replaced", "_laid_out")
        return {key: value for key, value in self.__dict__.items() if key not in derived}


class PinnedKeys(set):
    """A module's set of frozen keys in which the pinned ones stay.

    ``unfreeze`` of any ancestor empties this set itself, not through a method of the layer.
    """

    def __init__(self, pinned: Iterable[str]):
        super().__init__(pinned)
        self.pinned = frozenset(self)

    def clear(self) -> None:
        super().clear()
        self.update(self.pinned)

    def difference_update(self, *others) -> None:
        super().difference_update(*others)
        self.update(self.pinned)
