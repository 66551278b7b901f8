"""Make a student out of alternate layers of a teacher, as DistilBERT was made of BERT.

Sanh et al. 2019 (https://arxiv.org/abs/1910.01108). A BERT teacher gives a DistilBERT student, which has no token-type embeddings: for
single sentences they are one constant vector, which is added to the position embeddings, so nothing is lost. The teacher's pooler and
classifier become pre_classifier and classifier; the tanh between them is a ReLU in DistilBERT, which training absorbs. Any other teacher
of FAMILIES gives a student of its own family with fewer layers: embeddings and head are the teacher's, the function of as many layers is.
"""

import copy

import torch
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
)

from compactmind.methods.pruning.encoder import PARTS, encoder_blocks, encoder_layers, family_of


def alternate_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Return which teacher layer each student layer is copied from, evenly spaced from the first: 6, 3 -> [0, 2, 4].

    Raises ValueError unless 1 <= student_layers <= teacher_layers.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"student_layers must be between 1 and {teacher_layers} (the teacher's), not {student_layers}")
    return [index * teacher_layers // student_layers for index in range(student_layers)]


def matching_layers(teacher_layers: int, layer_map: list[int]) -> list[int]:
    """Return which teacher layer each student layer should reproduce: the last one it stands for, [0, 2, 4] -> [1, 3, 5].

    A student layer copied from teacher layer 2 also does the work of layer 3 that was left out, so its output belongs beside
    that of layer 3 (the uniform mapping of TinyBERT, Jiao et al. 2020, https://arxiv.org/abs/1909.10351).
    """
    return [following - 1 for following in [*layer_map[1:], teacher_layers]]


def student_from_teacher(teacher: PreTrainedModel, layer_map: list[int]) -> PreTrainedModel:
    """Return a new classifier with the teacher's embeddings, head, and the layers in `layer_map`; `teacher` stays as it is.

    Raises CompactMindError if the teacher is of none of FAMILIES.
    """
    of_bert = family_of(teacher).student == "distilbert"
    return _distilbert_from_bert(teacher, layer_map) if of_bert else _with_layers(teacher, layer_map)


@torch.no_grad()
def _with_layers(teacher: PreTrainedModel, layer_map: list[int]) -> PreTrainedModel:
    """Return a copy of a classifier that has the blocks in `layer_map` alone."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layer_map)
    student = type(teacher)(config)
    state = teacher.state_dict()
    theirs, ours = (
        next(name for name, module in model.named_modules() if module is encoder_blocks(model)) for model in (teacher, student)
    )
    kept = {name: value for name, value in state.items() if not name.startswith(f"{theirs}.")}
    for index, teacher_index in enumerate(layer_map):
        before = f"{theirs}.{teacher_index}."
        kept |= {f"{ours}.{index}.{name.removeprefix(before)}": state[name] for name in state if name.startswith(before)}
    student.load_state_dict(kept)
    return student


@torch.no_grad()
def _distilbert_from_bert(
    teacher: BertForSequenceClassification, layer_map: list[int]
) -> DistilBertForSequenceClassification:
    source = teacher.config
    student = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=source.vocab_size,
            max_position_embeddings=source.max_position_embeddings,
            n_layers=len(layer_map),
            n_heads=source.num_attention_heads,
            dim=source.hidden_size,
            hidden_dim=source.intermediate_size,
            activation=source.hidden_act,
            dropout=source.hidden_dropout_prob,
            attention_dropout=source.attention_probs_dropout_prob,
            pad_token_id=source.pad_token_id,
            num_labels=source.num_labels,
            id2label=source.id2label,
            label2id=source.label2id,
        )
    )
    ours, theirs = student.distilbert.embeddings, teacher.bert.embeddings
    ours.word_embeddings.weight.copy_(theirs.word_embeddings.weight)
    ours.position_embeddings.weight.copy_(theirs.position_embeddings.weight + theirs.token_type_embeddings.weight[0])
    ours.LayerNorm.load_state_dict(theirs.LayerNorm.state_dict())
    blocks = encoder_layers(teacher)
    for layer, teacher_index in zip(encoder_layers(student), layer_map, strict=True):
        for name in PARTS:
            getattr(layer, name).load_state_dict(getattr(blocks[teacher_index], name).state_dict())
    for name, teacher_name in zip(family_of(student).head, family_of(teacher).head, strict=True):
        student.get_submodule(name).load_state_dict(teacher.get_submodule(teacher_name).state_dict())
    return student
