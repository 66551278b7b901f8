"""GSM8K through the harness: what counts as solved, strictly and flexibly, and what is said when the problems are not there."""

import json

import helpers
import pytest
import torch

from compactmind.errors import CompactMindError
from compactmind.evaluation.capability import gsm8k
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama
from compactmind.report.tables import gsm8k_table

PROBLEMS = {
    "How many legs have two spiders and a bee?": ("2 * 8 + 6 = <<16+6=22>>22\n#### 22", " 16 and 6 are 22. The answer is 22.\nQ: more?"),
    "A book of 1,200 pages, half of it read. What is left?": ("#### 600", " Half of 1,200 is 600"),
    "What is 7 less 7?": ("#### 0", " The answer is 1."),
    "Never asked, as three were wanted.": ("#### 1", " The answer is 1."),
}  # fmt: skip
"""Question -> the answer in the file, and what the model says."""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, (a, _) in PROBLEMS.items()))
    return path


def test_solved_is_the_right_number_in_the_right_place_or_the_last_one_anywhere(file, monkeypatch):
    model, tokenizer = helpers.make_llama(max_position_embeddings=8192), helpers.make_byte_tokenizer()
    tokenizer.eos_token, prompts = tokenizer.bos_token, []

    def generate(input_ids, **_):
        rows = []
        for ids in input_ids:
            prompts.append(tokenizer.decode(ids, skip_special_tokens=True))
            said = next(said for question, (_, said) in PROBLEMS.items() if prompts[-1].rstrip().endswith(f"{question}\nA:"))
            rows.append(torch.cat([ids, tokenizer(said, return_tensors="pt", add_special_tokens=False)["input_ids"][0]]))
        longest = max(map(len, rows))
        return torch.stack(
            [torch.nn.functional.pad(row, (0, longest - len(row)), value=tokenizer.pad_token_id or 0) for row in rows]
        )

    monkeypatch.setattr(model, "generate", generate)
    result = gsm8k(model, tokenizer, 3, file=file, batch_size=2)
    assert result["problems"] == len(prompts) == 3
    assert prompts[0].count("Q: ") == 9  # eight worked examples
    assert result["strict"]["accuracy"] == pytest.approx(1 / 3) and result["flexible"]["accuracy"] == pytest.approx(2 / 3)
    low, high = result["strict"]["interval"]
    assert low == pytest.approx(0.0615, abs=1e-3) and high == pytest.approx(0.7923, abs=1e-3)  # Wilson, 1 of 3
    table = gsm8k_table({"models": [{"name": "mine", "gsm8k": result}, {"name": "other"}]})
    assert "3 problems" in table.caption and [row[0] for row in table.rows] == ["mine"]
    assert "33.3% [6.1%, 79.2%]" in table.as_text()
    assert gsm8k_table({"models": [{"name": "other"}]}) is None


def test_an_int8_model_is_asked_too_and_stays_as_it_was(file):
    model, tokenizer = helpers.make_llama(max_position_embeddings=8192), helpers.make_byte_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token
    quantize_llama(model, calibrate_llama(model, helpers.example_windows()), W8A8Recipe())
    model.config.quantization_config = config = {"quant_method": "compressed-tensors"}  # as it is loaded
    result = gsm8k(model, tokenizer, 1, file=file, max_new_tokens=2)
    assert result["problems"] == 1 and result["strict"]["accuracy"] in (0, 1)
    assert model.config.quantization_config is config


def test_without_the_problems_it_says_where_they_belong(tmp_path):
    with pytest.raises(CompactMindError, match="test.jsonl not found"):
        gsm8k(helpers.make_llama(), helpers.make_byte_tokenizer(), 3, file=tmp_path / "test.jsonl")
