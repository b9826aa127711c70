"""The kernels of Krylov columns on both emulators, against NumPy in float64."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import emulated
from devices import emulated_metal
from support import assert_close, computing_columns, integers, to_numpy

from mlx_sparse_nn.core.backends import columns, cuda, metal
from mlx_sparse_nn.physics import krylov, lanczos, transverse_field_ising

# Panels and their width: one, fewer than four elements of every thread, more than there are groups.
SIZES = [(1, 32), (3, 96), (2, 1024), (261, 32)]


@pytest.fixture(params=["cuda", "metal"])
def backend(request):
    """The name of the backend whose kernels are emulated, and which is asked for columns."""
    emulator, asked = {"cuda": (emulated, cuda), "metal": (emulated_metal, metal)}[request.param]
    with emulator(), computing_columns(asked):
        yield request.param


def parts_of(square):
    """Return parts of a square: all but the last are 1."""
    return mx.array([1.0, 1.0, square - 2.0])


@pytest.mark.parametrize(("panels", "width"), SIZES)
class TestExact:
    """Whole numbers, and norms that are powers of two: every sum is exact."""

    def test_a_step_of_the_recurrence(self, backend, panels, width):
        y, w, before = (integers((panels, 1, width), seed) for seed in range(3))
        norm = 2.0
        dots = columns.recur_dot(backend, y, w, before, parts_of(norm**2))
        rest, x, squares, numbers = columns.recur_rest(
            backend, y, w, before, parts_of(norm**2), mx.array([1.0, 2.0])
        )
        y, w, before = (to_numpy(a).astype(np.float64) for a in (y, w, before))
        known = y / norm - norm * before
        assert to_numpy(dots).sum() == (w / norm * known).sum()
        expected = known - 3 * w / norm
        np.testing.assert_array_equal(to_numpy(rest), expected)
        np.testing.assert_array_equal(to_numpy(x), w / norm)
        assert to_numpy(squares).sum(dtype=np.float64) == np.square(expected).sum()
        np.testing.assert_array_equal(to_numpy(numbers), [3, norm])

    @pytest.mark.parametrize("count", [0, 1, 8, 11])
    def test_vectors_without_columns(self, backend, panels, width, count):
        """Columns after the first ones are not read: they may be anything."""
        basis = mx.concatenate(
            [integers((panels, count, width), 1), mx.full((panels, 2, width), mx.nan)], axis=1
        )
        x, z = (mx.zeros((panels, 1, width)) for _ in range(2))
        x[:, :, ::7], z[:, :, 1::5] = 1, 2
        found = [
            to_numpy(a).astype(np.float64) for a in columns.without(backend, basis, count, x, z)
        ]
        x, z, basis = (to_numpy(a).astype(np.float64) for a in (x, z, basis[:, :count]))
        a, b = (np.einsum("pjw,pow->j", basis, v) for v in (x, z))
        left_x = x - np.einsum("j,pjw->pw", a, basis)[:, None]
        left_z = z - np.einsum("j,pjw->pw", b, basis)[:, None]
        left_z -= ((x * z).sum() - a @ b) * left_x
        np.testing.assert_array_equal(found[0], left_x)
        size = np.abs(z).max() + np.abs(b) @ np.abs(basis).max(axis=(0, 2), initial=0)
        size += (np.abs(x * z).sum() + np.abs(a) @ np.abs(b)) * np.abs(left_x).max()
        assert_close(mx.array(found[1].astype(np.float32)), left_z, 2 * count + 1, size)
        for squares, left in zip(found[2:], (left_x, left_z), strict=True):
            np.testing.assert_allclose(squares.sum(), np.square(left).sum(), rtol=1e-5)

    @pytest.mark.parametrize(("rows", "first", "count"), [(1, 0, 1), (3, 2, 9), (9, 1, 4)])
    def test_combinations(self, backend, panels, width, rows, first, count):
        basis, factors = integers((panels, 12, width), 1), integers((rows, count), 2)
        found = columns.combine(backend, basis, first, factors)
        some = to_numpy(basis)[:, first : first + count]
        expected = np.einsum("rj,pjw->prw", to_numpy(factors), some)
        np.testing.assert_array_equal(to_numpy(found), expected)


def test_what_is_left_is_orthogonal(backend):
    """Of an orthonormal basis; and the second vector to the first, though judged before."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(256, 13)))[0].T.reshape(13, 4, 64).swapaxes(0, 1)
    basis = mx.array(q.astype(np.float32))
    x, z = (mx.array(rng.normal(size=(4, 1, 64)).astype(np.float32)) for _ in range(2))
    x = x / mx.sqrt((x * x).sum())
    x, z, _, _ = columns.without(backend, basis, 13, x, z)
    x = x / mx.sqrt((x * x).sum())
    _, last, _, squares = columns.without(backend, basis, 13, x, z)
    norm = float(mx.sqrt(squares.sum()))
    for other in (*(basis[:, j : j + 1] for j in range(13)), x):
        assert_close((other * last).sum(), np.zeros(()), 256, norm)


def test_repeats_are_equal_bit_for_bit(backend):
    y, w, before = (mx.random.normal((5, 1, 64), key=mx.random.key(seed)) for seed in range(3))
    basis = mx.random.normal((5, 9, 64), key=mx.random.key(3))

    def once():
        square = mx.array([320.0])
        dots = columns.recur_dot(backend, y, w, before, square)
        rest = columns.recur_rest(backend, y, w, before, square, dots)
        return [dots, *rest, *columns.without(backend, basis, 9, *rest[:2])]

    for first, again in zip(once(), once(), strict=True):
        assert mx.array_equal(first, again)


def hermitian(n):
    a = np.random.default_rng(n).normal(size=(n, n))
    return (a + a.T) / 2


def check(H, result):
    """Check the lowest levels, and the states themselves, in float64."""
    states, energies = (to_numpy(a).astype(np.float64) for a in (result.states, result.energies))
    k, levels = energies.size, np.linalg.eigvalsh(H)
    scale = np.abs(levels).max()
    assert result.converged
    np.testing.assert_allclose(energies, levels[:k], atol=1e-5 * scale)
    np.testing.assert_allclose(states.T @ states, np.eye(k), atol=1e-5)
    assert (np.linalg.norm(H @ states - states * energies, axis=0) <= 1.1e-5 * scale).all()


class TestLanczos:
    """By these kernels, as on a GPU."""

    @pytest.fixture(autouse=True)
    def on_device(self, backend, monkeypatch):
        monkeypatch.setattr(krylov, "_on_host", lambda dtype: False)

    @pytest.mark.parametrize("k", [1, 5])
    def test_levels_of_the_ring(self, k):
        H = transverse_field_ising(8, 0.8, periodic=True)
        dense = to_numpy(H.todense())
        result = lanczos(mx.array(dense), k)
        check(dense, result)

    @pytest.mark.parametrize("n", [1, 3, 257, 1025])
    def test_dense_matrices_of_any_size(self, n):
        H = hermitian(n)
        k = min(n, 3)
        result = lanczos(mx.array(H.astype(np.float32)), k=k)
        check(H, result)

    def test_a_space_that_ends_within_a_run(self):
        values = mx.array(np.repeat([-3.0, -1.0, 2.0], [4, 30, 66]).astype(np.float32))
        result = lanczos(mx.diag(values), k=6)
        assert result.converged
        np.testing.assert_allclose(result.energies, [-3, -3, -3, -3, -1, -1], rtol=1e-5)

    def test_a_loss_of_orthogonality_within_a_run_is_taken_back(self):
        values = np.concatenate([[-1000.0, -900.0], np.linspace(0, 1, 598)]).astype(np.float32)
        result = lanczos(mx.diag(mx.array(values)), k=2)
        check(np.diag(values), result)

    def test_one_seed_gives_one_result(self):
        H = mx.array(hermitian(200).astype(np.float32))
        first, second = (lanczos(H, k=2).states for _ in range(2))
        assert mx.array_equal(first, second)

    def test_a_product_may_lie_anywhere(self):
        """A slice of what is longer, of any step."""
        values = mx.arange(128).astype(mx.float32)

        class Sliced:
            shape = (128, 128)

            def __matmul__(self, x):
                return mx.concatenate([mx.zeros(3), values * x])[3:]

        np.testing.assert_allclose(lanczos(Sliced(), k=2).energies, [0, 1], atol=1e-3)

    def test_a_start_vector_and_the_highest_levels(self):
        H = hermitian(150)
        v0 = mx.arange(150).astype(mx.float32)
        result = lanczos(mx.array(H.astype(np.float32)), k=2, which="largest", v0=v0)
        np.testing.assert_allclose(result.energies, np.linalg.eigvalsh(H)[-2:], rtol=1e-5)
