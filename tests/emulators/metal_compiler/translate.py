"""From the Metal text that MLX generates to plain C++: pointers are pointers, nothing is checked.

The emulator's rewriter parses the text; here threadgroup variables become globals, vectors the
compiler's own, and ``#pragma unroll`` stays.
"""

import functools
import re
from dataclasses import dataclass, replace

from metal_emulator.rewrite import COMMENT, INCLUDE, Rewriter, Signature, parse_signature

# A call of a vector type's name: the compiler's vectors have no constructors.
CONSTRUCTOR = re.compile(
    r"\b((?:packed_)?(?:bool|u?char|u?short|u?int|u?long|half|bfloat|float)[234]"
    r"|(?:metal::)?vec\s*<[^<>()]*>)\s*\("
)


class CompileError(Exception):
    """The compiler rejected a kernel; the message has its diagnostics."""


@dataclass(frozen=True)
class Translation:
    """A kernel's text in C++.

    Attributes:
        text: header and kernel, a template where the Metal text has one.
        signature: the kernel function, and which instance of it the text asks for.
        constants: names of the arguments in the constant address space.
    """

    text: str
    signature: Signature
    constants: frozenset[str]


class _PlainRewriter(Rewriter):
    def _threadgroup_variable(self, kind: str) -> str:
        declared = super()._threadgroup_variable(kind)
        alias = declared[: declared.index("auto ")]
        name = declared.split("auto ")[1].split(" =")[0]
        number = self.variables - 1
        made = f"plain::threadgroup_variable<{name}_threadgroup_type, {number}>()"
        return f"{alias}auto& {name} = {made}"

    def _cast(self) -> str:
        return "reinterpret_cast"


def translate(source: str) -> Translation:
    """Turns the source that MLX generated for one call into C++ for `shim/metal.h`.

    Raises:
        RewriteError: for text that is not in the emulated subset of Metal.
    """
    signature = parse_signature(source)
    # One name, so that instances of a kernel share their text.
    text = source.partition("\ntemplate [[host_name")[0]
    text = _plain(text.replace(signature.function, "kernel_function"))
    instance = signature.instance.replace(signature.function, "kernel_function")
    constants = re.findall(r"constant \w+[*&] (\w+) \[\[buffer", source)
    return Translation(text, replace(signature, instance=instance), frozenset(constants))


@functools.cache
def _plain(text: str) -> str:
    text = COMMENT.sub(lambda m: " " + "\n" * m.group().count("\n"), text)
    kernel_line = text[: text.index("[[kernel]]")].count("\n") + 1
    text = "".join(_PlainRewriter(INCLUDE.sub("", text), kernel_line).run())
    return CONSTRUCTOR.sub(r"make<\1>(", text)
