"""Compiling the CPU's kernels: the cache, the test in a child, and what happens where it fails.

Each case runs Python anew, with a cache and a compiler of its own: what a user would see.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from support import ROOT

from mlx_sparse_nn.__main__ import main
from mlx_sparse_nn.core import cores
from mlx_sparse_nn.core.backends import binding, build, cpu

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="C++ kernels are for Linux")

# A product, and who computed it: printed as one line.
PRODUCT = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_sparse_nn import CSRPattern, spmm
from mlx_sparse_nn.core.backends import choose
pattern = CSRPattern([0, 2, 3], [1, 0, 1], (4, 4), 2)
data = mx.arange(12.0).reshape(3, 2, 2)
for _ in range(2):
    y = spmm(data, pattern, mx.ones((1, 4)))
print(choose.choose("spmm", pattern.layout, 1, mx.float32).NAME, y.tolist())
"""
RIGHT = "[[10.0, 18.0, 17.0, 21.0]]\n"


@pytest.fixture
def run(tmp_path):
    """Run Python with an empty cache; return the exit status, what it printed, and its errors."""

    def run(*arguments, cache=tmp_path / "cache", **environment):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        environment["XDG_CACHE_HOME"] = str(cache)
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def compiler(tmp_path):
    """Make a compiler of a shell script, in which ``$real`` is the one that is installed."""

    def make(script):
        path = tmp_path / "c++-of-a-test"
        real = " ".join(build.compiler())
        path.write_text(f'#!/bin/sh\nreal="{real}"\n{script}\n', encoding="utf-8")
        path.chmod(0o755)
        return str(path)

    return make


def libraries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.so"))


def test_this_machine_has_a_compiler():
    """Else the other tests would pass in plain MLX."""
    assert cpu.why_not() is None


def test_a_library_is_built_once(run, tmp_path):
    status, out, errors = run("-c", PRODUCT)
    assert (status, out) == (0, f"cpu {RIGHT}")
    lines = errors.splitlines()
    assert all(line.startswith("[mlx_sparse_nn] compiling ") for line in lines)
    assert libraries(tmp_path / "cache") == ["blocks-float-2.so", "index.so", "primitive.so"]
    assert (tmp_path / "cache/mlx_sparse_nn").stat().st_mode & 0o777 == 0o700
    assert run("-c", PRODUCT) == (0, f"cpu {RIGHT}", "")
    assert not list((tmp_path / "cache").rglob("build-*"))


def test_processes_build_at_once(run, tmp_path):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(run("-c", PRODUCT)[:2])) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(0, f"cpu {RIGHT}")] * 2
    assert libraries(tmp_path / "cache") == ["blocks-float-2.so", "index.so", "primitive.so"]


def falls_back(result, *reasons):
    """Assert that plain MLX computed, with one warning that says why."""
    status, out, errors = result
    assert (status, out) == (0, f"plain {RIGHT}")
    assert errors.count("RuntimeWarning") == 1
    assert "<string>:9: RuntimeWarning" in errors  # a line of the caller, not one of ours
    assert "products on the CPU run in plain MLX" in errors
    for reason in reasons:
        assert reason in errors


def test_without_a_compiler(run, tmp_path):
    falls_back(run("-c", PRODUCT, CXX="no-such-compiler"), "CXX=no-such-compiler")
    empty = tmp_path / "empty"
    empty.mkdir()
    falls_back(run("-c", PRODUCT, CXX="", PATH=str(empty)), "g++, clang++, c++", "apt-get install")


def test_tests_without_a_compiler_say_so_at_once():
    command = [sys.executable, "-m", "pytest", "--collect-only", "tests/test_house.py"]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert len(ran.stderr.splitlines()) <= 2
    assert "C++ kernels: no C++ compiler was found (looked for CXX=no-such-compiler)" in ran.stderr


def test_a_compiler_that_fails(run, compiler):
    script = "for i in $(seq 40); do echo line $i >&2; done; exit 1"
    errors = run("-c", PRODUCT, CXX=compiler(script))
    falls_back(errors, "failed:\n", "line 29", "line 40")
    assert "line 28\n" not in errors[2]


# What kills the process that loads a library, at once or when a kernel is called.
TRAP = "__attribute__((constructor)) void trap() { __builtin_trap(); }"
WRONG = """
#include "kernels.h"
using namespace mlx_sparse_nn;
MLX_SPARSE_EXPORT size_t spmm_scratch(const Product*) { return 0; }
MLX_SPARSE_EXPORT size_t sddmm_scratch(const SampledProduct*) { return 0; }
MLX_SPARSE_EXPORT void spmm(const Product*) {}
MLX_SPARSE_EXPORT void sddmm(const SampledProduct*) {}
"""
REPLACED = """
for word; do case "$word" in */%s.cpp) word=%s;; esac; set -- "$@" "$word"; shift; done
exec $real "$@" -O0
"""


@pytest.mark.parametrize(
    ("source", "code", "reason"),
    [
        ("primitive", TRAP, "primitive failed its test: it was ended by SIG"),
        ("blocks", TRAP, "blocks-float-2 failed its test: it was ended by SIG"),
        ("blocks", WRONG, "blocks-float-2 failed its test: AssertionError: a product of shape"),
        ("blocks", "int nothing;", "blocks-float-2 failed its test: AttributeError"),
    ],
    ids=["a primitive that crashes", "kernels that crash", "wrong kernels", "no kernels"],
)
def test_a_library_that_is_wrong_is_never_loaded(run, compiler, tmp_path, source, code, reason):
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text(code, encoding="utf-8")
    cxx = compiler(REPLACED % (source, wrong))
    falls_back(run("-c", PRODUCT, CXX=cxx), reason)
    second = run("-c", PRODUCT, CXX=cxx)
    falls_back(second, reason, "noted in", "delete that file to try again")
    assert "compiling" not in second[2]
    assert reason in run("-m", "mlx_sparse_nn", "info", CXX=cxx)[1]
    # The mark is of that compiler: another one builds.
    if source == "primitive":
        assert run("-c", PRODUCT)[:2] == (0, f"cpu {RIGHT}")


def test_a_test_that_somebody_ends_says_nothing_of_the_library(run, compiler, tmp_path):
    """As Ctrl-C does, which reaches the child too: nothing is marked."""
    ended = tmp_path / "ended.cpp"
    code = "#include <csignal>\n__attribute__((constructor)) void end() { std::raise(SIGINT); }"
    ended.write_text(code, encoding="utf-8")
    cxx = compiler(REPLACED % ("primitive", ended))
    falls_back(run("-c", PRODUCT, CXX=cxx), "primitive failed its test: ")
    assert not list((tmp_path / "cache").rglob("*.bad"))


def test_a_compiler_that_makes_nothing(run, tmp_path):
    falls_back(run("-c", PRODUCT, CXX="true"), "made no primitive.so")
    falls_back(run("-c", PRODUCT, CXX='g++ "-g'), "No closing quotation")
    assert not list((tmp_path / "cache").rglob("*.bad"))


def test_an_image_needs_no_compiler_once_all_is_built(run, tmp_path):
    assert run("-c", PRODUCT)[:2] == (0, f"cpu {RIGHT}")
    assert run("-c", PRODUCT, CXX="no-such-compiler") == (0, f"cpu {RIGHT}", "")


def test_a_cache_by_a_relative_path(run, tmp_path):
    assert run("-c", PRODUCT, cache="here")[:2] == (0, f"cpu {RIGHT}")
    assert "primitive.so" in libraries(tmp_path / "here")


def test_a_cache_that_cannot_be_written(run, tmp_path):
    falls_back(run("-c", PRODUCT, cache="/proc/none"), "the cache folder cannot be made")
    file = tmp_path / "file"
    file.touch()
    falls_back(run("-c", PRODUCT, cache=file), "the cache folder cannot be made")


def test_a_cache_that_others_may_write_to(run, tmp_path):
    folder = tmp_path / "cache/mlx_sparse_nn"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    falls_back(run("-c", PRODUCT), "others may write to", "chmod 700")


def test_what_a_library_depends_on(monkeypatch):
    path = lambda: build._path("blocks", build.KERNEL_FLAGS, build._mlx_identity())
    before = path()
    assert path() == before
    for name, other in {
        "_sources": lambda: ("other",),
        "_compiler_identity": lambda: ["other"],
        "_processor": lambda: "other",
        "_mlx_identity": lambda: "other",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(build, name, other)
            assert path() != before


def test_the_command_that_builds(run, tmp_path):
    status, out, _ = run("-m", "mlx_sparse_nn", "build", "--dtypes", "float64")
    assert status == 0
    assert out.startswith("12 libraries (")
    assert "blocks-double-0.so" in libraries(tmp_path / "cache")
    status, out, errors = run("-m", "mlx_sparse_nn", "build", CXX="no-such-compiler")
    assert (status, out) == (1, "")
    assert "no C++ compiler was found" in errors


def test_the_command_that_tells(run):
    status, out, _ = run("-m", "mlx_sparse_nn", "info", CXX="no-such-compiler")
    assert status == 0
    assert "CPU: plain, MLX's own operations (no C++ compiler was found" in out
    status, out, _ = run("-m", "mlx_sparse_nn", "info")
    assert status == 0
    assert "CPU: cpu, C++ kernels on" in out


def test_a_mac_computes_in_plain_mlx_and_says_why(monkeypatch, capsys):
    monkeypatch.setattr(cpu.platform, "system", lambda: "Darwin")
    assert not cpu.is_available.__wrapped__()
    assert main(["info"]) == 0
    assert "nobody has measured them beside Accelerate" in capsys.readouterr().out


class TestTheLayoutOfArrays:
    """What is not known is refused before any C++ reads an array."""

    def test_another_header(self, monkeypatch):
        monkeypatch.setattr(binding, "_HEADER", 24)
        with pytest.raises(binding.LayoutError, match="offset"):
            binding.check_layout(mx.array([1.0]))

    def test_another_object(self):
        with pytest.raises(binding.LayoutError, match="bytes"):
            binding.check_layout(object())  # type: ignore[arg-type]

    def test_python_without_its_lock(self, monkeypatch):
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
        with pytest.raises(binding.LayoutError, match="global lock"):
            binding.check_layout(mx.array([1.0]))

    def test_another_mlx(self, monkeypatch):
        monkeypatch.setattr(binding, "_MLX_VERSION", "0.1.0")
        with pytest.raises(binding.LayoutError, match=r"this is 0\.1\.0"):
            binding.Binding(build.primitive(), 1)


class TestCores:
    """The affinity mask, within the quotas of control groups of either version."""

    @pytest.fixture
    def groups(self, monkeypatch, tmp_path):
        """Write the files of control groups, of which a process is in one."""
        read = cores._read
        monkeypatch.setattr(cores, "_CGROUP", tmp_path)

        def write(line, files):
            for name, text in files.items():
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            fake = lambda path: line if str(path).startswith("/proc") else read(path)
            monkeypatch.setattr(cores, "_read", fake)
            cores.n_cores.cache_clear()

        yield write
        cores.n_cores.cache_clear()

    def test_quotas(self):
        assert cores._quota_of("150000", "100000") == 1.5
        assert cores._quota_of("max", "100000") is None
        assert cores._quota_of("-1", "100000") is None
        assert cores._quota_of("", "") is None

    def test_the_least_quota_of_nested_groups(self, groups):
        files = {"outer/inner/cpu.max": "max 100000\n", "outer/cpu.max": "50000 100000\n"}
        groups("0::/outer/inner", files)
        assert cores.n_cores() == 1
        groups("0::/outer/inner", {"outer/cpu.max": "100000000 100000\n"})
        assert cores.n_cores() == len(os.sched_getaffinity(0))

    def test_groups_of_the_first_version(self, groups):
        files = {"cpu.cfs_quota_us": "20000\n", "cpu.cfs_period_us": "100000\n"}
        line = "4:cpu,cpuacct:/box\n1:memory:/box"
        groups(line, {f"cpu,cpuacct/box/{name}": text for name, text in files.items()})
        assert cores._quotas() == [0.2, None]
        assert cores.n_cores() == 1

    def test_no_groups(self, groups):
        groups("", {})
        assert cores.n_cores() == len(os.sched_getaffinity(0))
