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
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR

from common import PROFILE, PruneConfig, parse_command_line, run_stage
from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.code_version import code_version
from compactmind.data import EncodedSentences, data_fingerprint, load_split
from compactmind.errors import CompactMindError
from compactmind.forward import predict_logits
from compactmind.guards import check_outputs, check_parent, check_tokenizer
from compactmind.loop import EpochLoop, FirstBest, inputs_of
from compactmind.manifest import is_up_to_date, read_manifest, weights_fingerprint
from compactmind.methods.distillation.soft_targets import distillation_loss
from compactmind.methods.distillation.teacher_logits import cached_teacher_logits
from compactmind.methods.first_token import read_all_tokens, read_first_token_only
from compactmind.methods.pruning.encoder import layer_shapes
from compactmind.methods.pruning.importance import ImportanceScorer, LayerScores, prunable_parameters
from compactmind.methods.pruning.masks import LayerMask, apply_masks, choose_masks, compact, full_masks, sparsity_of
from compactmind.methods.pruning.schedule import cubic_sparsity
from compactmind.report.figures import save_figure
from compactmind.training import (
    accelerator_record,
    freeze_word_embeddings,
    linear_decay_with_warmup,
    make_accelerator,
    only_writer,
    set_dropout,
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


def selection_of(config: PruneConfig) -> FirstBest:
    """Return which epoch of recovery is kept."""
    return FirstBest(config.min_delta)


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
        ) | accelerator_record(accelerator, config.batch_size)
        | {"selection": str(selection_of(config)), "data": data_fingerprint(config.data_dir)},
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
        teacher_logits = cached_teacher_logits(
            teacher.model, teacher.fingerprint, splits["train"], config.eval_batch_size, config.models_dir, accelerator
        )
        del teacher
    if config.freeze_word_embeddings:
        freeze_word_embeddings(model)
    set_seed(config.seed)
    dense_parameters, dense_shapes = prunable_parameters(model), layer_shapes(model)
    masks, sparsity, difference = full_masks(model), 0.0, None
    try:  # with any scores: what can be reached does not depend on the ranking
        choose_masks(model, ImportanceScorer(model, "l2").scores(), masks, config.target_sparsity, config.round_to)
    except ValueError as error:
        raise CompactMindError(f"{error}: use a smaller --target_sparsity or --round_to") from None
    accelerator.print(
        f"{config.parent}: {dense_parameters / 1e6:.2f} M prunable parameters in {len(dense_shapes)} layers, "
        f"removing {config.target_sparsity:.0%} by {config.criterion}"
    )

    # ---- the plan in steps
    loop = EpochLoop(
        config.output_dir, directory, stage, accelerator, splits["train"], splits["validation"], selection_of(config),
        first_kept=config.prune_end_epoch,  # from the moment the target sparsity is reached
        **config.relevant("epochs", "batch_size", "eval_batch_size", "seed", "weight_decay", "max_grad_norm", "log_every"),
    )  # fmt: skip
    begin_step = (config.prune_start_epoch - 1) * loop.steps_per_epoch
    end_step = config.prune_end_epoch * loop.steps_per_epoch
    last_event = begin_step + (end_step - begin_step - 1) // config.prune_every * config.prune_every
    if last_event == begin_step:
        raise CompactMindError(
            f"no room to prune gradually: prune_every {config.prune_every} is not below the {end_step - begin_step} steps from "
            f"epoch {config.prune_start_epoch} to {config.prune_end_epoch}; use a smaller --prune_every"
        )

    def begin_pruning(model: torch.nn.Module) -> None:
        """Train at a rate that rises over the warm-up steps and stays; the weights are kept as they are."""
        warmup_steps = max(1, int(config.warmup_ratio * end_step))
        set_dropout(model, config.dropout)
        read_first_token_only(model)
        loop.begin(model, ("lr", config.lr), lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps)))

    def begin_recovery(model: torch.nn.Module) -> None:
        """Train the small model at a rate that decays to 0; the weights are averaged."""
        steps = loop.total_steps - end_step
        set_dropout(model, config.dropout)
        read_first_token_only(model)
        loop.begin(
            model, ("recovery_lr", config.recovery_lr), lambda optimizer: linear_decay_with_warmup(optimizer, 0, steps),
            average_steps=config.average_share * steps,
        )  # fmt: skip

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with accelerator.autocast():
            logits = loop.wrapped(**inputs_of(batch)).logits.float()
            targets = teacher_logits[batch["rows"].cpu()].to(accelerator.device) if teacher_logits is not None else None
            return distillation_loss(logits, targets, batch["labels"], config.temperature, config.alpha)

    # ---- go on where a killed run was, or begin
    if loop.own:
        masks, difference = [LayerMask(*each) for each in loop.own["masks"]], loop.own["difference"]
        sparsity = loop.history[-1]["sparsity"]
    if difference is not None:
        model = compact(model, masks)
        begin_recovery(model)
    else:
        begin_pruning(model)
        scorer = ImportanceScorer(model, config.criterion, config.seed)
        if loop.own:
            scorer.observed = [LayerScores(*each) for each in loop.own["observed"]]

    # ---- prune gradually, and make the model really smaller when the last structure is chosen
    soft = {"temperature": config.temperature, "alpha": config.alpha} if config.alpha > 0 else {}
    for phase, last in (("warmup", config.prune_start_epoch - 1), ("pruning", config.prune_end_epoch)):
        for epoch in loop.epochs(phase, last):
            for batch in loop.batches():
                loop.backward(loss_of(batch))
                scorer.observe(loop.loss_scale)
                loop.step(sparsity=sparsity)
                if phase == "pruning":  # masks: re-applied after every step, tightened every `prune_every` steps
                    step = loop.progress.step - 1
                    if step > begin_step and (step - begin_step) % config.prune_every == 0:
                        due = cubic_sparsity(step, begin_step, last_event, config.target_sparsity)
                        masks = choose_masks(model, scorer.scores(), masks, due, config.round_to)
                        sparsity = sparsity_of(model, masks)
                        scorer.reset()
                    apply_masks(model, masks)
            if epoch == config.prune_end_epoch:
                model, difference = compact_and_compare(model, masks, splits["validation"], config.eval_batch_size)
                begin_recovery(model)
                loop.progress.write(
                    f"{config.output_dir:<18} compacted: {len(splits['validation'])} logits differ by at most {difference:.1e} from "
                    f"the masked model; heads {[s['num_heads'] for s in layer_shapes(model)]}, "
                    f"FFN {[s['intermediate_size'] for s in layer_shapes(model)]}"
                )
            loop.row |= {"sparsity": sparsity, **soft}
            loop.own = {
                "masks": [(mask.heads, mask.neurons) for mask in masks], "difference": difference,
                "observed": [(score.heads, score.neurons) for score in scorer.observed],
            }  # fmt: skip

    # ---- recover
    for _ in loop.epochs("recovery", config.epochs, config.patience):
        for batch in loop.batches():
            loop.backward(loss_of(batch))
            loop.step(sparsity=sparsity)
        loop.row |= {"sparsity": sparsity, **soft}

    # ---- save
    model = loop.finish()
    read_all_tokens(model)
    if not accelerator.is_main_process:
        return
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = config.experiment_name or f"{config.output_dir}_{config.criterion}_{config.target_sparsity:g}_{now}"
    save_checkpoint(
        directory, model, parent.tokenizer, kind="pruned", parent=config.parent, stage=stage, history=loop.history,
        metrics={**loop.metrics(), "sparsity": sparsity, "masked_against_compacted": difference},
        data_fingerprint=data_fingerprint(config.data_dir), extra={"experiment_name": name},
        beside=config.models_dir / config.parent,
    )  # fmt: skip
    print(f"{config.output_dir}: {1 - prunable_parameters(model) / dense_parameters:.1%} of the prunable parameters removed")
    loop.clear(directory)


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG), others=main)
