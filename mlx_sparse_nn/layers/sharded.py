"""Block-sparse layers on more than one process: one pattern everywhere, or a part on each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import sum_gradients

from mlx_sparse_nn.core import derivatives
from mlx_sparse_nn.core.checks import (
    check_features,
    check_indices,
    check_model,
    check_name,
)
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.transforms import needs_rules, tracing
from mlx_sparse_nn.layers.checkpoints import fingerprint, sha256
from mlx_sparse_nn.layers.linear import BlockSparseLinear, check_layer
from mlx_sparse_nn.layers.lora import SparseLinear
from mlx_sparse_nn.layers.pattern_module import PatternModule, carry_mode

Sharding: TypeAlias = Literal["all-to-sharded", "sharded-to-all"]


def check_same_pattern(model: nn.Module, group: mx.distributed.Group | None = None) -> None:
    """Raise the same error on every rank unless all of them hold the same patterns.

    ``nn.average_gradients`` adds up what the ranks store at the same place in their arrays. Where
    patterns differ it adds up gradients of different weights, or waits forever for arrays of
    another size. Call this before training in data parallel, and after each change of a pattern.
    Every rank has to call it. Sharded layers are left out: theirs differ.

    Args:
        model: The model of this rank.
        group: The processes that compare theirs, all of them by default.

    Raises:
        TypeError: ``model`` is not a module, or ``group`` not a group.
        ValueError: Ranks disagree. Says on which layer.
    """
    check_model("check_same_pattern", model)
    group = _checked_group("check_same_pattern", group)
    if group.size() == 1:
        return
    # Sizes that all ranks know, so that none waits for more than another sends.
    text = json.dumps(_describe(model)).encode()
    digest = np.frombuffer(sha256(text), np.uint8)
    if (_gather(digest, group) == digest).all(axis=1).all():
        return
    longest = int(_gather(np.array([len(text)], np.int32), group).max())
    texts = _gather(np.frombuffer(text.ljust(longest), np.uint8), group)
    raise ValueError(_disagreement([json.loads(text.tobytes()) for text in texts]))


def shard_boundaries(
    outputs_of: Sequence[BlockSparseLinear] = (),
    inputs_of: Sequence[BlockSparseLinear] = (),
    *,
    group: mx.distributed.Group | None = None,
) -> tuple[int, ...]:
    """Cut features into one range per rank, so that ranks hold about as many stored values.

    The features are those between some layers and the next: the outputs of the ones, which become
    "all-to-sharded", and the inputs of the others, which become "sharded-to-all". Sharded by the
    same boundaries, each rank computes its hidden features and uses them, without communication.

    A rank's share differs from the mean by at most the values stored at one block of features.
    Cuts fall between blocks of all layers. All ranks have to hold the same patterns, as
    :func:`check_same_pattern` ensures.

    Args:
        outputs_of: Layers whose outputs these features are, such as the gate and up projections.
        inputs_of: Layers whose inputs they are, such as the down projection.
        group: The processes to share the features, all of them by default.

    Returns:
        Where each rank's features begin, and the number of features: ``group.size() + 1`` numbers.

    Raises:
        TypeError: A layer is not a BlockSparseLinear, or ``group`` not a group.
        ValueError: There is no layer, the layers differ in the number of these features, or there
            are fewer blocks of features than ranks.

    Example:
        >>> boundaries = shard_boundaries([mlp.up], [mlp.down])
        >>> mlp.up = shard_block_sparse(mlp.up, "all-to-sharded", boundaries=boundaries)
        >>> mlp.down = shard_block_sparse(mlp.down, "sharded-to-all", boundaries=boundaries)
    """
    owner, sides = "shard_boundaries", []  # (block of features of each stored block, features, B)
    for axis, layers in enumerate((outputs_of, inputs_of)):
        for layer in layers:
            check_layer(owner, layer)
            sides.append((_along(layer.pattern, axis), layer.pattern.shape[axis], layer.block_size))
    if not sides:
        raise ValueError(f"[{owner}] no layer is given")
    sizes = sorted({features for _, features, _ in sides})
    if len(sizes) > 1:
        raise ValueError(f"[{owner}] layers have different numbers of these features: {sizes}")
    unit = math.lcm(*(block_size for _, _, block_size in sides))
    n_ranks = _checked_group(owner, group).size()
    n_units = -(-sizes[0] // unit)
    if n_units < n_ranks:
        raise ValueError(
            f"[{owner}] {sizes[0]} features are {n_units} blocks of {unit}, fewer than "
            f"the {n_ranks} ranks"
        )
    stored = np.zeros(n_units, np.int64)
    for block_indices, _, block_size in sides:
        stored += np.bincount(block_indices * block_size // unit, minlength=n_units) * block_size**2
    return tuple(min(int(cut) * unit, sizes[0]) for cut in _cuts(stored, n_ranks))


def shard_block_sparse(
    layer: BlockSparseLinear,
    sharding: Sharding,
    *,
    boundaries: Sequence[int] | None = None,
    group: mx.distributed.Group | None = None,
) -> AllToShardedBlockSparseLinear | ShardedToAllBlockSparseLinear:
    """Return this rank's part of a layer, as ``mlx.nn.layers.distributed.shard_linear`` does.

    Args:
        layer: The whole layer, the same on every rank. It is not changed.
        sharding: ``"all-to-sharded"`` splits the block-rows: every rank takes all inputs and
            returns its range of the outputs. ``"sharded-to-all"`` splits the block-columns: every
            rank takes its range of the inputs, and all get all outputs.
        boundaries: Where each rank's range of those features begins, and their number:
            ``group.size() + 1`` rising numbers, all but the last of them multiples of the block
            size. By default those that balance this layer's stored blocks. Two layers that share
            features need the same ones, from :func:`shard_boundaries`.
        group: The processes to share the layer, all of them by default.

    Raises:
        TypeError: ``layer`` is not a BlockSparseLinear, ``group`` not a group, or a boundary not an
            integer.
        ValueError: ``sharding`` is another word, or ``boundaries`` do not fit.
    """
    owner = "shard_block_sparse"
    check_layer(owner, layer)
    check_name(owner, "sharding", sharding, tuple(_SHARDED))
    group = _checked_group(owner, group)
    axis, kind = _SHARDED[sharding]
    if boundaries is None:
        layers = [[layer], []] if axis == 0 else [[], [layer]]
        boundaries = shard_boundaries(*layers, group=group)
    else:
        features = layer.pattern.shape[axis]
        boundaries = _check_boundaries(boundaries, group.size(), features, layer.block_size)
    start, stop = boundaries[group.rank()], boundaries[group.rank() + 1]
    pattern, stored = _slice(layer.pattern, axis, start, stop)
    bias = layer.get("bias")
    if bias is not None and axis == 0:
        bias = bias[start:stop]
    return carry_mode(layer, kind(pattern, layer.weight[mx.array(stored)], bias, group))


class _Sharded(PatternModule):
    """A rank's part of a layer."""

    def __init__(
        self,
        pattern: CSRPattern,
        weight: mx.array,
        bias: mx.array | None,
        group: mx.distributed.Group,
    ):
        super().__init__(pattern)
        self.group = group
        self.weight = weight
        if bias is not None:
            self.bias = bias


class AllToShardedBlockSparseLinear(_Sharded):
    """A rank's block-rows of a layer: from all inputs to this rank's range of the outputs.

    The gradient to the input is summed over the ranks, while each computes that of its weight. Made
    by :func:`shard_block_sparse`.

    Attributes:
        weight: The stored blocks of these rows, ``(n_blocks, block_size, block_size)``.
        bias: That of this rank's outputs, ``(output_dims,)``, if there is one.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Return this rank's outputs: ``(..., input_dims)`` -> ``(..., output_dims)``."""
        check_features(type(self).__name__, "x", x, "input_dims", self.input_dims)
        weight, bias = self.weight, self.get("bias")
        if self._overlaps(x):
            return self._summing_early()(weight, x, *(() if bias is None else (bias,)))
        x = sum_gradients(self.group)(x)  # pyright: ignore[reportCallIssue]
        return self._multiply(weight, x, bias)

    def _overlaps(self, x: mx.array) -> bool:
        if self.group.size() == 1 or tracing.graph is not None or not needs_rules():
            return False
        return x.dtype == self.weight.dtype and mx.issubdtype(x.dtype, mx.floating)

    def _summing_early(self) -> Callable[..., mx.array]:
        """Return the product of weight, x and perhaps a bias. Of its gradients, that to x comes
        first, and those of the parameters are computed while the ranks sum it up."""
        layout, group = self._bound_layout(), self.group

        def vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple:
            weight, x, *bias = primals
            y, rows = (a.reshape(-1, a.shape[-1]) for a in (cotangent, x))
            d_x = derivatives.spmm_t(layout, weight, y)
            total = mx.distributed.all_sum(d_x, group=group).reshape(x.shape)
            d_weight = derivatives.sddmm(layout.waiting_for(d_x), y, rows)
            return d_weight, total, *(y.sum(axis=0) for _ in bias)

        product: Any = mx.custom_function(lambda *operands: self._multiply(*operands))
        product.vjp(vjp)
        return product


class ShardedToAllBlockSparseLinear(_Sharded):
    """A rank's block-columns of a layer: from this rank's range of the inputs to all outputs.

    Every rank gets the sum over the ranks. Made by :func:`shard_block_sparse`.

    Attributes:
        weight: The stored blocks of these columns, ``(n_blocks, block_size, block_size)``.
        bias: The whole bias, ``(output_dims,)``, the same on every rank, if there is one.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Return all outputs on every rank: ``(..., input_dims)`` -> ``(..., output_dims)``."""
        y = mx.distributed.all_sum(self._multiply(self.weight, x), group=self.group)
        return y + self.bias if "bias" in self else y


# The axis of the weight, (output_dims, input_dims), that is split.
_SHARDED = {
    "all-to-sharded": (0, AllToShardedBlockSparseLinear),
    "sharded-to-all": (1, ShardedToAllBlockSparseLinear),
}


def _describe(model: nn.Module) -> list[tuple[str, str, str]]:
    """Return path, sizes and a digest of every pattern in a model."""
    described = []
    for path, module in model.named_modules():
        if isinstance(module, SparseLinear):
            pattern = module.pattern
            described.append((path, repr(pattern), fingerprint(pattern)))
    return sorted(described)


def _disagreement(described: list[list[list[str]]]) -> str:
    """Return in words the first pattern on which ranks differ, from what each described."""
    ranks = [{path: pattern for path, *pattern in patterns} for patterns in described]
    differing = [
        path
        for path in sorted(set().union(*ranks))
        if any(rank.get(path) != ranks[0].get(path) for rank in ranks)
    ]
    path = differing[0]
    first = ranks[0].get(path)
    other = next(i for i, rank in enumerate(ranks) if rank.get(path) != first)
    names = [pattern[0] if pattern else "none" for pattern in (first, ranks[other].get(path))]
    if names[0] == names[1]:
        names[1] = "another one of these sizes"
    return (
        f"[check_same_pattern] ranks hold different patterns, in {len(differing)} layers: at "
        f"{path!r} rank 0 has {names[0]}, rank {other} has {names[1]}; seed all ranks alike, or "
        "load one checkpoint on all"
    )


def _checked_group(owner: str, group: mx.distributed.Group | None) -> mx.distributed.Group:
    """Return the group, all processes by default, or raise."""
    if group is None:
        return mx.distributed.init()
    if not all(callable(getattr(group, name, None)) for name in ("rank", "size")):
        raise TypeError(f"[{owner}] group must be an mx.distributed.Group, got {group!r}")
    return group


def _gather(values: np.ndarray, group: mx.distributed.Group) -> np.ndarray:
    """Return the ``(n,)`` values of every rank, ``(n_ranks, n)``."""
    return np.array(mx.distributed.all_gather(mx.array(values)[None], group=group))


def _check_boundaries(
    boundaries: Sequence[int], n_ranks: int, features: int, block_size: int
) -> tuple[int, ...]:
    """Return ``boundaries`` as ints, or raise."""
    owner = "shard_block_sparse"
    cuts = check_indices(owner, "boundaries", boundaries).tolist()
    if len(cuts) != n_ranks + 1:
        raise ValueError(
            f"[{owner}] boundaries must be {n_ranks + 1} numbers for {n_ranks} ranks, got {cuts}"
        )
    if cuts[0] != 0 or cuts[-1] != features or sorted(set(cuts)) != cuts:
        raise ValueError(f"[{owner}] boundaries must rise from 0 to {features}, got {cuts}")
    for cut in cuts[1:-1]:
        if cut % block_size:
            raise ValueError(
                f"[{owner}] boundary {cut} is not a multiple of block_size {block_size}"
            )
    return tuple(cuts)


def _cuts(stored: np.ndarray, n_ranks: int) -> list[int]:
    """Cut the units that store so much each into ``n_ranks`` ranges of at least one unit."""
    before = np.concatenate([[0], np.cumsum(stored)])
    cuts = [0]
    for rank in range(1, n_ranks):
        nearest = int(np.abs(before - before[-1] * rank / n_ranks).argmin())
        cuts.append(min(max(nearest, cuts[-1] + 1), stored.size - n_ranks + rank))
    return [*cuts, stored.size]


def _along(pattern: CSRPattern, axis: int) -> np.ndarray:
    """Return the block-row (axis 0) or block-column (axis 1) of each stored block."""
    return pattern.row_indices if axis == 0 else pattern.indices


def _slice(pattern: CSRPattern, axis: int, start: int, stop: int) -> tuple[CSRPattern, np.ndarray]:
    """Return the pattern of a range of rows or columns, and where its blocks are stored."""
    block_size = pattern.block_size
    scalars = _along(pattern, axis) * block_size  # where each block begins
    inside = (scalars >= start) & (scalars < stop)
    before = np.concatenate([[0], np.cumsum(inside)])[pattern.indptr]  # inside, by block-row
    if axis == 0:
        indptr, shape = (
            before[start // block_size : -(-stop // block_size) + 1],
            (stop - start, pattern.shape[1]),
        )
        indices = pattern.indices[inside]
    else:
        indptr, shape = before, (pattern.shape[0], stop - start)
        indices = pattern.indices[inside] - start // block_size
    part = CSRPattern(indptr, indices, shape, block_size)
    return part, np.flatnonzero(inside).astype(np.int32)
