"""The layers of a model, fitted one after another and put in their places."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_sparse_nn.calibration.block_chain import BlockChain
from mlx_sparse_nn.calibration.record import Recorded, Recorder, layer_inputs
from mlx_sparse_nn.calibration.resume import FinishedStages
from mlx_sparse_nn.calibration.samples import Samples
from mlx_sparse_nn.core.fit import choose_by_moments, fit_pattern
from mlx_sparse_nn.core.least_squares import LastProblem
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.layers.linear import BlockSparseLinear, write_values
from mlx_sparse_nn.surgery.selection import leaves_of, replace_leaves
from mlx_sparse_nn.surgery.targets import Target

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass(frozen=True)
class Quality:
    """How well a layer was fitted.

    Attributes:
        error_kept: Relative error of its outputs with the dense layer's values and bias: the norm
            of what is missing over that of the outputs without a bias. Outputs are compared with
            those of the dense weight that is best for the target: without ``blocks`` and in the
            first layer this is the layer's own.
        error_fitted: The same with values and bias fitted.
        seconds: What choosing and fitting took.
        n_samples: Tokens that went into it.
    """

    error_kept: float
    error_fitted: float
    seconds: float
    n_samples: int


class LayerFits:
    """Fits layers, one after another.

    Args:
        owner: Who errors speak for.
        damping: As in :func:`calibrate`.
    """

    def __init__(self, owner: str, damping: float):
        self._owner, self._problem = owner, LastProblem(damping)

    def fit(self, target: Target, inputs: Recorded) -> tuple[BlockSparseLinear, Quality]:
        """Return the sparse layer of a dense one."""
        start = time.perf_counter()
        options, linear = target.options, target.linear
        owner = f"{self._owner} {target.paths[0]}".rstrip()
        bias = linear.get("bias")
        problem = self._problem.of(inputs.moments, bias is not None, inputs.dense)
        pattern = options.pattern
        if pattern is None:
            pattern = choose_by_moments(
                owner, linear.weight, problem, options.block_size, options.density, options.balance
            )
        fit = fit_pattern(owner, linear.weight, bias, pattern, problem)
        layer = BlockSparseLinear.from_linear(linear, pattern=pattern)
        write_values(layer, fit.weight, fit.bias)
        mx.eval(layer.parameters())  # the dense weight need not be kept for it
        seconds = time.perf_counter() - start
        return layer, Quality(fit.error_before, fit.error_after, seconds, inputs.moments.n)


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
        self._fits = LayerFits(samples.owner, damping)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Put the dense layers back where an error, or an interruption, ends this."""
        try:
            yield
        except BaseException:
            dense = [self._targets[path].linear for path in self.layers]
            self._replace(list(self.layers.values()), dense)
            raise

    def fit_all(self) -> None:
        """Fit all layers to what goes into them in the dense model."""
        saved = {}
        for stage in range(len(self._targets)):
            if (found := self._finished.load(stage)) is not None:
                saved |= self._restored(*found)
        left = {path: t.linear for path, t in self._targets.items() if path not in saved}
        recorder = Recorder(self._samples)
        for number in range(len(self._samples) if left else 0):
            self._bar.set_description(f"batch {number + 1} of {len(self._samples)}")
            recorder.add(
                number, layer_inputs(self._samples.owner, left, partial(self._samples.run, number))
            )
        self._bar.set_description("fit")
        inputs = recorder.result()
        for stage, (path, target) in enumerate(self._targets.items()):
            if path in inputs and _holds_something(inputs[path]):
                saved[path] = self._fits.fit(target, inputs[path])
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
                with self._dense(chain):
                    chain.advance_dense()
                chain.advance()

    def _fit_block(
        self, chain: BlockChain, left: dict[str, Target]
    ) -> dict[str, tuple[BlockSparseLinear, Quality]]:
        """Fit the layers of the present block in the order in which they are called."""
        done: dict[str, tuple[BlockSparseLinear, Quality]] = {}
        if not left:
            return done
        order = layer_inputs(
            self._samples.owner, {p: t.linear for p, t in left.items()}, partial(chain.run, 0)
        )
        # Those that share their inputs together; at last those that the first batch did not reach.
        for paths in [*(paths for _, paths in order), tuple(left)]:
            group = {path: left[path].linear for path in paths if path not in done}
            if not group:
                continue
            recorder = Recorder(self._samples)
            for number in range(len(self._samples)):
                inputs = layer_inputs(self._samples.owner, group, partial(chain.run, number))
                dense = None  # the same
                if chain.differs or done:
                    with self._dense(chain):
                        dense = layer_inputs(
                            self._samples.owner, group, partial(chain.run_dense, number)
                        )
                recorder.add(number, inputs, dense)
            new = {
                path: self._fits.fit(left[path], seen)
                for path, seen in recorder.result().items()
                if _holds_something(seen)
            }
            self._put(new, chain)
            self._bar.update(len(group))
            done |= new
        return done

    @contextmanager
    def _dense(self, chain: BlockChain) -> Iterator[None]:
        """Put the dense layers back for a while."""
        sparse = list(self.layers.values())
        dense = [self._targets[path].linear for path in self.layers]
        self._replace(sparse, dense, chain)
        try:
            yield
        finally:
            self._replace(dense, sparse, chain)

    def _put(
        self,
        new: Mapping[str, tuple[BlockSparseLinear, Quality]],
        chain: BlockChain | None = None,
    ) -> None:
        """Put new layers in the places of the dense ones."""
        dense = [self._targets[path].linear for path in new]
        layers = [layer for layer, _ in new.values()]
        self.layers |= dict(zip(new, layers, strict=True))  # first: an interruption puts them back
        self._replace(dense, layers, chain)
        self.quality |= {path: quality for path, (_, quality) in new.items()}

    def _replace(
        self, old: Sequence[nn.Module], new: Sequence[nn.Module], chain: BlockChain | None = None
    ) -> None:
        replace_leaves(self._samples.model, old, new)
        if chain is not None:
            chain.replace(old, new)

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
            write_values(layer, weight, arrays.get(f"{path}.bias"))
            found[path] = layer, Quality(**quality)
        return found


def _holds_something(inputs: Recorded) -> bool:
    """Return whether what went in was not zeros alone."""
    return bool(inputs.moments.second.any())


_PARTS = ("weight", "bias", "indptr", "indices")
