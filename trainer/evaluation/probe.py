"""The linear classification protocol: one fully-connected layer and a softmax on frozen features."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from services.core.frames import CLASSES
from trainer.head import train_head
from trainer.head_nets import Head, LinearHead

ProbeName = Literal["lbfgs", "paper"]
"""lbfgs: the product's own head, logistic regression to the end. paper: Adam, 1e-4, batches of 64, 32 epochs."""
PAPER_EPOCHS = 32
PAPER_RATE = 1e-4
_BATCH = 64


def fit_linear(
    features: Tensor, targets: Tensor, *, probe: ProbeName, seed: int, epochs: int = PAPER_EPOCHS
) -> Head:
    """features: (N, D) float32; targets: (N,) int64. The paper names rate and epochs, and no optimizer: Adam."""
    if probe == "lbfgs":
        return train_head("linear", features, targets, torch.ones(len(targets)), num_classes=len(CLASSES))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    head = LinearHead(features.shape[1], len(CLASSES))
    optimizer = torch.optim.Adam(head.parameters(), lr=PAPER_RATE)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator)
        for rows in torch.split(order, _BATCH):
            optimizer.zero_grad()
            F.cross_entropy(head(features[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return head.eval()


@torch.no_grad()
def predict(head: Head, features: Tensor) -> Tensor:
    """(N,) int64."""
    predicted: Tensor = head(features).argmax(1)
    return predicted
