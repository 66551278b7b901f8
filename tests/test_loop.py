"""The epoch loop: a run killed after any epoch ends as one that was not, the epoch kept is the one the rule names, and it stops early."""

import math

import helpers
import pytest
import torch
from accelerate import Accelerator

import compactmind.loop
from compactmind.data import EncodedSentences, model_inputs
from compactmind.loop import EpochLoop, FirstBest, LastNotWorse
from compactmind.methods.distillation.soft_targets import distillation_loss
from compactmind.training import linear_decay_with_warmup

SETTINGS = {"batch_size": 8, "eval_batch_size": 32, "seed": 3, "weight_decay": 0.01, "max_grad_norm": 1.0, "log_every": 4}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def parts(tokenizer):
    """Forty sentences to train on and twenty to look at."""
    sentences = helpers.make_sentences(60)
    return EncodedSentences(tokenizer, sentences[:40], 64), EncodedSentences(tokenizer, sentences[40:], 64)


def make_loop(folder, parts, epochs=4, selection=None, **changes) -> EpochLoop:
    return EpochLoop(
        "student", folder / "student", {"script": "x", "config": {}, "inputs": {}}, Accelerator(cpu=True), *parts,
        selection or LastNotWorse(), epochs=epochs, **SETTINGS | changes,
    )  # fmt: skip


def run(loop: EpochLoop, killed_after: int | None = None, patience: int | None = None):
    """Train in two phases, of which the second has its own rate; the script's own value counts the epochs."""
    model = helpers.make_distilbert(scale=0.05, dropout=0.1)
    model.requires_grad_(True)
    switch = 2
    steps = loop.total_steps - switch * loop.steps_per_epoch

    def begin(second: bool) -> None:
        if second:
            loop.begin(model, ("recovery_lr", 2e-3), lambda each: linear_decay_with_warmup(each, 0, steps), average_steps=6)
        else:
            loop.begin(model, ("lr", 1e-3), lambda each: linear_decay_with_warmup(each, 2, loop.total_steps))

    begin(len(loop.history) >= switch)
    for phase, last in (("first", switch), ("second", loop.total_epochs)):
        for epoch in loop.epochs(phase, last, patience if phase == "second" else None):
            for batch in loop.batches():
                logits = loop.wrapped(**model_inputs(batch, loop.wrapped)).logits
                loop.backward(distillation_loss(logits, None, batch["labels"], 1.0, 0.0))
                loop.step()
            if epoch == switch:
                begin(True)
            loop.own = {"seen": torch.tensor([*(loop.own["seen"].tolist() if loop.own else []), epoch])}
            loop.row |= {"sparsity": 0.25}
            if killed_after == epoch - 1:
                raise Killed  # in the middle of the epoch after it
    return loop.finish()


def without_times(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, parts):
    """A loop that has run, and its model."""
    whole = make_loop(tmp_path_factory.mktemp("whole"), parts)
    return whole, run(whole)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_killed_after_any_epoch_ends_as_one_that_was_not(tmp_path, parts, unbroken, capsys, epoch):
    whole, expected = unbroken
    with pytest.raises(Killed):
        run(make_loop(tmp_path / "killed", parts), killed_after=epoch)
    torch.rand(7)  # whatever the process does elsewhere
    again = make_loop(tmp_path / "killed", parts)
    assert again.own["seen"].tolist() == list(range(1, epoch + 1))
    model = run(again)
    assert f"student: going on after epoch {epoch} of 4" in capsys.readouterr().out
    assert without_times(again.history) == without_times(whole.history)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert again.metrics() == whole.metrics()
    assert [row["phase"] for row in whole.history] == ["first", "first", "second", "second"]
    assert {row["sparsity"] for row in whole.history} == {0.25}
    assert whole.history[-1]["lr"] == 0.0 and whole.history[1]["lr"] == 2e-3


@pytest.fixture
def accuracies(monkeypatch):
    """What every epoch is said to be right in."""
    given = []

    def score_of(logits, labels, metric):
        accuracy = given.pop(0)
        return accuracy, math.sqrt(accuracy * (1 - accuracy) / len(labels))

    monkeypatch.setattr(compactmind.loop, "accuracy_of", lambda *_: given[0])
    monkeypatch.setattr(compactmind.loop, "score_of", score_of)
    return given


@pytest.mark.parametrize(
    ("selection", "first", "seen", "kept"),
    [
        (LastNotWorse(), 1, [0.5, 0.8, 0.75, 0.6], 3),  # the standard error of 0.8 on 20 rows is 0.09
        (LastNotWorse(), 1, [0.9, 0.1, 0.1, 0.1], 1),
        (LastNotWorse(), 1, [0.6, 0.4, 0.5, 0.7], 4),
        (FirstBest(0.0), 1, [0.5, 0.8, 0.8, 0.6], 2),
        (FirstBest(0.1), 1, [0.5, 0.55, 0.65, 0.7], 3),
        (FirstBest(0.0), 3, [0.9, 0.8, 0.5, 0.6], 4),
        (FirstBest(1.0), 3, [0.9, 0.8, 0.5, 0.6], 3),
    ],
)
def test_the_epoch_kept_is_the_one_the_rule_names(tmp_path, parts, accuracies, selection, first, seen, kept):
    accuracies += seen
    loop = make_loop(tmp_path, parts, selection=selection, first_kept=first, batch_size=40)
    run(loop)
    assert loop.metrics() == {"validation_accuracy": seen[kept - 1], "kept_epoch": kept}


@pytest.mark.parametrize("selection", [LastNotWorse("mcc"), FirstBest(0.0, "mcc")], ids=str)
def test_a_task_that_is_judged_by_something_else_keeps_its_epoch_by_that(tmp_path, parts, monkeypatch, selection, capsys):
    scores = [0.0, 0.5, 0.2, 0.1]  # the first says the more frequent class alone
    monkeypatch.setattr(compactmind.loop, "score_of", lambda logits, labels, metric: (scores.pop(0), 0.05) if metric == "mcc" else None)
    loop = make_loop(tmp_path, parts, selection=selection, batch_size=40)
    run(loop)
    kept = loop.history[1]
    assert loop.metrics() == {"validation_accuracy": kept["accuracy"], "validation_mcc": 0.5, "kept_epoch": 2}
    assert (kept["score"], kept["standard_error"]) == (0.5, 0.05) and "by mcc" in str(selection)
    assert "| mcc 0.500 |" in capsys.readouterr().out


def test_it_stops_when_so_many_epochs_were_not_kept(tmp_path, parts, accuracies, capsys):
    accuracies += [0.5, 0.6, 0.6, 0.7, 0.7, 0.7]
    loop = make_loop(tmp_path, parts, epochs=9, selection=FirstBest(), batch_size=40)
    run(loop, patience=2)
    assert len(loop.history) == 6 and loop.metrics()["kept_epoch"] == 4
    assert "stopped early: no better validation accuracy for 2 epochs" in capsys.readouterr().out


def test_the_average_takes_what_is_left_after_a_step(tmp_path, parts):
    """A script may change weights after `step`, as masks do: what is evaluated and kept is what it left."""
    loop, model = make_loop(tmp_path, parts, epochs=1), helpers.make_distilbert(scale=0.05)
    loop.begin(model, ("lr", 1e-3), lambda each: linear_decay_with_warmup(each, 0, loop.total_steps))
    for _ in loop.epochs("only", 1):
        for batch in loop.batches():
            loop.backward(distillation_loss(loop.wrapped(**model_inputs(batch, loop.wrapped)).logits, None, batch["labels"], 1.0, 0.0))
            loop.step()
            with torch.no_grad():
                model.classifier.bias.fill_(math.pi)
    assert torch.equal(loop.finish().classifier.bias, torch.full((2,), math.pi))
