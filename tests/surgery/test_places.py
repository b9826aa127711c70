"""Scores that know their layer and where its blocks lie, wherever blocks are chosen."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support import random_pattern

from mlx_sparse_nn import BlockSparseLinear, prune, regrow, sparsify

INPUTS = {
    "layers.0": np.arange(1.0, 25.0),  # (24,): how large each input is
    "layers.1": np.arange(40.0, 0.0, -1.0),
}


def wanda(blocks, places):
    """``sum |W_ij| |x_j|`` of each block: what a score of blocks alone cannot tell."""
    size = places.block_size
    x = np.pad(INPUTS[places.path], (0, -places.shape[1] % size))
    x = x.reshape(-1, size)[places.cols]  # (n_blocks, B)
    assert places.rows.max() < -(-places.shape[0] // size)
    return np.einsum("nij,nj->n", np.abs(np.array(blocks)), x)


def make_model():
    return nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24))


def weighted_by_hand(weight, path, size=8):
    """The same of all blocks of a dense weight ``(R, C)``, by loops."""
    weight = np.abs(np.array(weight)) * INPUTS[path]
    rows, cols = weight.shape[0] // size, weight.shape[1] // size
    cut = lambda i: slice(i * size, (i + 1) * size)
    return np.array([[weight[cut(r), cut(c)].sum() for c in range(cols)] for r in range(rows)])


def stored(layer):
    mask = np.zeros(layer.pattern.grid, bool)
    mask[layer.pattern.row_indices, layer.pattern.indices] = True
    return mask


@pytest.mark.parametrize("scope", ["layer", "global", "erdos-renyi"])
def test_sparsify_under_every_scope(scope):
    """Under "global" one function serves layers that each need a score of their own."""
    model = make_model()
    scores = {path: weighted_by_hand(model.layers[i].weight, path) for i, path in enumerate(INPUTS)}
    done = sparsify(model, block_size=8, density=0.4, score=wanda, balance="global", scope=scope)
    masks = {path: stored(layer) for path, layer in done.sparse.items()}
    for path, mask in masks.items():
        assert scores[path][mask].min() > scores[path][~mask].max()
    if scope == "global":
        kept, lost = (
            np.concatenate([scores[path][mask == keep] for path, mask in masks.items()])
            for keep in (True, False)
        )
        assert kept.min() > lost.max()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_prune_gives_the_stored_blocks_with_their_places(scope):
    model = make_model()
    sparsify(model, block_size=8, density=0.8, balance="global")
    before = {path: stored(model.layers[i]) for i, path in enumerate(INPUTS)}
    dense = [layer.todense() for layer in model.layers]
    scores = {path: weighted_by_hand(dense[i], path) for i, path in enumerate(INPUTS)}
    prune(model, 0.4, score=wanda, balance="global", scope=scope)
    for i, path in enumerate(INPUTS):
        kept = stored(model.layers[i])
        assert not (kept & ~before[path]).any()
        assert scores[path][kept].min() > scores[path][before[path] & ~kept].max()


def test_a_layer_alone_has_the_empty_path():
    paths = []

    def rightmost(blocks, places):
        paths.append(places.path)
        return places.cols

    layer = BlockSparseLinear.from_linear(
        nn.Linear(24, 40), block_size=8, density=1 / 3, score=rightmost
    )
    assert layer.pattern.indices.tolist() == [2] * 5
    prune(layer, 1 / 15, score=lambda blocks, places: places.rows, balance="global")
    assert layer.pattern.row_indices.tolist() == [4]
    assert paths == [""]


@pytest.mark.parametrize("tile", [1, 2**20])
def test_regrow_knows_the_places_of_weights_and_of_gradients(monkeypatch, tile):
    """Blocks are dropped from the left, and grow at the lower right."""
    monkeypatch.setattr("mlx_sparse_nn.surgery.regrow.TILE", tile)
    layer = BlockSparseLinear(32, 40, random_pattern(5, 4, 8, seed=3))
    free = [place for place in range(20) if place not in layer.pattern.places.tolist()]
    found = {"": (mx.ones((3, 32)), mx.ones((3, 40)))}
    score = lambda blocks, places: places.rows * 4.0 + places.cols
    done = regrow(layer, 0.25, activations=found, score=score)
    count = len(done.grown[""])
    assert count > 0
    assert (done.grown[""] @ [4, 1]).tolist() == free[-count:]


def test_two_functions_share_no_budget_and_the_way_out_is_said():
    own = {"layers.0": wanda, "layers.1": lambda blocks, places: wanda(blocks, places)}
    predicate = lambda path, _: {"score": own[path]}
    message = r"\[sparsify layers\.1\] score .* or both one function of \(blocks, places\)"
    with pytest.raises(ValueError, match=message):
        sparsify(make_model(), block_size=8, scope="global", predicate=predicate)
    assert len(sparsify(make_model(), block_size=8, predicate=predicate).sparse) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda score: sparsify(make_model(), score=score),
        lambda score: prune(BlockSparseLinear(32, 32), 0.5, score=score),
        lambda score: regrow(BlockSparseLinear(32, 32), 0.5, "random", score=score),
        lambda score: BlockSparseLinear.from_linear(nn.Linear(32, 32), score=score),
    ],
)
def test_a_function_that_fits_neither_is_refused(call):
    with pytest.raises(TypeError, match=r"score must be a function of blocks, or of \(blocks, pl"):
        call(lambda blocks, rows, cols: rows)
