"""The detector, by value, on tiny networks with YOLOX's raw output; and, where there is one, on a real network.

ECHOSIGHT_YOLOX_ONNX names the file of a YOLOX trained on COCO.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from math import log
from pathlib import Path

import numpy as np
import onnx
import pytest
import simplejpeg
from onnx import TensorProto, helper, numpy_helper

from services.core.errors import SettingsError
from services.core.frames import CLASSES, CameraFrame, SeenObject
from services.ingest.detector import Detector
from services.sensors.simulator.scene import Scene
from services.sensors.simulator.sites import load_site

PERSON, BICYCLE, CAR, MOTORCYCLE, BUS, TRUCK, DOG = 0, 1, 2, 3, 5, 7, 16
HEIGHT, WIDTH = 64, 96
GREY = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
Box = tuple[float, float, float, float]


@dataclass
class Network:
    """Gives `grid`, whatever the image. probe: (channel, y, x) of the input value, over 255, that scores a car."""

    grid: np.ndarray = field(default_factory=lambda: np.zeros((1, 126, 85), np.float32))
    probe: tuple[int, int, int] | None = None

    def add(self, number: int, box: Box, *, score: float = 0.8, stride: int = 8) -> None:
        """Let an object of COCO's class stand in `box` (left, top, right, bottom), from the cell of its middle."""
        middle = (box[0] + box[2]) / 2 / stride, (box[1] + box[3]) / 2 / stride
        column, row = int(middle[0]), int(middle[1])
        first = {8: 0, 16: 96, 32: 120}[stride]
        cell = self.grid[0, first + row * (WIDTH // stride) + column]
        cell[:2] = middle[0] - column, middle[1] - row
        cell[2:4] = log((box[2] - box[0]) / stride), log((box[3] - box[1]) / stride)
        cell[4], cell[5 + number] = 1.0, score

    def save(
        self, path: Path, *, shape: tuple[int | str, ...] = (1, 3, HEIGHT, WIDTH), twice: bool = False
    ) -> Path:
        channel, y, x = self.probe or (0, 0, 0)
        mask = np.zeros_like(self.grid)
        if self.probe:
            mask[0, 0, 4], mask[0, 0, 5 + CAR] = 1 / 255, 0
            self.grid[0, 0, 5 + CAR] = 1.0
        corner = [0, channel, y, x]
        constants = {
            "grid": self.grid,
            "mask": mask,
            "from": np.array(corner),
            "to": np.array(corner) + 1,
            "flat": np.array([1, 1, 1]),
        }
        nodes = [
            helper.make_node("Slice", ["images", "from", "to"], ["cut"]),
            helper.make_node("Reshape", ["cut", "flat"], ["number"]),
            helper.make_node("Mul", ["number", "mask"], ["probed"]),
            helper.make_node("Add", ["grid", "probed"], ["output"]),
        ]
        outputs = ["output", "number"] if twice else ["output"]
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
        return path


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def detector(network: Network, tmp_path: Path):
    """Loads the network as it is when first asked for."""

    def load(**settings: float) -> Detector:
        return Detector(network.save(tmp_path / "tiny.onnx"), **settings)

    return load


def jpeg(image: np.ndarray) -> CameraFrame:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95, colorspace="BGR")
    return CameraFrame("yard", 0, 0, image=data, shape=image.shape)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_boxes_are_decoded_from_the_grid_of_each_stride(network, detector, stride) -> None:
    network.add(CAR, (50.0, 20.0, 90.0, 44.0), stride=stride)
    seen = detector().see_image(GREY)
    assert seen.objects == (SeenObject("car", 0.8, (50.0, 20.0, 90.0, 44.0)),)
    assert (seen.label, seen.confidence) == ("car", 0.8)


def test_boxes_are_in_pixels_of_the_image_as_it_was_sent(network, detector) -> None:
    network.add(CAR, (8.0, 8.0, 40.0, 32.0))
    photo = np.full((HEIGHT * 20, WIDTH * 10, 3), 90, np.uint8)  # higher than the input: 20 to 1, 48 columns used
    assert detector().see(jpeg(photo)).objects[0].box == pytest.approx((160, 160, 800, 640), abs=4)
    small = np.full((HEIGHT // 2, WIDTH // 2, 3), 90, np.uint8)
    assert detector().see(jpeg(small)).objects[0].box == (4.0, 4.0, 20.0, 16.0)


@pytest.mark.parametrize(
    ("probe", "value"),
    [((0, 0, 0), 200), ((2, 63, 47), 40), ((0, 0, 48), 114), ((1, 63, 95), 114)],
    ids=["blue comes first", "the image's last pixel", "border to its right", "border's last pixel"],
)
def test_image_lies_at_the_top_left_on_grey_in_blue_green_red(network, detector, probe, value) -> None:
    network.probe = probe
    image = np.broadcast_to(np.array([200, 90, 40], np.uint8), (2 * HEIGHT, WIDTH, 3))
    seen = detector(min_score=0.1).see_image(np.ascontiguousarray(image))
    assert seen.confidence == pytest.approx(value / 255, abs=1e-4)


def test_score_is_objectness_times_class(network, detector) -> None:
    network.add(CAR, (8.0, 8.0, 40.0, 32.0), score=0.8)
    network.grid[0, :, 4] *= 0.5
    assert detector().see_image(GREY).confidence == pytest.approx(0.4)


def test_of_boxes_over_one_thing_the_best_stays(network, detector) -> None:
    network.add(CAR, (8.0, 8.0, 48.0, 40.0), score=0.7)
    network.add(TRUCK, (9.0, 8.0, 49.0, 40.0), score=0.9, stride=16)
    network.add(CAR, (60.0, 8.0, 90.0, 30.0), score=0.6)
    network.add(PERSON, (10.0, 8.0, 50.0, 39.0), score=0.5, stride=32)
    found = detector().see_image(GREY).objects
    assert sorted((one.label, one.confidence) for one in found) == [
        ("car", 0.6),
        ("car", 0.9),
        ("pedestrian", 0.5),
    ]


@pytest.mark.parametrize(
    ("number", "label"),
    [(PERSON, "pedestrian"), (CAR, "car"), (BUS, "car"), (TRUCK, "car"), (DOG, "empty")],
)
def test_classes_of_coco_map_to_scenes(network, detector, number, label) -> None:
    network.add(number, (30.0, 10.0, 50.0, 50.0))
    assert detector().see_image(GREY).label == label


@pytest.mark.parametrize("vehicle", [BICYCLE, MOTORCYCLE])
def test_person_over_a_bicycle_is_one_cyclist(network, detector, vehicle) -> None:
    network.add(PERSON, (30.0, 10.0, 50.0, 45.0), score=0.9)
    network.add(vehicle, (25.0, 30.0, 57.0, 50.0), score=0.6)
    assert detector().see_image(GREY).objects == (SeenObject("cyclist", 0.6, (25.0, 10.0, 57.0, 50.0)),)


def test_half_the_score_makes_a_rider_but_no_pedestrian(network, detector) -> None:
    network.add(PERSON, (30.0, 10.0, 50.0, 45.0), score=0.2)
    alone = detector().see_image(GREY)
    network.add(BICYCLE, (25.0, 30.0, 57.0, 50.0), score=0.6)
    assert (alone.label, alone.objects) == ("", ())
    assert [(one.label, one.confidence) for one in detector().see_image(GREY).objects] == [("cyclist", 0.2)]


def test_person_beside_a_bicycle_is_a_pedestrian(network, detector) -> None:
    network.add(PERSON, (10.0, 10.0, 30.0, 50.0))
    network.add(BICYCLE, (28.0, 30.0, 60.0, 50.0))
    seen = detector().see_image(GREY)
    assert [one.label for one in seen.objects] == ["pedestrian"]


def test_each_bicycle_takes_one_rider(network, detector) -> None:
    network.add(PERSON, (30.0, 10.0, 50.0, 45.0), score=0.9)
    network.add(PERSON, (60.0, 10.0, 80.0, 45.0), score=0.8)
    network.add(BICYCLE, (25.0, 30.0, 57.0, 50.0), score=0.7)
    assert sorted(one.label for one in detector().see_image(GREY).objects) == ["cyclist", "pedestrian"]


def test_bicycle_without_a_rider_is_no_opinion(network, detector) -> None:
    network.add(BICYCLE, (25.0, 30.0, 57.0, 50.0))
    seen = detector().see_image(GREY)
    assert (seen.label, seen.confidence, seen.objects) == ("", 0.0, ())


def test_nearest_road_user_names_the_scene(network, detector) -> None:
    network.add(CAR, (5.0, 5.0, 55.0, 35.0), score=0.9)
    network.add(PERSON, (70.0, 20.0, 84.0, 60.0), score=0.5)
    seen = detector().see_image(GREY)
    assert (seen.label, seen.confidence) == ("pedestrian", 0.5)
    assert [one.label for one in seen.objects] == ["pedestrian", "car"]


@pytest.mark.parametrize(
    ("score", "label", "confidence"), [(0.0, "empty", 1.0), (0.1, "empty", 0.9), (0.2, "", 0.0)]
)
def test_empty_is_as_sure_as_the_best_box_is_bad(network, detector, score, label, confidence) -> None:
    network.add(CAR, (30.0, 10.0, 50.0, 50.0), score=score)
    seen = detector(min_score=0.3).see_image(GREY)
    assert (seen.label, seen.confidence) == (label, pytest.approx(confidence))


def test_nothing_in_a_flagged_image_is_no_opinion_but_a_found_car_is_one(network, detector) -> None:
    seen = detector().see_image(GREY, flags=("dark",))
    assert (seen.label, seen.confidence, seen.flags) == ("", 0.0, ("dark",))
    network.add(CAR, (30.0, 10.0, 50.0, 50.0))
    assert detector().see_image(GREY, flags=("dark",)).label == "car"


def test_what_says_who_saw_it_changes_with_the_file(network, detector) -> None:
    before = detector().see_image(GREY).detector
    network.add(CAR, (30.0, 10.0, 50.0, 50.0))
    assert before.startswith("tiny@")
    assert detector().see_image(GREY).detector not in ("", before)


def test_damaged_image_is_told_from_an_empty_one(detector) -> None:
    whole = jpeg(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8))
    half = whole.image[: len(whole.image) // 2] + b"\xff\xd9"
    assert detector().see(CameraFrame("yard", 0, 0, image=half, shape=whole.shape)) is None


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((1, 1, HEIGHT, WIDTH), r"takes tensor\(float\) \[1, 1, 64, 96\]"),
        ((8, 3, HEIGHT, WIDTH), r"takes tensor\(float\) \[8, 3, 64, 96\]"),
        ((1, 3, "height", WIDTH), "sizes must be fixed multiples of 32"),
        ((1, 3, 60, WIDTH), "sizes must be fixed multiples of 32"),
        ((1, 3, 128, WIDTH), r"gives \(1, 126, 85\), expected \(1, 252, 85\)"),
    ],
)
def test_network_of_another_input_is_refused(network, tmp_path, shape, found) -> None:
    path = network.save(tmp_path / "other.onnx", shape=shape)
    with pytest.raises(
        SettingsError, match=rf"other\.onnx .*{found}.*; use YOLOX as its export_onnx\.py writes it"
    ):
        Detector(path)


def test_network_that_decodes_itself_is_refused(network, detector) -> None:
    network.grid[0, :, :2] = np.linspace(0, 96, 126)[:, None]
    with pytest.raises(SettingsError, match="centres that lie 48 from their cells, so it decodes them itself"):
        detector()


@pytest.mark.parametrize("bad", [7.5, -2.0, np.nan])
def test_network_whose_scores_are_no_scores_is_refused(network, detector, bad) -> None:
    network.grid[0, 3, 20] = bad
    with pytest.raises(SettingsError, match=r"gives scores from .*, expected 0 to 1"):
        detector()


def test_network_of_two_outputs_is_refused(network, tmp_path) -> None:
    with pytest.raises(SettingsError, match=r"gives 2 outputs \(output, number\)"):
        Detector(network.save(tmp_path / "two.onnx", twice=True))


def test_file_that_is_no_network_or_not_there_is_refused(tmp_path) -> None:
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(SettingsError, match=r"text\.onnx does not load"):
        Detector(tmp_path / "text.onnx")
    with pytest.raises(SettingsError, match=r"gone\.onnx cannot be read: No such file"):
        Detector(tmp_path / "gone.onnx")


def test_real_network_knows_most_simulated_scenes() -> None:
    path = os.environ.get("ECHOSIGHT_YOLOX_ONNX")
    if not path:
        pytest.skip("ECHOSIGHT_YOLOX_ONNX does not name a YOLOX network")
    detector = Detector(Path(path))
    scene = Scene(load_site("demo"), seed=1)
    num_tried, num_right = Counter[str](), Counter[str]()
    for t_s in np.random.default_rng(0).uniform(0, 3600, 400):
        label = scene.truth(float(t_s)).label
        if num_tried[label] == 8:
            continue
        num_tried[label] += 1
        num_right[label] += detector.see_image(scene.camera(float(t_s))[..., ::-1].copy()).label == label
    assert num_tried == dict.fromkeys(CLASSES, 8)
    assert all(num_right[label] >= 6 for label in CLASSES), num_right
