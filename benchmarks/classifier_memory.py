"""Memory of training and quantizing classifiers: what is estimated from shapes (compactmind/classifier_room.py) against what was measured.

Run:   python benchmarks/classifier_memory.py 1_distill.py --models_dir ... (a stage and its options; Linux, CPU)
Found: a random BERT of MiniLM's shape (6 layers, hidden 384), 48 sentences of 62 tokens, 2 CPU cores, with
`1_distill.py --student_layers 3 --student_epochs 1 --students student_distilled --batch_size 16 --max_length 64` (smoke profile):
estimated 866 MB, measured 794 MB (1.09).
Estimated is what a stage adds to a process with its libraries loaded; measured is the high-water mark of the stage less what its
imports take.
"""

import runpy
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import parse_command_line  # noqa: E402
from compactmind.classifier_room import ROOMS  # noqa: E402


def high_water_mark() -> int:
    """Return the most bytes that this process has had in memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    script = sys.argv[1] if len(sys.argv) > 1 else ""
    if script not in ROOMS:
        raise SystemExit(f"error: unknown stage {script!r}: choose from {', '.join(ROOMS)}")
    sys.argv = sys.argv[1:]
    stage = runpy.run_path(str(ROOT / script))
    config = parse_command_line(stage["CONFIG"])
    before, room = psutil.Process().memory_info().rss, ROOMS[script](config)
    stage["main"](config)
    measured, estimated = high_water_mark() - before, max(room.needs.values())
    ratio = estimated / measured
    print(f"{script}: estimated {estimated / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, estimated / measured {ratio:.2f}")


if __name__ == "__main__":
    main()
