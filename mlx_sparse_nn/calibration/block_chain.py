"""The blocks of a model, run one after another without the rest of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_sparse_nn.calibration.samples import Samples
from mlx_sparse_nn.layers.layer_calls import intercepted


class BlockChain:
    """Blocks that run one after another, and what goes into the next of them for each batch.

    The model runs once for each batch, to see how it calls its blocks, up to the last of them; of
    this nothing is computed but what goes into the first. From then on the blocks run alone, each
    on what the last one gave, with the other arguments that the model gave to it.

    Args:
        samples: The batches, and the model.
        blocks: Its blocks, in their order.

    Attributes:
        blocks: The blocks.
        differs: Whether the dense model gives something else to the present block.

    Raises:
        TypeError: ``blocks`` are not modules, or one takes or gives no array.
        ValueError: There is none, one comes twice, is not in the model or not called, or the model
            does not call each on what the last one gave.
    """

    def __init__(self, samples: Samples, blocks: Sequence[nn.Module]):
        self._samples, self.blocks = samples, _checked(samples, blocks)
        self._position = 0
        self.differs, self._gives_arrays = False, True
        self._inputs: list[mx.array] = []
        self._arguments: list[list[tuple[tuple, dict]]] = []  # of each batch, for each block
        for number in range(len(samples)):
            x, arguments = self._calls(number)
            mx.eval(x, [value for _, value in tree_flatten(arguments) if _is_array(value)])
            self._inputs.append(x)
            self._arguments.append(arguments)
        self._dense_inputs = list(self._inputs)

    @property
    def inputs(self) -> list[Any]:
        """What goes into the present block for each batch, with its other arguments."""
        arguments = [of_batch[self._position] for of_batch in self._arguments]
        return [[x, *other] for x, other in zip(self._inputs, arguments, strict=True)]

    def run(self, number: int) -> mx.array:
        """Return what the present block gives for a batch, not evaluated."""
        return self._run(number, self._inputs[number])

    def run_dense(self, number: int) -> mx.array:
        """Return what it gives on what the dense model gives to it, not evaluated."""
        return self._run(number, self._dense_inputs[number])

    def run_rest(self, number: int) -> Any:
        """Return what the whole model makes of a batch; blocks before the present one are left out.

        They are not, where the model's blocks give more than an array.
        """
        if not self._gives_arrays:
            return self._samples.run(number)

        def call(position: int, block: nn.Module, run: Any, x: mx.array, *args, **kwargs) -> Any:
            if position < self._position:
                return x
            here = position == self._position
            return run(block, self._inputs[number] if here else x, *args, **kwargs)

        with intercepted(self.blocks, call):
            return self._samples.run(number)

    def replace(self, old: Sequence[nn.Module], new: Sequence[nn.Module]) -> None:
        """Run ``new`` where ``old`` are blocks themselves, not modules in them."""
        other = {id(module): replacement for module, replacement in zip(old, new, strict=True)}
        self.blocks = [other.get(id(block), block) for block in self.blocks]

    def advance_dense(self) -> None:
        """Go on with what the present block, which is dense now, gives; :meth:`advance` is next."""
        for number in range(len(self._inputs)):
            self._dense_inputs[number] = self.run_dense(number)
            mx.eval(self._dense_inputs[number])
        self.differs = True

    def advance(self) -> None:
        """Go on to the next block, with what the present one gives."""
        for number in range(len(self._inputs)):
            self._inputs[number] = self.run(number)
            mx.eval(self._inputs[number])
        self._position += 1

    def _run(self, number: int, x: mx.array) -> mx.array:
        args, kwargs = self._arguments[number][self._position]
        return self._given(self.blocks[self._position](x, *args, **kwargs))

    def _calls(self, number: int) -> tuple[mx.array, list[tuple[tuple, dict]]]:
        """Return what goes into the first block for a batch, and all blocks' other arguments."""
        inputs: list[mx.array] = []
        arguments: list[tuple[tuple, dict]] = []
        outputs: list[mx.array] = []

        def call(position: int, block: nn.Module, run: Any, *args: Any, **kwargs: Any) -> Any:
            self._check_call(position, len(outputs), args, kwargs, outputs[-1:])
            inputs.append(args[0])
            arguments.append((args[1:], kwargs))
            given = run(block, *args, **kwargs)
            self._gives_arrays &= isinstance(given, mx.array)
            outputs.append(self._given(given))
            if len(outputs) == len(self.blocks):
                raise _LastBlockError
            return given

        with intercepted(self.blocks, call):
            try:
                self._samples.run(number)
            except _LastBlockError:
                return inputs[0], arguments
        raise ValueError(
            f"[{self._samples.owner}] blocks must all be called, but the model called "
            f"{len(outputs)} of {len(self.blocks)} for batch {number}"
        )

    def _check_call(
        self, position: int, expected: int, args: tuple, kwargs: dict, last: list[mx.array]
    ) -> None:
        """Raise unless a block is called in its turn, on what the last one gave."""
        owner = self._samples.owner
        way_out = "leave blocks out, then all layers are fitted to what the dense model computes"
        if position != expected:
            raise ValueError(
                f"[{owner}] blocks must be called in their order, once each, but block {position} "
                f"is called where block {expected} should be: {way_out}"
            )
        if not args or not isinstance(args[0], mx.array):
            kind = type(args[0]).__name__ if args else f"{', '.join(kwargs) or 'nothing'} by name"
            raise TypeError(
                f"[{owner}] blocks must take an array as their first argument, but block "
                f"{position} is called with {kind}: {way_out}"
            )
        if last and args[0] is not last[0]:
            raise ValueError(
                f"[{owner}] blocks must run one after another, but block {position} is not called "
                f"with what block {position - 1} gives: {way_out}"
            )
        for _, value in tree_flatten([args[1:], kwargs]):
            if hasattr(value, "update_and_fetch"):  # the protocol of mlx-lm
                raise ValueError(
                    f"[{owner}] blocks must keep no state, but block {position} is called with a "
                    f"{type(value).__name__}: let call run the model without a cache"
                )

    def _given(self, output: Any) -> mx.array:
        """Return the array that a block passes on: what it gives, or the first of a tuple."""
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, mx.array):
            raise TypeError(
                f"[{self._samples.owner}] blocks must give an array, or a tuple that begins with "
                f"one, got {type(first).__name__}"
            )
        return first


class _LastBlockError(BaseException):  # no Exception: a model might catch that
    """Ends a run of the model where its last block has run."""


def _is_array(value: object) -> bool:
    return isinstance(value, mx.array)


def _checked(samples: Samples, blocks: object) -> list[nn.Module]:
    """Return the blocks, or raise unless they are different modules of the model."""
    owner = samples.owner
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        raise TypeError(
            f"[{owner}] blocks must be a list of modules, got {type(blocks).__name__}; such as "
            "model.layers"
        )
    for position, block in enumerate(blocks):
        if not isinstance(block, nn.Module):
            raise TypeError(
                f"[{owner}] blocks must be modules, got {type(block).__name__} at {position}"
            )
    if not blocks:
        raise ValueError(f"[{owner}] blocks must hold a module, got none")
    found = [id(block) for block in blocks]
    inside = {id(module) for _, module in samples.model.named_modules()}
    for position, block in enumerate(found):
        if block not in inside:
            raise ValueError(f"[{owner}] blocks must be in the model, but block {position} is not")
        if (first := found.index(block)) != position:
            raise ValueError(
                f"[{owner}] blocks must be different modules, but blocks {first} and {position} "
                "are one: leave blocks out"
            )
    return list(blocks)
