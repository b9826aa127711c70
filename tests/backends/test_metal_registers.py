"""No Metal kernel keeps an array of registers in memory, in any variant that is ever launched.

A thread's array is in registers only if every index into it is known when the kernel is compiled.
Where a loop over it is left rolled, each product goes through memory: several times as slow.
"""

from collections import Counter
from pathlib import Path

import pytest
from metal_compiler import Variant, arrays_in_memory
from metal_variants import EXCLUDED, variants

import mlx_sparse_nn

FOLDER = Path(mlx_sparse_nn.__file__).parent / "metal"
KERNELS = sorted({path.stem for path in FOLDER.glob("*.metal")} - EXCLUDED)


@pytest.fixture(scope="module")
def all_variants():
    return variants()


def test_every_kernel_has_its_variants_here(all_variants):
    counts = Counter(variant.name for variant in all_variants)
    assert sorted(counts) == KERNELS
    templates = [dict(variant.template) for variant in all_variants if "B" in str(variant)]
    assert {0, 1} <= {t.get("TRANSPOSED") for t in templates}
    assert {0, 1} <= {t.get("BIAS") for t in templates}
    assert any(t.get("INSIDE", t.get("B")) != t.get("B") for t in templates)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_array_of_registers_stays_in_memory(all_variants, kernel):
    found = arrays_in_memory([v for v in all_variants if v.name == kernel])
    lines = [f"{variant} keeps {', '.join(arrays)}" for variant, arrays in found.items()]
    assert not found, f"{len(found)} variants need #pragma unroll on a loop:\n" + "\n".join(
        lines[:10]
    )


PLANTED = """template <typename T, int N>
[[kernel]] void planted(
  const device T* x [[buffer(0)]],
  device T* y [[buffer(1)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
const uint i = thread_position_in_grid.x;
simdgroup_float8x8 acc[N];
#pragma unroll
for (int k = 0; k < N; k++) {
acc[k] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
simdgroup_load(acc[k], x + i + 64 * k);
}
UNROLL
for (int k = 0; k < BOUND; k++) {
y[N * i + k] = acc[k].thread_elements()[0];
}
}

template [[host_name("planted")]] [[kernel]] decltype(planted<float, 4>) planted<float, 4>;
"""


@pytest.mark.parametrize(
    ("unroll", "bound", "is_found"),
    [("#pragma unroll", "N", False), ("", "N", True), ("#pragma unroll", "int(i)", True)],
)
def test_a_rolled_loop_is_found(unroll, bound, is_found):
    source = PLANTED.replace("UNROLL", unroll).replace("BOUND", bound)
    planted = Variant("planted", source)
    found = arrays_in_memory([planted])
    assert found == ({planted: ['[4 x %"struct.metal::simdgroup_matrix"]']} if is_found else {})
