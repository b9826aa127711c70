"""A CPU emulator of `mx.fast.metal_kernel` that checks and counts; see README.md."""

from .compile import CompileError as CompileError
from .emulator import Emulator as Emulator
from .emulator import EmulatorError as EmulatorError
from .emulator import Launch as Launch
from .emulator import MetalKernel as MetalKernel
from .emulator import install as install
from .emulator import metal_available as metal_available
from .launch import SCHEDULES as SCHEDULES
from .launch import Counts as Counts
from .launch import MetalFault as MetalFault
from .rewrite import RewriteError as RewriteError
from .rewrite import rewrite as rewrite
