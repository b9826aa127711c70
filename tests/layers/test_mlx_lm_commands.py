"""mlx-lm's own commands on sparse directories: every row of the table in docs/mlx_lm.md is true.

Each command is typed as a user would, in a process of its own, without a network. What it wrote is
read in this process.
"""

import inspect
import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.cli
import pytest
from mlx_lm_lab import PROMPT, TOKENS, WORDS, Lab, finish
from support import assert_equal, untyped
from tiny_models import PAGE, close, layers_of

from mlx_sparse_nn import BlockSparseLinear, QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import LoRABlockSparseLinear

Done = subprocess.CompletedProcess[str]

MODELS = ("llama", "qwen3", "gemma3_text")
LAYERS = 14  # sparse ones of two transformer layers
QUIET = f"--prompt '{PROMPT}' --max-tokens {WORDS} --verbose False"
CHECKS: dict[tuple[str, str], Callable[[Lab, str], Done]] = {}


def row(command: str, *models: str):
    """Register what checks a row of the table, and with which models."""

    def register(check):
        for model in models:
            assert (command, model) not in CHECKS
            CHECKS[command, model] = check
        return check

    return register


def table() -> dict[str, tuple[str, str]]:
    """Return the result and the remarks of each command of the table."""
    section = PAGE.read_text(encoding="utf-8").split("## Commands\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if "|" in line]
    cells = [[cell.strip() for cell in row] for row in rows[2:]]
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0].strip("`"): (row[1], row[2]) for row in cells}


TABLE = table()


def works(done: Done) -> Done:
    assert done.returncode == 0, done.stderr
    return done


def kinds(model: nn.Module) -> dict[type, int]:
    """Return how many sparse layers of each kind there are."""
    counts = {k: len(layers_of(model, k)) for k in (BlockSparseLinear, QuantizedBlockSparseLinear)}
    return {kind: n for kind, n in counts.items() if n}


def patterns(model: nn.Module) -> list:
    return [m.pattern for _, m in model.named_modules() if hasattr(m, "pattern")]


# ---- generation ----


@row("generate", *MODELS)
def generate(lab, command):
    done = works(lab.run(command, QUIET))
    assert done.stdout.strip() == lab.words
    assert_equal(lab.load("sparse")[0](TOKENS), lab.logits)
    return done


@row("generate --adapter-path adapters", *MODELS)
def generate_with_adapters(lab, command):
    works(lab.trained)
    done = works(lab.run(command, QUIET))
    assert done.stdout.strip() == lab.words_of("sparse", "adapters") != lab.words
    return done


@row("generate --kv-bits 8", "qwen3")
def generate_with_a_quantized_cache(lab, command):
    done = works(lab.run(command, QUIET, "--kv-group-size 32 --quantized-kv-start 0"))
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    assert done.stdout.strip() == lab.words_of("sparse", **options)
    return done


@row("generate --draft-model dense", "llama")
def generate_with_a_dense_draft(lab, command):
    done = works(lab.run(command, QUIET))
    assert done.stdout.strip() == lab.words
    return done


@row("generate --draft-model sparse", "llama")
def generate_with_a_sparse_draft(lab, command):
    return lab.run(command, QUIET)


@row("cache_prompt", "llama")
def cache_prompt(lab, command):
    done = works(lab.run(command, f"--prompt '{PROMPT}' --prompt-cache-file cache.safetensors"))
    after = works(lab.run("generate", "--prompt-cache-file cache.safetensors", QUIET))
    assert re.fullmatch(r"(w\d+ ?){1,8}", after.stdout.strip())
    return done


@row("chat", "gemma3_text")
def chat(lab, command):
    done = works(lab.run(command, f"--max-tokens {WORDS}", typed=f"{PROMPT}\nq\n"))
    assert lab.words in done.stdout
    return done


@row("server", "gemma3_text")
def server(lab, command):
    (port,) = free_ports(1)
    process = lab.popen(command, f"--model sparse --trust-remote-code --port {port}")
    ask = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": WORDS}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(ask).encode())
    answer = None
    while answer is None and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                answer = json.load(reply)
        except urllib.error.URLError:
            time.sleep(0.1)  # it has not started yet
    process.terminate()  # it serves until then
    done = finish(process)
    assert answer, done.stderr
    assert answer["choices"][0]["message"]["content"] == lab.words
    return subprocess.CompletedProcess(done.args, 0, done.stdout, done.stderr)


@row("benchmark", "gemma3_text")
def benchmark(lab, command):
    done = works(lab.run(command, "--prompt-tokens 8 --generation-tokens 4 --num-trials 1"))
    assert "Averages: prompt_tps=" in done.stdout
    return done


@row("perplexity", "gemma3_text")
def perplexity(lab, command):
    done = works(lab.run(command, "--data-path data --num-samples 4 --sequence-length 8"))
    assert 10 < float(re.findall(r"Perplexity: ([\d.]+)", done.stdout)[0]) < 1000
    return done


@row("evaluate", "gemma3_text")
def evaluate(lab, command):
    """Its result is the likelihood of two words after two, which the stub asks for."""
    done = works(lab.run(command, "--tasks two_words --output-dir results"))
    (file,) = (lab.folder / "results").iterdir()
    likelihood, _ = json.loads(file.read_text())["two_words"]
    model, _ = lab.load("sparse")
    logs = nn.log_softmax(model(mx.array([[5, 17, 3, 4]])))[0]
    assert likelihood == pytest.approx((logs[1, 3] + logs[2, 4]).item(), rel=1e-4)
    return done


# ---- training ----


def losses(done: Done) -> list[float]:
    """Return the losses on the validation set: before, and after the last iteration."""
    return [float(loss) for loss in re.findall(r"val (\d+\.\d+)", done.stdout)]


def adapter_names(lab, folder) -> set[str]:
    weights = untyped(mx.load(str(lab.folder / folder / "adapters.safetensors")))
    return {name.rpartition(".")[2] for name in weights}


@row("lora --train", *MODELS)
def lora(lab, command):
    before, after = losses(works(lab.trained))
    assert after < before - 0.1
    assert adapter_names(lab, "adapters") == {"lora_a", "lora_b"}
    model, _ = lab.load("sparse", "adapters")
    assert len(layers_of(model, LoRABlockSparseLinear)) == LAYERS / 2
    return lab.trained


@row("lora --train --mask-prompt --grad-checkpoint", "qwen3")
def lora_with_options(lab, command):
    done = works(lab.train(command, "--adapter-path others"))
    before, after = losses(done)
    assert after < before - 0.1
    return done


@row("lora --train --resume-adapter-file adapters/adapters.safetensors", "qwen3")
def lora_resumed(lab, command):
    at_first, left = losses(works(lab.trained))
    done = works(lab.train(command, "--adapter-path resumed"))
    before, after = losses(done)
    assert after < before < (at_first + left) / 2
    return done


@row("lora --train --fine-tune-type full", "llama")
def full(lab, command):
    done = works(lab.train(command, "--adapter-path full"))
    before, after = losses(done)
    assert after < before - 0.1
    assert not adapter_names(lab, "full") & {"indptr", "indices", "lora_a"}
    works(lab.run("fuse", "--adapter-path full --save-path full_fused"))
    tuned, _ = lab.load("full_fused")
    model, _ = lab.load("sparse")
    assert patterns(tuned) == patterns(model)
    assert not close(tuned(TOKENS), lab.logits)
    assert_equal(tuned(TOKENS), lab.load("sparse", "full")[0](TOKENS))
    return done


@row("lora --train --fine-tune-type dora", "llama")
def dora(lab, command):
    return lab.train(command, "--adapter-path dora")


@row("lora --test", "qwen3")
def lora_test(lab, command):
    at_first, left = losses(works(lab.trained))
    done = works(lab.run(command, "--data data --adapter-path adapters --batch-size 4"))
    assert float(re.findall(r"Test loss ([\d.]+)", done.stdout)[0]) < (at_first + left) / 2
    return done


# ---- fusing ----


@row("fuse", *MODELS)
def fuse(lab, command):
    works(lab.trained)
    done = works(lab.run(command, "--adapter-path adapters --save-path fused"))
    fused, _ = lab.load("fused")
    assert kinds(fused)[BlockSparseLinear] == LAYERS / 2
    assert close(fused(TOKENS), lab.load("sparse", "adapters")[0](TOKENS))
    return done


@row("fuse --dequantize", "llama")
def fuse_dequantized(lab, command):
    """The adapters lie over quantized layers."""
    works(lab.converted)
    works(lab.train("lora --train", "--adapter-path q_adapters", model="quantized"))
    options = "--adapter-path q_adapters --save-path dequantized_fused"
    done = works(lab.run(command, options, model="quantized"))
    fused, _ = lab.load("dequantized_fused")
    assert kinds(fused)[QuantizedBlockSparseLinear] == LAYERS / 2
    assert close(fused(TOKENS), lab.load("quantized", "q_adapters")[0](TOKENS), 1e-3)
    return done


@row("fuse --export-gguf", "llama")
def gguf(lab, command):
    works(lab.train("lora --train", "--adapter-path all --num-layers -1"))
    done = works(lab.run(command, "--adapter-path all --save-path gguf"))
    weights = untyped(mx.load(str(lab.folder / "gguf" / "ggml-model-f16.gguf")))
    assert weights["blk.0.ffn_up.weight"].shape == (128, 64)
    assert not [name for name in weights if "indptr" in name]
    return done


# ---- conversion ----


def check_copy(lab, path, kind, tolerance):
    """Check a directory that holds the model in another form; return the model."""
    model, _ = lab.load(path)
    assert kinds(model) == {kind: LAYERS}
    assert patterns(model) == patterns(lab.load("sparse")[0])
    assert close(model(TOKENS).astype(mx.float32), lab.logits, tolerance)
    return model


@row("convert", "llama")
def convert(lab, command):
    done = works(lab.run(command, "--mlx-path copy"))
    check_copy(lab, "copy", BlockSparseLinear, tolerance=0)
    return done


@row("convert --dtype bfloat16", "llama")
def convert_to_bfloat16(lab, command):
    done = works(lab.run(command, "--mlx-path halves"))
    model = check_copy(lab, "halves", BlockSparseLinear, tolerance=0.05)
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.bfloat16
    return done


@row("convert -q", "llama")
def convert_in_larger_groups(lab, command):
    done = works(lab.run(command, "--mlx-path large"))
    model = check_copy(lab, "large", BlockSparseLinear, tolerance=0.3)
    assert layers_of(model, nn.QuantizedLinear) == ["lm_head"]
    return done


@row("convert -q --q-group-size 32", *MODELS)
def convert_in_groups(lab, command):
    done = works(lab.converted)
    check_copy(lab, "quantized", QuantizedBlockSparseLinear, tolerance=0.5)
    return done


@row("convert -q --q-group-size 32 --quant-predicate mixed_4_6", "llama")
def convert_by_a_recipe(lab, command):
    done = works(lab.run(command, "--mlx-path mixed"))
    model = check_copy(lab, "mixed", QuantizedBlockSparseLinear, tolerance=0.5)
    layer = model.layers[0]
    assert (layer.mlp.down_proj.bits, layer.mlp.up_proj.bits) in {(6, 4), (4, 4)}
    assert model.layers[1].mlp.down_proj.bits == 6
    return done


@row("convert -q --q-mode mxfp4", "llama")
def convert_to_mxfp4(lab, command):
    return lab.run(command, "--mlx-path mxfp4")


@row("convert --dequantize", "llama")
def convert_back(lab, command):
    works(lab.converted)
    done = works(lab.run(command, "--mlx-path dequantized", model="quantized"))
    model = check_copy(lab, "dequantized", QuantizedBlockSparseLinear, tolerance=0.5)
    assert layers_of(model, nn.Linear) == ["lm_head"]
    assert close(model(TOKENS), lab.load("quantized")[0](TOKENS))
    return done


# ---- learned quantization ----

CALIBRATION = "--num-samples 4 --sequence-length 16"


@row("dwq --group-size 32", "qwen3")
def dwq(lab, command):
    done = works(lab.run(command, "--data-path data --num-samples 4 --mlx-path dwq"))
    check_copy(lab, "dwq", QuantizedBlockSparseLinear, tolerance=0.5)
    return done


@row("dynamic_quant", "qwen3")
@row("gptq", "llama")
@row("awq", "qwen3")
@row("awq --group-size 32", "qwen3")
def quantize_in_vain(lab, command):
    options = "" if command == "dynamic_quant" else CALIBRATION
    return lab.run(command, options, "--mlx-path vain")


@row("dynamic_quant --low-group-size 32 --high-group-size 32", "qwen3")
def dynamic_quant(lab, command):
    done = works(lab.run(command, "--mlx-path dynamic"))
    model = check_copy(lab, "dynamic", QuantizedBlockSparseLinear, tolerance=0.5)
    bits = {layer.bits for _, layer in model.named_modules() if hasattr(layer, "bits")}
    assert bits == {4, 5}
    return done


@row("gptq --fallback-group-size 32", "llama")
def gptq(lab, command):
    done = works(lab.run(command, CALIBRATION, "--mlx-path gptq"))
    model = check_copy(lab, "gptq", QuantizedBlockSparseLinear, tolerance=0.3)
    assert model.layers[0].mlp.up_proj.bits == 6
    assert model.lm_head.bits == 4
    return done


# ---- files ----


@row("share", "gemma3_text")
def share(lab, command):
    """Two ranks of this machine: the first has the directory, the second gets it."""
    hosts = [[f"127.0.0.1:{port}"] for port in free_ports(2)]
    lab.write("hosts.json", json.dumps(hosts))
    processes = [
        lab.popen(
            command,
            "--path sparse --dst shared",
            env={"MLX_HOSTFILE": str(lab.folder / "hosts.json"), "MLX_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    done, _ = [works(finish(process)) for process in processes]
    names = {path.name for path in (lab.folder / "sparse").iterdir()}
    assert {path.name for path in (lab.folder / "shared").iterdir()} == names
    assert_equal(lab.load("shared")[0](TOKENS), lab.logits)
    return done


@row("upload", "gemma3_text")
def upload(lab, command):
    """It gets as far as the network."""
    done = finish(lab.popen(command, "--path sparse --upload-repo user/model"))
    assert "OfflineModeIsEnabled" in done.stderr
    return done


@row("manage", "gemma3_text")
def manage(lab, command):
    (lab.folder / "hub" / "hub").mkdir(parents=True)
    done = works(finish(lab.popen(command, "--scan")))
    assert "REPO ID" in done.stdout
    return done


# ---- the table ----


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """Return one lab for each model, made when it is asked for."""
    made = {}

    def lab(name):
        if name not in made:
            made[name] = Lab(name, tmp_path_factory.mktemp(name))
        return made[name]

    return lab


def check(lab, command):
    result, remarks = TABLE[command]
    done = CHECKS[command, lab.name](lab, command)
    if result == "works":
        assert done.returncode == 0
    else:
        assert result in ("refused", "not tried")
        assert done.returncode != 0
    if result == "refused":
        assert re.findall(r"`(.*?)`", remarks)[0] in done.stderr


def rows_of(model):
    return pytest.mark.parametrize("command", [row for row, name in CHECKS if name == model])


# A class for each model: tests run on several cores, the functions of a class on one.
class TestLlama:
    @rows_of("llama")
    def test_row(self, labs, command):
        check(labs("llama"), command)


class TestQwen:
    @rows_of("qwen3")
    def test_row(self, labs, command):
        check(labs("qwen3"), command)


class TestGemma:
    @rows_of("gemma3_text")
    def test_row(self, labs, command):
        check(labs("gemma3_text"), command)

    def test_the_model_that_was_saved_is_empty_and_says_so(self, labs):
        lab = labs("gemma3_text")
        with pytest.raises(ValueError, match=r"emptied.*mlx_lm\.utils\.save"):
            lab.emptied.layers[0].mlp.up_proj(mx.zeros((1, 64)))
        assert_equal(lab.load("sparse")[0](TOKENS), lab.logits)

    def test_no_command_runs_the_file_of_a_model_that_is_not_trusted(self, labs):
        done = finish(labs("gemma3_text").popen("generate --model sparse"))
        assert done.returncode != 0
        assert "requires importing and\nrunning a custom module" in PAGE.read_text(encoding="utf-8")
        assert "requires importing and running a custom module" in done.stderr


def test_the_table_has_the_rows_that_are_tested_and_no_others():
    assert {command for command, _ in CHECKS} == set(TABLE)


def test_the_table_has_every_command_of_mlx_lm():
    source = inspect.getsource(mlx_lm.cli.main)
    (names,) = re.findall(r"subcommands = \((.*?)\)", source, re.DOTALL)
    assert {command.split()[0] for command in TABLE} == set(re.findall(r'"(\w+)"', names))


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
