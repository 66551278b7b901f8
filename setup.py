"""What the package needs and its extras, read off requirements*.txt: a version is pinned in one place. All else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

LOADER = ("torch", "transformers", "safetensors")
"""What loads and runs a model; the kernels need no more."""
TRAINING = (
    "accelerate", "bitsandbytes", "datasets", "gguf", "peft", "numpy", "pandas", "scipy", "scikit-learn", "psutil", "filelock", "tqdm",
)  # fmt: skip
SEARCH = ("optuna", "sqlalchemy")
REPORT = ("thop", "setuptools", "matplotlib", "jinja2", "lm-eval")
EXTRAS = {
    "nf4": ("bitsandbytes",),
    "gguf": ("gguf",),
    "train": TRAINING,
    "search": (*TRAINING, *SEARCH),
    "report": (*TRAINING, *REPORT),
    "export": ("onnx", "onnxscript", "onnxruntime", "gguf"),
    "llama_cpp": ("xllamacpp",),
    "postgres": ("pg8000",),
    "dev": (*TRAINING, *SEARCH, *REPORT, "tyro", "pytest", "pytest-cov", "pytest-xdist", "ruff"),
}
"""Extra -> packages: nf4 and gguf load what the loader alone cannot; train changes models; dev is requirements.txt as a whole."""


def pinned() -> dict[str, list[str]]:
    """Return every package in requirements*.txt with its lines: one, or one for each range of Python versions."""
    versions: dict[str, list[str]] = {}
    for path in sorted(Path(__file__).resolve().parent.glob("requirements*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                versions.setdefault(line.partition("==")[0], []).append(line)
    return versions


def lines_of(names: tuple[str, ...]) -> list[str]:
    """Return the pins of some packages."""
    known = pinned()
    return [line for name in names for line in known[name]]


setup(install_requires=lines_of(LOADER), extras_require={extra: lines_of(names) for extra, names in EXTRAS.items()})
