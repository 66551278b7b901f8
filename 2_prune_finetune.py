"""Prune whole attention heads and FFN neurons of the distilled student gradually, then recover, then make it really smaller.

Paper: Zhu & Gupta 2017 (cubic schedule), Michel et al. 2019 and Molchanov et al. 2019 (first-order importance).
Run:   python 2_prune_finetune.py               (after python 1_distill.py; every setting: --help)
       accelerate launch --mixed_precision bf16 2_prune_finetune.py    (several GPUs)
       python 2_prune_finetune.py --criterion l2 --target_sparsity 0.5 --output_dir student_l2_50    (side by side)
Reads: models/student_distilled, models/teacher (its logits, cached), sst2_data/{train,validation}.jsonl
Writes: models/student_pruned with training_history.json, results/student_pruned_history.png
Time:  about 2 minutes on 2 CPU cores (embedded profile). A killed run goes on at its last epoch.

Phases, epoch by epoch: warm-up (all structures) -> pruning (every `prune_every` steps the least important structures are
masked; masks are enforced after every step) -> recovery. The masked model is compacted as soon as its last structure is
chosen: the same function, checked here to 1e-5 of the largest logit or of 1, so recovery already trains at the small model's
speed.
"""

import datetime
import json
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from common import PROFILE, PruneConfig, parse_command_line, run_stage
from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.code_version import code_version
from compactmind.data import EncodedSentences, data_fingerprint, load_split
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import accuracy_of
from compactmind.forward import predict_logits
from compactmind.guards import check_outputs, check_parent, check_tokenizer
from compactmind.manifest import is_up_to_date, read_manifest, weights_fingerprint
from compactmind.methods.distillation.soft_targets import distillation_loss
from compactmind.methods.distillation.teacher_logits import cached_teacher_logits
from compactmind.methods.first_token import read_all_tokens, read_first_token_only
from compactmind.methods.pruning.encoder import layer_shapes
from compactmind.methods.pruning.importance import ImportanceScorer, LayerScores, prunable_parameters
from compactmind.methods.pruning.masks import LayerMask, apply_masks, choose_masks, compact, full_masks, sparsity_of
from compactmind.methods.pruning.schedule import cubic_sparsity
from compactmind.methods.vocabulary import same_tokenizer
from compactmind.report.figures import save_figure
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
# Every field, its reason and its range: common.PruneConfig. For example: for_profile(PROFILE, target_sparsity=0.5)
CONFIG = PruneConfig.for_profile(PROFILE)

COMPACTION_TOLERANCE = 1e-5
"""Largest allowed difference of any logit between the masked and the compacted model, as a share of the largest logit or of 1."""


# ---------------------------------------------------------------------------------------------------------------- checks
def check(config: PruneConfig) -> None:
    """Raise CompactMindError on settings that do not go together, before anything is loaded."""
    if not config.prune_start_epoch <= config.prune_end_epoch <= config.epochs:
        raise CompactMindError(
            f"epochs out of order: 1 <= prune_start_epoch {config.prune_start_epoch} <= prune_end_epoch "
            f"{config.prune_end_epoch} <= epochs {config.epochs} must hold"
        )


def phase_of(epoch: int, config: PruneConfig) -> str:
    """Return warmup, pruning or recovery for an epoch counted from 1."""
    if epoch < config.prune_start_epoch:
        return "warmup"
    return "pruning" if epoch <= config.prune_end_epoch else "recovery"


def compact_and_compare(model: torch.nn.Module, masks: list[LayerMask], validation: EncodedSentences, batch_size: int):
    """Return the smaller model and the largest difference of its logits to the masked one's. Raises if it is too large.

    Both compute in float32. Rounding grows with the logits, so a difference is judged beside the largest of them.
    """
    smaller = compact(model, masks)
    masked_logits = predict_logits(model, validation, batch_size)
    if not torch.isfinite(masked_logits).all():
        raise CompactMindError(
            "the model's logits on validation sentences are not finite: training diverged, use a smaller --lr (and look at --parent)"
        )
    difference = (predict_logits(smaller, validation, batch_size) - masked_logits).abs().max().item()
    if not difference <= COMPACTION_TOLERANCE * max(1.0, masked_logits.abs().max().item()):
        raise CompactMindError(
            f"compacted and masked model differ by {difference:.2e} on a logit: this is a bug, please report it"
        )
    return smaller, difference


# ----------------------------------------------------------------------------------------------------------------- plot
def plot_history(directory: Path, path: Path) -> None:
    """Draw validation accuracy and sparsity of a checkpoint over its epochs, phases shaded."""
    manifest = read_manifest(directory)
    history = json.loads((directory / "training_history.json").read_text(encoding="utf-8"))
    title = f"{manifest['experiment_name']}: {manifest['stage']['config']['criterion']}"
    title += f", {manifest['metrics']['sparsity']:.0%} of heads + FFN removed"
    colours = {"warmup": "#fff3d6", "pruning": "#fbdcd5", "recovery": "#dcefe0"}
    epochs = [row["epoch"] for row in history]
    figure, left = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for row in history:
        left.axvspan(row["epoch"] - 0.5, row["epoch"] + 0.5, color=colours[row["phase"]], lw=0)
    for phase in colours:
        mine = [row["epoch"] for row in history if row["phase"] == phase]
        if mine:
            left.text((min(mine) + max(mine)) / 2, 1.01, phase, ha="center", va="bottom", transform=left.get_xaxis_transform())
    left.plot(epochs, [100 * row["accuracy"] for row in history], "o-", color="#1f5fa8", label="validation accuracy")
    left.set(xlabel="epoch", ylabel="validation accuracy (%)", xlim=(min(epochs) - 0.5, max(epochs) + 0.5), xticks=epochs)
    right = left.twinx()
    right.plot(epochs, [100 * row["sparsity"] for row in history], "s--", color="#b03a2e", label="sparsity")
    right.set(ylabel="sparsity: removed share of heads + FFN (%)", ylim=(0, 100))
    figure.legend(handles=[*left.lines, *right.lines], loc="outside lower center", ncol=2, frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------- main
def main(config: PruneConfig) -> None:
    check(config)
    accelerator = make_accelerator()
    directory, source, teacher = (config.models_dir / name for name in (config.output_dir, config.parent, "teacher"))
    check_outputs([directory], "2_prune_finetune.py", [source, teacher], config.models_dir)
    check_parent(source, "--parent", "classifier")
    stage = {
        "script": "2_prune_finetune.py",
        "code": code_version(__file__),
        "config": config.relevant(
            "profile", "seed", "batch_size", "max_length", "weight_decay", "max_grad_norm", "warmup_ratio",
            "freeze_word_embeddings", "criterion", "target_sparsity", "round_to", "epochs", "prune_start_epoch",
            "prune_end_epoch", "prune_every", "dropout", "lr", "recovery_lr", "patience", "min_delta", "temperature", "alpha",
            "average_share",
        ) | accelerator_record(accelerator, config.batch_size) | {"data": data_fingerprint(config.data_dir)},
        "inputs": {
            config.parent: weights_fingerprint(source),
            **({"teacher": weights_fingerprint(teacher)} if config.alpha > 0 else {}),
        },
    }  # fmt: skip
    plot = config.results_dir / f"{config.output_dir}_history.png"
    with only_writer(directory, accelerator):
        due = config.force or not is_up_to_date(directory, stage, config.verify)
        if due:
            prune(config, accelerator, stage)
        else:
            accelerator.print(f"{directory} is up to date: skipped (--force True prunes again)")
        if accelerator.is_main_process and (due or not plot.is_file()):
            plot_history(directory, plot)
            print(f"plot {plot}")


def prune(config: PruneConfig, accelerator: Accelerator, stage: dict) -> None:
    """Prune and recover the parent, and save the result as models/<output_dir>."""
    directory = config.models_dir / config.output_dir

    # ---- data and models
    parent = load_checkpoint(config.models_dir / config.parent, accelerator.device)
    model = parent.model
    check_tokenizer(model, parent.tokenizer, config.models_dir / config.parent, padding=True)
    splits = {
        name: EncodedSentences(parent.tokenizer, load_split(config.data_dir, name), config.max_length)
        for name in ("train", "validation")
    }
    accelerator.print(f"train: {splits['train'].describe_cut()}")
    teacher_logits = None
    if config.alpha > 0:
        teacher = load_checkpoint(config.models_dir / "teacher", accelerator.device)
        read_by_teacher = splits["train"]
        if not same_tokenizer(teacher.tokenizer, parent.tokenizer):
            read_by_teacher = EncodedSentences(teacher.tokenizer, load_split(config.data_dir, "train"), config.max_length)
        teacher_logits = cached_teacher_logits(
            teacher.model, teacher.fingerprint, read_by_teacher, config.eval_batch_size, config.models_dir, accelerator
        )
        del teacher
    if config.freeze_word_embeddings:
        freeze_word_embeddings(model)
    set_dropout(model, config.dropout)
    read_first_token_only(model)
    set_seed(config.seed)
    masks = full_masks(model)
    dense_parameters, dense_shapes = prunable_parameters(model), layer_shapes(model)
    try:  # with any scores: what can be reached does not depend on the ranking
        choose_masks(model, ImportanceScorer(model, "l2").scores(), masks, config.target_sparsity, config.round_to)
    except ValueError as error:
        raise CompactMindError(f"{error}: use a smaller --target_sparsity or --round_to") from None
    accelerator.print(
        f"{config.parent}: {dense_parameters / 1e6:.2f} M prunable parameters in {len(dense_shapes)} layers, "
        f"removing {config.target_sparsity:.0%} by {config.criterion}"
    )

    # ---- the plan in steps
    steps_per_epoch = math.ceil(len(splits["train"]) / (config.batch_size * accelerator.num_processes))
    begin_step = (config.prune_start_epoch - 1) * steps_per_epoch
    end_step = config.prune_end_epoch * steps_per_epoch
    last_event = begin_step + (end_step - begin_step - 1) // config.prune_every * config.prune_every
    total_steps = config.epochs * steps_per_epoch
    if last_event == begin_step:
        raise CompactMindError(
            f"no room to prune gradually: prune_every {config.prune_every} is not below the {end_step - begin_step} steps from "
            f"epoch {config.prune_start_epoch} to {config.prune_end_epoch}; use a smaller --prune_every"
        )

    def start_phase(recovering: bool):
        """Return optimizer, schedule and average of a phase: constant rate and the weights as they are up to the end of
        pruning, then a decaying rate and averaged weights."""
        optimizer = make_optimizer(model, config.recovery_lr if recovering else config.lr, config.weight_decay)
        if recovering:
            steps = total_steps - end_step
            average = WeightAverage(model, decay=1 - 1 / max(1, config.average_share * steps))
            return optimizer, linear_decay_with_warmup(optimizer, 0, steps), average
        warmup_steps = max(1, int(config.warmup_ratio * end_step))
        rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps))
        return optimizer, rise, WeightAverage(model, decay=0)

    # ---- resume: the state of the last finished epoch, if this very stage was interrupted
    resume = TrainingState(directory, stage)
    history: list[dict] = []
    best = {"accuracy": -1.0, "weights": None, "epoch": 0}
    difference = None
    saved = resume.load()
    if saved:
        history, best, difference = saved["history"], saved["best"], saved["difference"]
        masks = [LayerMask(heads, neurons) for heads, neurons in saved["masks"]]
        if difference is not None:
            model = compact(model, masks)
            set_dropout(model, config.dropout)
        model.load_state_dict(saved["model"])
        read_first_token_only(model)
        accelerator.print(f"{config.output_dir}: going on after epoch {len(history)} of {config.epochs}")
    recovering = len(history) >= config.prune_end_epoch
    optimizer, scheduler, average = start_phase(recovering)
    if saved:
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
    scorer = ImportanceScorer(model, config.criterion, config.seed)
    if saved and difference is None:
        scorer.observed = [LayerScores(heads, neurons) for heads, neurons in saved["observed"]]
    wrapped, optimizer = prepare_for_training(accelerator, model, optimizer)

    # ---- loop
    progress = Progress(
        config.output_dir, total_steps, config.log_every, len(history) * steps_per_epoch, accelerator.is_main_process
    )
    sparsity = history[-1]["sparsity"] if history else 0.0
    for epoch in range(len(history) + 1, config.epochs + 1):
        if recovering and len(history) - best["epoch"] >= config.patience:
            progress.write(f"{config.output_dir:<18} stopped early: no better validation accuracy for {config.patience} epochs")
            break
        started, losses = time.perf_counter(), []
        phase = phase_of(epoch, config)
        first_step, lr_name = progress.step + 1, "recovery_lr" if recovering else "lr"
        reason = (f"{config.output_dir}, epoch {epoch} ({phase})", f"{lr_name} {getattr(config, lr_name):g}")
        set_seed(config.seed + epoch, device_specific=True)  # a resumed run is the same run
        loader = splits["train"].training_batches(config.batch_size, config.seed + epoch, accelerator.num_processes)
        batches = accelerator.prepare(loader)
        wrapped.train()
        for batch in batches:
            with accelerator.autocast():
                logits = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
                targets = teacher_logits[batch["rows"].cpu()].to(accelerator.device) if teacher_logits is not None else None
                loss = distillation_loss(logits, targets, batch["labels"], config.temperature, config.alpha)
            accelerator.backward(loss)
            if difference is None:
                scorer.observe(accelerator.scaler.get_scale() if accelerator.scaler else 1.0)
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            progress.update(
                losses[-1],
                scheduler.get_last_lr()[0],
                len(batch["labels"]) * accelerator.num_processes,
                sparsity=sparsity,
            )

            # Masks: re-applied after every step, tightened every `prune_every` steps.
            if phase == "pruning" and difference is None:
                since = progress.step - 1 - begin_step
                if since % config.prune_every == 0 and since > 0:
                    due = cubic_sparsity(progress.step - 1, begin_step, last_event, config.target_sparsity)
                    masks = choose_masks(model, scorer.scores(), masks, due, config.round_to)
                    sparsity = sparsity_of(model, masks)
                    scorer.reset()
                apply_masks(model, masks)
            average.update(model)
            if progress.step % config.log_every == 0:
                mean_loss(losses, accelerator, first_step, *reason)

        epoch_loss = mean_loss(losses, accelerator, first_step, *reason)
        if epoch == config.prune_end_epoch:
            model, difference = compact_and_compare(model, masks, splits["validation"], config.eval_batch_size)
            accelerator.free_memory()
            set_dropout(model, config.dropout)
            read_first_token_only(model)
            average = WeightAverage(model, decay=0)
            if epoch < config.epochs:
                recovering = True
                optimizer, scheduler, average = start_phase(recovering)
                wrapped, optimizer = prepare_for_training(accelerator, model, optimizer)
            progress.write(
                f"{config.output_dir:<18} compacted: {len(splits['validation'])} logits differ by at most {difference:.1e} from the "
                f"masked model; heads {[s['num_heads'] for s in layer_shapes(model)]}, "
                f"FFN {[s['intermediate_size'] for s in layer_shapes(model)]}"
            )
        with average.applied_to(model):
            logits = validation_logits(model, splits["validation"], config.eval_batch_size, accelerator, *reason)
            accuracy = accuracy_of(logits, splits["validation"].labels)
            # The best epoch counts from the moment the target sparsity is reached.
            if epoch >= config.prune_end_epoch and accuracy > best["accuracy"] + (config.min_delta if best["epoch"] else 0.0):
                best = {"accuracy": accuracy, "weights": cpu_copy(model.state_dict()), "epoch": epoch}
        history.append(
            {
                "epoch": epoch,
                "phase": phase,
                "loss": epoch_loss,
                "accuracy": accuracy,
                "sparsity": sparsity,
                "lr": scheduler.get_last_lr()[0],
                "temperature": config.temperature if teacher_logits is not None else None,
                "alpha": config.alpha if teacher_logits is not None else None,
                "seconds": time.perf_counter() - started,
            }
        )
        progress.write(
            f"{config.output_dir:<18} epoch {epoch}/{config.epochs} {phase} | loss {history[-1]['loss']:7.4f} | "
            f"validation accuracy {accuracy:6.2%} | sparsity {sparsity:6.2%} | {history[-1]['seconds']:.0f} s"
        )
        if accelerator.is_main_process:
            resume.save(
                model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), history=history,
                masks=[(mask.heads, mask.neurons) for mask in masks], best=best, difference=difference, average=average.state_dict(),
                observed=[(score.heads, score.neurons) for score in scorer.observed],
                scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
            )  # fmt: skip
    progress.close()

    # ---- save
    model.load_state_dict(best["weights"])
    read_all_tokens(model)
    if not accelerator.is_main_process:
        return
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = config.experiment_name or f"{config.output_dir}_{config.criterion}_{config.target_sparsity:g}_{now}"
    save_checkpoint(
        directory, model, parent.tokenizer, kind="pruned", parent=config.parent, stage=stage, history=history,
        metrics={"validation_accuracy": best["accuracy"], "best_epoch": best["epoch"], "sparsity": sparsity,
                 "masked_against_compacted": difference},
        data_fingerprint=data_fingerprint(config.data_dir), extra={"experiment_name": name},
        beside=config.models_dir / config.parent,
    )  # fmt: skip
    resume.clear()
    print(
        f"{config.output_dir}: {1 - prunable_parameters(model) / dense_parameters:.1%} of the prunable parameters removed, "
        f"validation accuracy {best['accuracy']:.2%} (epoch {best['epoch']})\nsaved to {directory}"
    )
    warn_of_chance(config.output_dir, best["accuracy"], splits["validation"].labels, accelerator)


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG), others=main)
