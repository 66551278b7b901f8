"""What the stages say when something is missing, damaged or makes no sense, and that nothing of others is replaced."""

import shutil

import finished_stages
import helpers
import pytest
import scripts
from finished_stages import digest, expect_error, leftovers

from compactmind.methods.pruning.importance import CRITERIA

copy, finished = finished_stages.copy, finished_stages.finished


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ("--hidden_loss_weight", 0.5, "--students", "student_finetuned"),
            ("hidden_loss_weight 0.5 is for student_distilled", "--hidden_loss_weight 0"),
        ),
        (("--alpha_start", 0, "--alpha_end", 0), ("learn nothing from its teacher", "--students student_finetuned")),
    ],
    ids=str,
)
def test_settings_that_switch_each_other_off_are_refused(copy, run_here, arguments, parts):
    expect_error(run_here, "1_distill.py", *arguments, cwd=copy, parts=parts)


def test_stages_without_their_input_name_it_and_the_command_that_makes_it(copy, run_here):
    models = copy / "models"
    shutil.rmtree(models / "student_distilled")
    expect_error(
        run_here, "2_prune_finetune.py", cwd=copy, parts=("models/student_distilled not found", "`python 1_distill.py`")
    )
    expect_error(
        run_here,
        "2_prune_finetune.py",
        "--parent",
        "student_finetuned",
        "--output_dir",
        "other",
        "--models_dir",
        "nowhere",
        cwd=copy,
        parts=("nowhere/student_finetuned not found", "`python 1_distill.py`"),
    )
    (copy / "sst2_data").rename(copy / "elsewhere")
    expect_error(run_here, "1_distill.py", cwd=copy, parts=("sst2_data/dataset.json not found", "`python download_model.py`"))
    shutil.rmtree(models / "teacher_base")
    expect_error(run_here, "1_distill.py", cwd=copy, parts=("models/teacher_base not found", "`python download_model.py`"))


def test_half_written_stages_are_noticed(copy, run_here):
    (copy / "models" / "student_distilled" / "manifest.json").unlink()
    expect_error(
        run_here,
        "2_prune_finetune.py",
        cwd=copy,
        parts=("models/student_distilled has no manifest.json", "`python 1_distill.py`"),
    )
    shutil.rmtree(copy / "models" / "student_distilled")
    weights = copy / "models" / "teacher_base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    expect_error(
        run_here,
        "1_distill.py",
        cwd=copy,
        parts=("models/teacher_base/model.safetensors has 1000 bytes", "`python download_model.py`"),
    )


def test_a_damaged_output_is_made_again(copy, run_here):
    old = digest(copy, "student_distilled")
    (copy / "models" / "student_distilled" / "manifest.json").write_text("{")
    (copy / "models" / ".student_distilled.tmp-killed").mkdir()
    status, output = run_here("1_distill.py", cwd=copy)
    assert status == 0, output
    assert digest(copy, "student_distilled") == old
    assert leftovers(copy) == []


def test_sentences_that_were_changed_are_noticed(copy, run_here):
    path = copy / "sst2_data" / "train.jsonl"
    path.write_text(path.read_text().replace('"label": 1', '"label": 2', 1))
    for name in ("1_distill.py", "2_prune_finetune.py"):
        expect_error(
            run_here, name, cwd=copy, parts=("sst2_data/train.jsonl is missing or was changed", "`python download_model.py`")
        )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--target_sparsity", 1.2), ("1.2", "[0, 1)")),
        (("--target_sparsity", 0.97), ("0.97", "cannot be reached")),
        (("--prune_start_epoch", 3, "--prune_end_epoch", 2), ("prune_start_epoch 3", "prune_end_epoch 2")),
        (("--prune_end_epoch", 4), ("prune_end_epoch 4", "epochs 3")),
        (("--prune_every", 500), ("prune_every 500", "--prune_every")),
        (("--output_dir", "../x"), ("'../x'", "plain name")),
        (("--output_dir", "student_distilled"), ("student_distilled", "the model that is read")),
        (("--output_dir", "teacher"), ("teacher", "the model that is read")),
        (("--output_dir", "teacher_base"), ("teacher_base", "the name of what `python download_model.py` makes")),
        (("--parent", "nobody"), ("models/nobody not found",)),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_by_the_pruning_stage(copy, run_here, arguments, parts):
    before = {path.name for path in (copy / "models").iterdir()}
    expect_error(run_here, "2_prune_finetune.py", "--force", True, *arguments, cwd=copy, parts=parts)
    assert {path.name for path in (copy / "models").iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.fixture(scope="module")
def wrong_parents(finished, tmp_path_factory):
    """The finished directory with the models beside it that a stage may be pointed to by mistake."""
    folder = tmp_path_factory.mktemp("wrong") / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("hf_home"))
    helpers.add_llama(folder)
    scripts.run_script_once("3_quantize.py", cwd=folder)
    return folder


@pytest.mark.parametrize(
    ("script", "arguments", "parts"),
    [
        (
            "2_prune_finetune.py",
            ("--parent", "student_distilled_nf4"),
            ("quantized already (nf4)", "for example student_distilled"),
        ),
        (
            "2_prune_finetune.py",
            ("--parent", "student_pruned_w8a8"),
            ("quantized already (w8a8)", "for example student_pruned"),
        ),
        ("2_prune_finetune.py", ("--parent", "llama"), ("llama is a language model", "--parent takes a classifier")),
        ("2_prune_finetune.py", ("--parent", "teacher_base"), ("teacher_base is a BertModel, a model without a head",)),
        ("3_quantize.py", ("--parents", "llama"), ("llama is a language model", "--parents takes a classifier")),
        ("3_quantize.py", ("--parents", "teacher_base"), ("teacher_base is a BertModel, a model without a head",)),
        ("3_quantize.py", ("--w8a8_parents", "student_pruned_nf4"), ("student_pruned_nf4 is quantized already (nf4)",)),
        ("4_smoothquant_llama.py", ("--model_path", "models/teacher"), ("teacher is a classifier", "takes a language model")),
        ("5_bayesian_search.py", ("--model_path", "models/student_pruned_w8a8"), ("is a classifier", "takes a language model")),
    ],
    ids=str,
)
def test_what_a_stage_is_given_is_checked_before_any_work(wrong_parents, run_here, script, arguments, parts):
    before = sorted((wrong_parents / "models").rglob("*"))
    expect_error(run_here, script, *arguments, cwd=wrong_parents, parts=parts)
    assert sorted((wrong_parents / "models").rglob("*")) == before


@pytest.mark.parametrize(
    ("script", "arguments", "part"),
    [
        ("4_smoothquant_llama.py", ("--output_dir=.",), "plain name"),
        ("4_smoothquant_llama.py", ("--output_dir", "q", "--nf4_dir", "q"), "models/q and models/q are one place"),
        ("4_smoothquant_llama.py", ("--output_dir", "llama"), "it is the model that is read"),
        ("4_smoothquant_llama.py", ("--output_dir", "student_pruned"), "what `python 2_prune_finetune.py` makes"),
        ("5_bayesian_search.py", ("--strategy", "fixed", "--output", "models"), "inside the other"),
        ("5_bayesian_search.py", ("--strategy", "fixed", "--output", "models/llama"), "it is the model that is read"),
        ("5_bayesian_search.py", ("--strategy", "fixed", "--output", "."), "inside the other"),
        ("5_bayesian_search.py", ("--strategy", "fixed", "--output", ".."), "inside the other"),
        ("5_bayesian_search.py", ("--strategy", "fixed", "--output", "sst2_data"), "no checkpoint of this project"),
        ("5_bayesian_search.py", ("--output", "models/teacher"), "what `python 1_distill.py` makes"),
    ],
    ids=str,
)
def test_no_stage_replaces_what_it_has_not_made(wrong_parents, run_here, script, arguments, part):
    before = {path: path.stat().st_mtime_ns for path in wrong_parents.rglob("*") if path.is_file()}
    expect_error(run_here, script, *arguments, cwd=wrong_parents, parts=(part,))
    assert {path: path.stat().st_mtime_ns for path in wrong_parents.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--student_layers", 9), ("student_layers 9", "1 to 4")),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_by_the_distilling_stage(copy, run_here, arguments, parts):
    expect_error(run_here, "1_distill.py", "--force", True, *arguments, cwd=copy, parts=parts)


def test_an_unknown_criterion_names_the_known_ones(copy, run_here):
    status, output = run_here("2_prune_finetune.py", "--criterion", "magic", cwd=copy)
    assert status == 2
    assert all(word in output for word in ("magic", *CRITERIA))


def test_a_shell_sees_the_message_and_nothing_else(copy):
    result = scripts.run_script("2_prune_finetune.py", "--target_sparsity", "1.2", cwd=copy)
    assert result.returncode == 1
    assert result.stderr == "error: target_sparsity 1.2 is not in [0, 1): for example --target_sparsity 0.42\n"


@pytest.mark.parametrize("name", ["download_model.py", "1_distill.py", "2_prune_finetune.py"])
def test_unknown_profiles_and_flags_are_refused_by_every_stage(copy, run_here, name):
    status, output = run_here(name, "--profile", "huge", cwd=copy)
    assert status == 1 and "unknown profile 'huge'" in output and "embedded, sst2, paper, smoke" in output
    status, output = run_here(name, "--no_such_flag", 1, cwd=copy)
    assert status == 2 and "no_such_flag" in output
