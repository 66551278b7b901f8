"""Quantize the distilled and the pruned student to NF4 4-bit weights (or int8), the pruned one to W8A8 too, and check that they reload.

Paper: Dettmers et al. 2023 (QLoRA: NF4, double quantization), Frantar et al. 2023 (GPTQ: compensating the rounding),
       Dettmers et al. 2022 (LLM.int8()). Library: bitsandbytes. W8A8: compactmind/methods/quantization/w8a8_encoder.py.
Run:   python 3_quantize.py                     (after 1_distill.py and 2_prune_finetune.py; every setting: --help)
       python 3_quantize.py --method int8       (the fallback when 4 bits cost too much accuracy)
       python 3_quantize.py --vocabulary_coverage 0.999    (the smallest: docs/encoders.md)
Reads: models/student_distilled, models/student_pruned, sst2_data/{train,validation}.jsonl
Writes: models/student_distilled_nf4, models/student_pruned_nf4 (or ..._int8), models/student_pruned_w8a8; with a vocabulary_coverage
        <parent>_small, whose vocabulary is what the training text needs, and the same made of it
Time:  about 20 seconds on 2 CPU cores (embedded profile).

The linears of the encoder blocks are packed; classifier heads stay in full precision; embedding tables, two thirds of a
small encoder, become int8 with a scale for every 64 weights of a row (--embeddings int4: fewer bytes, fp16: more).
4-bit weights are multiplied in bf16 on a GPU and in fp32 on a CPU: they save bytes. W8A8 multiplies int8 by int8: it saves time.
"""

from pathlib import Path

import torch

from common import PROFILE, QuantizeConfig, parse_command_line, run_stage
from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.classifier_room import require_room_for
from compactmind.code_version import code_version
from compactmind.data import EncodedSentences, all_texts, data_fingerprint, load_split, spread
from compactmind.devices import default_device
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import accuracy_of
from compactmind.files import lock_directory
from compactmind.forward import predict_logits
from compactmind.guards import check_outputs, check_parent, check_tokenizer
from compactmind.manifest import is_up_to_date, read_manifest, weights_fingerprint
from compactmind.methods.quantization.grouped import GroupedEmbedding
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.methods.vocabulary import cut_table, same_tokenizer, smaller_tokenizer, tokens_to_keep
from compactmind.trained_on import check_trained_on

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.QuantizeConfig. For example: for_profile(PROFILE, method="int8")
CONFIG = QuantizeConfig.for_profile(PROFILE)

RELOAD_TOLERANCE = 0.0
"""Largest allowed difference of any logit between the quantized model and the same model loaded from its file."""


SMALL = "_small"
"""What the name of a model with a cut vocabulary ends with."""


def embedding_bytes(model: torch.nn.Module) -> int:
    """Return what the embedding tables weigh, in bytes as stored."""
    tables = [module.state_dict() for module in model.modules() if isinstance(module, (torch.nn.Embedding, GroupedEmbedding))]
    return sum(tensor.numel() * tensor.element_size() for table in tables for tensor in table.values())


def stage_of(config: QuantizeConfig, parent: str, settings: list[str], **more: str) -> dict:
    """Return what a model made of models/<parent> depends on: these settings, what else decides, the data and the parent's weights."""
    return {
        "script": "3_quantize.py",
        "code": code_version(__file__),
        "config": {**more, **config.relevant(*settings), "data": data_fingerprint(config.data_dir)},
        "inputs": {parent: weights_fingerprint(config.models_dir / parent)},
    }


def quantize(name: str, method: str, config: QuantizeConfig, device: str) -> None:
    """Quantize models/<name> into models/<name>_<method> and verify the file by loading it again."""
    source, directory = config.models_dir / name, config.models_dir / f"{name}_{method}"
    settings = ["profile", "embeddings", "max_length"]
    if method != "w8a8":
        settings += ["double_quantization", "calibration_sentences"]
    stage = stage_of(config, name, settings, method=method)
    if not config.force and is_up_to_date(directory, stage, config.verify):
        print(f"{directory} is up to date: skipped (--force True quantizes again)")
        return
    require_room_for("3_quantize.py", config)
    parent = load_checkpoint(source, device)
    check_tokenizer(parent.model, parent.tokenizer, source, padding=True)

    # ---- quantize and measure on the validation sentences
    validation = EncodedSentences(parent.tokenizer, load_split(config.data_dir, "validation"), config.max_length)
    print(f"validation: {validation.describe_cut()}")
    before = predict_logits(parent.model, validation, config.eval_batch_size)
    tables_before = embedding_bytes(parent.model)
    if method == "w8a8":
        description = quantize_encoder(parent.model, config.embeddings)
    else:
        train = load_split(config.data_dir, "train")
        sentences = [train[number] for number in spread(len(train), config.calibration_sentences)]
        calibration = EncodedSentences(parent.tokenizer, sentences, config.max_length) if sentences else None
        description = quantize_model(
            parent.model,
            method,
            double_quantization=config.double_quantization,
            embeddings=config.embeddings,
            calibration=calibration.evaluation_batches(config.eval_batch_size) if calibration else None,
        )
    after = predict_logits(parent.model, validation, config.eval_batch_size)
    metrics = {
        "validation_accuracy": accuracy_of(after, validation.labels),
        "parent_validation_accuracy": accuracy_of(before, validation.labels),
        "agreement_with_parent": accuracy_of(after, before.argmax(dim=-1)),
        "embedding_bytes": embedding_bytes(parent.model),
        "parent_embedding_bytes": tables_before,
    }

    # ---- save what reloads with equal logits
    def check(saved: Path) -> None:
        reloaded = predict_logits(load_checkpoint(saved, device).model, validation, config.eval_batch_size)
        difference = (reloaded - after).abs().max().item()
        if not difference <= RELOAD_TOLERANCE:
            raise CompactMindError(
                f"{directory}: reloaded logits differ by {difference:.2e}, so it was not kept: this is a bug, please report it"
            )

    save_checkpoint(
        directory, parent.model, parent.tokenizer, kind=method, parent=name, stage=stage, metrics=metrics,
        quantization=description, data_fingerprint=data_fingerprint(config.data_dir), check=check,
        beside=source,
    )  # fmt: skip

    size = {path: read_manifest(path)["files"]["model.safetensors"]["bytes"] / 1e6 for path in (source, directory)}
    print(
        f"{directory.name:<22} {size[source]:.1f} -> {size[directory]:.1f} MB ({size[source] / size[directory]:.2f}x smaller; "
        f"embeddings {tables_before / 1e6:.1f} -> {metrics['embedding_bytes'] / 1e6:.1f} MB) | validation accuracy "
        f"{metrics['parent_validation_accuracy']:.2%} -> {metrics['validation_accuracy']:.2%} | "
        f"same answer on {metrics['agreement_with_parent']:.2%} | reloads with equal logits"
    )


def cut_vocabulary(name: str, config: QuantizeConfig, device: str) -> None:
    """Make models/<name>_small of models/<name>: the same weights, with the tokens alone that the training text is made of."""
    source, directory = config.models_dir / name, config.models_dir / f"{name}{SMALL}"
    stage = stage_of(config, name, ["profile", "vocabulary_coverage", "max_length"])
    if not config.force and is_up_to_date(directory, stage, config.verify):
        print(f"{directory} is up to date: skipped (--force True cuts again)")
        return
    parent = load_checkpoint(source, device)
    check_tokenizer(parent.model, parent.tokenizer, source, padding=True)
    sentences = load_split(config.data_dir, "validation")
    validation = EncodedSentences(parent.tokenizer, sentences, config.max_length)
    before, rows = predict_logits(parent.model, validation, config.eval_batch_size), parent.model.config.vocab_size
    kept = tokens_to_keep(parent.tokenizer, all_texts(load_split(config.data_dir, "train")), config.vocabulary_coverage)
    tokenizer = smaller_tokenizer(parent.tokenizer, kept)
    cut_table(parent.model, kept)
    validation = EncodedSentences(tokenizer, sentences, config.max_length)
    after = predict_logits(parent.model, validation, config.eval_batch_size)
    metrics = {
        "validation_accuracy": accuracy_of(after, validation.labels),
        "parent_validation_accuracy": accuracy_of(before, validation.labels),
        "agreement_with_parent": accuracy_of(after, before.argmax(dim=-1)),
        "vocabulary": len(kept),
        "parent_vocabulary": rows,
    }

    def check(saved: Path) -> None:
        again = load_checkpoint(saved, device)
        same = same_tokenizer(again.tokenizer, tokenizer)
        if not (same and torch.equal(predict_logits(again.model, validation, config.eval_batch_size), after)):
            raise CompactMindError(f"{directory}: it does not reload unchanged, so it is removed: a bug, please report it")

    save_checkpoint(
        directory, parent.model, tokenizer, kind=parent.manifest["kind"], parent=name, stage=stage, metrics=metrics,
        data_fingerprint=data_fingerprint(config.data_dir), check=check, beside=source,
    )  # fmt: skip
    print(
        f"{directory.name:<22} {rows} -> {len(kept)} tokens | validation accuracy {metrics['parent_validation_accuracy']:.2%} -> "
        f"{metrics['validation_accuracy']:.2%} | same answer on {metrics['agreement_with_parent']:.2%}"
    )


# ----------------------------------------------------------------------------------------------------------------- main
def main(config: QuantizeConfig) -> None:
    device, models = default_device(), config.models_dir
    parents_of_option = {"--parents": (config.method, config.parents), "--w8a8_parents": ("w8a8", config.w8a8_parents)}
    for option, (_, names) in parents_of_option.items():
        for name in names:
            check_parent(models / name, option, "classifier")
    jobs = list(dict.fromkeys((name, method) for method, names in parents_of_option.values() for name in names))
    parents = list(dict.fromkeys(name for name, _ in jobs))
    check_trained_on([models / name for name in parents], config.data_dir)
    to_cut = parents if config.vocabulary_coverage else []
    jobs += [(f"{name}{SMALL}", method) for name, method in jobs if to_cut]
    outputs = [models / f"{name}{SMALL}" for name in to_cut] + [models / f"{name}_{method}" for name, method in jobs]
    check_outputs(outputs, "3_quantize.py", [models / name for name in parents], models)
    for name in to_cut:
        with lock_directory(models / f"{name}{SMALL}"):
            cut_vocabulary(name, config, device)
    for name, method in jobs:
        with lock_directory(models / f"{name}_{method}"):
            quantize(name, method, config, device)


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
