"""Products of large blocks and many rows of x on Hopper, whose boxes one thread copies."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import CudaFault, emulated
from support import assert_equal, check_products, integers, pattern_of, random_pattern

from mlx_sparse_nn import patterns, spmm
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_boxes, cuda_tiles, naive


@pytest.fixture
def small(monkeypatch):
    """Let a little work count as enough."""
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 1)
    monkeypatch.setattr(tuned, "BOX_PRODUCTS", 1)
    monkeypatch.setattr(tuned, "BOXES_FROM", dict.fromkeys((64, 128), (0.0, 0.0)))
    monkeypatch.setattr(tuned, "SHARED_ROWS", {})


def drawn(block_size, kind):
    rng = np.random.default_rng(3)
    mask = rng.random((384 // block_size, 512 // block_size)) < 0.7
    if kind == "uneven":
        mask[0], mask[1] = True, False
    rows = [np.flatnonzero(row) for row in mask]
    if kind == "not in order":
        rows = [row[::-1] for row in rows]
    return pattern_of(rows, mask.shape[1], block_size)


@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        ("even", mx.bfloat16, {"seed": 2}),
        ("not in order", mx.float16, {"seed": 3}),
        ("uneven", mx.bfloat16, {"offset": 1}),
    ],
)
@pytest.mark.parametrize("block_size", [64, 128])
def test_boxes(small, block_size, kind, dtype, settings):
    """The last tile is not full, a block-row may be empty, and inputs may begin anywhere."""
    pattern, n = drawn(block_size, kind), 530 if block_size == 64 else 270
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    with emulated(**settings) as emulation:
        check_products(pattern, data, x, y, bias)
    assert set(emulation.names) == {"spmm_boxes", "sddmm_wgmma"}


@pytest.mark.parametrize("block_size", [64, 128])
def test_boxes_of_several_matrices(small, block_size):
    """A box of one may hold rows of the next, which nobody reads."""
    pattern = random_pattern(2, 2, block_size, density=0.8)
    shapes = [pattern.data_shape, (300, pattern.shape[1])]
    data, x = (integers((2, *shape), i, mx.bfloat16) for i, shape in enumerate(shapes))
    with emulated() as emulation:
        y = mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x)
        assert_equal(y, naive.spmm(data, pattern, x))
    assert set(emulation.names) == {"spmm_boxes"}


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        ({}, True),
        ({"n_x": 512}, False),
        ({"n_x": 1280}, True),
        ({"density": 0.2}, False),
        ({"block_size": 64}, True),
        ({"block_size": 64, "density": 0.2}, True),
        ({"block_size": 64, "n_x": 1280}, False),  # tiles fill 0.6 of the GPU's rounds
        ({"block_size": 32}, False),
        ({"inside": 5}, False),
        ({"dtype": mx.float32}, False),
        ({"architecture": "sm_80"}, False),
    ],
    ids=str,
)
def test_boxes_are_for_much_work_on_whole_blocks(monkeypatch, change, takes):
    call = {"n_x": 4096, "n_matrices": 1, "block_size": 128, "dtype": mx.bfloat16} | change
    architecture = call.pop("architecture", "sm_90")
    monkeypatch.setattr(cuda_tiles, "architecture", lambda: architecture)
    pattern = patterns.random(4096, 4096, call.pop("density", 0.4), call["block_size"])
    call.setdefault("inside", call["block_size"])
    assert cuda_boxes.takes(pattern.layout.rows, **call) is takes


FAULTS = [
    ("wait_barrier(empty + ring.buffer, ring.parity ^ 1);", ""),
    ("wait_barrier(full + ring.buffer, ring.parity);", ""),
    ("wait_products<1>();", ""),
    ("arrive_before(barrier, STAGE * sizeof(T));", "arrive(barrier);"),
    ("advance(xs, k)", "xs"),
]


@pytest.mark.parametrize("edit", FAULTS)
def test_faults_are_found(small, edit):
    """A barrier less, or a wrong place, does not pass."""
    pattern = random_pattern(2, 4, 128, density=1.0)
    data, x = integers(pattern.data_shape, 0, mx.bfloat16), integers((300, 512), 1, mx.bfloat16)
    with emulated(edit=edit) as emulation:
        try:
            y = spmm(data, pattern, x)
        except CudaFault:
            y = None
    assert emulation.names == ["spmm_boxes"]
    assert y is None or not mx.array_equal(y, naive.spmm(data, pattern, x))
