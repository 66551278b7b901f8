"""Where models run: on a GPU if there is one, unless a user says otherwise; and which process of a run this is. One answer for all."""

import os

import torch

from compactmind.errors import CompactMindError

USE_CPU = "ACCELERATE_USE_CPU"
"""Environment variable that keeps everything on the CPU; `accelerate launch --cpu` sets it."""
YES = ("1", "true", "yes", "on", "y", "t")

RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables that say which process of how many this is; torchrun and `accelerate launch` set the first, mpirun the others."""
WORKER = "COMPACTMIND_WORKER"
"""Environment variable of a process that another one has started as a worker of its search: its number, and of how many, as in 2/4."""

PRECISION = "ACCELERATE_MIXED_PRECISION"
"""Environment variable that `accelerate launch --mixed_precision` sets, by default to "no"."""
PRECISIONS = ("no", "bf16", "fp16")


def default_device() -> str:
    """Return "cuda" where PyTorch sees a GPU and ACCELERATE_USE_CPU does not say no, else "cpu"."""
    asked_for_cpu = os.environ.get(USE_CPU, "").lower() in YES
    return "cuda" if torch.cuda.is_available() and not asked_for_cpu else "cpu"


def device_problem() -> str | None:
    """Return why the GPU that `default_device` chooses cannot be used by this PyTorch, None if it can or there is none."""
    if default_device() != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability()
    known = [int(name.removeprefix("sm_").rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    if not known or 10 * major + minor >= min(known):
        return None
    return (
        f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and this PyTorch has kernels from "
        f"{min(known) // 10}.{min(known) % 10}: set {USE_CPU}=true to use the CPU, or install a PyTorch for that GPU"
    )


def cpu_multiplies_bf16() -> bool:
    """Tell whether this CPU has instructions that multiply bfloat16 (AVX512_BF16, AMX): elsewhere it is slower than float32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("amx_tile"))


def mixed_precision() -> str:
    """Return what PRECISION asks of training, else bf16 where the GPU or the CPU multiplies it, fp16 on other GPUs, "no" on other CPUs.

    Raises CompactMindError on an unknown precision, and on fp16 without a GPU, which would be ignored.
    """
    gpu = default_device() == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else cpu_multiplies_bf16()
    precision = os.environ.get(PRECISION, "bf16" if has_bf16 else "fp16" if gpu else "no").lower()
    if precision not in PRECISIONS or (precision == "fp16" and not gpu):
        raise CompactMindError(
            f"mixed precision {precision!r} ({PRECISION}, or accelerate launch --mixed_precision) is not one of "
            f"{', '.join(PRECISIONS if gpu else PRECISIONS[:-1])} on this {'GPU' if gpu else 'CPU'}"
        )
    return precision


def process_number() -> int:
    """Return which process of its run this is, from 0, over all machines."""
    return _from_environment(RANK, 0)


def number_of_processes() -> int:
    """Return how many processes this run was started as, 1 where no launcher was asked for more."""
    return _from_environment(SIZE, 1)


def is_main_process() -> bool:
    """Tell whether this is the one process of its run that writes and prints."""
    return process_number() == 0


def is_worker() -> bool:
    """Tell whether this process is one of the workers that `--workers` starts; one that was started by hand is none of them."""
    return WORKER in os.environ


def _from_environment(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)


def leave_the_others() -> None:
    """End what processes that were started together talk by: its threads may abort a process that ends with them (SIGABRT)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
