"""Sequences of tokens from a file of text, for calibration and, apart from them, for evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

# What a line that is no record raises, in json or in mlx-lm.
NO_RECORD = (AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Texts:
    """Sequences of one length, from one file.

    Attributes:
        calibration: ``(n, length)`` int32, from the first nine tenths of the tokens.
        held_out: ``(m, length)`` int32, from the last tenth.
    """

    calibration: mx.array
    held_out: mx.array


def read_texts(
    owner: str, path: Path, tokenizer: Any, *, length: int, n_samples: int, seed: int
) -> Texts:
    """Return sequences of a file's tokens, in random order, without overlap.

    Where the tokenizer begins a text with a token of its own, each sequence begins with it.

    Args:
        owner: Who errors speak for.
        path: JSON lines as ``mlx_lm.lora`` takes them if it ends in ``.jsonl``, else plain text;
            a file ``.json`` is refused.
        tokenizer: mlx-lm's.
        length: Tokens in a sequence.
        n_samples: At most so many sequences of either kind; -1 for all.
        seed: Of the order.

    Raises:
        ValueError: The file is no text, or JSON, a line is no record, or there is too little of it.
    """
    try:
        tokens = _tokens(owner, path, tokenizer)
    except UnicodeDecodeError as error:
        raise ValueError(f"[{owner}] --data must be text in UTF-8, but {path}: {error}") from error
    start = tokens[:1] if tokens[:1] == [tokenizer.bos_token_id] else []
    tokens = tokens[len(start) :]
    cut = len(tokens) * 9 // 10
    rng = np.random.default_rng(seed)
    parts = [_packed(part, start, length) for part in (tokens[:cut], tokens[cut:])]
    if not all(len(part) for part in parts):
        raise ValueError(
            f"[{owner}] --data must hold at least {10 * length} tokens, ten sequences, but {path} "
            f"has {len(tokens)}: give more text, or a smaller --sequence-length"
        )
    if n_samples < 0:
        n_samples = len(tokens)
    return Texts(*(mx.array(rng.permutation(part)[:n_samples]) for part in parts))


def _tokens(owner: str, path: Path, tokenizer: Any) -> list[int]:
    """Return the tokens of all of a file, one text after another."""
    kind = path.suffix.lower()
    if kind == ".json":
        raise ValueError(
            f"[{owner}] --data must be plain text, or records in a file .jsonl, one a line, got "
            f"{path}"
        )
    if kind != ".jsonl":
        return tokenizer.encode(path.read_text(encoding="utf-8"))
    from jinja2 import TemplateError
    from mlx_lm.tuner.datasets import create_dataset

    tokens: list[int] = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                records = [json.loads(line)]
                dataset: Any = create_dataset(records, tokenizer, SimpleNamespace())
                tokens += dataset.process(records[0])[0]
            except TemplateError as error:
                raise ValueError(
                    f"[{owner}] --data must hold what the tokenizer's chat template takes, but it "
                    f"refuses line {number} of {path}: {error}"
                ) from error
            except NO_RECORD as error:
                raise ValueError(
                    f'[{owner}] --data must hold records of mlx_lm.lora, {{"text": ...}}, '
                    f'{{"messages": ...}} or {{"prompt": ..., "completion": ...}}, but line '
                    f"{number} of {path} is none: {line.strip():.60} ({error})"
                ) from error
    return tokens


def _packed(tokens: list[int], start: list[int], length: int) -> np.ndarray:
    """Return tokens in rows of ``length``, each beginning with ``start``; the rest is left out."""
    width = length - len(start)
    rows = np.array(tokens[: len(tokens) // width * width], np.int32).reshape(-1, width)
    return np.concatenate([np.tile(np.array(start, np.int32), (len(rows), 1)), rows], axis=1)
