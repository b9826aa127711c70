"""What each process of test_sharded.py runs: every check, on all ranks at once.

Usage: ``MLX_RANK=... python -m layers.sharded_worker results.json ring``, or ``nccl``, beside the
variables that MLX's backend asks for. After a check fails the process writes what it has and exits,
since the ranks are out of step from then on.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_flatten
from support import assert_equal, flatten, integers, random_pattern

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn.layers.sharded import (
    check_same_pattern,
    shard_block_sparse,
    shard_boundaries,
)

X = 6  # rows of x


def whole_layer(n_rows=7, n_cols=9, block_size=8, bias=True, density=0.4):
    """A layer of whole numbers with uneven and empty rows: results are exact."""
    pattern = random_pattern(n_rows, n_cols, block_size, density)
    layer = BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern, bias=bias)
    layer.weight = integers(pattern.data_shape, 1)
    if bias:
        layer.bias = integers((pattern.shape[0],), 2)
    return layer


def dense_gradient(layer, values):
    """The values on the pattern of a layer, dense, to compare parts with slices of the whole."""
    sampled = BlockSparseLinear(layer.input_dims, layer.output_dims, layer.pattern, bias=False)
    sampled.weight = values
    return sampled.todense()


def gradients(layer, x, cotangent):
    """Output, gradient by x, and gradients by the parameters of ``sum(layer(x) * cotangent)``."""
    loss = lambda layer, x: (layer(x) * cotangent).sum()
    grads = nn.value_and_grad(layer, lambda x: loss(layer, x))(x)[1]
    return layer(x), mx.grad(lambda x: loss(layer, x))(x), grads


def check_all_to_sharded(group, **options):
    layer = whole_layer(**options)
    x, c = integers((X, layer.input_dims), 3), integers((X, layer.output_dims), 4)
    y, dx, grads = gradients(layer, x, c)
    for cuts in (None, even(layer.output_dims, layer.block_size, group)):
        part = shard_block_sparse(layer, "all-to-sharded", boundaries=cuts, group=group)
        cuts = cuts or shard_boundaries([layer], group=group)
        own = slice(cuts[group.rank()], cuts[group.rank() + 1])
        part_y, part_dx, part_grads = gradients(part, x, c[:, own])
        assert_equal(part_y, y[:, own])
        assert_equal(part_dx, dx)
        weight = dense_gradient(part, part_grads["weight"])
        assert_equal(weight, dense_gradient(layer, grads["weight"])[own])
        assert ("bias" in part) == ("bias" in layer)
        if "bias" in part:
            assert_equal(part_grads["bias"], grads["bias"][own])


def check_sharded_to_all(group, **options):
    layer = whole_layer(**options)
    x, c = integers((X, layer.input_dims), 3), integers((X, layer.output_dims), 4)
    y, dx, grads = gradients(layer, x, c)
    for cuts in (None, even(layer.input_dims, layer.block_size, group)):
        part = shard_block_sparse(layer, "sharded-to-all", boundaries=cuts, group=group)
        cuts = cuts or shard_boundaries([], [layer], group=group)
        own = slice(cuts[group.rank()], cuts[group.rank() + 1])
        part_y, part_dx, part_grads = gradients(part, x[:, own], c)
        assert_equal(part_y, y)
        assert_equal(part_dx, dx[:, own])
        weight = dense_gradient(part, part_grads["weight"])
        assert_equal(weight, dense_gradient(layer, grads["weight"])[:, own])
        if "bias" in part:
            assert_equal(part_grads["bias"], grads["bias"])


def even(features, block_size, group):
    """Boundaries of ranges of about as many blocks each."""
    cuts = np.linspace(0, features // block_size, group.size() + 1).round().astype(int)
    return [int(cut) * block_size for cut in cuts]


def check_without_bias(group):
    check_all_to_sharded(group, bias=False)
    check_sharded_to_all(group, bias=False)


def check_scalars(group):
    check_all_to_sharded(group, block_size=1, n_rows=20, n_cols=30)
    check_sharded_to_all(group, block_size=1, n_rows=20, n_cols=30)


def check_a_rank_without_blocks(group):
    n = group.size()
    pattern = CSRPattern([0] + [3] * n, [0, 0, 0], (4 * n, 4 * n), 4)
    layer = BlockSparseLinear(4 * n, 4 * n, pattern)
    layer.weight, layer.bias = integers((3, 4, 4), 1), integers((4 * n,), 2)
    x, c = integers((X, 4 * n), 3), integers((X, 4 * n), 4)
    y, dx, _ = gradients(layer, x, c)
    own = slice(4 * group.rank(), 4 * group.rank() + 4)
    rows = shard_block_sparse(layer, "all-to-sharded", group=group)
    part_y, part_dx, part_grads = gradients(rows, x, c[:, own])
    assert_equal(part_y, y[:, own])
    assert_equal(part_dx, dx)
    assert part_grads["weight"].shape[0] == (3 if group.rank() == 0 else 0)
    columns = shard_block_sparse(layer, "sharded-to-all", group=group)
    part_y, part_dx, _ = gradients(columns, x[:, own], c)
    assert_equal(part_y, y)
    assert_equal(part_dx, dx[:, own])


class MLP(nn.Module):
    """A gated one, whose hidden features two layers make and one takes, in other block sizes."""

    # Whole layers, and after `shard` a part of each.
    gate: Any
    up: Any
    down: Any

    def __init__(self):
        super().__init__()
        mx.random.seed(1)
        self.gate = BlockSparseLinear(32, 96, block_size=4, density=0.4)
        self.up = BlockSparseLinear(32, 96, random_pattern(12, 4, 8))
        self.down = BlockSparseLinear(96, 32, random_pattern(2, 6, 16, density=0.6))

    def __call__(self, x):
        return self.down(nn.silu(self.gate(x)) * self.up(x))

    def shard(self, group):
        cuts = shard_boundaries([self.gate, self.up], [self.down], group=group)
        self.gate = shard_block_sparse(self.gate, "all-to-sharded", boundaries=cuts, group=group)
        self.up = shard_block_sparse(self.up, "all-to-sharded", boundaries=cuts, group=group)
        self.down = shard_block_sparse(self.down, "sharded-to-all", boundaries=cuts, group=group)
        return cuts


def train(model, compiled):
    """Take three steps and return the losses."""
    optimizer = optim.Adam(1e-2)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def step(x):
        loss, grads = nn.value_and_grad(model, lambda x: ((model(x) - 1) ** 2).mean())(x)
        optimizer.update(model, grads)
        return loss

    step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    losses = []
    for i in range(3):
        losses.append(step(mx.random.normal((X, 32), key=mx.random.key(i))))
        mx.eval(losses, state)
    return mx.array(losses)


def check_training_an_mlp_in_parts(group, compiled=False):
    whole, parts = MLP(), MLP()
    check_same_pattern(whole, group)
    cuts = parts.shard(group)
    assert all(cut % 16 == 0 for cut in cuts)
    own = slice(cuts[group.rank()], cuts[group.rank() + 1])
    assert mx.allclose(train(parts, compiled), train(whole, compiled=False), rtol=1e-4)
    for name, place in (("gate", own), ("up", own), ("down", (slice(None), own))):
        part, layer = parts[name], whole[name]
        dense = dense_gradient(part, part.weight)
        assert mx.allclose(dense, layer.todense()[place], rtol=1e-3, atol=1e-5), name
        bias = layer.bias if name == "down" else layer.bias[own]
        assert mx.allclose(part.bias, bias, rtol=1e-3, atol=1e-5), name


def check_training_an_mlp_in_parts_compiled(group):
    check_training_an_mlp_in_parts(group, compiled=True)


def check_mixed_with_a_dense_sharded_layer(group):
    """MLX's own shard_linear and ours share features where the boundaries are even."""
    n = group.size()
    up, down = whole_layer(n_rows=2 * n, n_cols=4), nn.Linear(16 * n, 8)
    down.weight = integers(down.weight.shape, 5)
    x = integers((X, 32), 3)
    expected = down(nn.relu(up(x)))
    cuts = even(16 * n, 8, group)
    up = shard_block_sparse(up, "all-to-sharded", boundaries=cuts, group=group)
    down = shard_linear(down, "sharded-to-all", group=group)
    assert mx.allclose(down(nn.relu(up(x))), expected, rtol=1e-5)


def check_bfloat16(group):
    layer = whole_layer()
    layer.set_dtype(mx.bfloat16)
    x = integers((X, layer.input_dims), 3).astype(mx.bfloat16)
    part = shard_block_sparse(layer, "sharded-to-all", group=group)
    cuts = shard_boundaries([], [layer], group=group)
    own = slice(cuts[group.rank()], cuts[group.rank() + 1])
    y, expected = part(x[:, own]), layer(x)
    assert y.dtype == mx.bfloat16
    scale = mx.abs(expected).max().item()
    assert mx.abs(y - expected).max().item() <= scale * 2**-7 * group.size()


def check_a_sharded_layer_is_a_module(group):
    layer = whole_layer()
    layer.freeze(keys="bias")
    layer.eval()
    part = shard_block_sparse(layer, "all-to-sharded", group=group)
    assert not part.training
    names = lambda: {name for name, _ in tree_flatten(part.trainable_parameters())}
    assert names() == {"weight"}
    part.unfreeze()
    assert names() == {"weight", "bias"}
    x = integers((X, layer.input_dims), 3)
    y = part(x)
    part.load_weights([(name, a * 1) for name, a in flatten(part.parameters())])
    assert_equal(part(x), y)
    for bad in ([("indices", part.indices + 100)], [("weight", part.weight[:-1])]):
        raised = caught(lambda: part.load_weights(bad, strict=False))  # noqa: B023
        assert "[AllToShardedBlockSparseLinear]" in raised, raised


def check_data_parallel(group):
    """Averaged gradients of a part of the batch each are those of the whole batch, everywhere."""
    n = group.size()
    whole, model = whole_layer(), whole_layer()
    check_same_pattern(model, group)
    x = integers((4 * n, model.input_dims), 3)
    c = integers((4 * n, model.output_dims), 4)
    _, _, expected = gradients(whole, x, c)
    own = slice(4 * group.rank(), 4 * group.rank() + 4)
    _, _, grads = gradients(model, x[own], c[own])
    for size in (32 * 1024**2, 0):
        averaged = nn.average_gradients(grads, group, all_reduce_size=size)
        for name in ("weight", "bias"):
            assert_equal(averaged[name], expected[name] / n)
    optimizer = optim.Adam(1e-2)
    optimizer.update(model, averaged)
    everywhere = mx.distributed.all_gather(model.weight[None], group=group)
    assert mx.all(everywhere == everywhere[:1]).item()
    assert not mx.array_equal(model.weight, whole.weight)


def caught(call):
    """Return what a call raises, as text."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing"


def model_of(*patterns):
    layers = [BlockSparseLinear(p.shape[1], p.shape[0], p) for p in patterns]
    return nn.Sequential(nn.Linear(3, 3), *layers)


def check_same_patterns_pass(group):
    mx.random.seed(group.rank())  # other weights, same patterns
    patterns = [random_pattern(3, 5, 32), random_pattern(9, 4, 1)]
    model = model_of(*patterns)
    check_same_pattern(model, group)
    model.layers[1] = model.layers[1].to_quantized()
    check_same_pattern(model, group)
    check_same_pattern(nn.Linear(2, 2), group)
    # Sharded layers hold other patterns on other ranks.
    model.layers[2] = shard_block_sparse(model.layers[2], "all-to-sharded", group=group)
    check_same_pattern(model, group)


def check_a_disagreement_is_raised_alike_on_all_ranks(group):
    last = group.rank() == group.size() - 1
    a, b = CSRPattern([0, 1, 2], [0, 1], (16, 32), 8), CSRPattern([0, 1, 2], [0, 2], (16, 32), 8)
    more, wide = CSRPattern([0, 2, 3], [0, 1, 1], (16, 32), 8), random_pattern(3, 4, 8)
    other = f"rank {group.size() - 1} has "
    for mine, theirs, expected in (
        ([a], [b], f"'layers.1' rank 0 has {a!r}, {other}another one of these sizes"),
        ([a, wide], [more, wide], f"'layers.1' rank 0 has {a!r}, {other}{more!r}"),
        ([a, a], [a, b], f"in 1 layers: at 'layers.2' rank 0 has {a!r}"),
        ([a], [], f"'layers.1' rank 0 has {a!r}, {other}none"),
        ([], [a, a], f"in 2 layers: at 'layers.1' rank 0 has none, {other}{a!r}"),
        ([wide] * 40, [a], "in 40 layers: at 'layers.1'"),
    ):
        raised = caught(lambda: check_same_pattern(model_of(*theirs if last else mine), group))  # noqa: B023
        assert "[check_same_pattern] ranks hold different patterns" in raised, raised
        assert expected in raised, raised
        text = np.frombuffer(raised.encode().ljust(2000), np.uint8)
        texts = np.array(mx.distributed.all_gather(mx.array(text)[None], group=group))
        assert (texts == text).all()


def check_the_ranks_are_still_in_step(group):
    total = mx.distributed.all_sum(mx.array(group.rank() + 1), group=group)
    assert total.item() == group.size() * (group.size() + 1) // 2


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and check is not check_same_pattern
}


def main(results: Path, backend: str):
    group = mx.distributed.init(strict=True, backend=backend)
    outcomes = {}
    for name, check in CHECKS.items():
        mx.random.seed(0)
        try:
            check(group)
            outcomes[name] = "passed"
        except BaseException:
            outcomes[name] = traceback.format_exc()
        results.write_text(json.dumps(outcomes))
        if outcomes[name] != "passed":
            os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
