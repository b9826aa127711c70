"""Settings for all tests, and the emulated Metal backend."""

import os
import platform

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings
from support import own_folder

settings.register_profile(
    "ci",
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("full", settings.get_profile("ci"), max_examples=400)
settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["TMPDIR"] = own_folder(os.environ["PYTEST_XDIST_WORKER"])

if platform.system() == "Linux":
    import metal_emulator

    metal_emulator.install()  # before the package builds and caches its kernels
else:
    # The emulator runs on Linux. On a Mac, the other tests run the kernels themselves.
    collect_ignore_glob = ["emulators/*", "backends/test_metal*.py"]


@pytest.fixture(autouse=True)
def _seed():
    mx.random.seed(0)


@pytest.fixture
def metal():
    """The Metal path on the emulator."""
    mx.disable_compile()
    with metal_emulator.Emulator() as emulator:
        yield emulator
    mx.enable_compile()
