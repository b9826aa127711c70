"""Settings for all tests, the device that they run on, and the emulated Metal backend."""

import os
import platform
import re
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

os.environ["MLX_ENABLE_TF32"] = "0"  # float32 is compared within its own rounding

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings
from support import own_folder

from mlx_sparse_nn.core.backends import build, launch

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

# What these files import is installed by `make test`; a machine lent for its GPU may lack it.
TESTS = Path(__file__).parent
EMULATORS = re.compile(r"^(?:import|from) (?:\w+_emulator|metal_compiler|metal_variants)", re.M)
LEFT_OUT = {
    package: files
    for package, files in {
        "mlx_lm": [
            "calibration/test_command.py",
            "layers/test_mlx_lm.py",
            "layers/test_mlx_lm_commands.py",
            "surgery/test_selection.py",
        ],
        "yaml": ["test_workflows.py"],
        "ziglang": [  # which compiles for the emulators
            str(file.relative_to(TESTS))
            for file in sorted(TESTS.glob("*/**/test_*.py"))
            if EMULATORS.search(file.read_text(encoding="utf-8"))
        ],
    }.items()
    if find_spec(package) is None
}
collect_ignore = [file for files in LEFT_OUT.values() for file in files]

if platform.system() == "Linux" and "ziglang" not in LEFT_OUT:
    import devices
    import metal_emulator

    metal_emulator.install()  # before the package builds and caches its kernels
elif platform.system() != "Linux":
    # The emulators run on Linux. On a Mac, the other tests run the kernels themselves. What is
    # counted, memory too, is that of MLX for Linux.
    collect_ignore_glob = ["emulators/*", "backends/test_metal*.py"]
    emulated = ("cuda", "cuda_dense", "cuda_graphs", "cuda_many", "cuda_quantized", "cuda_small")
    emulated += ("cuda_rows", "cuda_tf32", "cuda_float", "cuda_odd", "counts")
    emulated += ("column_kernels",)
    collect_ignore += [f"backends/test_{name}.py" for name in emulated]

launched = Counter()  # launches of each kernel of a GPU, in this process
EMULATED = pytest.StashKey[bool]()
WITHOUT = "left out, without "  # a package or program that is not there


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["default", "gpu", "metal-emulator"],
        default="default",
        help="what the tests run on: MLX's default device, the GPU, of which they fail if it runs "
        "no kernel, or the emulated GPU of a Mac, on Linux",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "not_emulated(reason): does not run on the emulated device")
    config.addinivalue_line("markers", "needs(*names): packages and programs that a test runs")
    device = config.getoption("--device")
    config.stash[EMULATED] = device == "metal-emulator"
    if platform.system() == "Linux" and device != "gpu":
        try:
            build.compiler()
        except build.BuildError as error:  # hundreds of tests would say so, after minutes
            raise pytest.UsageError(f"the tests compare the C++ kernels: {error}") from None
    if device == "gpu":
        mx.set_default_device(mx.Device(mx.gpu))
    seen = launch.observed(lambda kernel: launched.update([kernel.name]))
    seen.__enter__()
    config.add_cleanup(lambda: seen.__exit__(None, None, None))


def pytest_collection_modifyitems(config, items):
    for item in items:
        mark = item.get_closest_marker("not_emulated")
        if mark and config.stash[EMULATED]:
            item.add_marker(pytest.mark.skip(reason=f"not emulated: {mark.args[0]}"))
        mark = item.get_closest_marker("needs")
        if mark and config.getoption("--device") == "gpu":  # elsewhere it fails
            missing = [name for name in mark.args if not (find_spec(name) or shutil.which(name))]
            if missing:
                reason = f"{WITHOUT}{', '.join(missing)}"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except RuntimeError as error:
        if item.config.stash[EMULATED] and "emulator runs kernels eagerly" in str(error):
            pytest.skip("not emulated: kernels in what MLX compiles, maps or exports")
        raise


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):  # a worker of pytest-xdist has ended, or crashed
    launched.update(getattr(node, "workeroutput", {}).get("launched", {}))


def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launched"] = dict(launched)
    elif session.config.getoption("--device") == "gpu" and not launched and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for package, files in LEFT_OUT.items():
        terminalreporter.write_line(f"{WITHOUT}{package}: {', '.join(files)}")
    skipped = Counter(
        (report.longrepr[2].removeprefix("Skipped: "), report.nodeid.split("[")[0])
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    for (reason, test), count in sorted(skipped.items()):
        if reason.startswith(WITHOUT):
            terminalreporter.write_line(f"{reason}: {count} of {test}")
    device = config.getoption("--device")
    if device != "default":
        each = "".join(f"\n  {name} {n}" for name, n in sorted(launched.items()))
        total = f"{sum(launched.values())} launches of {len(launched)} kernels"
        terminalreporter.write_line(f"on {device}: {total}{each}")


@pytest.fixture(autouse=True)
def _on_device(request):
    if not request.config.stash[EMULATED]:
        yield
        return
    with devices.emulated_metal():
        yield


@pytest.fixture(autouse=True)
def _seed():
    mx.random.seed(0)


@pytest.fixture
def metal(request):
    """The Metal path on the emulator."""
    if request.config.getoption("--device") == "gpu":
        pytest.skip("what runs on the emulator needs no GPU")
    if platform.system() != "Linux":
        pytest.skip("the emulator runs on Linux")
    mx.disable_compile()
    with metal_emulator.Emulator() as emulator:
        yield emulator
    mx.enable_compile()
