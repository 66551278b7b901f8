"""Whether a stage of the encoder track fits into memory and on the disk: from config.json and the size of the weights alone.

`config` is the stage's settings, see common.py.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from compactmind.devices import default_device, is_main_process
from compactmind.methods import classifier_memory as memory
from compactmind.methods.classifier_memory import ClassifierSizes
from compactmind.room import require_room, room_for


class Room(NamedTuple):
    """What a stage needs: bytes of memory by part, bytes on disk, and what takes less memory."""

    needs: dict[str, int]
    disk: int
    way_out: str


def sizes_of(directory: Path, ends_with: str = "") -> ClassifierSizes | None:
    """Return the sizes of a model's folder, None where no model is whose class `ends_with` that."""
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    try:
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        kind = str((settings.get("architectures") or [""])[0])
        return ClassifierSizes.of(settings, weights) if weights and kind.endswith(ends_with) else None
    except (OSError, ValueError, StopIteration):  # what is damaged is said by who reads it
        return None


def distilling(config: Any) -> Room | None:
    """What 1_distill.py needs: the teacher's training, and the students' beside the teacher."""
    teacher = sizes_of(config.models_dir / "teacher_base")
    if teacher is None:
        return None
    student = sizes_of(config.models_dir / "student_base") or teacher.cut(min(config.student_layers, teacher.layers))
    frozen, batch = config.freeze_word_embeddings, (config.batch_size, config.max_length)
    needs = {"teacher": memory.train(teacher, *batch, False)}
    beside = teacher.weights + (memory.predict(teacher, *batch) if config.hidden_loss_weight else 0)
    needs |= {name: beside + memory.train(student, *batch, frozen) for name in config.students}
    state = max(memory.training_state(teacher, False), memory.training_state(student, frozen))
    return Room(needs, teacher.weights + len(config.students) * student.weights + state, TRAINING)


def pruning(config: Any) -> Room | None:
    """What 2_prune_finetune.py needs: the parent's training, whole; beside it the parent for a family and hidden states."""
    parent, teacher = (sizes_of(config.models_dir / name) for name in (config.parent, "teacher"))
    if parent is None or (teacher is None and config.alpha > 0):
        return None
    family = len(config.target_speedups) + len(config.target_gflops)
    batch = (config.batch_size, config.max_length)
    dense = bool(family or config.hidden_loss_weight) * parent.weights
    needs = {config.output_dir: dense + memory.train(parent, *batch, config.freeze_word_embeddings)}
    if config.alpha > 0:
        needs["teacher's logits"] = parent.weights + teacher.weights + memory.predict(teacher, config.eval_batch_size, config.max_length)
    return Room(needs, (family or 1) * parent.weights + memory.training_state(parent, config.freeze_word_embeddings), TRAINING)


def quantizing(config: Any) -> Room | None:
    """What 3_quantize.py needs for the dearest of its parents; results are counted as no smaller than these."""
    names = dict.fromkeys((*config.parents, *config.w8a8_parents))
    sizes = {name: sizes_of(config.models_dir / name) for name in names}
    if None in sizes.values() or not sizes:
        return None
    sentences = config.calibration_sentences if config.method == "nf4" else 0
    batch = (config.eval_batch_size, config.max_length)
    needs = {name: memory.quantize(each, sentences, *batch) for name, each in sizes.items()}
    return Room(needs, sum(each.weights for each in sizes.values()), "fewer --calibration_sentences take less")


def measuring(config: Any) -> Room | None:
    """What the classifiers of 6_evaluate_report.py need: all in memory together, and what a layer of the largest computes."""
    folders = [path.parent for path in sorted(config.models_dir.glob("*/config.json"))]
    encoders = [sizes for folder in folders if (sizes := sizes_of(folder, "ForSequenceClassification"))]
    if not encoders:
        return None
    batches = [(config.eval_batch_size, config.max_length), *((size, config.cost_length) for size in config.latency_batches)]
    largest = max(memory.predict(each, *batch) for each in encoders for batch in batches)
    return Room({"all classifiers": sum(each.weights for each in encoders) + largest}, 0, "a smaller --eval_batch_size takes less")


TRAINING = "a smaller --batch_size or --max_length takes less"
ROOMS = {"1_distill.py": distilling, "2_prune_finetune.py": pruning, "3_quantize.py": quantizing, "6_evaluate_report.py": measuring}
"""Script -> what it needs, None where what it is made of is not there yet."""


@functools.cache
def require_room_for(script: str, config: Any) -> None:
    """Print, once, what memory and disk a stage will take. Raises CompactMindError, before work begins, if that does not fit."""
    room = ROOMS[script](config)
    if room and is_main_process():
        require_room(room.needs, room.disk, config.models_dir, default_device(), room.way_out)


def describe_room(script: str, config: Any) -> tuple[str, str | None]:
    """Return what memory and disk a stage will take in words, and why that does not fit, None if it does or is not known yet."""
    room = ROOMS[script](config)
    if room is None:
        return "memory and disk: known once what it reads is there", None
    return room_for(room.needs, room.disk, config.models_dir, default_device(), room.way_out)
