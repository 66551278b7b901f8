"""What the tests build on: sentences a classifier can learn, tiny models with weights everywhere, and what a script finds of both."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
)

from compactmind.attention import with_attention_kernel
from compactmind.checkpoint import save_checkpoint
from compactmind.data import Sentence, normalize
from compactmind.methods.pruning.encoder import layer_shapes
from compactmind.methods.pruning.importance import LayerScores
from compactmind.methods.pruning.masks import LayerMask, full_masks
from compactmind.text import write_text

REPOSITORY = Path(__file__).resolve().parent.parent

POSITIVE = ["good", "great", "lovely", "funny", "warm", "brilliant", "charming", "moving", "fresh", "clever"]
NEGATIVE = ["bad", "awful", "dull", "boring", "cold", "clumsy", "stale", "empty", "weak", "tedious"]
NEUTRAL = [
    *["a", "the", "this", "that", "film", "movie", "story", "plot", "scene", "actor", "director", "music", "camera"],
    *["ending", "script", "with", "and", "of", "in", "for", "is", "was", "very", "rather", "quite", "almost", "never"],
    *["always", "some", "every", "long", "short", "old", "new", "first", "last", "whole", "half"],
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *POSITIVE, *NEGATIVE, *NEUTRAL]


# ------------------------------------------------------------------------------------------------------------ sentences
def make_sentences(count: int, seed: int = 0) -> list[Sentence]:
    """Return `count` different sentences of 3 to 16 words, labels alternating; one or two words give the label away."""
    source = random.Random(seed)
    seen, sentences = set(), []
    while len(sentences) < count:
        label = len(sentences) % 2
        words = source.choices(NEUTRAL, k=source.randint(2, 14)) + source.choices(
            (NEGATIVE, POSITIVE)[label], k=source.randint(1, 2)
        )
        source.shuffle(words)
        text = " ".join(words)
        if normalize(text) not in seen:
            seen.add(normalize(text))
            sentences.append(Sentence(text, label))
    return sentences


def write_sst2(folder: Path, train_rows: int, dev_rows: int) -> None:
    """Write train.tsv and dev.tsv as GLUE has them; no sentence stands in both."""
    folder.mkdir(parents=True, exist_ok=True)
    sentences = make_sentences(train_rows + dev_rows, seed=7)
    for name, part in {"dev": sentences[:dev_rows], "train": sentences[dev_rows:]}.items():
        rows = "".join(f"{sentence.text}\t{sentence.label}\n" for sentence in part)
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + rows, encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- models
def make_tokenizer(folder: Path) -> BertTokenizerFast:
    """Return a WordPiece tokenizer that knows the words of `make_sentences`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)


def bert_config(**changes) -> BertConfig:
    """Return the configuration of a BERT with 4 layers, 4 heads of 8, FFN 64; `changes` on top."""
    settings = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    settings |= {"intermediate_size": 64, "max_position_embeddings": 64, "num_labels": 2, "pad_token_id": 0}
    return BertConfig(**settings | changes)


def distilbert_config(**changes) -> DistilBertConfig:
    """Return the configuration of a DistilBERT with 3 layers, 4 heads of 8, FFN 64; `changes` on top."""
    settings = {"vocab_size": len(VOCABULARY), "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
    settings |= {"max_position_embeddings": 64, "num_labels": 2, "pad_token_id": 0}
    return DistilBertConfig(**settings | changes)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> torch.nn.Module:
    """Give every parameter, biases and norms too, a random value other than its initial one; the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.copy_(1 + noise if "norm" in name.lower() and name.endswith("weight") else noise)
    if "CausalLM" in type(model).__name__:
        with_attention_kernel(model)  # as a loaded one has
    return model.eval()


def make_bert(seed: int = 0, scale: float = 0.2, **changes) -> BertForSequenceClassification:
    """Return a BERT classifier with random weights everywhere, in evaluation mode."""
    return randomize(BertForSequenceClassification(bert_config(**changes)), seed, scale)


def make_distilbert(seed: int = 0, scale: float = 0.2, **changes) -> DistilBertForSequenceClassification:
    """Return a DistilBERT classifier with random weights everywhere, in evaluation mode."""
    return randomize(DistilBertForSequenceClassification(distilbert_config(**changes)), seed, scale)


def random_scores(model, seed: int = 0) -> list[LayerScores]:
    """Return a score for every head and neuron of an encoder, in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        LayerScores(torch.rand(shape["num_heads"], generator=generator), torch.rand(shape["intermediate_size"], generator=generator))
        for shape in layer_shapes(model)
    ]  # fmt: skip


MAKERS = {"bert": make_bert, "distilbert": make_distilbert}


def encoder_config(family: str, **changes) -> PretrainedConfig:
    """Return the configuration of a small encoder of any of FAMILIES: 4 layers, 4 heads of 8, FFN 64; `changes` on top."""
    settings = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    settings |= {"intermediate_size": 64, "max_position_embeddings": 64, "num_labels": 2, "pad_token_id": 0}
    settings |= {"embedding_size": 16} if family == "electra" else {}
    settings |= {"bos_token_id": 2, "eos_token_id": 3}
    if family == "distilbert":
        return distilbert_config(**changes)
    return AutoConfig.for_model(family, **settings | changes)


def make_encoder(family: str, seed: int = 0, scale: float = 0.2, **changes) -> PreTrainedModel:
    """Return a classifier of any of FAMILIES with random weights everywhere, in evaluation mode."""
    config = encoder_config(family, **changes)
    return randomize(AutoModelForSequenceClassification.from_config(config), seed, scale)


def make_byte_bpe(folder: Path, vocab_size: int = 400) -> RobertaTokenizerFast:
    """Return a byte-level BPE tokenizer of the words of `make_sentences`, as RoBERTa has: `<pad>` is token 1."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = [sentence.text for sentence in make_sentences(200)]
    trained.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    trained.save_model(str(folder))
    return RobertaTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=62)

LLAMA_VOCABULARY = 264
"""The 256 bytes and the begin-of-text token of `make_byte_tokenizer`, and a few ids that never occur."""


def llama_settings(**changes) -> dict:
    """Return the settings of a Llama with 2 blocks, 4 query and 2 key-value heads of 8, MLP 48; `changes` on top."""
    settings = {"vocab_size": LLAMA_VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
    return settings | {"bos_token_id": 256, "eos_token_id": None, "pad_token_id": None} | changes


def make_llama(seed: int = 0, scale: float = 0.2, **changes) -> LlamaForCausalLM:
    """Return a Llama with random weights everywhere, in evaluation mode; head and embeddings apart unless `changes` tie them."""
    return randomize(LlamaForCausalLM(LlamaConfig(**llama_settings(**changes))), seed, scale)


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Cast, in place, the parameters only: `model.to(dtype)` would round the rotary frequencies too, loading does not."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte of UTF-8 and one begin-of-text token (id 256) in front of each text."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"<s>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def example_windows(count: int = 3, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Return random token ids for `make_llama`: int64 (count, length)."""
    return torch.randint(0, LLAMA_VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def uneven_masks(model, seed: int = 0) -> list[LayerMask]:
    """Return masks that prune `index` heads and 4 + 6 x `index` neurons of layer `index`, chosen at random."""
    generator = torch.Generator().manual_seed(seed)
    masks = full_masks(model)
    for index, mask in enumerate(masks):
        mask.heads[torch.randperm(len(mask.heads), generator=generator)[: index % len(mask.heads)]] = False
        mask.neurons[torch.randperm(len(mask.neurons), generator=generator)[: 4 + 6 * index]] = False
    return masks


def example_batch(rows: int = 5, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random token ids and an attention mask whose rows end at different lengths: both (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, len(VOCABULARY), (rows, length), generator=generator)
    lengths = torch.tensor([length - index % length for index in range(rows)])
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


@torch.no_grad()
def logits_of(model, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Return a model's logits for `example_batch`, in evaluation mode: (rows, classes)."""
    return model.eval()(**(batch or example_batch())).logits


def fp16_on_a_cpu() -> Accelerator:
    """Return an Accelerator that trains in fp16 with a loss scale, as on a GPU without bf16; accelerate itself refuses a CPU."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


# ------------------------------------------------------------------------------------------------------ what lies there
def make_workspace(folder: Path, train_rows: int = 600, dev_rows: int = 60) -> Path:
    """Fill a directory with what download_model.py finds without a network: a tiny BERT and a small SST-2."""
    assets = folder / "local_assets" / "tiny-bert"
    tokenizer = make_tokenizer(folder / "vocabulary")
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(assets)
    tokenizer.save_pretrained(assets)
    write_sst2(folder / "sst2_data" / "glue" / "sst2", train_rows, dev_rows)
    return folder


def add_text(folder: Path, characters: int = 4000) -> None:
    """Write wikitext_data/ with three parts that do not overlap."""
    sentences = [sentence.text for sentence in make_sentences(600, seed=3)]
    parts = {name: " . ".join(sentences[start::3])[:characters] for start, name in enumerate(("train", "validation", "test"))}
    write_text(folder / "wikitext_data", {name: [text] for name, text in parts.items()}, {"source": "made up"})


def released_llama(model: torch.nn.Module | None = None) -> torch.nn.Module:
    """Return a small Llama with tied embeddings, or `model`, in the dtype of a release: bfloat16."""
    model = cast_parameters(model or make_llama(tie_word_embeddings=True, scale=0.5), torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


def add_llama(folder: Path, **changes) -> None:
    """Write models/llama and the text for it, as download_model.py does with a larger one; `changes`: settings of the model."""
    stage = {"script": "download_model.py", "config": {}, "inputs": {}}
    model = released_llama(make_llama(**{"tie_word_embeddings": True, "scale": 0.5} | changes))
    tokenizer = make_byte_tokenizer()
    save_checkpoint(folder / "models" / "llama", model, tokenizer, kind="dense", parent=None, stage=stage, dtype="bfloat16")
    add_text(folder)


@contextmanager
def training_batches() -> Iterator[list[list[tuple[int, ...]]]]:
    """Yield a list that gets, for every forward pass of a model in training mode inside the `with` block, the token ids of its rows.

    Of the models of this file, which are told by the size of their table; padding is taken off.
    """
    seen, sizes = [], (len(VOCABULARY), LLAMA_VOCABULARY)

    def look(module: torch.nn.Module, arguments: tuple) -> None:
        if isinstance(module, torch.nn.Embedding) and module.training and module.num_embeddings in sizes:
            seen.append([tuple(filter(None, row)) for row in arguments[0].tolist()])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
