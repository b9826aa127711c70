"""What a calibration has finished, in a folder from which it goes on after an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

PLAN = "plan.json"


class FinishedStages:
    """Results of the stages of a long computation, each in a file of its own.

    Args:
        owner: Who errors speak for.
        folder: Where they lie, made if there is none; None keeps nothing.
        plan: What the results depend on, as JSON has it. A folder is of one plan.

    Raises:
        TypeError: ``folder`` is no path.
        ValueError: The folder holds the results of another plan, or something else.
    """

    def __init__(self, owner: str, folder: str | Path | None, plan: Mapping[str, Any]):
        self._owner, self._folder = owner, None
        if folder is None:
            return
        if not isinstance(folder, str | Path):
            raise TypeError(f"[{owner}] resume must be the path of a folder, got {folder!r}")
        self._folder = Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"[{owner}] resume must be a folder, but {folder} is a file")
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / PLAN
        wanted = json.loads(json.dumps(plan))
        if not file.exists():
            if any(self._folder.iterdir()):
                raise ValueError(
                    f"[{owner}] resume must be a new folder or one of an earlier run, but {folder} "
                    "holds something else"
                )
            _write(file, json.dumps(wanted, indent=1).encode())
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise _damaged(owner, file, error) from error
        for name in wanted:
            if found.get(name) != wanted[name]:
                raise ValueError(
                    f"[{owner}] resume must be of the same calibration, but {folder} was begun "
                    f"with other {name}: give another folder, or delete it"
                )

    def load(self, stage: int) -> tuple[dict[str, mx.array], Any] | None:
        """Return the arrays of a stage and what was noted beside, or None if it is not finished."""
        file = self._file(stage)
        if file is None or not file.exists():
            return None
        try:
            arrays, metadata = cast(Any, mx.load(str(file), return_metadata=True))
            return arrays, json.loads(metadata["notes"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise _damaged(self._owner, file, error) from error

    def save(self, stage: int, arrays: dict[str, mx.array], notes: Any) -> None:
        """Keep the arrays of a stage, and notes as JSON has them."""
        file = self._file(stage)
        if file is None:
            return
        unfinished = file.with_suffix(f".{os.getpid()}.safetensors")
        mx.save_safetensors(str(unfinished), arrays, {"notes": json.dumps(notes)})
        os.replace(unfinished, file)

    def _file(self, stage: int) -> Path | None:
        return None if self._folder is None else self._folder / f"stage-{stage:04}.safetensors"


def _damaged(owner: str, file: Path, error: Exception) -> ValueError:
    return ValueError(f"[{owner}] resume cannot read {file}: delete it to go on ({error})")


def fingerprint(tree: Any) -> str:
    """Return a hash of arrays and of what stands beside them, in lists, tuples and dicts."""
    import hashlib  # milliseconds that not every user has to pay

    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(tree):
        digest.update(part)
    return digest.hexdigest()


def _parts(tree: Any) -> Iterator[bytes]:
    for name, value in tree_flatten(tree):
        if isinstance(value, mx.array):
            yield f"{name} {value.dtype} {value.shape}".encode()
            yield np.array(value.reshape(-1).view(mx.uint8)).tobytes() if value.size else b""
        elif isinstance(value, np.ndarray):
            yield f"{name} {value.dtype} {value.shape}".encode()
            yield value.tobytes()
        else:
            plain = isinstance(value, str | bytes | int | float | bool | None)
            yield f"{name} {value if plain else type(value).__name__}".encode()


def _write(file: Path, content: bytes) -> None:
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(content)
    os.replace(unfinished, file)
