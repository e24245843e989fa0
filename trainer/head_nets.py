"""What stands on the encoder's features and names the class: a linear layer, or one with a hidden layer of 128.

How they are trained is `trainer.head`'s matter; who fine-tunes an encoder trains one along with it.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.core.errors import RegistryError

HeadKind = Literal["linear", "mlp"]
HIDDEN_DIM = 128
DROPOUT = 0.3


class Head(nn.Module):
    """Standardised features to class logits: (B, feature_dim) -> (B, num_classes)."""

    kind: HeadKind
    mean: Tensor
    inverse_std: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("inverse_std", torch.ones(feature_dim))

    @torch.no_grad()
    def standardise_by(self, features: Tensor) -> None:
        """Take mean and spread of `features`: (N, feature_dim) float32."""
        self.mean.copy_(features.mean(0))
        self.inverse_std.copy_(1 / features.std(0, unbiased=False).clamp_min(1e-4))

    def standardised(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.inverse_std


class LinearHead(Head):
    """The linear probe."""

    kind: HeadKind = "linear"

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__(feature_dim)
        self.linear = nn.Linear(feature_dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.standardised(features))
        return logits


class MlpHead(Head):
    """One hidden layer: what the paper draws its t-SNE of, and what is fine-tuned together with an encoder."""

    kind: HeadKind = "mlp"

    def __init__(self, feature_dim: int, num_classes: int, *, hidden_dim: int = HIDDEN_DIM) -> None:
        super().__init__(feature_dim)
        self.hidden = nn.Linear(feature_dim, hidden_dim)
        self.linear = nn.Linear(hidden_dim, num_classes)

    def penultimate(self, features: Tensor) -> Tensor:
        """(B, hidden_dim), not negative."""
        return F.relu(self.hidden(self.standardised(features)))

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.dropout(self.penultimate(features), DROPOUT, training=self.training)
        logits: Tensor = self.linear(hidden)
        return logits


def build_head(description: dict[str, Any], feature_dim: int, num_classes: int) -> Head:
    """The head that a manifest describes; one that says nothing is from when all were linear.

    Raises RegistryError for a kind that this version does not know.
    """
    match description.get("kind", "linear"):
        case "linear":
            return LinearHead(feature_dim, num_classes)
        case "mlp":
            return MlpHead(feature_dim, num_classes, hidden_dim=description["hidden_dim"])
        case other:
            raise RegistryError(f"head is {other!r}", remedy="upgrade Echosight, or roll back to another version")


def describe_head(head: Head) -> dict[str, Any]:
    """What `build_head` needs."""
    return {"kind": head.kind} | ({"hidden_dim": head.linear.in_features} if isinstance(head, MlpHead) else {})
