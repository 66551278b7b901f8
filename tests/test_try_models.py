"""classify.py and generate.py as a user runs them: arguments, standard input, JSON, batches, and what is said when it cannot work."""

import io
import json
import runpy
import subprocess
import sys

import helpers
import pytest
import scripts
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import BertForMaskedLM, BertModel, GPT2Config, GPT2ForSequenceClassification

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.task import Task

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

    def run(name: str, *arguments: str, stdin: str | bytes | None = None, cwd=folder):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        given = io.TextIOWrapper(io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin or b""))
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
    result = []
    for text in SENTENCES:
        inputs = checkpoint.tokenizer(text, return_tensors="pt")
        logits = checkpoint.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        result.append(logits.softmax(dim=-1)[0, 1].item())
    return result


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
        result = json.loads(output)
        assert status == 0 and result["text"] == text and result["new_tokens"] == len(wanted) and result["prompt"] == "hello"
    status, output, error = run("generate.py", "hello", *arguments)
    assert status == 0 and output.strip() == text.strip() and "5 tokens," in error and "per second" in error


def test_sampling_depends_on_the_seed_alone(run):
    def sampled(seed: str) -> str:
        arguments = ("--model", "models/llama", "--json", "--temperature", "2", "--seed", seed, "--max_new_tokens", "20")
        return json.loads(run("generate.py", "hello", *arguments)[1])["text"]

    assert sampled("1") == sampled("1") != sampled("2")


# ---------------------------------------------------------------------------------------------------- models of other people
def save_foreign(folder, name: str, model, tokenizer) -> str:
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({0: "negative", 1: "neutral", 2: "positive"}, ["negative", "neutral", "positive"]),
        ({0: "spam", 1: "ham"}, ["spam", "ham"]),
        ({0: "POSITIVE", 1: "NEGATIVE"}, ["positive", "negative"]),
        ({0: "LABEL_0", 1: "LABEL_1"}, ["negative", "positive"]),
    ],
)
def test_the_labels_are_the_model_s_own(run, tmp_path, tokenizer, labels, expected):
    ids = {name: index for index, name in labels.items()}
    model = helpers.make_bert(seed=1, scale=0.6, num_labels=len(labels), id2label=labels, label2id=ids)
    status, output, error = run("classify.py", *SENTENCES, "--json", "--model", save_foreign(tmp_path, "m", model, tokenizer))
    assert status == 0, error
    for text, line in zip(SENTENCES, output.splitlines(), strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        chances = helpers.logits_of(model, {key: inputs[key] for key in ("input_ids", "attention_mask")}).softmax(-1)[0]
        result = json.loads(line)
        assert result["label"] == expected[int(chances.argmax())] and result["score"] == pytest.approx(
            chances.max().item(), abs=1e-5
        )
        assert ("positive" in result) == (set(expected) == {"negative", "positive"}) != ("scores" in result)
        if "positive" in expected and len(labels) == 2:
            assert result["positive"] == pytest.approx(chances[expected.index("positive")].item(), abs=1e-5)


@pytest.fixture
def of_pairs(folder, tokenizer):
    """models/pairs: a BERT of three classes trained on pairs of texts."""
    model = helpers.make_bert(seed=2, scale=0.6, **Task(("yes", "no", "maybe")).head_settings())
    Task(("yes", "no", "maybe"), True, "x").mark(model.config)
    if not (folder / "models" / "pairs").exists():
        save_checkpoint(folder / "models" / "pairs", model, tokenizer, kind="dense", parent=None, stage={})
    return model


def test_pairs_by_a_tab_or_an_option(run, of_pairs, tokenizer):
    first, second = "a good film", "the plot is dull"
    inputs = tokenizer(first, second, return_tensors="pt")
    chances = helpers.logits_of(of_pairs, dict(inputs)).softmax(-1)[0].tolist()
    assert chances != pytest.approx(helpers.logits_of(of_pairs, {"input_ids": inputs["input_ids"]}).softmax(-1)[0].tolist(), abs=1e-3)
    given = ((first, "--pair", second), (f"{first}\t{second}",), ())
    for arguments in given:
        status, output, error = run(
            "classify.py", *arguments, "--json", "--model", "models/pairs", stdin=None if arguments else f"{first}\t{second}\n"
        )
        assert status == 0, error
        result = json.loads(output)
        assert (result["text"], result["pair"]) == (first, second) and "positive" not in result
        assert list(result["scores"]) == ["yes", "no", "maybe"] and list(result["scores"].values()) == pytest.approx(chances, abs=1e-5)
    status, output, _ = run("classify.py", first, "--pair", second, "--model", "models/pairs")
    assert output.split("\t")[2:] == [first, f"{second}\n"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("one text", "--model", "models/pairs"), "trained on pairs of texts: give the second of 'one text' with --pair, or behind a tab"),
        (("a\tb\tc", "--model", "models/pairs"), "trained on pairs of texts"),
        (("a\t ", "--model", "models/pairs"), "trained on pairs of texts"),
        (("a", "--pair", "b"), "trained on single texts: leave out --pair"),
    ],
)
def test_a_pair_and_a_model_that_do_not_go_together_are_said(run, of_pairs, arguments, expected):
    status, output, error = run("classify.py", *arguments)
    assert status == 1 and expected in error and "Traceback" not in error and output == ""


def test_the_names_of_a_task_of_ones_own_are_printed_as_they_are(run, folder, tokenizer):
    for names in (("neg", "pos"), ("LABEL_0", "LABEL_1"), ("possible", "negligible")):
        model = helpers.make_distilbert(**Task(names).head_settings())
        Task(names, False, "x").mark(model.config)
        directory = folder / "models" / names[0]
        save_checkpoint(directory, model, tokenizer, kind="dense", parent=None, stage={})
        status, output, error = run("classify.py", "a good film", "--json", "--model", str(directory))
        assert status == 0 and list(json.loads(output)["scores"]) == list(names), error


def test_a_classifier_without_a_padding_token_is_asked_one_text_at_a_time(run, tmp_path, tokenizer):
    config = GPT2Config(vocab_size=len(helpers.VOCABULARY), n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1)
    model = helpers.randomize(GPT2ForSequenceClassification(config), scale=0.4)
    place = save_foreign(tmp_path, "m", model, tokenizer)
    together = [json.loads(line) for line in run("classify.py", *SENTENCES, "--json", "--model", place)[1].splitlines()]
    alone = [json.loads(run("classify.py", text, "--json", "--model", place)[1]) for text in SENTENCES]
    assert [row["text"] for row in together] == SENTENCES
    assert [row["positive"] for row in together] == pytest.approx([row["positive"] for row in alone], abs=1e-6)


def foreign_models(tokenizer) -> dict:
    llama, bytewise = helpers.make_llama(), helpers.make_byte_tokenizer()
    headless = helpers.make_bert()
    headless.config.architectures = ["BertForSequenceClassification"]
    return {
        "base": (BertModel(helpers.bert_config()), tokenizer),
        "masked": (BertForMaskedLM(helpers.bert_config()), tokenizer),
        "regression": (helpers.make_bert(num_labels=1), tokenizer),
        "several": (helpers.make_bert(num_labels=3, problem_type="multi_label_classification"), tokenizer),
        "strange": (helpers.make_bert(vocab_size=20), tokenizer),
        "diverged": (helpers.make_bert(scale=float("nan")), tokenizer),
        "headless": (headless, tokenizer),
        "small-llama": (helpers.make_llama(vocab_size=40), bytewise),
        "my-llama": (llama, bytewise),
        "stubborn": (llama, bytewise),
    }


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("foreign")
    for name, (model, its_tokenizer) in foreign_models(tokenizer).items():
        save_foreign(folder, name, model, its_tokenizer)
    tensors = load_file(folder / "headless" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    save_file(kept, folder / "headless" / "model.safetensors", metadata={"format": "pt"})
    (folder / "stubborn" / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    (folder / "odd").mkdir()
    (folder / "odd" / "config.json").write_text("[1, 2]")
    return folder


@pytest.mark.parametrize(
    ("script", "name", "expected"),
    [
        ("classify.py", "base", "holds a BertModel"),
        ("classify.py", "masked", "holds a BertForMaskedLM"),
        ("classify.py", "regression", "it gives one number for a text"),
        ("classify.py", "several", "labels of which several may be right"),
        ("classify.py", "strange", "the model knows 20 of them"),
        ("classify.py", "diverged", "holds NaN or infinite numbers"),
        ("classify.py", "headless", "its weights lack classifier.bias, classifier.weight"),
        ("classify.py", "my-llama", "is no classifier but a LlamaForCausalLM: try generate.py"),
        ("classify.py", "odd", "could not be loaded"),
        ("generate.py", "base", "holds a BertModel"),
        ("generate.py", "regression", "is no language model but a BertForSequenceClassification: try classify.py"),
        ("generate.py", "small-llama", "the model knows 40 of them"),
        ("generate.py --chat", "stubborn", "does not take the text: no users here"),
    ],
)
def test_a_folder_that_cannot_be_tried_is_told_in_one_line(run, foreign, script, name, expected):
    script, *options = script.split()
    status, output, error = run(script, "the film is good", *options, "--model", str(foreign / name))
    assert status == 1 and output == ""
    text = error[error.rindex("error: ") :]
    assert expected in text and len(text.splitlines()) == 1


def test_a_base_model_of_this_project_is_no_classifier(run, folder, tokenizer):
    save_checkpoint(
        folder / "models" / "student_base", BertModel(helpers.bert_config()), tokenizer, kind="dense", parent=None, stage={}
    )
    for script, called in (("classify.py", "no classifier"), ("generate.py", "no language model")):
        status, _, error = run(script, "good", "--model", "models/student_base")
        assert status == 1 and f"is {called} but a BertModel: it has no head for that" in error


# ------------------------------------------------------------------------------------------------------------- odd texts
def test_lines_that_are_not_utf_8_are_named(run):
    status, output, error = run("classify.py", "--batch_size", "1", stdin=b"good\n\xef\xbb\xbf\nun caf\xe9\nbad\n")
    assert (
        status == 1
        and error == "error: line 3 of standard input is not UTF-8: convert it, for example with `iconv -f latin1 -t utf-8`"
    )
    assert [line.split("\t")[2] for line in output.splitlines()] == ["good", "\ufeff"]
    assert run("classify.py", stdin="\ufeffgood\n")[1].endswith("\tgood\n")  # a file of Windows begins so
    assert "text 1 is not UTF-8" in run("classify.py", "un caf\udce9")[2]  # as Python gives such an argument
    assert "line 1 of standard input is not UTF-8" in run("generate.py", "--model", "models/llama", stdin=b"\xff\xfeh\0i\0")[2]


def test_nothing_in_nothing_out(run):
    for script in ("classify.py", "generate.py"):
        status, output, error = run(script, *(("--model", "models/llama") if script == "generate.py" else ()), stdin="\n \n")
        assert (status, output, error) == (0, "", "")


def test_a_text_longer_than_the_model_is_cut_and_a_prompt_refused(run, foreign):
    long = "good " * 20_000
    status, output, error = run("classify.py", "--json", "--max_length", "1000", stdin=f"{long}\nbad\n")  # positions for 64
    assert status == 0 and [json.loads(line).get("cut") for line in output.splitlines()] == [True, None], error
    assert "1 of 2 texts had more than 64 tokens: their ends were not read" in error
    status, output, error = run("generate.py", "--model", "models/llama", stdin=f"{long}\n")
    assert status == 1 and "the prompt has 100000 tokens, and the model was made for 128" in error
    status, output, _ = run("generate.py", "good " * 25, "--json", "--model", "models/llama")
    assert status == 0 and json.loads(output)["new_tokens"] == 3  # after 1 + 124 of the prompt


def test_texts_are_cut_where_the_model_was_trained_to_cut_them(run, tmp_path, tokenizer):
    stage = {"script": "1_distill.py", "config": {"max_length": 6}, "inputs": {}}
    save_checkpoint(tmp_path / "m", helpers.make_distilbert(), tokenizer, kind="dense", parent=None, stage=stage)
    given = ("a film that is good", "good", "--model", str(tmp_path / "m"), "--json")
    status, output, error = run("classify.py", *given)
    assert status == 0 and "1 of 2 texts had more than 6 tokens" in error and output.count('"cut": true') == 1
    status, output, error = run("classify.py", *given, "--max_length", "20")
    assert status == 0 and "cut" not in output and "were not read" not in error


def test_a_text_without_tokens_is_refused(run, tmp_path, tokenizer):
    bare = helpers.make_byte_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    place = save_foreign(tmp_path, "m", helpers.make_bert(vocab_size=helpers.LLAMA_VOCABULARY), bare)
    status, _, error = run("classify.py", "a film", "", "--model", place)
    assert status == 1 and "the text '' has no tokens for this model" in error


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    command = [sys.executable, str(helpers.REPOSITORY / "classify.py"), "--batch_size", "1", *["good"] * 500]
    with subprocess.Popen(
        command, cwd=folder, env=scripts.environment(folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline().endswith("\tgood\n")
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 1 and "Traceback" not in error and "BrokenPipeError" not in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("classify.py",), "no sentence: give some"),
        (("classify.py", "a", "--batch_size", "0"), "batch_size 0"),
        (("classify.py", "a", "--model", "models/nothing"), "models/nothing not found: choose from "),
        (("classify.py", "a", "--model", "elsewhere/student_pruned"), "2_prune_finetune.py` first; --model takes any other folder"),
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


@pytest.mark.parametrize(("script", "maker"), [("classify.py", "2_prune_finetune.py"), ("generate.py", "4_smoothquant_llama.py")])
def test_where_the_default_is_not_made_yet_its_stage_is_named(run, tmp_path, script, maker):
    status, output, error = run(script, "a", cwd=tmp_path)
    assert status != 0 and f"not found: run `python {maker}` first; --model takes any other folder" in error and output == ""
