"""Distillation: a sparse model learns to give what the dense one gives, after each block."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from _subjects import Batch, Subject
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

SAVE_EVERY = 30.0  # seconds
WARM_UP, LAST = 0.05, 0.02  # part of the training, and of the peak of the learning rate at the end


class NotFinite(ArithmeticError):
    """The loss or its gradient is not finite."""


class Tap:
    """Stands for a block while a model runs, and keeps what the block gives."""

    def __init__(self, block: Any, states: list[mx.array]):
        self._block, self._states = block, states

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._block(*args, **kwargs)
        self._states.append(out[0] if isinstance(out, tuple) else out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def states_of(model: Any, batch: Batch) -> tuple[list[mx.array], mx.array]:
    """Return what each block of ``model.layers`` gives, (B, T, dims) each, and the output."""
    states: list[mx.array] = []
    blocks: list[Any] = model.layers
    kept = list(blocks)
    blocks[:] = [Tap(block, states) for block in kept]
    try:
        return states, model(*batch)
    finally:
        blocks[:] = kept


def hidden_loss(
    states: Sequence[mx.array], targets: Sequence[mx.array], keep: mx.array
) -> mx.array:
    """Return the squared error of hidden states relative to their size, a mean over tokens."""
    total = mx.array(0.0)
    for state, target in zip(states, targets, strict=True):
        target = target.astype(state.dtype)  # it may be held in 16 bits
        size = mx.square(target).sum(-1) + 1e-6  # (B, T)
        total = total + (mx.square(state - target).sum(-1) / size * keep).sum()
    return total / (len(targets) * keep.sum())


class Distillation:
    """Trains a sparse model towards the dense one.

    Embeddings stay as they are: Adam's pass over a table of some ten million numbers would take
    longer than all else of a step. What the dense model gives is computed once for each batch that
    comes again, and held in float16: half a GB for MiniLM and Python's manual.

    Args:
        student: The sparse model, changed in place.
        subject: The dense model and its texts.
        args: ``learning_rate``, ``minutes`` and ``steps``; with ``steps`` the clock does not count.
        path: The checkpoint.
    """

    def __init__(self, student: Any, subject: Subject, args: Any, path: Path):
        self.student, self.subject, self.path = student, subject, path
        self.peak, self.n_steps, self.limit = args.learning_rate, args.steps, 60 * args.minutes
        self.step, self.seconds = 0, 0.0
        self._known: dict[int, tuple[list[mx.array], mx.array]] = {}
        for module in student.modules():
            if isinstance(module, nn.Embedding):
                module.freeze()
        self.optimizer = optim.Adam(self.peak, bias_correction=True)
        self.optimizer.init(student.trainable_parameters())

    def run(self) -> None:
        """Train to the end, from the checkpoint if there is one.

        Raises:
            NotFinite: The loss is not finite. The checkpoint is that of the last good save.
            KeyboardInterrupt: Somebody asked for an end; the checkpoint is of the last step.
        """
        if self.path.exists():
            self._load()
        teacher = mx.compile(partial(states_of, self.subject.dense))
        state = [self.student.state, self.optimizer.state]
        loss_and_grad = nn.value_and_grad(self.student, self._loss)

        @partial(mx.compile, inputs=state, outputs=state)
        def train(batch: Batch, states: list, output: mx.array) -> tuple[mx.array, mx.array]:
            loss, grads = loss_and_grad(batch, states, output)
            grads, norm = optim.clip_grad_norm(grads, 1.0)
            self.optimizer.update(self.student, grads)
            return loss, norm

        saved, began = time.perf_counter(), time.perf_counter() - self.seconds
        with self._bar() as bar, asked_to_stop() as stop:
            while self._part() < 1:
                self.optimizer.learning_rate = self._rate(self._part())
                batch = self.subject.batch(self.step)
                loss, norm = train(batch, *self._targets(teacher, batch))
                mx.eval(state, loss, norm)
                if not math.isfinite(float(loss) + float(norm)):
                    raise NotFinite(f"the loss is not finite at step {self.step + 1}")
                self.step, self.seconds = self.step + 1, time.perf_counter() - began
                bar.set_postfix(loss=f"{float(loss):.3f}", steps=self.step, refresh=False)
                bar.update(self._done() - bar.n)
                if stop or time.perf_counter() - saved > SAVE_EVERY or self._part() >= 1:
                    self._save()
                    saved = time.perf_counter()
                if stop:
                    raise KeyboardInterrupt

    def _loss(self, batch: Batch, states: list, output: mx.array) -> mx.array:
        of_student, given = states_of(self.student, batch)
        hidden = hidden_loss(of_student, states, self.subject.keep(batch))
        return hidden + self.subject.output_loss(given, output)

    def _targets(self, teacher: Any, batch: Batch) -> tuple[list[mx.array], mx.array]:
        """Return what the dense model gives for the batch of this step."""
        period = self.subject.period
        if period is None:
            return teacher(batch)
        place = self.step % period
        if place not in self._known:
            states, output = teacher(batch)
            self._known[place] = [state.astype(mx.float16) for state in states], output
            mx.eval(self._known[place])
        return self._known[place]

    def _part(self) -> float:
        """Return how much of the training is done: 1 at its end."""
        return self.step / self.n_steps if self.n_steps else self.seconds / self.limit

    def _rate(self, part: float) -> float:
        """Return the learning rate: a short rise, then half a cosine."""
        part = min(part, 1.0)
        fall = LAST + (1 - LAST) * (1 + math.cos(math.pi * part)) / 2
        return self.peak * fall * min(1.0, (part + 1e-3) / WARM_UP)

    def _done(self) -> int:
        return self.step if self.n_steps else min(int(self.seconds), self._total())

    def _total(self) -> int:
        return self.n_steps or math.ceil(self.limit)

    def _bar(self) -> tqdm:
        return tqdm(
            desc="distilling",
            total=self._total(),
            initial=self._done(),
            unit="step" if self.n_steps else "s",
            mininterval=0.5 if sys.stderr.isatty() else 10,  # seconds; a log file needs few lines
        )

    def _save(self) -> None:
        """Write all that training needs to go on: whole, or not at all."""
        tree = {"model": self.student.parameters(), "optimizer": self.optimizer.state}
        arrays: Any = dict(tree_flatten(tree))
        progress = json.dumps({"step": self.step, "seconds": self.seconds})
        unfinished = self.path.with_suffix(".tmp.safetensors")
        mx.save_safetensors(str(unfinished), arrays, {"progress": progress})
        os.replace(unfinished, self.path)

    def _load(self) -> None:
        loaded: Any = mx.load(str(self.path), return_metadata=True)
        state: Any = tree_unflatten([*loaded[0].items()])
        self.student.load_weights(tree_flatten(state["model"]))
        self.optimizer.state = state["optimizer"]
        progress = json.loads(loaded[1]["progress"])
        self.step, self.seconds = progress["step"], progress["seconds"]


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Collect interrupts in a list, so that a step is not cut in two; a second one is at once."""
    asked: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
