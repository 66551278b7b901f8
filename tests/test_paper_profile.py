"""The `paper` profile without a hub: local folders laid out as the hub's, tiny models with the published names, through every script."""

import json

import helpers
import pandas
import pytest
import scripts
import torch
from transformers import BertForMaskedLM, DistilBertForMaskedLM

from common import SearchConfig
from compactmind.checkpoint import load_checkpoint
from compactmind.manifest import read_manifest

ENCODERS = {"google-bert/bert-base-uncased": BertForMaskedLM, "distilbert/distilbert-base-uncased": DistilBertForMaskedLM}
LLAMA = "meta-llama/Llama-2-7b-hf"
PRUNE = '{"method": "prune", "params": {"sparsity": 0.25, "round_to": 16}}'
RETRAIN = json.dumps(json.loads(SearchConfig.for_profile("paper").pipeline)[1]).replace("524288", "512")
RUNS = (
    ("download_model.py",),
    ("1_distill.py", "--teacher_epochs", "1", "--student_epochs", "1"),
    ("2_prune_finetune.py", "--epochs", "3", "--prune_end_epoch", "2", "--round_to", "8", "--prune_every", "2"),
    ("3_quantize.py",),
    ("4_smoothquant_llama.py", "--calibration_windows", "2", "--eval_windows", "2", "--alpha_grid", "0.5", "0.8"),
    ("5_bayesian_search.py", "--strategy", "fixed", "--calibration_windows", "2", "--pipeline", f"[{PRUNE}, {RETRAIN}]"),
    ("5_bayesian_search.py", "--strategy", "fixed", "--calibration_windows", "2", "--output", "models/llama_gptq_3.5x", "--pipeline",
     '[{"method": "gptq", "params": {"target_compression": 3.5}}]'),
    ("5_bayesian_search.py", "--n_trials", "2", "--target_compression", "1.1", "--mode", "hybrid", "--final_tokens", "2048",
     "--calibration_windows", "2", "--choices", '{"prune.round_to": [16], "prune.sparsity": [0.25], "retrain.tokens": [512]}'),
    ("6_evaluate_report.py", "--latency_repeats", "2"),
)  # fmt: skip
"""Scripts in order; where they are given anything, less of it than the profile has: the models have a few thousand weights."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A directory in which all scripts have run with the paper profile, and their output."""
    folder = tmp_path_factory.mktemp("paper")
    tokenizer = helpers.make_tokenizer(folder / "vocabulary")
    tokenizer.model_max_length = 512
    torch.manual_seed(0)
    for name, model_class in ENCODERS.items():
        config = (helpers.bert_config if model_class is BertForMaskedLM else helpers.distilbert_config)(
            max_position_embeddings=512
        )
        model_class(config).save_pretrained(folder / "local_assets" / name)
        tokenizer.save_pretrained(folder / "local_assets" / name)
    llama = helpers.make_llama(num_key_value_heads=4, intermediate_size=256, max_position_embeddings=4096, eos_token_id=257)
    helpers.cast_parameters(llama, torch.float16).save_pretrained(folder / "local_assets" / LLAMA)
    helpers.make_byte_tokenizer().save_pretrained(folder / "local_assets" / LLAMA)

    glue = folder / "sst2_data" / "glue" / "sst2"
    glue.mkdir(parents=True)
    sentences = helpers.make_sentences(260, seed=7)
    for name, part in {"validation": sentences[:60], "train": sentences[60:]}.items():
        table = pandas.DataFrame(
            {"sentence": [s.text for s in part], "label": [s.label for s in part], "idx": range(len(part))}
        )
        table.to_parquet(glue / f"{name}.parquet")
    (folder / "wikitext_data").mkdir()
    for seed, name in enumerate(("train", "valid", "test")):
        text = "".join(f" = Article {n} = \n {s.text} . \n\n" for n, s in enumerate(helpers.make_sentences(400, seed=seed)))
        (folder / "wikitext_data" / f"wiki.{name}.raw").write_text(text, encoding="utf-8")

    output = scripts.run_scripts(*((name, "--profile", "paper", *arguments) for name, *arguments in RUNS), cwd=folder)
    for (name, *_), printed in zip(RUNS, output, strict=True):
        assert f"# {name}, profile paper" in printed
    return folder, output


def test_the_published_models_and_data_are_what_was_used(ran):
    folder, output = ran
    for name, wanted in (
        ("teacher_base", "bert-base-uncased"),
        ("student_base", "distilbert-base-uncased"),
        ("llama", "Llama-2-7b-hf"),
    ):
        assert wanted in read_manifest(folder / "models" / name)["stage"]["config"]["source"]
    assert "glue" in output[0] and "did not answer" not in "".join(output)
    teacher, student = (load_checkpoint(folder / "models" / name).model for name in ("teacher", "student_distilled"))
    assert type(teacher).__name__ == "BertForSequenceClassification" and len(teacher.bert.encoder.layer) == 4
    assert type(student).__name__ == "DistilBertForSequenceClassification" and len(student.distilbert.transformer.layer) == 3


def test_every_row_is_measured_with_the_protocol_of_the_papers(ran):
    folder, output = ran
    report = helpers.read_json(folder / "results" / "final_report.json")
    assert report["profile"] == "paper" and [
        row["name"] for row in report["models"] if row["status"] != "measured"
    ] == ["llama_front_3x", "llama_front_4x"]  # the search here is for one size
    rows = {row["name"]: row for row in report["models"]}
    assert rows["teacher"]["rows"] == 60 and rows["student_pruned"]["gflops"] < rows["student_distilled"]["gflops"]
    protocol = rows["llama_searched"]["protocol"]
    assert (
        protocol["seq_len"] == 2048
        and protocol["windows"] >= 5
        and "wikitext" in protocol["text"]
        and protocol["join"] == "\n\n"
    )
    assert rows["llama_searched"]["compression_ratio"] > 1.1 - 1e-6
    retrained = rows["llama_pruned"]["pipeline"][-1]["params"]
    assert (retrained["mode"], retrained["gradient_checkpointing"], retrained["tokens"]) == ("lora", True, 512)
    page = (folder / "results" / "final_report.md").read_text(encoding="utf-8")
    assert "Llama-2-7b-hf has perplexity" in page and "against the published 5.47" in page
    assert (
        "NF4, Llama-2-7B" in page and "yes: same data and protocol" in page
    )  # the perplexities; 60 sentences are not all of dev


def test_the_check_reads_a_real_report_and_is_not_fooled_by_a_name(ran):
    folder, _ = ran
    done = scripts.run_script("benchmarks/paper_check.py", cwd=folder)
    assert done.returncode == 1, done.stderr
    for name in ("llama", "llama_w8a8", "llama_nf4"):
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{name} "))
        assert "not comparable: not of Llama-2-7b: hidden_size " in line and "layers " in line and "windows instead of all 166" in line
        assert "made from" not in line and "another text" not in line
    assert done.stdout.count("not measured") == 2
