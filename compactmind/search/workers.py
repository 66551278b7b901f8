"""Several workers of one search on this machine: processes of the same command, each with a GPU or its share of the cores.

The process that was started by hand runs no trial while they do. It gives every worker its device, passes on what they print, says when
one dies, and ends them all when it is told to end, by Ctrl-C or otherwise. A worker knows itself by WORKER in its environment; it ends when
its standard input does, which is when the first process has gone, however that was.
"""

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

import psutil
import torch

from compactmind.devices import WORKER
from compactmind.errors import CompactMindError

GPUS = "CUDA_VISIBLE_DEVICES"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SECONDS_TO_END = 60
"""So long a worker that was told to end may take, to say in the study that its trial is to be run again."""
SECONDS_TO_HEAR = 5
"""After so long one that has not begun to is told again."""


def number_of_cores() -> int:
    """Return the cores that this process may use."""
    with suppress(AttributeError, psutil.Error):
        return len(psutil.Process().cpu_affinity())
    return os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------------------ shares
@dataclass(frozen=True)
class Share:
    """What one worker gets of the machine."""

    threads: int
    gpu: str = ""
    """As CUDA_VISIBLE_DEVICES names it; empty: none."""

    def __str__(self) -> str:
        return f"GPU {self.gpu}, {self.threads} thread(s)" if self.gpu else f"{self.threads} thread(s)"

    def environment(self) -> dict[str, str]:
        """Return what is set for the worker."""
        return {name: str(self.threads) for name in THREADS} | ({GPUS: self.gpu} if self.gpu else {})


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in environment.get(GPUS, "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def shares(workers: int, device: str, objectives: Sequence[str] = ()) -> list[Share]:
    """Return the share of each worker: a GPU, in turn, and as many threads as make all cores busy.

    Raises CompactMindError if there are more workers than cores, or if they would disturb each other's latencies.
    """
    cores, gpus = number_of_cores(), visible_gpus() if device == "cuda" else []
    if workers > cores:
        raise CompactMindError(f"--workers {workers} are more than the {cores} cores of this machine: at most --workers {cores}")
    if "latency" in objectives and workers > max(1, len(gpus)):
        device_words = f"the {len(gpus)} GPU(s)" if gpus else "the same cores"
        raise CompactMindError(
            f"--workers {workers} on {device_words} disturb each other, and a latency measured meanwhile says nothing: leave latency "
            f"out of --objectives, or use --workers {max(1, len(gpus))}"
        )
    return [Share(cores // workers, gpus[number % len(gpus)] if gpus else "") for number in range(workers)]


def together_on_one_device(planned: Sequence[Share]) -> int:
    """Return how many workers share the memory of one device at most."""
    devices = [share.gpu for share in planned]
    return max(map(devices.count, devices), default=1)


# ------------------------------------------------------------------------------------------------------------------ a worker
class Ended(KeyboardInterrupt):
    """What interrupts a worker that is told to end; unlike an exception of Python's own it can be asked whether it is still there."""


def begin_as_worker() -> None:
    """Do what a worker does first: use its threads, and end as at Ctrl-C as soon as the process that started it says so or is gone.

    An interrupt that comes while Python runs a destructor or a callback of its garbage collection is printed and forgotten. So whoever is
    told to end is told again, until the exception is on its way.
    """
    torch.set_num_threads(int(os.environ[THREADS[0]]))
    raised: list[weakref.ref] = []

    def ended() -> Ended:
        new = Ended()
        raised.append(weakref.ref(new))
        return new

    def interrupt(*_) -> None:
        raise ended()  # in no variable of this frame: it would hold itself by its traceback

    signal.signal(signal.SIGINT, interrupt)  # a shell makes its background jobs ignore it, and children inherit that

    def wait_for_the_end() -> None:
        with suppress(OSError):
            while os.read(0, 1024):
                pass
        while not (raised and raised[-1]()):
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # wakes it if it sleeps
            else:
                _thread.interrupt_main()
            time.sleep(SECONDS_TO_HEAR)

    threading.Thread(target=wait_for_the_end, daemon=True).start()


# -------------------------------------------------------------------------------------------------------------- all of them
def run_workers(planned: Sequence[Share], command: Sequence[str] = ()) -> list[int]:
    """Start a worker per share, wait until all have ended, and return how each did: 0 or what the shell would see.

    `command` is this very one unless it is given. An interrupt, or a signal to end, ends all of them first and is passed on then.
    """
    command, running, ending, threads = list(command) or [sys.executable, *sys.argv], [], threading.Event(), []
    with signals_as_interrupts():
        try:
            for number, share in enumerate(planned, start=1):
                name = f"{number}/{len(planned)}"
                print(f"worker {name}: {share}", flush=True)
                environment = os.environ | share.environment() | {WORKER: name, "PYTHONUNBUFFERED": "1"}
                running.append(_start(command, environment))
                threads.append(_pass_on(number, running[-1].stdout, ending))
            codes = _watch(running)
        except BaseException:
            ending.set()
            _end(running)
            raise
    for thread in threads:
        thread.join(timeout=5)  # what a worker has started may hold its output open
    return codes


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,  # Ctrl-C goes to the first process, which tells each worker once
    )  # fmt: skip


def _pass_on(number: int, lines: IO[str], ending: threading.Event) -> threading.Thread:
    """Print the lines of a worker with its number before each, until all are told to end."""

    def read() -> None:
        for line in lines:
            if not ending.is_set():
                print(f"[{number}] {line.rstrip()}\n", end="", flush=True)  # one call: lines of several workers do not mix

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _watch(running: Sequence[subprocess.Popen]) -> list[int]:
    """Wait for all; say at once which has died and that the others go on."""
    said = set()
    while len(said) < len(running):
        for number, process in enumerate(running, start=1):
            if number in said or process.poll() is None:
                continue
            said.add(number)
            left = len(running) - len(said)
            if process.returncode:
                then = f"the {left} other(s) go on; a trial that it was in is run once more" if left else "none is left"
                print(f"worker {number} {how_it_ended(process.returncode)}: {then}", flush=True)
        time.sleep(0.1)
    return [process.returncode for process in running]


def how_it_ended(code: int) -> str:
    """Return in words how a process has ended that failed."""
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name if -code in {each.value for each in signal.Signals} else str(-code)
    return f"was killed by {name}" + (" (often because memory is short)" if name == "SIGKILL" else "")


def _end(running: Sequence[subprocess.Popen]) -> None:
    """End workers as Ctrl-C would; what takes too long, or a second Ctrl-C, ends them at once."""
    print(f"\nending {len(running)} workers ...", flush=True)
    for process in running:
        with suppress(OSError):
            process.stdin.close()  # what a worker waits for: see begin_as_worker
    try:
        until = time.monotonic() + SECONDS_TO_END
        for process in running:
            process.wait(timeout=max(0.0, until - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Inside the `with` block SIGTERM and SIGHUP are what Ctrl-C is; one that is ignored, as nohup has it, stays so."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {}
    with suppress(ValueError):  # not in the main thread: whoever called sees to it
        heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
