"""Choosing a device."""

import mlx.core as mx
import pytest

from mlx_sparse_nn import use_cpu, use_device, use_gpu


@pytest.fixture(autouse=True)
def _restore_device():
    device = mx.default_device()
    yield
    mx.set_default_device(device)


def has_gpu() -> bool:
    return mx.metal.is_available() or mx.cuda.is_available()


@pytest.mark.parametrize("choose", [use_cpu, lambda: use_device("cpu"), lambda: use_device(mx.cpu)])
def test_cpu(choose):
    choose()
    assert mx.default_device() == mx.Device(mx.cpu)


def test_a_device_object_is_taken():
    use_device(mx.Device(mx.cpu, 0))
    assert mx.default_device() == mx.Device(mx.cpu, 0)


def test_gpu_is_chosen_or_the_extra_to_install_is_named():
    before = mx.default_device()
    if has_gpu():
        use_gpu()
        assert mx.default_device() == mx.Device(mx.gpu)
    else:
        for choose in (use_gpu, lambda: use_device("gpu"), lambda: use_device(mx.gpu)):
            with pytest.raises(RuntimeError, match=r"no GPU is available.*\[cuda13\]"):
                choose()
        assert mx.default_device() == before


@pytest.mark.parametrize(
    ("device", "error"),
    [("tpu", ValueError), ("GPU", ValueError), (0, TypeError), (None, TypeError)],
)
def test_other_names_are_refused(device, error):
    with pytest.raises(error, match=r"\[use_device\] device must be 'cpu'"):
        use_device(device)
