"""A row of the report fails alone and says why, and is compared with the model it was made from or with nothing."""

import contextlib
import csv
import gc
import html
import io
import json
import shutil
import weakref
from functools import partial
from types import SimpleNamespace

import helpers
import pytest
import torch
from goals import goals as project_goals
from transformers import (
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

from compactmind import checkpoint
from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.data import write_dataset
from compactmind.errors import CompactMindError
from compactmind.evaluation import classifiers, language
from compactmind.evaluation.cost import measure_generation, measure_latency
from compactmind.evaluation.loaded import Checkpoints
from compactmind.forward import predict_logits
from compactmind.manifest import identity_of
from compactmind.report.documents import write_documents
from compactmind.report.figures import latency, model_comparison, perplexity_against_size
from compactmind.report.sentences import sentences, warnings
from compactmind.report.tables import divergence, encoder_table

WORDS = len(helpers.VOCABULARY)
ENCODERS = ("deberta", "short", "three", "unpadded", "masked", "strange", "empty")
LANGUAGES = ("my-other", "tiny-opt")


def gpt2_config(**changes) -> GPT2Config:
    return GPT2Config(n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1, **changes)


def make_foreign(folder, tokenizer) -> None:
    """Write folders that somebody might name in --models, each with something that stops a measurement."""
    deberta = DebertaV2Config(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, type_vocab_size=0,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"], pad_token_id=0,
    )  # fmt: skip
    opt = OPTConfig(
        vocab_size=helpers.LLAMA_VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=32, word_embed_proj_dim=32,
        max_position_embeddings=24,
    )  # fmt: skip
    models = {
        "deberta": DebertaV2ForSequenceClassification(deberta),
        "short": helpers.make_bert(max_position_embeddings=8),
        "three": helpers.make_bert(num_labels=3),
        "unpadded": GPT2ForSequenceClassification(gpt2_config(vocab_size=WORDS)),
        "masked": BertForMaskedLM(helpers.bert_config()),
        "strange": helpers.make_bert(vocab_size=20),
        "empty": helpers.make_bert(),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "empty" / "model.safetensors").unlink()
    for name, model in {
        "my-other": helpers.released_llama(helpers.make_llama(seed=5, intermediate_size=96)),
        "tiny-opt": OPTForCausalLM(opt),
    }.items():
        model.save_pretrained(folder / name)
        helpers.make_byte_tokenizer().save_pretrained(folder / name)


def save_classifier(folder, name: str, tokenizer, parent: str | None = None, **changes) -> None:
    inputs = {parent: identity_of(folder / parent)} if parent else {}
    stage = {"script": "1_distill.py", "config": {}, "inputs": inputs}
    save_checkpoint(folder / name, helpers.make_distilbert(**changes), tokenizer, kind="dense", parent=parent, stage=stage)


def save_language(folder, name: str, parent: str, identity: str) -> None:
    stage = {"script": "5_bayesian_search.py", "config": {}, "inputs": {"model": identity}}
    model = helpers.released_llama(helpers.make_llama(seed=len(name), tie_word_embeddings=True, intermediate_size=24))
    save_checkpoint(
        folder / name, model, helpers.make_byte_tokenizer(), kind="dense", parent=parent, stage=stage, dtype="bfloat16"
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tokenizer):
    """Models of every kind of trouble beside sound ones; nothing is measured yet."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rows")
    sentences = helpers.make_sentences(60)
    write_dataset(
        folder / "sst2_data",
        {"train": sentences[:20], "validation": sentences[20:30], "test": sentences[30:]},
        {"source": "made up"},
    )
    helpers.add_llama(folder)
    models = folder / "models"
    for name, parent in (("student_distilled", None), ("student_finetuned", None), ("student_pruned", "student_finetuned")):
        save_classifier(models, name, tokenizer, parent, seed=len(name))
    make_foreign(folder / "elsewhere", tokenizer)
    save_language(models, "llama_nf4", "llama", identity_of(models / "llama"))
    save_language(models, "llama_w8a8", "other", "the hash of a model that is not here")
    save_language(models, "llama_pruned", "my-other", identity_of(folder / "elsewhere" / "my-other"))
    save_language(models, "llama_searched", "llama", "the hash of an earlier llama")
    return folder


def faked_memory(directory, batch_size, sequence_length) -> float:
    if directory.name in ("student_pruned", "llama_nf4"):
        raise CompactMindError("its process was killed")
    return 1.0


def run(folder, *arguments, **patches) -> tuple[int, str, dict]:
    """Run the report in this process, memory not really measured: (exit status, output, rows by name)."""
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        for module in (classifiers, language):
            patch.setattr(module, "peak_memory", faked_memory)
        for name, value in patches.items():
            for module in (classifiers, language):
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        quiet = SimpleNamespace(readouterr=lambda: SimpleNamespace(out="", err=""))
        status, message = helpers.run_script_here(
            "6_evaluate_report.py", *arguments, cwd=folder, monkeypatch=patch, capfd=quiet
        )
    rows = {row["name"]: row for row in helpers.read_json(folder / "results" / "final_report.json")["models"]}
    return status, told.getvalue() + message, rows


@pytest.fixture(scope="module")
def reported(workspace):
    own = [f"{name}=elsewhere/{name}" for name in (*ENCODERS, *LANGUAGES)]
    broken = workspace / "models" / "student_pruned_nf4"
    broken.mkdir()
    (workspace / "models" / "student_distilled" / "model.onnx").write_bytes(b"no graph")
    status, output, rows = run(workspace, "--models", *own)
    assert status == 0, output
    return workspace, output, rows


# ---------------------------------------------------------------------------------------------------------- failing alone
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("three", "it tells 3 classes apart (label_0, label_1, label_2)"),
        ("masked", "holds a BertForMaskedLM: only SequenceClassification and CausalLM can be measured"),
        ("strange", "the model knows 20 of them"),
        ("empty", "elsewhere/empty holds no weights"),
        ("tiny-opt", "it has positions for 24 tokens, not for 32: choose a smaller --seq_len"),
    ],
)
def test_a_row_without_quality_fails_with_its_reason_everywhere(reported, name, reason):
    folder, output, rows = reported
    assert rows[name]["status"] == "failed" and reason in rows[name]["error"] and "command" not in rows[name]
    assert f"{name} failed: {rows[name]['error']}" in output  # among the warnings
    table = {row["name"]: row for row in csv.DictReader((folder / "results" / "model_comparison.csv").open())}
    assert table[name]["status"] == "failed" and table[name]["error"] == rows[name]["error"]
    for document in ("html", "md", "tex"):
        text = html.unescape((folder / "results" / f"final_report.{document}").read_text()).replace("\\", "")
        assert f"failed: {rows[name]['error'][:60]}" in text and (document == "tex" or rows[name]["error"] in text), document


@pytest.mark.parametrize(
    ("name", "missing", "reason"),
    [
        ("deberta", {"gflops", "gmacs_thop"}, "cannot be called on meta tensors"),
        ("short", {"gflops", "gmacs_thop", "latency", "peak_memory_mb"}, "it has positions for 8 tokens, not for 16"),
        ("unpadded", {"latency at batch 32"}, "Cannot handle batch sizes > 1"),
        ("student_pruned", {"peak_memory_mb"}, "its process was killed"),
        ("llama_nf4", {"peak_memory_mb"}, "its process was killed"),
    ],
)
def test_a_cost_that_cannot_be_measured_leaves_a_measured_row(reported, name, missing, reason):
    folder, output, rows = reported
    row = rows[name]
    assert row["status"] == "measured" and row.get("accuracy", row.get("perplexity")) > 0 and row["size_mb"] > 0
    found = row["not_measured"]
    assert found.keys() == missing
    assert all(reason in told for told in found.values())
    for told in found.values():
        assert told in output
    assert all(row[key] is None for key in found if key in ("gflops", "gmacs_thop", "peak_memory_mb"))


def test_what_is_left_of_a_row_is_there(reported):
    folder, _, rows = reported
    assert rows["short"]["max_length"] == 8 and rows["short"]["latency"] == {}
    assert rows["unpadded"]["latency"].keys() == {"batch_1"}
    assert rows["deberta"]["latency"].keys() == {"batch_1", "batch_32"}
    assert rows["student_pruned_nf4"]["status"] == "broken" and rows["student_pruned_nf4"]["command"] == "python 3_quantize.py"
    for name in ("student_distilled", "student_finetuned"):
        assert rows[name]["latency"]["batch_32"]["speedup"] > 0 and rows[name]["gflops"] > 0 and "error" not in rows[name]
    assert rows["student_pruned"]["mcnemar_against_reference"]["p_value"] <= 1
    report = helpers.read_json(folder / "results" / "final_report.json")
    told = warnings(report)
    assert any(line.startswith("short has positions for 8 tokens: its sentences were cut there") for line in told)
    assert not any("three" in line or "strange" in line for line in sentences(report))
    assert any(line.startswith("short: ") and "GFLOPs" not in line and "batch" not in line for line in sentences(report))
    assert "student_pruned" in (folder / "models" / "student_pruned" / "README.md").read_text()


def test_an_onnx_file_that_is_none_costs_its_own_numbers_only(reported):
    pytest.importorskip("onnxruntime")
    _, _, rows = reported
    row = rows["student_distilled"]
    assert (
        "onnx_latency" not in row
        and list(row["not_measured"]) == ["onnx_latency"]
        and row["latency"]["batch_1"]["speedup"] == 1
    )


def test_only_what_lacks_something_is_measured_again(reported):
    folder, _, rows = reported
    (folder / "models" / "student_distilled" / "model.onnx").unlink()
    status, output, _ = run(folder, "--models", *[f"{name}=elsewhere/{name}" for name in (*ENCODERS, *LANGUAGES)])
    assert status == 0
    again = [line.split()[0] for line in output.splitlines() if "accuracy, operations" in line]
    assert again == ["student_distilled", "student_pruned", "deberta", "short", "three", "unpadded", "strange"]


def test_without_a_reference_the_others_are_compared_with_nothing(workspace, tmp_path, tokenizer):
    folder = tmp_path / "copy"
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("results", "llama*", "elsewhere", "*_nf4", "*.onnx"))
    shutil.rmtree(folder / "models" / "student_distilled")
    save_classifier(folder / "models", "student_distilled", tokenizer, vocab_size=20)  # tokens it does not know
    status, output, rows = run(folder)
    assert status == 0 and rows["student_distilled"]["status"] == "failed", output
    for name in ("student_finetuned", "student_pruned"):
        row = rows[name]
        assert row["status"] == "measured" and row["mcnemar_against_reference"] is None
        assert row["latency"]["batch_1"]["speedup"] is None and row["latency"]["batch_1"]["median_ms"] > 0
    assert "student_distilled, the classifier that the others are compared with, was not measured" in output


def test_a_model_that_dies_in_its_turn_costs_the_others_nothing(workspace):
    def dying(after: int):
        model, calls = helpers.make_distilbert(), iter(range(100))

        def hook(*_):
            if next(calls) >= after:
                raise RuntimeError("out of memory")

        model.register_forward_pre_hook(hook)
        return model

    sound = helpers.make_distilbert()
    for after in (0, 3):
        errors: dict[str, Exception] = {}
        times = measure_latency({"dying": dying(after), "sound": sound}, 1, 4, repeats=3, reference="dying", errors=errors)
        assert list(times) == ["sound"] and times["sound"]["speedup"] is None and times["sound"]["median_ms"] > 0
        assert list(errors) == ["dying"] and str(errors["dying"]) == "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_latency({"dying": dying(1), "sound": sound}, 1, 4, repeats=3, reference="sound")
    errors = {}
    models = {"no language model": sound, "llama": helpers.make_llama()}
    assert list(measure_generation(models, 4, 2, {"llama": "llama"}, errors=errors)) == ["llama"] == [*models][1:]
    assert list(errors) == ["no language model"]


def test_what_is_measured_survives_what_comes_after_it(workspace, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("results", "elsewhere", "*_nf4", "*.onnx"))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    status, output, rows = run(folder, measure_language_models=interrupted)
    assert status == 1 and "stopped" in output
    assert (
        rows["student_distilled"]["status"] == "measured" and rows["student_distilled"]["latency"]["batch_32"]["median_ms"] > 0
    )
    assert (rows["llama"]["status"], rows["llama"]["command"]) == ("not run", "python 6_evaluate_report.py")
    status, output, rows = run(folder)
    assert status == 0 and rows["llama"]["status"] == "measured", output
    assert "student_finetuned        accuracy" not in output  # it is as it was


def test_gsm8k_that_cannot_be_asked_costs_its_own_cell_only(monkeypatch):
    def gsm8k(model, *_, **__):
        if model == "dying":
            raise RuntimeError("out of memory")
        return {"problems": 3}

    monkeypatch.setattr(language, "gsm8k", gsm8k)
    rows = [{"name": name, "status": "measured"} for name in ("dying", "sound")] + [{"name": "absent", "status": "failed"}]
    language.measure_gsm8k(rows, {name: SimpleNamespace(model=name, tokenizer=None) for name in ("dying", "sound")}, 3, None)
    assert rows[0]["gsm8k"] is None and rows[0]["not_measured"] == {"gsm8k": "RuntimeError: out of memory"}
    assert rows[1]["gsm8k"] == {"problems": 3} and "gsm8k" not in rows[2]


def language_rows(models: dict, tokenizer, folder) -> tuple[list[dict], dict, dict]:
    """Return rows of language models, all made from `dense`, their checkpoints and their bases."""
    rows = [{"name": name, "status": "measured", "directory": str(folder), "kind": "dense"} for name in models]
    checkpoints = {name: SimpleNamespace(model=model, tokenizer=tokenizer) for name, model in models.items()}
    return rows, checkpoints, dict.fromkeys(models, rows[0])


def measure_quality(rows: list[dict], checkpoints: dict, bases: dict, windows=None) -> None:
    windows = helpers.example_windows() if windows is None else windows
    language._measure_quality(rows, checkpoints, lambda name: windows, "made up", "first", bases)


def test_the_dense_model_runs_once_for_all_that_were_made_from_it(workspace):
    calls = []
    models = {name: helpers.make_llama(seed=seed) for seed, name in enumerate(("dense", "a", "b"))}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    rows, checkpoints, bases = language_rows(models, None, workspace / "models" / "llama")
    measure_quality(rows, checkpoints, bases)
    assert calls == ["dense"] * 3 + ["a"] * 3 + ["b"] * 3 and all(row["divergence"] for row in rows)
    calls.clear()
    measure_quality(rows[1:2], checkpoints, bases)  # dense was measured earlier and runs along
    assert calls == ["dense"] * 3 + ["a"] * 3


def test_a_language_model_that_dies_in_its_turn_costs_the_others_nothing(workspace, capsys):
    models = {name: helpers.make_llama(seed=seed) for seed, name in enumerate(("dense", "dying", "damaged", "sound"))}
    with torch.no_grad():
        models["damaged"].model.norm.weight.fill_(torch.nan)
    models["dying"].forward = None
    rows, checkpoints, bases = language_rows(models, None, workspace / "models" / "llama")
    measure_quality(rows, checkpoints, bases)
    assert [row["status"] for row in rows] == ["measured", "failed", "failed", "measured"]
    assert "TypeError" in rows[1]["error"] and "the model is damaged" in rows[2]["error"] and rows[3]["divergence"]["mean"] > 0
    models["dense"].forward = None  # of an earlier measurement: what is compared with it has a perplexity all the same
    sound = {name: rows[3][name] for name in ("name", "status", "directory", "kind")}
    measure_quality([sound], checkpoints, bases)
    assert sound["status"] == "measured" and sound["perplexity"] == rows[3]["perplexity"] and sound["divergence"] is None
    assert "TypeError" in sound["not_measured"]["divergence"]


def test_a_text_is_tokenized_once_for_all_models_with_one_tokenizer(workspace, monkeypatch):
    asked = []

    def windows_for(tokenizer) -> torch.Tensor:
        asked.append(tokenizer)
        return helpers.example_windows()

    models = {name: helpers.make_llama(seed=seed) for seed, name in enumerate(("dense", "a", "b"))}
    rows, checkpoints, bases = language_rows(models, None, workspace / "models" / "llama")
    for each in checkpoints.values():
        each.tokenizer = helpers.make_byte_tokenizer()
    checkpoints["b"].tokenizer = helpers.make_tokenizer(workspace / "t")
    checkpoints = kept(checkpoints)
    monkeypatch.setattr(language, "measure_load_time", lambda *_: 0.1)
    monkeypatch.setattr(language, "measure_generation", lambda *_, **__: {})
    monkeypatch.setattr(language, "peak_memory", lambda *_: 1.0)
    language.measure_language_models(
        rows, checkpoints, windows_for, "made up", "spread", reference=rows[0], bases=bases, prompt_tokens=4, repeats=1
    )
    assert asked == [checkpoints[name].tokenizer for name in ("dense", "b")]
    assert {row["protocol"]["windows_from"] for row in rows} == {"spread"}


def kept(checkpoints: dict) -> Checkpoints:
    """Return checkpoints that are in memory already as those of a report."""
    return Checkpoints({name: lambda each=each: each for name, each in checkpoints.items()})


def test_of_large_models_one_is_in_memory_at_a_time_and_the_numbers_are_those_of_small_ones(workspace, monkeypatch):
    folder, there, most = workspace / "models" / "llama", weakref.WeakSet(), []

    def load(name: str, seed: int):
        model, path = helpers.make_llama(seed=seed), workspace / "large" / name
        save_checkpoint(path, model, helpers.make_byte_tokenizer(), kind="dense", parent=None, stage={})
        del model
        loaded = load_checkpoint(path)
        there.add(loaded.model)
        gc.collect()
        most.append(len(there))
        return loaded

    def measured() -> list[dict]:
        most.clear()
        rows, _, bases = language_rows({"dense": None, "a": None, "b": None}, None, folder)
        checkpoints = Checkpoints({name: partial(load, name, seed) for seed, name in enumerate(("dense", "a", "b"))})
        language.measure_language_models(
            rows, checkpoints, lambda _: helpers.example_windows(), "made up", "first", reference=rows[0], bases=bases,
            prompt_tokens=4, repeats=2,
        )  # fmt: skip
        return rows

    monkeypatch.setattr(language, "peak_memory", lambda *_: 1.0)
    monkeypatch.setattr(language, "load_any", lambda *_: None)
    small, in_memory = measured(), max(most)
    monkeypatch.setattr(checkpoint, "SMALL_BYTES", 0)
    large, one = measured(), max(most)
    assert (in_memory, one) == (3, 1)
    for a, b in zip(small, large, strict=True):
        assert (a["losses"], a["divergence"], a["against_dense"]) == (b["losses"], b["divergence"], b["against_dense"])
        assert b["generation"]["prefill"]["speedup"] > 0 and b["load_seconds"] >= 0 and "not_measured" not in b
    assert large[0]["generation"]["decode"]["speedup"] == 1


def test_a_diverged_classifier_is_no_row_of_numbers(workspace, monkeypatch):
    row = {"name": "mine", "status": "measured", "directory": str(workspace / "models" / "student_distilled")}
    monkeypatch.setattr(classifiers, "predict_logits", lambda *given: predict_logits(*given) * torch.nan)
    checkpoint = SimpleNamespace(model=helpers.make_distilbert(), tokenizer=helpers.make_tokenizer(workspace / "t"))
    classifiers.measure_classifiers(
        [row], {"mine": checkpoint}, helpers.make_sentences(4), reference=row, max_length=8, eval_batch_size=2, cost_length=4,
        latency_batches=(1,), latency_repeats=1,
    )  # fmt: skip
    assert row["status"] == "failed" and "logits are not numbers" in row["error"] and "accuracy" not in row


# --------------------------------------------------------------------------------------------------------- whose child it is
def test_a_language_model_is_compared_with_what_it_was_made_from_or_with_nothing(reported):
    folder, output, rows = reported
    names = ("llama", "llama_nf4", "llama_w8a8", "llama_pruned", "llama_searched", "my-other")
    found = {name: rows[name]["compared_with"] for name in names}
    assert found == {
        "llama": "llama", "llama_nf4": "llama", "llama_w8a8": None, "llama_pruned": "my-other", "llama_searched": None, "my-other": None,
    }  # fmt: skip
    for name, base in found.items():
        row, generation = rows[name], rows[name]["generation"]
        assert row["status"] == "measured"
        if base is None:
            assert row["against_dense"] is row["compression_ratio"] is generation["prefill"]["speedup"] is None
            assert row["divergence"] is None
            continue
        assert (row["divergence"]["mean"] == 0) == (base == name) and row["divergence"]["p999"] >= row["divergence"]["mean"]
        assert row["against_dense"]["ratio"] == pytest.approx(row["perplexity"] / rows[base]["perplexity"])
        assert row["compression_ratio"] == pytest.approx(rows[base]["size_mb"] / row["size_mb"])
        assert generation["decode"]["speedup"] > 0
    assert "llama_w8a8 is compared with nothing: it was made from a model called other whose weights" in output
    assert "llama_searched is compared with nothing: it was made from a model called llama whose weights" in output
    assert "my-other is compared with nothing: a folder of others" in output
    report = helpers.read_json(folder / "results" / "final_report.json")
    told = [line for line in sentences(report) if "smaller than" in line]
    assert len(told) == 2 and told[0].startswith("llama_nf4: ") and "than llama as released" in told[0]
    assert told[1].startswith("llama_pruned: ") and "than my-other as released" in told[1]
    assert "% of my-other" not in output and "] of my-other" in output  # the table says whose ratio it is


def test_goals_and_figures_leave_out_what_has_another_parent(reported):
    folder, _, rows = reported
    report = helpers.read_json(folder / "results" / "final_report.json")
    goals = {goal["goal"]: goal for goal in project_goals(report)}
    assert goals["llama_w8a8 perplexity above dense"]["measured"] is None
    assert goals["llama_w8a8 bytes of the released"]["measured"] is None
    assert rows["student_pruned"]["made_from"] == "student_finetuned"
    assert goals["pruned minus distilled accuracy"]["measured"] is None
    for name in ("llama_w8a8", "llama_pruned", "llama_searched", "my-other"):
        assert f">{name}<" not in drawn(report)
    assert ">llama_nf4<" in drawn(report)


def test_a_row_without_a_bar_keeps_its_place_in_every_panel(reported):
    report = helpers.read_json(reported[0] / "results" / "final_report.json")
    rows = [name for name, row in reported[2].items() if row["status"] == "measured" and row["track"] == "encoder"]
    for axes in model_comparison(report).axes:
        bottom, top = axes.get_ylim()
        assert [label.get_text() for label in axes.get_yticklabels()] == rows and bottom > len(rows) - 0.5 and top < -0.5


def drawn(report) -> str:
    """Return the words of the speed-up figure and of perplexity against size, each between > and <."""
    words = []
    for draw in (latency, perplexity_against_size):
        figure = draw(report)
        labels = [
            *(label for axes in figure.axes for label in axes.get_yticklabels()),
            *(text for each in figure.legends for text in each.get_texts()),
        ]
        words += [label.get_text().split(":")[0] for label in labels]
    return "".join(f">{word}<" for word in words)


def test_every_document_is_written_of_rows_with_holes(reported, tmp_path):
    folder, _, _ = reported
    report = helpers.read_json(folder / "results" / "final_report.json")
    for row in report["models"]:
        if row["status"] == "measured":
            row |= {"load_seconds": None, "peak_memory_mb": None, "gmacs_thop": None, "gsm8k": None}
            row |= {"gflops": None, "latency": {}} if row["track"] == "encoder" else {"generation": None}
    write_documents(json.loads(json.dumps(report)), tmp_path)
    assert all((tmp_path / f"final_report.{name}").is_file() for name in ("html", "md", "tex"))
    assert not (tmp_path / "latency.png").exists() and not (tmp_path / "final_report.png").exists()
    line = next(line for line in encoder_table(report).rows if line[0] == "student_distilled")
    assert line[1].endswith("]") and set(line[7:9]) == {"-"}


@pytest.mark.parametrize(
    ("mean", "interval", "cell"),
    [
        (0.1342, [0.1032, 0.1652], "0.1342 [0.1032, 0.1652]"),
        (0.0034, [0.0012, 0.0056], "0.0034 [0.0012, 0.0056]"),
        (0.00005, [0.00002, 0.00008], "0.000050 [0.000020, 0.000080]"),
        (0.0, [0.0, 0.0], "0"),
    ],
)
def test_next_to_no_divergence_is_not_told_as_none(mean, interval, cell):
    assert divergence({"mean": mean, "interval": interval}) == cell
