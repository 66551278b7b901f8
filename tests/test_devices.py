"""Where models run: the GPU there is, unless a user says no."""

import pytest
import torch

from compactmind.devices import USE_CPU, default_device


@pytest.mark.parametrize(
    ("gpu", "said", "device"),
    [
        (True, None, "cuda"),
        (True, "false", "cuda"),
        (True, "", "cuda"),
        (True, "true", "cpu"),
        (True, "1", "cpu"),
        (False, None, "cpu"),
        (False, "false", "cpu"),
    ],
)
def test_a_gpu_is_taken_unless_a_user_says_no(monkeypatch, gpu, said, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv(USE_CPU, raising=False)
    if said is not None:
        monkeypatch.setenv(USE_CPU, said)
    assert default_device() == device
