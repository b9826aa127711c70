"""Checks of arguments: of chains, Hamiltonians, states, and the numbers beside them.

``owner`` is the public function that the user called. Each check raises on the host, and returns
the argument in the form that the caller needs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import check_rectangular, check_size, shown
from mlx_sparse_nn.core.transforms import is_traced, traces_every_shape, transforming
from mlx_sparse_nn.physics.parameters import read
from mlx_sparse_nn.physics.precision import epsilon, largest_part, pairwise_sum
from mlx_sparse_nn.physics.units import Scaled, in_own_unit

Values: TypeAlias = "float | Sequence[float | mx.array] | np.ndarray | mx.array"
Pairs: TypeAlias = "Sequence[Sequence[int]] | np.ndarray"


def check_chain(owner: str, n_qubits: int, periodic: bool) -> tuple[int, int]:
    """Return the numbers of sites and bonds of an open chain or a ring, or raise."""
    n_qubits = check_size(owner, "n_qubits", n_qubits, minimum=1)
    check_flag(owner, "periodic", periodic)
    if periodic and n_qubits < 3:
        raise ValueError(f"[{owner}] n_qubits must be at least 3 for a ring, got {n_qubits}")
    return n_qubits, n_qubits if periodic else n_qubits - 1


def check_flag(owner: str, name: str, value: bool) -> None:
    """Raise unless ``value`` is true or false itself: of any other object, Python says which."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"[{owner}] {name} must be True or False, got {shown(value)}")


def check_bonds(owner: str, bonds: Pairs, n_qubits: int) -> list[tuple[int, int]]:
    """Return bonds as pairs of different sites, each once, or raise."""
    if _is_unordered(bonds) or not (hasattr(bonds, "__iter__") and hasattr(bonds, "__len__")):
        raise TypeError(f"[{owner}] bonds must be a list of pairs of sites, got {shown(bonds)}")
    checked, first = [], {}
    for index, bond in enumerate(bonds):
        name = f"bonds[{index}]"
        i, j = check_sites(owner, name, bond, 2, n_qubits)
        before = first.setdefault(frozenset((i, j)), index)
        if before != index:
            raise ValueError(
                f"[{owner}] {name} {(i, j)} repeats bonds[{before}]; give it once, with the sum of "
                "both couplings"
            )
        checked.append((i, j))
    return checked


def check_sites(owner: str, name: str, sites: Any, size: int, n_qubits: int) -> tuple[int, ...]:
    """Return ``size`` different sites of 0 to ``n_qubits - 1``, or raise."""
    of_size = "1 site" if size == 1 else f"{size} sites"
    if _is_unordered(sites) or isinstance(sites, mx.array) or not hasattr(sites, "__len__"):
        raise TypeError(f"[{owner}] {name} must be a tuple of {of_size}, got {sites!r}")
    if len(sites) != size:
        raise ValueError(f"[{owner}] {name} must name {of_size}, got {sites!r}")
    checked = tuple(check_index(owner, f"a site of {name}", s, n_qubits - 1) for s in sites)
    if len(set(checked)) < size:
        raise ValueError(f"[{owner}] {name} must name different sites, got {checked}")
    return checked


def _is_unordered(values: Any) -> bool:
    """Return whether values have no order of their own, or are the letters of a word."""
    return isinstance(values, str | Mapping | Set)


def check_dtype(owner: str, dtype: mx.Dtype) -> None:
    """Raise unless ``dtype`` is a floating type or complex64."""
    if not isinstance(dtype, mx.Dtype) or not mx.issubdtype(dtype, mx.inexact):
        raise TypeError(f"[{owner}] dtype must be a floating type or complex64, got {dtype!r}")


def check_number(owner: str, name: str, values: Values) -> float:
    """Return one finite real number, or raise."""
    return float(_real_numbers(owner, name, values, (), "a number"))


def check_values(owner: str, name: str, values: Values, size: int, of: str) -> np.ndarray:
    """Return a number, repeated, or ``size`` numbers as ``(size,)`` float64, or raise."""
    expected = f"a number or one for each of {size} {of}"
    return np.broadcast_to(_real_numbers(owner, name, values, (size,), expected), (size,))


def check_parameter(
    owner: str, name: str, values: Values, size: int, of: str, dtype: mx.Dtype
) -> mx.array:
    """Return a number as ``()`` or ``size`` numbers as ``(size,)`` MLX array, or raise.

    An MLX array, or one of the numbers, may be a tracer: it stays lazy, and what it holds is not
    looked at.
    """
    expected = f"a number or one for each of {size} {of}"
    if isinstance(values, mx.array):
        return _real_array(owner, name, values, (size,), expected, dtype)
    if isinstance(values, list | tuple) and has_arrays(values):
        if len(values) != size:
            raise ValueError(f"[{owner}] {name} must be {expected}, got {len(values)}")
        scalars = [
            check_scalar(owner, f"{name}[{i}]", value, dtype) for i, value in enumerate(values)
        ]
        return mx.stack([s if isinstance(s, mx.array) else mx.array(s, dtype) for s in scalars])
    return mx.array(_real_numbers(owner, name, values, (size,), expected), dtype=dtype)


def has_arrays(values: Any) -> bool:
    """Return whether values are an MLX array, or a list that holds any."""
    if isinstance(values, list | tuple):
        return any(isinstance(value, mx.array) for value in values)
    return isinstance(values, mx.array)


def check_scalar(owner: str, name: str, value: Any, dtype: mx.Dtype) -> float | mx.array:
    """Return one finite number, or a scalar of MLX, which may be a tracer, as ``dtype``; or raise.

    What an MLX array holds is not looked at.
    """
    if isinstance(value, mx.array):
        return _real_array(owner, name, value, (), "a number", dtype)
    return check_number(owner, name, value)


def _real_array(
    owner: str,
    name: str,
    array: mx.array,
    shape: tuple[int, ...],
    expected: str,
    dtype: mx.Dtype,
) -> mx.array:
    """Return real numbers of shape ``()`` or ``shape`` as ``dtype``, or raise."""
    is_number = array.dtype != mx.bool_ and mx.issubdtype(array.dtype, mx.number)
    if not is_number or mx.issubdtype(array.dtype, mx.complexfloating):
        raise TypeError(f"[{owner}] {name} must be real numbers, got {array.dtype}")
    if array.shape not in ((), shape):
        raise ValueError(f"[{owner}] {name} must be {expected}, got shape {array.shape}")
    return array.astype(dtype)


def _real_numbers(
    owner: str, name: str, values: Values, shape: tuple[int, ...], expected: str
) -> np.ndarray:
    """Return finite real numbers of shape ``()`` or ``shape`` as float64, or raise."""
    given: Any = values.tolist() if isinstance(values, mx.array) else values
    array = _of_long_integers(owner, name, check_rectangular(owner, name, given))
    if array.dtype.kind not in "iuf":
        raise TypeError(f"[{owner}] {name} must be real numbers, got {shown(values)}")
    if array.shape not in ((), shape):
        raise ValueError(f"[{owner}] {name} must be {expected}, got shape {array.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"[{owner}] {name} must be finite, got {shown(values)}")
    return array


def _of_long_integers(owner: str, name: str, array: np.ndarray) -> np.ndarray:
    """Return numbers as float64 where some are integers of more than 64 bits, or raise."""
    numbers = array.reshape(-1).tolist() if array.dtype.kind == "O" else []
    if not numbers or any(type(number) not in (int, float) for number in numbers):
        return array
    try:
        return array.astype(np.float64)
    except OverflowError:
        n_bits = max(number.bit_length() for number in numbers if isinstance(number, int))
        raise ValueError(
            f"[{owner}] {name} must be small enough for float64, got an integer of {n_bits} bits"
        ) from None


def check_energies(
    owner: str, h: np.ndarray, j: np.ndarray, g: np.ndarray, dtype: mx.Dtype
) -> None:
    """Raise unless the energies of H fit ``dtype``."""
    check_total(owner, np.concatenate([h, j, g]).tolist(), dtype)


def known_numbers(values: Values, count: int) -> list[float]:
    """Return ``count`` checked numbers, one for all or one each, without those of MLX arrays, which
    may be tracers."""
    if isinstance(values, mx.array):
        return []
    if isinstance(values, list | tuple):
        return [float(value) for value in values if not isinstance(value, mx.array)]
    return np.broadcast_to(np.asarray(values, dtype=np.float64), (count,)).tolist()


def check_total(owner: str, numbers: Sequence[float], dtype: mx.Dtype) -> None:
    """Raise unless the largest energy that terms of such numbers have fits ``dtype``, and unless
    the largest number is one there, with all its digits."""
    total, largest = sum(map(abs, numbers)), max(map(abs, numbers), default=0.0)
    if total > mx.finfo(mx.float32 if dtype == mx.complex64 else dtype).max:
        raise ValueError(
            f"[{owner}] energies of up to {total:.3g} overflow {dtype}; choose a larger unit of "
            "energy"
        )
    if 0 < largest < (2.0**-1022 if dtype == mx.float64 else 2.0**-126):
        raise ValueError(
            f"[{owner}] energies of at most {total:.3g} vanish in {dtype}; choose a smaller unit "
            "of energy"
        )


def check_memory(owner: str, what: str, n_bytes: int) -> None:
    """Raise if ``n_bytes`` are more than the memory of this machine."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > available:
        raise ValueError(
            f"[{owner}] {what} needs {n_bytes / 2**30:,.2f} GiB, "
            f"this machine has {available / 2**30:,.2f} GiB"
        )


def check_hamiltonian(owner: str, H: Any) -> int:
    """Return the dimension of a square Hamiltonian, or raise."""
    made_by = {base.__module__.split(".")[0] for base in type(H).__mro__}
    if made_by & {"numpy", "scipy"} or not (hasattr(H, "shape") and hasattr(H, "__matmul__")):
        if "scipy" in made_by:  # NumPy computes its products, which no transform of MLX can follow
            advice = "mlx_sparse_nn.from_scipy(H) makes a CSRArray of a sparse matrix"
        elif "numpy" in made_by:
            advice = "mx.array(H) makes one of it"
        else:
            advice = "any object with shape whose H @ psi is an mx.array will also do"
        raise TypeError(
            f"[{owner}] H must be a CSRArray, an IsingOperator, a PauliSum or an mx.array, got "
            f"{type(H).__name__}; {advice}"
        )
    shape = tuple(H.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"[{owner}] H must be square, got shape {shape}")
    return shape[0]


def check_product(owner: str, H: Any, psi: mx.array) -> mx.array:
    """Return ``H @ psi``, or raise unless MLX computes it from ``psi``.

    A product that NumPy computes would have the gradient 0, without a word.
    """
    advice = "must be computed by MLX from psi, or mx.grad and its like cannot follow it"
    try:
        product = H @ psi
    except ValueError as error:
        if not str(error).startswith("[eval]"):
            raise
        raise TypeError(f"[{owner}] H @ psi {advice}: it reads the numbers of psi") from error
    if not isinstance(product, mx.array):
        raise TypeError(f"[{owner}] H @ psi must be an mx.array, got {type(product).__name__}")
    if product.shape != psi.shape:
        raise ValueError(f"[{owner}] H @ psi has shape {product.shape}, psi has {psi.shape}")
    if is_traced(psi) and not is_traced(product):
        raise TypeError(f"[{owner}] H @ psi {advice}: it does not depend on psi")
    return product


def check_hermitian(owner: str, H: Any, normals: Callable[[], mx.array]) -> Scaled:
    """Return H in a unit near its norm, or raise unless ``<u|H v> = <H u|v>`` for random vectors.

    They have to agree to rounding.
    """
    u, v = normals(), normals()
    H, Hv = in_own_unit(owner, H, v)
    Hu = H @ u
    difference = mx.abs(pairwise_sum(mx.conjugate(u) * Hv) - pairwise_sum(mx.conjugate(Hu) * v))
    norms = [mx.sqrt(pairwise_sum(mx.abs(a).square())) for a in (u, Hv)]
    difference, *norms = (float(a) for a in (difference, *norms))
    if not np.isfinite([difference, *norms]).all():
        raise ValueError(f"[{owner}] H @ x is not finite")
    if difference > 100 * epsilon(Hv.dtype) * norms[0] * norms[1]:
        raise ValueError(
            f"[{owner}] H is not Hermitian: <u|Hv> and <Hu|v> differ by "
            f"{difference / (norms[0] * norms[1]):.3g} of |u| |Hv| for random u and v"
        )
    return H


def check_state(owner: str, name: str, psi: mx.array, dim: int | None = None) -> mx.array:
    """Return a state of ``(dim,)``, or of any length, as float32, float64 or complex64, or raise.

    What it holds is looked at unless a transform is running.
    """
    return _sized_state(owner, name, psi, dim)[0]


def check_sized_state(
    owner: str, name: str, psi: mx.array, dim: int | None = None
) -> tuple[mx.array, mx.array]:
    """Return a state as :func:`check_state` does, and its largest part, ``()``, or raise.

    It must be traced for one shape.
    """
    _check_array(owner, name, psi)
    check_one_shape(owner, name, psi)
    return _sized_state(owner, name, psi, dim)


def _sized_state(
    owner: str, name: str, psi: mx.array, dim: int | None
) -> tuple[mx.array, mx.array]:
    _check_array(owner, name, psi)
    if psi.ndim != 1 or dim not in (None, psi.size):
        needs = "expected one axis" if dim is None else f"H needs ({dim},)"
        raise ValueError(f"[{owner}] {name} has shape {psi.shape}, {needs}")
    return _check_amplitudes(owner, name, psi)


def check_state_of_sites(owner: str, psi: mx.array) -> tuple[mx.array, mx.array, int]:
    """Return a state of ``(2**n,)``, as :func:`check_sized_state` does, and n, or raise."""
    n = _sites(owner, psi, "(2**n,)", (1,))
    return *_check_amplitudes(owner, "psi", psi), n


def check_columns_of_sites(owner: str, psi: mx.array) -> tuple[mx.array, int]:
    """Return states of ``(2**n,)`` or ``(2**n, k)``, whatever they hold, and n, or raise."""
    return psi, _sites(owner, psi, "(2**n,) or (2**n, k)", (1, 2))


def _sites(owner: str, psi: mx.array, expected: str, ndims: tuple[int, ...]) -> int:
    """Return n of a shape that begins with 2**n, or raise."""
    _check_array(owner, "psi", psi)
    check_one_shape(owner, "psi", psi)
    n = (psi.shape[0] if psi.ndim else 0).bit_length() - 1
    if psi.ndim not in ndims or n < 1 or psi.shape[0] != 1 << n:
        raise ValueError(f"[{owner}] psi has shape {psi.shape}, expected {expected} with n >= 1")
    return n


def _check_array(owner: str, name: str, psi: mx.array) -> None:
    if not isinstance(psi, mx.array):
        raise TypeError(f"[{owner}] {name} must be an mx.array, got {type(psi).__name__}")


def check_one_shape(owner: str, name: str, array: mx.array) -> None:
    """Raise if MLX traces an array for every shape: it cannot tell those of what is made of it."""
    if traces_every_shape() and is_traced(array):
        raise ValueError(
            f"[{owner}] {name} must be traced for one shape, got shapeless=True; leave that out, "
            "and trace it again for another shape"
        )


def _check_amplitudes(owner: str, name: str, psi: mx.array) -> tuple[mx.array, mx.array]:
    """Return amplitudes as float32 or wider, and their largest part, or raise.

    They must not all be zero, and must be finite.
    """
    if not psi.size:
        raise ValueError(f"[{owner}] {name} must not be empty, got shape {psi.shape}")
    psi = psi.astype(mx.result_type(psi, mx.float32))
    return psi, largest_part(psi) if transforming() else check_magnitude(owner, name, psi)


def check_magnitude(owner: str, name: str, psi: mx.array) -> mx.array:
    """Return the largest part of amplitudes, ``()``, or raise if it is zero or not finite."""
    largest = largest_part(psi)
    host = float(largest)
    if not math.isfinite(host):
        raise ValueError(f"[{owner}] {name} must be finite, its largest magnitude is {host}")
    if host == 0:
        raise ValueError(f"[{owner}] {name} must not be zero")
    return largest


def check_index(owner: str, name: str, value: int, last: int) -> int:
    """Return ``value`` as an int of 0 to ``last``, or raise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"[{owner}] {name} must be an integer, got {shown(value)}")
    if not 0 <= value <= last:
        raise ValueError(f"[{owner}] {name} must be in [0, {last}], got {value}")
    return int(value)


def check_axis(owner: str, axis: str) -> None:
    """Raise unless ``axis`` is one of those along which a spin is measured."""
    if axis not in ("z", "x", "y"):
        raise ValueError(f"[{owner}] axis must be 'z', 'x' or 'y', got {shown(axis)}")


def check_times(owner: str, t: Values) -> tuple[np.ndarray, bool]:
    """Return finite times as ``(K,)`` float64, and whether they are more than a number, or raise.

    An MLX array is read.
    """
    if isinstance(t, mx.array):
        read(owner, "t", t)
        host = np.array(t.astype(mx.float32) if t.dtype == mx.bfloat16 else t)
    else:
        given: Any = t
        host = _of_long_integers(owner, "t", check_rectangular(owner, "t", given))
        elements = t if isinstance(t, list | tuple) else []
        if any(isinstance(a, mx.array) for a in elements):
            raise TypeError(
                f"[{owner}] t must be numbers or one mx.array, got {shown(t)}; use mx.stack"
            )
    if host.dtype.kind not in "iuf":
        raise TypeError(f"[{owner}] t must be a number or a sequence of numbers, got {shown(t)}")
    if host.ndim > 1 or not host.size:
        raise ValueError(f"[{owner}] t must be a number or (K,) of them, got shape {host.shape}")
    times = host.astype(np.float64)
    if not np.isfinite(times).all():
        raise ValueError(f"[{owner}] t must be finite, got {t}")
    return times.reshape(-1), host.ndim == 1


def check_tol(owner: str, tol: float, minimum: float = 0.0) -> float:
    """Return a positive tolerance of [minimum, 1), or raise."""
    if isinstance(tol, bool) or not isinstance(tol, int | float | np.floating):
        raise TypeError(f"[{owner}] tol must be a number, got {shown(tol)}")
    if not (minimum <= tol < 1 and tol > 0):
        interval = f"[{minimum:g}, 1)" if minimum else "(0, 1)"
        raise ValueError(f"[{owner}] tol must be in {interval}, got {tol}")
    return float(tol)
