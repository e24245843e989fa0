"""What is served, as a torch module: preprocessing, encoder, head, temperature, unknown score; and its file.

A version's manifest says what it is made of; an older one, without temperature or score, loads as it was.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.core.errors import RegistryError
from services.core.registry import CHECKPOINT_FILE, Manifest
from trainer.head_nets import Head, build_head, describe_head
from trainer.radar import Preprocess, build_encoder
from trainer.unknown import UnknownScore, build_unknown


class RadarClassifier(nn.Module):
    """Raw heatmap (B, C, R, A) float32 and site (B,) int64 to what `output_names` lists.

    probabilities: (B, num_classes) float32, calibrated, rows sum to 1. embedding: (B, feature_dim) float32, unit
    L2 norm. unknown_score: (B,) float32, larger for what is stranger; only of a model that has one.
    """

    temperature: Tensor

    def __init__(
        self, preprocess: Preprocess, encoder: nn.Module, head: Head, unknown: UnknownScore | None = None
    ) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.encoder = encoder
        self.head = head
        self.unknown = unknown
        self.register_buffer("temperature", torch.ones(()))

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("probabilities", "embedding") + (("unknown_score",) if self.unknown is not None else ())

    def forward(self, heatmap: Tensor, site: Tensor) -> tuple[Tensor, ...]:
        features = self.encoder(self.preprocess(heatmap, site))
        answer = ((self.head(features) / self.temperature).softmax(1), F.normalize(features, dim=1))
        return answer if self.unknown is None else (*answer, self.unknown(features))

    def describe(self) -> dict[str, Any]:
        """What a manifest's `architecture` needs besides the encoder's part."""
        return {
            "head": describe_head(self.head),
            "unknown": None if self.unknown is None else self.unknown.describe(),
        }


def save_classifier(classifier: RadarClassifier, directory: Path) -> None:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in classifier.state_dict().items()}
    save_file(tensors, directory / CHECKPOINT_FILE)


def load_classifier(directory: Path, manifest: Manifest) -> RadarClassifier:
    """A published version on the CPU. torch's generator is left alone.

    Raises RegistryError if its file is damaged or it has parts that this version does not know; OSError.
    """
    shape = (manifest.input.shape[0], manifest.input.shape[1], manifest.input.shape[2])
    architecture = manifest.architecture
    feature_dim = architecture["feature_dim"]
    with torch.random.fork_rng(devices=[]):
        classifier = RadarClassifier(
            Preprocess(len(manifest.sites) - 1, shape),
            build_encoder(architecture, shape),
            build_head(architecture.get("head", {}), feature_dim, len(manifest.classes)),
            build_unknown(architecture.get("unknown"), feature_dim),
        )
    try:
        tensors = load_file(directory / CHECKPOINT_FILE)
        tensors.setdefault("temperature", torch.ones(()))  # of a version from before there was one
        classifier.load_state_dict(tensors)
    except FileNotFoundError as error:
        raise _damaged(directory, error) from None
    except (OSError, MemoryError):  # says nothing about the file
        raise
    except Exception as error:  # safetensors has its own error types, and so has a shape that does not fit
        raise _damaged(directory, error) from None
    return classifier.eval()


def _damaged(directory: Path, error: Exception) -> RegistryError:
    return RegistryError(
        f"cannot load {directory / CHECKPOINT_FILE}: {error}", remedy="publish again; this version is damaged"
    )
