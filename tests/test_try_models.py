"""classify.py and generate.py as a user runs them: arguments, standard input, JSON, batches, and what is said when it cannot work."""

import io
import json
import runpy
import sys

import helpers
import pytest
import torch

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder

SENTENCES = ["the film is good", "a bad plot", "dull and slow", "a moving story", "what a mess"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("try")
    helpers.add_llama(folder)
    model, tokenizer = helpers.make_distilbert(), helpers.make_tokenizer(folder)
    save_checkpoint(folder / "models" / "student_pruned", model, tokenizer, kind="dense", parent=None, stage={})
    description = quantize_encoder(model)
    save_checkpoint(
        folder / "models" / "small", model, tokenizer, kind="w8a8", parent="student_pruned", stage={}, quantization=description
    )
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run a script with arguments and standard input: (exit status, standard output, standard error)."""

    def run(name: str, *arguments: str, stdin: str | None = None):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        given = io.StringIO(stdin or "")
        given.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", given)
        capsys.readouterr()
        status, message = 0, ""
        try:
            runpy.run_path(str(helpers.REPOSITORY / name), run_name="__main__")
        except SystemExit as end:
            status, message = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
        captured = capsys.readouterr()
        return status, captured.out, captured.err + message

    return run


@torch.no_grad()
def expected(folder, name: str) -> list[float]:
    """Return the probability of "positive" for every sentence, asked one at a time."""
    checkpoint = load_checkpoint(folder / "models" / name)
    found = []
    for text in SENTENCES:
        inputs = checkpoint.tokenizer(text, return_tensors="pt")
        logits = checkpoint.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        found.append(logits.softmax(dim=-1)[0, 1].item())
    return found


@pytest.mark.parametrize("batch_size", ["2", "32"])
@pytest.mark.parametrize("name", ["student_pruned", "small"])
def test_sentences_from_the_command_line_and_from_standard_input_as_json(run, folder, name, batch_size):
    wanted = expected(folder, name)
    arguments = ("--json", "--model", f"models/{name}", "--batch_size", batch_size)
    for given in (
        run("classify.py", *SENTENCES, *arguments),
        run("classify.py", *arguments, stdin="\n".join(["", *SENTENCES])),
    ):
        status, output, _ = given
        rows = [json.loads(line) for line in output.splitlines()]
        assert status == 0 and [row["text"] for row in rows] == SENTENCES
        assert [row["positive"] for row in rows] == pytest.approx(wanted, abs=1e-5)
        for row in rows:
            assert row["label"] == ("positive" if row["positive"] >= 0.5 else "negative") and row["score"] >= 0.5


def test_the_default_model_and_a_line_per_sentence(run, folder):
    status, output, _ = run("classify.py", *SENTENCES)
    wanted = expected(folder, "student_pruned")
    lines = [line.split("\t") for line in output.splitlines()]
    assert status == 0 and [line[2] for line in lines] == SENTENCES
    assert [line[0] for line in lines] == ["positive" if p >= 0.5 else "negative" for p in wanted]
    assert [float(line[1]) for line in lines] == pytest.approx([max(p, 1 - p) for p in wanted], abs=1e-3)


def test_text_goes_on_as_the_model_would(run, folder):
    checkpoint = load_checkpoint(folder / "models" / "llama")
    ids = checkpoint.tokenizer("hello", return_tensors="pt")["input_ids"]
    wanted = checkpoint.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text = checkpoint.tokenizer.decode(wanted, skip_special_tokens=True)
    arguments = ("--model", "models/llama", "--max_new_tokens", "5")
    for status, output, _ in (
        run("generate.py", "hello", "--json", *arguments),
        run("generate.py", "--json", *arguments, stdin="hello\n"),
    ):
        found = json.loads(output)
        assert status == 0 and found["text"] == text and found["new_tokens"] == len(wanted) and found["prompt"] == "hello"
    status, output, error = run("generate.py", "hello", *arguments)
    assert status == 0 and output.strip() == text.strip() and "5 tokens," in error and "per second" in error


def test_sampling_depends_on_the_seed_alone(run):
    def sampled(seed: str) -> str:
        arguments = ("--model", "models/llama", "--json", "--temperature", "2", "--seed", seed, "--max_new_tokens", "20")
        return json.loads(run("generate.py", "hello", *arguments)[1])["text"]

    assert sampled("1") == sampled("1") != sampled("2")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("classify.py",), "no sentence: give some"),
        (("classify.py", "a", "--batch_size", "0"), "batch_size 0"),
        (("classify.py", "a", "--model", "models/nothing"), "models/nothing not found"),
        (("classify.py", "a", "--model", "models/llama"), "is no classifier but a LlamaForCausalLM: try generate.py"),
        (("generate.py",), "no text: give one"),
        (("generate.py", "a", "--model", "models/llama", "--max_new_tokens", "0"), "max_new_tokens 0"),
        (("generate.py", "a", "--model", "models/student_pruned"), "is no language model but a DistilBert"),
        (("generate.py", "a", "--model", "models/llama", "--chat"), "no chat template: leave --chat out"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(run, arguments, expected):
    status, output, error = run(*arguments)
    assert status != 0 and expected in error and "Traceback" not in error and output == ""
