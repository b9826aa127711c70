"""What calibration has seen of the inputs of a linear layer: their second moments."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import check_array, check_floating, check_number, check_size

SYMMETRIC = 1e-6  # of the largest moment: more is no rounding


@dataclass(frozen=True, eq=False)
class InputMoments:
    r"""Second moments of what goes into a linear layer, over n samples.

    They are all that a least-squares fit of the layer needs to know of its inputs: for any change
    :math:`\Delta` of the weight, the outputs change by :math:`\mathrm{tr}(\Delta H \Delta^\top)`
    in squares, where :math:`H = \sum x x^\top`.

    Attributes:
        second: ``(n_in, n_in)`` float64, the sum of :math:`x x^\top`.
        total: ``(n_in,)`` float64, the sum of :math:`x`.
        n: Number of samples.

    Raises:
        TypeError: An array is not of float64, or ``n`` not an integer.
        ValueError: Shapes do not fit, a number is not finite, or there is no sample.
    """

    second: np.ndarray
    total: np.ndarray
    n: int

    def __post_init__(self) -> None:
        owner = "InputMoments"
        for name in ("second", "total"):
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) or value.dtype != np.float64:
                kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
                raise TypeError(f"[{owner}] {name} must be a NumPy array of float64, got {kind}")
        if self.total.ndim != 1 or self.second.shape != 2 * self.total.shape:
            raise ValueError(
                f"[{owner}] second and total must be (n_in, n_in) and (n_in,), "
                f"got {self.second.shape} and {self.total.shape}"
            )
        check_size(owner, "n", self.n, minimum=1)
        if not (np.isfinite(self.second).all() and np.isfinite(self.total).all()):
            raise ValueError(f"[{owner}] second and total must be finite")
        rounding = SYMMETRIC * np.abs(self.second).max(initial=0)
        asymmetry = np.abs(self.second - self.second.T).max(initial=0)
        if max(asymmetry, -self.second.diagonal().min(initial=0)) > rounding:
            raise ValueError(
                f"[{owner}] second must be a sum of x xᵀ: symmetric, and no square negative"
            )

    @classmethod
    def of(cls, x: mx.array) -> InputMoments:
        """Return the moments of the inputs ``(..., n_in)`` of a layer, of any floating dtype."""
        check_array("InputMoments.of", "x", x)
        check_floating("InputMoments.of", "x", x)
        if x.ndim == 0 or x.size == 0:
            raise ValueError(f"[InputMoments.of] x must hold samples (..., n_in), got {x.shape}")
        moments = MomentSum(x.shape[-1])
        moments.add(x.reshape(-1, x.shape[-1]))
        return moments.result()

    @property
    def n_in(self) -> int:
        """Number of input features."""
        return self.total.size

    @property
    def centred(self) -> np.ndarray:
        r"""``(n_in, n_in)`` float64: the sum of :math:`(x - \bar x)(x - \bar x)^\top`."""
        return self.second - np.outer(self.total, self.total / self.n)


@dataclass(frozen=True, eq=False)
class DenseInputs:
    r"""What went into a layer in the dense model, where x goes into it now; n samples of both.

    Attributes:
        cross: ``(n_in, n_in)`` float64, the sum of :math:`d x^\top`.
        total: ``(n_in,)`` float64, the sum of d.
    """

    cross: np.ndarray
    total: np.ndarray


def check_moments(owner: str, moments: object, input_dims: int) -> None:
    """Raise unless ``moments`` are those of ``input_dims`` features."""
    if not isinstance(moments, InputMoments):
        kind = type(moments).__name__
        raise TypeError(
            f"[{owner}] moments must be InputMoments, got {kind}; "
            "layer_moments(model, batches) returns them by path"
        )
    if moments.n_in != input_dims:
        raise ValueError(
            f"[{owner}] moments are of {moments.n_in} features, but input_dims is {input_dims}"
        )


def check_damping(owner: str, damping: float) -> None:
    """Raise unless ``damping`` is a number in [0, 1e6]."""
    check_number(owner, "damping", damping)
    if not 0 <= damping <= 1e6:
        raise ValueError(f"[{owner}] damping must be at least 0 and at most 1e6, got {damping}")


class MomentSum:
    """Adds up the moments of one batch after another.

    The products of a batch are float32: by NumPy on the host, whose BLAS is fast everywhere, or by
    MLX where its default device is a GPU. Samples are shifted by the mean of the first batch and
    scaled by its largest value before, so that features whose mean is large beside what varies
    lose nothing, and no square overflows. Sums over batches are float64, on the host.

    Args:
        n_in: Number of input features.
        with_dense: Whether the inputs in the dense model are given too.

    Attributes:
        n: Number of samples so far.
    """

    def __init__(self, n_in: int, with_dense: bool = False):
        self.n_in, self.n = n_in, 0
        self._shift, self._scale = mx.zeros((n_in,)), 1.0
        self._second, self._total = np.zeros((n_in, n_in)), np.zeros(n_in)
        self._with_dense = with_dense
        if with_dense:
            self._cross, self._dense_total = np.zeros((n_in, n_in)), np.zeros(n_in)

    def add(self, x: mx.array, dense: mx.array | None = None) -> None:
        """Add samples ``(n, n_in)`` of any floating dtype, and what they are in the dense model."""
        if x.shape[0] == 0:
            return
        x = x.astype(mx.float32)
        if self.n == 0:
            self._shift = (x / x.shape[0]).sum(axis=0)
            largest = np.array(mx.abs(x - self._shift).max())
            self._scale = float(largest) if 0 < largest < np.inf else 1.0
        self.n += x.shape[0]
        x = self._shifted(x)
        self._second += _product(x, x)
        self._total += _sum(x)
        if self._with_dense and dense is not None:
            dense = self._shifted(dense.astype(mx.float32))
            self._cross += _product(dense, x)
            self._dense_total += _sum(dense)

    @property
    def is_finite(self) -> bool:
        """Whether all samples so far were finite."""
        return bool(np.isfinite(self._total).all())

    def result(self) -> InputMoments:
        """Return the moments of all samples."""
        second = self._unshifted(self._second, self._total, self._total)
        # The products of a GPU are rounded, and its two halves differently.
        symmetric = (second + second.T) / 2
        return InputMoments(symmetric, self._unshifted_total(self._total), self.n)

    def dense(self) -> DenseInputs | None:
        """Return what the samples were in the dense model, if that was given."""
        if not self._with_dense:
            return None
        cross = self._unshifted(self._cross, self._dense_total, self._total)
        return DenseInputs(cross, self._unshifted_total(self._dense_total))

    def _shifted(self, x: mx.array) -> mx.array:
        return (x - self._shift) / self._scale

    def _unshifted(self, product: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the sum of ``a bᵀ`` from that of shifted samples, whose own sums are given."""
        shift, scale = np.array(self._shift, dtype=np.float64), self._scale
        return (
            scale**2 * product
            + np.outer(scale * left, shift)
            + np.outer(shift, scale * right)
            + self.n * np.outer(shift, shift)
        )

    def _unshifted_total(self, total: np.ndarray) -> np.ndarray:
        return self._scale * total + self.n * np.array(self._shift, dtype=np.float64)


def _product(a: mx.array, b: mx.array) -> np.ndarray:
    """Return ``aᵀ b`` of float32 samples ``(n, n_in)``."""
    if mx.default_device() == mx.Device(mx.gpu):
        return np.array(a.T @ b)
    left = np.array(a)
    return left.T @ (left if a is b else np.array(b))


def _sum(x: mx.array) -> np.ndarray:
    return np.array(x).sum(axis=0, dtype=np.float64)
