"""Who reads the weight of a layer that it holds, instead of calling the layer.

A block-sparse layer computes what the dense one does when it is called, but its ``weight`` is an
array of blocks. LoRA adapters of mlx-lm compute with ``self.linear.weight``, and so do some models.
What they do is in the source of their classes, which is searched here.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import mlx.nn as nn

Chain = tuple[str, ...]  # names of attributes, one in the other: ("mlp", "gate") of layer.mlp.gate


@dataclass(frozen=True)
class Reader:
    """A method of a class of modules."""

    kind: type
    method: str

    def __str__(self) -> str:
        return f"{self.kind.__name__}.{self.method}"


def who_reads_weight(path: str, modules: Mapping[str, nn.Module]) -> Reader | None:
    """Return the method that reads the weight of the layer at ``path``, or None.

    Methods of all modules around the layer are searched, up to the model. A reader is seen where it
    goes to the layer by the names of attributes, also through local names and loops. One that gets
    the layer as an argument is not, and neither is a class without source, as of a prompt.

    Args:
        path: Path of the layer in the model.
        modules: Every module of the model by path.
    """
    parts = path.split(".")
    for n in range(len(parts)):
        around = modules.get(".".join(parts[:n]))
        if around is None:  # a list or a dict
            continue
        names = tuple(part for part in parts[n:] if not part.isdecimal())
        for chain, reader in _readers(type(around)).items():
            if names[-len(chain) :] == chain:
                return reader
    return None


@cache
def _readers(kind: type) -> dict[Chain, Reader]:
    """Return what a class reads the weight of, and the first method that does."""
    readers: dict[Chain, Reader] = {}
    for base in kind.__mro__:
        if base in nn.Module.__mro__:
            continue
        for name, function in _functions(base):
            for chain in _weights_read(_parse(function)):
                readers.setdefault(chain, Reader(kind, name))
    return readers


def _functions(kind: type) -> Iterator[tuple[str, Callable]]:
    """Yield the methods and properties of a class, but for what is called before any surgery."""
    for name, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else value
        if inspect.isfunction(function) and name != "__init__":
            yield name, function


def _parse(function: Callable) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # there is no source, or it is one of several lambdas of a line
        return ast.Module([], [])


def _weights_read(tree: ast.AST) -> Iterator[Chain]:
    """Yield what ``.weight`` or ``["weight"]`` is taken of, as far as it has names."""
    local: dict[str, list[Chain]] = {}  # what names stand for

    def chains(node: ast.AST) -> list[Chain]:
        if isinstance(node, ast.Attribute | ast.Subscript):
            return [(*chain, *filter(None, [_key(node)])) for chain in chains(node.value)]
        if isinstance(node, ast.Name):
            return local.get(node.id, [()])
        if isinstance(node, ast.Tuple | ast.List):
            return [chain for element in node.elts for chain in chains(element)]
        if isinstance(node, ast.Call):  # zip, enumerate
            return [chain for argument in node.args for chain in chains(argument)]
        return [()]

    def name(target: ast.AST, value: ast.AST) -> None:
        found = [chain for chain in chains(value) if chain]
        for node in ast.walk(target):
            if found and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                local[node.id] = local.get(node.id, []) + found

    only_dtypes = set()
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                name(target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            name(node.target, node.iter)
        elif isinstance(node, ast.Attribute) and node.attr == "dtype":
            only_dtypes.add(node.value)  # blocks have the dtype of the dense weight
    for node in nodes:
        if node in only_dtypes or not isinstance(node, ast.Attribute | ast.Subscript):
            continue
        if _key(node) == "weight":
            yield from filter(None, chains(node.value))


def _key(node: ast.Attribute | ast.Subscript) -> str | None:
    """Return the name of an attribute, or the word of a subscript; None for other subscripts."""
    if isinstance(node, ast.Attribute):
        return node.attr
    word = node.slice.value if isinstance(node.slice, ast.Constant) else None
    return word if isinstance(word, str) else None
