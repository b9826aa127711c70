"""The API pages: one for each part of the package, with every public name, from its docstring.

Names are those of ``__all__`` (of :mod:`mlx_sparse_nn.patterns`: its functions). Each goes to the
page of the folder or file that defines it, so a new name needs nothing here.
"""

import inspect
import re
from pathlib import Path
from typing import NamedTuple

import mlx_sparse_nn
from mlx_sparse_nn import patterns, physics


class Page(NamedTuple):
    """A page: its title, its first sentence, and the modules whose names it has."""

    title: str
    says: str
    modules: tuple[str, ...]


PAGES = {
    "layers": Page("Layers", "Modules of `mlx.nn` whose weight stores some blocks.", ("layers",)),
    "patterns": Page("Patterns", "Which blocks are stored.", ("patterns", "core.pattern")),
    "surgery": Page(
        "Models made sparse",
        "Dense layers made sparse, pruned, regrown, restored, saved.",
        ("surgery", "core.scores"),
    ),
    "calibration": Page(
        "Calibration",
        "Sparse layers fitted to what goes through a model.",
        ("calibration", "core.moments"),
    ),
    "diagnostics": Page(
        "Diagnostics",
        "Is a model right, what does it cost, and what is fastest?",
        ("diagnostics",),
    ),
    "arrays": Page("Sparse arrays", "SciPy's names, on MLX, with derivatives.", ("core",)),
    "products": Page(
        "Products",
        "What layers and arrays are made of, and the device that computes it.",
        ("core.ops", "core.device"),
    ),
    "physics": Page("Physics", "`mlx_sparse_nn.physics`.", ("physics",)),
}


def examples() -> dict[str, str]:
    """Return the code of ``examples.md`` by the full name that it is of."""
    text = Path(__file__).with_name("examples.md").read_text(encoding="utf-8")
    found = re.findall(r"^## (\S+)\n```python\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    return {f"mlx_sparse_nn.{name}": code for name, code in found}


def imports(code: str) -> str:
    """Return the import of what an example uses of the package."""
    used = sorted(set(re.findall(r"[A-Za-z_]\w*", code)) & set(mlx_sparse_nn.__all__))
    return f"from mlx_sparse_nn import {', '.join(used)}\n" if used else ""


def public_names() -> dict[str, object]:
    """Return every public object by its full name, in order of the alphabet."""
    found = {}
    for module in (mlx_sparse_nn, physics):
        found |= {f"{module.__name__}.{name}": getattr(module, name) for name in module.__all__}
    found |= {
        f"{patterns.__name__}.{name}": value
        for name, value in vars(patterns).items()
        if inspect.isfunction(value) and value.__module__ == patterns.__name__ and name[0] != "_"
    }
    modules = {name for name, value in found.items() if inspect.ismodule(value)}
    return {name: found[name] for name in sorted(found, key=str.lower) if name not in modules}


def page_of(value: object) -> str:
    """Return the page of an object: of the longest name of a module that it comes from."""
    module = f"{getattr(value, '__module__', '')}."  # type variables and constants: none
    fitting = [
        (len(name), key)
        for key, page in PAGES.items()
        for name in page.modules
        if module.startswith(f"mlx_sparse_nn.{name}.")
    ]
    return max(fitting)[1] if fitting else "arrays"


def text(key: str, names: dict[str, object]) -> str:
    """Return a page: a list of its names, then each with its docstring."""
    page, more = PAGES[key], examples()
    lines = [f"# {page.title}", "", page.says, "", "| name | in one line |", "| --- | --- |"]
    for name, value in names.items():
        first = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")
        kind = "class" if inspect.isclass(value) else "func"
        short = name.removeprefix("mlx_sparse_nn.")
        lines.append(f"| {{py:{kind}}}`{short} <{name}>` | {_markdown(first)} |")
    for name, value in names.items():
        directive = "autoclass" if inspect.isclass(value) else "autofunction"
        short = name.removeprefix("mlx_sparse_nn.")
        lines += ["", f"## `{short}`", "", "```{eval-rst}", f".. {directive}:: {name}", "```"]
        if code := more.get(name):
            lines += ["", "```python", imports(code) + code.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _markdown(rst: str) -> str:
    """Return a sentence of a docstring for a cell of a table."""
    formulas = re.sub(r":math:`(.*?)`", r"$\1$", rst)
    return re.sub(r":\w+:(?=`)", "", formulas).replace("``", "`").replace("|", "\\|")


def write(folder: Path) -> None:
    """Write a page of Markdown for each of :data:`PAGES`, where its text is not there already."""
    folder.mkdir(parents=True, exist_ok=True)
    names = public_names()
    for key in PAGES:
        path = folder / f"{key}.md"
        new = text(key, {name: v for name, v in names.items() if page_of(v) == key})
        if not path.exists() or path.read_text(encoding="utf-8") != new:
            path.write_text(new, encoding="utf-8")
