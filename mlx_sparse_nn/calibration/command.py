"""The command ``python -m mlx_sparse_nn calibrate``, which makes a model of mlx-lm sparse."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_sparse_nn.calibration.block_chain import BlockChain
from mlx_sparse_nn.calibration.calibrate import calibrate
from mlx_sparse_nn.calibration.mlx_lm_model import NAME, check_model_file, save_mlx_lm, whole
from mlx_sparse_nn.calibration.samples import Samples
from mlx_sparse_nn.calibration.sensitivity import LEVELS, sensitivity
from mlx_sparse_nn.calibration.texts import Texts, read_texts
from mlx_sparse_nn.core.checks import check_density, check_size
from mlx_sparse_nn.core.fit import DAMPING
from mlx_sparse_nn.core.moments import check_damping

OWNER = "calibrate"
# As the models of mlx-lm name the layers that choose experts.
ROUTERS = ("*.gate", "*.gate.*", "*router", "*router.*", "*.shared_expert_gate")
FACTOR = 2.0  # of the dense perplexity, above which a model is called bad
POSITIONS = ("max_position_embeddings", "n_positions")  # in a model's configuration
# What a folder of --resume must share with the command, by its name in the folder's plan.
CHANGED_BY = {
    "batches": "--data, --num-samples, --sequence-length, --batch-size or --seed",
    "weights": "--model",
    "densities": "--density, --sensitivity or --exclude",
    "block sizes": "--block-size or --exclude",
    "damping": "--damping",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say which options the command has; as in mlx-lm's commands where it has the same."""
    parser.description = (
        "Make the linear layers of a language model block-sparse: run it on text, keep the blocks "
        "that its outputs would miss most, and fit their values to what the dense layers give."
    )
    add = parser.add_argument
    add("--model", required=True, help="directory of the dense model, or its name on the Hub")
    add("--mlx-path", default="mlx_model", help="directory to write (default: mlx_model)")
    add("--data", required=True, help="text like what the model is for; .jsonl as mlx_lm.lora's")
    add("--density", type=float, required=True, help="stored fraction of the linear layers")
    add("--block-size", type=int, default=32, help="32 or 64 can be quantized (default: 32)")
    add("--sensitivity", action="store_true", help="measure which layers need more of the density")
    add(
        "--exclude",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help="layers to leave dense, besides the routers of experts",
    )
    add("--num-samples", type=int, default=128, help="sequences, -1 for all (default: 128)")
    add("--sequence-length", type=int, default=512, help="tokens in each (default: 512)")
    add("--batch-size", type=int, default=4, help="sequences at a time (default: 4)")
    add(
        "--damping",
        type=float,
        default=DAMPING,
        help="how much values hold on to the dense ones, as a fraction of the inputs' mean square: "
        f"more for few samples (default: {DAMPING})",
    )
    add("--resume", metavar="FOLDER", help="where finished layers are kept, to go on from")
    add("--seed", type=int, default=123, help="of the choice of sequences (default: 123)")
    add("--trust-remote-code", action="store_true", help="run the model's or tokenizer's own code")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal has no plus-minus sign
    try:
        _check(options)
        with whole(OWNER, "--mlx-path", options.mlx_path) as folder:
            _run(options, folder)
    except KeyboardInterrupt:
        print(f"\n[{OWNER}] interrupted: {_what_is_left(options.resume)}", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        name = text.partition("was begun with other ")[2].partition(":")[0]
        if name in CHANGED_BY:
            text += f" (what may have changed: {CHANGED_BY[name]})"
        owned = isinstance(error, ValueError) and text.startswith("[")
        print(text if owned else f"[{OWNER}] {text}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "[write]" not in str(error):
            raise
        # MLX's, of a full disk, while it writes to the folder of --resume.
        print(f"[{OWNER}] --resume {options.resume} cannot be written: {error}", file=sys.stderr)
        return 2
    return 0


def _what_is_left(resume: str | None) -> str:
    """Return in words what an interruption leaves."""
    if resume is None:
        return "what was done is lost; --resume FOLDER would keep it"
    if not Path(resume).is_dir():
        return "nothing was finished yet"
    return f"the same command goes on from {resume}"


def _check(options: argparse.Namespace) -> None:
    """Raise for what can be known before the model is loaded."""
    check_density(OWNER, options.density, "--density")
    if options.sensitivity and options.density < LEVELS[0]:
        raise ValueError(
            f"[{OWNER}] --density must be at least {LEVELS[0]} with --sensitivity, which measures "
            f"no less, got {options.density}"
        )
    check_damping(OWNER, options.damping)
    for name, least in (("block_size", 2), ("sequence_length", 2), ("batch_size", 1), ("seed", 0)):
        check_size(OWNER, f"--{name.replace('_', '-')}", getattr(options, name), least)
    if options.num_samples < 1 and options.num_samples != -1:
        raise ValueError(
            f"[{OWNER}] --num-samples must be at least 1, or -1 for all, got {options.num_samples}"
        )
    if not os.path.isfile(options.data):
        raise ValueError(f"[{OWNER}] --data must be a file, got {options.data}")
    _check_folders(options.mlx_path, options.resume)
    if _is_missing_path(options.model):
        raise ValueError(f"[{OWNER}] --model: there is no such directory, {options.model}")
    try:
        import mlx_lm  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"[{OWNER}] mlx-lm must be installed: pip install mlx-lm") from error


def _check_folders(mlx_path: str, resume: str | None) -> None:
    """Raise unless what is written goes to folders that are free, and apart."""
    if resume is not None and (not resume or os.path.isfile(resume)):
        raise ValueError(f"[{OWNER}] --resume must be a folder, but {resume!r} is not")
    out = os.path.realpath(mlx_path)
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise ValueError(
            f"[{OWNER}] --mlx-path must be new or an empty directory, but {mlx_path} is not: "
            "delete it, or give another"
        )
    if os.path.ismount(out) or out == os.getcwd():
        raise ValueError(
            f"[{OWNER}] --mlx-path must not be a volume or where you are, for it is replaced, got "
            f"{mlx_path}: give a directory in it"
        )
    if resume is not None:
        kept = os.path.realpath(resume)
        if os.path.commonpath([out, kept]) in (out, kept):
            raise ValueError(
                f"[{OWNER}] --resume and --mlx-path must be folders apart, got {resume} and "
                f"{mlx_path}"
            )


def _is_missing_path(model: str) -> bool:
    """Return whether a name is of a directory that is not there, and cannot be on the Hub."""
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    return is_path and not os.path.exists(model)


def _check_length(length: int, config: dict[str, Any]) -> None:
    """Raise if sequences are longer than what a model was trained on."""
    of_text = {**config, **(config.get("text_config") or {})}  # of a model that also sees
    limits = [n for name in POSITIONS if isinstance(n := of_text.get(name), int)]
    if length > min(limits, default=math.inf):
        raise ValueError(
            f"[{OWNER}] --sequence-length must be at most {min(limits)}, the positions that the "
            f"model knows, got {length}"
        )


def _check_tokens(texts: Texts, vocabulary: int, name: str) -> None:
    """Raise if there are tokens that a model does not know: MLX would read past its embeddings."""
    largest = max(int(part.max()) for part in (texts.calibration, texts.held_out))
    if largest >= vocabulary:
        raise ValueError(
            f"[{OWNER}] --model must have its own tokenizer, but that of {name} gives "
            f"token {largest}, and the model knows {vocabulary}"
        )


def _run(options: argparse.Namespace, folder: Path) -> None:
    """Make the model sparse and write it into a folder, which becomes that of ``--mlx-path``."""
    model, tokenizer, config = _load(options)
    dense = _left_dense(model, options)
    _check_length(options.sequence_length, config)
    texts = read_texts(
        OWNER,
        Path(options.data),
        tokenizer,
        length=options.sequence_length,
        n_samples=options.num_samples,
        seed=options.seed,
    )
    vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    _check_tokens(texts, vocabulary, options.model)
    n, length = texts.calibration.shape
    print(f"{n} sequences of {length} tokens calibrate, {len(texts.held_out)} others evaluate")
    blocks = _blocks(model, texts.calibration[:1, :2])
    n_bytes = _n_bytes(model)
    before, error = _perplexity(model, texts.held_out, options.batch_size)
    print(f"held-out perplexity before: {before:.3f} ± {error:.3f}", flush=True)

    batches = [
        texts.calibration[i : i + options.batch_size] for i in range(0, n, options.batch_size)
    ]
    density = options.density
    settings: dict[str, Any] = {
        "blocks": blocks,
        "block_size": options.block_size,
        "damping": options.damping,
        "predicate": lambda path, _: path not in dense,
    }
    if options.sensitivity and density < 1:
        single = [texts.calibration[i : i + 1] for i in range(n)]
        density = sensitivity(
            model,
            single,
            density=density,
            resume=_within(options.resume, "sensitivity"),
            **settings,
        )
        print(density)
    finished = _within(options.resume, f"calibration-{options.density:g}")
    report = calibrate(model, batches, density=density, resume=finished, **settings)
    print(replace(report, skipped=report.skipped | dense))

    after, error = _perplexity(model, texts.held_out, options.batch_size)
    print(f"held-out perplexity after: {after:.3f} ± {error:.3f}, before: {before:.3f}")
    print(f"weights: {_n_bytes(model) / 1e6:.1f} MB, before: {n_bytes / 1e6:.1f} MB")
    if why := _why_bad(before, after, vocabulary):
        print(f"warning: {why}", file=sys.stderr)
    try:
        save_mlx_lm(folder, options.model, model, tokenizer, config)
    except Exception as error:  # MLX and tokenizers have no type for a full disk
        raise ValueError(
            f"[{OWNER}] --mlx-path {options.mlx_path} cannot be written: "
            f"{type(error).__name__}, {error}"
        ) from error
    print(_next_steps(str(Path(options.mlx_path)), options.block_size))


def _within(folder: str | None, name: str) -> Path | None:
    """Return a folder in that of ``--resume``, if there is one."""
    return None if folder is None else Path(folder) / name


def _load(options: argparse.Namespace) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return the dense model, its tokenizer and its configuration, loaded by mlx-lm."""
    from mlx_lm.utils import load

    try:
        model, tokenizer, config = load(  # pyright: ignore[reportAssignmentType]
            options.model,
            tokenizer_config={"trust_remote_code": options.trust_remote_code},
            return_config=True,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:  # of files, of MLX, of configurations, of the network
        if _is_sparse(options.model) and not options.trust_remote_code:
            raise ValueError(
                f"[{OWNER}] --model must be dense, but {options.model} is sparse already: "
                "calibrate the dense model, or give --trust-remote-code for the layers left dense"
            ) from error
        sought = "" if os.path.exists(options.model) else " (none here, sought on the Hub)"
        raise ValueError(
            f"[{OWNER}] --model must be a directory that mlx-lm loads, but "
            f"{options.model}{sought}: {type(error).__name__}, {error}"
        ) from error
    check_model_file(OWNER, config)
    if config.get("quantization") or config.get("quantization_config"):
        raise ValueError(
            f"[{OWNER}] --model must not be quantized, but {options.model} is: calibrate what it "
            "was made of, then quantize the sparse model by mlx_lm.convert -q"
        )
    return model, tokenizer, config


def _is_sparse(model: str) -> bool:
    """Return whether a directory has the file that builds a sparse model."""
    return os.path.isfile(os.path.join(model, NAME))


def _left_dense(model: Any, options: argparse.Namespace) -> dict[str, str]:
    """Return why each linear layer that is not made sparse stays dense, by path."""
    inside = {id(module) for block in model.layers for _, module in block.named_modules()}
    linear = {path: m for path, m in model.named_modules() if type(m) is nn.Linear}
    size, dense = options.block_size, {}
    excluded = options.exclude or []
    for glob in (*ROUTERS, *excluded):
        matched = fnmatch.filter(linear, glob)
        if glob in excluded and not matched:
            raise ValueError(
                f"[{OWNER}] --exclude must match a layer, but {glob!r} matches none of "
                f"{', '.join([*linear][:8])}, ..."
            )
        dense |= dict.fromkeys(matched, f"{glob} is excluded")
    for path, layer in linear.items():
        if id(layer) not in inside:
            dense[path] = "it is outside the model's layers"
        elif (least := min(layer.weight.shape)) < size:
            dense.setdefault(path, f"its dims of {least} are less than block_size {size}")
    if len(dense) == len(linear):
        if _is_sparse(options.model):
            raise ValueError(
                f"[{OWNER}] --model must be dense, but {options.model} is sparse already: "
                "calibrate the dense model"
            )
        reasons = "; ".join(f"{path}: {reason}" for path, reason in [*dense.items()][:3])
        raise ValueError(
            f"[{OWNER}] --model must have an nn.Linear in its layers that may be sparse, got "
            f"{reasons or 'none'}"
        )
    return dense


def _blocks(model: Any, tokens: mx.array) -> Sequence[nn.Module] | None:
    """Return the layers of a model if they run one after another, or None and say so."""
    try:
        BlockChain(Samples(OWNER, model, [tokens], None, None), model.layers)
    except (TypeError, ValueError) as error:
        reason = str(error).partition("] ")[2].partition(": ")[0]
        print(f"each layer is fitted to what goes into it in the dense model, since {reason}")
        return None
    return model.layers


def _perplexity(model: nn.Module, sequences: mx.array, batch_size: int) -> tuple[float, float]:
    """Return the perplexity and its standard error, over all tokens but the first ones."""
    from mlx_lm.perplexity import eval_ppl

    try:
        with contextlib.redirect_stdout(sys.stderr):  # it counts the batches
            value, error = eval_ppl(model, sequences, batch_size)
    except OverflowError:
        return math.inf, math.inf
    return float(value), float(error)  # pyright: ignore[reportArgumentType]


def _why_bad(before: float, after: float, vocabulary: int) -> str | None:
    """Return in words why a sparse model is bad, and what helps, if it is."""
    guess = f"guessing one of its {vocabulary} tokens"
    if not before < vocabulary:
        return f"the dense model is no better than {guess}: give --data of what it is for"
    if after <= FACTOR * before and after < vocabulary:
        return None
    bad = (
        f"{after / before:.3g} times the dense model's"
        if after < vocabulary
        else f"no better than {guess}"
    )
    return (
        f"perplexity is {bad}. What helps: more --density, --sensitivity, more text "
        "(--num-samples), text closer to what the model is for, and training by mlx_lm.lora"
    )


def _n_bytes(model: nn.Module) -> int:
    arrays: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in arrays)


def _next_steps(path: str, block_size: int) -> str:
    groups = [size for size in (128, 64, 32) if block_size % size == 0]
    quantize = f" -q --q-group-size {groups[0]}" if groups else ""
    trust = f"--model {shlex.quote(path)} --trust-remote-code"
    converted = shlex.quote(f"{path}-converted")
    return f"""
{path} holds the sparse model, and sparse_model.py, which builds it.
mlx-lm runs a model's own file only with --trust-remote-code:

mlx_lm.generate {trust} --prompt "Hello"
mlx_lm.lora {trust} --train --data path/to/data
mlx_lm.fuse {trust} --adapter-path adapters
mlx_lm.convert {trust}{quantize} --mlx-path {converted}"""
