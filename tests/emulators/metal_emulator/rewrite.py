"""From the Metal text that MLX generates to C++ that a compiler on any machine takes.

Only declarations change: an address space is part of a type in Metal, so `const device T*` becomes
the class `emu::ptr<emu::device_space, const T>`, and a `threadgroup` array becomes an object that
checks its accesses. Expressions stay as they are, and so do line numbers. What Metal rejects and
C++ would take (pointers without an address space, double, the C++ library) is an error here.
"""

import re
from dataclasses import dataclass

SPACES = ("device", "constant", "threadgroup", "thread")
NOT_METAL = {"double", "goto", "new", "delete", "throw", "try", "catch", "virtual", "std", "asm"}
NUMBERS = ("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong")
NUMBERS += ("half", "bfloat", "float")
TYPES = {f"{p}{number}{n}" for p in ("", "packed_") for number in NUMBERS for n in (2, 3, 4)}
TYPES |= {f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)}
TYPES |= {f"simdgroup_{number}8x8" for number in ("half", "bfloat", "float")}
TYPES |= {*NUMBERS, "float16_t", "bfloat16_t", "size_t", "auto", "void", "signed", "unsigned"}
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
TENSORS = {
    "metal_tensor": "tensor.h",
    "MetalPerformancePrimitives/MetalPerformancePrimitives.h": "matmul2d.h",
}
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>[^\n]*", re.MULTILINE)
UNROLL = re.compile(r"^[ \t]*#[ \t]*pragma[^\n]*unroll[^\n]*", re.MULTILINE)
TOKEN = re.compile(
    r"""\s+ | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | [A-Za-z_]\w*
    | 0[xX][0-9a-fA-F']+\w* | (?:\d[\d']*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\w*
    | :: | \[\[ | \]\] | && | \|\| | [-+*/%&|^]= | << | -> | .""",
    re.VERBOSE,
)
DOUBLE_LITERAL = re.compile(r"(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")


class RewriteError(Exception):
    """The kernel text is not Metal, or outside the subset that the emulator takes."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of the generated signature: a buffer, or a thread attribute."""

    name: str
    is_buffer: bool


@dataclass(frozen=True)
class Signature:
    """The kernel function that MLX generated: its name, instantiation and parameters."""

    function: str
    instance: str
    parameters: tuple[Parameter, ...]


def parse_signature(text: str) -> Signature:
    """Reads the kernel's signature out of the source that MLX generated."""
    match = re.search(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", text, re.DOTALL)
    if match is None:
        raise RewriteError("no [[kernel]] function in the source")
    function, body = match.groups()
    parameters = tuple(
        Parameter(name, attribute.startswith("buffer"))
        for name, attribute in re.findall(r"(\w+) \[\[(\w+(?:\(\d+\))?)\]\]", body)
    )
    instance = re.search(rf"decltype\(({function}<.*?>)\)", text)
    return Signature(function, instance.group(1) if instance else function, parameters)


def rewrite(text: str, metal_version: int = 400) -> str:
    """Turns the Metal source that MLX generated into a C++ translation unit.

    Args:
        text: the source as MLX's `verbose=True` prints it, without its utilities.
        metal_version: the language it is compiled as, as `__METAL_VERSION__` has it: 400 is 4.0.

    Returns:
        C++ with the kernel's lines numbered as in `text` and an `emu_entry` function that runs one
        thread.

    Raises:
        RewriteError: naming the line, for text that is not in the emulated subset of Metal.
    """
    signature = parse_signature(text)
    kernel_line = text[: text.index("[[kernel]]")].count("\n") + 1
    explicit = text.find("\ntemplate [[host_name")
    body = text if explicit < 0 else text[:explicit]
    arguments = ", ".join(
        f"emu::argument{{buffers[{i}]}}" if p.is_buffer else f"attributes->{p.name}"
        for i, p in enumerate(signature.parameters)
    )
    return (
        f"#define __METAL_VERSION__ {metal_version}\n"
        '#include "metal.h"\n#line 1 "kernel.metal"\n'
        + "".join(Rewriter(clean(body), kernel_line).run())
        + '\nextern "C" __attribute__((visibility("default"))) void emu_entry('
        + "emu::Buffer* const* buffers, const emu::Attributes* attributes) {\n"
        + f"  (void)attributes;\n  {signature.instance}({arguments});\n}}\n"
    )


def clean(text: str) -> str:
    """Blanks comments, includes of the Metal library and unroll pragmas, keeping the lines."""
    text = COMMENT.sub(lambda m: " " + "\n" * m.group().count("\n"), text)
    for name, header in TENSORS.items():
        text = text.replace(f"#include <{name}>", f'#include "{header}"')
    return UNROLL.sub("", INCLUDE.sub("", text))


class Rewriter:
    """One pass over the tokens, copying them to `out` but for declarations."""

    def __init__(self, text: str, kernel_line: int):
        self.tokens = TOKEN.findall(text)
        self.kernel_line = kernel_line
        self.line = 1
        self.at = 0
        self.out: list[str] = []
        self.blanks = ""
        self.variables = 0
        self.types = TYPES | set(re.findall(r"\b(?:typename|struct)\s+(\w+)", text))

    def run(self) -> list[str]:
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token == "[[":
                self._skip_attribute()
            elif token in SPACES:
                self._declaration(token)
            else:
                self._copy(token)
        return self.out

    def _fail(self, message: str) -> RewriteError:
        return RewriteError(f"line {self.line}: {message}")

    def _advance(self) -> str:
        """Takes a token and the blanks after it, whose newlines `blanks` keeps for later."""
        token = self.tokens[self.at]
        self.at += 1
        while self._peek().isspace():
            self.blanks += "\n" * self._peek().count("\n")
            self.line += self._peek().count("\n")
            self.at += 1
        return token

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _last(self, back: int = 1) -> str:
        """The last tokens of the output that are not blank."""
        for token in reversed(self.out):
            if not token.isspace():
                back -= 1
                if back == 0:
                    return token
        return ""

    def _skip_attribute(self) -> None:
        while self.tokens[self.at] != "]]":
            self.at += 1
        self.at += 1

    def _copy(self, token: str) -> None:
        """Copies a token of an expression or of a declaration without an address space."""
        if token in NOT_METAL:
            raise self._fail(f"`{token}` is not Metal")
        template = token == "&" and self._last() == ">"
        if template or (token in "*&" and self._last() in self.types):
            raise self._fail(f"`{self._last()}{token}` needs an address space")
        if token == "[" and self._last() in ("=", "(", ",", "return", "{", ";"):
            raise self._fail("Metal has no lambda expressions")
        if token == "reinterpret_cast":
            token = self._cast()
        elif DOUBLE_LITERAL.fullmatch(token):
            token += "f"
        self.line += token.count("\n")
        self.at += 1
        self.out.append(token)

    def _cast(self) -> str:
        """reinterpret_cast to a pointer with an address space is a conversion of a class here."""
        text = "".join(self.tokens[self.at + 1 : self.at + 40])
        space = re.match(r"\s*<\s*(?:const\s+)?(\w+)[^>]", text)
        is_class = space is not None and space.group(1) in ("device", "constant", "threadgroup")
        return "static_cast" if is_class else "reinterpret_cast"

    def _declaration(self, space: str) -> None:
        """Rewrites `[const] space [const] type` and the `*`, `&` or variable that follows."""
        const = self._take_const()
        self.blanks = ""
        self._advance()
        if space == "thread":
            self.out.append(f"{'const ' if const else ''}{self.blanks}")
            if self._is_type():
                self._thread_type()
            return
        kind, const = self._type(const)
        token = self._peek()
        if token in (",", ">"):
            text = f"emu::in<emu::{space}_space, {'const ' if const else ''}{kind}>"
        elif token == "*":
            self._advance()
            while self._peek() in ("restrict", "__restrict", "__restrict__"):
                self._advance()
            text = f"emu::ptr<emu::{space}_space, {'const ' if const else ''}{kind}> "
            if kind == "auto":
                text = f"emu::pointer_in<emu::{space}_space> auto "
        elif token == "&":
            self._advance()
            text = f"const {kind} " if const else f"emu::lref<emu::{space}_space, {kind}> "
        elif space == "constant":
            text = f"const {kind} "
        elif space == "threadgroup":
            text = self._threadgroup_variable(kind)
        else:
            raise self._fail("a `device` declaration is neither a pointer nor a reference")
        self.out.append(text + self.blanks)

    def _take_const(self) -> bool:
        """Removes a `const` that was copied just before the address space."""
        while self.out and self.out[-1].isspace() and "\n" not in self.out[-1]:
            self.out.pop()
        if self.out and self.out[-1] == "const":
            self.out.pop()
            return True
        self.out.append(" ")
        return False

    def _is_type(self) -> bool:
        return bool(re.match(r"[A-Za-z_]", self._peek()))

    def _thread_type(self) -> None:
        """Copies `type *`, `type &` or `type (&`: a thread's own memory needs no checking."""
        kind, const = self._type(False)
        text = ("const " if const else "") + kind + " "
        if self._peek() in ("*", "&"):
            text += self._advance()
        self.out.append(text + self.blanks)
        self.blanks = ""

    def _type(self, const: bool) -> tuple[str, bool]:
        """Parses `[const] [typename] name<...>::name [const]`, or two-word integers."""
        kind = ""
        while True:
            token = self._peek()
            if token in ("const", "volatile"):
                const |= token == "const"
                self._advance()
            elif token == "constexpr":
                self.out.append(self._advance() + " ")
            elif token == "<":
                kind += self._balanced("<", ">")
                if self._peek() != "::":
                    break
            elif token == "::":
                kind += self._advance()
            elif token == "typename":
                self._advance()
                kind += "typename "
            elif token in ("unsigned", "signed") or not kind or kind.endswith(("::", " ")):
                if not self._is_type():
                    raise self._fail(f"expected a type before `{token}`")
                kind += self._advance()
                if token in ("unsigned", "signed"):
                    if self._peek() in ("char", "short", "int", "long"):
                        kind += " " + self._advance()
                    break
                if self._peek() not in ("<", "::"):
                    break
            else:
                break
        while self._peek() == "const":
            const = True
            self._advance()
        return kind, const

    def _balanced(self, opening: str, closing: str) -> str:
        """Takes the tokens from an opening bracket to the one that closes it."""
        text, depth = "", 0
        while True:
            if self.at >= len(self.tokens):
                raise self._fail(f"`{opening}` is never closed")
            token = self._advance()
            text += token + " "
            depth += (token == opening) - (token == closing)
            if depth == 0:
                return text.rstrip()

    def _threadgroup_variable(self, kind: str) -> str:
        if self.line < self.kernel_line:
            raise self._fail("threadgroup variables are declared in the kernel, not in a function")
        name = self._advance()
        dimensions = ""
        while self._peek() == "[":
            dimensions += self._balanced("[", "]")
        if self._peek() != ";":
            raise self._fail(f"threadgroup `{name}`: one declaration a line, with no initialiser")
        alias = f"{name}_threadgroup_type"
        variable = f'emu::threadgroup_variable<{alias}>({self.variables}, "{name}", {self.line})'
        self.variables += 1
        return f"using {alias} = {kind}{dimensions}; auto {name} = {variable}"
