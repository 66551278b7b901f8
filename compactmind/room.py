"""What memory and disk there is, and whether what a stage needs fits: said at its start, refused before work begins."""

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from compactmind.errors import CompactMindError
from compactmind.files import free_space

MARGIN = 1.15
"""What is estimated from shapes may be this much too high: only what does not fit even then is refused."""
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says how much memory a container may take."""


def readable(size: int) -> str:
    """Return bytes as a person reads them: GB, below 50 MB in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 50e6 else f"{size / 1e6:.1f} MB"


def free_memory(device: str) -> int:
    """Return the bytes of memory that this process may still take, on a GPU of the GPU's."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    try:  # a container may have less than its machine; what lies in files can be dropped
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = next(int(line.split()[1]) for line in (CGROUP / "memory.stat").read_text().splitlines() if line.startswith("file "))
    except (OSError, ValueError, StopIteration):
        return free
    return min(free, limit - used + cached)


def room_for(needs: Mapping[str, int], disk: int, place: Path, device: str, way_out: str) -> tuple[str, str | None]:
    """Return what a stage will take in words, and why that does not fit, None if it does; arguments as of `require_room`."""
    step = max(needs, key=needs.get)
    memory, left = free_memory(device), free_space(place)
    where = "the GPU's memory" if device == "cuda" else "memory"
    line = (
        f"{where}: {readable(needs[step])} at the peak, {step}; {readable(memory)} are free. "
        f"Disk: {readable(disk)} of {readable(left)}"
    )
    if needs[step] > MARGIN * memory:
        free = f"{readable(memory)} are free: {way_out}, or close what takes the rest"
        return line, f"{step} needs {readable(needs[step])} of {where}, and {free}"
    if disk > left:
        return line, f"what is written takes {readable(disk)}, and {readable(left)} are free on the disk of {place}: make room"
    return line, None


def require_room(needs: Mapping[str, int], disk: int, place: Path, device: str, way_out: str) -> None:
    """Print what a stage will take; raise CompactMindError if it does not fit: step -> bytes of memory, and bytes on the disk of `place`.

    `way_out` says what takes less memory.
    """
    line, problem = room_for(needs, disk, place, device, way_out)
    print(line, flush=True)
    if problem:
        raise CompactMindError(problem)
