"""Any labelled data: a table of one's own, a task of GLUE, a local folder or a data set of the hub becomes train, validation and test."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compactmind.data import SPLITS, refuse_own_files, stable_share, write_splits
from compactmind.errors import CompactMindError
from compactmind.files import sha256_of
from compactmind.glue import GLUE, glue_files
from compactmind.labelled import Columns, Part, as_rows, class_counts, load_local_dataset, parts_of, read_file
from compactmind.labelled import describe as describe_rows
from compactmind.labelled import split as split_labelled
from compactmind.rows import TEXT_COLUMNS
from compactmind.sources import hub
from compactmind.sources.choice import choose_source, describe, is_there, origin_of


def check_labelled(config: Any) -> None:
    """Raise CompactMindError on settings of a data set of one's own that do not go together."""
    if config.train and config.dataset:
        raise CompactMindError(f"--train {config.train} and --dataset {config.dataset}: give one of them")
    beside = [name for name in ("test", "validation") if getattr(config, name)]
    if beside and not config.train:
        raise CompactMindError(f"--{beside[0]} {getattr(config, beside[0])} needs the table to train on: --train FILE")
    columns = [name for name in ("text_column", "pair_column") if getattr(config, name)]
    if columns and not (config.train or "/" in config.dataset):
        raise CompactMindError(f"--{columns[0]} is for a table (--train FILE) or a data set of the hub (--dataset OWNER/NAME)")
    if config.dataset and "/" not in config.dataset and config.dataset not in ("sst2", *GLUE):
        raise CompactMindError(
            f"unknown dataset {config.dataset!r}: choose a task of GLUE ({', '.join(sorted(('sst2', *GLUE)))}; stsb is no "
            "classification) or owner/name of the hub"
        )


def columns_of(config: Any) -> Columns:
    """Return the columns that were asked for."""
    text = (config.text_column,) if config.text_column else TEXT_COLUMNS
    return Columns(text, (config.label_column,), (config.pair_column,) if config.pair_column else ())


def tables_of(config: Any) -> dict[str, Path]:
    """Return the tables that were given, by split. Raises CompactMindError on one that is not there."""
    files = {part: Path(getattr(config, part)) for part in SPLITS if getattr(config, part)}
    if missing := [path for path in files.values() if not path.is_file()]:
        raise CompactMindError(f"{missing[0]} not found: give the path of a csv, tsv, jsonl or parquet file")
    return files


def choose_labelled(config: Any, hub_answers: Callable[[], bool]) -> dict:
    """Return what is recorded of the table or data set that was asked for: source, identity, columns. Raises CompactMindError."""
    refuse_own_files(config.data_dir)
    columns, glue = json.loads(json.dumps(asdict(columns_of(config)))), config.dataset in GLUE  # as it will be read again
    if config.train:
        files = tables_of(config)
        names = ", ".join(path.name for path in files.values())
        return {
            "source": f"table {names}",
            "identity": {part: sha256_of(path) for part, path in files.items()},
            "columns": columns,
        }
    if glue:
        name, part, folder = config.dataset_name, config.dataset, config.data_dir / "glue" / config.dataset
        files = list(glue_files(folder, config.dataset).values())
    else:
        name, part = config.dataset, config.dataset_config
        places = [config.local_dir / name.partition("@")[0], config.local_dir / name.partition("@")[0].rpartition("/")[2]]
        folder = next((place for place in places if place.is_dir()), places[0])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    local = None
    if files and config.source in ("auto", "local"):
        local = {"source": f"local folder {folder}", "identity": {path.name: sha256_of(path) for path in files}}
    elif config.source in ("local", "pypi"):
        raise CompactMindError(f"{config.dataset} is not in {folder}, and PyPI ships none: put it there, or use --source hub")
    record = choose_source(
        config, name, option="--dataset", part=f" {part}" if part else "", local=local, put_into=str(folder), wheel=None, by_name=True,
        there=origin_of(config.data_dir), hub_answers=hub_answers,
    )  # fmt: skip
    return {**record, "part": part, **({} if glue else {"columns": columns})}


def read_labelled(config: Any, origin: dict) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Return the parts of the table or data set and the names of its classes if it says them; the commit goes into `origin`."""
    glue = GLUE.get(config.dataset)
    columns, names, reported = (glue.columns, glue.labels, glue.dev[0]) if glue else (columns_of(config), (), "")
    folder = Path(origin["source"].removeprefix("local folder ")) if origin["source"].startswith("local folder ") else None
    if config.train or (glue and folder):
        files = tables_of(config) if config.train else glue_files(folder, config.dataset)
        return {part: read_file(path, columns) for part, path in files.items()}, names
    if folder:
        dataset = load_local_dataset(folder, config.dataset_config)
    else:
        record = {key: origin[key] for key in ("source", "identity", "revision") if key in origin}
        way_out = "check --dataset and --dataset_config, or put its files into a local folder (docs/your_own_data.md)"
        dataset, origin["identity"] = hub.load_hub_dataset(record, origin["part"] or None, ("train",), way_out)
    return parts_of(dataset, config.dataset, columns, names, reported)


def download_labelled(config: Any, record: dict) -> None:
    """Write train, validation and test rows from `choose_labelled` to data_dir, or say that they are there already."""
    origin = {**record, "max_rows": config.max_rows}
    if is_there(config.data_dir, origin) and not config.force:
        print(f"rows: {config.data_dir} is up to date, from {describe(record)}")
        return
    print(f"rows: reading from {record['source']} ...")
    parts, names = read_labelled(config, origin)
    task, splits, said = split_labelled(parts, names)
    glue = GLUE.get(config.dataset)
    task = replace(task, name=f"GLUE {config.dataset}" if glue else config.dataset or Path(config.train).name)
    task = replace(task, metric=glue.metric) if glue else task
    if config.max_rows:
        splits = {name: sorted(part, key=lambda s: stable_share(s.text))[: config.max_rows] for name, part in splits.items()}
    config.data_dir.mkdir(parents=True, exist_ok=True)
    counts = {name: {"classes": class_counts(part, task.labels)} for name, part in splits.items()}
    write_splits(config.data_dir, {name: as_rows(part) for name, part in splits.items()}, origin, counts, task=asdict(task))
    print(*describe_rows(splits, task.labels), *(f"warning: {line}" for line in said), sep="\n")
