"""A light object detector on camera images: a YOLOX network, exported to ONNX, as YOLOX exports it.

It says what it sees in one image. It knows nothing of sites, of images before, and of what is kept.

Zheng Ge et al., YOLOX: Exceeding YOLO Series in 2021, arXiv:2107.08430. Classes are COCO's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from services.core.errors import SettingsError
from services.core.frames import CameraFrame, Seen, SeenObject
from services.ingest.quality import Image, unpack

COCO_KINDS = {0: "pedestrian", 1: "bicycle", 2: "car", 3: "bicycle", 5: "car", 7: "car"}
"""COCO's number to what we take it for. A motorcycle (3) is a bicycle: networks mix the two up, and a radar sees a
rider on a frame either way. Bus (5) and truck (7) are cars: networks mix them up too, and all are large metal."""

_KINDS = ("pedestrian", "bicycle", "car")
_STRIDES = (8, 16, 32)
_NUM_COLUMNS = 5 + 80  # x, y, width, height, objectness, and COCO's classes
_PAD = 114  # YOLOX was trained with borders of this grey
_NMS_OVERLAP = 0.45
_RIDER_OVERLAP = 0.3  # of the smaller box
_MAX_LOG_SIZE = 10.0
_EXPECTED = f"use YOLOX as its export_onnx.py writes it: 1x3xHxW float32 to 1xNx{_NUM_COLUMNS}, not decoded"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Found:
    kind: str
    score: float
    box: tuple[float, float, float, float]


class Detector:
    """A network that has answered once. One call at a time."""

    def __init__(self, path: Path, *, threads: int = 1, min_score: float = 0.3) -> None:
        """min_score: from which an object counts. Raises SettingsError for a file that is no YOLOX as expected."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SettingsError(
                f"detector {path} cannot be read: {error.strerror}", remedy="name a YOLOX ONNX file"
            ) from None
        self.name = f"{path.stem}@{sha256(content).hexdigest()[:8]}"
        self._path = path
        self._min_score = min_score
        self._session = _open_session(path, content, threads)
        self._input, self._size = self._check_input()
        self._corners, self._strides = _grid(self._size)
        self._check_output()

    def see(self, camera: CameraFrame, *, flags: tuple[str, ...] = ()) -> Seen | None:
        """What is in the image; None where it does not unpack.

        flags: what is known to be wrong with it. In a flagged image nothing found means no opinion, not "empty".
        """
        height, width = camera.shape[:2]
        ratio = self._ratio(height, width)
        image = unpack(
            camera,
            is_grey=False,
            min_height=min(height, round(height * ratio)),
            min_width=min(width, round(width * ratio)),
        )
        if image is None:
            return None
        return self.see_image(image, scale=width / image.shape[1], flags=flags)

    def see_image(self, image: Image, *, scale: float = 1.0, flags: tuple[str, ...] = ()) -> Seen:
        """What is in an image. image: (H, W, 3) uint8 BGR. scale: pixels as sent, for each pixel of `image`."""
        ratio = self._ratio(*image.shape[:2])
        output = self._run(_letterbox(image, ratio, self._size))
        scores = _scores(output)
        doubtful = self._min_score / 2
        found = self._boxes(output, scores, above=doubtful, scale=scale / ratio)
        objects, is_riderless = _road_users(found, self._min_score)
        if objects:
            label, confidence = objects[0].label, objects[0].confidence
        elif flags or is_riderless or not scores.max() < doubtful:  # not: NaN is no opinion either
            label, confidence = "", 0.0
        else:
            label, confidence = "empty", round(1.0 - float(scores.max()), 4)
        return Seen(label, confidence, objects=tuple(objects), flags=flags, detector=self.name)

    def _ratio(self, height: int, width: int) -> float:
        return min(self._size[0] / height, self._size[1] / width)

    def _run(self, blob: Floats) -> Floats:
        """(N, 85) float32, as the network gives it."""
        output: Floats = self._session.run(None, {self._input: blob})[0][0]
        return output

    def _boxes(self, output: Floats, scores: Floats, *, above: float, scale: float) -> list[_Found]:
        """Objects of our kinds that score `above` or more, one for each thing. scores: (N, 3)."""
        rows, kinds = np.nonzero(scores >= above)
        if not len(rows):
            return []
        middle = (output[rows, :2] + self._corners[rows]) * self._strides[rows]
        size = np.exp(np.minimum(output[rows, 2:4], _MAX_LOG_SIZE)) * self._strides[rows]
        boxes = np.concatenate([middle - size / 2, size], axis=1) * scale
        best = scores[rows, kinds]
        kept = cv2.dnn.NMSBoxesBatched(boxes.tolist(), best.tolist(), kinds.tolist(), above, _NMS_OVERLAP)
        found = []
        for index in np.asarray(kept, np.int64).reshape(-1):
            left, top, width, height = (float(value) for value in boxes[index])
            box = (left, top, left + width, top + height)
            found.append(_Found(_KINDS[kinds[index]], float(best[index]), box))
        return found

    def _check_input(self) -> tuple[str, tuple[int, int]]:
        """Name and (H, W) of the input."""
        nodes = self._session.get_inputs()
        described = ", ".join(f"{node.type} {node.shape}" for node in nodes)
        if len(nodes) != 1 or nodes[0].type != "tensor(float)" or len(nodes[0].shape) != 4:
            raise self._refuse(f"takes {described}")
        batch, channels, height, width = nodes[0].shape
        is_ours = (batch == 1 or not isinstance(batch, int)) and channels == 3
        if not is_ours or not all(isinstance(n, int) and n > 0 and n % _STRIDES[-1] == 0 for n in (height, width)):
            raise self._refuse(f"takes {described}, sizes must be fixed multiples of {_STRIDES[-1]}")
        return nodes[0].name, (height, width)

    def _check_output(self) -> None:
        """Ask once, on plain grey: the shape that is declared need not be the one that comes."""
        outputs = self._session.get_outputs()
        if len(outputs) != 1:
            raise self._refuse(f"gives {len(outputs)} outputs ({', '.join(node.name for node in outputs)})")
        expected = (1, len(self._corners), _NUM_COLUMNS)
        try:
            output = self._session.run(None, {self._input: np.full((1, 3, *self._size), _PAD, np.float32)})[0]
        except Exception as error:  # onnxruntime's errors have no common class
            raise self._refuse(f"does not run: {_first_line(error)}") from None
        if output.shape != expected:
            raise self._refuse(f"gives {output.shape}, expected {expected}")
        scores = output[0, :, 4:]
        if not (scores.min() >= 0.0 and scores.max() <= 1.0):
            raise self._refuse(f"gives scores from {scores.min():g} to {scores.max():g}, expected 0 to 1")
        # Raw centres are a cell or so from their corner; decoded ones lie all over the picture.
        away = float(np.median(np.abs(output[0, :, :2])))
        if not away < _STRIDES[0]:
            raise self._refuse(f"gives centres that lie {away:.0f} from their cells, so it decodes them itself")

    def _refuse(self, what: str) -> SettingsError:
        return SettingsError(f"detector {self._path} {what}", remedy=_EXPECTED)


def _open_session(path: Path, content: bytes, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised as well
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        raise SettingsError(f"detector {path} does not load: {_first_line(error)}", remedy=_EXPECTED) from None


def _grid(size: tuple[int, int]) -> tuple[Floats, Floats]:
    """(N, 2) corners of the cells as x, y in cells, and (N, 1) their strides in pixels; YOLOX's order."""
    corners, strides = [], []
    for stride in _STRIDES:
        rows, columns = np.mgrid[: size[0] // stride, : size[1] // stride]
        corners.append(np.stack([columns, rows], axis=-1).reshape(-1, 2))
        strides.append(np.full((rows.size, 1), stride))
    return np.concatenate(corners).astype(np.float32), np.concatenate(strides).astype(np.float32)


def _letterbox(image: Image, ratio: float, size: tuple[int, int]) -> Floats:
    """(1, 3, H, W) float32 BGR 0 to 255: the image at the top left, as YOLOX does it."""
    height, width = image.shape[:2]
    canvas = np.full((*size, 3), _PAD, np.uint8)
    inner = max(1, int(width * ratio)), max(1, int(height * ratio))
    canvas[: inner[1], : inner[0]] = cv2.resize(image, inner, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(canvas.transpose(2, 0, 1)[None], np.float32)


def _scores(output: Floats) -> Floats:
    """(N, 3) float32: for each of our kinds, the best of COCO's classes times the objectness."""
    columns = [[5 + number for number, kind in COCO_KINDS.items() if kind == ours] for ours in _KINDS]
    best = [output[:, numbers].max(axis=1) for numbers in columns]
    scores: Floats = np.stack(best, axis=1) * output[:, 4:5]
    return scores


def _road_users(found: Sequence[_Found], min_score: float) -> tuple[list[SeenObject], bool]:
    """Road users, nearest first, and whether a bicycle stands there without a rider.

    Nearest is whose box reaches lowest: they all stand on one ground. A person over a bicycle is a cyclist; a
    bicycle makes a rider likely, so half the score will do for one.
    """
    users = [_user("car", car) for car in found if car.kind == "car" and car.score >= min_score]
    people = [person for person in found if person.kind == "pedestrian"]
    num_riderless = 0
    for bicycle in (thing for thing in found if thing.kind == "bicycle" and thing.score >= min_score):
        rider = max(people, key=lambda person: _overlap(person, bicycle), default=None)
        if rider is None or _overlap(rider, bicycle) < _RIDER_OVERLAP:
            num_riderless += 1
            continue
        people.remove(rider)
        users.append(_cyclist(rider, bicycle))
    users += [_user("pedestrian", person) for person in people if person.score >= min_score]
    return sorted(users, key=lambda user: -user.box[3]), num_riderless > 0


def _overlap(person: _Found, bicycle: _Found) -> float:
    """Shared area over the smaller box's; 0 for a person whose head is no higher than the bicycle."""
    a, b = person.box, bicycle.box
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller if width > 0 and height > 0 and smaller > 0 and a[1] < b[1] else 0.0


def _cyclist(rider: _Found, bicycle: _Found) -> SeenObject:
    a, b = rider.box, bicycle.box
    box = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    return _user("cyclist", _Found("cyclist", min(rider.score, bicycle.score), box))


def _user(label: str, found: _Found) -> SeenObject:
    left, top, right, bottom = (round(value, 1) for value in found.box)
    return SeenObject(label, round(found.score, 4), box=(left, top, right, bottom))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
