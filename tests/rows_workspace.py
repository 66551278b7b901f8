"""Models of every kind of trouble beside sound ones, for the rows of the report."""

import helpers
import pytest
import torch
from transformers import (
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

from compactmind.checkpoint import save_checkpoint
from compactmind.data import write_dataset
from compactmind.manifest import identity_of

WORDS = len(helpers.VOCABULARY)


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
