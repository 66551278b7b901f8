"""Zero-shot tasks through the harness: which problems count as right, models in every format, what is refused, what is compared."""

import json
from types import SimpleNamespace

import helpers
import pytest
import torch

from compactmind.errors import CompactMindError
from compactmind.evaluation import zero_shot
from compactmind.evaluation.zero_shot import ask, compare_zero_shot, load_tasks, measure_zero_shot, require_tasks
from compactmind.methods.quantization.nf4_model import NF4Recipe, quantize_nf4
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama
from compactmind.report.as_shipped import row_as_shipped
from compactmind.report.zero_shot import zero_shot_sentences, zero_shot_table

CHOICES = ["a", "two words", "something longer still"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six problems of arc_easy, and a file of piqa that is none."""
    folder = tmp_path_factory.mktemp("zero_shot")
    problems = []
    for n in range(6):
        choices = {"text": CHOICES[n % 3 :] + CHOICES[: n % 3], "label": list("ABC")}
        problems.append({"question": f"Question {n}?", "choices": choices, "answerKey": "CABCCA"[n]})
    (folder / "arc_easy.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    (folder / "piqa.jsonl").write_text(json.dumps({"goal": "x", "sol1": "y", "label": 0}) + "\n")
    return folder


@pytest.fixture(scope="module")
def tasks(folder):
    pytest.importorskip("lm_eval", reason="the harness is not installed: pip install lm-eval, see requirements.txt")
    return load_tasks(["arc_easy"], folder)[0]


@pytest.fixture
def tokenizer():
    tokenizer = helpers.make_byte_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token
    return tokenizer


def log_likelihood(model, tokenizer, prompt: str, choice: str) -> float:
    before, ids = (tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in (prompt, prompt + choice))
    logits = model(ids).logits[0].double().log_softmax(-1)
    return sum(logits[place - 1, ids[0, place]].item() for place in range(before.shape[1], ids.shape[1]))


def test_right_is_the_choice_that_is_likeliest_per_character(folder, tasks, tokenizer):
    model = helpers.make_llama(max_position_embeddings=512)
    result = ask(model, tokenizer, tasks, 5, batch_size=2)["arc_easy"]
    expected = ""
    for line in (folder / "arc_easy.jsonl").read_text().splitlines()[:5]:
        problem = json.loads(line)
        with torch.no_grad():
            scores = [
                log_likelihood(model, tokenizer, f"Question: {problem['question']}\nAnswer:", f" {choice}") / len(choice)
                for choice in problem["choices"]["text"]
            ]  # fmt: skip
        expected += str(int("ABC"[scores.index(max(scores))] == problem["answerKey"]))
    assert result["right"] == expected and "1" in expected and "0" in expected
    assert (result["problems"], result["metric"]) == (5, "acc_norm") and result["accuracy"] == expected.count("1") / 5
    low, high = result["interval"]
    assert 0 <= low < result["accuracy"] < high <= 1


@pytest.mark.parametrize("kind", ["w8a8", "nf4"])
def test_a_model_of_integers_is_asked_too_and_stays_as_it_was(kind, tasks, tokenizer):
    model = helpers.make_llama(max_position_embeddings=512, tie_word_embeddings=True)
    if kind == "w8a8":
        quantize_llama(model, calibrate_llama(model, helpers.example_windows()), W8A8Recipe())
    else:
        quantize_nf4(model, helpers.example_windows(), NF4Recipe(compensation=False))  # the table, too: it has no weight that could be tied
    before = helpers.logits_of(model, {"input_ids": helpers.example_windows()})
    model.config.quantization_config = config = {"quant_method": "compressed-tensors"}  # as it is loaded
    assert ask(model, tokenizer, tasks, 2)["arc_easy"]["problems"] == 2
    assert model.config.quantization_config is config and "tie_weights" not in vars(model)
    assert torch.equal(helpers.logits_of(model, {"input_ids": helpers.example_windows()}), before)


def test_what_cannot_be_asked_is_refused_in_one_line_and_costs_no_other_task(folder, tasks):
    result, refused = load_tasks(["arc_easy", "piqa", "lambada_openai"], folder)
    assert list(result) == ["arc_easy"] and list(refused) == ["piqa", "lambada_openai"]
    assert refused["piqa"] == f"{folder / 'piqa.jsonl'} lacks sol2: a problem of piqa has goal, sol1, sol2, label"
    assert refused["lambada_openai"].startswith(f"{folder / 'lambada_openai.jsonl'} is not there, and the hub does not answer (")
    assert not any("\n" in why for why in refused.values())


@pytest.mark.parametrize("text", ["", "[1]\n", "no json\n"])
def test_a_file_without_problems_is_named(text, tmp_path):
    (tmp_path / "piqa.jsonl").write_text(text)
    with pytest.raises(CompactMindError, match="piqa.jsonl.*goal, sol1, sol2, label"):
        zero_shot.check_problems("piqa", tmp_path / "piqa.jsonl")


def test_an_unknown_task_is_refused_with_the_list():
    with pytest.raises(CompactMindError, match="'squad' is no task: choose among hellaswag, piqa, arc_easy"):
        require_tasks(["piqa", "squad"])


def test_what_is_known_stays_and_each_row_fails_alone(folder, monkeypatch):
    asked = []

    def ask_once(model, _, tasks, limit):
        asked.append((model, list(tasks), limit))
        if model == "dying":
            raise RuntimeError("out of memory")
        return {name: {"right": "101"} for name in tasks}

    monkeypatch.setattr(zero_shot, "ask", ask_once)
    rows = [{"name": name, "status": "measured"} for name in ("dying", "sound")] + [{"name": "absent", "status": "failed"}]

    def load(row):
        return SimpleNamespace(model=row["name"], tokenizer=None)

    measure_zero_shot(rows, load, {"arc_easy": None}, folder, 3)
    assert rows[0]["zero_shot"] is None and rows[0]["not_measured"] == {"zero_shot": "RuntimeError: out of memory"}
    assert rows[1]["zero_shot"]["arc_easy"]["right"] == "101" and "zero_shot" not in rows[2]
    measure_zero_shot(rows[1:], load, {"arc_easy": None}, folder, 3)
    measure_zero_shot(rows[1:], load, {"arc_easy": None, "piqa": None}, folder, 3)
    measure_zero_shot(rows[1:], load, {"arc_easy": None}, folder, 2)
    assert asked[2:] == [("sound", ["piqa"], 3), ("sound", ["arc_easy"], 2)]
    assert rows[1]["zero_shot"].keys() == {"arc_easy", "piqa"}


def outcome(right: str, limit: int = 0) -> dict:
    share = right.count("1") / len(right)
    return {"task": "piqa", "metric": "acc_norm", "harness": "lm-eval 1", "version": 1.0, "problems": len(right), "accuracy": share,
            "interval": [share - 0.01, share + 0.01], "right": right, "asked": {"limit": limit, "problems": "hub"}}  # fmt: skip


def row(name: str, right: str, base: str | None = "llama", **changes) -> dict:
    result = {"name": name, "track": "llm", "status": "measured", "compared_with": base, "zero_shot": {"piqa": outcome(right)}}
    return result | changes


def test_rows_are_compared_on_the_same_problems():
    dense = "1" * 30 + "0" * 10
    rows = [row("llama", dense), row("close", dense[:-1] + "1"), row("worse", "0" * 20 + dense[20:]), row("alone", dense, None),
            row("other", dense, zero_shot={"piqa": outcome(dense, limit=40)}),
            {"name": "x", "status": "not run", "command": "y"}]  # fmt: skip
    compare_zero_shot(rows)
    result = {each["name"]: each["zero_shot"]["piqa"]["against"] for each in rows[:-1]}
    assert result["llama"] is result["alone"] is result["other"] is None
    assert (result["close"]["only_reference_correct"], result["close"]["only_this_correct"], result["close"]["p_holm"]) == (0, 1, 1.0)
    assert result["worse"]["only_reference_correct"] == 20 and result["worse"]["p_holm"] == pytest.approx(2 * result["worse"]["p_value"])
    report = {"models": rows, "zero_shot_refused": {"hellaswag": "no file"}}
    table = zero_shot_table(report)
    assert table.header == ["model", "piqa [95%]", "p, Holm"] and table.rows[0] == ["llama", "75.0% [74.0%, 76.0%]", "-"]
    assert table.rows[1][2] == "1" and "piqa: acc_norm, 40 problems (lm-eval 1)" in table.note
    text = zero_shot_sentences(report)
    assert text[0].startswith("Zero-shot, of 2 comparisons with the model each was made from on the same problems 1 differs from chance: ")
    assert text[0].count("worse at piqa (p = 3.8e-06)") == 1 and text[1] == "hellaswag was not asked: no file."
    report["models"] = [rows[0], rows[1]]
    assert "none differs from chance" in zero_shot_sentences(report)[0]
    assert zero_shot_table({"models": [{"name": "x", "status": "measured"}]}) is None


def test_a_published_file_was_not_asked():
    dense = row("llama", "10", size_mb=2.0, kernel="float32")
    assert "zero_shot" not in row_as_shipped(dense, {"bytes": 10, "sha256": "x", "file": "a.gguf"})
