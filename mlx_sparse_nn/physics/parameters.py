"""What a Hamiltonian depends on, as MLX arrays; and what a solver reads of them, or refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.arrays import COOArray, CSRArray
from mlx_sparse_nn.core.transforms import of_numbers, transforming

Rebuild = Callable[[Sequence[mx.array]], Any]


def parameters(H: Any) -> tuple[list[mx.array], Rebuild]:
    """Return the arrays that H is linear in, and the function that makes H of such arrays.

    They are the stored values of a sparse array, a dense array itself, and what an operator of this
    package says by two methods: ``_arrays()``, and ``_with_arrays(arrays)``, the same operator of
    other arrays. Any other object has no arrays, and is made of none: itself.
    """
    if isinstance(H, mx.array):
        return [H], lambda arrays: arrays[0]
    if isinstance(H, CSRArray):
        return [H.data], lambda arrays: CSRArray(arrays[0], H.pattern)
    if isinstance(H, COOArray):
        return [H.data], lambda arrays: COOArray(arrays[0], H.row, H.col, H.shape)
    if hasattr(H, "_arrays") and hasattr(H, "_with_arrays"):
        return list(H._arrays()), H._with_arrays
    return [], lambda arrays: H


@contextmanager
def reading(owner: str, name: str) -> Iterator[None]:
    """Say which argument is meant where ``mx.vmap`` or ``mx.compile`` does not let it be evaluated.

    ``mx.grad`` and ``mx.jvp`` let arrays be evaluated, so a rule has to stand over the caller.
    """
    try:
        yield
    except ValueError as error:
        if "[eval]" not in str(error):
            raise
        raise ValueError(
            f"[{owner}] {name} must hold numbers, got a tracer of mx.vmap or mx.compile; "
            f"call {owner} outside of them"
        ) from None


def read(owner: str, name: str, *arrays: mx.array) -> None:
    """Evaluate arrays, or raise as :func:`reading` does."""
    with reading(owner, name):
        _evaluate(arrays)


def detached(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return copies of arrays that no transform traces.

    MLX keeps all that is computed of a traced array, evaluated or not, until the transform ends.
    """
    _evaluate(arrays)
    return [_detached(a) for a in arrays]


def _evaluate(arrays: Sequence[mx.array]) -> None:
    """Evaluate arrays, which still know what they are made of.

    In a forward rule, MLX (0.32.4) forgets that: what an outer transform derives of the tangent
    would be zero, without a word. In a reverse one it does not.
    """

    def vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        mx.eval(arrays)
        return cotangent

    if not transforming():
        return mx.eval(arrays)
    reverse: Any = mx.custom_function(lambda a: a)
    reverse.vjp(vjp)
    zero = mx.zeros(())
    mx.vjp(reverse, [zero], [zero])


def _detached(a: mx.array) -> mx.array:
    if a.dtype == mx.bfloat16:  # which NumPy does not have
        return mx.view(_detached(mx.view(a, mx.uint16)), mx.bfloat16)
    return mx.array(np.array(a), dtype=a.dtype)


def ruled(
    function: Callable, refusal: str, *, vjp: Callable | None = None, jvp: Callable | None = None
) -> Callable:
    """Return a function of arrays with these rules, a ValueError in place of others and of vmap.

    It reads its arrays, and is computed as outside of a transform, by kernels: to the same bits.
    A rule that reads numbers has to wrap what it computes of them so, without rules: its own
    derivative would be zero otherwise, without a word.
    """

    def refuse(*_: Any) -> Any:
        raise ValueError(refusal)

    out: Any = mx.custom_function(of_numbers(function))
    out.vjp(vjp or refuse)
    out.jvp(jvp or refuse)
    out.vmap(refuse)
    return out


def listed(arrays: Any) -> list[Any]:
    """Return what MLX passes to a rule as a list: it passes a single array as itself."""
    return list(arrays) if isinstance(arrays, list | tuple) else [arrays]


def refuse_derivatives(owner: str, name: str, array: mx.array) -> mx.array:
    """Return a zero, ``()``, to be added to a result whose derivative by ``array`` is not known.

    It raises where one is asked for, and where a transform maps ``array``.
    """
    refusal = f"[{owner}] has no derivative by {name}, and no vmap over it"
    return ruled(lambda a: mx.zeros((), mx.float32), refusal)(array)
