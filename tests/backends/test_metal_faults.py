"""Faults planted in the Metal kernels are caught: the tests of the kernels can fail.

A fault is a pattern and what stands in its place in a copy of the kernels. It is planted wherever
the pattern matches, one at a time. Some product must then differ from the oracle or fault on the
emulator. Products are the cheapest that reach all template arguments that a kernel ever gets.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from metal_compiler import Variant, arrays_in_memory
from metal_variants import EXCLUDED, skewed, variants
from support import fresh_launches, integers, pattern_of, spoiled, trimmed
from test_quantized_products import whole_blocks

import mlx_sparse_nn
from mlx_sparse_nn import CSRPattern
from mlx_sparse_nn.core.backends import columns, launch, naive, pauli_metal, pauli_naive
from mlx_sparse_nn.core.strings import PauliTerms

FOLDER = Path(mlx_sparse_nn.__file__).parent / "metal"
PRODUCTS = ("spmm", "spmm_t", "sddmm", "qspmm", "qspmm_t")


class Fault(NamedTuple):
    """A fault: what is searched for, and what is put in its place."""

    pattern: str
    instead: str


ARGUMENT = r"((?:[^,()]|\((?:[^()]|\([^()]*\))*\))+)"
BOUNDED = rf"\b(?:min|max)\({ARGUMENT}, {ARGUMENT}\)"
FAULTS = {
    "no barrier": Fault(r"\b(?:threadgroup|simdgroup)_barrier\([^;]*\);", ""),
    "the next block": Fault(r"\bindices\[", "indices[1 + "),
    "the next block of the transpose": Fault(r"\bperm\[", "perm[1 + "),
    "a block too few": Fault(r"\bend = indptr\[([^;]*)\];", r"end = indptr[\1] - 1;"),
    "one element on": Fault(r"(?<=\w) = (x|y|data) \+ ", r" = \1 + 1 + "),
    "the next matrix or panel": Fault(r"\(size_t\)([vp])\b", r"(size_t)(\1 + 1)"),
    "the next panel of a basis": Fault(r"\bp \* stride\b", "(p + 1) * stride"),
    "panels left out": Fault(r"\bp \+= G\b", "p += G + 1"),
    "the next column": Fault(r"\bj \* WIDTH\b", "(j + 1) * WIDTH"),
    "stored one off": Fault(r"\b(\w+)\[([^\]=;]*)\](\s*=\s)(?!\{)", r"\1[1 + \2]\3"),
    "another stride in threadgroup memory": Fault(
        r"(simdgroup_load\([^;]*|store_stage<[^>]*), (LD\w*)\b", r"\1, \2 + 4"
    ),
    "another stride of x": Fault(r"\* n_cols\b", "* (n_cols + 1)"),
    "another stride of y": Fault(r"\* n_rows\b", "* (n_rows + 1)"),
    "the first bound alone": Fault(BOUNDED, r"(\1)"),
    "the second bound alone": Fault(BOUNDED, r"(\2)"),
    "no bound": Fault(
        r"\bif \([\w +*/]+ <=? (?:N|n_valid|n_rows|valid|last|M|R|WIDTH|end\w*)\)", "if (true)"
    ),
    "a sum of the wrong lanes": Fault(r"sum_lanes<1, ", "sum_lanes<2, "),
    "a simdgroup too few": Fault(r"< THREADS / 32\b", "< THREADS / 32 - 1"),
    "the first part of a sum alone": Fault(r"\b([lg]) < n_(?:parts|squares|dots)\b", r"\1 < 1"),
    "added, not taken away": Fault(r"\b(fma|float4)\(-(?=\w)", r"\1("),
    "not over the norm": Fault(r" \* inverse\b", ""),
    "the flips of the next string": Fault(r"\bterms\[4 \* t \+ 4\]", "terms[4 * t + 8]"),
    "the sign of set bits": Fault(r"~j & z", "j & z"),
}
# Faults that change no result, or no test may plant: file, fault, what it takes the place of; why.
LEFT_OUT = {
    ("search.h", "the second bound alone", "min(step, count - found)"): "the search never ends",
    ("qspmm_few.metal", "the second bound alone", "min(ROWS, N - n0)"): "there are no more rows",
    ("sddmm_tiles.metal", "the second bound alone", "min(valid, DEPTH)"): "it multiplies zeros",
    ("sddmm_csr.metal", "the second bound alone", "min(r + lane / WIDTH, R - 1)"): (
        "a longer search finds the same"
    ),
    ("spmm_csr.metal", "the first bound alone", "min(PIECE, n_blocks - cut)"): (
        "no long row begins in the last piece; the sum could pass an int"
    ),
}


class Planted(NamedTuple):
    """One fault at one place of one file."""

    file: str
    fault: str
    start: int
    end: int
    instead: str

    @property
    def replaced(self) -> str:
        return " ".join(_text(self.file)[self.start : self.end].split())

    def __str__(self) -> str:
        line = _text(self.file)[: self.start].count("\n") + 1
        return f"{self.file}:{line}, {self.fault}"


@cache
def _text(file: str) -> str:
    return re.sub(r"//.*", "", (FOLDER / file).read_text(encoding="utf-8"))


FILES = sorted(
    path.name
    for path in FOLDER.iterdir()
    if path.suffix in (".metal", ".h") and path.stem not in EXCLUDED
)
PLANTED = [
    Planted(file, name, m.start(), m.end(), m.expand(fault.instead))
    for file in FILES
    for name, fault in FAULTS.items()
    for m in re.finditer(fault.pattern, _text(file))
]


class Case(NamedTuple):
    """A product of small whole numbers, whose result is exact.

    Attributes:
        pattern: Of the matrix.
        rows: Of x.
        product: One of ``PRODUCTS``.
        n_matrices: How many share the pattern: more than one are mapped.
        bits: Of quantized blocks.
    """

    pattern: CSRPattern
    rows: int
    product: str
    n_matrices: int = 1
    bits: int = 0

    def operands(self) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        """Return the arrays that each matrix has its own of, and those that all share."""
        n_rows, n_cols = self.pattern.shape
        every = (self.n_matrices,)
        x, y = integers((*every, self.rows, n_cols), 2), integers((*every, self.rows, n_rows), 3)
        if self.product == "sddmm":
            return (y, x), ()
        if self.bits:
            data = whole_blocks(self.pattern, 32, self.bits, every)
        else:
            data = (integers((*every, *self.pattern.data_shape), 1),)
            if self.pattern.layout.has_edges:
                data = (spoiled(self.pattern, data[0]),)
        if self.product.endswith("_t"):
            return (*data, y), ()
        return (*data, x), (integers((n_rows,), 4),)

    def compute(self, products: ModuleType, arrays: Sequence, shared: Sequence) -> mx.array:
        product = getattr(products, self.product)
        if self.product == "sddmm":
            return product(self.pattern, *arrays)
        return product(*arrays[:-1], self.pattern, arrays[-1], *shared)

    def actual(self) -> mx.array:
        arrays, shared = self.operands()
        if self.n_matrices == 1:
            return self.compute(mlx_sparse_nn, [a[0] for a in arrays], shared)
        return mx.vmap(lambda *one: self.compute(mlx_sparse_nn, one, shared))(*arrays)

    def expected(self) -> mx.array:
        arrays, shared = self.operands()
        results = [
            self.compute(naive, [a[i] for a in arrays], shared) for i in range(self.n_matrices)
        ]
        return results[0] if self.n_matrices == 1 else mx.stack(results)


class PauliCase(NamedTuple):
    """Sums of Pauli strings, of small whole numbers, times two states each, or their moments.

    Attributes:
        op: "product" or "moments".
        n_qubits: Of a state.
        signs: Of the strings.
        n_sums: How many sums have the same strings.
    """

    op: str
    n_qubits: int
    signs: tuple[int, int, int]
    n_sums: int

    def operands(self) -> tuple[PauliTerms, list[mx.array]]:
        size = 1 << self.n_qubits
        terms = PauliTerms(self.n_qubits, (1, size // 2, size - 1), self.signs)
        shapes = [(3,), (size,), (2, size)] if self.op == "product" else [(2, size)] * 2
        return terms, [integers((self.n_sums, *shape), i) for i, shape in enumerate(shapes)]

    def actual(self) -> mx.array:
        terms, arrays = self.operands()
        if self.op == "moments":
            return pauli_metal.moments(terms, *arrays, real=False)
        return pauli_metal.product(terms, *arrays)

    def expected(self) -> mx.array:
        terms, arrays = self.operands()
        return mx.array(getattr(pauli_naive, self.op)(terms, *map(np.array, arrays)))


PAULI_CASES = {
    kernel: [
        PauliCase(op, 4, (0, 0, 0), 1),
        PauliCase(op, 4, (7, 0, 1), 2),
        PauliCase(op, 12, (1, 7, 2), 1),
    ]
    for kernel, op in (("pauli", "product"), ("pauli_moments", "moments"))
}


class ColumnCase(NamedTuple):
    """A step of Lanczos' recurrence, or sums of a basis, of small whole numbers and a norm of 2.

    Attributes:
        op: "recurrence", "without" or "combine".
        panels: Of a vector.
        width: Of a panel.
        count: Columns of the basis that are read. There are two more, which are no numbers: after
            them, or one of them before the first, of "combine".
        rows: Combinations.
    """

    op: str
    panels: int
    width: int
    count: int = 0
    rows: int = 0

    def few(self, columns: int, seed: int) -> mx.array:
        """Return columns, most of whose elements are zero: their sums of products stay exact."""
        shape = (self.panels, columns, self.width)
        return mx.where(integers(shape, seed) == 3, mx.sign(integers(shape, seed + 9)), 0)

    def read(self) -> mx.array:
        """Return the columns of the basis that are read."""
        return self.few(self.count, 3)

    def vectors(self) -> list[mx.array]:
        return [self.few(1, seed) for seed in range(3)]

    def basis(self, before: int) -> mx.array:
        unread = mx.full((self.panels, 2, self.width), mx.nan)
        return mx.concatenate([unread[:, :before], self.read(), unread[:, before:]], axis=1)

    def actual(self) -> np.ndarray:
        x, z, before = self.vectors()
        if self.op == "combine":
            factors = integers((self.rows, self.count), 5)
            return np.array(columns.combine("metal", self.basis(1), 1, factors))
        if self.op == "without":
            x, z, *parts = columns.without("metal", self.basis(0), self.count, x, z)
            return _joined(x, z, *map(_sum, parts))
        squares, dots = mx.array([1.0, 1.0, 2.0]), mx.array([1.0, 2.0])
        of_x = columns.recur_dot("metal", z, x, before, squares)
        rest, x, parts, numbers = columns.recur_rest("metal", z, x, before, squares, dots)
        return _joined(_sum(of_x), rest, x, _sum(parts), numbers)

    def expected(self) -> np.ndarray:
        x, z, before = (np.array(a, np.float64) for a in self.vectors())
        basis = np.array(self.read(), np.float64)
        if self.op == "combine":
            return np.einsum("rj,pjw->prw", np.array(integers((self.rows, self.count), 5)), basis)
        if self.op == "without":
            a, b = (np.einsum("pjw,pow->j", basis, v) for v in (x, z))
            along = (x * z).sum() - a @ b
            x, z = (v - np.einsum("j,pjw->pw", f, basis)[:, None] for v, f in ((x, a), (z, b)))
            z -= along * x
            return _joined(x, z, np.square(x).sum(), np.square(z).sum())
        x, known = x / 2, z / 2 - 2 * before
        rest = known - 3 * x
        return _joined((x * known).sum(), rest, x, np.square(rest).sum(), [3, 2])


def _sum(parts: mx.array) -> float:
    return np.array(parts).sum(dtype=np.float64)


def _joined(*results: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.array(result)) for result in results])


# Panels and their width: less than a simdgroup takes, all that a group takes, and more than groups.
PANELS = ((3, 96), (2, 1024), (261, 32))
RECURRENCE = [ColumnCase("recurrence", *panels) for panels in PANELS]
WITHOUT = [
    ColumnCase("without", *panels, count)
    for panels, count in (*zip(PANELS, (11, 1, 1), strict=True), ((1, 32), 0), ((1, 32), 65))
]
COLUMN_CASES = {
    "recur_dot": RECURRENCE,
    "recur_rest": RECURRENCE,
    "basis_overlaps": WITHOUT,
    "basis_subtract": WITHOUT,
    "basis_combine": [
        ColumnCase("combine", *panels, count, rows)
        for panels, count, rows in zip(PANELS, (4, 9, 1), (9, 3, 1), strict=True)
    ],
}
AnyCase = Case | PauliCase | ColumnCase


def is_wrong(case: AnyCase) -> bool:
    """Return whether the product faults on the emulator or is not what it should be."""
    mx.disable_compile()
    try:
        with metal_emulator.Emulator():
            return not np.array_equal(case.actual(), case.expected())
    except (metal_emulator.MetalFault, metal_emulator.EmulatorError):
        return True
    finally:
        mx.enable_compile()


def _patterns(block_size: int) -> Iterator[CSRPattern]:
    rows = [[], [1, 0], [2, 1, 1], [0, 2], [], [1], [2, 0, 1], [0], [1, 2]]
    yield pattern_of(rows, 3, block_size)
    if block_size > 1:
        yield trimmed(pattern_of(rows, 3, block_size), block_size // 2 | 1, block_size // 2 | 1)
    if block_size < 64:
        yield skewed(block_size)
    if block_size in (1, 8):
        yield pattern_of([[0, 2], [1]] * 35, 3, block_size)  # more than a simdgroup sees at once


def _all_cases() -> Iterator[Case]:
    for block_size in (1, 3, 4, 8, 12, 16, 24, 32, 64, 69, 72, 128):
        for pattern in _patterns(block_size):
            for rows in (1, 3, 5, 12, 20, 40, 70, 130, 601):
                for n_matrices in (1, 2):
                    for product in ("spmm", "spmm_t", "sddmm"):
                        yield Case(pattern, rows, product, n_matrices)
                    if block_size in (32, 64):
                        for product, bits in itertools.product(("qspmm", "qspmm_t"), (3, 4)):
                            yield Case(pattern, rows, product, n_matrices, bits)


@cache
def cases() -> dict[str, Sequence[AnyCase]]:
    """Return for each kernel the cheapest products that reach all its template arguments."""
    found: dict[str, list[tuple[int, Case, set]]] = {}
    for case in _all_cases():
        cost = case.pattern.nnz * case.rows * case.n_matrices
        for name, reached in _launched(case):
            found.setdefault(name, []).append((cost, case, reached))
    chosen: dict[str, Any] = PAULI_CASES | COLUMN_CASES
    for name, candidates in found.items():
        seen: set = set()
        for _, case, reached in sorted(candidates, key=lambda c: c[0]):
            if not reached <= seen:
                chosen.setdefault(name, []).append(case)
                seen |= reached
    return chosen


def _launched(case: Case) -> list[tuple[str, set]]:
    """Return the kernels of a product, each with the template arguments and grid that it gets."""
    with metal_emulator.Emulator(schedules=()) as emulator:
        mx.eval(case.actual())
    found = []
    for launched in emulator.launches:
        template = dict(launched.template)
        # The transpose often has its own part of a kernel: all it reaches is reached there too.
        part = template.get("TRANSPOSED", 0)
        reached = {(part, key, str(value)) for key, value in template.items()}
        by_rows = template.get("WIDTH") == 1
        reached |= {(part, "many", axis, by_rows) for axis in (1, 2) if launched.grid[axis] > 1}
        block_size, stage = template.get("B"), template.get("DEPTH")
        is_whole = template.get("INSIDE", block_size) == block_size
        reached.add((part, "block and stage", f"{block_size} {stage} {is_whole}"))
        many_rows = case.pattern.shape[0] > 32 * case.pattern.block_size
        reached.add((part, "many block-rows", str(many_rows)))
        found.append((launched.kernel.removeprefix("mlx_sparse_nn_"), reached))
    return found


@contextmanager
def kernels_with(fault: Planted, folder: Path) -> Iterator[None]:
    """Let the package load kernels with a fault."""
    copies = folder / "metal"
    copies.mkdir()
    for path in FOLDER.iterdir():
        if path.suffix in (".metal", ".h"):
            text = _text(path.name)
            if path.name == fault.file:
                text = text[: fault.start] + fault.instead + text[fault.end :]
            (copies / path.name).write_text(text)
    with mock.patch.object(launch, "_PACKAGE", folder), fresh_launches():
        yield


def cases_of(file: str) -> list[AnyCase]:
    """Return the cases of the kernels that a file is part of, in turns."""
    includes = f'#include "{file}"'
    kernels = [k for k in cases() if file == f"{k}.metal" or includes in _text(f"{k}.metal")]
    assert kernels, f"no product launches what is in {file}"
    in_turns = zip_longest(*(cases()[kernel] for kernel in kernels))
    return list(dict.fromkeys(case for case in chain(*in_turns) if case is not None))


# Where tests are quick, one fault of a kind for each file.
if settings().max_examples < 100:
    TRIED = list({(fault.file, fault.fault): fault for fault in PLANTED}.values())
else:
    TRIED = PLANTED


@pytest.mark.parametrize("fault", TRIED, ids=str)
def test_a_planted_fault_is_caught(fault, tmp_path):
    if (fault.file, fault.fault, fault.replaced) in LEFT_OUT:
        pytest.skip(LEFT_OUT[fault.file, fault.fault, fault.replaced])
    tried = cases_of(fault.file)
    with kernels_with(fault, tmp_path):
        caught = any(is_wrong(case) for case in tried)
    assert caught, f"`{fault.instead}` in place of `{fault.replaced}` changes no result"


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".metal")])
def test_without_a_fault_every_product_is_right(file):
    """Else it would catch any."""
    assert not [case for case in cases_of(file) if is_wrong(case)]


def test_every_fault_is_planted():
    """Where this fails, kernels are written in another way: mend the pattern of the fault."""
    kinds = Counter(fault.fault for fault in PLANTED)
    assert set(kinds) == set(FAULTS)
    for file in FILES:
        barriers = len(re.findall(r"_barrier\(", _text(file)))
        here = Counter(fault.fault for fault in PLANTED if fault.file == file)
        assert here["no barrier"] == barriers
        assert len(here) >= (5 if file.endswith(".metal") and file != "sum_splits.metal" else 1)
    places = {(fault.file, fault.fault, fault.replaced) for fault in PLANTED}
    assert set(LEFT_OUT) <= places


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".h")])
def test_every_helper_is_called(file):
    helpers = re.findall(r"METAL_FUNC [^;{]*?(\w+)\(", _text(file))
    everything = "".join(_text(other) for other in FILES)
    once = [name for name in helpers if len(re.findall(rf"\b{name}[<(]", everything)) == 1]
    assert not once, f"no kernel calls {', '.join(once)}"


# Loops over the registers of a thread.

ARRAY = re.compile(
    r"^(?:simdgroup_\w+(?:<[^;]*?>)?|int|size_t|T|float\d?|vec<[^;]*?>) (\w+)((?:\[[^\]]*\])+);",
    re.MULTILINE,
)
POINTER = re.compile(r"\bthread [\w<>, ]+\* (\w+)")
UNROLLED = re.compile(r"^#pragma unroll\nfor \(int (\w+) = .*\{\n", re.MULTILINE)
# The compiler sets an array to zero as a whole, in registers too, whatever its loop says.
ZEROED = re.compile(
    r"\w+(?:\[[^\]]*\])+(?:\.thread_elements\(\)\[\d\])? = "
    r"(?:\w+(?:<[^;]*>)?\()?0\.0f(?:, 0\.0f)?\)?;"
)


# At most two turns: the compiler unrolls these without being told.
SHORT = ("i < X_LOADS;",)


def loops_over_registers(source: str) -> list[int]:
    """Return where in MLX's text the loops begin whose variable is an index of a thread's array.

    Helpers that the kernel does not call are left out.
    """
    found = []
    kernel_begins = source.index("[[kernel]]")
    for loop in UNROLLED.finditer(source):
        helpers = re.findall(r"METAL_FUNC [^;{]*?(\w+)\(", source[: loop.start()])
        called = loop.start() > kernel_begins or f"{helpers[-1]}<" in source[kernel_begins:]
        if not called or any(bound in loop.group() for bound in SHORT):
            continue
        # Dimensions of each array declared before it; behind them is an element of a vector.
        arrays = {name: sizes.count("[") for name, sizes in ARRAY.findall(source[: loop.start()])}
        arrays |= {name: 1 for name in POINTER.findall(source[: loop.start()])}
        end, depth = loop.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        body = ZEROED.sub("", source[loop.end() : end])
        index = rf"\[[^\]]*\b{loop.group(1)}\b"
        if any(
            re.search(rf"\b{name}(?:\[[^\]]*\]){{0,{n - 1}}}{index}", body)
            for name, n in arrays.items()
        ):
            found.append(loop.start())
    return found


@pytest.fixture(scope="module")
def all_variants():
    found: dict[str, list[Variant]] = {}
    for variant in variants():
        found.setdefault(variant.name, []).append(variant)
    return found


@pytest.mark.parametrize("kernel", [file[:-6] for file in FILES if file.endswith(".metal")])
def test_a_loop_over_registers_that_is_left_rolled_is_caught(all_variants, kernel):
    some = random.Random(0).sample(all_variants[kernel], len(all_variants[kernel]))
    # The lines of a kernel's text are the same in all its variants, but for the signature.
    place = lambda source, at: source.count("#pragma unroll", 0, at)
    missed = {place(some[0].source, at) for at in loops_over_registers(some[0].source)}
    # In the quantized kernels, some loops are of two turns, which come apart by themselves.
    planted_loops, quantized = len(missed), kernel.startswith("qspmm")
    first, count = 0, 2
    while missed and first < (6 if quantized else len(some)):
        planted = {}
        for variant in some[first : first + count]:
            for at in loops_over_registers(variant.source):
                if place(variant.source, at) in missed:
                    rolled = variant.source[:at] + variant.source[at:].replace(
                        "#pragma unroll", "", 1
                    )
                    planted[replace(variant, source=rolled)] = place(variant.source, at)
        missed -= {planted[variant] for variant in arrays_in_memory(list(planted))}
        first, count = first + count, 2 * count
    lines = some[0].source.splitlines()
    numbers = [n for n, line in enumerate(lines) if line == "#pragma unroll"]
    shown = ["\n".join(lines[numbers[n] : numbers[n] + 4]) for n in sorted(missed)]
    enough = len(missed) < planted_loops if quantized else not missed
    assert enough, "not found:\n" + "\n\n".join(shown)
