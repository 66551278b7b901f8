"""Distill a fine-tuned BERT teacher into a DistilBERT student on sentiment sentences (SST-2).

Paper: Hinton et al. 2015 (soft targets), Sanh et al. 2019 (DistilBERT: alternate teacher layers as a start).
Run:   python 1_distill.py                      (after python download_model.py; every setting: --help)
       accelerate launch --mixed_precision bf16 1_distill.py    (several GPUs)
Reads: models/teacher_base, models/student_base if there is one, sst2_data/{train,validation}.jsonl
Writes: models/teacher            the teacher, fine-tuned on the labels
        models/student_finetuned  the student trained on the labels alone: the control
        models/student_distilled  the same student trained on the teacher's soft targets and the labels
Time:  about 5 minutes on 2 CPU cores (embedded profile). A killed run goes on at its last epoch.
"""

import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common import PROFILE, DistillConfig, parse_command_line, run_stage
from compactmind.checkpoint import first_not_finite, load_checkpoint, save_checkpoint
from compactmind.code_version import code_version
from compactmind.data import EncodedSentences, data_fingerprint, load_split, model_inputs
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import accuracy_of, standard_error
from compactmind.guards import check_outputs, check_tokenizer
from compactmind.limits import require_positions
from compactmind.manifest import is_up_to_date, read_manifest, weights_fingerprint
from compactmind.methods.distillation.schedules import linear_anneal
from compactmind.methods.distillation.soft_targets import distillation_loss, hidden_state_loss
from compactmind.methods.distillation.student import alternate_layers, matching_layers, student_from_teacher
from compactmind.methods.distillation.teacher_logits import cached_teacher_logits
from compactmind.methods.first_token import read_all_tokens, read_first_token_only
from compactmind.task import Task, read_task
from compactmind.training import (
    Progress,
    TrainingState,
    WeightAverage,
    accelerator_record,
    cpu_copy,
    freeze_word_embeddings,
    linear_decay_with_warmup,
    make_accelerator,
    make_optimizer,
    mean_loss,
    only_writer,
    prepare_for_training,
    set_dropout,
    validation_logits,
    warn_of_chance,
)

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.DistillConfig. For example: for_profile(PROFILE, student_epochs=6)
CONFIG = DistillConfig.for_profile(PROFILE)


# ----------------------------------------------------------------------------------------------------------------- loop
def train(
    name: str,
    model: torch.nn.Module,
    tokenizer,
    splits: dict[str, EncodedSentences],
    config: DistillConfig,
    accelerator: Accelerator,
    stage: dict,
    *,
    epochs: int,
    lr: float,
    lr_name: str,
    parent: str,
    teacher_logits: torch.Tensor | None = None,
    teacher: torch.nn.Module | None = None,
    layer_map: list[int] | None = None,
) -> None:
    """Train one classifier and save the averaged weights of its last epoch that is not worse than the best as models/<name>.

    Not worse: validation accuracy within one standard error. Weights trained at a falling rate are better the lower it is, and
    the validation sentences are too few to see differences below that.
    A loss or a validation logit that is not finite ends the run with a CompactMindError that names `lr_name`, the setting `lr` is from.
    With `teacher_logits` (one row per training sentence) the loss is distillation; `teacher` and `layer_map` are needed
    for the hidden-state loss only.
    """
    directory = config.models_dir / name
    train_set, validation = splits["train"], splits["validation"]
    use_hidden_loss = teacher is not None and config.hidden_loss_weight > 0
    if not use_hidden_loss:
        read_first_token_only(model)
    optimizer = make_optimizer(model, lr, config.weight_decay)
    steps_per_epoch = math.ceil(len(train_set) / (config.batch_size * accelerator.num_processes))
    total_steps = epochs * steps_per_epoch
    scheduler = linear_decay_with_warmup(optimizer, int(config.warmup_ratio * total_steps), total_steps)

    # Resume: the state of the last finished epoch, if this very stage was interrupted.
    resume = TrainingState(directory, stage)
    history, kept = [], {"accuracy": -1.0, "epoch": 0, "weights": None}
    if saved := resume.load():
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        history, kept = saved["history"], saved["kept"]
        accelerator.print(f"{name}: going on after epoch {len(history)} of {epochs}")
    wrapped, optimizer = prepare_for_training(accelerator, model, optimizer)
    average = WeightAverage(model, decay=1 - 1 / max(1, config.average_share * total_steps))
    if saved:
        average.load_state_dict(saved["average"])

    progress = Progress(name, total_steps, config.log_every, len(history) * steps_per_epoch, accelerator.is_main_process)
    for epoch in range(len(history) + 1, epochs + 1):
        started, losses = time.perf_counter(), []
        first_step, reason = progress.step + 1, (f"{name}, epoch {epoch}", f"{lr_name} {lr:g}")
        set_seed(config.seed + epoch, device_specific=True)  # a resumed run is the same run: only the epoch decides
        loader = train_set.training_batches(config.batch_size, config.seed + epoch, accelerator.num_processes)
        batches = accelerator.prepare(loader)
        wrapped.train()
        for batch in batches:
            fraction = progress.step / total_steps
            temperature = linear_anneal(config.temperature_start, config.temperature_end, fraction)
            alpha = linear_anneal(config.alpha_start, config.alpha_end, fraction)
            with accelerator.autocast():
                output = wrapped(**model_inputs(batch, model), output_hidden_states=use_hidden_loss)
                targets = teacher_logits[batch["rows"].cpu()].to(accelerator.device) if teacher_logits is not None else None
                loss = distillation_loss(output.logits.float(), targets, batch["labels"], temperature, alpha)
                if use_hidden_loss:
                    with torch.no_grad():
                        states = teacher(**model_inputs(batch, teacher), output_hidden_states=True).hidden_states
                    loss = loss + config.hidden_loss_weight * hidden_state_loss(
                        output.hidden_states, states, layer_map, batch["attention_mask"]
                    )
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            average.update(model)
            losses.append(loss.detach())
            progress.update(losses[-1], scheduler.get_last_lr()[0], len(batch["labels"]) * accelerator.num_processes)
            if progress.step % config.log_every == 0:
                mean_loss(losses, accelerator, first_step, *reason)

        epoch_loss = mean_loss(losses, accelerator, first_step, *reason)
        with average.applied_to(model):
            logits = validation_logits(model, validation, config.eval_batch_size, accelerator, *reason)
            accuracy = accuracy_of(logits, validation.labels)
            best = max([accuracy, *(row["accuracy"] for row in history)])
            if accuracy >= best - standard_error(best, len(validation)):
                kept = {"accuracy": accuracy, "epoch": epoch, "weights": cpu_copy(model.state_dict())}
        history.append(
            {
                "epoch": epoch,
                "phase": "distill" if teacher_logits is not None else "finetune",
                "loss": epoch_loss,
                "accuracy": accuracy,
                "sparsity": 0.0,
                "lr": scheduler.get_last_lr()[0],
                "temperature": temperature if teacher_logits is not None else None,
                "alpha": alpha if teacher_logits is not None else None,
                "seconds": time.perf_counter() - started,
            }
        )
        progress.write(
            f"{name:<18} epoch {epoch}/{epochs} | loss {history[-1]['loss']:7.4f} | "
            f"validation accuracy {accuracy:6.2%} | {history[-1]['seconds']:.0f} s"
        )
        if accelerator.is_main_process:
            resume.save(
                model=model.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict(),
                scheduler=scheduler.state_dict(), history=history, kept=kept,
                scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
            )  # fmt: skip
    progress.close()

    model.load_state_dict(kept["weights"])
    read_all_tokens(model)
    if accelerator.is_main_process:
        save_checkpoint(
            directory, model, tokenizer, kind="dense", parent=parent, stage=stage, history=history,
            metrics={"validation_accuracy": kept["accuracy"], "kept_epoch": kept["epoch"]},
            data_fingerprint=data_fingerprint(config.data_dir), beside=config.models_dir / parent,
        )  # fmt: skip
        resume.clear()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.print(f"{name}: saved to {directory} (validation accuracy {kept['accuracy']:.2%}, epoch {kept['epoch']})")
    warn_of_chance(name, kept["accuracy"], validation.labels, accelerator)


# ----------------------------------------------------------------------------------------------------------------- main
def check(config: DistillConfig) -> None:
    """Raise CompactMindError where one setting switches off what another one asks for."""
    distilled = "student_distilled" in config.students
    if config.hidden_loss_weight > 0 and not distilled:
        raise CompactMindError(
            f"hidden_loss_weight {config.hidden_loss_weight} is for student_distilled, which is not among students "
            f"{', '.join(config.students)}: add it, or use --hidden_loss_weight 0"
        )
    if distilled and config.alpha_start == config.alpha_end == config.hidden_loss_weight == 0:
        raise CompactMindError(
            "student_distilled would learn nothing from its teacher with alpha_start 0, alpha_end 0 and hidden_loss_weight 0: "
            "raise one of them, or use --students student_finetuned"
        )


def with_new_head(
    model_class: type[PreTrainedModel], directory: Path, task: Task
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a pretrained encoder in float32 with a new head for a task, and its tokenizer. Raises CompactMindError if it does not fit."""
    architecture, expected = read_manifest(directory, verify=True)["architecture"], model_class.__name__.partition("For")[0]
    if not architecture.startswith(expected):
        raise CompactMindError(f"{directory} holds a {architecture}, expected a {expected}: run `python download_model.py`")
    model = model_class.from_pretrained(directory, **task.head_settings(), dtype=torch.float32)
    task.mark(model.config)
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
    check_outputs([models / name for name in ("teacher", *config.students)], "1_distill.py", bases, models)
    available = read_manifest(models / "teacher_base")["layers"]
    if len(bases) < 2 and config.student_layers > len(available):
        raise CompactMindError(f"student_layers {config.student_layers} is more than the teacher has: 1 to {len(available)}")

    # What each output depends on: if none of it changed, the output is up to date.
    shared = config.relevant("profile", "seed", "batch_size", "max_length", "weight_decay", "max_grad_norm", "warmup_ratio",
                             "average_share")  # fmt: skip
    shared |= accelerator_record(accelerator, config.batch_size)
    shared["data"] = data_fingerprint(config.data_dir)
    made_by = {"script": "1_distill.py", "code": code_version(__file__)}
    teacher_stage = {
        **made_by,
        "config": {**shared, **config.relevant("teacher_epochs", "teacher_lr", "teacher_dropout")},
        "inputs": {"teacher_base": weights_fingerprint(models / "teacher_base")},
    }
    task, splits = read_task(config.data_dir), {}

    def load_splits(tokenizer) -> dict[str, EncodedSentences]:
        if not splits:
            for split in ("train", "validation"):
                splits[split] = EncodedSentences(tokenizer, load_split(config.data_dir, split), config.max_length)
            accelerator.print(", ".join(f"{len(part)} {split} sentences" for split, part in splits.items()))
            accelerator.print(f"train: {splits['train'].describe_cut()}")
        return splits

    # ---- teacher
    with only_writer(models / "teacher", accelerator):
        if config.force or not is_up_to_date(models / "teacher", teacher_stage, config.verify):
            set_seed(config.seed)
            model, tokenizer = with_new_head(BertForSequenceClassification, models / "teacher_base", task)
            require_positions(model, config.max_length, "max_length")
            set_dropout(model, config.teacher_dropout)
            train("teacher", model, tokenizer, load_splits(tokenizer), config, accelerator, teacher_stage,
                  epochs=config.teacher_epochs, lr=config.teacher_lr, lr_name="teacher_lr", parent="teacher_base")  # fmt: skip
        else:
            accelerator.print(f"{models / 'teacher'} is up to date: skipped (--force True trains it again)")

    # ---- students
    student_config = {**shared, **config.relevant("student_epochs", "student_lr", "student_dropout", "freeze_word_embeddings")}
    inputs = {"teacher": weights_fingerprint(models / "teacher")}
    if (models / "student_base").exists():
        inputs["student_base"] = weights_fingerprint(models / "student_base")
    else:
        student_config["student_layers"] = config.student_layers
    distill_config = config.relevant("temperature_start", "temperature_end", "alpha_start", "alpha_end", "hidden_loss_weight")
    stages = {
        "student_finetuned": {**made_by, "config": student_config, "inputs": inputs},
        "student_distilled": {**made_by, "config": {**student_config, **distill_config}, "inputs": inputs},
    }

    def train_student(name: str) -> None:
        stage = stages[name]
        if not config.force and is_up_to_date(models / name, stage, config.verify):
            accelerator.print(f"{models / name} is up to date: skipped (--force True trains it again)")
            return
        teacher = load_checkpoint(models / "teacher", accelerator.device)
        teacher_layers = teacher.model.config.num_hidden_layers
        set_seed(config.seed)
        if "student_base" in inputs:
            student, _ = with_new_head(DistilBertForSequenceClassification, models / "student_base", task)
            layer_map = alternate_layers(teacher_layers, student.config.n_layers)
        else:
            layer_map = alternate_layers(teacher_layers, config.student_layers)
            student = student_from_teacher(teacher.model, layer_map).to(accelerator.device)
        task.mark(student.config)
        if config.hidden_loss_weight > 0 and student.config.hidden_size != teacher.model.config.hidden_size:
            raise CompactMindError(
                f"hidden_loss_weight {config.hidden_loss_weight} needs student and teacher of one hidden size, not "
                f"{student.config.hidden_size} and {teacher.model.config.hidden_size}: use --hidden_loss_weight 0"
            )
        set_dropout(student, config.student_dropout)
        if config.freeze_word_embeddings:
            freeze_word_embeddings(student)
        data = load_splits(teacher.tokenizer)
        distilled = name == "student_distilled"
        train(
            name, student, teacher.tokenizer, data, config, accelerator, stage,
            epochs=config.student_epochs, lr=config.student_lr, lr_name="student_lr",
            parent="student_base" if "student_base" in inputs else "teacher",
            teacher_logits=cached_teacher_logits(teacher.model, teacher.fingerprint, data["train"], config.eval_batch_size,
                                                 config.models_dir, accelerator) if distilled else None,
            teacher=teacher.model if distilled else None,
            layer_map=matching_layers(teacher_layers, layer_map),
        )  # fmt: skip

    for name in config.students:
        with only_writer(models / name, accelerator):
            train_student(name)

    if all(name in config.students for name in stages):
        control, distilled = (read_manifest(models / name)["metrics"]["validation_accuracy"] for name in stages)
        accelerator.print(f"validation accuracy: control {control:.2%}, distilled {distilled:.2%} ({distilled - control:+.2%})")


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG), others=main)
