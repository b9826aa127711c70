"""A sparse model in a directory of mlx-lm, with the file that builds it there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_sparse_nn.core.checks import check_model

NAME = "sparse_model.py"
# Of any architecture: the directory's config.json says which. It stays true where it is copied.
MODEL_FILE = '''"""Builds the sparse model of this directory for mlx-lm, which loads its values."""

from pathlib import Path

from mlx_lm.utils import _get_classes, load_config
from mlx_sparse_nn import restore_patterns

FOLDER = Path(__file__).parent
DenseModel, ModelArgs = _get_classes(load_config(FOLDER))


def Model(args):
    return restore_patterns(DenseModel(args), FOLDER)
'''


def save_mlx_lm(
    dst_path: str | Path,
    src_path_or_repo: str | Path,
    model: nn.Module,
    tokenizer: Any,
    config: dict[str, Any],
    donate_model: bool = True,
) -> None:
    """Save a sparse model so that mlx-lm loads it: ``mlx_lm.utils.save``, and the file it needs.

    That file, ``sparse_model.py``, makes the layers sparse that are sparse in the checkpoint, in a
    model of any architecture of mlx-lm. ``mlx_lm.fuse`` and ``mlx_lm.convert`` copy it. mlx-lm runs
    it only where it is told to trust it: ``--trust-remote-code``.

    Args:
        dst_path: The directory to write.
        src_path_or_repo: Where the dense model came from; its Python files are copied.
        model: The model, sparse or partly so.
        tokenizer, config: As ``mlx_lm.load(..., return_config=True)`` returns them.
        donate_model: Whether the model is emptied while it is written, which saves memory. Load
            the directory to go on.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The configuration names a model file of its own.
    """
    check_model("save_mlx_lm", model)
    check_model_file("save_mlx_lm", config)
    from mlx_lm.utils import save

    config = {**config, "model_file": NAME}
    save(dst_path, src_path_or_repo, model, tokenizer, config, donate_model)
    (Path(dst_path) / NAME).write_text(MODEL_FILE, encoding="utf-8")


def check_model_file(owner: str, config: dict[str, Any]) -> None:
    """Raise if another file than ours builds the model: ours knows mlx-lm's architectures alone."""
    if config.get("model_file", NAME) != NAME:
        raise ValueError(
            f"[{owner}] the model must be of an architecture of mlx-lm, but its config.json names "
            f"a model_file of its own, {config['model_file']!r}"
        )


@contextmanager
def whole(owner: str, option: str, path: str | Path) -> Iterator[Path]:
    """Give a new folder beside a path, which takes its place in the end; after an error it is gone.

    Args:
        owner: Who errors speak for.
        option: What the user called the path.
        path: Of a folder that is empty, or not there.

    Raises:
        ValueError: The folder cannot be made there.
    """
    folder = Path(os.path.realpath(path))
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
    except OSError as error:
        raise ValueError(
            f"[{owner}] {option} must be where a directory can be made, got {path}: "
            f"{error.strerror}"
        ) from error
    try:
        yield unfinished
        os.replace(unfinished, folder)
    except BaseException:
        import shutil  # milliseconds that not every user has to pay

        shutil.rmtree(unfinished, ignore_errors=True)
        raise
