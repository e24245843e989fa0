"""How the passes are computed is chosen by timing, never against steady numbers, and changes nothing else."""

import torch
from torch import nn

from trainer.precision import Precision, choose_precision
from trainer.radar import SmallEncoder

SHAPE = (2, 16, 8)
CPU = torch.device("cpu")


def test_choice_keeps_to_what_is_allowed_and_leaves_encoder_and_random_numbers_alone() -> None:
    encoder = SmallEncoder(SHAPE, width=4, feature_dim=8)
    before = torch.random.get_rng_state()
    assert choose_precision("fp32", encoder, shape=SHAPE, device=CPU).dtype == "fp32"
    assert choose_precision("bf16", encoder, shape=SHAPE, device=CPU).dtype == "bf16"
    assert choose_precision("auto", encoder, shape=SHAPE, device=CPU).layout in ("channels_first", "channels_last")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in encoder.parameters())


class _Moody(nn.Module):
    """Gives other features each time in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2 * 16 * 8, 4)
        self.num_passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_passes += 1
        features: torch.Tensor = self.net(x.flatten(1))
        return features * self.num_passes if features.dtype == torch.bfloat16 else features


def test_numbers_that_differ_from_pass_to_pass_are_never_chosen_by_itself() -> None:
    assert choose_precision("auto", _Moody(), shape=SHAPE, device=CPU).dtype == "fp32"
    assert choose_precision("bf16", _Moody(), shape=SHAPE, device=CPU).dtype == "bf16"  # asked for, given


@torch.no_grad()
def test_bf16_passes_give_nearly_the_features_of_fp32() -> None:
    torch.manual_seed(0)
    encoder, x = SmallEncoder(SHAPE, width=8, feature_dim=8), torch.randn(4, *SHAPE)
    exact = encoder(x)
    with Precision("bf16").autocast(CPU):
        rough = encoder(x).float()
    assert 0 < float((exact - rough).abs().max()) < 0.1 * float(exact.abs().max())
