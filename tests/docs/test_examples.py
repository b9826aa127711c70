"""The scripts sparse_linear_layer.py and train_char_lm.py, run as a user runs them."""

from __future__ import annotations

import ast
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from scripts import EXAMPLES, command, run_alone, run_here
from support import ROOT

SENTENCES = ("the cat sat on the mat. ", "a dog ran off. ", "sparse blocks, dense days!\n")

# A run of a second or two on the text of the fixture `folder`.
SMALL = {
    "text": "text.txt",
    "checkpoint": "run",
    "steps": 24,
    "interval": 8,
    "batch": 4,
    "context": 16,
    "dims": 32,
    "layers": 1,
    "heads": 2,
    "block-size": 8,
    "sample": 20,
    "device": "cpu",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory that holds a text of some 5 KB."""
    draw = random.Random(0)
    text = "".join(draw.choice(SENTENCES) for _ in range(250))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return tmp_path


def training(*flags: str, **options: object) -> list[object]:
    """Return script and arguments of a small run; underscores in names become hyphens."""
    merged = SMALL | {name.replace("_", "-"): value for name, value in options.items()}
    pairs = [part for name, value in merged.items() for part in (f"--{name}", value)]
    return ["train_char_lm.py", *pairs, *flags]


def succeed(arguments: list, folder: Path, run: Callable = run_here) -> str:
    result = run(*arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(arguments: list, folder: Path, message: str, run: Callable = run_here) -> None:
    """Check for exit status 2 and one line on stderr that holds ``message``."""
    result = run(*arguments, folder=folder)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"{arguments[0]}: error: ")
    assert message in result.stderr


def stop(arguments: list, folder: Path, signum: int, after: int) -> tuple[int, str, str]:
    """Start a run, send it a signal once it has validated ``after`` times, return how it ended."""
    pipe = subprocess.PIPE
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may inherit SIG_IGN
    started = command(*arguments)
    with subprocess.Popen(started, cwd=folder, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(after):
            line = process.stdout.readline()
            assert line.startswith("step "), process.stderr.read()
        for _ in range(20):
            process.send_signal(signum)
            try:
                stdout, stderr = process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                continue  # mx.array(numpy_array) swallows an interrupt that arrives within it
            return process.returncode, stdout, stderr
        process.kill()
    raise AssertionError(f"signal {signum} did not end the run")


def load(folder: Path, name: str = "run") -> tuple[dict[str, np.ndarray], dict]:
    """Return the arrays of a checkpoint, and how far its run was."""
    path = str(folder / name / "checkpoint.safetensors")
    loaded: Any = mx.load(path, return_metadata=True)
    arrays, metadata = loaded
    return {key: np.array(value) for key, value in arrays.items()}, json.loads(metadata["progress"])


def assert_same(folder: Path, name: str, other: str) -> None:
    """Check that two runs ended with the same weights and optimizer state, bit for bit."""
    (arrays, progress), (others, other_progress) = load(folder, name), load(folder, other)
    assert progress["step"] == other_progress["step"]
    assert arrays.keys() == others.keys()
    for key, array in arrays.items():
        assert array.dtype == others[key].dtype, key
        assert array.tobytes() == others[key].tobytes(), key


def final_loss(stdout: str) -> float:
    match = re.search(r"^validation loss +(\d+\.\d+) nats per character$", stdout, re.MULTILINE)
    assert match, stdout
    return float(match[1])


def sampled(stdout: str) -> str:
    return stdout.partition("the model writes:\n\n")[2]


@pytest.mark.parametrize(
    "script",
    ["export_model.py", "graph_attention.py", "sparse_linear_layer.py", "train_char_lm.py"],
)
def test_help(script: str, tmp_path: Path):
    out = succeed([script, "--help"], tmp_path, run_alone)
    assert "--device {auto,cpu,gpu}" in out
    assert "--seed" in out


# graph_attention.py


def test_graph_attention_finds_the_clubs(tmp_path: Path):
    out = succeed(["graph_attention.py", "--steps", "60", "--device", "cpu"], tmp_path, run_alone)
    right = int(out.partition("right     ")[2].split()[0])
    assert right >= 31
    fail(["graph_attention.py", "--steps", "0"], tmp_path, "--steps must be at least 1, got 0")


# sparse_linear_layer.py


def test_sparse_linear_layer(tmp_path: Path):
    out = succeed(["sparse_linear_layer.py", "--device", "cpu"], tmp_path, run_alone)
    assert "64 x 64" in out
    assert "120 stored values, density 0.0293" in out
    assert "(64, 64) @ (4, 64, 1) -> (4, 64, 1)" in out
    assert out.count("from dense") == 4
    assert "BlockSparseLinear(" in out


@pytest.mark.parametrize(("features", "blocks", "batch"), [(1, 1, 1), (30, 30, 2), (30, 1, 3)])
def test_sparse_linear_layer_sizes(features: int, blocks: int, batch: int, tmp_path: Path):
    sizes = ("--features", features, "--blocks", blocks, "--batch", batch, "--seed", 3)
    out = succeed(["sparse_linear_layer.py", *sizes], tmp_path)
    assert f"{2 * features - blocks} stored values" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--features", 65), "features 65 is not a multiple of blocks 8"),
        (("--features", 0), "features 0"),
        (("--features", -8), "-8"),
        (("--blocks", 0), "blocks"),
        (("--blocks", 1.5), "--blocks"),
        (("--batch", 0), "--batch must be at least 1, got 0"),
        (("--device", "tpu"), "--device"),
        (("--seed", -1), "--seed"),
    ],
)
def test_sparse_linear_layer_refuses(arguments: tuple, message: str, tmp_path: Path):
    fail(["sparse_linear_layer.py", *arguments], tmp_path, message)


@pytest.mark.not_emulated("runs another process")
def test_the_gpu_is_used_or_said_to_be_missing(tmp_path: Path):
    arguments = ["sparse_linear_layer.py", "--device", "gpu"]
    if mx.metal.is_available() or mx.cuda.is_available():
        assert "120 stored values" in succeed(arguments, tmp_path, run_alone)
    else:
        fail(arguments, tmp_path, "no GPU", run_alone)
        fail(["train_char_lm.py", "--device", "gpu"], tmp_path, "no GPU", run_alone)


# export_model.py


@pytest.mark.parametrize("options", [(), ("--bits", 4)])
@pytest.mark.not_emulated("runs another process")
def test_another_process_runs_the_exported_model(options: tuple, tmp_path: Path):
    sizes = ("--dims", 64, "--hidden", 96, "--rows", 1, 3, "--output", "kept.mlxfn")
    out = succeed(["export_model.py", *sizes, *options, "--device", "cpu"], tmp_path, run_alone)
    assert re.search(r"^1    rows .* apart$", out, re.MULTILINE)
    assert re.search(r"^3    rows .* apart$", out, re.MULTILINE)
    imported: Any = mx.import_function(str(tmp_path / "kept.mlxfn"))
    (found,) = imported(mx.zeros((3, 64)))
    assert found.shape == (3, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", 0), "--rows must be at least 1, got 0"),
        (("--dims", 0), "--dims must be at least 1, got 0"),
        (("--density", 2), "--density must be in (0, 1], got 2"),
        (("--bits", 4, "--block-size", 16), "--bits needs a --block-size of 32"),
        (("--output", "no/such/a.mlxfn"), "--output: there is no folder no/such"),
    ],
)
def test_export_refuses(arguments: tuple, message: str, tmp_path: Path):
    fail(["export_model.py", *arguments], tmp_path, message)


# all


@pytest.mark.parametrize("script", ["sparsify_and_finetune.py", "sparsify_pretrained.py"])
def test_a_plot_of_no_known_kind_is_refused_before_any_work(script: str, tmp_path: Path):
    fail([script, "--plot", "x.xyz"], tmp_path, "--plot: x.xyz must end in one of .")


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_each_says_what_it_is(script: Path):
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    assert f"| `{script.name}` |" in page
    said = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    assert "teaches" in said
    assert re.search(r"second|minute", said)  # how long it takes
    assert f"\n  python examples/{script.name}" in said  # and what to type


# train_char_lm.py


def test_training_learns_and_reports(folder: Path):
    out = succeed(training(steps=150, interval=50), folder, run_alone)
    assert [line.split(":")[0] for line in out.splitlines()[:3]] == [
        "step 50",
        "step 100",
        "step 150",
    ]
    assert final_loss(out) < 1.2  # the entropy of single characters is 2.7
    assert "in 2 block-sparse layers" in out
    assert re.search(r"^seconds +\d", out, re.MULTILINE)
    assert len(sampled(out)) == SMALL["sample"] + 1
    arrays, progress = load(folder)
    assert progress["step"] == 150
    assert {"random", "optimizer.step", "model.blocks.0.up.indices"} <= arrays.keys()


def test_dense_and_sparse_attention(folder: Path):
    sparse = succeed(training(), folder)
    dense = succeed(training("--dense"), folder)
    attention = succeed(training("--sparse-attention"), folder)
    assert "density          0.250 in 2 block-sparse layers" in sparse
    assert "density          1, dense" in dense
    assert "density          0.250 in 4 block-sparse layers" in attention
    count = {}
    for name, out in {"dense": dense, "sparse": sparse, "attention": attention}.items():
        match = re.search(r"^parameters +(\d+)$", out, re.MULTILINE)
        assert match, out
        count[name] = int(match[1])
    # A quarter of the weights is stored: up and down are 32 x 128, qkv is 32 x 96, out 32 x 32.
    assert count["dense"] - count["sparse"] == 2 * 32 * 128 * 3 // 4
    assert count["sparse"] - count["attention"] == 32 * (96 + 32) * 3 // 4


def test_manual_is_the_default_text(tmp_path: Path):
    options = {**SMALL, "steps": 2, "layers": 1, "context": 8, "sample": 0}
    del options["text"]
    pairs = [part for name, value in options.items() for part in (f"--{name}", value)]
    out = succeed(["train_char_lm.py", *pairs], tmp_path)
    assert final_loss(out) < 6
    assert "writes" not in out


def test_seed(folder: Path):
    first = succeed(training("--seed", "1"), folder, run_alone)
    assert sampled(succeed(training("--seed", "1"), folder)) == sampled(first)
    assert sampled(succeed(training("--seed", "2"), folder)) != sampled(first)


def test_killed_runs_resume_to_the_same_end(folder: Path):
    """An epoch is 78 batches, so the 200 steps cross two, and kills land anywhere in them."""
    whole = succeed(training("--sparse-attention", steps=200, interval=200), folder, run_alone)
    # Validating and saving at each step: a kill is as likely within a save as anywhere.
    parts = {"steps": 200, "interval": 1, "checkpoint": "parts"}
    resumed, done = [], 0
    for after in (3, 20, 1, 40):
        arguments = training("--sparse-attention", *resumed, **parts)
        code, _, _ = stop(arguments, folder, signal.SIGKILL, after)
        assert code == -signal.SIGKILL
        _, progress = load(folder, "parts")
        assert done + after <= progress["step"] < 200
        resumed, done = ["--resume"], progress["step"]
    out = succeed(training("--sparse-attention", "--resume", **parts), folder, run_alone)
    assert out.startswith(f"step {done + 1}:")
    assert final_loss(out) == final_loss(whole)
    assert sampled(out) == sampled(whole)
    assert_same(folder, "parts", "run")
    assert load(folder, "parts")[1]["seconds"] > 0


def test_interrupt_leaves_a_whole_checkpoint(folder: Path):
    code, _, stderr = stop(training(steps=20000, interval=4), folder, signal.SIGINT, after=3)
    assert code == 1
    assert "Traceback" not in stderr
    _, progress = load(folder)
    assert progress["step"] >= 12
    assert stderr.endswith(f"stopped; --resume goes on from step {progress['step']}\n")


@pytest.mark.parametrize(("before", "step"), [(True, 4), (False, 8)])
def test_interrupt_within_a_save(before: bool, step: int, folder: Path):
    """The second save is interrupted right before, or right after, its file is in place."""
    driver = f"""
import os, runpy, sys
replace, calls = os.replace, []
def interrupted(source, target):
    calls.append(target)
    if len(calls) == 2 and {before}:
        raise KeyboardInterrupt
    replace(source, target)
    if len(calls) == 2:
        raise KeyboardInterrupt
os.replace = interrupted
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    python, *flags, script = command("train_char_lm.py")
    line = [python, *flags, "-c", driver, script, *map(str, training(steps=20, interval=4)[1:])]
    result = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.endswith(f"stopped; --resume goes on from step {step}\n")
    assert load(folder)[1]["step"] == step


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(folder: Path):
    succeed(training(steps=8), folder)
    kept = load(folder)
    wild: list = training("--resume", steps=40, learning_rate=1e30)
    result = run_here(*wild, folder=folder)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert re.match(r"the (validation )?loss is (nan|inf) at step \d+: the checkpoint", last)
    assert "of step 8" in last
    assert "learning-rate" in last
    assert str(load(folder)) == str(kept)
    worse: list = training(steps=40, learning_rate=1e30, interval=40, checkpoint="new")
    assert run_here(*worse, folder=folder).stderr.count("there is no checkpoint yet") == 1
    assert not (folder / "new" / "checkpoint.safetensors").exists()


def test_the_bar_counts_steps(folder: Path):
    arguments: list = training(steps=40)
    result = run_alone(*arguments, folder=folder)
    assert "40/40" in result.stderr
    assert re.search(r"loss \d\.\d+, [\d,]+ characters/s", result.stderr)


def test_finished_run_resumes_to_its_summary(folder: Path):
    out = succeed(training(), folder)
    before = load(folder)
    again = succeed(training("--resume"), folder)
    assert again == out[out.index("parameters") :]
    assert str(load(folder)) == str(before)
    more = succeed(training("--resume", steps=32), folder)
    assert more.startswith("step 32:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "missing.txt"}, "missing.txt"),
        ({"text": "."}, "--text ."),
        ({"text": sys.executable}, "codec can't decode"),
        ({"text": "empty.txt"}, "a text of 0 characters is too short"),
        ({"context": 5000}, "too short for --batch 4 and --context 5000"),
        ({"context": 600, "batch": 1}, "too short"),  # for the validation text
        ({"batch": 1000}, "too short for --batch 1000"),
        ({"density": 0}, "density must be in (0, 1], got 0.0"),
        ({"density": "nan"}, "density"),
        ({"block_size": 0}, "--block-size: must be at least 1, got 0"),
        ({"dims": 33}, "--dims 33 is not a multiple of twice --heads 2"),
        ({"dims": 0}, "--dims: must be at least 1, got 0"),
        ({"steps": "many"}, "--steps: invalid int value: 'many'"),
        ({"temperature": -1}, "--temperature: must be at least 0, got -1"),
        ({"learning_rate": "inf"}, "--learning-rate"),
        ({"checkpoint": "text.txt"}, "text.txt"),
        ({"flags": ["--dense", "--sparse-attention"]}, "--dense has no sparse layers"),
    ],
)
def test_training_refuses(options: dict, message: str, folder: Path):
    (folder / "empty.txt").touch()
    flags = options.get("flags", [])
    values = {name: value for name, value in options.items() if name != "flags"}
    fail(training(*flags, **values), folder, message)
    assert not (folder / "run" / "checkpoint.safetensors").exists()


def test_resume_refuses_other_checkpoints(folder: Path):
    fail(training("--resume"), folder, "there is no checkpoint to resume at run/")
    assert not (folder / "run").exists()
    succeed(training(steps=2), folder)
    fail(training("--resume", dims=48), folder, "is of a run with dims 32, not 48")
    fail(training("--resume", "--dense"), folder, "is of a run with dense False, not True")
    fail(training("--resume", text=__file__), folder, "is of a run with text 5")
    path = folder / "run" / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    fail(training("--resume"), folder, "is no checkpoint of this script")
    mx.save_safetensors(str(path), {"weight": mx.zeros(3)})
    fail(training("--resume"), folder, "is no checkpoint of this script")
