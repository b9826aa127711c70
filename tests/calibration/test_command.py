"""The command ``calibrate``, and mlx-lm's commands on what it wrote, typed as it says."""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm_lab import TOKENS, Folder, finish
from support import assert_equal
from tiny_models import (
    close,
    config_of,
    layers_of,
    make_sparse,
    make_tokenizer,
    save_dense,
    save_sparse,
)

from mlx_sparse_nn import BlockSparseLinear, QuantizedBlockSparseLinear
from mlx_sparse_nn.__main__ import main
from mlx_sparse_nn.calibration import command
from mlx_sparse_nn.calibration.texts import read_texts

WORDS = [int(i) for i in np.random.default_rng(0).integers(0, 92, 2000)]
HELD_OUT = WORDS[1800:]
LENGTH = 16
TYPED = "calibrate --model dense --mlx-path sparse --data text.txt --density 0.6"
OPTIONS = f"--sequence-length {LENGTH} --num-samples 32 --trust-remote-code"
# Layers to be made sparse, of two transformer layers, and those that stay dense.
MODELS = {
    "llama": (14, ["lm_head"]),
    "qwen3": (14, []),
    "gemma3_text": (14, []),
    "phi3": (8, ["lm_head"]),
    "gpt_neox": (8, ["model.embed_out"]),
    "mixtral": (8, [f"model.layers.{i}.block_sparse_moe.gate" for i in (0, 1)] + ["lm_head"]),
}


class Calibrated(Folder):
    """A folder in which ``calibrate`` was typed, and ``sparse``, which it wrote, was moved."""

    def __init__(self, name, folder):
        super().__init__(name, folder)
        self.write("text.txt", " ".join(f"w{i}" for i in WORDS))
        self.done = finish(self.popen(TYPED, OPTIONS, module="mlx_sparse_nn"))
        assert self.done.returncode == 0, self.done.stderr
        (self.folder / "sparse").rename(self.folder / "moved")

    def next_step(self, command, **more):
        """Type a line that ``calibrate`` printed, and further options."""
        lines = [line for line in self.done.stdout.splitlines() if line.startswith("mlx_lm.")]
        (line,) = (line for line in lines if line.startswith(f"mlx_lm.{command} "))
        line = line.removeprefix("mlx_lm.").replace(" sparse ", " moved ")
        options = " ".join(
            f"--{option.replace('_', '-')} {value}" for option, value in more.items()
        )
        done = finish(self.popen(line.replace("path/to/data", "data"), options))
        assert done.returncode == 0, done.stderr
        return done


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    return Calibrated(request.param, tmp_path_factory.mktemp(request.param))


def perplexity(model, tokens, length=LENGTH):
    """Return that of tokens cut into sequences, with its standard error."""
    rows = np.array(tokens[: len(tokens) // length * length]).reshape(-1, length)
    logits = np.array(model(mx.array(rows[:, :-1])).astype(mx.float32), dtype=np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logs, rows[:, 1:, None], -1).reshape(-1)
    value = math.exp(losses.mean())
    return value, value * losses.std(ddof=1) / math.sqrt(losses.size)


class TestModels:
    def test_the_linear_layers_of_the_blocks_are_sparse(self, folder):
        n_layers, dense = MODELS[folder.name]
        model, _ = folder.load("moved")
        sparse = layers_of(model, BlockSparseLinear)
        assert len(sparse) == n_layers
        assert sorted(layers_of(model, nn.Linear)) == sorted(dense)
        assert all(path in folder.done.stdout for path in sparse)
        routers = "block_sparse_moe.gate x 2 skipped: *.gate is excluded"
        assert (routers in folder.done.stdout) == (folder.name == "mixtral")
        stored = sum(model_layer(model, path).pattern.nnz for path in sparse)
        places = sum(math.prod(model_layer(model, path).pattern.shape) for path in sparse)
        assert 0.5 <= stored / places < 0.7  # of 0.6, where a row has two blocks or four

    def test_the_printed_perplexities_are_those_of_the_last_tenth(self, folder):
        printed = re.findall(r"held-out perplexity (\w+): (\S+) ± (\S+)", folder.done.stdout)
        assert [name for name, *_ in printed] == ["before", "after"]
        for (_, *values), path in zip(printed, ("dense", "moved"), strict=True):
            expected = perplexity(folder.load(path)[0], HELD_OUT)
            assert [float(v.rstrip(",")) for v in values] == pytest.approx(expected, abs=2e-3)

    def test_a_bad_model_is_warned_of(self, folder):
        assert "warning: the dense model is no better than guessing" in folder.done.stderr

    def test_generate(self, folder):
        done = folder.next_step("generate", max_tokens=8, verbose=False)
        assert re.fullmatch(r"\S+( \S+){0,7}", done.stdout.strip())

    def test_lora_and_fuse(self, folder):
        model, _ = folder.load("moved")
        quick = {"num_layers": 1, "iters": 4, "batch_size": 4, "val_batches": 1}
        folder.next_step("lora", **quick, steps_per_eval=4, learning_rate=1e-2)
        folder.next_step("fuse", save_path="fused")
        fused, _ = folder.load("fused")
        assert close(fused(TOKENS), folder.load("moved", "adapters")[0](TOKENS))
        assert not close(fused(TOKENS), model(TOKENS))
        n_layers, _ = MODELS[folder.name]
        assert len(layers_of(fused, BlockSparseLinear)) == n_layers // 2

    def test_convert(self, folder):
        folder.next_step("convert")
        model, _ = folder.load("sparse-converted")
        assert len(layers_of(model, QuantizedBlockSparseLinear)) == MODELS[folder.name][0]
        assert close(model(TOKENS), folder.load("moved")[0](TOKENS), 0.5)


def model_layer(model, path):
    return dict(model.named_modules())[path]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the directory ``dense`` and texts, for commands in this process."""
    path = tmp_path_factory.mktemp("home")
    save_dense("llama", path / "dense")
    (path / "text.txt").write_text(" ".join(f"w{i}" for i in WORDS))
    (path / "short.txt").write_text("w1 w2 w3")
    (path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (path / "bad.jsonl").write_text('{"text": "w1"}\n{"texts": "w2"}\n')
    (path / "broken.jsonl").write_text('{"text": "w1"}\n\n{"text": \n')
    (path / "deep.jsonl").write_text("[" * 100000 + "\n")
    chat = {"messages": [{"role": "critic", "content": "w1"}]}
    (path / "critic.jsonl").write_text("\n" + json.dumps(chat))
    (path / "text.json").write_text('[{"text": "w1"}]')
    (path / "link").symlink_to(path / "text.txt" / "below")
    (path / "full").mkdir()
    (path / "full" / "file").touch()
    for name, added in {
        "quantized": {"quantization": {"group_size": 32, "bits": 4}},
        "own": {"model_file": "own.py"},
        "unknown": {"model_type": "no_such"},
        "stranger": {},
    }.items():
        save_dense("llama", path / name)
        file = path / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **added}))
    (path / "own" / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["w100"])  # the model has embeddings for 96 alone
    tokenizer.chat_template = "{{ raise_exception('no critics here') }}"
    tokenizer.save_pretrained(path / "stranger")
    (path / "stranger.txt").write_text("w100 " * 200)
    (path / "sparse").mkdir()
    save_sparse(make_sparse("llama"), path / "sparse", config_of("llama"))
    return path


@pytest.fixture
def at_home(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run(out, *options, data="text.txt"):
    """Run the command in this process; return its exit status."""
    typed = f"calibrate --model dense --mlx-path {out} --data {data} --density 0.6 {OPTIONS}"
    return main([*typed.split(), *map(str, options)])


REFUSED = [
    (["--density", 0], "--density must be in (0, 1], got 0.0"),
    (["--density", 1.5], "--density must be in (0, 1], got 1.5"),
    (["--density", "nan"], "--density must be in (0, 1], got nan"),
    (["--block-size", 1], "--block-size must be in [2, 2**31 - 1], got 1"),
    (["--block-size", 256], "its dims of 64 are less than block_size 256"),
    (["--sequence-length", 1], "--sequence-length must be in [2, 2**31 - 1], got 1"),
    (["--batch-size", 0], "--batch-size must be in [1, 2**31 - 1], got 0"),
    (["--num-samples", 0], "--num-samples must be at least 1, or -1 for all, got 0"),
    (["--damping", -1], "damping must be"),
    (["--data", "nowhere.txt"], "--data must be a file, got nowhere.txt"),
    (["--data", "full"], "--data must be a file, got full"),
    (["--data", "short.txt"], "--data must hold at least 160 tokens, ten sequences, but short.txt"),
    (["--data", "bytes.txt"], "--data must be text in UTF-8, but bytes.txt"),
    (["--data", "bad.jsonl"], "line 2 of bad.jsonl is none"),
    (["--data", "broken.jsonl"], "line 3 of broken.jsonl is none"),
    (["--mlx-path", "full"], "--mlx-path must be new or an empty directory, but full is not"),
    (["--mlx-path", "text.txt"], "--mlx-path must be new or an empty directory, but text.txt"),
    (["--model", "nowhere"], "--model must be a directory that mlx-lm loads, but nowhere"),
    (["--model", "full"], "--model must be a directory that mlx-lm loads, but full"),
    (["--model", "unknown"], "Model type no_such not supported"),
    (["--model", "quantized"], "--model must not be quantized, but quantized is"),
    (["--model", "own"], "its config.json names a model_file of its own, 'own.py'"),
    (["--model", "sparse"], "--model must be dense, but sparse is sparse already"),
    (["--model", "full/typo"], "but full/typo (none here, sought on the Hub)"),
    (["--model", "full/a/typo"], "--model: there is no such directory, full/a/typo"),
    (["--model", "./typo"], "--model: there is no such directory, ./typo"),
    (
        ["--model", "stranger", "--data", "stranger.txt"],
        "that of stranger gives token 96, and the model knows 96",
    ),
    (["--model", "stranger", "--data", "critic.jsonl"], "refuses line 2 of critic.jsonl: no crit"),
    (["--data", "deep.jsonl"], "line 1 of deep.jsonl is none"),
    (["--data", "text.json"], "--data must be plain text, or records in a file .jsonl"),
    (["--sequence-length", 65], "--sequence-length must be at most 64, the positions"),
    (["--seed", -1], "--seed must be in [0, 2**31 - 1], got -1"),
    (["--sensitivity", "--density", 0.1], "--density must be at least 0.125 with --sensitivity"),
    (["--mlx-path", "text.txt/out"], "--mlx-path must be where a directory can be made"),
    (["--mlx-path", "link"], "--mlx-path must be where a directory can be made, got link"),
    (["--mlx-path", "x" * 300], "got " + "x" * 300 + ": File name too long"),
    (["--mlx-path", "new", "--resume", "new"], "must be folders apart, got new and new"),
    (["--mlx-path", "new", "--resume", "./new/kept"], "must be folders apart"),
    (["--mlx-path", "kept/new", "--resume", "kept"], "must be folders apart"),
    (["--resume", ""], "--resume must be a folder, but '' is not"),
    (["--exclude", "*.nothing"], "--exclude must match a layer, but '*.nothing' matches none"),
    (["--exclude", "*"], "--model must have an nn.Linear in its layers that may be sparse"),
    (["--resume", "text.txt"], "--resume must be a folder, but 'text.txt' is not"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_errors_are_one_line(options, message, at_home, capsys):
    assert run(at_home / "out", *options) == 2
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("[calibrate]")
    assert message in last
    assert not list(at_home.iterdir())


def test_without_mlx_lm(at_home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    assert run(at_home / "out") == 2
    assert capsys.readouterr().err == ("[calibrate] mlx-lm must be installed: pip install mlx-lm\n")


def test_the_other_commands_need_no_mlx_lm():
    code = "import sys, mlx_sparse_nn.__main__; print('mlx_lm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def recorded(monkeypatch):
    """Return the arguments with which the command calls calibrate, from now on."""
    calls = []
    calibrate = command.calibrate

    def record(model, batches, **options):
        calls.append((batches, options))
        return calibrate(model, batches, **options)

    monkeypatch.setattr(command, "calibrate", record)
    return calls


def test_no_held_out_token_calibrates(at_home, monkeypatch):
    (at_home / "text.txt").write_text("w1 w2 w3 " * 600 + "w7 w8 " * 100)
    calls = recorded(monkeypatch)
    assert run(at_home / "out", "--num-samples", -1, data=at_home / "text.txt") == 0
    ((batches, _),) = calls
    tokens = np.concatenate([np.array(batch).reshape(-1) for batch in batches])
    assert set(tokens.tolist()) == {1, 2, 3}
    assert tokens.size == 1800 // LENGTH * LENGTH


def test_options_arrive(at_home, monkeypatch, capsys):
    calls = recorded(monkeypatch)
    options = ["--block-size", 16, "--damping", 0.1, "--batch-size", 8, "--seed", 5]
    options += ["--exclude", "*.down_proj", "--exclude", "*.layers.0.*"]
    assert run(at_home / "out", *options) == 0
    ((batches, given),) = calls
    assert [batch.shape for batch in batches] == [(8, LENGTH)] * 4
    assert (given["block_size"], given["damping"], given["density"]) == (16, 0.1, 0.6)
    out = capsys.readouterr().out
    assert "6 layers made sparse" in out
    assert "model.layers.1.mlp.down_proj skipped: *.down_proj is excluded" in out.replace("\n ", "")
    assert "-q --q-group-size" not in out  # blocks of 16 cannot be quantized


def test_it_goes_on_after_an_interruption(at_home, monkeypatch, capsys):
    """The second run ends with the same bits as one that was not interrupted."""
    assert run(at_home / "whole") == 0
    calibrate, folder = command.calibrate, at_home / "finished"

    def interrupted(*args, **options):
        calibrate(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "calibrate", interrupted)
        assert run(at_home / "out", "--resume", folder) == 130
        assert f"the same command goes on from {folder}" in capsys.readouterr().err
        assert run(at_home / "out") == 130
        assert "--resume FOLDER would keep it" in capsys.readouterr().err
    assert sorted(at_home.iterdir()) == [folder, at_home / "whole"]
    assert run(at_home / "out", "--resume", folder, "--seed", 1) == 2
    assert "(what may have changed: --data, " in capsys.readouterr().err
    assert run(at_home / "out", "--resume", folder) == 0
    files = [at_home / name / "model.safetensors" for name in ("out", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_sensitivity_gives_each_layer_a_density(at_home, monkeypatch, capsys):
    """Run again with what is finished, it is not measured a second time."""
    folder, options = at_home / "finished", ["--sensitivity", "--block-size", 16, "--exclude"]
    options += ["*.layers.0.*"]
    assert run(at_home / "whole", *options) == 0
    assert "densities of 7 layers, 0.6" in capsys.readouterr().out
    calls = recorded(monkeypatch)
    assert run(at_home / "first", *options, "--resume", folder) == 0
    ((_, given),) = calls
    assert len(set(given["density"].values())) > 1
    kept = {file: file.stat().st_mtime_ns for file in (folder / "sensitivity").iterdir()}
    assert run(at_home / "second", *options, "--resume", folder) == 0
    assert kept == {file: file.stat().st_mtime_ns for file in (folder / "sensitivity").iterdir()}
    files = [at_home / name / "model.safetensors" for name in ("whole", "first", "second")]
    assert len({file.read_bytes() for file in files}) == 1
    again = run(at_home / "denser", *options, "--resume", folder, "--density", 0.8)
    assert again == 0
    assert kept == {file: file.stat().st_mtime_ns for file in (folder / "sensitivity").iterdir()}


def test_at_density_1_nothing_is_measured(at_home, monkeypatch):
    calls = recorded(monkeypatch)
    monkeypatch.setattr(command, "sensitivity", None)
    assert run(at_home / "out", "--sensitivity", "--density", 1, "--block-size", 16) == 0
    assert calls[0][1]["density"] == 1


def test_routers_stay_dense_whatever_else_does(home, at_home, capsys):
    save_dense("mixtral", at_home / "experts")
    options = ["--model", at_home / "experts", "--exclude", "*.q_proj"]
    assert run(at_home / "out", *options) == 0
    out = capsys.readouterr().out
    assert "gate x 2 skipped: *.gate is excluded" in " ".join(out.split())
    assert "q_proj x 2 skipped: *.q_proj is excluded" in " ".join(out.split())


def test_a_save_that_fails_leaves_nothing(at_home, monkeypatch, capsys):
    """As on a full disk, after the first file; the empty directory that was there stays."""
    (at_home / "out").mkdir()

    def failing(folder, *args):
        (folder / "config.json").touch()
        raise RuntimeError("[write] Unable to write 48 bytes to file.")

    with monkeypatch.context() as patch:
        patch.setattr(command, "save_mlx_lm", failing)
        assert run(at_home / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"[calibrate] --mlx-path {at_home}/out cannot be written: RuntimeErr")
    assert [*at_home.iterdir()] == [at_home / "out"]
    assert not [*(at_home / "out").iterdir()]
    assert run(f"{at_home}/out/.") == 0
    assert f"--mlx-path {at_home}/out-converted" in capsys.readouterr().out
    assert [*at_home.iterdir()] == [at_home / "out"]


def test_a_full_disk_while_it_resumes_is_one_line(at_home, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("[write] Unable to write 48 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    assert run(at_home / "out", "--resume", at_home / "kept") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"[calibrate] --resume {at_home}/kept cannot be written: [write]")
    assert not (at_home / "out").exists()


def test_an_ascii_terminal(at_home):
    typed = f"calibrate --model dense --mlx-path {at_home}/out --data text.txt --density 1"
    code = [sys.executable, "-m", "mlx_sparse_nn", *typed.split(), *OPTIONS.split()]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(code, capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert re.search(r"before: \S+ \? \S+", done.stdout)


def test_a_sparse_model_with_dense_layers_left(at_home, capsys):
    """As after ``fuse``: the dense layers become sparse, the others stay, and so does the file."""
    assert run(at_home / "first", "--exclude", "*.mlp.*") == 0
    assert run(at_home / "second", "--model", at_home / "first", "--exclude", "*_proj.none") == 2
    assert run(at_home / "second", "--model", at_home / "first") == 0
    assert "6 layers made sparse" in capsys.readouterr().out
    files = [at_home / name / "sparse_model.py" for name in ("first", "second")]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (19, 37.9, None),
        (19, 38.1, "2.01 times the dense model's"),
        (60, 97, "no better than guessing one of its 96 tokens"),
        (19, float("nan"), "no better than guessing"),
        (19, float("inf"), "no better than guessing"),
        (97, 97, "the dense model is no better than guessing"),
    ],
)
def test_what_bad_means(before, after, why):
    found = command._why_bad(before, after, vocabulary=96)
    assert found is why is None or why in found


def test_layers_that_do_not_run_one_after_another(capsys):
    """A loop over the layers: each is then fitted to what the dense model computes."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(8, 8), nn.Linear(8, 8)]

        def __call__(self, x):
            return self.layers[1](self.layers[0](x) + x)

    assert command._blocks(Model(), mx.ones((1, 2, 8))) is None
    assert "block 1 is not called with what block 0 gives\n" in capsys.readouterr().out


class TestTexts:
    def read(self, path, tokenizer=None, n_samples=-1, seed=0):
        tokenizer = tokenizer or make_tokenizer()
        options = {"length": 4, "n_samples": n_samples, "seed": seed}
        return read_texts("calibrate", path, tokenizer, **options)

    def test_jsonl_has_the_records_of_lora(self, tmp_path):
        """Each text ends with the tokenizer's last token, 95; chats are written as its template."""
        file = tmp_path / "records.jsonl"
        text = {"text": "w1 w2 w3"}
        file.write_text("\n".join([json.dumps(text)] * 20))
        assert np.unique(self.read(file).calibration, axis=0).tolist() == [[1, 2, 3, 95]]
        pair = {"prompt": "w1", "completion": "w2"}
        roles = ("user", "w1"), ("assistant", "w2")
        chat = {"messages": [{"role": role, "content": content} for role, content in roles]}
        for record in (pair, chat):
            file.write_text("\n".join([json.dumps(record)] * 20))
            assert np.unique(self.read(file).calibration, axis=0).tolist() == [[93, 1, 94, 2]]

    def test_the_suffix_may_be_in_capitals(self, tmp_path):
        file = tmp_path / "RECORDS.JSONL"
        file.write_text("\n".join([json.dumps({"text": "w1 w2 w3"})] * 20))
        assert self.read(file).calibration[0].tolist() == [1, 2, 3, 95]

    def test_sequences_do_not_overlap_and_their_order_is_of_the_seed(self, tmp_path):
        file = tmp_path / "text.txt"
        file.write_text(" ".join(f"w{i}" for i in range(80)))
        texts = self.read(file)
        assert sorted(np.array(texts.calibration).reshape(-1).tolist()) == list(range(72))
        assert sorted(np.array(texts.held_out).reshape(-1).tolist()) == list(range(72, 80))
        assert_equal(self.read(file).calibration, texts.calibration)
        assert not mx.array_equal(self.read(file, seed=1).calibration, texts.calibration)
        few = self.read(file, n_samples=1)
        assert (few.calibration.shape, few.held_out.shape) == ((1, 4), (1, 4))

    def test_sequences_begin_as_texts_do(self, tmp_path):
        file = tmp_path / "text.txt"
        file.write_text("x")
        tokens = [90, *range(60)]
        tokenizer = SimpleNamespace(encode=lambda text: tokens, bos_token_id=90)
        rows = np.array(self.read(file, tokenizer).calibration)
        assert set(rows[:, 0].tolist()) == {90}
        assert sorted(rows[:, 1:].reshape(-1).tolist()) == list(range(54))
