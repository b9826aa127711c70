r"""Sparse weights fitted by least squares to what a dense layer computes.

A layer computes :math:`y = W x + b`. Of a sparse one, :math:`\hat W` with some blocks, the outputs
are to be close in the least squares over the samples of calibration:

.. math::

    \min_{\hat W, \hat b} \sum_x \lVert W x + b - \hat W x - \hat b \rVert^2
        + \lambda \lVert W - \hat W \rVert_F^2

With a bias, the best :math:`\hat b` leaves the first sum with centred inputs. So one matrix says
all of them, :math:`G = \sum x x^\top + \lambda I`: of centred x where there is a bias, of x itself
where there is none. Rows of W are independent of one another. With S what a row keeps, Q the rest,

.. math::

    \hat W_S = W_S + W_Q G_{QS} (G_{SS})^{-1}
        = W_S - W_Q ((G^{-1})_{QQ})^{-1} (G^{-1})_{QS}

The smaller system of the two is solved, by Cholesky. Removing one block b alone costs
:math:`\mathrm{tr}(W_b ((G^{-1})_{bb})^{-1} W_b^\top)`: the score of "Optimal brain surgeon"
(Hassibi and Stork, 1993) for blocks, as in "The optimal BERT surgeon" (Kurtic et al., 2022).

Layers before this one may be sparse already. Then x is what they give, and what this layer gave in
the dense model, :math:`W d + b`, is as good a target as :math:`W x + b`. Taking one in part,
:math:`W ((1 - a) x + a d)`, is to fit another dense weight, the best one for that target:
:math:`W^* = W + a W (\sum d x^\top - \sum x x^\top) G^{-1}`.

All of this is float64, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from mlx_sparse_nn.core.moments import DenseInputs, InputMoments

DENSE_SHARE = 0.25  # a: how much of the target is what the layer gave in the dense model
LEAST_VARYING = 1e-8  # of the inputs' squares
PANEL = 64  # columns of a triangular system that are solved at once


class NotDefiniteError(ValueError):
    """The moments are not positive definite: there are too few samples for so little damping."""


class LeastSquares:
    r"""The fits of all layers that share their inputs, be it with or without a bias.

    Args:
        moments: Of the inputs.
        damping: :math:`\lambda` over the mean of the diagonal of :math:`\sum x x^\top`.
        has_bias: Whether the layers have a bias.
        dense: What the dense model's layers had as inputs, if these are others.
    """

    def __init__(
        self,
        moments: InputMoments,
        damping: float,
        has_bias: bool,
        dense: DenseInputs | None = None,
    ):
        self.moments, self.damping = moments, damping
        self._dense, self._has_bias = dense, has_bias
        gram = moments.centred if has_bias else moments.second
        # Where nothing varies, as over one sample, rounding is left: then dense values stay.
        energy = max(np.trace(gram), LEAST_VARYING * np.trace(moments.second))
        # A new matrix either way.
        self._gram = gram + damping * energy / len(gram) * np.eye(len(gram))

    def aim(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the dense weight to be fitted, ``(n_out, n_in)``, and what its bias is more.

        It is the weight itself where all inputs are those of the dense model.
        """
        moments, dense = self.moments, self._dense
        if dense is None:
            return weight, np.zeros(len(weight))
        drift = dense.cross - moments.second
        mean_drift = (dense.total - moments.total) / moments.n
        if self._has_bias:
            drift = drift - np.outer(mean_drift, moments.total)
        aim = weight + DENSE_SHARE * (weight @ drift) @ self._inverse
        if not self._has_bias:
            return aim, np.zeros(len(weight))
        mean = moments.total / moments.n
        return aim, (weight - aim) @ mean + DENSE_SHARE * weight @ mean_drift

    @cached_property
    def _inverse(self) -> np.ndarray:
        """``(n_in, n_in)``: the inverse of the gram matrix."""
        return _solve(self._gram, np.eye(len(self._gram)))

    def scores(
        self, weight: np.ndarray, block_size: int, kept: np.ndarray | None = None
    ) -> np.ndarray:
        """Return how much the squared error grows by the loss of each block, the others refitted.

        Args:
            weight: ``(n_out, n_in)`` float64.
            block_size: Side of the blocks.
            kept: ``(R, C)`` bool: the blocks that there are, by default all. The others are zero,
                and stay so when those that are left are refitted.

        Returns:
            ``(R, C)`` float64, at least 0, and 0 where there is no block.

        Raises:
            NotDefiniteError: The gram matrix has no inverse.
        """
        n_block_cols = -(-weight.shape[1] // block_size)
        if kept is None:
            kept = np.ones((-(-len(weight) // block_size), n_block_cols), dtype=bool)
        scores = np.zeros(kept.shape)
        for rows, stay, block_rows in _systems(kept, block_size, len(weight)):
            if not stay.any():
                continue
            columns = np.repeat(stay, block_size)[: weight.shape[1]]
            blocks = _blocks(weight[np.ix_(rows, columns)], block_size)  # (r, s, B, B)
            costs = _inverses(self._inverse_blocks(columns, block_size))  # (s, B, B)
            growth = np.einsum("rcij,rcij->rc", blocks @ costs, blocks)
            scores[np.ix_(block_rows, stay)] = np.maximum(growth, 0)
        return scores

    def fit(self, weight: np.ndarray, kept: np.ndarray, block_size: int) -> np.ndarray:
        """Return the weight ``(n_out, n_in)`` that is best with some blocks, zero elsewhere.

        Args:
            weight: ``(n_out, n_in)`` float64.
            kept: ``(R, C)`` bool: the blocks that are kept.
            block_size: Side of the blocks.

        Raises:
            NotDefiniteError: A system is not positive definite.
        """
        fitted = np.zeros_like(weight)
        for rows, stay, _ in _systems(kept, block_size, len(weight)):
            columns = np.repeat(stay, block_size)[: weight.shape[1]]
            fitted[rows] = self._fit(weight[rows], columns)
        return fitted

    def bias_change(self, weight: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        """Return what ``(n_out,)`` to add to the bias, so that the mean output stays."""
        return (weight - fitted) @ (self.moments.total / self.moments.n)

    def _inverse_blocks(self, columns: np.ndarray, block_size: int) -> np.ndarray:
        """Return the blocks ``(s, B, B)`` on the diagonal of :math:`(G_{SS})^{-1}`.

        Args:
            columns: ``(n_in,)`` bool: S, of whole blocks.
            block_size: Side of the blocks.
        """
        stay, gone = np.flatnonzero(columns), np.flatnonzero(~columns)
        if not gone.size:
            return _diagonal_blocks(self._inverse, block_size)
        if stay.size <= gone.size:
            inverse = _solve(self._gram[np.ix_(stay, stay)], np.eye(stay.size))
            return _diagonal_blocks(inverse, block_size)
        # With P the whole inverse, it is P_SS - P_SQ (P_QQ)⁻¹ P_QS.
        cross = self._inverse[np.ix_(gone, stay)]
        solved = _solve(self._inverse[np.ix_(gone, gone)], cross)
        within = _diagonal_blocks(self._inverse[np.ix_(stay, stay)], block_size)
        left, right = (_block_rows(a.T, block_size) for a in (cross, solved))  # (s, B, q)
        return within - left @ right.swapaxes(1, 2)

    def _fit(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return rows ``(m, n_in)`` fitted with the columns ``(n_in,)`` that are True."""
        stay, gone = np.flatnonzero(columns), np.flatnonzero(~columns)
        fitted = np.where(columns, rows, 0)
        if not (gone.size and stay.size):
            return fitted
        lost = rows[:, gone]
        if stay.size <= gone.size:
            system = self._gram[np.ix_(stay, stay)]
            fitted[:, stay] += _solve(system, self._gram[np.ix_(stay, gone)] @ lost.T).T
        else:
            system = self._inverse[np.ix_(gone, gone)]
            fitted[:, stay] -= _solve(system, lost.T).T @ self._inverse[np.ix_(gone, stay)]
        return fitted


class LastProblem:
    """The least-squares problem of the last layer, kept for the next: those that share moments.

    Args:
        damping: As in :class:`LeastSquares`.
    """

    def __init__(self, damping: float):
        self._damping = damping
        self._last: tuple[tuple[InputMoments, bool, DenseInputs | None], LeastSquares] | None = None

    def of(
        self, moments: InputMoments, has_bias: bool, dense: DenseInputs | None = None
    ) -> LeastSquares:
        """Return the problem of a layer: arguments as of :class:`LeastSquares`."""
        wanted = moments, has_bias, dense
        if self._last is None or any(
            a is not b for a, b in zip(self._last[0], wanted, strict=True)
        ):
            self._last = wanted, LeastSquares(moments, self._damping, has_bias, dense)
        return self._last[1]


def output_error(
    moments: InputMoments,
    weight: np.ndarray,
    sparse: np.ndarray,
    bias_change: np.ndarray | float = 0.0,
) -> float:
    r"""Return :math:`\lVert Y - \hat Y \rVert_F / \lVert Y \rVert_F` over the samples.

    Args:
        moments: Of the inputs.
        weight: ``(n_out, n_in)`` float64; Y is what it makes of the inputs, without a bias.
        sparse: The other weight, ``(n_out, n_in)`` float64.
        bias_change: ``(n_out,)``, the other bias less the first.
    """
    change = sparse - weight
    squares = np.einsum("oi,oi->", change @ moments.second, change)
    squares += 2 * np.dot(change @ moments.total, np.broadcast_to(bias_change, len(change)))
    squares += moments.n * np.sum(np.square(np.broadcast_to(bias_change, len(change))))
    whole = output_energy(moments, weight)
    return float(np.sqrt(max(squares, 0) / whole)) if whole > 0 else 0.0


def output_energy(moments: InputMoments, weight: np.ndarray) -> float:
    r"""Return :math:`\lVert Y \rVert_F^2` over the samples, of outputs without a bias."""
    return float(np.einsum("oi,oi->", weight @ moments.second, weight))


def _systems(
    kept: np.ndarray, block_size: int, n_out: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the block-rows that keep the same blocks: one system with more right-hand sides.

    Yields:
        ``(n_out,)`` bool, the rows; ``(C,)`` bool, what they keep; ``(R,)`` bool, the block-rows.
    """
    sets, set_of_row = np.unique(kept, axis=0, return_inverse=True)
    for number, stay in enumerate(sets):
        block_rows = set_of_row.reshape(-1) == number
        yield np.repeat(block_rows, block_size)[:n_out], stay, block_rows


def _blocks(weight: np.ndarray, block_size: int) -> np.ndarray:
    """Return a weight as blocks ``(R, C, B, B)``, with zeros past its edges."""
    padded = np.pad(weight, [(0, -size % block_size) for size in weight.shape])
    shape = (len(padded) // block_size, block_size, padded.shape[1] // block_size, block_size)
    return padded.reshape(shape).swapaxes(1, 2)


def _block_rows(matrix: np.ndarray, block_size: int) -> np.ndarray:
    """Return a matrix ``(n, m)`` as block-rows ``(R, B, m)``, with zeros past the last row."""
    padded = np.pad(matrix, [(0, -len(matrix) % block_size), (0, 0)])
    return padded.reshape(-1, block_size, matrix.shape[1])


def _diagonal_blocks(matrix: np.ndarray, block_size: int) -> np.ndarray:
    """Return the blocks ``(C, B, B)`` on the diagonal, with ones past the last column."""
    blocks = np.tile(np.eye(block_size), (-(-len(matrix) // block_size), 1, 1))
    for block, start in zip(blocks, range(0, len(matrix), block_size), strict=True):
        part = matrix[start : start + block_size, start : start + block_size]
        block[: len(part), : len(part)] = part
    return blocks


def _inverses(blocks: np.ndarray) -> np.ndarray:
    """Return the inverses of blocks ``(s, B, B)``."""
    try:
        return np.linalg.inv(blocks)
    except np.linalg.LinAlgError as error:
        raise NotDefiniteError("the moments are not positive definite") from error


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return ``matrix⁻¹ right`` of a positive definite matrix ``(n, n)``, by Cholesky.

    NumPy factors, but has no triangular solver: panels are solved one after another.
    """
    try:
        lower = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError as error:
        raise NotDefiniteError("the moments are not positive definite") from error
    n = len(matrix)
    starts = range(0, n, PANEL)
    inverses = [np.linalg.inv(lower[i : i + PANEL, i : i + PANEL]) for i in starts]
    solution = np.array(right)
    for i, inverse in zip(starts, inverses, strict=True):  # L z = right
        panel = slice(i, i + PANEL)
        solution[panel] = inverse @ (solution[panel] - lower[panel, :i] @ solution[:i])
    for i, inverse in zip(reversed(starts), reversed(inverses), strict=True):  # Lᵀ x = z
        panel, after = slice(i, i + PANEL), slice(i + PANEL, n)
        solution[panel] = inverse.T @ (solution[panel] - lower[after, panel].T @ solution[after])
    return solution
