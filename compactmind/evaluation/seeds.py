"""What classifiers trained with several seeds get right, as one more measurement of the row that has their usual name.

The runs of other seeds (compactmind/seeds.py) are no rows: they cost what the row's model costs. Only their accuracy is measured, on the
same sentences.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compactmind.checkpoint import load_checkpoint
from compactmind.data import Sentence, load_split
from compactmind.devices import default_device
from compactmind.errors import CompactMindError
from compactmind.evaluation.classifiers import measure_accuracy
from compactmind.files import read_json
from compactmind.manifest import MANIFEST, read_manifest, weights_fingerprint
from compactmind.seeds import REPEATS, spread, with_seed
from compactmind.task import read_task

SAME = ("data", "machine", "versions", "max_length", "eval_batch_size")
"""What of a row's protocol an accuracy depends on."""


def is_repeat(directory: Path) -> bool:
    """Tell whether a checkpoint is another seed of one that lies beside it."""
    name = (read_json(directory / MANIFEST) or {}).get(REPEATS)
    return bool(name) and (directory.parent / name / MANIFEST).is_file()


def repeats_of(directory: Path) -> list[Path]:
    """Return the checkpoints of other seeds of the one in `directory`, in the order of their seeds."""
    repeats = []
    for manifest in directory.parent.glob(f"[!.]*/{MANIFEST}"):
        read = read_json(manifest) or {}
        if read.get(REPEATS) == directory.name:
            repeats.append((read["stage"]["config"]["seed"], manifest.parent))
    return [place for _, place in sorted(repeats)]


def add_seeds(
    rows: Sequence[dict[str, Any]], known: Mapping[str, dict[str, Any]], data_dir: Path, max_length: int, eval_batch_size: int
) -> None:
    """Give, in place, every measured classifier that has runs of other seeds `seeds`: what each gets right, median, lowest, highest.

    A run that is not the same training as the row's model is now, or cannot be measured, stands under `left_out` with the reason.
    `known`: an earlier report's rows by name, whose measurements are taken where they hold.
    """
    sentences: list[Sentence] = []
    for row in rows:
        if row["track"] != "encoder" or row["status"] != "measured":
            continue
        row.pop("seeds", None)
        directory = Path(row["directory"])
        if not (places := repeats_of(directory)):
            continue
        stage, left_out = read_manifest(directory)["stage"], []
        runs = [{"name": row["name"], "seed": stage["config"].get("seed"), "accuracy": row["accuracy"]}]
        earlier = {run["name"]: run for run in (known.get(row["name"], {}).get("seeds") or {}).get("runs", [])}
        for place in places:
            try:
                manifest = read_manifest(place)
                if with_seed(manifest["stage"], 0) != with_seed(stage, 0):
                    again = f"run `python {stage.get('script')} --seeds N` again"
                    raise CompactMindError(f"it differs from {row['name']} by more than its seed: {again}")
                key = {name: row["measured_with"][name] for name in SAME} | {"weights": weights_fingerprint(place)}
                run = earlier.get(place.name, {})
                if run.get("measured_with") != key:
                    print(f"{place.name:<24} accuracy ...", flush=True)
                    run = {"name": place.name, "seed": manifest["stage"]["config"]["seed"], "directory": str(place)}
                    sentences, checkpoint = sentences or load_split(data_dir, "test"), load_checkpoint(place, default_device())
                    measure_accuracy(run, checkpoint, sentences, read_task(data_dir), max_length, eval_batch_size)
                    run |= {"validation_accuracy": manifest["metrics"].get("validation_accuracy"), "measured_with": key}
                names = ("name", "seed", "accuracy", "validation_accuracy", "correct", "measured_with")
                runs.append({name: run[name] for name in names})
            except Exception as error:  # noqa: BLE001  a run that fails is no reason to have no report
                left_out.append({"name": place.name, "error": str(error)})
        row["seeds"] = {"runs": runs, "left_out": left_out, **spread([run["accuracy"] for run in runs])}
