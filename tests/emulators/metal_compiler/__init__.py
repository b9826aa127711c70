"""What compilers make of a Metal kernel's text: arrays left in memory, registers, instructions."""

from .host import Variant as Variant
from .host import arrays_in_memory as arrays_in_memory
from .translate import CompileError as CompileError
