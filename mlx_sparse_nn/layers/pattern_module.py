"""PatternModule: an mlx.nn module whose state carries a sparsity pattern, checked when written."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.core import draw, ops, tuned
from mlx_sparse_nn.core.checks import (
    check_array,
    check_block_dtype,
    check_dims,
    check_indices,
    check_indptr,
    check_range,
)
from mlx_sparse_nn.core.layout import Layout
from mlx_sparse_nn.core.pattern import CSRPattern, check_pattern
from mlx_sparse_nn.core.replay import Replay
from mlx_sparse_nn.core.transforms import transforming
from mlx_sparse_nn.layers.checkpoints import BLOCKWISE, RESTORE, guard

_INDICES = ("indptr", "indices")
# Relative error of an index array in a running average of one pattern: 1.3e-5 after any number of
# steps that keep 0.999 of it, in float32. The mean of two patterns is that close only where they
# differ by one in numbers above 32768.
_AVERAGED = 2.0**-16

Filter: TypeAlias = Callable[[nn.Module, str, Any], bool]

_Layer = TypeVar("_Layer", bound=nn.Module)


def _index_array(name: str) -> Any:
    """Return a property that gives an array of its own on the memory of the module's array.

    Who writes into it does not reach what the products read, where a wrong index would lead outside
    a buffer.
    """
    return property(lambda self: self[name][:], lambda self, value: self.__setitem__(name, value))


class PatternModule(nn.Module):
    """The base of layers with a pattern: ``indptr`` and ``indices`` are saved, and never trained.

    Arrays keep their shape, whoever writes them, and the pattern follows the index arrays.

    ``mx.array([])``, written into any of them, empties the layer: so mlx-lm gives back the memory
    of a model while it saves it. What needs the layer then raises, until whole arrays are written.

    Args:
        pattern: The pattern of the layer's weight.
        pinned: Names of further arrays that stay frozen whatever is unfrozen.
    """

    indptr: mx.array = _index_array("indptr")
    indices: mx.array = _index_array("indices")
    _pattern: CSRPattern
    _emptied: Emptied | None = None

    def __new__(cls, *args: Any, **kwargs: Any):
        guard(PatternModule)
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, pattern: CSRPattern, pinned: Iterable[str] = ()):
        super().__init__()
        self._no_grad = PinnedKeys((*_INDICES, *pinned))
        self._lay_out(pattern)

    @property
    def pattern(self) -> CSRPattern:
        """The pattern of the weight.

        Raises:
            ValueError: The layer was emptied.
        """
        self._check_whole()
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
        return self.pattern.density

    def _check_whole(self) -> None:
        """Raise if the layer was emptied. Whatever reads its arrays comes here."""
        if self._emptied is not None:
            raise ValueError(f"[{type(self).__name__}] {self._emptied.reason()}")

    def spy(self, width: int = 64) -> str:
        """Return the pattern drawn in characters; see :meth:`CSRPattern.spy`."""
        return self.pattern.spy(width)

    def _repr_svg_(self) -> str:
        return draw.svg(self.pattern, caption=self._caption())

    def _caption(self) -> str:
        """Return what stands below a picture of the layer."""
        n_rows, n_cols = self.pattern.shape
        kind, size = type(self).__name__, self.block_size
        return f"{kind}({n_cols} to {n_rows}, block_size={size}, density {self.density:.3g})"

    def _multiply(self, weight: mx.array, x: mx.array, bias: mx.array | None = None) -> mx.array:
        """Return ``x Aᵀ + bias`` for the stored values of A. Every call of a layer comes here, or
        to :meth:`_multiply_quantized`."""
        # Who calls the layer goes on with what was written: a later error must not take it back.
        self.__dict__.pop("_rollback", None)
        if self._is_replayed(weight, x):
            arrays = (weight, x) if bias is None else (weight, x, bias)
            y = self._replay(*arrays)
            if y is not None:
                return y
        owner = type(self).__name__
        return ops.multiply(weight, self._bound_layout(), x, bias, owner, "input_dims")

    def _is_replayed(self, weight: mx.array, x: Any) -> bool:
        """Return whether the host takes longer than the GPU for x, if nothing traces the call.

        Where no kernel computes, MLX would fuse its own operations, and it divides by zero where it
        fuses those of empty arrays (0.32.4 on CUDA).
        """
        return (
            type(x) is mx.array
            and 0 < x.size <= tuned.REPLAYED_ROWS * self._pattern.shape[1]
            and _on_gpu()
            and weight.size > 0
            and weight.dtype in tuned.KERNEL_DTYPES
            and self._emptied is None
        )

    @property
    def _replay(self) -> Replay:
        """The product with the layer's pattern, which MLX replays."""
        replay = self.__dict__.get("_replayed")
        if replay is None:
            layout, owner = self._pattern.layout, type(self).__name__

            def multiply(weight: mx.array, x: mx.array, bias: mx.array | None = None) -> mx.array:
                return ops.multiply(weight, layout, x, bias, owner, "input_dims")

            self.__dict__["_replayed"] = replay = Replay(multiply)
        return replay

    def _multiply_quantized(
        self, matrix: tuple[mx.array, mx.array, mx.array], x: mx.array, bias: mx.array | None = None
    ) -> mx.array:
        """Return ``x Aᵀ + bias`` for the packed values, scales and biases of A."""
        self.__dict__.pop("_rollback", None)  # as above
        owner, layout = type(self).__name__, self._bound_layout()
        return ops.multiply_quantized(*matrix, layout, x, bias, owner, "input_dims")

    def _bound_layout(self) -> Layout:
        """Return the layout of the arrays in the module's state.

        They are those of the pattern's own layout, unless a transform has put others in their
        place: ``mx.compile`` puts tracers there, and later the results of its graph.
        """
        if self._emptied is not None:  # asked here too, since a call takes its time
            self._check_whole()
        layout = self._pattern.layout
        if self["indices"] is self.__dict__.get("_laid_out") or not transforming():
            return layout
        return layout.with_arrays(self["_layout"])

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
        self.__dict__.pop("_replayed", None)
        self.forget_errors()

    def forget_errors(self) -> None:
        """Drop what surgery said of the layer: its blocks or its values are others now."""
        for name in ("weight_error", "output_error"):
            self.__dict__.pop(name, None)

    def _extra_repr(self) -> str:
        pattern = self._pattern
        dims = f"input_dims={self.input_dims}, output_dims={self.output_dims}"
        stored = f"density={pattern.density:.3g}, blocks={pattern.n_blocks}"
        if self._emptied is not None:
            stored = "emptied"
        return f"{dims}, block_size={pattern.block_size}, {stored}, bias={'bias' in self}"

    def __setattr__(self, key: str, value: Any) -> None:
        # MLX takes what is no array for an attribute, and drops the array of that name. For a bias
        # that is how to drop it.
        if (
            "_layout" in self
            and isinstance(self.get(key), mx.array)
            and not (key == "bias" and value is None)
        ):
            check_array(type(self).__name__, key, value)
        super().__setattr__(key, value)

    # load_weights, update and apply write into a module item by item, through __setitem__, in any
    # order. Each item is checked by itself, since any valid indptr goes with any valid indices.

    def __setitem__(self, key: str, value: Any) -> None:
        current = self.get(key)
        if "_layout" not in self or key[0] == "_" or not isinstance(current, mx.array):
            super().__setitem__(key, value)
            return
        if isinstance(value, mx.array) and value.shape == (0,) != current.shape:
            self._empty(key, value)
            return
        if self._emptied is not None and key in self._emptied.shapes:
            self._refill(self._emptied, key, value)
            return
        rollback = self.__dict__.setdefault("_rollback", Rollback())
        rollback.begin(key)
        try:
            value = self._checked(key, value, current.shape)
        except (TypeError, ValueError):
            replaced = dict(rollback.replaced())
            for name, previous in replaced.items():
                super().__setitem__(name, previous)
            if any(name in replaced for name in _INDICES):  # tracers, which cannot be read, stay
                self._follow_indices()
            raise
        if key in (*_INDICES, *BLOCKWISE):  # a bias goes with every pattern
            rollback.note(key, current)
        super().__setitem__(key, value)
        if key in _INDICES:
            self._follow_indices()

    def _empty(self, key: str, nothing: mx.array) -> None:
        """Let go of an array, and of the pattern where it is an index array."""
        emptied = self._emptied or Emptied()
        self.__dict__["_emptied"] = emptied
        self.__dict__.pop("_rollback", None)  # nothing that was let go of comes back
        for name in _INDICES if key in _INDICES else (key,):
            emptied.shapes[name] = self[name].shape
            super().__setitem__(name, nothing)
        if key in _INDICES:
            super().__setitem__("_layout", {})
            for name in ("_laid_out", "_replayed"):
                self.__dict__.pop(name, None)
            # Only its sizes are needed from now on: an array is held by whatever reads its memory.
            empty = np.zeros(self._pattern.grid[0] + 1, np.int32), np.zeros(0, np.int32)
            sizes = self._pattern.shape, self._pattern.block_size
            self.__dict__["_pattern"] = CSRPattern(*empty, *sizes)

    def _refill(self, emptied: Emptied, key: str, value: Any) -> None:
        """Take an array that an emptied layer waits for. The last one makes the layer whole."""
        if isinstance(value, mx.array) and _is_nothing(value):
            emptied.arrays.pop(key, None)  # emptied again
            return
        new_pattern = "indices" in emptied.shapes
        shape = emptied.shapes[key]
        if new_pattern and key in BLOCKWISE and isinstance(value, mx.array):
            shape = (*value.shape[:1], *shape[1:])  # of any number of blocks
        try:
            emptied.arrays[key] = self._checked(key, value, shape)
            if emptied.missing():
                return
            pattern = self._refilled({**self, **emptied.arrays}) if new_pattern else None
        except (TypeError, ValueError):
            emptied.arrays.clear()
            raise
        del self.__dict__["_emptied"]
        for name, array in emptied.arrays.items():
            super().__setitem__(name, array)
        if pattern is not None:
            self._lay_out(pattern)

    def _refilled(self, arrays: dict[str, mx.array]) -> CSRPattern:
        """Return the pattern of arrays that are right one by one, if they go together."""
        owner, n_blocks = type(self).__name__, arrays["indices"].size
        check_indptr(owner, check_indices(owner, "indptr", arrays["indptr"]), n_blocks)
        for name in BLOCKWISE:
            if name in arrays and arrays[name].shape[0] != n_blocks:
                raise ValueError(
                    f"[{owner}] {name} has {arrays[name].shape[0]} blocks, indices has {n_blocks}"
                )
        sizes = self._pattern.shape, self._pattern.block_size
        return CSRPattern(arrays["indptr"], arrays["indices"], *sizes)

    def _checked(self, key: str, value: Any, shape: tuple[int, ...]) -> mx.array:
        """Return the array to store as ``key``, or raise."""
        owner, current = type(self).__name__, self[key]
        check_array(owner, key, value)
        if value.shape != shape:
            hint = f" {RESTORE}" if key in BLOCKWISE and value.shape[1:] == shape[1:] else ""
            raise ValueError(
                f"[{owner}] {key} must be an array of shape {shape}, got {value.shape}{hint}"
            )
        if key in ("weight", "scales", "biases"):
            check_block_dtype(owner, value.dtype, self.block_size)
        if key not in _INDICES or value is current:
            return value
        try:
            mx.eval(value)  # indices are checked on the host, when they are written
        except ValueError as error:
            raise ValueError(
                f"[{owner}] {key} cannot be read while a transform is tracing it: leave the "
                "pattern out, by passing model.trainable_parameters()"
            ) from error
        if mx.issubdtype(value.dtype, mx.inexact):
            if value.shape == current.shape and _is_rounded(value, current):
                return current  # a cast of all parameters, or an average over models of one pattern
            raise TypeError(
                f"[{owner}] {key} must be integers, got {value.dtype} that are not the pattern's: "
                "leave the pattern out, by model.apply(f, nn.Module.trainable_parameter_filter) or "
                "model.update(tree_map(f, model.trainable_parameters()))"
            )
        host = check_indices(owner, key, value)
        if key == "indptr":
            waits = self._emptied is not None and "indices" in self._emptied.shapes
            check_indptr(owner, host, int(host[-1]) if waits else self._pattern.n_blocks)
        else:
            check_range(owner, key, host, self._pattern.grid[1])
        return value if value.dtype == mx.int32 else mx.array(host)

    def _follow_indices(self) -> None:
        """Make the pattern and its layout those of ``indptr`` and ``indices``, unless emptied."""
        if not self["_layout"]:
            return
        shape, block_size = self._pattern.shape, self._pattern.block_size
        pattern = CSRPattern(self["indptr"], self["indices"], shape, block_size)
        if pattern != self._pattern:
            self._lay_out(pattern)

    def apply(
        self,
        map_fn: Callable[[mx.array], mx.array],
        filter_fn: Filter | None = None,
    ) -> nn.Module:
        """Map the parameters, as ``nn.Module.apply`` does, but never ``indptr`` and ``indices``.

        The ``apply`` of a parent maps them too: pass it a ``filter_fn``.
        """
        return super().apply(map_fn, without_indices(filter_fn))

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_rollback", "_laid_out", "_replayed")
        return {key: value for key, value in self.__dict__.items() if key not in derived}


def _on_gpu() -> bool:
    return mx.default_device().type is mx.gpu  # "==" of these enums takes longer


class Emptied:
    """What an emptied layer waits for: nothing enters it before all of it is there and fits.

    Attributes:
        shapes: What was emptied, and its shape before.
        arrays: What has been written since.
    """

    def __init__(self):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.arrays: dict[str, mx.array] = {}

    def missing(self) -> list[str]:
        """Return the names of arrays that have not been written yet."""
        return [name for name in self.shapes if name not in self.arrays]

    def reason(self) -> str:
        """Say what happened, and what helps."""
        return (
            "the layer was emptied: mx.array([]) was written into it, as mlx_lm.utils.save does "
            f"with the model that it saves; write {', '.join(self.missing())} again, for example "
            "by load_weights(..., strict=False)"
        )


class Rollback:
    """What the latest writes into a module replaced, to be put back if one of them is refused.

    ``update`` writes one array after another and does not say where it begins or ends. Wrong arrays
    are often noticed at the second one, when the first one is already in the module; old weights on
    half of a new pattern would compute without an error. So the writes since the last call of the
    layer, or since one name was written for the second time, count as one, and an error in it takes
    all of it back.

    References to values are weak, so what nobody else holds does not come back. Held by the module,
    the weights before each step of an optimizer would live on beside the new ones. ``load_weights``
    holds all that it replaces.
    """

    def __init__(self):
        self._references: dict[str, Callable[[], mx.array | None]] = {}

    def begin(self, key: str) -> None:
        """Begin anew if ``key`` was written before: it belongs to another load then."""
        if key in self._references:
            self._references.clear()

    def note(self, key: str, replaced: mx.array) -> None:
        """Remember what a write of ``key`` is about to replace."""
        self._references[key] = (lambda: replaced) if key in _INDICES else weakref.ref(replaced)

    def replaced(self) -> Iterator[tuple[str, mx.array]]:
        """Yield what was replaced, by name, as far as somebody holds it."""
        for key, reference in self._references.items():
            if (array := reference()) is not None:
                yield key, array


def without_indices(filter_fn: Filter | None) -> Filter:
    """Return a filter for ``apply`` that leaves the patterns out: by default, of all parameters."""
    keep = filter_fn or nn.Module.valid_parameter_filter

    def filtered(module: nn.Module, key: str, value: Any) -> bool:
        is_index = isinstance(module, PatternModule) and key in _INDICES
        return not is_index and keep(module, key, value)

    return filtered


def _is_nothing(value: mx.array) -> bool:
    """Return whether an array is ``mx.array([])``, or a cast of it: index arrays are integers."""
    return value.shape == (0,) and mx.issubdtype(value.dtype, mx.floating)


def _is_rounded(value: mx.array, current: mx.array) -> bool:
    """Return whether floats are an index array that was cast, or averaged with itself."""
    # Compared on the host, once, as everything that is written into the module is.
    for dtype in (value.dtype, mx.float16, mx.bfloat16):
        if mx.array_equal(value, current.astype(dtype).astype(value.dtype)).item():
            return True
    if value.dtype not in (mx.float32, mx.float64):
        return False
    numbers, exact = np.array(value), np.array(current)
    return bool(np.all(np.abs(numbers - exact) <= _AVERAGED * exact))


def check_layer_pattern(owner: str, pattern: CSRPattern, shape: Sequence[int]) -> None:
    """Raise unless ``pattern`` is one of a weight of ``shape``, ``(output_dims, input_dims)``."""
    check_pattern(owner, pattern)
    check_dims(owner, shape)
    if pattern.shape != tuple(shape):
        raise ValueError(
            f"[{owner}] pattern has shape {pattern.shape}, "
            f"expected (output_dims, input_dims) = {tuple(shape)}"
        )


def carry_mode(source: nn.Module, layer: _Layer) -> _Layer:
    """Freeze in ``layer`` what is frozen in ``source``, and put it in the same training mode."""
    layer.freeze(keys=[key for key in ("weight", "bias") if key in source._no_grad])
    layer.train(source.training)
    return layer


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
