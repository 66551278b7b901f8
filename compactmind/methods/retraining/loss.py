"""What retraining minimises: the loss of a predicted token, and what the dense model it is distilled from says of every window.

The loss of a predicted token is alpha * T^2 * KL(dense || pruned) at temperature T + (1 - alpha) * cross-entropy with the
token that really follows (Hinton et al. 2015, https://arxiv.org/abs/1503.02531), if wanted with the mean squared error
between the hidden states of both models on top. A loss is in nats and a mean over predicted tokens, seq_len - 1 per window.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.forward import HeadInputs, room_for
from compactmind.methods.distillation.soft_targets import hidden_state_loss
from compactmind.methods.distillation.student import alternate_layers, matching_layers
from compactmind.methods.retraining.recipe import RetrainRecipe

CHUNK_TOKENS = 32
"""Tokens whose logits are turned into float32 and softened at a time: 6 MB per tensor with a vocabulary of 50,000."""


def token_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Return the mean `distillation_loss` over tokens as a float32 scalar; its gradient is computed in the same pass.

    Logits: (tokens, vocab) in any float dtype, labels: (tokens,); labels alone count without a teacher. A few rows at a time are turned
    into float32, so that they stay in the processor's cache: with a large vocabulary the softened distributions of all rows
    would be several times the rest of the model's activations. There is one backward pass, for the student's logits.
    """
    return _TokenLoss.apply(student_logits, teacher_logits, labels, temperature, 0.0 if teacher_logits is None else alpha)


class _TokenLoss(torch.autograd.Function):
    """What `token_loss` computes: forward keeps the gradient (tokens, vocab) of the mean, backward scales it, in place, once.

    In fp16 nearly all of that gradient would be 0 (the mean over 1,000 tokens of a probability of 1e-5 is 1e-8, the smallest
    number is 6e-8), and a loss scale of 65536 no number: there it is kept times a power of two that makes the best of the range,
    and is multiplied with what comes from above in float32.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, labels, temperature: float, alpha: float) -> torch.Tensor:
        tokens = len(labels)
        gradient = torch.empty_like(student_logits)  # (tokens, vocab), of the mean, times ctx.scale
        ctx.scale = 1.0
        if gradient.dtype == torch.float16:  # no change of a sum is larger than (1 - alpha) + alpha * temperature
            ctx.scale = tokens * 2.0 ** math.floor(math.log2(2**15 / (1 - alpha + alpha * temperature)))
        total = torch.zeros((), dtype=torch.float64, device=labels.device)
        with torch.autocast(labels.device.type, enabled=False):  # it would round what is float32 here on purpose
            for start in range(0, tokens, CHUNK_TOKENS):
                rows = slice(start, start + CHUNK_TOKENS)
                logits, wanted = student_logits[rows].float(), labels[rows, None]
                change = torch.log_softmax(logits, dim=-1)
                total -= (1 - alpha) * change.gather(1, wanted).double().sum()
                change.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=change.dtype)).mul_(1 - alpha)
                if alpha > 0:
                    ours = torch.log_softmax(logits / temperature, dim=-1)
                    theirs = torch.log_softmax(teacher_logits[rows].float() / temperature, dim=-1)
                    soft = theirs.exp()
                    total += alpha * temperature**2 * torch.linalg.vecdot(soft, theirs - ours).double().sum()
                    change.add_(ours.exp_().sub_(soft), alpha=alpha * temperature)
                gradient[rows] = change.div_(tokens / ctx.scale)
        ctx.save_for_backward(gradient)
        return (total / tokens).to(torch.float32)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        if gradient.dtype != torch.float16:
            return gradient.mul_(upstream.to(gradient.dtype)), None, None, None, None
        factor = upstream / ctx.scale
        for rows in gradient.split(CHUNK_TOKENS):
            rows.copy_(rows.float() * factor)
        return gradient, None, None, None, None


class TeacherStates:
    """What one teacher's head reads of every window, kept from one retraining to the next.

    A search retrains many models on the same text: the teacher then runs once, and its logits are made of states that are a
    hundredth of their size. `limit_bytes` bounds what is kept; windows beyond it are read again each time, except by `read`.
    """

    def __init__(self, limit_bytes: int = 1_000_000_000):
        self.room, self.kept = limit_bytes, {}
        self.reader: HeadInputs | None = None

    def read(self, teacher: PreTrainedModel, windows: torch.Tensor) -> None:
        """Keep what is read of `windows` (windows, seq_len), if that is all there is to know; the teacher may go afterwards."""
        self.reader = self.reader or HeadInputs(teacher)
        left = [row for row in windows if not self.holds(row[None])]
        for index, row in enumerate(left):
            states, _ = self.reader.read(teacher, row[None, :-1])
            if not self.reader.head_is_all:
                return
            if index == 0:
                kept = room_for(len(left), *states.shape[1:])
            kept[index] = states[0]
            self.kept[_key(row[:-1])] = kept[index]

    def holds(self, windows: torch.Tensor) -> bool:
        """Tell whether the logits of all `windows` (windows, seq_len) are known without the teacher."""
        return all(_key(row[:-1]) in self.kept for row in windows)

    @torch.no_grad()
    def logits(self, teacher: PreTrainedModel | None, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits (batch, seq_len, vocab) of token ids (batch, seq_len); without a teacher of those it has read."""
        keys = [_key(row) for row in input_ids]
        if self.kept.keys() >= set(keys):
            self.reader.head.to(input_ids.device)
            return self.reader.logits(torch.stack([self.kept[key] for key in keys]).to(input_ids.device))
        self.reader = self.reader or HeadInputs(teacher)
        states, logits = self.reader.read(teacher, input_ids)
        for key, state in zip(keys, states, strict=True):
            size = state.numel() * state.element_size()
            if self.reader.head_is_all and key not in self.kept and size <= self.room:
                self.kept[key] = state.to("cpu", copy=True)
                self.room -= size
        return logits


def _key(ids: torch.Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()


class RetrainingLoss(nn.Module):
    """The training loss as a function of a batch of windows, with the student as its only submodule.

    One module, so that a wrapper for several devices or for mixed precision sees one forward pass that returns a scalar and
    never copies the logits. The teacher stands in a tuple: it is neither trained, nor copied between devices.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        recipe: RetrainRecipe,
        states: TeacherStates | None = None,
    ):
        super().__init__()
        self.student, self.teacher, self.recipe, self.states = student, (teacher,), recipe, states or TeacherStates(0)
        self.use_hidden_loss = teacher is not None and recipe.hidden_loss_weight > 0
        if self.use_hidden_loss:
            depths = teacher.config.num_hidden_layers, student.config.num_hidden_layers
            self.layer_map = matching_layers(depths[0], alternate_layers(*depths))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the loss of `windows`, int64 (batch, seq_len), as a scalar."""
        (teacher,), recipe = self.teacher, self.recipe
        input_ids, labels = windows[:, :-1], windows[:, 1:].flatten()  # (batch, seq_len - 1), (batch * (seq_len - 1),)
        arguments = {"input_ids": input_ids, "use_cache": False, "output_hidden_states": self.use_hidden_loss}
        output, logits = self.student(**arguments), None
        if self.use_hidden_loss:
            with torch.no_grad():
                target = teacher(**arguments)
            logits = target.logits
        elif recipe.distils:
            logits = self.states.logits(teacher, input_ids)
        loss = token_loss(
            output.logits.flatten(0, 1),  # (batch * (seq_len - 1), vocab)
            None if logits is None else logits.flatten(0, 1),
            labels, recipe.temperature, recipe.alpha,
        )  # fmt: skip
        if self.use_hidden_loss:
            attention_mask = torch.ones_like(input_ids)
            states = output.hidden_states, target.hidden_states
            loss = loss + recipe.hidden_loss_weight * hidden_state_loss(*states, self.layer_map, attention_mask)
        return loss
