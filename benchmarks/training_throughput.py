"""How much faster distillation trains here than the plain way, trick by trick, on the same sentences in one run.

Run:   python benchmarks/training_throughput.py          (after python download_model.py and python 1_distill.py)
Reads: models/teacher, sst2_data/train.jsonl
Writes: results/benchmark_training.json, and prints the table

The plain way pads every sentence to 128 tokens, runs the teacher in every step, uses unfused AdamW and updates every
parameter. Each further row adds one thing that 1_distill.py does. All rows take turns in every round, on the same number of
sentences; figures are medians over the rounds.
"""

import copy
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import DistillConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.checkpoint import load_checkpoint  # noqa: E402
from compactmind.data import EncodedSentences, load_split  # noqa: E402
from compactmind.files import write_json_atomically  # noqa: E402
from compactmind.forward import predict_logits  # noqa: E402
from compactmind.methods.distillation.soft_targets import distillation_loss  # noqa: E402
from compactmind.methods.distillation.student import alternate_layers, student_from_teacher  # noqa: E402
from compactmind.methods.first_token import read_all_tokens, read_first_token_only  # noqa: E402
from compactmind.training import freeze_word_embeddings, make_optimizer  # noqa: E402

ROUNDS = 7
"""Rounds counted, after one that is not."""
STEPS_PER_ROUND = 6
"""Optimizer steps of every variant in a round."""
STATIC_LENGTH = 128
"""Padding of the plain way, in tokens."""


@dataclass(frozen=True)
class Variant:
    """One way to train: what of 1_distill.py it does."""

    name: str
    dynamic_padding: bool = False
    length_buckets: bool = False
    cached_teacher: bool = False
    fused_adamw: bool = False
    frozen_embeddings: bool = False
    first_token: bool = False


VARIANTS = (
    Variant("plain: padded to 128, teacher in every step, unfused AdamW"),
    Variant("+ padding to the longest of the batch", True),
    Variant("+ batches of similar length", True, True),
    Variant("+ teacher logits computed once", True, True, True),
    Variant("+ fused AdamW", True, True, True, True),
    Variant("+ word embeddings frozen", True, True, True, True, True),
    Variant("+ last block for the first token only = 1_distill.py", True, True, True, True, True, True),
)


class Trainer:
    """A student, its optimizer and its batches in one variant."""

    def __init__(self, variant: Variant, teacher, student, sentences: EncodedSentences, logits: torch.Tensor, config):
        self.variant, self.teacher, self.student = variant, teacher, copy.deepcopy(student).train()
        self.sentences, self.logits, self.config = sentences, logits, config
        if variant.frozen_embeddings:
            freeze_word_embeddings(self.student)
        if variant.first_token:
            read_first_token_only(self.student)
        self.optimizer = (
            make_optimizer(self.student, config.student_lr, config.weight_decay)
            if variant.fused_adamw
            else torch.optim.AdamW(self.student.parameters(), lr=config.student_lr, fused=False, foreach=False)
        )
        self.batches = iter(())
        self.epoch = 0

    def next_batch(self) -> dict[str, torch.Tensor]:
        batch = next(self.batches, None)
        if batch is None:
            self.epoch += 1
            if self.variant.length_buckets:
                # Batches of one bucket are neighbours; shuffled, a few of them are a fair sample of all lengths.
                loader = list(self.sentences.training_batches(self.config.batch_size, seed=self.epoch).batch_sampler)
                order = torch.randperm(len(loader), generator=torch.Generator().manual_seed(self.epoch)).tolist()
                self.batches = (self.sentences.collate(loader[index]) for index in order)
            else:
                order = torch.randperm(len(self.sentences), generator=torch.Generator().manual_seed(self.epoch))
                self.batches = (self.sentences.collate(rows.tolist()) for rows in order.split(self.config.batch_size))
            batch = next(self.batches)
        if not self.variant.dynamic_padding:
            missing = STATIC_LENGTH - batch["input_ids"].shape[1]
            for name, value in (("input_ids", self.sentences.pad_token_id), ("attention_mask", 0)):
                batch[name] = functional.pad(batch[name], (0, missing), value=value)
        return batch

    def step(self) -> int:
        """Train on one batch and return its number of sentences."""
        batch = self.next_batch()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if self.variant.cached_teacher:
            targets = self.logits[batch["rows"]]
        else:
            with torch.no_grad():
                targets = self.teacher(**inputs).logits
        loss = distillation_loss(self.student(**inputs).logits, targets, batch["labels"], temperature=4.0, alpha=0.5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(batch["labels"])


def main(config: DistillConfig) -> None:
    teacher = load_checkpoint(config.models_dir / "teacher")
    sentences = EncodedSentences(teacher.tokenizer, load_split(config.data_dir, "train"), config.max_length)
    read_first_token_only(teacher.model)
    started = time.perf_counter()
    logits = predict_logits(teacher.model, sentences, config.eval_batch_size)
    once = time.perf_counter() - started
    read_all_tokens(teacher.model)
    layers = alternate_layers(teacher.model.config.num_hidden_layers, config.student_layers)
    student = student_from_teacher(teacher.model, layers)
    trainers = [Trainer(variant, teacher.model, student, sentences, logits, config) for variant in VARIANTS]
    rates: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
    for round_index in range(-1, ROUNDS):
        for trainer in trainers:
            started = time.perf_counter()
            count = sum(trainer.step() for _ in range(STEPS_PER_ROUND))
            if round_index >= 0:
                rates[trainer.variant.name].append(count / (time.perf_counter() - started))
        print(f"round {round_index + 1} of {ROUNDS}", flush=True)

    plain = rates[VARIANTS[0].name]
    table = []
    print(f"\n{'':<62}{'sentences/s':>12}{'against plain':>15}")
    for name, values in rates.items():
        ratio = statistics.median(value / base for value, base in zip(values, plain, strict=True))
        table.append({"variant": name, "sentences_per_second": statistics.median(values), "speedup": ratio})
        print(f"{name:<62}{statistics.median(values):>12.1f}{ratio:>14.2f}x")
    print(f"computing the teacher's logits of all {len(sentences)} sentences took {once:.0f} s, once")
    # The one-off cost, spread over the epochs of the default run, belongs to the whole.
    epochs = config.student_epochs
    seconds_plain = epochs * len(sentences) / table[0]["sentences_per_second"]
    seconds_ours = epochs * len(sentences) / table[-1]["sentences_per_second"] + once
    whole = seconds_plain / seconds_ours
    print(
        f"a whole run of {epochs} epochs, that cost included: {seconds_plain:.0f} s plain, {seconds_ours:.0f} s here: {whole:.2f}x"
    )
    path = config.results_dir / "benchmark_training.json"
    write_json_atomically(
        path,
        {
            "rows": table,
            "teacher_logits_seconds": once,
            "epochs": epochs,
            "speedup_of_a_whole_run": whole,
            "threads": torch.get_num_threads(),
        },
    )
    print(f"written to {path}: {json.dumps(table[-1])}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(DistillConfig.for_profile()))
