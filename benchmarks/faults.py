"""Kill every stage at random moments, start two of each at once, fill the disk, forbid writing: what is lost, what is half-written?

Run:    python benchmarks/faults.py             (Linux; root for the disks it mounts; --kills 5, --stages 1_distill.py, --seed 7)
Prints: a row per stage and fault: runs, lost (a finished model is gone), half-written (a checkpoint that does not verify),
        different (the result after starting again is not that of an unbroken run), unclear (not just one line that says why)
Time:   about a quarter of an hour on one CPU core, the report another quarter.

Works in temporary copies of a tiny workspace (profile smoke, models of tests/helpers.py). A stage runs in a forked process that has
everything imported, so that a kill hits its work and not its start; the process that forks computes nothing itself, for a pool of
threads does not survive a fork. SIGKILL cannot show a power cut: that content reaches the disk before its name does is tested in
tests/test_files.py.
"""

import argparse
import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

import helpers  # noqa: E402

from compactmind.errors import CompactMindError  # noqa: E402
from compactmind.manifest import MANIFEST, read_manifest  # noqa: E402

STAGES = (
    ("download_model.py",),
    ("1_distill.py",),
    ("2_prune_finetune.py",),
    ("3_quantize.py",),
    ("4_smoothquant_llama.py",),
    ("5_bayesian_search.py", "--strategy", "fixed"),
    ("5_bayesian_search.py", "--n_trials", "6"),
    ("6_evaluate_report.py", "--latency_repeats", "1"),
)
"""What is run, in the order in which one reads what another wrote."""
COLUMNS = ("runs", "lost", "half-written", "different", "unclear")


# ------------------------------------------------------------------------------------------------------------------ running
def start(stage: tuple[str, ...], folder: Path, log: Path) -> int:
    """Start a stage in a forked process in `folder`, its output in `log`; return the process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        name, *arguments = stage
        sys.argv = [str(ROOT / name), "--profile", "smoke", *arguments]
        runpy.run_path(str(ROOT / name), run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = 1 if isinstance(end.code, str) else end.code or 0
    except BaseException:  # noqa: BLE001  a traceback is what this program looks for
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def in_child(function, *arguments) -> None:
    """Call a function in a forked process."""
    child = os.fork()
    if not child:
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    if wait(child):
        raise SystemExit(f"{function.__name__} failed")


def wait(child: int) -> int:
    """Return the exit status of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(stage: tuple[str, ...], folder: Path) -> tuple[int, str]:
    """Run a stage to its end; return its exit status and its output."""
    log = folder.with_suffix(".log")
    status = wait(start(stage, folder, log))
    return status, log.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------------ looking
def results(folder: Path) -> dict[str, str]:
    """Return what a workspace holds: hash of the weights of every checkpoint, trials that ran, rows of the report."""
    contents = {
        path.parent.name: read_manifest(path.parent)["files"]["model.safetensors"]["sha256"] for path in checkpoints(folder)
    }
    if (folder / "sst2_data" / "dataset.json").is_file():
        contents["sentences"] = json.dumps(helpers.read_json(folder / "sst2_data" / "dataset.json")["splits"])
    if (folder / "results" / "search" / "summary.json").is_file():
        summary = helpers.read_json(folder / "results" / "search" / "summary.json")
        contents["search"] = json.dumps([summary["trials"], summary["best"]["pipeline"]])
    if (folder / "results" / "final_report.json").is_file():
        rows = helpers.read_json(folder / "results" / "final_report.json")["models"]
        contents["report"] = json.dumps([[row["name"], row["status"], row.get("accuracy"), row.get("perplexity")] for row in rows])
    return contents


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "models").glob(f"[!.]*/{MANIFEST}"))


def half_written(folder: Path) -> int:
    """Count what a reader would take for whole and is not: checkpoints whose bytes are others, JSON that cannot be read."""
    count = 0
    for directory in (folder / "models").glob("[!.]*"):
        try:
            read_manifest(directory, verify=True)
        except CompactMindError:
            count += 1
    for path in [*(folder / "results").rglob("*.json"), *(folder / "sst2_data").glob("*.json")]:
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # of a run that was killed while it wrote: nobody reads it
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            count += 1
    return count


def unclear(status: int, output: str) -> int:
    """Return 1 unless a run ended well, or with one line that says why it did not."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    bad = "Traceback" in output or (status != 0) != (len(errors) == 1)
    if bad:
        print(f"exit status {status}, and its last words:\n" + "\n".join(output.splitlines()[-12:]), file=sys.stderr)
    return int(bad)


# ------------------------------------------------------------------------------------------------------------------- faults
@contextlib.contextmanager
def copy_of(folder: Path, place: Path) -> Iterator[Path]:
    """Yield a copy of a workspace that is removed at the end."""
    copy = Path(tempfile.mkdtemp(dir=place)) / "copy"
    shutil.copytree(folder, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy.parent)


def killed(stage, before: Path, expected: dict, seconds: float, place: Path, source: random.Random) -> list[int]:
    """Kill once at a random moment, look, start again, compare; return the counts of COLUMNS."""
    with copy_of(before, place) as folder:
        known = results(folder)
        child = start(stage, folder, folder.with_suffix(".log"))
        time.sleep(source.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        wait(child)
        broken = half_written(folder)
        lost = sum(name not in results(folder) for name in known)
        status, output = run(stage, folder)
        different = int(status != 0 or results(folder) != expected)
        return [1, lost, broken + half_written(folder), different, unclear(status, output)]


def two_at_once(stage, before: Path, expected: dict, place: Path) -> list[int]:
    """Run two of a stage in one folder."""
    with copy_of(before, place) as folder:
        logs = [folder.with_suffix(f".{number}.log") for number in (1, 2)]
        children = [start(stage, folder, log) for log in logs]
        statuses = [wait(child) for child in children]
        errors = sum(unclear(status, log.read_text(encoding="utf-8")) for status, log in zip(statuses, logs, strict=True))
        different = int(0 not in statuses or results(folder) != expected)
        return [1, 0, half_written(folder), different, errors]


def unwritable(stage, before: Path, expected: dict, place: Path, free_bytes: int | None) -> list[int] | None:
    """Run a stage on a disk with so many bytes free (None: on a read-only one), then on the same disk with room; None without root."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        disk = Path(name)
        size = sum(path.stat().st_size for path in before.rglob("*") if path.is_file()) + 400_000_000
        mounting = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(mounting, capture_output=True).returncode:
            return None
        try:
            folder = disk / "copy"
            shutil.copytree(before, folder)
            known, filler = results(folder), disk / "filler"
            if free_bytes is None:
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            else:
                with open(filler, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free_bytes)
            log = place / "unwritable.log"
            status = wait(start(stage, folder, log))
            errors = unclear(status, log.read_text(encoding="utf-8"))
            broken = half_written(folder)
            lost = sum(name not in results(folder) for name in known)
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            filler.unlink(missing_ok=True)
            status, output = run(stage, folder)
            different = int(status != 0 or results(folder) != expected)
            return [1, lost, broken + half_written(folder), different, errors + unclear(status, output)]
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def summed(rows: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills per stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--stages", nargs="*", default=None, help="names of scripts, default all")
    args = parser.parse_args()
    for name in dict.fromkeys(name for name, *_ in STAGES):  # imported once, here
        runpy.run_path(str(ROOT / name), run_name="imported")
    with tempfile.TemporaryDirectory() as temporary:
        place, source = Path(temporary), random.Random(args.seed)
        workspace = place / "workspace"
        in_child(helpers.make_workspace, workspace)
        print(f"{'stage':<44}{'fault':<24}" + "".join(f"{name:>14}" for name in COLUMNS), flush=True)
        for stage in STAGES:
            name = " ".join(stage)
            if stage[0] == "1_distill.py":
                in_child(helpers.add_llama, workspace)
            before = place / "before"
            shutil.copytree(workspace, before)
            started = time.perf_counter()
            status, output = run(stage, workspace)
            seconds = time.perf_counter() - started
            if status:
                raise SystemExit(f"{name} fails by itself:\n{output}")
            if args.stages is None or stage[0] in args.stages:
                expected = results(workspace)

                def show(fault: str, counts: list[int] | None, name: str = name) -> None:
                    cells = (
                        "".join(f"{count:>14}" for count in counts)
                        if counts
                        else "  not measured: it needs root to mount a disk"
                    )
                    print(f"{name:<44}{fault:<24}{cells}", flush=True)

                kills = [killed(stage, before, expected, seconds, place, source) for _ in range(args.kills)]
                if kills:
                    show("killed", summed(kills))
                show("two at once", two_at_once(stage, before, expected, place))
                full = [unwritable(stage, before, expected, place, free) for free in (0, 20_000, 200_000, 2_000_000)]
                show("full disk", None if None in full else summed(full))
                show("read-only", unwritable(stage, before, expected, place, None))
            shutil.rmtree(before)


if __name__ == "__main__":
    main()
