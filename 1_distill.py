"""Distill a fine-tuned encoder into one with fewer layers on sentiment sentences (SST-2): BERT into DistilBERT, RoBERTa into RoBERTa.

Paper: Hinton et al. 2015 (soft targets), Sanh et al. 2019 (DistilBERT: alternate teacher layers as a start).
Run:   python 1_distill.py                      (after python download_model.py; every setting: --help)
       accelerate launch --mixed_precision bf16 1_distill.py    (several GPUs)
       python 1_distill.py --seeds 5            (each model with five seeds: a median and a spread in the report; docs/families.md)
Reads: models/teacher_base, models/student_base if there is one, sst2_data/{train,validation}.jsonl
Writes: models/teacher            the teacher, fine-tuned on the labels
        models/student_finetuned  the student trained on the labels alone: the control
        models/student_distilled  the same student trained on the teacher's soft targets and the labels
Time:  about 5 minutes on 2 CPU cores (embedded profile). A killed run goes on at its last epoch.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common import PROFILE, DistillConfig, parse_command_line, run_stage
from compactmind.checkpoint import first_not_finite, load_checkpoint, save_checkpoint
from compactmind.classifier_room import require_room_for
from compactmind.code_version import code_version
from compactmind.data import EncodedSentences, Sentence, data_fingerprint, load_split, model_inputs
from compactmind.errors import CompactMindError
from compactmind.guards import check_outputs, check_tokenizer
from compactmind.limits import require_positions
from compactmind.loop import EpochLoop, LastNotWorse
from compactmind.manifest import is_up_to_date, read_manifest, weights_fingerprint
from compactmind.methods.distillation.augmentation import augmented, mask_of
from compactmind.methods.distillation.schedules import linear_anneal
from compactmind.methods.distillation.soft_targets import distillation_loss, hidden_state_loss
from compactmind.methods.distillation.student import alternate_layers, matching_layers, student_from_teacher
from compactmind.methods.distillation.transfer_set import SETTINGS, read_with_teacher, unlabelled_record, unlabelled_texts
from compactmind.methods.first_token import read_all_tokens, read_first_token_only
from compactmind.methods.pruning.encoder import classifier_class, encoder_layers, family_name
from compactmind.methods.vocabulary import same_tokenizer
from compactmind.seeds import format_spread, repeats_record, runs_of, with_seed
from compactmind.task import Task, read_task
from compactmind.training import (
    accelerator_record,
    freeze_word_embeddings,
    linear_decay_with_warmup,
    make_accelerator,
    only_writer,
    set_dropout,
)

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.DistillConfig. For example: for_profile(PROFILE, student_epochs=6)
CONFIG = DistillConfig.for_profile(PROFILE)


# ----------------------------------------------------------------------------------------------------------------- loop
def selection_of(config: DistillConfig) -> LastNotWorse:
    """Return which epoch of each model is kept."""
    return LastNotWorse(read_task(config.data_dir).metric)


def train(
    name: str,
    model: torch.nn.Module,
    tokenizer,
    splits: dict[str, EncodedSentences],
    config: DistillConfig,
    accelerator: Accelerator,
    stage: dict,
    *,
    repeats: dict[str, str],
    epochs: int,
    lr: float,
    lr_name: str,
    parent: str,
    teacher_logits: torch.Tensor | None = None,
    teacher: torch.nn.Module | None = None,
    layer_map: list[int] | None = None,
) -> None:
    """Train one classifier and save the averaged weights of its last epoch that is not worse than the best as models/<name>.

    A loss or a validation logit that is not finite ends the run with a CompactMindError that names `lr_name`, the setting `lr` is from.
    With `teacher_logits` (one row per training sentence) the loss is distillation; `teacher` and `layer_map` are needed
    for the hidden-state loss only.
    """
    directory = config.models_dir / name
    distilled = teacher_logits is not None
    use_hidden_loss = teacher is not None and config.hidden_loss_weight > 0
    if not use_hidden_loss:
        read_first_token_only(model)
    loop = EpochLoop(
        name, directory, stage, accelerator, splits["train"], splits["validation"], selection_of(config), epochs=epochs,
        **config.relevant("batch_size", "eval_batch_size", "seed", "weight_decay", "max_grad_norm", "log_every"),
    )  # fmt: skip
    warmup_steps = int(config.warmup_ratio * loop.total_steps)
    loop.begin(
        model, (lr_name, lr), lambda optimizer: linear_decay_with_warmup(optimizer, warmup_steps, loop.total_steps),
        average_steps=config.average_share * loop.total_steps,
    )  # fmt: skip

    for _ in loop.epochs("distill" if distilled else "finetune", epochs):
        for batch in loop.batches():
            temperature = linear_anneal(config.temperature_start, config.temperature_end, loop.fraction)
            alpha = linear_anneal(config.alpha_start, config.alpha_end, loop.fraction)
            with accelerator.autocast():
                output = loop.wrapped(**model_inputs(batch, loop.wrapped), output_hidden_states=use_hidden_loss)
                targets = teacher_logits[batch["rows"].cpu()].to(accelerator.device) if distilled else None
                loss = distillation_loss(output.logits.float(), targets, batch["labels"], temperature, alpha)
                if use_hidden_loss:
                    with torch.no_grad():
                        states = teacher(**model_inputs(batch, teacher), output_hidden_states=True).hidden_states
                    loss = loss + config.hidden_loss_weight * hidden_state_loss(
                        output.hidden_states, states, layer_map, batch["attention_mask"]
                    )
            loop.backward(loss)
            loop.step()
        if distilled:
            loop.row |= {"temperature": temperature, "alpha": alpha}

    model = loop.finish()
    read_all_tokens(model)
    if accelerator.is_main_process:
        save_checkpoint(
            directory, model, tokenizer, kind="dense", parent=parent, stage=stage, history=loop.history, metrics=loop.metrics(),
            data_fingerprint=data_fingerprint(config.data_dir), beside=config.models_dir / parent, extra=repeats,
        )  # fmt: skip
        loop.clear(directory)
    accelerator.wait_for_everyone()


# ----------------------------------------------------------------------------------------------------------------- main
def check(config: DistillConfig) -> None:
    """Raise CompactMindError where one setting switches off what another one asks for."""
    distilled = "student_distilled" in config.students
    if config.hidden_loss_weight > 0 and not distilled:
        raise CompactMindError(
            f"hidden_loss_weight {config.hidden_loss_weight} is for student_distilled, which is not among students "
            f"{', '.join(config.students)}: add it, or use --hidden_loss_weight 0"
        )
    for name, without in (("augment", "0"), ("unlabelled", '""')):
        if (value := getattr(config, name)) and not distilled:
            raise CompactMindError(
                f"{name} {value} is for student_distilled, which is not among students {', '.join(config.students)}: add it, or use "
                f"--{name} {without}"
            )
    if distilled and config.alpha_start == config.alpha_end == config.hidden_loss_weight == 0:
        raise CompactMindError(
            "student_distilled would learn nothing from its teacher with alpha_start 0, alpha_end 0 and hidden_loss_weight 0: "
            "raise one of them, or use --students student_finetuned"
        )


def check_hidden_loss(student: PreTrainedModel, teacher: PreTrainedModel, same_tokens: bool, weight: float) -> None:
    """Raise CompactMindError unless the states of student and teacher can be compared token by token, channel by channel."""
    sizes = student.config.hidden_size, teacher.config.hidden_size
    layers = len(encoder_layers(student)), len(encoder_layers(teacher))
    if sizes[0] != sizes[1]:
        problem = f"of one hidden size, not {sizes[0]} and {sizes[1]}"
    elif layers[0] > layers[1]:
        problem = f"with no more layers in the student, not {layers[0]} and {layers[1]}"
    elif not same_tokens:
        problem = "with one tokenizer: theirs cut sentences into other tokens"
    else:
        return
    raise CompactMindError(f"hidden_loss_weight {weight} needs student and teacher {problem}: use --hidden_loss_weight 0")


def with_new_head(directory: Path, task: Task, max_length: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a pretrained encoder in float32 with a new head for a task, and its tokenizer. Raises CompactMindError if it does not fit."""
    read_manifest(directory, verify=True)
    try:
        model_class = classifier_class(family_name(AutoConfig.from_pretrained(directory)))
    except CompactMindError as error:
        raise CompactMindError(f"{directory}: {error}") from None
    model = model_class.from_pretrained(directory, **task.head_settings(), dtype=torch.float32)
    task.mark(model.config)
    require_positions(model, max_length, "max_length")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if bad := first_not_finite(model.state_dict().items()):
        raise CompactMindError(f"{directory}: {bad} holds NaN or infinite numbers: run `python download_model.py --force True`")
    check_tokenizer(model, tokenizer, directory, padding=True)
    return model, tokenizer


def main(config: DistillConfig) -> None:
    check(config)
    accelerator = make_accelerator()
    models = config.models_dir
    bases = [models / name for name in ("teacher_base", "student_base") if (models / name).exists()]
    runs = {name: runs_of(name, config.seed, config.seeds) for name in ("teacher", *config.students)}
    check_outputs([models / run for each in runs.values() for run in each], "1_distill.py", bases, models)
    available = read_manifest(models / "teacher_base")["layers"]
    if len(bases) < 2 and config.student_layers > len(available):
        raise CompactMindError(f"student_layers {config.student_layers} is more than the teacher has: 1 to {len(available)}")

    # What each output depends on: if none of it changed, the output is up to date.
    shared = config.relevant("profile", "seed", "batch_size", "max_length", "weight_decay", "max_grad_norm", "warmup_ratio",
                             "average_share")  # fmt: skip
    shared |= accelerator_record(accelerator, config.batch_size) | {"selection": str(selection_of(config))}
    shared["data"] = data_fingerprint(config.data_dir)
    made_by = {"script": "1_distill.py", "code": code_version(__file__)}
    teacher_stage = {
        **made_by,
        "config": {**shared, **config.relevant("teacher_epochs", "teacher_lr", "teacher_dropout")},
        "inputs": {"teacher_base": weights_fingerprint(models / "teacher_base")},
    }
    task = read_task(config.data_dir)
    unlabelled = unlabelled_texts(config.unlabelled, config.data_dir, task, accelerator.print)
    read_with: list[tuple[PreTrainedTokenizerBase, dict[str, EncodedSentences]]] = []

    def load_splits(tokenizer: PreTrainedTokenizerBase) -> dict[str, EncodedSentences]:
        """Return the sentences as a tokenizer reads them: the same object for tokenizers that read alike."""
        for other, splits in read_with:
            if same_tokenizer(tokenizer, other):
                return splits
        splits = {
            split: EncodedSentences(tokenizer, load_split(config.data_dir, split), config.max_length)
            for split in ("train", "validation")
        }
        read_with.append((tokenizer, splits))
        accelerator.print(", ".join(f"{len(part)} {split} sentences" for split, part in splits.items()))
        accelerator.print(f"train: {splits['train'].describe_cut()}")
        return splits

    def read_by_student(tokenizer: PreTrainedTokenizerBase, labelled: list[Sentence], seed: int) -> list[Sentence]:
        """Return the training sentences, changed copies of them, and texts without labels."""
        copies = augmented(labelled, config.augment, mask_of(tokenizer), seed) if config.augment else labelled
        return [*copies, *unlabelled]

    # ---- teacher
    def train_teacher(name: str, run: str, config: DistillConfig, stage: dict) -> None:
        set_seed(config.seed)
        model, tokenizer = with_new_head(models / "teacher_base", task, config.max_length)
        set_dropout(model, config.teacher_dropout)
        train(run, model, tokenizer, load_splits(tokenizer), config, accelerator, stage, repeats=repeats_record(name, run),
              epochs=config.teacher_epochs, lr=config.teacher_lr, lr_name="teacher_lr", parent="teacher_base")  # fmt: skip

    def make(name: str, stage: dict, train_model: Callable[[str, str, DistillConfig, dict], None]) -> None:
        """Train a model with every seed it is not up to date for; the first has its name."""
        for run, seed in runs[name].items():
            with only_writer(models / run, accelerator):
                if config.force or not is_up_to_date(models / run, with_seed(stage, seed), config.verify):
                    require_room_for("1_distill.py", config)
                    train_model(name, run, replace(config, seed=seed), with_seed(stage, seed))
                else:
                    accelerator.print(f"{models / run} is up to date: skipped (--force True trains it again)")
        if config.seeds > 1:
            reached = [read_manifest(models / run)["metrics"]["validation_accuracy"] for run in runs[name]]
            accelerator.print(f"{name}, {config.seeds} seeds: validation accuracy {format_spread(reached)}")

    make("teacher", teacher_stage, train_teacher)

    # ---- students
    student_config = {**shared, **config.relevant("student_epochs", "student_lr", "student_dropout", "freeze_word_embeddings")}
    inputs = {"teacher": weights_fingerprint(models / "teacher")}
    if (models / "student_base").exists():
        inputs["student_base"] = weights_fingerprint(models / "student_base")
    else:
        student_config["student_layers"] = config.student_layers
    distill_config = config.relevant("temperature_start", "temperature_end", "alpha_start", "alpha_end", "hidden_loss_weight", "augment")
    distill_config |= unlabelled_record(config.unlabelled)
    stages = {
        "student_finetuned": {**made_by, "config": student_config, "inputs": inputs},
        "student_distilled": {**made_by, "config": {**student_config, **distill_config}, "inputs": inputs},
    }

    def train_student(name: str, run: str, config: DistillConfig, stage: dict) -> None:
        teacher = load_checkpoint(models / "teacher", accelerator.device)
        teacher_layers = teacher.model.config.num_hidden_layers
        set_seed(config.seed)
        read_by_teacher = data = load_splits(teacher.tokenizer)
        tokenizer = teacher.tokenizer
        if "student_base" in inputs:
            student, tokenizer = with_new_head(models / "student_base", task, config.max_length)
            layer_map = alternate_layers(teacher_layers, min(teacher_layers, len(encoder_layers(student))))
            data = load_splits(tokenizer)
        else:
            layer_map = alternate_layers(teacher_layers, config.student_layers)
            student = student_from_teacher(teacher.model, layer_map).to(accelerator.device)
        task.mark(student.config)
        if config.hidden_loss_weight > 0:
            check_hidden_loss(student, teacher.model, data is read_by_teacher, config.hidden_loss_weight)
        set_dropout(student, config.student_dropout)
        if config.freeze_word_embeddings:
            freeze_word_embeddings(student)
        distilled, logits = name == "student_distilled", None
        if distilled:
            labelled = load_split(config.data_dir, "train")
            train_set, logits = read_with_teacher(
                lambda tokenizer: read_by_student(tokenizer, labelled, config.seed), len(labelled), tokenizer, teacher, accelerator,
                **config.relevant(*SETTINGS),
            )  # fmt: skip
            data = {**data, "train": train_set}
        train(
            run, student, tokenizer, data, config, accelerator, stage, repeats=repeats_record(name, run),
            epochs=config.student_epochs, lr=config.student_lr, lr_name="student_lr",
            parent="student_base" if "student_base" in inputs else "teacher", teacher_logits=logits,
            teacher=teacher.model if distilled else None,
            layer_map=matching_layers(teacher_layers, layer_map),
        )  # fmt: skip

    for name in config.students:
        make(name, stages[name], train_student)

    if all(name in config.students for name in stages):
        control, distilled = (read_manifest(models / name)["metrics"]["validation_accuracy"] for name in stages)
        accelerator.print(f"validation accuracy: control {control:.2%}, distilled {distilled:.2%} ({distilled - control:+.2%})")


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG), others=main)
