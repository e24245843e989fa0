"""What a machine-learning engineer can set about the trainer."""

from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.feed_settings import FeedSettings
from trainer.gauges_settings import GaugesSettings
from trainer.release_settings import ReleaseSettings

_PAPER: dict[str, Any] = {
    "vision_encoder": "vgg16",
    "radar_encoder": "vgg16",
    "batch_size": 64,
    "queue_size": 320,
    "temperature": 0.07,
    "learn_temperature": False,
    "in_batch_negatives": False,
    "symmetric": False,
    "optimizer": "sgd",
    "learning_rate": 0.03,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 0,
    "ema_decay": 0.0,
    "sampling": "shuffled",
    "max_replays": 400.0,
    "fresh_share": 0.0,
    "exclude_within_s": 0.0,
    "centre_vision": False,
    "subtract_clutter": False,
    "mirror_share": 0.0,
    "gain_jitter_db": 0.0,
    "noise_db": 0.0,
    "shift_bins": 0,
}


class TrainerSettings(FeedSettings, GaugesSettings, ReleaseSettings):
    """The recipe, when to publish, and where weights come from. `mode` sets what is not set one by one."""

    mode: Literal["edge", "paper"] = Field(
        default="edge", description="edge: small and fast; paper: VGG-16 on both sides and the paper's recipe"
    )
    vision_encoder: str = Field(
        default="efficientnet_lite0",
        description="frozen image encoder: efficientnet_lite0, vgg16, vgg16_relu or timm:NAME",
    )
    vision_weights: str = Field(
        default="",
        description="state dict file for the vision encoder; empty: its package, or torchvision's or timm's hub",
    )
    radar_encoder: str = Field(
        default="small", description="the encoder that learns: small, vgg16, vgg16_relu or timm:NAME"
    )
    radar_weights: str = Field(
        default="", description="state dict file to start VGG-16 or timm's network from; empty: random"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one")
    threads: int = Field(default=0, ge=0, le=256, description="CPU threads for torch; 0: one less than cores")
    seed: int = Field(default=0, ge=0, description="seed of weights, sampling and augmentation")

    min_pairs: int = Field(default=128, ge=2, description="wait until the store holds so many pairs")
    batch_size: int = Field(default=64, ge=2, description="pairs a step")
    queue_size: int = Field(default=512, ge=1, description="K: past image encodings used as negatives")
    temperature: float = Field(default=0.2, gt=0, le=100, description="tau, or where a learned tau starts")
    learn_temperature: bool = Field(default=False, description="learn tau, with 1/tau capped at 100")
    in_batch_negatives: bool = Field(default=True, description="the batch's other images are negatives too")
    symmetric: bool = Field(
        default=True, description="with in-batch negatives: each image must find its heatmap as well"
    )
    loss: Literal["info_nce", "decoupled", "sigmoid"] = Field(
        default="info_nce", description="info_nce: Eq. 1; decoupled: no positive in the denominator; sigmoid"
    )
    soft_share: float = Field(
        default=0.0, ge=0, le=1, description="share of the target for negatives that look alike; 0: none"
    )
    soft_temperature: float = Field(default=0.1, gt=0, description="how alike they must look")
    shuffle_bn: bool = Field(
        default=False, description="several ranks: mix their batches before an encoder with batch norm"
    )
    projection: Literal["linear", "mlp"] = Field(
        default="linear", description="from radar features to image encodings while learning"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of the encoder's passes; auto: the faster of the two on this machine"
    )
    compile: bool = Field(default=False, description="torch.compile the radar encoder; for GPUs")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="sgd: momentum 0.9")
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(default=0.05, ge=0, description="weight decay")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="after warm-up: constant for ever, or cosine over schedule_steps"
    )
    warmup_steps: int = Field(default=100, ge=0, description="steps of linear warm-up")
    schedule_steps: int = Field(default=100_000, ge=1, description="length of the cosine, steps")
    ema_decay: float = Field(
        default=0.995, ge=0, lt=1, description="moving average of the weights that is published; 0: the weights"
    )
    exclude_within_s: float = Field(
        default=1.0, ge=0, description="no negative from the same site within so many seconds; 0: only not itself"
    )
    centre_vision: bool = Field(default=True, description="subtract each site's mean image encoding")
    subtract_clutter: bool = Field(default=True, description="subtract each site's clutter map from its heatmaps")
    gain_jitter_db: float = Field(default=1.5, ge=0, description="augmentation: common gain, sigma")
    noise_db: float = Field(default=1.0, ge=0, description="augmentation: noise a cell, sigma")
    shift_bins: int = Field(default=2, ge=0, le=64, description="augmentation: largest shift in range and azimuth")

    publish_every_s: float = Field(default=60.0, gt=0, description="how often a new version may be published")
    min_publish_steps: int = Field(default=200, ge=1, description="steps before the first version")
    min_labels: int = Field(default=8, ge=1, description="named frames before the first version")
    keep_versions: int = Field(default=20, ge=2, description="versions kept in the registry")
    checkpoint_every_s: float = Field(default=30.0, gt=0, description="how often the state for a resume is saved")

    @model_validator(mode="before")
    @classmethod
    def _apply_mode(cls, values: dict[str, Any]) -> dict[str, Any]:
        return _PAPER | values if values.get("mode") == "paper" else values
