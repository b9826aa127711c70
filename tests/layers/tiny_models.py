"""Small random models of mlx-lm, dense and sparse, and their directories, made on the spot."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma3_text, gpt_neox, llama, mixtral, phi3, qwen2, qwen3
from mlx_lm.utils import save_config, save_model
from support import ROOT, TINY_LLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_sparse_nn import save_mlx_lm, sparsify

SIZES = {**TINY_LLM, "max_position_embeddings": 64}
CONFIGS = {
    "llama": (llama, {**SIZES, "tie_word_embeddings": False, "mlp_bias": True}),
    "qwen2": (qwen2, SIZES),
    "qwen3": (
        qwen3,
        {**SIZES, "head_dim": 32, "tie_word_embeddings": True, "rope_theta": 1e4},
    ),
    "gemma3_text": (
        gemma3_text,
        {**SIZES, "head_dim": 32, "sliding_window": 16, "sliding_window_pattern": 2},
    ),
}
# With one projection for q, k and v; with other names, and biases; with experts and their router.
OTHERS = {
    "phi3": (phi3, SIZES),
    "gpt_neox": (
        gpt_neox,
        {
            **{name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size")},
            "max_position_embeddings": 64,
            "num_attention_heads": 2,
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 10000,
            "rotary_pct": 1.0,
        },
    ),
    "mixtral": (mixtral, {**SIZES, "num_local_experts": 4, "rope_theta": 1e4}),
}
PAGE = ROOT / "docs" / "mlx_lm.md"
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def config_of(name: str) -> dict:
    return {"model_type": name, **(CONFIGS | OTHERS)[name][1]}


def make_dense(name: str, seed: int = 0) -> Any:
    mx.random.seed(seed)
    arch = (CONFIGS | OTHERS)[name][0]
    model = arch.Model(arch.ModelArgs.from_dict(config_of(name)))
    if name == "gemma3_text":
        model.sanitize({})  # it has no output layer where a checkpoint has none
    return model


def make_sparse(name: str, seed: int = 0) -> Any:
    model = make_dense(name, seed)
    made = sparsify(model.model, block_size=32, density=0.5)
    assert len(made.sparse) == 14  # q, k, v, o, gate, up and down of two layers
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 96 words."""
    words = [*(f"w{i}" for i in range(92)), "<system>", "<user>", "<assistant>", "<end>"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", chat_template=CHAT)


def code_of(section: str, n: int = 0) -> str:
    """Return a Python block under a heading of the page."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[n]


def save_dense(name: str, path: Path) -> None:
    """Save a dense model as it would be downloaded."""
    save_model(path, make_dense(name))
    save_config(config_of(name), path / "config.json")
    make_tokenizer().save_pretrained(path)


def save_sparse(model: nn.Module, path: Path, config: dict) -> None:
    """Save a sparse model as it would be downloaded."""
    save_mlx_lm(path, path, model, make_tokenizer(), config, donate_model=False)


def layers_of(model: nn.Module, kind: Any) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, kind)]


def close(a: mx.array, b: mx.array, tolerance: float = 1e-4) -> Any:
    return mx.allclose(a, b, rtol=tolerance, atol=tolerance * float(mx.abs(b).max())).item()
