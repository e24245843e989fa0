"""A scene simulator: one site, seen by an FMCW radar and a camera at the same instant, with the truth."""

from services.sensors.simulator.camera import CameraSettings
from services.sensors.simulator.preview import preview_row, save_preview
from services.sensors.simulator.radar import CRUW_77GHZ, IWR6843_60GHZ, RADARS, RadarSettings
from services.sensors.simulator.scene import (
    Delivery,
    LabelSettings,
    ObjectTruth,
    Scene,
    SimulationSettings,
    Truth,
)
from services.sensors.simulator.sites import Site, list_sites, load_site
from services.sensors.simulator.traffic import TrafficSettings
from services.sensors.simulator.troubles import DeliverySettings

__all__ = [
    "CRUW_77GHZ",
    "IWR6843_60GHZ",
    "RADARS",
    "CameraSettings",
    "Delivery",
    "DeliverySettings",
    "LabelSettings",
    "ObjectTruth",
    "RadarSettings",
    "Scene",
    "SimulationSettings",
    "Site",
    "TrafficSettings",
    "Truth",
    "list_sites",
    "load_site",
    "preview_row",
    "save_preview",
]
