"""The steps of Lanczos' method that ``python -m mlx_sparse_nn check`` computes, on a GPU."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.backends import columns
from mlx_sparse_nn.diagnostics.check_cases import Expected
from mlx_sparse_nn.diagnostics.rounding import tolerance

PRODUCTS = ("recur", "without", "combine")
# Panels, and elements of one: fewer than a group has threads, and more panels than groups share.
SIZES = ((1, 32), (3, 96), (2, 1024), (300, 32))
COLUMNS = 11  # of a basis, of which the kernels take up to 8 at once
FIRST = 2  # column of those that are combined
ROWS = 9  # combinations of them


@dataclass(frozen=True)
class ColumnsCase:
    """A step of the recurrence, two vectors without columns, or combinations of columns.

    Attributes:
        product: One of ``PRODUCTS``.
        n_panels: Of a vector.
        width: Of a panel.
    """

    product: str
    n_panels: int
    width: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """What ``--only`` takes: ``recur-float32-3-96``."""
        return f"{self.product}-{self.dtype}-{self.n_panels}-{self.width}"

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"{self.product}, {self.dtype}, {self.n_panels} panels of {self.width}"

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


class Operands(NamedTuple):
    """What a case is computed from: whole numbers, so small that vectors are exact.

    Attributes:
        basis: ``(P, COLUMNS, W)``.
        x: ``(P, 1, W)``, like ``y`` and ``z``.
        y: What H made of it, say.
        z: Another vector.
        factors: ``(ROWS, COLUMNS - FIRST)``.
    """

    basis: np.ndarray
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    factors: np.ndarray


def columns_cases() -> list[ColumnsCase]:
    """Return what reaches every kernel of a basis."""
    return [ColumnsCase(product, *sizes) for product, sizes in itertools.product(PRODUCTS, SIZES)]


def operands_of(case: ColumnsCase) -> Operands:
    """Draw the operands of a case, the same ones each time."""
    rng, shape = np.random.default_rng(case.seed), (case.n_panels, 1, case.width)

    def whole(*shape: int) -> np.ndarray:
        return rng.integers(-2, 3, shape).astype(np.float32)

    x, y, z = (whole(*shape) for _ in range(3))
    if case.product == "without":  # else the products of sums would be rounded
        x, z = (a * (rng.random(shape) < 4 / x.size) for a in (x, z))
    basis = whole(case.n_panels, COLUMNS, case.width)
    return Operands(basis, x, y, z, whole(ROWS, COLUMNS - FIRST))


def compute(case: ColumnsCase, given: Operands, backend: str) -> mx.array:
    """Return all that the kernels of a backend give, one after the other."""
    basis, x, y, z, factors = map(mx.array, given)
    if case.product == "combine":
        return columns.combine(backend, basis, FIRST, factors).reshape(-1)
    if case.product == "without":
        vectors_and_parts = columns.without(backend, basis, COLUMNS, x, z)
        vectors, numbers = vectors_and_parts[:2], [a.sum() for a in vectors_and_parts[2:]]
    else:
        squares = mx.array([1.0, 3.0, 0.0])  # the norm of x is 2
        dots = columns.recur_dot(backend, y, x, z, squares)
        *vectors, parts, two = columns.recur_rest(backend, y, x, z, squares, dots)
        numbers = [parts.sum(), *two]
    return mx.concatenate([*(v.reshape(-1) for v in vectors), mx.stack(numbers)])


def expected(case: ColumnsCase, given: Operands) -> Expected:
    """Return the same by NumPy in float64, and the error of each element that rounding explains."""
    basis, x, y, z, factors = (a.astype(np.float64) for a in given)
    if case.product == "combine":
        value = np.einsum("rj,pjw->prw", factors, basis[:, FIRST:]).reshape(-1)
        return Expected(value, np.zeros_like(value))
    if case.product == "without":
        a, b = (np.einsum("pjw,pow->j", basis, v) for v in (x, z))
        left = x - np.einsum("j,pjw->pw", a, basis)[:, None]
        last = z - np.einsum("j,pjw->pw", b, basis)[:, None]
        last -= ((x * z).sum() - a @ b) * left
        vectors, numbers = (left, last), [np.square(left).sum(), np.square(last).sum()]
    else:
        known = y / 2 - 2 * z
        along = (x / 2 * known).sum()
        rest = known - along * x / 2
        vectors, numbers = (rest, x / 2), [np.square(rest).sum(), along, 2.0]
    value = np.concatenate([*(v.reshape(-1) for v in vectors), numbers])
    bound = np.zeros_like(value)
    bound[-len(numbers) :] = tolerance(mx.float32, x.size, np.abs(numbers))
    if case.product == "recur":  # of the coefficient of x, and where it takes part
        error = tolerance(mx.float32, x.size, np.abs(x / 2 * known).sum())
        bound[: x.size] = tolerance(mx.float32, 2, np.abs(known) + np.abs(along * x)).reshape(-1)
        bound[: x.size] += error * np.abs(x / 2).reshape(-1)
        bound[-3] += 2 * error * np.abs(x * rest).sum()
        bound[-2] += error
    return Expected(value, bound)
