"""Rotate the residual stream of a Llama into another basis, in its weights alone: the model computes what it did.

RMSNorm divides a token's vector h by its length, and an orthogonal matrix Q leaves lengths as they are; only the norm's weight g belongs
to a basis. Folded into the linears that read the norm, it is 1, and h may become h Q everywhere (R1 of SpinQuant, Liu et al. 2024,
https://arxiv.org/abs/2405.16406; QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456):

embeddings       E -> E Q
q/k/v, gate/up   W -> W diag(g) Q       rows of W are output channels, as torch has them
o, down          W -> Q^T W, b -> b Q
head             W -> W diag(g) Q       with the g of the last norm

Few large channels of h become many of middling size, before anything is rounded and at no cost while the model runs. Not so with
LayerNorm, which subtracts a mean: such a model is refused. A head tied to the embeddings becomes a table of its own, since the last norm
goes into the head alone, unless that norm's weight is one number.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.llama import LINEARS, LlamaBlock, llama_blocks
from compactmind.methods.quantization.packed_model import require_finite
from compactmind.methods.quantization.rotation import rotate

ROWS_AT_A_TIME = 4096
"""Rows (or columns) of a weight that are in float64 together: a table of words would take four times its memory."""


def random_orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    """Return a random orthogonal matrix (size, size) in float64, all equally likely (Haar measure).

    Q of a Gaussian matrix, its signs such that R has a positive diagonal (Mezzadri 2007, https://arxiv.org/abs/math-ph/0609050).
    """
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


@torch.no_grad()
def rotate_stream(model: PreTrainedModel, matrix: torch.Tensor, untie: bool = True) -> None:
    """Rotate, in place, the residual stream by an orthogonal `matrix` (size, size): the same logits from other weights.

    `size` divides the channels: a smaller matrix rotates every `size` of them, `hadamard(64)` for one. Computed in float64, stored in the
    dtype of each weight; without `untie` a head that would have to become a table of its own is an error instead. Raises ValueError on a
    matrix that does not fit or is not orthogonal, CompactMindError on a model without RMSNorm or with a weight that is NaN or infinite;
    either before anything is changed.
    """
    blocks, final = llama_blocks(model), model.model.norm
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrix = _checked(matrix.to(table.weight.device, torch.float64), table.embedding_dim)
    norms = {f"{block.name}: {field}": getattr(block, field) for block in blocks for field in ("input_norm", "post_norm")}
    for name, norm in {**norms, "the last norm": final}.items():
        _require_rms_norm(name, norm)
    require_finite({f"{block.name}.{path}": getattr(block, field) for block in blocks for field, path in LINEARS.items()})
    require_finite({"the embedding table": table, "the head": head})
    tied = head.weight.data_ptr() == table.weight.data_ptr()
    stays_tied = tied and bool((final.weight == final.weight[0]).all())
    if tied and not stays_tied:
        if not untie:
            raise CompactMindError(
                "the head is the embedding table, and the weight of the last norm differs from channel to channel: turned, the head "
                "needs a table of its own (untie=True)"
            )
        _untie(model, head)
    for block in blocks:
        rotate_block(block, matrix)
    if not stays_tied:
        _rotate_reader(head, final.weight, matrix)
        final.weight.fill_(1)
    _rotate_inputs(table.weight, torch.ones_like(final.weight), matrix)


@torch.no_grad()
def rotate_block(block: LlamaBlock, matrix: torch.Tensor) -> None:
    """Rotate, in place, what a block reads from the stream and writes to it; the weights of its two norms become 1."""
    for norm, readers in ((block.input_norm, (block.q, block.k, block.v)), (block.post_norm, (block.gate, block.up))):
        for reader in readers:
            _rotate_reader(reader, norm.weight, matrix)
        norm.weight.fill_(1)
    for writer in (block.o, block.down):
        turn = matrix.to(writer.weight.device)
        for columns in writer.weight.split(ROWS_AT_A_TIME, dim=1):  # (channels, inputs): views, written in place
            columns.copy_(rotate(columns.double().t(), turn).t())
        if writer.bias is not None:
            writer.bias.copy_(rotate(writer.bias.double(), turn))


def _rotate_reader(reader: nn.Linear, norm_weight: torch.Tensor, matrix: torch.Tensor) -> None:
    _rotate_inputs(reader.weight, norm_weight.to(reader.weight.device), matrix.to(reader.weight.device))


def _rotate_inputs(weight: torch.Tensor, norm_weight: torch.Tensor, matrix: torch.Tensor) -> None:
    """Make, in place, a weight (outputs, channels) W diag(norm_weight) Q."""
    for rows in weight.split(ROWS_AT_A_TIME):
        rows.copy_(rotate(rows.double() * norm_weight.double(), matrix))


def _untie(model: PreTrainedModel, head: nn.Linear) -> None:
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _checked(matrix: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the matrix; raise ValueError unless it is square, orthogonal and divides the channels."""
    size = len(matrix)
    if matrix.shape != (size, size) or size == 0 or channels % size:
        raise ValueError(f"a matrix of {tuple(matrix.shape)} turns no stream of {channels} channels: its size must divide them")
    off = (matrix @ matrix.t() - torch.eye(size, dtype=matrix.dtype, device=matrix.device)).abs().max().item()
    if not off < 1e-5:
        raise ValueError(
            f"the matrix of {size} is not orthogonal (off by {off:.1e}): use random_orthogonal({size}) or hadamard({size})"
        )
    return matrix


def _require_rms_norm(name: str, norm: nn.Module) -> None:
    """Raise CompactMindError unless a norm multiplies x / rms(x) by its weight and does nothing else, on a made-up x."""
    channels = len(norm.weight)
    x = 1 + torch.randn(channels, generator=torch.Generator().manual_seed(0)).to(norm.weight.device)
    actual = norm(x.to(norm.weight.dtype)).float()
    wanted = F.rms_norm(x, (channels,), norm.weight.float())
    if (actual - wanted).norm() > 0.02 * wanted.norm():  # bfloat16 is off by 0.004
        raise CompactMindError(
            f"{name} is no RMSNorm but a {type(norm).__name__}: its result depends on the basis, so the residual stream cannot be turned; "
            "quantize with rotations while the model runs instead (--stream_rotation False)"
        )
