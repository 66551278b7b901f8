"""The distillation loss: match the teacher's softened output distribution as well as the labels.

Hinton et al. 2015 (https://arxiv.org/abs/1503.02531). The KL term is multiplied by temperature squared, so that its
gradient keeps its size when the temperature changes during training.
"""

import torch
import torch.nn.functional as F


def soft_target_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return temperature^2 * KL(teacher || student) of the softened distributions, in nats, mean over rows.

    Both logits: (batch, classes); the result is a scalar.
    """
    return temperature**2 * F.kl_div(
        F.log_softmax(student_logits / temperature, dim=-1),
        F.log_softmax(teacher_logits / temperature, dim=-1),
        log_target=True,
        reduction="batchmean",
    )


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Return alpha * soft-target loss + (1 - alpha) * cross-entropy with the labels; labels alone without a teacher.

    Logits: (batch, classes), labels: (batch,).
    """
    label_loss = F.cross_entropy(student_logits, labels)
    if teacher_logits is None or alpha == 0:
        return label_loss
    return alpha * soft_target_loss(student_logits, teacher_logits, temperature) + (1 - alpha) * label_loss


def hidden_state_loss(
    student_states: tuple[torch.Tensor, ...],
    teacher_states: tuple[torch.Tensor, ...],
    layer_map: list[int],
    attention_mask: torch.Tensor,
) -> torch.Tensor:
    """Return the mean squared error between each student layer's output and that of the teacher layer it should reproduce.

    States are the tuples `output_hidden_states=True` gives: embeddings first, then one (batch, seq, hidden_size) per layer;
    `layer_map[i]` is the teacher layer for student layer i. Padding (mask 0) does not count. States of any float dtype are compared
    in float32 at least: the square of 256 is no number any more in fp16.
    """
    kept = attention_mask.bool()

    def widened(states: torch.Tensor) -> torch.Tensor:
        return states[kept].to(torch.promote_types(states.dtype, torch.float32))

    losses = [F.mse_loss(widened(student_states[i + 1]), widened(teacher_states[j + 1])) for i, j in enumerate(layer_map)]
    return torch.stack(losses).mean()
