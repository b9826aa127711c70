"""Data and tensor parallel layers on processes of this machine, by MLX's ring backend, and by NCCL
where there are two GPUs."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import sharded_worker
from hypothesis import given
from hypothesis import strategies as st
from support import (
    ROOT,
    assert_equal,
    integers,
    own_folder,
    patterns,
    random_pattern,
    untyped,
)

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn.core import derivatives
from mlx_sparse_nn.layers.sharded import (
    Sharding,
    check_same_pattern,
    shard_block_sparse,
    shard_boundaries,
)

WORKER = "layers.sharded_worker"
TIMEOUT = 300  # seconds for all checks; they take three, on a GPU's first kernels some hundred


def free_ports(count):
    """Return consecutive ports that nobody listens on."""
    while True:
        sockets = [socket.socket() for _ in range(count)]
        try:
            sockets[0].bind(("127.0.0.1", 0))
            first = sockets[0].getsockname()[1]
            for i, other in enumerate(sockets[1:], 1):
                other.bind(("127.0.0.1", first + i))
            return list(range(first, first + count))
        except (OSError, OverflowError):
            continue  # the next one is taken
        finally:
            for s in sockets:
                s.close()


def environment(backend, n_ranks, folder):
    """Return the variables by which the ranks find each other."""
    ports = free_ports(n_ranks)
    if backend == "nccl":
        found = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(ports[0])}
        return found | {"MLX_WORLD_SIZE": str(n_ranks)}
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    return {"MLX_HOSTFILE": str(hosts)}


def run_on_ranks(backend, n_ranks, folder):
    """Run the worker on ``n_ranks`` processes; return each one's outcomes and its output."""
    variables = environment(backend, n_ranks, folder)
    # Each rank of NCCL has a GPU of its own.
    devices = lambda rank: {"CUDA_VISIBLE_DEVICES": str(rank)} if backend == "nccl" else {}
    results = [folder / f"{rank}.json" for rank in range(n_ranks)]
    logs = [folder / f"{rank}.txt" for rank in range(n_ranks)]
    end = time.monotonic() + TIMEOUT
    with ExitStack() as opened:
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-m", WORKER, str(results[rank]), backend],
                cwd=ROOT / "tests",  # which puts it on the path, as pytest does
                env={
                    **os.environ,
                    **variables,
                    **devices(rank),
                    "MLX_RANK": str(rank),
                    "TMPDIR": own_folder(f"rank{rank}"),
                },
                stdout=opened.enter_context(logs[rank].open("w")),
                stderr=subprocess.STDOUT,
            )
            for rank in range(n_ranks)
        ]
        for process in processes:
            opened.callback(process.wait)
            opened.callback(process.kill)
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                end = min(end, time.monotonic() + 5)  # one failed: the others may wait for it
            time.sleep(0.05)
    return [
        (json.loads(result.read_text()) if result.exists() else {}, log.read_text())
        for result, log in zip(results, logs, strict=True)
    ]


@pytest.fixture(
    scope="module",
    params=[("ring", 2), ("ring", 3), ("nccl", 2)],
    ids=lambda group: f"{group[1]} processes by {group[0]}",
)
def outcomes(request, tmp_path_factory):
    backend, n_ranks = request.param
    if backend == "nccl" and not (mx.cuda.is_available() and mx.device_count(mx.gpu) >= n_ranks):
        pytest.skip(f"NCCL needs {n_ranks} GPUs")
    return run_on_ranks(backend, n_ranks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", sharded_worker.CHECKS)
def test_on_several_processes(outcomes, check):
    for rank, (outcome, log) in enumerate(outcomes):
        assert outcome.get(check) == "passed", f"rank {rank}: {outcome.get(check)}\n{log}"


def test_the_documented_script_and_command(tmp_path):
    text = (ROOT / "docs" / "distributed.md").read_text()
    (tmp_path / "train.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    (command,) = re.findall(
        r"```shell\n(mlx\.launch -n 2 --backend ring) -- python train\.py", text
    )
    launch, *arguments = command.split()
    (port, _) = free_ports(2)
    done = subprocess.run(
        [
            Path(sys.executable).parent / launch,
            *arguments,
            *("--starting-port", str(port), "--", sys.executable, "train.py"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 2, done
    assert losses[0] > 2 * losses[1], done


def group_of(n_ranks, rank=0) -> Any:
    """Return a rank among others that are not there: enough to take a layer apart."""
    return SimpleNamespace(size=lambda: n_ranks, rank=lambda: rank)


@given(patterns(fewest=1), st.integers(1, 4), st.sampled_from(["all-to-sharded", "sharded-to-all"]))
def test_the_parts_are_the_whole(pattern, n_ranks, sharding):
    """For any pattern: repeated and unsorted columns, empty rows."""
    axis = ("all-to-sharded", "sharded-to-all").index(sharding)
    layer = BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern)
    layer.weight = integers(pattern.data_shape, 1)
    if pattern.grid[axis] < n_ranks:
        with pytest.raises(ValueError, match=r"fewer than the \d ranks"):
            shard_block_sparse(layer, sharding, group=group_of(n_ranks))
        return
    parts = [
        shard_block_sparse(layer, sharding, group=group_of(n_ranks, r)) for r in range(n_ranks)
    ]
    dense = []
    for part in parts:
        assert part.pattern.shape[axis] > 0
        whole = BlockSparseLinear(part.input_dims, part.output_dims, part.pattern, bias=False)
        whole.weight = part.weight
        dense.append(whole.todense())
    assert_equal(mx.concatenate(dense, axis=axis), layer.todense())
    biases = [part.bias for part in parts]
    assert_equal(mx.concatenate(biases) if axis == 0 else biases[0], layer.bias)


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
def test_shares_are_balanced_and_cuts_suit_all_layers(n_ranks):
    up = BlockSparseLinear(64, 960, random_pattern(240, 16, 4))
    down = BlockSparseLinear(960, 128, random_pattern(16, 120, 8, seed=1))
    cuts = shard_boundaries([up], [down], group=group_of(n_ranks))
    assert (cuts[0], cuts[-1], len(cuts)) == (0, 960, n_ranks + 1)
    assert all(cut % 8 == 0 for cut in cuts)
    layers: list[tuple[BlockSparseLinear, Sharding]] = [
        (up, "all-to-sharded"),
        (down, "sharded-to-all"),
    ]
    shares = [
        sum(
            shard_block_sparse(
                layer, sharding, boundaries=cuts, group=group_of(n_ranks, rank)
            ).weight.size
            for layer, sharding in layers
        )
        for rank in range(n_ranks)
    ]
    assert sum(shares) == up.weight.size + down.weight.size
    stored = np.array(up.pattern.tomask()).sum(axis=1) + np.array(down.pattern.tomask()).sum(axis=0)
    largest = stored.reshape(-1, 8).sum(axis=1).max()
    assert max(abs(share - sum(shares) / n_ranks) for share in shares) <= largest


def test_uneven_blocks_are_not_cut_in_equal_ranges():
    starts = np.cumsum([0, *range(8)])
    triangle = CSRPattern(starts, [c for r in range(8) for c in range(r)], (64, 64), 8)
    layer = BlockSparseLinear(64, 64, triangle)
    assert shard_boundaries([layer], group=group_of(2)) == (0, 48, 64)  # 15 and 13 blocks
    assert shard_boundaries([], [layer], group=group_of(2)) == (0, 16, 64)
    assert shard_boundaries([layer], [layer], group=group_of(2)) == (0, 32, 64)


def test_a_single_process_holds_the_whole():
    layer = BlockSparseLinear(64, 96, block_size=8, density=0.3)
    x = mx.random.normal((3, 64))
    check_same_pattern(layer)
    for sharding in ("all-to-sharded", "sharded-to-all"):
        part = shard_block_sparse(layer, sharding)
        assert mx.allclose(part(x), layer(x), atol=1e-6)


SHARD: dict[str, Any] = {"group": group_of(2)}
LAYER = BlockSparseLinear(64, 32, block_size=8, density=0.5)
BAD = [
    (
        lambda: shard_block_sparse(untyped(nn.Linear(4, 4)), "all-to-sharded", **SHARD),
        TypeError,
        "[shard_block_sparse] layer must be a BlockSparseLinear, got Linear",
    ),
    (
        lambda: shard_block_sparse(LAYER, untyped("rows"), **SHARD),
        ValueError,
        "[shard_block_sparse] sharding must be one of ('all-to-sharded', 'sharded-to-all'), "
        "got 'rows'",
    ),
    (
        lambda: shard_block_sparse(LAYER, "all-to-sharded", boundaries=[0, 32], **SHARD),
        ValueError,
        "[shard_block_sparse] boundaries must be 3 numbers for 2 ranks, got [0, 32]",
    ),
    (
        lambda: shard_block_sparse(LAYER, "all-to-sharded", boundaries=[0, 12, 32], **SHARD),
        ValueError,
        "[shard_block_sparse] boundary 12 is not a multiple of block_size 8",
    ),
    (
        lambda: shard_block_sparse(LAYER, "all-to-sharded", boundaries=[0, 16, 64], **SHARD),
        ValueError,
        "[shard_block_sparse] boundaries must rise from 0 to 32, got [0, 16, 64]",
    ),
    (
        lambda: shard_block_sparse(LAYER, "sharded-to-all", boundaries=[0, 0, 64], **SHARD),
        ValueError,
        "[shard_block_sparse] boundaries must rise from 0 to 64, got [0, 0, 64]",
    ),
    (
        lambda: shard_block_sparse(
            LAYER, "sharded-to-all", boundaries=untyped([0, 1.5, 64]), **SHARD
        ),
        TypeError,
        "[shard_block_sparse] boundaries must be integers, got float64",
    ),
    (
        lambda: shard_boundaries([], [], **SHARD),
        ValueError,
        "[shard_boundaries] no layer is given",
    ),
    (
        lambda: shard_boundaries([LAYER], [LAYER], **SHARD),
        ValueError,
        "[shard_boundaries] layers have different numbers of these features: [32, 64]",
    ),
    (
        lambda: shard_boundaries([LAYER], group=group_of(5)),
        ValueError,
        "[shard_boundaries] 32 features are 4 blocks of 8, fewer than the 5 ranks",
    ),
    (
        lambda: shard_boundaries([untyped(nn.Linear(4, 4))], **SHARD),
        TypeError,
        "[shard_boundaries] layer must be a BlockSparseLinear, got Linear",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_layout_that_waits_is_the_same(dtype):
    """Whatever it waits for: gradients that are not finite, and none at all."""
    layout = random_pattern(5, 6, 8).layout
    y, x = integers((4, 40), 1, dtype), integers((4, 48), 2, dtype)
    expected = derivatives.sddmm(layout, y, x)
    for values in ([[1.0, 2.0]], [[float("nan")]], [[float("-inf"), 0.0]], [[]], 3.0):
        waiting = layout.waiting_for(mx.array(values).astype(dtype))
        assert_equal(derivatives.sddmm(waiting, y, x), expected)
