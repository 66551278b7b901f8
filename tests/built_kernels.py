"""What tests of the C++ kernels share: the kernels, each kind of instruction in turn, numbers that are the same in every run."""

import pytest
import torch

from compactmind import kernels

needs_kernels = pytest.mark.skipif(kernels.reason_against() is not None, reason=f"no kernels: {kernels.reason_against()}")


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.delenv(kernels.KERNEL_VARIABLE, raising=False)


@pytest.fixture
def ops():
    assert kernels.available()
    return torch.ops.compactmind


@pytest.fixture(params=[False, True], ids=["avx2", "avx512"])
def instructions(request, ops):
    """Kernels by either, where the CPU has both."""
    ops.use_avx512(request.param)
    if request.param and not ops.avx512():
        pytest.skip("this CPU has no AVX-512 with VNNI and VBMI")
    yield kernels.few_rows_instructions()
    ops.use_avx512(True)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
