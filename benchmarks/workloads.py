"""What is measured: each workload makes its own operands and knows its right results.

Operands are whole numbers, small enough that every sum is exact in the workload's dtype, whatever
its order. So results are compared for equality. Needs nothing but NumPy: every peer's process reads
workloads from JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np

Arrays: TypeAlias = "dict[str, np.ndarray]"


@dataclass(frozen=True)
class Layer:
    """A square ``BlockSparseLinear`` without bias, or what a peer has in its place.

    Args:
        features: Input and output features.
        block_size: Side of the blocks.
        density: Stored fraction, rounded to a whole number of blocks.
        rows: Rows of x.
        dtype: "float32", "bfloat16", "float16" or "float64".
        step: "forward", or "training": the product, and the gradients of weight and x.
    """

    features: int
    block_size: int
    density: float
    rows: int
    dtype: str = "float32"
    step: str = "forward"

    @property
    def name(self) -> str:
        return (
            f"{self.step} {self.features}, B = {self.block_size}, density {self.density:g}, "
            f"{self.rows} rows, {self.dtype}"
        )

    @property
    def dense(self) -> tuple:
        """What a dense layer's cost depends on."""
        return (self.features, self.rows, self.dtype, self.step)

    def arrays(self) -> Arrays:
        """Return ``mask`` of the stored blocks, ``weight`` with its zeros, ``x`` and ``target``."""
        rng = np.random.default_rng(1)
        n, size = self.features // self.block_size, (self.features, self.features)
        mask = draw_mask(rng, (n, n), self.density)
        weight = rng.choice(np.array([-1, 1], np.float32), size)
        weight *= np.kron(mask, np.ones((self.block_size, self.block_size), bool))
        draw = lambda: rng.integers(-1, 2, (self.rows, self.features)).astype(np.float32)  # noqa: E731
        return {"mask": mask, "weight": weight, "x": draw(), "target": draw()}

    def expected(self, arrays: Arrays) -> list[np.ndarray]:
        """Return the product, and of training also the gradients of stored values and of x."""
        weight, x, target = arrays["weight"], arrays["x"], arrays["target"]
        y = x @ weight.T
        if self.step == "forward":
            return [y]
        return [y, (target.T @ x)[weight != 0], target @ weight]

    def held(self, arrays: Arrays) -> int:
        """Return the bytes of stored values, CSR indices, x, results and gradients."""
        n_rows, of_x = arrays["mask"].shape[0], self.rows * self.features * self._item
        n_bytes = self._values(arrays) + (int(arrays["mask"].sum()) + n_rows + 1) * 4 + of_x
        return n_bytes + self.made(arrays) + of_x * (self.step == "training")  # the target

    def made(self, arrays: Arrays) -> int:
        """Return the bytes of results and gradients."""
        of_x, training = self.rows * self.features * self._item, self.step == "training"
        return of_x + (of_x + self._values(arrays)) * training

    def _values(self, arrays: Arrays) -> int:
        return int(arrays["mask"].sum()) * self.block_size**2 * self._item

    @property
    def _item(self) -> int:
        return {"float32": 4, "float64": 8}.get(self.dtype, 2)


@dataclass(frozen=True)
class Array:
    """An unstructured sparse array times dense columns, ``A @ x``, float32.

    Args:
        size: Rows and columns of A.
        per_row: Stored values a row, in the mean.
        lengths: "equal" rows, or "skewed": lengths fall as a power law, as in graphs.
        columns: Columns of x.
        step: As in :class:`Layer`.
    """

    size: int
    per_row: int
    lengths: str
    columns: int
    step: str = "forward"

    @property
    def name(self) -> str:
        return (
            f"{self.step} of a {self.size} x {self.size} array, {self.per_row} values a row, "
            f"{self.lengths} rows, {self.columns} columns"
        )

    def arrays(self) -> Arrays:
        """Return ``indptr``, ``indices``, ``data``, ``x`` and ``target``."""
        rng = np.random.default_rng(2)
        lengths = np.full(self.size, self.per_row)
        if self.lengths == "skewed":
            weights = 1 / np.arange(1, self.size + 1) ** 0.8
            lengths = np.maximum(1, weights / weights.sum() * self.size * self.per_row)
            lengths = rng.permutation(np.minimum(lengths, self.size).astype(np.int64))
        row = np.repeat(np.arange(self.size), lengths)
        flat = np.unique(row * self.size + rng.integers(0, self.size, row.size))
        row, col = flat // self.size, flat % self.size
        draw = lambda shape: rng.integers(-1, 2, shape).astype(np.float32)  # noqa: E731
        shape = (self.size, self.columns) if self.columns > 1 else (self.size,)
        return {
            "indptr": np.searchsorted(row, np.arange(self.size + 1)).astype(np.int32),
            "indices": col.astype(np.int32),
            "data": rng.choice(np.array([-1, 1], np.float32), row.size),
            "x": draw(shape),
            "target": draw(shape),
        }

    def expected(self, arrays: Arrays) -> list[np.ndarray]:
        """Return the product, and of training also the gradients of data and of x."""
        row, col = rows_of(arrays["indptr"]), arrays["indices"]
        data, x, target = arrays["data"], arrays["x"], arrays["target"]
        y = sum_at(row, data, x, col)
        if self.step == "forward":
            return [y]
        gradient = np.zeros(data.size, np.float32)
        for of_y, of_x in zip(columns_of(target), columns_of(x), strict=True):
            gradient += of_y[row] * of_x[col]
        return [y, gradient, sum_at(col, data, target, row)]

    def held(self, arrays: Arrays) -> int:
        """Return the bytes of stored values, CSR indices, x, results and gradients."""
        n_bytes = sum(arrays[name].nbytes for name in ("indptr", "indices", "data", "x"))
        return n_bytes + self.made(arrays) + arrays["x"].nbytes * (self.step == "training")

    def made(self, arrays: Arrays) -> int:
        """Return the bytes of results and gradients."""
        of_x = arrays["x"].nbytes
        return of_x + (of_x + arrays["data"].nbytes) * (self.step == "training")


@dataclass(frozen=True)
class Ising:
    """The transverse-field Ising Hamiltonian of an open chain times a vector, float32.

    Args:
        qubits: Sites n: ``2**n`` rows of ``n + 1`` stored values.
    """

    qubits: int
    step: str = "forward"

    @property
    def name(self) -> str:
        return f"Ising, n = {self.qubits}"

    def arrays(self) -> Arrays:
        """Return ``indptr``, ``indices``, ``data`` of J = 2, h = 1, and a vector ``x``."""
        n, size = self.qubits, 1 << self.qubits
        indices = np.empty((size, n + 1), np.int32)
        data = np.full((size, n + 1), -1, np.float32)
        state = np.arange(size, dtype=np.int32)
        below = np.zeros(size, np.int8)  # set bits below: they clear to smaller columns
        n_set = ((state[:, None] >> np.arange(n)) & 1).sum(axis=1, dtype=np.int8)
        # By rising column: set bits from the highest, the diagonal, clear bits from the lowest.
        indices[state, n_set] = state
        data[state, n_set] = self._diagonal(state)
        for bit in range(n):
            is_set = (state >> bit & 1).astype(bool)
            place = np.where(is_set, n_set - 1 - below, n_set + 1 + (bit - below))
            indices[state, place] = state ^ (1 << bit)
            below += is_set
        return {
            "indptr": (np.arange(size + 1) * (n + 1)).astype(np.int32),
            "indices": indices.reshape(-1),
            "data": data.reshape(-1),
            "x": np.random.default_rng(3).integers(-2, 3, size).astype(np.float32),
        }

    def _diagonal(self, state: np.ndarray) -> np.ndarray:
        unequal = (state ^ state >> 1) & ((1 << (self.qubits - 1)) - 1)
        count = ((unequal[:, None] >> np.arange(self.qubits)) & 1).sum(axis=1)
        return (-2.0 * (self.qubits - 1 - 2 * count)).astype(np.float32)

    def expected(self, arrays: Arrays) -> list[np.ndarray]:
        """Return H x, site by site, without the stored matrix."""
        x, state = arrays["x"], np.arange(1 << self.qubits, dtype=np.int32)
        y = self._diagonal(state) * x
        for bit in range(self.qubits):
            y -= x[state ^ (1 << bit)]
        return [y]

    def held(self, arrays: Arrays) -> int:
        """Return the bytes of stored values, indices, x and the result."""
        return sum(array.nbytes for array in arrays.values()) + self.made(arrays)

    def made(self, arrays: Arrays) -> int:
        """Return the bytes of the result."""
        return arrays["x"].nbytes


@dataclass(frozen=True)
class Build:
    """Making a sparse array, float32.

    Args:
        what: "from coordinates": canonical CSR from triplets in random order;
            "from CSR, one product": an array of its parts, and a first ``A @ x``;
            "transpose": canonical CSR of the transpose of an array not used before;
            "from dense": the stored values of a dense array.
        size: Rows and columns.
        per_row: Stored values a row.
        block_size: Side of the blocks, of "from dense" alone.
    """

    what: str
    size: int
    per_row: int
    block_size: int = 1

    @property
    def name(self) -> str:
        blocks = f", blocks of {self.block_size}" if self.block_size > 1 else ""
        return f"{self.what}, {self.size} x {self.size}, {self.per_row} values a row{blocks}"

    def arrays(self) -> Arrays:
        """Return ``row``, ``col`` and ``data`` of shuffled triplets, the dense ``weight``, or CSR
        and ``x``."""
        if self.what == "from dense":
            layer = Layer(self.size, self.block_size, self.per_row / self.size, 1)
            return {name: layer.arrays()[name] for name in ("mask", "weight")}
        arrays = Array(self.size, self.per_row, "equal", 1).arrays()
        if self.what == "from coordinates":
            order = np.random.default_rng(4).permutation(arrays["data"].size)
            row = rows_of(arrays["indptr"]).astype(np.int32)
            return {
                "row": row[order],
                "col": arrays["indices"][order],
                "data": arrays["data"][order],
                "shape": np.array([self.size, self.size]),
            }
        return {name: arrays[name] for name in ("indptr", "indices", "data", "x")}

    def expected(self, arrays: Arrays) -> list[np.ndarray]:
        """Return ``indptr``, ``indices`` and ``data``, or the product."""
        if self.what == "from CSR, one product":
            row, col = rows_of(arrays["indptr"]), arrays["indices"]
            return [sum_at(row, arrays["data"], arrays["x"], col)]
        if self.what == "from dense":
            row, col = np.nonzero(arrays["mask"])
            block, n = self.block_size, arrays["mask"].shape[0]
            data = arrays["weight"].reshape(n, block, n, block).swapaxes(1, 2)[row, col]
            return [np.searchsorted(row, np.arange(n + 1)), col, data.reshape(-1)]
        if self.what == "transpose":
            row, col = arrays["indices"], rows_of(arrays["indptr"])
        else:
            row, col = arrays["row"], arrays["col"]
        order = np.lexsort((col, row))
        indptr = np.searchsorted(row[order], np.arange(self.size + 1))
        return [indptr, col[order], arrays["data"][order]]

    def held(self, arrays: Arrays) -> None:
        """Return nothing: much of the work is on the host, where MLX counts no memory."""

    def made(self, arrays: Arrays) -> None:
        """Return nothing, likewise."""


@dataclass(frozen=True)
class Call:
    """``CALLS`` calls that are built and not evaluated: what the host does for one product.

    Args:
        what: "layer": a layer of 1024 features with bias, blocks of 32, density 0.1; "array":
            ``A @ x`` with 4096 rows of 16 values.
        rows: Rows of the layer's x, or columns of the array's.
    """

    what: str
    rows: int
    step: str = "forward"

    @property
    def name(self) -> str:
        return f"{CALLS} calls of a {self.what}, {self.rows} rows"

    @property
    def operands(self) -> Layer | Array:
        """The workload whose product is built."""
        if self.what == "layer":
            return Layer(1024, 32, 0.1, self.rows)
        return Array(4096, 16, "equal", self.rows)

    def arrays(self) -> Arrays:
        """Return the operands."""
        return self.operands.arrays()

    def expected(self, arrays: Arrays) -> list[np.ndarray]:
        """Return nothing: nothing is computed."""
        return []

    def held(self, arrays: Arrays) -> None:
        """Return nothing."""

    def made(self, arrays: Arrays) -> None:
        """Return nothing."""


CALLS = 1000

Workload: TypeAlias = "Layer | Array | Ising | Build | Call"
KINDS: dict[str, type] = {
    "layer": Layer,
    "array": Array,
    "ising": Ising,
    "build": Build,
    "call": Call,
}


def to_json(workload: Workload) -> dict[str, Any]:
    """Return the workload as plain data."""
    (kind,) = [name for name, kind in KINDS.items() if isinstance(workload, kind)]
    return {"kind": kind, **asdict(workload)}


def from_json(data: dict[str, Any]) -> Workload:
    """Return the workload that :func:`to_json` wrote."""
    return KINDS[data["kind"]](**{key: value for key, value in data.items() if key != "kind"})


def draw_mask(rng: np.random.Generator, grid: tuple[int, int], density: float) -> np.ndarray:
    """Return which blocks of a grid are stored: about as many in each block-row."""
    n_rows, n_cols = grid
    total = max(1, round(density * n_rows * n_cols))
    counts = np.full(n_rows, total // n_rows)
    counts[: total % n_rows] += 1
    mask = np.zeros(grid, bool)
    for row, count in enumerate(rng.permutation(counts)):
        mask[row, rng.permutation(n_cols)[:count]] = True
    return mask


def rows_of(indptr: np.ndarray) -> np.ndarray:
    """Return the row of each stored value."""
    return np.repeat(np.arange(indptr.size - 1), np.diff(indptr))


def sum_at(place: np.ndarray, data: np.ndarray, x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return y[place(j)] = sum of data[j] x[index(j)], column by column, in float64."""
    y = [np.bincount(place, data * column[index], x.shape[0]) for column in columns_of(x)]
    return np.stack(y, axis=-1, dtype=np.float32, casting="same_kind").reshape(x.shape)


def columns_of(x: np.ndarray) -> np.ndarray:
    """Return the columns of x, one after the other in memory; a vector is one column."""
    return np.ascontiguousarray(x.reshape(x.shape[0], -1).T)


# The grids: full ones for choices of the command line, and the sets that run without any.

AXES: dict[str, Sequence[Any]] = {
    "features": (1024, 4096),
    "block_size": (1, 4, 8, 16, 32, 64),
    "density": (0.01, 0.05, 0.1, 0.25, 0.5),
    "rows": (1, 16, 256, 1024),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "step": ("forward", "training"),
}


def layers(**chosen: Sequence[Any] | None) -> list[Workload]:
    """Return the grid of layers over ``AXES``, or over the values chosen for some of them."""
    axes = [chosen.get(name) or values for name, values in AXES.items()]
    return [Layer(**dict(zip(AXES, values, strict=True))) for values in product(*axes)]


def default_layers() -> list[Workload]:
    """Return lines through the grid: what a quarter of an hour on two cores allows."""
    base: dict[str, Sequence[Any]] = {
        "features": [1024],
        "block_size": [32],
        "density": [0.1],
        "rows": [256],
        "dtype": ["float32"],
    }
    sizes, ends = [8, 16, 32, 64], [0.1, 0.5]
    grids = (
        {"block_size": None, "density": None},
        {"density": [0.02, 1.0]},
        {"block_size": [16, 32], "rows": [1, 4, 16, 64, 1024]},
        {"features": [1152], "block_size": [12, 24], "density": ends},
        {"block_size": sizes, "density": ends, "rows": [1, 16]},
        {"features": [4096], "block_size": sizes, "density": ends, "rows": [1, 16]},
        {"features": [4096], "block_size": [16, 32], "density": ends},
        {"dtype": ["bfloat16", "float16"], "density": ends, "rows": [1, 16, 256]},
        {"dtype": ["bfloat16"], "block_size": [8], "rows": [1, 16, 256]},
        {"dtype": ["float64"], "density": ends},
    )
    return [workload for grid in grids for workload in layers(**{**base, **grid})]


def quick_layers() -> list[Workload]:
    """Return a few layers, which take seconds."""
    return layers(
        features=[1024], block_size=[8, 32], density=[0.1], rows=[1, 64], dtype=["float32"]
    )


def arrays(columns: Sequence[int] | None = None) -> list[Workload]:
    """Return products of unstructured arrays."""
    return [
        Array(size, 16, lengths, n, step)
        for size in (1 << 12, 1 << 16)
        for lengths in ("equal", "skewed")
        for n, step in product(columns or (1, 16, 256), ("forward", "training"))
    ]


def ising(qubits: Sequence[int] | None = None) -> list[Workload]:
    """Return the Ising products of n = 8, 10, ..., 22, or of the n given."""
    return [Ising(n) for n in qubits or range(8, 23, 2)]


def build() -> list[Workload]:
    """Return the ways to make an array."""
    return [
        Build("from coordinates", 1 << 16, 16),
        Build("from CSR, one product", 1 << 16, 16),
        Build("transpose", 1 << 16, 16),
        Build("from dense", 2048, 32),
        Build("from dense", 2048, 256, block_size=32),
    ]


def calls() -> list[Workload]:
    """Return the calls that are built."""
    return [Call(what, rows) for what in ("layer", "array") for rows in (1, 64)]
