"""Prune whole attention heads and FFN neurons of the distilled student gradually, then recover, then make it really smaller.

Paper: Zhu & Gupta 2017 (cubic schedule), Michel et al. 2019 and Molchanov et al. 2019 (first-order importance).
Run:   python 2_prune_finetune.py               (after python 1_distill.py; every setting: --help)
       accelerate launch --mixed_precision bf16 2_prune_finetune.py    (several GPUs)
       python 2_prune_finetune.py --criterion l2 --target_sparsity 0.5 --output_dir student_l2_50    (side by side)
       python 2_prune_finetune.py --target_speedups 2 4 8          (a family: models/student_pruned_2x, _4x, _8x; docs/families.md)
       python 2_prune_finetune.py --pattern 2:4    (two of every four weights are zero, for GPUs: models/student_pruned_2to4)
       python 2_prune_finetune.py --seeds 5        (each model with five seeds: a median and a spread in the report; docs/families.md)
Reads: models/student_distilled, models/teacher (its logits, cached), sst2_data/{train,validation}.jsonl
Writes: models/student_pruned with training_history.json, results/student_pruned_history.png
Time:  about 2 minutes on 2 CPU cores (embedded profile). A killed run goes on at its last epoch.

Phases, epoch by epoch: warm-up (all structures) -> pruning (every `prune_every` steps the least important structures are
masked; masks are enforced after every step) -> recovery. The masked model is compacted as soon as its last structure is
chosen: the same function, checked here to 1e-5 of the largest logit or of 1, so recovery already trains at the small model's
speed.
"""

import datetime
from copy import deepcopy
from dataclasses import asdict, replace

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR

from common import PROFILE, PruneConfig, parse_command_line, run_stage
from compactmind.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from compactmind.classifier_room import require_room_for
from compactmind.code_version import code_version
from compactmind.data import EncodedSentences, data_fingerprint, load_split, model_inputs
from compactmind.devices import number_of_processes
from compactmind.errors import CompactMindError
from compactmind.evaluation.family import Goal, goals_of, share_of_cost, target_of
from compactmind.guards import check_outputs, check_parent, check_tokenizer
from compactmind.loop import EpochLoop, FirstBest
from compactmind.manifest import is_up_to_date, read_manifest, weights_fingerprint
from compactmind.methods.distillation.soft_targets import distillation_loss, hidden_state_loss
from compactmind.methods.distillation.student import matching_layers
from compactmind.methods.distillation.transfer_set import SETTINGS, read_with_teacher, unlabelled_record, unlabelled_texts
from compactmind.methods.first_token import read_all_tokens, read_first_token_only
from compactmind.methods.pruning.encoder import block_linears, layer_shapes
from compactmind.methods.pruning.importance import ImportanceScorer, LayerScores, prunable_parameters
from compactmind.methods.pruning.masks import LayerMask, apply_masks, compact, compact_and_compare, full_masks
from compactmind.methods.pruning.schedule import cubic_sparsity
from compactmind.methods.pruning.two_of_four import PATTERN, apply_pattern, is_two_of_four, share_of_zeros
from compactmind.report.history import plot_history
from compactmind.seeds import format_spread, repeats_record, runs_of
from compactmind.task import read_task
from compactmind.trained_on import check_trained_on
from compactmind.training import (
    accelerator_record,
    freeze_word_embeddings,
    linear_decay_with_warmup,
    make_accelerator,
    only_writer,
    set_dropout,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.PruneConfig. For example: for_profile(PROFILE, target_sparsity=0.5)
CONFIG = PruneConfig.for_profile(PROFILE)

STRUCTURED = ("criterion", "round_to", "prune_start_epoch", "prune_end_epoch", "prune_every", "lr")
"""Settings of heads and neurons that go, which a pattern has no use for."""


# ---------------------------------------------------------------------------------------------------------------- checks
def check(config: PruneConfig) -> None:
    """Raise CompactMindError on settings that do not go together, before anything is loaded."""
    if config.unlabelled and not config.alpha:
        raise CompactMindError(f"unlabelled {config.unlabelled} is learnt from the teacher, and alpha is 0: raise --alpha")
    if config.pattern == PATTERN:
        if config.target_speedups or config.target_gflops:
            raise CompactMindError(f"pattern {PATTERN} leaves every head and neuron, so no family can be made by it: leave one of both out")
        return
    if not config.prune_start_epoch <= config.prune_end_epoch <= config.epochs:
        raise CompactMindError(
            f"epochs out of order: 1 <= prune_start_epoch {config.prune_start_epoch} <= prune_end_epoch "
            f"{config.prune_end_epoch} <= epochs {config.epochs} must hold"
        )
    if config.target_speedups and config.target_gflops:
        raise CompactMindError("a family is made by target_speedups or by target_gflops, not by both: leave one of them out")
    if config.target_speedups and number_of_processes() > 1:
        raise CompactMindError(
            "target_speedups are measured, by one process that has the machine for itself: run without a launcher, or use --target_gflops"
        )


def family_of(config: PruneConfig) -> dict[str, Goal | None]:
    """Return what is made, directory -> goal, from the gentlest to the strongest; without targets one model by target_sparsity."""
    goals = {f"{config.output_dir}_{goal.name}": goal for goal in goals_of(config.target_speedups, config.target_gflops)}
    return goals or {f"{config.output_dir}{'_2to4' if config.pattern == PATTERN else ''}": None}


def selection_of(config: PruneConfig) -> FirstBest:
    """Return which epoch of recovery is kept."""
    return FirstBest(config.min_delta, read_task(config.data_dir).metric)


# ----------------------------------------------------------------------------------------------------------------- main
def main(config: PruneConfig) -> None:
    check(config)
    accelerator = make_accelerator()
    parent, source, teacher, family = config.parent, config.models_dir / config.parent, config.models_dir / "teacher", family_of(config)
    runs = {name: runs_of(name, config.seed, config.seeds) for name in family}
    outputs = [config.models_dir / run for each in runs.values() for run in each]
    check_outputs(outputs, "2_prune_finetune.py", [source, teacher], config.models_dir)
    check_parent(source, "--parent", "classifier")
    check_trained_on([source, teacher] if config.alpha > 0 else [source], config.data_dir)
    for name, goal in family.items():  # each goes on from the one before it, with every seed
        for run, seed in runs[name].items():
            own = replace(config, parent=parent, output_dir=run, seed=seed)
            make(own, accelerator, goal, config.parent, [*family.values()][-1], repeats_record(name, run))
        if config.seeds > 1:
            reached = [read_manifest(config.models_dir / run)["metrics"]["validation_accuracy"] for run in runs[name]]
            accelerator.print(f"{name}, {config.seeds} seeds: validation accuracy {format_spread(reached)}")
        parent = name


def make(
    config: PruneConfig, accelerator: Accelerator, goal: Goal | None, dense: str, hardest: Goal | None, repeats: dict[str, str]
) -> None:
    """Make models/<output_dir> of the parent unless it is up to date, and plot its history.

    `dense`: the model a goal is a share of. `hardest`: the strongest goal of the family. `repeats`: of what it is another seed.
    """
    directory, pattern = config.models_dir / config.output_dir, config.pattern == PATTERN
    read = {config.parent, *([dense] if goal or config.hidden_loss_weight else []), *(["teacher"] if config.alpha > 0 else [])}
    stage = {
        "script": "2_prune_finetune.py",
        "code": code_version(__file__),
        "config": config.relevant(
            "profile", "seed", "batch_size", "max_length", "weight_decay", "max_grad_norm", "warmup_ratio",
            "freeze_word_embeddings", "epochs", "dropout", "recovery_lr", "patience", "min_delta", "temperature", "alpha",
            "average_share", "hidden_loss_weight", *(("pattern",) if pattern else STRUCTURED),
            *(("cost_length",) if goal else () if pattern else ("target_sparsity",)),
        ) | accelerator_record(accelerator, config.batch_size)
        | {"selection": str(selection_of(config)), "data": data_fingerprint(config.data_dir)} | unlabelled_record(config.unlabelled)
        | ({"goal": asdict(goal)} if goal else {}),
        "inputs": {name: weights_fingerprint(config.models_dir / name) for name in sorted(read)},
    }  # fmt: skip
    plot = config.results_dir / f"{config.output_dir}_history.png"
    with only_writer(directory, accelerator):
        due = config.force or not is_up_to_date(directory, stage, config.verify)
        if due:
            require_room_for("2_prune_finetune.py", config)
            if pattern:
                prune_to_pattern(config, accelerator, stage, repeats)
            else:
                prune(config, accelerator, stage, goal, dense, hardest, repeats)
        else:
            accelerator.print(f"{directory} is up to date: skipped (--force True prunes again)")
        if accelerator.is_main_process and (due or not plot.is_file()):
            plot_history(directory, plot)
            print(f"plot {plot}")


def read_all(config: PruneConfig, accelerator: Accelerator) -> tuple[Checkpoint, dict[str, EncodedSentences], torch.Tensor | None]:
    """Return the parent, what is read by split, and the teacher's logits of what is trained on if they are learnt from."""
    parent = load_checkpoint(config.models_dir / config.parent, accelerator.device)
    check_tokenizer(parent.model, parent.tokenizer, config.models_dir / config.parent, padding=True)
    labelled = load_split(config.data_dir, "train")
    splits = {"validation": EncodedSentences(parent.tokenizer, load_split(config.data_dir, "validation"), config.max_length)}
    if config.alpha:
        texts = unlabelled_texts(config.unlabelled, config.data_dir, read_task(config.data_dir), accelerator.print)
        teacher = load_checkpoint(config.models_dir / "teacher", accelerator.device)
        splits["train"], logits = read_with_teacher(
            lambda _: [*labelled, *texts], len(labelled), parent.tokenizer, teacher, accelerator, **config.relevant(*SETTINGS)
        )
    else:
        splits["train"], logits = EncodedSentences(parent.tokenizer, labelled, config.max_length), None
    accelerator.print(f"train: {splits['train'].describe_cut()}")
    return parent, splits, logits


def ready(model: torch.nn.Module, config: PruneConfig) -> torch.nn.Module:
    """Return the model as it is trained, changed in place."""
    set_dropout(model, config.dropout)
    if not config.hidden_loss_weight:  # which reads all tokens of all layers
        read_first_token_only(model)
    return model


def training_loss(
    config: PruneConfig, loop: EpochLoop, batch: dict[str, torch.Tensor], teacher_logits: torch.Tensor | None,
    dense: torch.nn.Module, masks: list[LayerMask],
) -> torch.Tensor:  # fmt: skip
    """Return the loss of a batch: labels, the teacher's logits, and the hidden states of `dense`, each by its weight."""
    hidden, device = config.hidden_loss_weight > 0, loop.accelerator.device
    with loop.accelerator.autocast():
        output = loop.wrapped(**model_inputs(batch, loop.wrapped), **({"output_hidden_states": True} if hidden else {}))
        targets = teacher_logits[batch["rows"].cpu()].to(device) if teacher_logits is not None else None
        loss = distillation_loss(output.logits.float(), targets, batch["labels"], config.temperature, config.alpha)
        if hidden:  # a layer also does the work of those after it that are gone
            left = [index for index, mask in enumerate(masks) if mask.heads.any() or mask.neurons.any()]
            with torch.no_grad():
                states = dense(**model_inputs(batch, dense), output_hidden_states=True).hidden_states
            own = (output.hidden_states[0], *(output.hidden_states[index + 1] for index in left))
            loss = loss + config.hidden_loss_weight * hidden_state_loss(
                own, states, matching_layers(len(masks), left), batch["attention_mask"]
            )
    return loss


def prune(
    config: PruneConfig, accelerator: Accelerator, stage: dict, goal: Goal | None, dense_name: str, hardest: Goal | None,
    repeats: dict[str, str],
) -> None:  # fmt: skip
    """Prune and recover the parent, to its target sparsity or to a goal, and save the result as models/<output_dir>."""
    directory = config.models_dir / config.output_dir

    # ---- data and models
    parent, splits, teacher_logits = read_all(config, accelerator)
    model = parent.model
    # What stays as it is beside the model: the parent of a family, whose cost is shared out, and whose hidden states are to be kept.
    beside = goal is not None or config.hidden_loss_weight > 0
    dense = load_checkpoint(config.models_dir / dense_name, accelerator.device).model if beside else model
    if config.freeze_word_embeddings:
        freeze_word_embeddings(model)
    set_seed(config.seed)
    place = (config.cost_length, config.models_dir)
    target_of(hardest, config.target_sparsity, config.round_to, dense, dense, *place)  # said before the first of a family is begun
    target = target_of(goal, config.target_sparsity, config.round_to, model, dense, *place)
    dense_parameters = prunable_parameters(dense)
    masks, sparsity, difference, reached = full_masks(model), 0.0, None, None
    accelerator.print(
        f"{config.parent}: {prunable_parameters(model) / 1e6:.2f} M prunable parameters in {len(masks)} layers, removing "
        + (f"{target.end:.0%}" if goal is None else f"{target.end:.0%} of {target.start:.4g} {target.table.unit}")
        + f" by {config.criterion}"
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
        loop.begin(
            ready(model, config), ("lr", config.lr),
            lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps)),
        )  # fmt: skip

    def begin_recovery(model: torch.nn.Module) -> None:
        """Train the small model at a rate that decays to 0; the weights are averaged."""
        steps = loop.total_steps - end_step
        loop.begin(
            ready(model, config), ("recovery_lr", config.recovery_lr),
            lambda optimizer: linear_decay_with_warmup(optimizer, 0, steps), average_steps=config.average_share * steps,
        )  # fmt: skip

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return training_loss(config, loop, batch, teacher_logits, dense, masks)

    def cost_of(masks: list[LayerMask]) -> float:
        return share_of_cost(goal, compact(model, masks), dense, config.cost_length)

    # ---- go on where a killed run was, or begin
    if loop.own:
        masks, difference = [LayerMask(*each) for each in loop.own["masks"]], loop.own["difference"]
        sparsity, reached = loop.history[-1]["sparsity"], loop.own["reached"]
        if goal:
            target.budget = loop.own["budget"]
    elif goal:  # what the table is wrong by is known before pruning begins: with any scores, on a copy
        scores = ImportanceScorer(model, "l2").scores()
        target.settled(deepcopy(model), scores, target.tightened(model, scores, masks, target.end), cost_of)
    if len(loop.history) >= config.prune_end_epoch:  # what goes was chosen before
        model = compact(model, masks)
        begin_recovery(model)
    else:
        begin_pruning(model)
        scorer = ImportanceScorer(model, config.criterion, config.seed)
        scores = scorer.scores()
        if loop.own:
            scorer.observed = [LayerScores(*each) for each in loop.own["observed"]]
            scores = [LayerScores(*each) for each in loop.own["scores"]]

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
                        scores, due = scorer.scores(), cubic_sparsity(step, begin_step, last_event, target.end)
                        masks = target.tightened(model, scores, masks, due)
                        sparsity = target.removed(model, masks)
                        scorer.reset()
                    apply_masks(model, masks)
            if epoch == config.prune_end_epoch:
                if goal:  # a table says what should be cheap enough, a clock whether it is
                    masks, reached = target.settled(model, scores, masks, cost_of)
                    sparsity = target.removed(model, masks)
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
                "observed": [(score.heads, score.neurons) for score in scorer.observed], "reached": reached,
                "scores": [(score.heads, score.neurons) for score in scores], "budget": target.budget if goal else None,
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
    if accelerator.is_main_process:
        cost = {} if goal is None else {"speedup_measured": 1 / reached} if goal.measured else {"gflops_share": reached}
        end, now = goal.name if goal else f"{config.target_sparsity:g}", datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        save_checkpoint(
            directory, model, parent.tokenizer, kind="pruned", parent=config.parent, stage=stage, history=loop.history,
            metrics={**loop.metrics(), "sparsity": sparsity, "masked_against_compacted": difference, **cost},
            data_fingerprint=data_fingerprint(config.data_dir), beside=config.models_dir / config.parent,
            extra={"experiment_name": config.experiment_name or f"{config.output_dir}_{config.criterion}_{end}_{now}", **repeats},
        )  # fmt: skip
        parts = [f"{1 - prunable_parameters(model) / dense_parameters:.1%} of the prunable parameters removed"]
        print(f"{config.output_dir}: " + ", ".join(parts + [f"{name} {value:.3g}" for name, value in cost.items()]))
        if goal and reached > 1.05 * goal.share:
            print(f"warning: {config.output_dir} was to cost {goal.share:.3g} of {config.parent} and costs {reached:.3g}: no more could go")
        loop.clear(directory)
    accelerator.wait_for_everyone()


def prune_to_pattern(config: PruneConfig, accelerator: Accelerator, stage: dict, repeats: dict[str, str]) -> None:
    """Zero two of every four weights of the parent's blocks, the smaller ones, train the others, and save models/<output_dir>."""
    directory = config.models_dir / config.output_dir
    parent, splits, teacher_logits = read_all(config, accelerator)
    model = parent.model
    dense = deepcopy(model).eval() if config.hidden_loss_weight else model
    if config.freeze_word_embeddings:
        freeze_word_embeddings(model)
    set_seed(config.seed)
    linears, masks = block_linears(model), full_masks(model)
    held, sparsity = apply_pattern(linears), share_of_zeros(linears.values())
    accelerator.print(f"{config.parent}: {sparsity:.0%} of the weights of {len(linears)} linears are zero and stay so")

    loop = EpochLoop(
        config.output_dir, directory, stage, accelerator, splits["train"], splits["validation"], selection_of(config),
        **config.relevant("epochs", "batch_size", "eval_batch_size", "seed", "weight_decay", "max_grad_norm", "log_every"),
    )  # fmt: skip
    warmup_steps = int(config.warmup_ratio * loop.total_steps)
    loop.begin(
        ready(model, config), ("recovery_lr", config.recovery_lr),
        lambda optimizer: linear_decay_with_warmup(optimizer, warmup_steps, loop.total_steps),
        average_steps=config.average_share * loop.total_steps,
    )  # fmt: skip
    soft = {"temperature": config.temperature, "alpha": config.alpha} if config.alpha > 0 else {}
    for _ in loop.epochs("recovery", config.epochs, config.patience):
        for batch in loop.batches():
            loop.backward(training_loss(config, loop, batch, teacher_logits, dense, masks))
            loop.step(sparsity=sparsity)
            held.zero_again()
        loop.row |= {"sparsity": sparsity, **soft}

    model = loop.finish()
    read_all_tokens(model)
    if accelerator.is_main_process:
        if not all(is_two_of_four(linear.weight) for linear in linears.values()):
            raise CompactMindError(f"{directory} was not written: its weights are not {PATTERN}; this is a bug, please report it")
        name = config.experiment_name or f"{config.output_dir}_{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}"
        save_checkpoint(
            directory, model, parent.tokenizer, kind=parent.manifest["kind"], parent=config.parent, stage=stage, history=loop.history,
            metrics={**loop.metrics(), "sparsity": sparsity}, data_fingerprint=data_fingerprint(config.data_dir),
            beside=config.models_dir / config.parent, extra={"experiment_name": name, "sparsity_pattern": PATTERN, **repeats},
        )  # fmt: skip
        loop.clear(directory)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG), others=main)
