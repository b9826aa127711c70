"""The layers of a model, fitted one after another and put in their places."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_sparse_nn.calibration.block_chain import BlockChain
from mlx_sparse_nn.calibration.record import Recorder
from mlx_sparse_nn.calibration.resume import FinishedStages
from mlx_sparse_nn.calibration.samples import Samples
from mlx_sparse_nn.core.fit import choose_by_moments, fit_pattern
from mlx_sparse_nn.core.least_squares import LeastSquares
from mlx_sparse_nn.core.moments import InputMoments
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.layers.linear import BlockSparseLinear
from mlx_sparse_nn.surgery.selection import leaves_of, replace_leaves
from mlx_sparse_nn.surgery.targets import Target


@dataclass(frozen=True)
class Quality:
    """How well a layer was fitted.

    Attributes:
        error_kept: Relative error of its outputs with the dense layer's values and bias: the norm
            of what is missing over that of the outputs without a bias.
        error_fitted: The same with values and bias fitted.
        seconds: What choosing and fitting took.
        n_samples: Tokens that went into it.
    """

    error_kept: float
    error_fitted: float
    seconds: float
    n_samples: int


class FitProblem:
    """The least-squares problem of layers that share their moments, kept from one to the next."""

    def __init__(self, owner: str, damping: float):
        self._owner, self._damping = owner, damping
        self._key: tuple[InputMoments, bool] | None = None
        self._problem: LeastSquares | None = None

    def fit(self, target: Target, moments: InputMoments) -> tuple[BlockSparseLinear, Quality]:
        """Return the sparse layer of a dense one."""
        start = time.perf_counter()
        options, linear = target.options, target.linear
        owner = f"{self._owner} {target.paths[0]}".rstrip()
        bias = linear.get("bias")
        problem = self._of(moments, bias is not None)
        pattern = options.pattern
        if pattern is None:
            pattern = choose_by_moments(
                owner, linear.weight, problem, options.block_size, options.density, options.balance
            )
        fit = fit_pattern(owner, linear.weight, bias, pattern, problem)
        layer = BlockSparseLinear.from_linear(linear, pattern=pattern)
        layer.weight = fit.weight
        if fit.bias is not None:
            layer.bias = fit.bias
        seconds = time.perf_counter() - start
        return layer, Quality(fit.error_before, fit.error_after, seconds, moments.n)

    def _of(self, moments: InputMoments, has_bias: bool) -> LeastSquares:
        key = self._key
        if self._problem is None or key is None or key[0] is not moments or key[1] != has_bias:
            self._key = moments, has_bias
            self._problem = LeastSquares(moments, self._damping, has_bias)
        return self._problem


class ModelFit:
    """Fits layers of a model and puts them in place; after an error the model is as it was.

    Args:
        samples: What goes through the model.
        targets: The layers to be made sparse.
        damping: As in :func:`calibrate`.
        finished: Where finished stages are kept: blocks, or layers where there are none.
        bar: Counts the layers.

    Attributes:
        layers: The new layer at the first path of each that is finished.
        quality: How well each was fitted.
    """

    def __init__(
        self,
        samples: Samples,
        targets: list[Target],
        damping: float,
        finished: FinishedStages,
        bar: tqdm,
    ):
        self.layers: dict[str, BlockSparseLinear] = {}
        self.quality: dict[str, Quality] = {}
        self._samples, self._finished, self._bar = samples, finished, bar
        self._targets = {target.paths[0]: target for target in targets}
        self._problem = FitProblem(samples.owner, damping)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Put the dense layers back where an error, or an interruption, ends this."""
        try:
            yield
        except BaseException:
            dense = [self._targets[path].linear for path in self.layers]
            replace_leaves(self._samples.model, list(self.layers.values()), dense)
            raise

    def fit_all(self) -> None:
        """Fit all layers to what goes into them in the dense model."""
        saved = {}
        for stage in range(len(self._targets)):
            if (found := self._finished.load(stage)) is not None:
                saved |= self._restored(*found)
        left = {path: t.linear for path, t in self._targets.items() if path not in saved}
        recorder = Recorder(self._samples, left)
        for number in range(len(self._samples) if left else 0):
            self._bar.set_description(f"batch {number + 1} of {len(self._samples)}")
            recorder.run(number, lambda number=number: self._samples.run(number))
        self._bar.set_description("fit")
        moments = recorder.moments()
        for stage, (path, target) in enumerate(self._targets.items()):
            if path in moments:
                saved[path] = self._problem.fit(target, moments[path])
                self._keep(stage, {path: saved[path]})
            self._bar.update()
        self._put(saved)

    def fit_in_order(self, chain: BlockChain) -> None:
        """Fit the layers of one block after another to what goes into them in the sparse model."""
        for stage, block in enumerate(chain.blocks):
            self._bar.set_description(f"block {stage + 1} of {len(chain.blocks)}")
            inside = {id(module) for _, module in leaves_of(block)} | {id(block)}
            left = {p: t for p, t in self._targets.items() if id(t.linear) in inside}
            if (found := self._finished.load(stage)) is not None:
                self._put(self._restored(*found), chain)
                self._bar.update(len(left))
            else:
                self._keep(stage, self._fit_block(chain, left))
            if stage + 1 < len(chain.blocks):
                chain.advance()

    def _fit_block(
        self, chain: BlockChain, left: dict[str, Target]
    ) -> dict[str, tuple[BlockSparseLinear, Quality]]:
        """Fit the layers of the present block in the order in which they are called."""
        done: dict[str, tuple[BlockSparseLinear, Quality]] = {}
        order = Recorder(self._samples, {path: target.linear for path, target in left.items()})
        if left:
            order.run(0, lambda: chain.run(0))
        # Those that share their inputs together; at last those that the first batch did not reach.
        for paths in [*order.groups, tuple(left)]:
            group = {path: left[path].linear for path in paths if path not in done}
            if not group:
                continue
            recorder = Recorder(self._samples, group)
            for number in range(len(self._samples)):
                recorder.run(number, lambda number=number: chain.run(number))
            moments = recorder.moments()
            new = {p: self._problem.fit(left[p], moments[p]) for p in group if p in moments}
            self._put(new, chain)
            self._bar.update(len(group))
            done |= new
        return done

    def _put(
        self,
        new: Mapping[str, tuple[BlockSparseLinear, Quality]],
        chain: BlockChain | None = None,
    ) -> None:
        """Put new layers in the places of the dense ones."""
        dense = [self._targets[path].linear for path in new]
        layers = [layer for layer, _ in new.values()]
        replace_leaves(self._samples.model, dense, layers)
        self.layers |= dict(zip(new, layers, strict=True))
        self.quality |= {path: quality for path, (_, quality) in new.items()}
        if chain is not None:
            chain.replace(dense, layers)

    def _keep(self, stage: int, new: Mapping[str, tuple[BlockSparseLinear, Quality]]) -> None:
        """Keep the layers of a stage on disk."""
        arrays: dict[str, mx.array] = {}
        for path, (layer, _) in new.items():
            parts: dict[str, Any] = dict(layer.parameters())
            arrays |= {f"{path}.{name}": parts[name] for name in _PARTS if name in parts}
        notes = {path: asdict(quality) for path, (_, quality) in new.items()}
        self._finished.save(stage, arrays, notes)

    def _restored(
        self, arrays: dict[str, mx.array], notes: dict[str, Any]
    ) -> dict[str, tuple[BlockSparseLinear, Quality]]:
        """Return the layers of a stage from disk."""
        found = {}
        for path, quality in notes.items():
            target = self._targets[path]
            linear, weight = target.linear, arrays[f"{path}.weight"]
            pattern = CSRPattern(
                arrays[f"{path}.indptr"],
                arrays[f"{path}.indices"],
                linear.weight.shape,
                1 if weight.ndim == 1 else weight.shape[-1],
            )
            layer = BlockSparseLinear.from_linear(linear, pattern=pattern)
            layer.weight = weight
            if (bias := arrays.get(f"{path}.bias")) is not None:
                layer.bias = bias
            found[path] = layer, Quality(**quality)
        return found


_PARTS = ("weight", "bias", "indptr", "indices")
