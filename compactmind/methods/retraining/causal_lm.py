"""Retrain a pruned Llama as a causal language model, on text alone or distilled from the dense model it was cut from.

What is minimised: loss.py. What is trained, all weights or adapters beside them: trainable.py. For how long, on what and at what rate:
recipe.py.

Held-out text decides which weights are kept, and the weights that came in take part: the model is never returned worse than it came. What
learns from the dense model alone is chosen by KL to it, what learns from the text as well by the loss on it.

Every process holds all of the model, or in full training its share of it (sharding.py). Left out: packing of documents with masks between
them.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.forward import LARGEST_LOSS, divergences_of, loss_of, next_token_logits, window_losses
from compactmind.methods.llama import llama_blocks
from compactmind.methods.pruning.two_of_four import HeldZeros, sparse_weight_names
from compactmind.methods.retraining.loss import RetrainingLoss, TeacherStates
from compactmind.methods.retraining.recipe import RetrainRecipe, batch_rows, cosine_decay_with_warmup, plan_steps, windows_read
from compactmind.methods.retraining.sharding import (
    autocast,
    check_sharding,
    gather,
    load_own_moments,
    own_moments,
    own_share,
    shard,
)
from compactmind.methods.retraining.trainable import load_trainable, ready_to_train, trainable_copy
from compactmind.precision import is_widened
from compactmind.training import Progress, TrainingState, are_finite, make_accelerator, make_optimizer, trains_sharded


# --------------------------------------------------------------------------------------------------------------- checks
def check_inputs(
    model: PreTrainedModel,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    recipe: RetrainRecipe,
    teacher: PreTrainedModel | None,
    known: bool = False,
) -> None:
    """Raise CompactMindError, before anything is computed, on models or text that cannot be trained with this recipe.

    `known`: what the teacher makes of the text has been read already.
    """
    llama_blocks(model)
    if len(windows) < 1 or len(held_out) < 1:
        raise CompactMindError(
            f"{len(windows)} training windows and {len(held_out)} held-out windows: retraining needs at least 1 of each; "
            "use more text or a smaller seq_len"
        )
    for what, text in {"training": windows, "held-out": held_out}.items():
        if text.ndim != 2 or text.shape[1] < 2:
            raise CompactMindError(
                f"{what} windows of shape {tuple(text.shape)}: expected (windows, seq_len), seq_len at least 2"
            )
        if not 0 <= text.min() <= text.max() < model.config.vocab_size:
            raise CompactMindError(
                f"token ids {text.min()} to {text.max()} in the {what} windows, but the model knows 0 to "
                f"{model.config.vocab_size - 1}: tokenize the text with the model's own tokenizer"
            )
    others = {str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"}
    if others and not (is_widened(model) and (recipe.mode == "lora" or trains_sharded())):
        raise CompactMindError(
            f"weights of {', '.join(sorted(others))} lose the small steps of training: load the model with dtype=torch.float32, or train "
            "adapters (mode lora) beside weights that compute in float32 (compactmind.precision.widen)"
        )
    if recipe.mode == "full" and not any(parameter.requires_grad for parameter in model.parameters()):
        raise CompactMindError("requires_grad is False for every weight of the model: call model.requires_grad_(True) first")
    if not recipe.distils or (teacher is None and known and not recipe.hidden_loss_weight):
        return
    if teacher is None:
        raise CompactMindError("distillation needs a teacher: give the dense model, or set distillation to False")
    if teacher is model:
        raise CompactMindError("the teacher is the model itself: give the dense model, loaded on its own")
    ours, theirs = model.config, teacher.config
    if ours.vocab_size != theirs.vocab_size:
        raise CompactMindError(
            f"the model has {ours.vocab_size} tokens in its vocabulary and the teacher {theirs.vocab_size}: distillation compares "
            "predictions token by token, so give a teacher of the same vocabulary or set distillation to False"
        )
    if recipe.hidden_loss_weight > 0:
        if ours.hidden_size != theirs.hidden_size:
            raise CompactMindError(
                f"hidden_loss_weight {recipe.hidden_loss_weight} needs a model and a teacher of one hidden size, not "
                f"{ours.hidden_size} and {theirs.hidden_size}: set hidden_loss_weight to 0"
            )
        if ours.num_hidden_layers > theirs.num_hidden_layers:
            raise CompactMindError(
                f"hidden_loss_weight {recipe.hidden_loss_weight} needs a teacher with at least the model's layers, not "
                f"{theirs.num_hidden_layers} for {ours.num_hidden_layers}: set hidden_loss_weight to 0"
            )


# ----------------------------------------------------------------------------------------------------------------- loop
def held_out_loss(model: PreTrainedModel, held_out: torch.Tensor, accelerator: Accelerator) -> float:
    """Return the mean loss in nats on `held_out` (windows, seq_len), the same number in every process; evaluation mode."""
    loss = window_losses(model.eval(), held_out).mean().to(accelerator.device)
    return accelerator.reduce(loss, reduction="mean").item()


def held_out_quality(
    model: PreTrainedModel, held_out: torch.Tensor, accelerator: Accelerator, dense: Callable[[torch.Tensor], torch.Tensor] | None
) -> dict[str, float]:
    """Return `loss`, see `held_out_loss`, and with the logits of the `dense` model, of input ids (1, seq_len - 1), `kl` to it, in nats."""
    if dense is None:
        return {"loss": held_out_loss(model, held_out, accelerator)}
    rows = []
    for window in held_out:
        logits = next_token_logits(model.eval(), window)
        rows.append(torch.stack([loss_of(logits, window), divergences_of(dense(window[None, :-1])[0], logits).double().mean()]))
    means = accelerator.reduce(torch.stack(rows).mean(dim=0).to(accelerator.device), reduction="mean")
    return dict(zip(("loss", "kl"), means.tolist(), strict=True))


def true_in_all_processes(value: bool, accelerator: Accelerator) -> bool:
    """Return whether a value is true in every process; all must ask."""
    return accelerator.reduce(torch.tensor(float(value), device=accelerator.device)).item() == accelerator.num_processes


def retrain_causal_lm(
    model: PreTrainedModel,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    recipe: RetrainRecipe,
    *,
    teacher: PreTrainedModel | None = None,
    teacher_states: TeacherStates | None = None,
    accelerator: Accelerator | None = None,
    resume: TrainingState | None = None,
    log_every: int = 20,
    label: str = "retrain",
) -> dict[str, Any]:
    """Retrain a Llama-like causal LM in place and leave it in evaluation mode with the weights of its lowest held-out loss.

    `model` has float32 weights, or for adapters, and where it is divided, any that compute in float32; it and the `teacher` (used if
    `recipe.distils`, its weights stay as they are) go to the device of `accelerator`; `teacher_states` spares the teacher the windows
    it has read before, and is enough without it where it has read all of them. `windows` and `held_out`
    (windows, seq_len) are int64 token ids. With `resume` the state is saved after every evaluation, and a run that was killed goes
    on from there and ends with the weights of an unbroken one, unless the number of steps, of processes or the precision is another:
    then it starts anew. Who called clears it, once the model it led to is safe.

    Where the run asked for it (training.trains_sharded) the model is divided between the processes (sharding.py): each needs memory for its
    share, keeps and saves that, and only the model of the main process has weights afterwards, in main memory; a step that raises leaves
    it empty.

    A loss that is not finite ends the run early, without an exception. Returns perplexity_before, perplexity_after and
    loss_before, loss_after (held-out, in nats), tokens_seen, seconds, kept_step (0: no step was better than the weights that
    came in, so the model has these again), stopped (None, or what ended the run early) and history, a row per evaluation with
    step, phase, loss (training, mean since the last row), held_out_loss, perplexity, lr, seconds (since the last row). What learns from the
    teacher alone (alpha 1) is chosen by KL to it: kl_before and kl_after are returned then too, and a row has `kl`.

    With the base nf4 the losses of the history are of the adapters beside 4 bits, and which step is kept is decided by them, from
    loss_of_base on, which is that of the 4-bit base alone. loss_before and loss_after are of the weights that came in and that are
    returned; where adapters that helped the base do not help these, they are left out (kept_step 0).
    Raises CompactMindError on models or text that do not fit the recipe.
    """
    started = mark = time.perf_counter()
    accelerator, sharded = accelerator or make_accelerator(may_shard=True), trains_sharded()
    processes = accelerator.num_processes
    if sharded:
        check_sharding(recipe.mode, recipe.optimizer, accelerator.mixed_precision)
    known = teacher_states is not None and windows.numel() > 0
    known = known and all(map(teacher_states.holds, windows_read(windows, held_out, recipe, processes)))
    check_inputs(model, windows, held_out, recipe, teacher, known)
    windows_per_step = recipe.batch_size * recipe.accumulation * processes
    total_steps = plan_steps(recipe, windows.shape[1], processes)
    evaluation_steps = {math.ceil(total_steps * number / recipe.evaluations) for number in range(1, recipe.evaluations + 1)}
    plan = {
        "total_steps": total_steps, "windows_per_step": windows_per_step, "processes": processes,
        "mixed_precision": accelerator.mixed_precision, **({"sharded": True} if sharded else {}),
    }  # fmt: skip
    if resume and sharded:
        resume = resume.part(accelerator.process_index, processes, accelerator.wait_for_everyone)
    saved = resume.load() if resume else None
    if saved and saved.get("plan") != plan:  # its rates and its order of windows are those of another run
        accelerator.print(f"{label}: the unfinished run there had the plan {saved.get('plan')}, this one {plan}: starting anew")
        saved = None
    if resume and sharded:
        steps = accelerator.gather(torch.tensor([saved["step"] if saved else 0], device=accelerator.device)).tolist()
        if len(set(steps)) > 1:
            accelerator.print(f"{label}: the parts of the unfinished run there are of the steps {steps}: starting anew")
        saved = saved if len(set(steps)) == 1 else None

    # ---- models
    whole, sparse = model, set(sparse_weight_names(model)) if recipe.mode == "full" else set()
    if sharded:
        accelerator.print(f"{label}: the model is divided between {processes} processes")
    model = shard(whole, accelerator.device) if sharded else model.to(accelerator.device)
    teacher = teacher.to(accelerator.device).eval() if recipe.distils and teacher is not None else None
    dense, decides = None, "loss"
    if recipe.chosen_by_divergence:
        dense, decides = partial((teacher_states or TeacherStates()).logits, teacher), "kl"
    before = saved["before"] if saved else held_out_quality(model, held_out, accelerator, dense)
    if not before["loss"] < LARGEST_LOSS:
        raise CompactMindError(f"the held-out loss before retraining is {before['loss']}: the model that came in is damaged")
    set_seed(recipe.seed)
    with ready_to_train(model, recipe) as (adapters, base):
        optimizer = make_optimizer(model, recipe.lr, recipe.weight_decay, recipe.optimizer == "adamw_8bit")
        scheduler = cosine_decay_with_warmup(optimizer, int(recipe.warmup_ratio * total_steps), total_steps)

        # ---- resume: the state of the last evaluation, if this very run was interrupted
        step, seconds, history, losses, stopped = 0, 0.0, [], [], None
        kept = {**before, "step": 0, "weights": trainable_copy(model)}
        if base is not None and not saved:
            kept |= held_out_quality(model, held_out, accelerator, dense)
        loss_of_base = saved["loss_of_base"] if saved else kept["loss"]
        if saved:
            load_trainable(model, saved["weights"])
            load_own_moments(optimizer, saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(saved["scaler"])
            step, seconds, history, kept = saved["step"], saved["seconds"], saved["history"], saved["kept"]
            accelerator.print(f"{label}: going on after step {step} of {total_steps}")
        objective = RetrainingLoss(model, teacher, recipe, teacher_states)
        if sharded:
            objective, clip = autocast(objective, accelerator), nn.utils.clip_grad_norm_
        else:
            (objective, optimizer), clip = accelerator.prepare(objective, optimizer), accelerator.clip_grad_norm_

        # ---- steps
        held = HeldZeros(own_share(weight) for name, weight in model.named_parameters() if name in sparse)
        progress = Progress(label, total_steps, log_every, step, accelerator.is_main_process, unit="tokens")
        for number in range(step + 1, total_steps + 1):
            model.train()
            set_seed(recipe.seed + number, device_specific=True)  # dropout, if the model has any, depends on the step alone
            rows = batch_rows(len(windows), number, windows_per_step, recipe.seed)
            batches = rows.view(recipe.accumulation, processes, recipe.batch_size)[:, accelerator.process_index]
            loss = torch.zeros((), device=accelerator.device)
            for index, batch in enumerate(batches, start=1):
                # Sharded gradients are always averaged: each process would have to keep all of its own until then.
                with nullcontext() if index == recipe.accumulation or sharded else accelerator.no_sync(objective):
                    share = objective(windows[batch].to(accelerator.device)) / recipe.accumulation
                    accelerator.backward(share)
                loss += share.detach()
            loss = accelerator.reduce(loss, reduction="mean").item()
            if not math.isfinite(loss):  # before the step: its gradients never reach the weights
                stopped = f"loss became {loss} at step {number}"
                break
            clip(model.parameters(), recipe.max_grad_norm)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            held.zero_again()
            scheduler.step()
            optimizer.zero_grad()
            step = number
            losses.append(loss)
            progress.update(loss, lr, windows_per_step * windows.shape[1])

            if step not in evaluation_steps:
                continue
            quality = held_out_quality(model, held_out, accelerator, dense)
            held_out_now = quality["loss"]
            if not math.isfinite(held_out_now):
                stopped = f"held-out loss became {held_out_now} at step {step}"
                break
            # A weight that no held-out text reaches can be no number while the loss is one.
            if quality[decides] < kept[decides] and true_in_all_processes(are_finite(weights := trainable_copy(model)), accelerator):
                kept = {**quality, "step": step, "weights": weights}
            now = time.perf_counter()
            row = {
                "step": step,
                "phase": "retrain",
                "loss": sum(losses) / len(losses),
                "held_out_loss": held_out_now,
                "perplexity": math.exp(min(held_out_now, LARGEST_LOSS)),  # no float beyond that, and no use either
                "lr": lr,
                "seconds": now - mark,
                **({"kl": quality["kl"]} if dense else {}),
            }
            history, losses, mark = [*history, row], [], now
            progress.track("evaluation", row)
            progress.write(
                f"{label:<18} step {step:>5}/{total_steps} | loss {row['loss']:7.4f} | held-out loss {held_out_now:7.4f} | "
                f"perplexity {row['perplexity']:8.4g} | {f'KL {quality[decides]:.4f} | ' if dense else ''}{row['seconds']:.0f} s"
            )
            if resume and (accelerator.is_main_process or sharded):  # what is kept is saved once
                weights = kept["weights"] if kept["step"] == step else trainable_copy(model)
                resume.save(
                    plan=plan, step=step, seconds=seconds + now - started, history=history, kept=kept, before=before,
                    loss_of_base=loss_of_base, weights=weights, optimizer=own_moments(optimizer), scheduler=scheduler.state_dict(),
                    scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
                )  # fmt: skip
        progress.close()

        # ---- the best weights, in a plain model
        if stopped:
            accelerator.print(f"{label}: stopped: {stopped}")
        load_trainable(model, kept["weights"])
        kept_step, after = kept["step"], kept if kept["step"] else before
        if adapters is not None and kept_step:
            if base is not None:
                base.use_original_linears()
            adapters.merge_and_unload()
        if base is not None and kept_step:  # chosen by the loss beside 4 bits; what is returned has others
            after = held_out_quality(model, held_out, accelerator, dense)
            if not after[decides] < before[decides]:
                accelerator.print(f"{label}: with the adapters in the weights as they came the held-out {decides} is {after[decides]:.4f}")
                base.restore()
                kept_step, after = 0, before
        if sharded:
            gather(model, whole, accelerator)
        origin = f"step {kept_step}" if kept_step else "before retraining: no step was better on held-out text"
        accelerator.print(f"{label}: kept the weights of {origin}")
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    return {
        **{f"perplexity_{when}": math.exp(quality["loss"]) for when, quality in (("before", before), ("after", after))},
        **{f"{name}_{when}": quality[name] for name in before for when, quality in (("before", before), ("after", after))},
        "tokens_seen": step * windows_per_step * windows.shape[1],
        "seconds": seconds + time.perf_counter() - started,
        "kept_step": kept_step,
        "stopped": stopped,
        "history": history,
        **({"loss_of_base": loss_of_base} if recipe.base == "nf4" else {}),
    }
