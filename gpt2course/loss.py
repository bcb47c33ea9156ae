"""Next-token loss, plain and in bounded memory.

Legend: N tokens (batch and time flattened), C model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_TOKENS = 128


def plain_cross_entropy(h_NC: Tensor, head_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of -log p(target), with all N x V logits in memory at once. The reference for `chunked_cross_entropy`."""
    logits_NV = F.linear(h_NC, head_VC)
    logits_NV = logits_NV.to(_loss_dtype(logits_NV.dtype))
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 at least: a softmax over 50,257 logits loses its small terms in half precision. float64 stays."""
    return torch.promote_types(dtype, torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a softmax is known as soon as the softmax is: softmax minus one-hot. So each chunk of tokens
    makes its logits, adds its loss, adds its share of both gradients, and forgets the logits."""

    @staticmethod
    def forward(ctx: Any, h_NC: Tensor, head_VC: Tensor, targets_N: Tensor, chunk: int, grad: bool) -> Tensor:
        # needs_input_grad says what requires a gradient, also under no_grad, where nobody will ask for it.
        needs_h, needs_head = (grad and needed for needed in ctx.needs_input_grad[:2])
        device = h_NC.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else h_NC.dtype
        low_VC = head_VC.to(dtype)
        total = torch.zeros((), dtype=_loss_dtype(dtype), device=h_NC.device)
        grad_h_NC = torch.zeros_like(h_NC) if needs_h else None
        # Summed in float32 at least: many small chunks added in bfloat16 would lose the small ones.
        sum_dtype = torch.promote_types(head_VC.dtype, total.dtype)
        grad_head_VC = torch.zeros_like(head_VC, dtype=sum_dtype) if needs_head else None
        for start in range(0, h_NC.shape[0], chunk):
            rows = slice(start, start + chunk)
            low_nC = h_NC[rows].to(dtype)
            kept_n1 = (targets_N[rows] != IGNORE)[:, None]
            index_n1 = targets_N[rows, None].masked_fill(~kept_n1, 0)
            logits_nV = F.linear(low_nC, low_VC).to(total.dtype)
            log_z_n1 = logits_nV.logsumexp(dim=-1, keepdim=True)
            total += (log_z_n1 - logits_nV.gather(1, index_n1)).masked_fill(~kept_n1, 0.0).sum()
            if not (needs_h or needs_head):
                continue
            # Chunk logits become chunk gradients in place: exp(logit - log z) is the softmax.
            delta_nV = logits_nV.sub_(log_z_n1).exp_()
            delta_nV.scatter_add_(1, index_n1, torch.full_like(log_z_n1, -1.0))
            low_nV = delta_nV.mul_(kept_n1).to(dtype)
            if grad_h_NC is not None:
                grad_h_NC[rows] = low_nV @ low_VC
            if grad_head_VC is not None and grad_head_VC.dtype == dtype:
                grad_head_VC.addmm_(low_nV.t(), low_nC)
            elif grad_head_VC is not None:
                grad_head_VC += low_nV.t() @ low_nC
        ctx.save_for_backward(grad_h_NC, grad_head_VC)
        ctx.head_dtype = head_VC.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the kept gradients are numbers, their own derivative is lost
            raise RuntimeError("chunked_cross_entropy has no second derivative; use plain_cross_entropy for that")
        grad_h_NC, grad_head_VC = ctx.saved_tensors
        return (
            None if grad_h_NC is None else grad_h_NC * grad_total.to(grad_h_NC.dtype),
            None if grad_head_VC is None else (grad_head_VC * grad_total.to(grad_head_VC.dtype)).to(ctx.head_dtype),
            None,
            None,
            None,
        )


def chunked_cross_entropy(h_NC: Tensor, head_VC: Tensor, targets_N: Tensor, chunk: int = CHUNK_TOKENS) -> Tensor:
    """Sum of -log p(target) over the tokens whose target is not -100, never holding more than `chunk` x V logits.

    Equal to `plain_cross_entropy` in value and gradient, at the same number of multiplications, since the gradients are
    made while the logits are at hand instead of by a second pass.

    Args:
        h_NC: (N, C) final hidden states.
        head_VC: (V, C) head weight (GPT-2's token embedding).
        targets_N: (N,) int64 next tokens, -100 where there is none.
        chunk: tokens at a time.

    Returns:
        scalar float32 (float64 for float64 inputs), in nats, summed; 0 where every target is -100. It can be
        differentiated once; asking for more (`create_graph=True`) raises RuntimeError.

    Raises:
        ValueError: if chunk is below 1, or there are not as many targets as hidden states.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
    if targets_N.shape != h_NC.shape[:1]:
        raise ValueError(f"{h_NC.shape[0]} hidden states need one row of as many targets, not {tuple(targets_N.shape)}")
    total: Tensor = _ChunkedCrossEntropy.apply(h_NC, head_VC, targets_N, chunk, torch.is_grad_enabled())
    return total
