"""The contrastive loss: Eq. 1 of the paper, and what has been proposed in its place.

    L(q, k+, k-) = -log  exp(q.k+ / tau) / ( exp(q.k+ / tau) + sum_j exp(q.k-_j / tau) )

q: the encoding that learns; k+: the frozen encoding of what the other sensor saw at the same instant; k-:
encodings of other instants. The module does not know where encodings come from, nor what a label is.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["info_nce", "decoupled", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Contrast:
    """loss: () float32, nats. chance: log(mean number of candidates). top1: () share of k+ ranked first."""

    loss: Tensor
    chance: Tensor
    top1: Tensor


def contrast(
    q: Tensor,
    k: Tensor,
    *,
    negatives: Tensor,
    is_negative: Tensor,
    scale: Tensor | float,
    loss: LossName = "info_nce",
    bias: Tensor | float = 0.0,
    soft_share: float = 0.0,
    soft_scale: float = 10.0,
) -> Contrast:
    """The loss of B queries against one positive and M masked negatives each.

    q, k: (B, D), any norm. negatives: (M, D) float32, unit L2 norm. is_negative: (B, M) bool. scale: 1 / tau.
    loss: info_nce (Eq. 1); decoupled, without the positive in the denominator (Yeh et al., 2022); or sigmoid, one
    binary decision a candidate with a learnt `bias` (Zhai et al., 2023). soft_share: how much of the target goes
    to negatives that look like k+, by softmax(k+ . k- * soft_scale); 0 is the paper's. Only for info_nce.
    """
    q = F.normalize(q.float(), dim=1)
    k = F.normalize(k.float(), dim=1)
    l_pos = (q * k).sum(1, keepdim=True)  # (B, 1)
    l_neg = q @ negatives.T  # (B, M)
    # Masked after scaling: -inf times a learned scale would have a gradient of nan.
    logits = torch.cat([l_pos * scale, (l_neg * scale).masked_fill(~is_negative, -math.inf)], 1)  # (B, 1 + M)
    match loss:
        case "info_nce":
            log_p = logits.log_softmax(1)
            value = -log_p[:, 0]
            if soft_share:
                target = _soft_target(k, negatives, is_negative, soft_scale)  # (B, 1 + M)
                soft = -(target * log_p.masked_fill(target == 0, 0.0)).sum(1)
                value = (1 - soft_share) * value + soft_share * soft
        case "decoupled":
            has_negatives = is_negative.any(1)
            rest = logits[:, 1:].masked_fill(
                ~has_negatives[:, None], 0.0
            )  # finite for backward, and then left out
            value = rest.logsumexp(1).masked_fill(~has_negatives, 0.0) - logits[:, 0]
        case "sigmoid":
            value = -F.logsigmoid(logits[:, 0] + bias)
            value = value - F.logsigmoid(-(logits[:, 1:] + bias)).masked_fill(~is_negative, 0.0).sum(1)
    with torch.no_grad():
        chance = (1.0 + is_negative.sum(1).float().mean()).log()
        top1 = (logits.argmax(1) == 0).float().mean()
    return Contrast(value.mean(), chance, top1)


@torch.no_grad()
def _soft_target(k: Tensor, negatives: Tensor, is_negative: Tensor, scale: float) -> Tensor:
    """(B, 1 + M): how alike the candidates look to the frozen encoder."""
    alike = torch.cat([torch.ones(len(k), 1, device=k.device), k @ negatives.T], 1) * scale
    alike[:, 1:] = alike[:, 1:].masked_fill(~is_negative, -math.inf)
    return alike.softmax(1)
