"""Features of stored frames under one encoder: computed once, bounded by what is asked for.

The encoder is that of a version: it does not change any more.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from services.core.store import StoredPair
from trainer.radar import Preprocess

_BATCH = 64


class Features:
    """Features by frame. sites: the order of the clutter maps behind row 0, as in a manifest."""

    def __init__(
        self, preprocess: Preprocess, encoder: nn.Module, *, sites: Sequence[str], shape: tuple[int, ...]
    ) -> None:
        self.preprocess = preprocess.eval()
        self.encoder = encoder.eval()
        self._rows = {site: row for row, site in enumerate(sites) if site}
        self._shape = shape
        self._device = preprocess.scale.device
        self._known: dict[tuple[str, Any], Tensor] = {}
        self.num_computed = 0

    def of(self, pairs: Sequence[StoredPair]) -> tuple[Tensor, list[int]]:
        """(M, D) float32 on the CPU, and which of `pairs` they are: not those damaged or of another shape."""
        missing = [pair for pair in pairs if (pair.site, pair.id) not in self._known]
        for start in range(0, len(missing), _BATCH):
            self._compute(missing[start : start + _BATCH])
        at = [i for i, pair in enumerate(pairs) if (pair.site, pair.id) in self._known]
        if not at:
            return torch.empty(0, 0), []
        return torch.stack([self._known[pairs[i].site, pairs[i].id] for i in at]), at

    def keep_only(self, pairs: Sequence[StoredPair]) -> None:
        """Let go of all others."""
        wanted = {(pair.site, pair.id) for pair in pairs}
        self._known = {at: row for at, row in self._known.items() if at in wanted}

    @torch.no_grad()
    def encode(self, heatmap: Tensor, site: Tensor) -> Tensor:
        """(B, D) float32 on the CPU. heatmap: (B, C, R, A) float32. site: (B,) int64, row of its clutter map."""
        features: Tensor = self.encoder(self.preprocess(heatmap.to(self._device), site.to(self._device)))
        return features.float().cpu()

    def read(self, pairs: Sequence[StoredPair]) -> tuple[Tensor, list[StoredPair]]:
        """(M, C, R, A) float32, and whose they are: not those damaged or of another shape."""
        frames = [(pair, frame) for pair in pairs if (frame := pair.radar()) is not None]
        whole = [(pair, frame.heatmap) for pair, frame in frames if frame.shape == self._shape]
        if not whole:
            return torch.empty(0, *self._shape), []
        heatmaps = np.stack([heatmap.astype(np.float32).reshape(self._shape) for _, heatmap in whole])
        return torch.from_numpy(heatmaps), [pair for pair, _ in whole]

    def _compute(self, pairs: Sequence[StoredPair]) -> None:
        heatmaps, whole = self.read(pairs)
        if not whole:
            return
        sites = torch.tensor([self._rows.get(pair.site, 0) for pair in whole])
        for pair, row in zip(whole, self.encode(heatmaps, sites), strict=True):
            self._known[pair.site, pair.id] = row.clone()
        self.num_computed += len(whole)
