"""A folder in which mlx-lm's commands are typed: models, a tokenizer and data, all made there."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate
from mlx_lm.utils import load
from support import ROOT
from tiny_models import PAGE, code_of, save_dense

PROMPT = "w5 w17 w3"
WORDS = 8  # to generate
TOKENS = mx.array([[5, 17, 3, 90, 41, 7, 7, 60]])

# What mlx-lm takes of packages that are not installed for tests, and that read from the network.
STUBS = {
    "datasets.py": """
import json

def load_dataset(path, split):
    with open(f"{path}/{split.split('[')[0]}.jsonl") as lines:
        return [json.loads(line) for line in lines]
""",
    "lm_eval/__init__.py": """
from types import SimpleNamespace

def simple_evaluate(model, tasks, **_):
    request = SimpleNamespace(args=("w5 w17", " w3 w4"))
    return {"results": {task: model.loglikelihood([request])[0] for task in tasks}}
""",
    "lm_eval/api/model.py": "class LM: pass",
    "lm_eval/api/registry.py": "register_model = lambda name: lambda cls: cls",
    "lm_eval-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: lm_eval\nVersion: 1\n",
}


class Folder:
    """A folder with ``dense`` and ``data`` of one architecture, in which commands are typed."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        save_dense(name, folder / "dense")
        chats = [[f"w{i} w{i + 1} w3", "w5 w6 w7 w8"] for i in range(8)]
        for split in ("train", "valid", "test"):
            lines = [
                {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
                for a, b in chats
            ]
            self.write(f"data/{split}.jsonl", "\n".join(map(json.dumps, lines)))

    def write(self, file: str, text: str) -> None:
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def environment(self) -> dict[str, str]:
        """Return the environment of a command: without a network, and with a home of its own."""
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return {
            **os.environ,
            "HOME": str(self.folder / "home"),
            "XDG_CACHE_HOME": cache,  # where the CPU's kernels are kept
            "HF_HOME": str(self.folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.folder / "stubs")]),
        }

    def popen(
        self, command: str, *options: object, module: str = "mlx_lm", **kwargs: Any
    ) -> subprocess.Popen[str]:
        """Start a module with a command and further options, each a word or more."""
        words = shlex.split(" ".join([command, *map(str, options)]))
        return subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=self.folder,
            env={**self.environment(), **kwargs.pop("env", {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **kwargs,
        )

    def run(
        self,
        command: str,
        *options: object,
        model: str = "sparse",
        typed: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a model, and return what it printed, without colours."""
        process = self.popen(command, f"--model {model} --trust-remote-code", *options)
        return finish(process, typed)

    def load(self, path: str, adapters: str | None = None) -> tuple[nn.Module, Any]:
        """Load a directory here, by mlx-lm."""
        path, adapters = str(self.folder / path), adapters and str(self.folder / adapters)
        model, tokenizer, *_ = load(path, adapter_path=adapters, trust_remote_code=True)
        return model, tokenizer

    def words_of(self, path: str, adapters: str | None = None, **options: Any) -> str:
        """Return the words that a directory generates, in this process."""
        return speak(*self.load(path, adapters), **options)


class Lab(Folder):
    """That with ``sparse``, and with what some of mlx-lm's commands need besides.

    Attributes:
        emptied: The model in memory, after ``sparse`` was saved.
        logits, words: What it computed and generated before.
    """

    def __init__(self, name: str, folder: Path):
        super().__init__(name, folder)
        calibration = " ".join(f"w{i * i % 91}" for i in range(1024))
        self.write("home/.cache/mlx-lm/calibration_v5.txt", calibration)
        for file, text in STUBS.items():
            self.write(f"stubs/{file}", text)
        self.make_sparse()

    def make_sparse(self) -> None:
        """Type what the page says."""
        names: dict[str, Any] = {}
        first = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
        exec(self.placed(first), names)
        self.logits = names["model"](TOKENS)
        mx.eval(self.logits)
        self.words = speak(names["model"], names["tokenizer"])
        exec(self.placed(code_of("Save and load")), names)
        self.emptied: nn.Module = names["model"]

    def placed(self, code: str) -> str:
        """Return code of the page that reads and writes in this folder."""
        for text, name in {"path/to/model": "dense", "path/to/sparse": "sparse"}.items():
            code = code.replace(text, str(self.folder / name))
        return code

    @cached_property
    def trained(self) -> subprocess.CompletedProcess[str]:
        """What ``lora`` said, which made ``adapters`` for the last of two layers."""
        return self.train("lora --train", "--adapter-path adapters")

    def train(self, command: str, *options: object, model: str = "sparse"):
        return self.run(
            command,
            "--data data --num-layers 1 --iters 8 --batch-size 4 --learning-rate 1e-2",
            "--val-batches 1 --steps-per-eval 8",
            *options,
            model=model,
        )

    @cached_property
    def converted(self) -> subprocess.CompletedProcess[str]:
        """What ``convert`` said, which made ``quantized``."""
        return self.run("convert -q --q-group-size 32", "--mlx-path quantized")


def speak(model: nn.Module, tokenizer: Any, **options: Any) -> str:
    """Return the words that a model generates."""
    chat = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return generate(model, tokenizer, prompt, max_tokens=WORDS, **options)


def finish(process: subprocess.Popen[str], typed: str = "") -> subprocess.CompletedProcess[str]:
    """Wait for a command, and return what it printed, without colours."""
    with process:
        try:
            out, err = process.communicate(typed, timeout=120)
        finally:
            process.kill()
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", out)
    return subprocess.CompletedProcess(process.args, process.returncode, plain, err)
