"""Copies of training texts: how much of them is changed, what never is, and what a student learns from them."""

import json

import helpers
import pytest

from compactmind.checkpoint import save_checkpoint
from compactmind.data import Sentence
from compactmind.errors import CompactMindError
from compactmind.methods.distillation import augmentation
from compactmind.methods.distillation.augmentation import LONGEST_RUN, MASKED, RUNS, augmented, mask_of

TEXTS = [Sentence(" ".join(f"w{row}x{word}" for word in range(20)), row % 3) for row in range(500)]


def test_the_originals_come_first_and_copies_keep_their_labels():
    copies = augmented(TEXTS, 2, "[MASK]", 1)
    assert copies[:500] == TEXTS and len(copies) == 1500
    assert [each.label for each in copies[500:]] == [each.label for each in TEXTS] * 2
    assert copies[500:1000] != copies[1000:]  # each copy is another one
    assert augmented(TEXTS, 0, "[MASK]", 1) == TEXTS


def test_as_much_is_changed_as_the_paper_says():
    copies = [each.text.split() for each in augmented(TEXTS, 4, "[MASK]", 1)[500:]]
    runs = [words for words in copies if len(words) < 20]
    assert len(runs) / len(copies) == pytest.approx(RUNS, abs=0.03)
    assert {len(words) for words in runs} == set(range(1, LONGEST_RUN + 1))
    whole = [word for words in copies if len(words) == 20 for word in words]
    assert whole.count("[MASK]") / len(whole) == pytest.approx(MASKED, abs=0.01)


def test_what_stays_is_a_run_of_the_original_and_never_masks_alone():
    for original, copy in zip(TEXTS * 4, augmented(TEXTS, 4, "[MASK]", 2)[500:], strict=True):
        words, kept = original.text.split(), copy.text.split()
        assert any(
            all(word in ("[MASK]", there) for word, there in zip(kept, words[start:], strict=False))
            for start in range(len(words) - len(kept) + 1)
        )
        assert set(kept) != {"[MASK]"}


def test_two_tokenizers_read_the_same_copies():
    bert, roberta = (augmented(TEXTS, 1, mask, 7) for mask in ("[MASK]", "<mask>"))
    assert [each.text.replace("[MASK]", "<mask>") for each in bert] == [each.text for each in roberta]
    assert augmented(TEXTS, 1, "[MASK]", 8) != bert


def test_of_pairs_both_are_masked_and_neither_is_cut():
    pairs = [Sentence("a b c d e f g h", 0, "i j k l m n o p")] * 200
    copies = augmented(pairs, 1, "[MASK]", 3)[200:]
    assert all(len(each.text.split()) == len(each.pair.split()) == 8 for each in copies)
    assert any("[MASK]" in each.text for each in copies) and any("[MASK]" in each.pair for each in copies)


@pytest.mark.parametrize("text", ["", "one", "  spaced   out  "])
def test_short_texts_are_copied(text):
    (copy,) = augmented([Sentence(text, 1)], 1, "[MASK]", 0)[1:]
    assert set(copy.text.split()) <= {*text.split(), "[MASK]"} and copy.label == 1


def test_a_tokenizer_without_a_mask_is_refused(tmp_path):
    tokenizer = helpers.make_tokenizer(tmp_path)
    assert mask_of(tokenizer) == "[MASK]"
    tokenizer.mask_token = None
    with pytest.raises(CompactMindError, match="no mask token: use --augment 0"):
        mask_of(tokenizer)


def test_the_distilled_student_alone_reads_copies(tmp_path, run_here, monkeypatch):
    helpers.make_workspace(tmp_path, train_rows=60, dev_rows=20)
    assert run_here("download_model.py", cwd=tmp_path)[0] == 0
    tokenizer, models = helpers.make_tokenizer(tmp_path / "vocabulary"), tmp_path / "models"
    made = {"script": "download_model.py"}
    save_checkpoint(models / "teacher_base", helpers.make_bert(), tokenizer, kind="dense", parent=None, stage=made)
    status, output = run_here("1_distill.py", "--augment", 2, "--students", "student_finetuned", cwd=tmp_path)
    assert status == 1 and "augment 2 is for student_distilled" in output
    assert run_here("1_distill.py", cwd=tmp_path)[0] == 0
    before = {name: json.loads((models / name / "manifest.json").read_text()) for name in ("student_finetuned", "student_distilled")}
    rows = sum(1 for _ in (tmp_path / "sst2_data" / "train.jsonl").open())
    status, output = run_here("1_distill.py", "--augment", 2, cwd=tmp_path)
    assert status == 0 and f"computing the teacher's logits of {3 * rows} sentences once" in output
    assert "student_finetuned is up to date" in output and "teacher is up to date" in output
    after = {name: json.loads((models / name / "manifest.json").read_text()) for name in before}
    assert after["student_finetuned"] == before["student_finetuned"]
    assert after["student_distilled"]["stage"]["config"]["augment"] == 2
    assert after["student_distilled"]["files"] != before["student_distilled"]["files"]

    seeds = []
    monkeypatch.setattr(augmentation, "augmented", lambda *given: seeds.append(given[-1]) or augmented(*given))
    assert run_here("1_distill.py", "--augment", 1, "--seeds", 2, "--students", "student_distilled", cwd=tmp_path)[0] == 0
    assert seeds == [42, 43]  # every seed has copies of its own
