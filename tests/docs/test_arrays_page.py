"""Every row of docs/arrays.md: here and in SciPy, the same numbers."""

import re

import mlx.core as mx
import numpy as np
import pytest
import scipy.sparse as sp
from support import ROOT, to_numpy

import mlx_sparse_nn as sparse
from mlx_sparse_nn import core

PAGE = (ROOT / "docs/arrays.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(.+?)` \| (?:`(.+?)`)? *\|", PAGE, re.MULTILINE)


def matrices():
    """Return the names of the page, for SciPy."""
    rng = np.random.default_rng(0)

    def draw(m, n):
        array = sp.random_array((m, n), density=0.5, rng=rng, dtype=np.float32, format="csr")
        array.data = np.round(array.data * 8 - 4)  # whole numbers: sums are exact
        return array

    names = {"A": draw(3, 4), "B": draw(3, 4), "S": draw(3, 3)}
    whole = {"D": (3, 4), "x": 4, "y": 4, "x3": 3, "row": 3, "col": 4}
    names |= {k: rng.integers(-3, 4, size).astype(np.float32) for k, size in whole.items()}
    names |= {"v": names["A"][1], "w": names["A"][2], "int32": np.int32}
    return names | {"mask": rng.random((3, 4)) < 0.5, "np": np}


def ours(value):
    if sp.issparse(value):
        return sparse.from_scipy(value)
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return mx.array(value)
    return mx.int32 if value is np.int32 else value


def dense(value):
    if sparse.issparse(value):
        return np.array(value.todense().astype(mx.float32))
    if sp.issparse(value):
        return value.toarray()
    return to_numpy(value) if isinstance(value, mx.array) else np.asarray(value)


def test_the_page_has_rows():
    assert len(ROWS) >= 140


def public(kind) -> set[str]:
    return {name for name in dir(kind) if name[0] != "_"}


OWN = {"plot", "spy", "canonical", "map_values", "block_size", "pattern", "data", "eval", "nbytes"}
OWN |= {"density", "dtype", "row", "col"}


def test_every_function_of_scipys_names_has_a_row():
    """What an array can do stands on the page, but for what is not SciPy's."""
    kinds = (sparse.CSRArray, sparse.COOArray, sparse.SparseVector)
    words = set(re.findall(r"\w+", PAGE))
    for kind in kinds:
        assert public(kind) - words - OWN == set()
    functions = set(core.__all__) - {"qspmm", "qspmm_t", "sddmm", "spmm", "spmm_t", "csr_matmul"}
    assert (
        functions - words - {"COOArray", "CSRPattern", "use_cpu", "use_device", "use_gpu"} == set()
    )


@pytest.mark.parametrize(("here", "there"), ROWS, ids=[here for here, _ in ROWS])
def test_each_row_is_as_scipy(here, there):
    names = matrices()
    found = eval(here, vars(sparse) | {k: ours(v) for k, v in names.items()})
    expected = eval(there or here, vars(sp) | names)
    assert dense(found).shape == dense(expected).shape
    assert np.allclose(dense(found), dense(expected), atol=1e-6)
    assert sparse.issparse(found) <= sp.issparse(expected)
