"""What a setting may be: the range of every number, which fields name checkpoints, which must not be empty. Standard library only."""

import math
import re
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

RANGES: dict[str, str] = {
    # every stage
    "seed": "[0, 4294967295]",
    # downloads
    "hub_timeout": "(0, inf)", "max_rows": "[0, inf)",
    # sentences and steps; three tokens are the two special ones and a word
    "seeds": "[1, 100]", "batch_size": "[1, inf)", "eval_batch_size": "[1, inf)", "max_length": "[3, inf)", "log_every": "[1, inf)",
    "weight_decay": "[0, 1]", "max_grad_norm": "(0, inf)", "warmup_ratio": "[0, 1)", "average_share": "[0, 1]",
    # distillation
    "teacher_epochs": "[1, inf)", "teacher_lr": "(0, inf)", "teacher_dropout": "[0, 1)",
    "student_epochs": "[1, inf)", "student_lr": "(0, inf)", "student_dropout": "[0, 1)", "student_layers": "[1, inf)",
    "temperature_start": "(0, inf)", "temperature_end": "(0, inf)", "alpha_start": "[0, 1]", "alpha_end": "[0, 1]",
    "hidden_loss_weight": "[0, inf)", "augment": "[0, 20]",
    # pruning
    "target_sparsity": "[0, 1)", "round_to": "[1, inf)", "epochs": "[1, inf)", "prune_start_epoch": "[1, inf)",
    "prune_end_epoch": "[1, inf)", "prune_every": "[1, inf)", "dropout": "[0, 1)", "lr": "(0, inf)", "recovery_lr": "(0, inf)",
    "target_speedups": "(1, inf)", "target_gflops": "(0, 1)",
    "patience": "[1, inf)", "min_delta": "[0, 1]", "temperature": "(0, inf)", "alpha": "[0, 1]",
    # quantization
    "vocabulary_coverage": "[0, 1]", "calibration_sentences": "[0, inf)",
    "calibration_windows": "[1, inf)", "seq_len": "[2, inf)", "eval_windows": "[0, inf)",
    "alpha_grid": "[0, 1]",
    # search
    "save_front": "(1, inf)", "final_tokens": "[0, inf)", "replay": "[-1, inf)", "n_trials": "[1, inf)", "workers": "[1, inf)",
    "target_compression": "(0, inf)", "SearchConfig.max_length": "[1, 6]",
    "max_repeats": "[1, inf)", "cache_gb": "[0, inf)", "top": "[1, inf)", "train_windows": "[0, inf)",
    "held_out_windows": "[1, inf)", "few_windows": "[1, inf)", "search_windows": "[1, inf)", "confirm_windows": "[1, inf)",
    # export and report
    "sentences": "[1, inf)", "tolerance": "[0, inf)", "int8_tolerance": "[0, inf)", "seven_bit_tolerance": "[0, inf)",
    "cost_length": "[1, inf)", "latency_batches": "[1, inf)", "latency_repeats": "[1, inf)", "prompt_tokens": "[1, inf)",
    "gsm8k_problems": "[0, inf)", "zero_shot_limit": "[0, inf)",
}  # fmt: skip
"""Field -> the interval its number, or each of its numbers, lies in; `Config.field` where a config means something else by the name."""

NAMES = ("parent", "output_dir", "parents", "w8a8_parents", "nf4_dir", "smoothed_dir", "reference", "ExportConfig.models")
"""Fields that name checkpoints under models_dir."""

NOT_EMPTY = ("students", "latency_batches", "alpha_grid", "objectives", "methods", "ExportConfig.models")
"""Fields that must name something."""


def setting_problem(config: Any) -> str | None:
    """Return what is wrong with the first field of a config dataclass that makes no sense by itself, None if all do."""
    hints, kind = get_type_hints(type(config)), type(config).__name__
    for field in fields(config):
        name, value, known = field.name, getattr(config, field.name), {field.name, f"{kind}.{field.name}"}
        values, (choices, types) = value if isinstance(value, tuple) else (value,), allowed_values(hints[field.name])
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        if not values and known & set(NOT_EMPTY):
            return f"{name} is empty: for example --{name} {default}"
        interval = RANGES.get(f"{kind}.{name}", RANGES.get(name))
        for each in values:
            number = type(each) in (int, float)
            fits = each in choices or (isinstance(each, types) and (type(each) is not bool or bool in types))
            if not (fits or (number and float in types)):
                if choices and isinstance(each, str):
                    return f"unknown {name} {each!r}: choose from {', '.join(choices)}"
                wanted = " or ".join(each_type.__name__ for each_type in types)
                return f"{name} {each!r} is no {wanted}: for example --{name} {default}"
            if number and interval and not _within(each, interval):
                return f"{name} {each:g} is not in {interval}: for example --{name} {default}"
            if known & set(NAMES) and not re.fullmatch(r"\w[\w.\-]*", each):
                return f"{name} {each!r} is no plain name of a directory under models_dir: for example --{name} {default}"
    return None


def allowed_values(hint: Any) -> tuple[tuple[str, ...], tuple[type, ...]]:
    """Return the words a type annotation allows, and the types."""
    words, types = [], []
    for each in get_args(hint) if get_origin(hint) not in (None, Literal) else (hint,):
        if get_origin(each) is Literal:
            words += get_args(each)
        elif isinstance(each, type):
            types.append(each)
    return tuple(words), tuple(types)


def _within(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high) and math.isfinite(value)


def without_password(value: str) -> str:
    """Return a setting as it may be shown and written down: an address, of a database for example, has *** where its password is."""
    # up to the last @ before a ?, as a password may hold what a browser would not allow
    value = re.sub(r"(://[^:/@]*):(?:[^?]*@|[^@]*@)", r"\1:***@", value)
    return re.sub(r"(://.*[?&]\w*password=)[^&]*", r"\1***", value)
