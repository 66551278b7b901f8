"""Which process works on a trial and whether it is alive, and which kind of machine measured a latency.

A process of this machine is looked up; one of another machine, or in another container, is known only by its signs of life. Times are
compared between machines of one kind alone: the same CPU or GPU, the same instructions, the same number of threads.
"""

import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from optuna import Study
from optuna.trial import Trial

from compactmind.errors import CompactMindError

HEARTBEAT_SECONDS = 20
DEAD_AFTER_SECONDS = 300
"""Without a sign of life for so long a worker on another machine counts as dead; on this one its process is looked up."""
MACHINE_DEPENDENT = ("latency", "memory")
"""Objectives whose values say something of the machine as well."""
WORKER_KEYS = ("host", "place", "pid", "started")


# ------------------------------------------------------------------------------------------------------------------ process
@cache
def process_namespace() -> str:
    """Return what tells the process numbers of this machine, or of this container, from those of another one of the same name."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def this_worker() -> dict[str, Any]:
    """Return what tells this process from every other one, on any machine and at any time."""
    own = psutil.Process()
    return {"host": socket.gethostname(), "place": process_namespace(), "pid": own.pid, "started": own.create_time()}


def worker_is_alive(worker: dict[str, Any], seen_at: float) -> bool:
    """Tell whether a worker is still there, whose last sign of life was at `seen_at` (seconds since 1970)."""
    if worker["host"] != socket.gethostname() or worker.get("place", process_namespace()) != process_namespace():
        return time.time() - seen_at < DEAD_AFTER_SECONDS
    with suppress(psutil.Error):
        process = psutil.Process(worker["pid"])
        # a zombie has ended, and only waits for its parent to ask how
        return abs(process.create_time() - worker["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def heartbeat(trial: Trial) -> Iterator[None]:
    """Inside the `with` block the trial is marked every HEARTBEAT_SECONDS as one whose worker is alive."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # a storage that is away must not end the trial
                trial.set_user_attr("alive_at", time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# --------------------------------------------------------------------------------------------------------------------- kind
def machine_kind(device: str, threads: bool = True) -> str:
    """Return in words all of a machine that a latency on `device` depends on: the GPU, or CPU, instruction set and number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    also = {"VNNI": "_is_vnni_supported", "AMX": "_is_amx_tile_supported"}
    sets = [torch.backends.cpu.get_cpu_capability(), *(word for word, ask in also.items() if getattr(torch.cpu, ask, bool)())]
    return f"{name}, {' '.join(sets)}" + (f", {torch.get_num_threads()} thread(s)" if threads else "")


def require_kind(study: Study, objectives: Sequence[str], kind: str) -> None:
    """Note on a study what kind of machine its times are of. Raises CompactMindError if they are of another kind than this one.

    Nothing is asked of a study without trials, nor of one whose objectives are the same on every machine.
    """
    own = [name for name in objectives if name in MACHINE_DEPENDENT]
    if not own:
        return
    noted, trials = study.user_attrs.get("machine"), study.get_trials(deepcopy=False)
    known = {noted, *(trial.user_attrs.get("machine") for trial in trials)}
    if trials and (others := sorted(known - {None, kind})):
        raise CompactMindError(
            f"{' and '.join(own)} in the study {study.study_name!r} are of another kind of machine ({others[0]}) than this one ({kind}), "
            "and cannot be compared: go on there, or choose another --study_name here"
        )
    if noted is None or not trials:
        study.set_user_attr("machine", kind)


def recording_machine_kind(evaluate: Callable, objectives: Iterable[str], kind: str) -> Callable:
    """Return an `evaluate` of the engine that notes on every trial what kind of machine measured it, where that matters."""
    if not set(objectives) & set(MACHINE_DEPENDENT):
        return evaluate

    def noted(notes, steps):
        notes.set_user_attr("machine", kind)
        return evaluate(notes, steps)

    return noted
