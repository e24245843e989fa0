"""Networks of the timm library by name, for either side. It knows neither images nor heatmaps."""

from typing import Any

from torch import nn

from services.core.errors import SettingsError
from trainer.vgg import load_state_dict


def create_timm_net(name: str, *, in_chans: int, weights: str = "", from_hub: bool = False) -> nn.Module:
    """A network without its classifier: (B, in_chans, H, W) -> (B, `features_of`).

    weights: a state dict file of the whole network; else the hub's if `from_hub`, else random ones.
    Raises SettingsError for an unknown name, and for weights that cannot be had or do not fit.
    """
    try:
        import timm
    except ImportError:
        raise SettingsError(f"encoder timm:{name} needs the package timm", remedy="pip install timm") from None
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) or "timm.list_models() shows them"
        raise SettingsError(f"timm has no network called {name!r}", remedy=f"use another: {near}")
    try:
        net: nn.Module = timm.create_model(
            name, pretrained=from_hub and not weights, in_chans=in_chans, num_classes=0
        )
    except Exception as error:  # the hub, the network and torch raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise SettingsError(
            f"cannot make timm:{name} with {in_chans} channels: {reason}",
            remedy="without access to the hub, name a state dict file as its weights",
        ) from None
    if weights:
        _load(net, name, weights)
    return net


def features_of(net: nn.Module) -> int:
    """How many features a network of timm gives: after the layer before its classifier, where it has one."""
    return int(getattr(net, "head_hidden_size", None) or net.num_features)  # type: ignore[arg-type]


def _load(net: nn.Module, name: str, weights: str) -> None:
    """The weights of a file; those of a classifier, which ours has not, are left out."""
    state: dict[str, Any] = load_state_dict(weights)
    ours = net.state_dict()
    try:
        net.load_state_dict({key: value for key, value in state.items() if key in ours})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:200]
        raise SettingsError(
            f"{weights} does not fit timm:{name}: {reason}", remedy="use timm's own file"
        ) from None
