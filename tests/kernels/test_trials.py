"""Kernels that have never passed are tried in processes of their own; what fails there is told, and passed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grat_kernels import Backend, KernelFailure, rope_norm, trials
from grat_kernels.backends import check_kernel, tried_backend
from grat_kernels.trials import Form, KernelPassedOver

FORM = Form(torch.device("cpu"), torch.float32, 16)
GPU = Form(torch.device("cuda", 0), torch.bfloat16, 128)


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been tried, and a CPU is a device like others."""
    monkeypatch.setattr(trials, "_passed", set())
    monkeypatch.setattr(trials, "_failures", {})
    monkeypatch.setattr(trials, "_is_safe", lambda *_: False)
    monkeypatch.setattr(trials, "_PROCESS", "broken_kernels")
    monkeypatch.setenv("GRAT_TEST_FAULT", "none")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("hangs", "the triton kernel hangs here: no result after 3 s (cpu"),
        ("faults", "the triton kernel fails here: its process was ended by SIGSEGV (cpu"),
        (
            "raises",
            "the triton kernel fails here: RuntimeError: CUDA error: an illegal memory access (",
        ),
        ("exits", "the triton kernel fails here: its process ended with exit code 77 (cpu"),
        ("is_wrong", "the triton kernel computes wrong results here: an error of "),
    ],
)
def test_whatever_a_kernel_does_is_told_in_two_lines(fault: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAT_TEST_FAULT", fault)
    if fault == "hangs":
        monkeypatch.setattr(trials, "_START_S", 2.0)
        monkeypatch.setattr(trials, "_FORM_S", 1.0)
    with pytest.raises(KernelFailure) as caught:
        check_kernel("triton", [FORM])
    found, advice = str(caught.value).splitlines()
    assert found.startswith(said)
    assert f"torch {torch.__version__.partition('+')[0]}" in found
    assert "--backend sdpa" in advice
    # It is not tried again.
    monkeypatch.setattr(trials, "_try_apart", lambda *_: pytest.fail("tried again"))
    with pytest.raises(KernelFailure) as again:
        check_kernel("triton", [FORM])
    assert str(again.value) == str(caught.value)


def test_a_kernel_that_passes_there_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = [FORM, FORM._replace(far=True)]
    check_kernel("triton", forms)
    monkeypatch.setattr(trials, "_try_apart", lambda *_: pytest.fail("tried again"))
    check_kernel("triton", forms)


def test_norms_and_rotations_are_tried_alike() -> None:
    trials.require(rope_norm.NAME, [FORM], lambda _: pytest.fail("tried here"))


def test_too_little_memory_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(form: Form) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trials, "_is_safe", lambda *_: True)
    with pytest.raises(torch.OutOfMemoryError):
        trials.require("triton", [FORM], out_of_memory)
    monkeypatch.setattr(trials, "_is_safe", lambda *_: False)
    monkeypatch.setenv("GRAT_TEST_FAULT", "finds_no_memory")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 8 GiB"):
        check_kernel("triton", [FORM])
    assert not trials._failures


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as this process can see; those that are begun see none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.usefixtures("hopper")
def test_auto_passes_over_what_fails_and_says_so() -> None:
    with pytest.warns(KernelPassedOver) as warned:
        backend, reason = tried_backend([GPU])
    assert backend is Backend.SDPA
    said = [str(one.message) for one in warned]
    assert len(said) == 2
    for name, text in zip(("triton", "gluon"), said, strict=True):
        assert text.startswith(f"the {name} kernel fails here: ")
        assert "a GPU" in text
        assert text in reason


@pytest.mark.usefixtures("hopper")
def test_where_norms_and_rotations_fail_torch_does_them_and_that_is_said() -> None:
    with pytest.warns(KernelPassedOver, match="the rope_norm kernel fails here: "):
        fused, reason = rope_norm.choose(*GPU[:3])
    assert not fused
    assert reason.startswith("the rope_norm kernel fails here: ")


@pytest.mark.usefixtures("hopper")
def test_auto_goes_on_with_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def try_apart(kernel: str, forms: Any) -> None:
        tried.append(kernel)
        if kernel == "triton":
            raise trials.failed("the triton kernel hangs here", GPU.device)

    monkeypatch.setattr(trials, "_try_apart", try_apart)
    with pytest.warns(KernelPassedOver, match="the triton kernel hangs here"):
        assert tried_backend([GPU])[0] is Backend.GLUON
    assert tried_backend([GPU._replace(far=True)])[0] is Backend.GLUON
    assert tried == ["triton", "gluon", "gluon"]
    # One that is chosen by name stops.
    with pytest.raises(KernelFailure, match="hangs"):
        check_kernel("triton", [GPU])
