"""Where models run: the GPU there is, unless a user says no."""

import pytest
import torch

from compactmind.devices import (
    RANK,
    SIZE,
    USE_CPU,
    default_device,
    device_problem,
    is_main_process,
    number_of_processes,
    process_number,
)


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


@pytest.mark.parametrize(("capability", "usable"), [((6, 1), False), ((7, 5), True), ((9, 0), True), ((12, 0), True)])
def test_a_gpu_that_is_too_old_for_this_pytorch_is_named_with_the_way_out(monkeypatch, capability, usable):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.delenv(USE_CPU, raising=False)
    text = "Tesla P100 has compute capability 6.1, and this PyTorch has kernels from 7.5: set ACCELERATE_USE_CPU=true to use the CPU"
    assert device_problem() is None if usable else device_problem().startswith(text)
    monkeypatch.setenv(USE_CPU, "true")
    assert device_problem() is None


@pytest.mark.parametrize(
    ("variables", "number", "count"),
    [
        ({}, 0, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 0, 1),
        ({"RANK": "5", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}, 5, 8),  # the first of the second machine
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 1, 2),
    ],
)
def test_one_process_of_all_machines_is_the_main_one(monkeypatch, variables, number, count):
    for name in (*RANK, *SIZE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (process_number(), number_of_processes(), is_main_process()) == (number, count, number == 0)
