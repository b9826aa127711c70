"""Bad input at every public door: one rule, one text, and the name of what the user called.

Rules that many functions share are tried at each of them. The last table holds what is left, so
that every public function and class has a row; more rows are beside the tests of each file.
"""

import copy
import dataclasses
import inspect
import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from support import untyped

import mlx_sparse_nn as sparse
from mlx_sparse_nn import BlockSparseLinear, CSRPattern, QuantizedBlockSparseLinear, patterns
from mlx_sparse_nn import physics as ph

NAN = float("nan")
PATTERN = patterns.banded(64, 64, 0)
EMPTY = CSRPattern([0], [], (0, 64), 32)
REPEATED = CSRPattern([0, 2], [0, 0], (32, 32), 32)
LINEAR = nn.Linear(64, 64)
MODULE = nn.Sequential(nn.Linear(64, 64))
X = mx.ones((2, 64))
QUANTIZED = PACKED, SCALES, BIASES = mx.quantize(mx.ones((2, 32, 32)), 32, 4)  # of PATTERN


def layer():
    return BlockSparseLinear(64, 64, density=0.5)


def ask(**options):
    """Sparsify a model whose predicate answers with these options."""
    return sparse.sparsify(nn.Sequential(nn.Linear(64, 64)), predicate=lambda *_: options)


def at_every_door(doors, values):
    return [
        pytest.param(owner, call, *row, id=f"{owner}-{row[0]!r:.20}")
        for owner, call in doors.items()
        for row in values
    ]


def refused(owner, call, error, message):
    with pytest.raises(error, match=rf"^\[{re.escape(owner)}\] {message}"):
        call()


DENSITY_DOORS = {
    "BlockSparseLinear": lambda d: BlockSparseLinear(64, 64, density=d),
    "BlockSparseLinear.from_linear": lambda d: BlockSparseLinear.from_linear(LINEAR, density=d),
    "sparsify": lambda d: sparse.sparsify(MODULE, density=d),
    "sparsify layers.0": lambda d: ask(density=d),
    "prune": lambda d: sparse.prune(layer(), d),
    "patterns.random": lambda d: patterns.random(64, 64, d),
    "patterns.covering": lambda d: patterns.covering(64, 64, d),
    "patterns.strongest": lambda d: patterns.strongest(np.ones((2, 2)), d),
    "calibrate": lambda d: sparse.calibrate(MODULE, [X], density=d),
    "sensitivity": lambda d: sparse.sensitivity(MODULE, [X], density=d),
}
DEFAULT_DENSITY = ("BlockSparseLinear", "BlockSparseLinear.from_linear")  # None there means 0.1


@pytest.mark.parametrize(
    ("owner", "call", "density", "error"),
    at_every_door(
        DENSITY_DOORS,
        [
            ("0.5", TypeError),
            (None, TypeError),
            (True, TypeError),
            (mx.array(0.5), TypeError),
            (7, ValueError),
            (-0.5, ValueError),
            (0, ValueError),
            (NAN, ValueError),
        ],
    ),
)
def test_density(owner, call, density, error):
    if density is None and owner in DEFAULT_DENSITY:
        assert call(None).pattern.n_blocks == call(0.1).pattern.n_blocks
    elif density == 0 and owner == "patterns.random":
        assert call(0).n_blocks == 0
    else:
        text = r"must be a number" if error is TypeError else r"must be in [\[(]0, 1\]"
        refused(owner, lambda: call(density), error, f"density {text}, got ")


@pytest.mark.parametrize("name", ["init", "end"])
@pytest.mark.parametrize(
    ("density", "error"),
    [("0.5", TypeError), (None, TypeError), (True, TypeError), (7, ValueError), (0, ValueError)],
)
def test_densities_of_a_schedule(name, density, error):
    options = {"init": 1.0, "end": 0.1, "steps": 10, name: density}
    refused("cubic_density", lambda: sparse.cubic_density(**options), error, f"{name} must be ")


SEED_DOORS = {
    "patterns.random": lambda seed: patterns.random(64, 64, seed=seed),
    "patterns.covering": lambda seed: patterns.covering(64, 64, seed=seed),
    "verify": lambda seed: sparse.verify(layer(), X, seed=seed),
    "advise": lambda seed: sparse.advise(layer(), [1], seconds=1e-3, seed=seed),
    "regrow": lambda seed: sparse.regrow(layer(), 0.5, "random", seed=seed),
    "lanczos": lambda seed: ph.lanczos(ph.IsingOperator(2, 1.0), seed=seed),
}


@pytest.mark.parametrize(
    ("owner", "call", "seed", "error"),
    at_every_door(
        SEED_DOORS,
        [
            (-1, ValueError),
            (2**64, ValueError),
            (True, TypeError),
            (1.5, TypeError),
            ("0", TypeError),
            (mx.array(0), TypeError),
        ],
    ),
)
def test_seed(owner, call, seed, error):
    text = "must be an integer" if error is TypeError else r"must be in \[0, 2\*\*64 - 1\]"
    refused(owner, lambda: call(seed), error, f"seed {text}, got ")


@pytest.mark.parametrize(("owner", "call"), SEED_DOORS.items(), ids=SEED_DOORS)
@pytest.mark.parametrize("seed", [0, np.int64(3), 2**64 - 1])
def test_every_seed_in_range_is_taken(owner, call, seed):
    call(seed)


WORD_DOORS = {
    ("sparsify", "scope"): lambda word: sparse.sparsify(MODULE, scope=word),
    ("prune", "scope"): lambda word: sparse.prune(layer(), 0.5, scope=word),
    ("sparsify", "balance"): lambda word: sparse.sparsify(MODULE, balance=word),
    ("sparsify layers.0", "balance"): lambda word: ask(balance=word),
    ("patterns.strongest", "balance"): lambda word: patterns.strongest([[1]], 1.0, balance=word),
    ("calibrate", "balance"): lambda word: sparse.calibrate(MODULE, [X], density=1, balance=word),
    ("sensitivity", "balance"): lambda word: sparse.sensitivity(
        MODULE, [X], density=1, balance=word
    ),
    ("prune", "balance"): lambda word: sparse.prune(layer(), 0.5, balance=word),
    ("sparsify", "score"): lambda word: sparse.sparsify(MODULE, score=word),
    ("sparsify layers.0", "score"): lambda word: ask(score=word),
    ("prune", "score"): lambda word: sparse.prune(layer(), 0.5, score=word),
    ("regrow", "score"): lambda word: sparse.regrow(layer(), 0.5, "random", score=word),
    ("regrow", "criterion"): lambda word: sparse.regrow(layer(), 0.5, word),
    ("shard_block_sparse", "sharding"): lambda word: sparse.shard_block_sparse(layer(), word),
    ("BlockSparseLinear.from_linear", "score"): lambda word: BlockSparseLinear.from_linear(
        LINEAR, score=word
    ),
    ("BlockSparseLinear.from_linear", "balance"): lambda word: BlockSparseLinear.from_linear(
        LINEAR, balance=word
    ),
}


@pytest.mark.parametrize(("door", "call"), WORD_DOORS.items(), ids=map("-".join, WORD_DOORS))
@pytest.mark.parametrize(
    ("word", "error"), [("whole", ValueError), (3, TypeError), (["row"], TypeError)]
)
def test_words(door, call, word, error):
    owner, name = door
    message = rf"{name} must be one of \('.*'\).*, got {re.escape(repr(word))}$"
    refused(owner, lambda: call(word), error, message)


SIZE_DOORS = {
    "BlockSparseLinear": lambda size: BlockSparseLinear(64, 64, block_size=size),
    "BlockSparseLinear.from_linear": lambda size: BlockSparseLinear.from_linear(
        LINEAR, block_size=size
    ),
    "sparsify": lambda size: sparse.sparsify(MODULE, block_size=size),
    "sparsify layers.0": lambda size: ask(block_size=size),
    "patterns.banded": lambda size: patterns.banded(64, 64, 1, size),
    "patterns.butterfly": lambda size: patterns.butterfly(64, size),
    "patterns.random": lambda size: patterns.random(64, 64, 0.1, size),
    "patterns.covering": lambda size: patterns.covering(64, 64, 0.1, size),
    "patterns.strongest": lambda size: patterns.strongest(np.ones((2, 2)), 0.5, size),
    "patterns.from_mask": lambda size: patterns.from_mask(np.ones((64, 64), bool), size),
    "patterns.from_dense": lambda size: patterns.from_dense(np.ones((64, 64)), size),
    "from_dense": lambda size: sparse.from_dense(np.ones((64, 64)), size),
    "CSRPattern": lambda size: CSRPattern([0, 1], [0], (64, 64), size),
    "CSRPattern.from_places": lambda size: CSRPattern.from_places([0], (64, 64), size),
}


@pytest.mark.parametrize(
    ("owner", "call", "size", "error", "message"),
    at_every_door(
        SIZE_DOORS,
        [
            (0, ValueError, r"block_size must be in \[1, 2\*\*31 - 1\], got 0"),
            (True, TypeError, "block_size must be an integer, got True"),
            (2.0, TypeError, "block_size must be an integer, got 2.0"),
        ],
    ),
)
def test_block_size(owner, call, size, error, message):
    refused(owner, lambda: call(size), error, message)


def make_layers():
    return {
        "BlockSparseLinear": layer(),
        "QuantizedBlockSparseLinear": layer().to_quantized(),
        "AllToShardedBlockSparseLinear": sparse.shard_block_sparse(layer(), "all-to-sharded"),
        "ShardedToAllBlockSparseLinear": sparse.shard_block_sparse(layer(), "sharded-to-all"),
    }


LAYERS = make_layers()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0] * 64, TypeError, r"x must be an mx.array, got list; mx\.array\(x\) makes one$"),
        ([[1.0]], TypeError, r"x must be an mx.array, got list; mx\.array\(x\) makes one$"),
        (
            np.ones((2, 64), np.float32),
            TypeError,
            r"x must be an mx.array, got ndarray; mx\.array\(x\) makes one$",
        ),
        (1.0, TypeError, r"x must be an mx.array, got float; mx\.array\(x\) makes one$"),
        (None, TypeError, "x must be an mx.array, got NoneType"),
        (mx.ones((2, 63)), ValueError, r"x has shape \(2, 63\), .* must be input_dims = 64"),
        (mx.array(1.0), ValueError, r"x has shape \(\), its last axis must be input_dims = 64"),
    ],
)
@pytest.mark.parametrize(("owner", "called"), LAYERS.items(), ids=LAYERS)
def test_what_a_layer_is_called_with(owner, called, x, error, message):
    refused(owner, lambda: called(x), error, message)
    if owner == "BlockSparseLinear":
        refused(owner, lambda: layer().to_lora()(x), error, message)


WRITES = [
    ("weight", None, TypeError, "weight must be an mx.array, got NoneType$"),
    (
        "weight",
        np.ones((2, 32, 32), np.float32),
        TypeError,
        r"weight must be an mx.array, got ndarray; mx\.array\(weight\) makes one$",
    ),
    ("weight", mx.ones(3), ValueError, r"weight must be an array of shape \(2, .*, got \(3,\)$"),
    ("bias", [0.0] * 64, TypeError, "bias must be an mx.array, got list;"),
    ("indptr", np.array([0, 1, 2]), TypeError, "indptr must be an mx.array, got ndarray;"),
    ("indices", mx.array([0, 9]), ValueError, r"indices\[1\] is 9, outside \[0, 2\)$"),
    (
        "indices",
        mx.array([0.0, NAN]),
        TypeError,
        "indices must be integers, got .*float32 .* leave the pattern out, by model.apply",
    ),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRITES)
@pytest.mark.parametrize("owner", LAYERS)
def test_what_is_written_into_a_layer(owner, name, value, error, message):
    written = copy.copy(LAYERS[owner])
    refused(owner, lambda: setattr(written, name, value), error, message)


@pytest.mark.parametrize("owner", LAYERS)
def test_an_emptied_layer_says_so(owner):
    emptied = make_layers()[owner]
    emptied.weight = mx.array([])
    refused(owner, lambda: emptied(X), ValueError, r"the layer was emptied: mx\.array\(\[\]\) was")


COMPLEX_DOORS = {
    "BlockSparseLinear": lambda: setattr(layer(), "weight", mx.ones((2, 32, 32), mx.complex64)),
    "CSRArray": lambda: sparse.CSRArray(mx.ones((2, 32, 32), mx.complex64), PATTERN),
    "bsr_array": lambda: sparse.bsr_array((np.ones((1, 2, 2)) * 1j, [0], [0, 1]), (2, 2)),
    "from_dense": lambda: sparse.from_dense(np.ones((4, 4)) * 1j, 2),
    "spmm": lambda: sparse.spmm(mx.ones((2, 32, 32)), PATTERN, X.astype(mx.complex64)),
}


@pytest.mark.parametrize(("owner", "call"), COMPLEX_DOORS.items(), ids=COMPLEX_DOORS)
def test_complex_blocks(owner, call):
    refused(
        owner, call, TypeError, r"complex64 is for block_size 1, got block_size \d+; blocks are"
    )


BESIDE = {"block_size": 32, "density": 7, "score": "l2", "balance": "row"}


@pytest.mark.parametrize("name", BESIDE)
def test_options_beside_a_pattern(name):
    options = {"pattern": PATTERN, name: BESIDE[name]}
    message = rf"{name} must be left out, got .*: pattern says which blocks are stored"
    if name in ("block_size", "density"):
        call = lambda: BlockSparseLinear(64, 64, **options)
        refused("BlockSparseLinear", call, ValueError, message)
    call = lambda: BlockSparseLinear.from_linear(LINEAR, **options)
    refused("BlockSparseLinear.from_linear", call, ValueError, message)
    refused("sparsify layers.0", lambda: ask(**options), ValueError, message)


def test_options_for_all_layers_may_stand_beside_one_layers_pattern():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    own = {"layers.0": {"pattern": PATTERN}}
    done = sparse.sparsify(
        model, block_size=16, density=0.5, predicate=lambda path, _: own.get(path, True)
    )
    assert [layer.block_size for layer in done.sparse.values()] == [32, 16]


PATTERN_DOORS = {
    "BlockSparseLinear": lambda p: BlockSparseLinear(64, 64, p),
    "BlockSparseLinear.from_linear": lambda p: BlockSparseLinear.from_linear(LINEAR, pattern=p),
    "sparsify layers.0": lambda p: ask(pattern=p),
    "QuantizedBlockSparseLinear": QuantizedBlockSparseLinear,
    "CSRArray": lambda p: sparse.CSRArray(mx.ones(2), p),
    "spmm": lambda p: sparse.spmm(mx.ones(2), p, X),
    "spmm_t": lambda p: sparse.spmm_t(mx.ones(2), p, X),
    "sddmm": lambda p: sparse.sddmm(p, X, X),
    "qspmm": lambda p: sparse.qspmm(*QUANTIZED, p, X),
    "qspmm_t": lambda p: sparse.qspmm_t(*QUANTIZED, p, X),
}


@pytest.mark.parametrize(
    ("owner", "call", "pattern"),
    at_every_door(PATTERN_DOORS, [("banded",), (LINEAR,), (np.ones((2, 2), bool),)]),
)
def test_a_pattern_of_another_type(owner, call, pattern):
    kind = type(pattern).__name__
    message = f"pattern must be a CSRPattern, got {kind}$"
    refused(owner, lambda: call(pattern), TypeError, message)


@pytest.mark.parametrize(
    ("owner", "call", "name"),
    [
        ("BlockSparseLinear", lambda: BlockSparseLinear(0, 64), "input_dims"),
        ("BlockSparseLinear", lambda: BlockSparseLinear(64, 0), "output_dims"),
        ("BlockSparseLinear", lambda: BlockSparseLinear(64, 0, EMPTY), "output_dims"),
        (
            "BlockSparseLinear.from_linear",
            lambda: BlockSparseLinear.from_linear(nn.Linear(64, 0)),
            "output_dims",
        ),
        (
            "BlockSparseLinear.from_linear",
            lambda: BlockSparseLinear.from_linear(nn.Linear(64, 0), pattern=EMPTY),
            "output_dims",
        ),
        ("QuantizedBlockSparseLinear", lambda: QuantizedBlockSparseLinear(EMPTY), "output_dims"),
        (
            "sparsify layers.0",
            lambda: sparse.sparsify(nn.Sequential(nn.Linear(64, 0)), predicate=lambda *_: True),
            "output_dims",
        ),
    ],
)
def test_a_layer_has_a_block(owner, call, name):
    refused(owner, call, ValueError, f"{name} is 0: a layer has at least one block-row and one")


def test_sparsify_leaves_out_what_a_layer_refuses():
    done = sparse.sparsify(nn.Sequential(nn.Linear(64, 0)))
    assert done.skipped["layers.0"].startswith("output_dims 0 is less than")


MODEL_DOORS = {
    "sparsify": sparse.sparsify,
    "densify": sparse.densify,
    "prune": lambda model: sparse.prune(model, 0.5),
    "calibrate": lambda model: sparse.calibrate(model, [X], density=0.5),
    "sensitivity": lambda model: sparse.sensitivity(model, [X], density=0.5),
    "layer_moments": lambda model: sparse.layer_moments(model, [X]),
    "regrow": lambda model: sparse.regrow(model, 0.5, "random"),
    "activations": lambda model: sparse.activations(model, lambda: mx.array(0.0)),
    "verify": lambda model: sparse.verify(model, X),
    "summary": sparse.summary,
    "restore": lambda model: sparse.restore(model, {}),
    "restore_patterns": lambda model: sparse.restore_patterns(model, {}),
    "check_same_pattern": sparse.check_same_pattern,
    "save_mlx_lm": lambda model: sparse.save_mlx_lm("a", "b", model, None, {}),
    "save_trainable": lambda model: sparse.save_trainable(model, "a.safetensors"),
    "load_trainable": lambda model: sparse.load_trainable(model, "a.safetensors"),
}


@pytest.mark.parametrize(
    ("owner", "call", "model"), at_every_door(MODEL_DOORS, [("model",), ([nn.ReLU()],), (X,)])
)
def test_a_model_of_another_type(owner, call, model):
    message = f"model must be an nn.Module, got {type(model).__name__}$"
    refused(owner, lambda: call(model), TypeError, message)


LAYER_DOORS = {
    "shard_block_sparse": lambda layer: sparse.shard_block_sparse(layer, "all-to-sharded"),
    "shard_boundaries": lambda layer: sparse.shard_boundaries([layer]),
}


@pytest.mark.parametrize(
    ("owner", "call", "given"),
    at_every_door(LAYER_DOORS, [(LINEAR,), (LAYERS["QuantizedBlockSparseLinear"],), (None,)]),
)
def test_a_layer_of_another_type(owner, call, given):
    message = f"layer must be a BlockSparseLinear, got {type(given).__name__}$"
    refused(owner, lambda: call(given), TypeError, message)


@pytest.mark.parametrize("given", [LINEAR, LAYERS["AllToShardedBlockSparseLinear"], None])
def test_advise_takes_whole_sparse_layers(given):
    message = "layer must be a BlockSparseLinear or a QuantizedBlockSparseLinear, got "
    refused("advise", lambda: sparse.advise(given), TypeError, message + type(given).__name__)


QUANTIZED_DOORS = {
    "qspmm": lambda x=X, **given: sparse.qspmm(*quantized(**given), PATTERN, x),
    "qspmm_t": lambda x=X, **given: sparse.qspmm_t(*quantized(**given), PATTERN, x),
}


def quantized(packed=PACKED, scales=SCALES, biases=BIASES):
    """Return the packing of PATTERN's blocks, with what is given in place of some."""
    return packed, scales, biases


BAD_QUANTIZED = [
    ({"packed": PACKED.tolist()}, TypeError, "packed must be an mx.array, got list"),
    ({"scales": 1.0}, TypeError, "scales must be an mx.array, got float"),
    ({"biases": None}, TypeError, "biases must be an mx.array, got NoneType"),
    ({"packed": PACKED.astype(mx.int32)}, TypeError, "packed must be uint32, got mlx.core.int32"),
    (
        {"packed": PACKED[:1]},
        ValueError,
        r"packed has shape \(1, 32, 4\), the pattern needs \(2, 32\) and a last axis of 32 \* bits",
    ),
    ({"packed": mx.zeros((2, 32, 7), mx.uint32)}, ValueError, r"packed has shape \(2, 32, 7\)"),
    ({"packed": mx.zeros((2, 32, 0), mx.uint32)}, ValueError, r"packed has shape \(2, 32, 0\)"),
    ({"packed": PACKED[0]}, ValueError, r"packed has shape \(32, 4\)"),
    (
        {"scales": SCALES[:, :31]},
        ValueError,
        r"scales has shape \(2, 31, 1\), the pattern needs \(2, 32\) and a last axis of 32 / group",
    ),
    ({"scales": mx.ones((2, 32, 2))}, ValueError, r"scales has shape \(2, 32, 2\)"),
    ({"biases": SCALES[:1]}, ValueError, r"biases has shape \(1, 32, 1\), scales \(2, 32, 1\)"),
    ({"x": [1.0] * 64}, TypeError, "[xy] must be an mx.array, got list"),
    ({"x": X[:, :63]}, ValueError, r"[xy] has shape \(2, 63\), its last axis must be n_\w+ = 64"),
    (
        {"x": X.astype(mx.complex64)},
        TypeError,
        "scales .*float32, biases .*float32 and [xy] .*complex64 give .*complex64; quantized",
    ),
    (
        {
            "scales": SCALES.astype(mx.int32),
            "biases": SCALES.astype(mx.int32),
            "x": X.astype(mx.int8),
        },
        TypeError,
        "scales .*int32, .* give .*int32; quantized blocks are for float32, float16 and bfloat16",
    ),
]


@pytest.mark.parametrize(("owner", "call"), QUANTIZED_DOORS.items(), ids=QUANTIZED_DOORS)
@pytest.mark.parametrize(("given", "error", "message"), BAD_QUANTIZED)
def test_bad_quantized_blocks(owner, call, given, error, message):
    refused(owner, lambda: call(**given), error, message)


@pytest.mark.parametrize("block_size", [1, 16, 48])
def test_blocks_that_have_no_packing(block_size):
    pattern = CSRPattern([0, 1], [0], (block_size, block_size), block_size)
    packed, affine = mx.zeros((1, block_size, 4), mx.uint32), mx.ones((1, block_size, 1))
    message = f"the pattern's block_size {block_size} is not a multiple of 32, the smallest group"
    for owner in QUANTIZED_DOORS:
        product = getattr(sparse, owner)
        call = lambda p=product: p(packed, affine, affine, pattern, mx.ones((2, block_size)))
        refused(owner, call, ValueError, message)


GROUP_DOORS = {
    "check_same_pattern": lambda group: sparse.check_same_pattern(MODULE, group),
    "shard_boundaries": lambda group: sparse.shard_boundaries([layer()], group=group),
    "shard_block_sparse": lambda group: sparse.shard_block_sparse(
        layer(), "all-to-sharded", group=group
    ),
}


@pytest.mark.parametrize(("owner", "call"), GROUP_DOORS.items(), ids=GROUP_DOORS)
@pytest.mark.parametrize("group", [2, "ring", [0, 1]])
def test_a_group_of_another_type(owner, call, group):
    message = rf"group must be an mx.distributed.Group, got {re.escape(repr(group))}$"
    refused(owner, lambda: call(group), TypeError, message)


OPTIMIZER_DOORS = {
    "sparsify": lambda optimizer: sparse.sparsify(
        nn.Sequential(nn.Linear(64, 64)), optimizer=optimizer
    ),
    "densify": lambda optimizer: sparse.densify(nn.Sequential(layer()), optimizer=optimizer),
    "prune": lambda optimizer: sparse.prune(layer(), 0.5, optimizer=optimizer),
    "regrow": lambda optimizer: sparse.regrow(layer(), 0.5, "random", optimizer=optimizer),
}


@pytest.mark.parametrize(("owner", "call"), OPTIMIZER_DOORS.items(), ids=OPTIMIZER_DOORS)
@pytest.mark.parametrize("optimizer", ["adam", optim.Adam, {"learning_rate": 0.1}])
def test_an_optimizer_of_another_type(owner, call, optimizer):
    message = f"optimizer must be an mlx Optimizer, got {type(optimizer).__name__}$"
    refused(owner, lambda: call(optimizer), TypeError, message)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_modes_of_nn_quantize_that_block_sparse_layers_do_not_have(mode, as_dict):
    """The error names the way out, and that works."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), layer())
    is_dense = lambda _, module: isinstance(module, nn.Linear)
    inputs = mode != "mxfp4"  # MLX itself quantizes inputs in the other two modes
    options: dict[str, Any] = {"mode": mode} | ({"quantize_input": True} if inputs else {})
    name, must_be = ("quantize_input", "False") if inputs else ("mode", "'affine'")
    message = f"{name} must be {must_be}, got .*; leave the layer out with nn.quantize's class_pred"
    if as_dict:
        call = lambda: nn.quantize(model, class_predicate=lambda *_: options)
    else:
        call = lambda: nn.quantize(model, **options)
    refused("QuantizedBlockSparseLinear", call, ValueError, message)
    assert type(model.layers[0]) is nn.Linear
    nn.quantize(model, **options, class_predicate=is_dense)
    assert type(model.layers[1]) is BlockSparseLinear
    assert type(model.layers[0]) is not nn.Linear
    if inputs:
        refused(
            "QuantizedBlockSparseLinear",
            lambda: nn.quantize(model, mode=mode),
            ValueError,
            f"mode must be 'affine', got '{mode}'; leave the layer out",
        )


ISING = ph.IsingOperator(2, 1.0)
LIST = untyped([1.0])
STATE = "psi must be an mx.array, got list"
REST = [
    ("COOArray", lambda: sparse.COOArray(["a"], [0], [0], (1, 1)), TypeError, "data must be num"),
    ("SparseVector", lambda: sparse.SparseVector(sparse.eye(2)), TypeError, "row must be a CSRArr"),
    (
        "bsr_array",
        lambda: sparse.bsr_array(untyped(3), (2, 2)),
        TypeError,
        r"takes \(blocks, indices, ind",
    ),
    (
        "coo_array",
        lambda: sparse.coo_array(3, (2, 2)),
        TypeError,
        r"takes \(data, indices, indptr\), \(data, \(row, col\)\)",
    ),
    (
        "csr_array",
        lambda: sparse.csr_array(3, (2, 2)),
        TypeError,
        r"takes \(data, indices, indpt",
    ),
    (
        "csr_matmul",
        lambda: sparse.csr_matmul(untyped(X), X),
        TypeError,
        "A must be a CSRArray, got array",
    ),
    ("from_dense", lambda: sparse.from_dense(X[0]), ValueError, r"w must be a matrix, got .*\(64,"),
    ("from_dense", lambda: sparse.from_dense([["a"]]), TypeError, "w must be numeric, got <U1"),
    (
        "from_scipy",
        lambda: sparse.from_scipy(3),
        TypeError,
        "takes a sparse array of SciPy, got int",
    ),
    (
        "to_scipy",
        lambda: sparse.to_scipy(untyped(X)),
        TypeError,
        "takes a CSRArray or COOArray, got array",
    ),
    ("eye", lambda: sparse.eye(-1), ValueError, r"m must be in \[0"),
    (
        "diags",
        lambda: sparse.diags([[1.0, 2.0]], [0], (3, 3)),
        ValueError,
        "diagonal 0 of",
    ),
    ("diags", lambda: sparse.diags([[1.0], [1.0]], [0, 0]), ValueError, "offsets must differ"),
    ("diags", lambda: sparse.diags([1.0], [5], (2, 2)), ValueError, "there is no diagonal 5"),
    ("diags", lambda: sparse.diags([[1.0]], [0, 1]), ValueError, "offsets must be as many"),
    ("kron", lambda: sparse.kron(X[0], X), ValueError, "an array must be a matrix"),
    ("kronsum", lambda: sparse.kronsum(X, X), ValueError, "takes square matrices, got shape"),
    ("vstack", lambda: sparse.vstack([]), ValueError, "takes at least one array"),
    ("vstack", lambda: sparse.vstack([X, X.T]), ValueError, "numbers of columns differ"),
    ("hstack", lambda: sparse.hstack([X, X.T]), ValueError, "numbers of rows differ"),
    ("block_diag", lambda: sparse.block_diag([]), ValueError, "takes at least one array"),
    ("random", lambda: sparse.random(2, 2, 1.5), ValueError, r"density must be in \(0, 1\]"),
    ("random", lambda: sparse.random(2, 2, 0.5, mx.int32), TypeError, "dtype must be floating"),
    ("softmax", lambda: sparse.softmax(sparse.eye(2, dtype=mx.int32)), TypeError, "A must hold"),
    (
        "save_npz",
        lambda: sparse.save_npz("a", untyped(X)),
        TypeError,
        "A must be a CSRArray or COO",
    ),
    ("load_npz", lambda: sparse.load_npz(__file__), ValueError, ".* is no npz file of arrays"),
    (
        "load_safetensors",
        lambda: sparse.load_safetensors("none.safetensors"),
        ValueError,
        "none.safetensors cannot be read",
    ),
    (
        "save_safetensors",
        lambda: sparse.save_safetensors("a.safetensors", untyped(X)),
        TypeError,
        "A must be a CSRArray or COOArray, got array",
    ),
    (
        "SparseParameter",
        lambda: sparse.SparseParameter(untyped(X)),
        TypeError,
        "array must be a CSR",
    ),
    ("use_device", lambda: sparse.use_device("tpu"), ValueError, "device must be 'cpu' or 'gpu'"),
    (
        "LoRABlockSparseLinear",
        lambda: sparse.LoRABlockSparseLinear(untyped(LINEAR)),
        TypeError,
        "linear must be a BlockSparseLinear or a QuantizedBlockSparseLinear, got Linear",
    ),
    (
        "LoRABlockSparseLinear",
        lambda: sparse.LoRABlockSparseLinear(LAYERS["AllToShardedBlockSparseLinear"]),
        TypeError,
        "linear must be a BlockSparseLinear .* got AllToSharded",
    ),
    (
        "BlockSparseLinear",
        lambda: layer().set_pattern(untyped("banded")),
        TypeError,
        "pattern must be a CSRPattern, got str",
    ),
    (
        "QuantizedBlockSparseLinear",
        lambda: QuantizedBlockSparseLinear.from_linear(untyped(LINEAR)),
        TypeError,
        "linear must be a BlockSparseLinear, got Linear",
    ),
    (
        "QuantizedBlockSparseLinear",
        lambda: layer().to_quantized(bits=untyped("4")),
        TypeError,
        "bits must be an integer, got '4'",
    ),
    (
        "QuantizedBlockSparseLinear",
        lambda: layer().to_quantized(untyped(32.0)),
        TypeError,
        "group_size must be an integer, got 32.0",
    ),
    (
        "sparsify layers.0",
        lambda: sparse.sparsify(
            nn.Sequential(nn.Linear(32, 32)), predicate=lambda *_: {"pattern": REPEATED}
        ),
        ValueError,
        r"the pattern stores block \(0, 0\) more than once",
    ),
    (
        "sparsify",
        lambda: sparse.sparsify(MODULE, predicate=untyped("layers.0")),
        TypeError,
        r"predicate must be a function of \(path, module\), got 'layers.0'",
    ),
    (
        "sparsify",
        lambda: sparse.sparsify(layer()),
        TypeError,
        "model is itself a BlockSparseLinear, .*: BlockSparseLinear is sparse already; prune lower",
    ),
    (
        "prune",
        lambda: sparse.prune(LAYERS["QuantizedBlockSparseLinear"], 0.5),
        ValueError,
        "QuantizedBlockSparseLinear keeps its blocks: prune before nn.quantize, or put its to_bl",
    ),
    (
        "regrow",
        lambda: sparse.regrow(LAYERS["QuantizedBlockSparseLinear"], 0.5, "random"),
        ValueError,
        "QuantizedBlockSparseLinear keeps its blocks: regrow before nn.quantize",
    ),
    (
        "densify layers.0",
        lambda: sparse.densify(nn.Sequential(layer().to_lora())),
        ValueError,
        r"LoRABlockSparseLinear lies over a block-sparse layer: put its fuse\(\) in its place",
    ),
    (
        "advise",
        lambda: sparse.advise(untyped(nn.Sequential(nn.ReLU(), layer(), layer(), LINEAR))),
        TypeError,
        "layer must be a Bl.* got Sequential; give one of its layers: layers.1-2 x 2$",
    ),
    (
        "verify",
        lambda: sparse.verify(layer(), X * NAN),
        ValueError,
        "BlockSparseLinear has nan or infinity in its input: products with that cannot",
    ),
    (
        "restore",
        lambda: sparse.restore(MODULE, untyped(3)),
        TypeError,
        "weights must be a path or a dict",
    ),
    (
        "restore_patterns",
        lambda: sparse.restore_patterns(MODULE, {"a": untyped([1])}),
        TypeError,
        "a must be an mx.array, got list",
    ),
    (
        "save_trainable",
        lambda: sparse.save_trainable(MODULE, untyped(3)),
        TypeError,
        "file must be a path, got int",
    ),
    (
        "save_trainable",
        lambda: sparse.save_trainable(MODULE, "weights.npz"),
        ValueError,
        "file must end in .safetensors, got 'weights.npz'",
    ),
    (
        "load_trainable",
        lambda: sparse.load_trainable(MODULE, untyped({})),
        TypeError,
        "file must be a path, got dict",
    ),
    (
        "advise",
        lambda: sparse.advise(layer(), seconds=untyped("1")),
        TypeError,
        "seconds must be a number",
    ),
    (
        "patterns.block_diagonal",
        lambda: patterns.block_diagonal(10, 3),
        ValueError,
        "features 10 is not a multiple of blocks 3",
    ),
    (
        "patterns.bidiagonal_blocks",
        lambda: patterns.bidiagonal_blocks(untyped("8"), 2),
        TypeError,
        "features must be an integer, got '8'",
    ),
    (
        "patterns.from_mask",
        lambda: patterns.from_mask(np.ones((4, 4)), 2),
        TypeError,
        "mask must be bool, got float64",
    ),
    (
        "patterns.from_dense",
        lambda: patterns.from_dense(mx.ones(4), 2),
        ValueError,
        r"w must be a matrix, got shape \(4,\)",
    ),
    (
        "patterns.from_dense",
        lambda: patterns.from_dense([["a"]], 1),
        TypeError,
        "w must be numeric, got <U1",
    ),
    (
        "sparsify",
        lambda: sparse.sparsify(MODULE, density={"layer.0": 0.5}),
        ValueError,
        r"density names 'layer\.0', which is no nn\.Linear of the model; the closest is 'layers\.0",
    ),
    (
        "prune",
        lambda: sparse.prune(layer(), {"a": 0.5}),
        ValueError,
        "density names 'a', which is no BlockSparseLinear of the model; the closest is ''",
    ),
    (
        "sparsify",
        lambda: sparse.sparsify(MODULE, moments=untyped([])),
        TypeError,
        "moments must be a mapping of InputMoments by path, got list; layer_moments",
    ),
    (
        "prune",
        lambda: sparse.prune(layer(), 0.5, score="obs"),
        ValueError,
        "score 'obs' needs moments: layer_moments",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, X, density=0.5),
        TypeError,
        "batches must be a list of batches, got one array",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, untyped(3), density=0.5),
        TypeError,
        "batches must be a list of batches, got one int",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [], density=0.5),
        ValueError,
        "batches must hold a batch, got none",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, call=untyped(3)),
        TypeError,
        r"call must be a function of \(model, batch\), got 3",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, rows=untyped(X)),
        TypeError,
        r"rows must be a function of \(batch\), got array",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, rows=untyped(lambda batch: [True])),
        TypeError,
        "rows must return an array of bools, got list",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, rows=lambda batch: np.ones(2)),
        TypeError,
        "rows must return an array of bools, got float64",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, rows=lambda batch: np.zeros(2, bool)),
        ValueError,
        "rows must be True for a token, got False for all of them",
    ),
    (
        "calibrate layers.0",
        lambda: sparse.calibrate(
            MODULE, [X], density=0.5, rows=lambda batch: np.ones(3, bool), progress=False
        ),
        ValueError,
        "rows gives 3 bools for batch 0, but 2 tokens go into this layer: leave it out by the",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, damping=-1),
        ValueError,
        "damping must be at least 0 and at most 1e6, got -1",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, blocks=untyped(MODULE.layers[0])),
        TypeError,
        "blocks must be a list of modules, got Linear; such as model.layers",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, blocks=[]),
        ValueError,
        "blocks must hold a module, got none",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, blocks=[nn.ReLU()]),
        ValueError,
        "blocks must be in the model, but block 0 is not",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, blocks=2 * MODULE.layers),
        ValueError,
        "blocks must be different modules, but blocks 0 and 1 are one",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, resume=untyped(3)),
        TypeError,
        "resume must be the path of a folder, got 3",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(nn.Sequential(nn.ReLU()), [X], density=0.5),
        ValueError,
        "there is no layer to make sparse: the model has no nn.Linear",
    ),
    (
        "calibrate layers.0",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, predicate=lambda *_: {"score": "l1"}),
        ValueError,
        "score must be left out, got 'l1': blocks are scored by what the outputs lose",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(LINEAR, [X], density=0.5),
        TypeError,
        "model is itself a Linear, with no module around it",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [X], density=0.5, predicate=untyped("layers.0")),
        TypeError,
        r"predicate must be a function of \(path, module\), got 'layers.0'",
    ),
    (
        "calibrate",
        lambda: sparse.calibrate(MODULE, [np.ones((2, 64))], density=0.5),
        TypeError,
        "batches must be of MLX arrays, got NumPy's: let call make of a batch",
    ),
    (
        "patterns.strongest",
        lambda: patterns.strongest([[1.0]]),
        TypeError,
        "density must be a number, got None; or give n_blocks",
    ),
    (
        "InputMoments",
        lambda: sparse.InputMoments(np.array([[1.0, 2.0], [0.0, 1.0]]), np.zeros(2), 1),
        ValueError,
        "second must be a sum of x xᵀ: symmetric",
    ),
    (
        "layer_moments",
        lambda: sparse.layer_moments(MODULE, [X], predicate=untyped(3)),
        TypeError,
        r"predicate must be a function of \(path, layer\)",
    ),
    (
        "layer_moments",
        lambda: sparse.layer_moments(nn.Sequential(nn.ReLU()), [X]),
        ValueError,
        "the model has no linear layer to observe",
    ),
    (
        "refit",
        lambda: sparse.refit(untyped(LINEAR), LINEAR, sparse.InputMoments.of(X)),
        TypeError,
        "layer must be a BlockSparseLinear, got Linear",
    ),
    (
        "refit",
        lambda: sparse.refit(layer(), nn.Linear(64, 32), sparse.InputMoments.of(X)),
        ValueError,
        r"layer is \(64, 64\), but linear \(32, 64\)",
    ),
    (
        "refit",
        lambda: sparse.refit(layer(), nn.Linear(64, 64, bias=False), sparse.InputMoments.of(X)),
        ValueError,
        "layer and linear must both have a bias, or none of them",
    ),
    (
        "refit",
        lambda: sparse.refit(layer(), LINEAR, untyped(X)),
        TypeError,
        "moments must be InputMoments, got array; layer_moments",
    ),
    (
        "refit",
        lambda: sparse.refit(layer(), LINEAR, sparse.InputMoments.of(mx.ones((3, 32)))),
        ValueError,
        "moments are of 32 features, but input_dims is 64",
    ),
    (
        "BlockSparseLinear.from_linear",
        lambda: BlockSparseLinear.from_linear(LINEAR, damping=0.1),
        ValueError,
        "damping must be left out, got 0.1: it is for moments",
    ),
    (
        "InputMoments",
        lambda: sparse.InputMoments(np.eye(3), np.ones(2), 1),
        ValueError,
        r"second and total must be \(n_in, n_in\) and \(n_in,\), got \(3, 3\) and \(2,\)",
    ),
    (
        "InputMoments",
        lambda: sparse.InputMoments(np.eye(2, dtype=np.float32), np.ones(2), 1),
        TypeError,
        "second must be a NumPy array of float64, got float32",
    ),
    (
        "InputMoments.of",
        lambda: sparse.InputMoments.of(mx.ones((0, 4))),
        ValueError,
        r"x must hold samples \(..., n_in\), got \(0, 4\)",
    ),
    (
        "summary",
        lambda: sparse.summary(layer(), dense=untyped(X)),
        TypeError,
        "dense must be an nn.Module, got array",
    ),
    (
        "summary",
        lambda: sparse.summary(layer(), dense=nn.ReLU()),
        ValueError,
        "dense has a ReLU there, not an nn.Linear: pass the model of which this one was made",
    ),
    (
        "patterns.strongest",
        lambda: patterns.strongest([["a"]], 0.5),
        TypeError,
        "scores must be real numbers, got <U1",
    ),
    (
        "patterns.strongest",
        lambda: patterns.strongest(mx.ones((2, 2), mx.complex64), 0.5),
        TypeError,
        "scores must be real numbers, got complex64",
    ),
    (
        "patterns.strongest",
        lambda: patterns.strongest(np.ones(4), 0.5),
        ValueError,
        r"scores must be a matrix, got shape \(4,\)",
    ),
    (
        "patterns.strongest",
        lambda: patterns.strongest([[1, 2], [3]], 0.5),
        ValueError,
        "scores must be rectangular, got a ragged list",
    ),
    (
        "patterns.strongest",
        lambda: patterns.strongest([[1, 2], [3, NAN]], 0.5),
        ValueError,
        r"scores must be finite, got nan at \(1, 1\)",
    ),
    (
        "patterns.strongest",
        lambda: patterns.strongest(np.ones((2, 3)), 0.5, n_blocks=2),
        ValueError,
        "density must be left out, got 0.5: n_blocks says how many are stored",
    ),
    (
        "patterns.strongest",
        lambda: patterns.strongest(np.ones((2, 3)), n_blocks=7),
        ValueError,
        r"n_blocks must be in \[0, 6\], got 7",
    ),
    (
        "patterns.strongest",
        lambda: patterns.strongest(np.ones((2, 3)), 0.5, 16, shape=(33, 48)),
        ValueError,
        r"shape \(33, 48\) has \(3, 3\) blocks of 16, but scores are \(2, 3\)",
    ),
    (
        "IsingOperator",
        lambda: ph.IsingOperator(untyped(2.0), 1),
        TypeError,
        "n_qubits must be an integer",
    ),
    ("correlation", lambda: ph.correlation(LIST), TypeError, STATE),
    ("entanglement_entropy", lambda: ph.entanglement_entropy(LIST, 1), TypeError, STATE),
    ("evolve", lambda: ph.evolve(ISING, LIST, 1.0), TypeError, STATE),
    ("exact_ground_energy", lambda: ph.exact_ground_energy(0, 1), ValueError, "n_qubits must be"),
    ("expectation", lambda: ph.expectation(ISING, LIST), TypeError, STATE),
    ("fidelity", lambda: ph.fidelity(LIST, X[0]), TypeError, "a must be an mx.array, got list"),
    ("from_kron_order", lambda: ph.from_kron_order(LIST), TypeError, STATE),
    ("to_kron_order", lambda: ph.to_kron_order(LIST), TypeError, STATE),
    (
        "lanczos",
        lambda: ph.lanczos(3),
        TypeError,
        "H must be a CSRArray, an IsingOperator, a PauliSum or an mx.array, got int",
    ),
    ("magnetization", lambda: ph.magnetization(LIST), TypeError, STATE),
    ("PauliSum", lambda: ph.PauliSum({}, 2), TypeError, "is made by pauli_sum"),
    ("pauli_sum", lambda: ph.pauli_sum(untyped([]), 2), TypeError, "terms must be a dict such as"),
    ("chain", lambda: ph.chain(0), ValueError, "n must be in"),
    ("ring", lambda: ph.ring(2), ValueError, "n must be at least 3 to close a ring, got 2"),
    ("ladder", lambda: ph.ladder(0), ValueError, "n_rungs must be in"),
    ("square", lambda: ph.square(0, 3), ValueError, "lx must be in"),
    ("triangular", lambda: ph.triangular(3, 0), ValueError, "ly must be in"),
    (
        "transverse_field_ising",
        lambda: ph.transverse_field_ising(True, 1),
        TypeError,
        "n_qubits must be an integer, got True",
    ),
    (
        "qspmm",
        lambda: sparse.qspmm(*QUANTIZED, PATTERN, X, mx.ones(63)),
        ValueError,
        r"bias has shape \(63,\), the pattern needs \(64,\)",
    ),
    ("variance", lambda: ph.variance(ISING, LIST), TypeError, STATE),
]


@pytest.mark.parametrize(("owner", "call", "error", "message"), REST)
def test_bad_input_is_refused(owner, call, error, message):
    refused(owner, call, error, message)


def public_names():
    """Return all that a user calls with arguments, by the name that errors give it."""
    builders = {
        f"patterns.{name}": value
        for name, value in vars(patterns).items()
        if getattr(value, "__module__", None) == patterns.__name__ and name[0] != "_"
    }
    names = {name: getattr(sparse, name) for name in sparse.__all__}
    names |= builders | {name: getattr(ph, name) for name in ph.__all__}
    made_by_the_package = lambda value: (
        isinstance(value, type)
        and (
            issubclass(value, Exception)
            or (dataclasses.is_dataclass(value) and value is not CSRPattern)
        )
    )
    return {
        name
        for name, value in names.items()
        if callable(value)
        and not made_by_the_package(value)
        and inspect.signature(value).parameters
    }


def test_every_public_name_has_a_row():
    tables = (DENSITY_DOORS, SEED_DOORS, SIZE_DOORS, PATTERN_DOORS, MODEL_DOORS, LAYER_DOORS)
    owners = {owner for table in tables for owner in table} | {row[0] for row in REST}
    owners |= {"issparse"}  # which takes everything
    owners |= {"cubic_density", "advise", *(owner for owner, _ in WORD_DOORS)}
    assert len(public_names()) > 40
    assert public_names() - owners == set()
