"""Curation: what is kept of a stream, how much is looked at, and that doubt keeps a pair."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from subprocess import run
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg

from services.core.errors import SettingsError
from services.core.frames import CameraFrame, RadarFrame, Seen
from services.core.segments import Pair
from services.ingest.curation import AT_LEAST_EVERY_S, WINDOW, Curator, make_curator
from services.ingest.curation_settings import CurationSettings
from services.ingest.quality import glance
from services.ingest.settings import IngestSettings

HEATMAP = np.zeros((2, 2), np.float32)
SIZE = (96, 128)


@cache
def texture(seed: int = 0) -> np.ndarray:
    """A sharp picture, (96, 128) uint8."""
    return np.random.default_rng(seed).integers(60, 200, SIZE, np.uint8)


def jpeg(grey: np.ndarray) -> bytes:
    rgb = np.ascontiguousarray(np.repeat(grey[..., None], 3, axis=2))
    return simplejpeg.encode_jpeg(rgb, quality=90)


@cache
def plain_image() -> bytes:
    return jpeg(texture())


def pair_at(at_s: float, image: bytes | None = None, *, encoding: Any = "jpeg", site: str = "yard") -> Pair:
    at_ns = round(at_s * 1e9)
    camera = CameraFrame(site, 0, at_ns, image=image or plain_image(), shape=(*SIZE, 3), encoding=encoding)
    return Pair(RadarFrame(site, 0, at_ns, heatmap=HEATMAP), camera)


class Watcher:
    """A detector that is told what there is at each time, and takes its time on the clock to say so."""

    def __init__(self, scene: Callable[[float], str], *, takes_s: float = 0.0) -> None:
        self.scene, self.takes_s = scene, takes_s
        self.now_s = 0.0
        self.looks: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def see(self, camera: CameraFrame, *, flags: tuple[str, ...] = ()) -> Seen | None:
        self.now_s += self.takes_s
        at_s = camera.captured_at_ns / 1e9
        self.looks.append(at_s)
        return Seen(self.scene(at_s), 0.9, flags=flags, detector="watcher")


def curator_on(scene: Callable[[float], str], *, takes_s: float = 0.0, **settings: Any) -> tuple[Curator, Watcher]:
    watcher = Watcher(scene, takes_s=takes_s)
    given = CurationSettings(**{"curation": "thin", "detector_path": "somewhere", **settings})
    return Curator(given, watcher, clock=watcher.clock), watcher


def play(curator: Curator, pairs: Iterable[Pair]) -> tuple[list[float], dict[float, str]]:
    """Times of kept pairs, and of dropped ones with their reason."""
    kept, dropped = curator.curate("yard", list(pairs))
    return [p.id.captured_at_ns / 1e9 for p in kept], {p.id.captured_at_ns / 1e9: why for p, why in dropped}


def at_10_hz(seconds: float, *, start_s: float = 1000.0) -> list[Pair]:
    return [pair_at(start_s + step / 10) for step in range(round(seconds * 10))]


def blocks(*names: str, each_s: float) -> Callable[[float], str]:
    """A scene that goes through `names` again and again."""
    return lambda at_s: names[int(at_s // each_s) % len(names)]


def test_keep_mode_keeps_all_and_notes_what_was_looked_at() -> None:
    curator, _ = curator_on(lambda _: "empty", curation="keep")
    kept, dropped = curator.curate("yard", at_10_hz(10))
    assert (len(kept), dropped) == (100, [])
    assert [pair.seen is not None for pair in kept] == [step % 5 == 0 for step in range(100)]
    assert kept[0].seen == Seen("empty", 0.9, detector="watcher")


def test_looks_are_a_look_interval_apart_also_after_the_clock_leapt_back() -> None:
    curator, watcher = curator_on(lambda _: "car", look_interval_s=2.0)
    play(curator, at_10_hz(4.1))
    play(curator, at_10_hz(4.1, start_s=10.0))
    assert watcher.looks == pytest.approx([1000, 1002, 1004, 10, 12, 14])


def test_empty_scenes_stay_within_their_share_of_the_kept_pairs() -> None:
    scene = blocks("car", "empty", "empty", "empty", each_s=30)
    curator, _ = curator_on(scene, max_empty_share=0.4)
    kept, dropped = play(curator, at_10_hz(360, start_s=0.0))
    share = sum(scene(at_s) == "empty" for at_s in kept) / len(kept)
    assert 0.37 <= share <= 0.42  # the looks until a change is believed come on top
    assert set(dropped.values()) == {"thinned_empty"}
    assert all(scene(at_s) == "empty" for at_s in dropped)


def test_share_holds_in_every_window_of_kept_pairs() -> None:
    curator, _ = curator_on(blocks("car", "empty", each_s=120), max_empty_share=0.25, agreeing_looks=1)
    kept, _ = play(curator, at_10_hz(960, start_s=0.0))
    is_empty = np.array([blocks("car", "empty", each_s=120)(at_s) == "empty" for at_s in kept])
    sums = np.convolve(is_empty, np.ones(WINDOW), mode="valid")
    assert len(kept) > 2 * WINDOW
    assert sums.max() <= 0.25 * WINDOW + 12  # 4 blocks, at most 5 pairs until each is looked at


def test_of_a_site_that_is_always_empty_one_pair_a_minute_stays() -> None:
    curator, _ = curator_on(lambda _: "empty", max_empty_share=0.0)
    kept, _ = play(curator, at_10_hz(300))
    settled = [at_s for at_s in kept if at_s > 1000.5]
    assert settled == pytest.approx(1000.5 + AT_LEAST_EVERY_S * np.arange(1, 5), abs=0.2)


def test_balance_holds_frequent_classes_to_a_multiple_of_the_rarest() -> None:
    scene = blocks("pedestrian", *["car"] * 9, each_s=10)
    curator, _ = curator_on(scene, curation="balance", balance_ratio=3.0)
    kept, dropped = play(curator, at_10_hz(1000, start_s=0.0))
    last = Counter(scene(at_s) for at_s in kept[-WINDOW:])
    assert last["car"] == pytest.approx(3 * last["pedestrian"], rel=0.1)
    assert set(dropped.values()) == {"thinned_class"}
    assert all(scene(at_s) == "car" for at_s in dropped)


def test_balance_leaves_a_site_of_one_class_alone_and_thin_leaves_classes_alone() -> None:
    curator, _ = curator_on(lambda at_s: "cyclist" if at_s < 1000.6 else "car", curation="balance")
    assert play(curator, at_10_hz(60))[1] == {}
    curator, _ = curator_on(blocks("cyclist", *["car"] * 9, each_s=10))
    assert play(curator, at_10_hz(300))[1] == {}


def test_scene_in_doubt_is_kept() -> None:
    """From the first look that says otherwise until enough agree, and while looks contradict each other."""
    curator, _ = curator_on(lambda at_s: "empty" if at_s < 1010 else "car", max_empty_share=0.0, agreeing_looks=3)
    kept, _ = play(curator, at_10_hz(20))
    assert [at_s for at_s in kept if at_s >= 1001.1] == pytest.approx(np.arange(1010.0, 1020.0, 0.1))
    flicker, _ = curator_on(blocks("empty", "car", each_s=0.5), max_empty_share=0.0)
    assert play(flicker, at_10_hz(20))[1] == {}


def test_one_look_that_errs_does_not_change_the_scene() -> None:
    curator, _ = curator_on(lambda at_s: "car" if at_s == 1010.0 else "empty", max_empty_share=0.0)
    kept, _ = play(curator, at_10_hz(20))
    assert [at_s for at_s in kept if at_s > 1001] == pytest.approx([1010.0, 1010.1, 1010.2, 1010.3, 1010.4])


def test_scene_that_cannot_be_seen_any_more_is_kept() -> None:
    curator, _ = curator_on(lambda at_s: "empty" if at_s < 1010 else "", max_empty_share=0.0)
    kept, _ = play(curator, at_10_hz(30))
    assert [at_s for at_s in kept if at_s > 1001] == pytest.approx(np.arange(1010.0, 1030.0, 0.1))


def test_pairs_of_which_there_is_no_opinion_are_never_balanced() -> None:
    curator, _ = curator_on(blocks("pedestrian", *[""] * 9, each_s=10), curation="balance", balance_ratio=1.0)
    assert play(curator, at_10_hz(200))[1] == {}


def test_time_that_a_silent_site_did_not_use_is_not_saved_up() -> None:
    curator, watcher = curator_on(lambda _: "car", curation="keep", takes_s=1.0, curation_share=0.5)
    watcher.now_s = 1000.0
    play(curator, at_10_hz(1))
    watcher.now_s += 1000.0
    play(curator, at_10_hz(100))
    assert len(watcher.looks) == 2 + 2  # a look takes two seconds' worth, one of which it earns


def test_slow_detector_sheds_looks_and_no_pairs() -> None:
    curator, watcher = curator_on(lambda _: "empty", curation="keep", takes_s=1.0, curation_share=0.5)
    for second in range(100):
        watcher.now_s = max(watcher.now_s, float(second))
        assert len(play(curator, at_10_hz(1, start_s=second))[0]) == 10
    assert 48 <= len(watcher.looks) <= 53  # half the time, and what was saved up before
    assert curator.counts["yard", "not_looked"] > 100


def test_scene_is_unknown_when_its_looks_were_shed_for_long() -> None:
    curator, watcher = curator_on(lambda _: "empty", max_empty_share=0.0)
    play(curator, at_10_hz(10))
    watcher.takes_s = 1e6
    kept, _ = play(curator, at_10_hz(30, start_s=1010.0))
    assert watcher.looks[-1] == 1010.0
    assert kept == pytest.approx(np.arange(1012.1, 1040.0, 0.1))


def test_sites_get_equal_time() -> None:
    curator, watcher = curator_on(lambda _: "car", curation="keep", takes_s=0.1, curation_share=0.5)
    for second in range(100):
        watcher.now_s = max(watcher.now_s, float(second))
        for site in ("a", "b", "c", "d"):
            curator.curate(site, [pair_at(second + step / 10) for step in range(10)])
    looks = [curator.counts[site, "saw_car"] for site in ("a", "b", "c", "d")]
    assert 115 <= min(looks) <= max(looks) <= 140


def moved(picture: np.ndarray) -> np.ndarray:
    """The same with something in it the size of a person."""
    other = picture.copy()
    other[40:80, 50:60] //= 3
    return other


def test_near_duplicates_are_thinned_to_one_an_interval() -> None:
    curator, _ = curator_on(lambda _: "car", duplicate_interval_s=5.0)
    kept, dropped = play(curator, at_10_hz(20))
    assert kept == pytest.approx([1000, 1005, 1010, 1015])
    assert play(curator, [pair_at(10.0)])[0] == [10.0]  # the clock leapt back
    assert set(dropped.values()) == {"near_duplicate"}


def test_scene_that_changes_is_no_duplicate_but_another_exposure_is() -> None:
    curator, _ = curator_on(lambda _: "car", duplicate_interval_s=60.0)
    noise = np.random.default_rng(5).integers(-3, 4, SIZE)
    images = [
        jpeg(texture()),
        jpeg((texture() * 0.9 + 20 + noise).astype(np.uint8)),
        jpeg(moved(texture())),
        jpeg(moved(texture())),
        jpeg(texture()),
    ]
    kept, _ = play(curator, [pair_at(step, image) for step, image in enumerate(images)])
    assert kept == [0, 2, 4]


def test_keep_mode_and_interval_zero_keep_duplicates() -> None:
    for settings in ({"curation": "keep", "duplicate_interval_s": 60.0}, {"duplicate_interval_s": 0.0}):
        curator, _ = curator_on(lambda _: "car", **settings)
        assert play(curator, at_10_hz(10))[1] == {}


def test_dark_images_are_never_duplicates_and_carry_their_flag() -> None:
    curator, watcher = curator_on(lambda _: "", duplicate_interval_s=60.0)
    night = jpeg(texture() // 10)
    kept, _ = curator.curate("yard", [pair_at(step / 10, night) for step in range(10)])
    assert len(kept) == 10
    assert {pair.seen.flags for pair in kept if pair.seen} == {("dark",)}
    assert [pair.seen.detector for pair in kept if pair.seen] == (["watcher"] + [""] * 4) * 2
    assert curator.counts["yard", "dark"] == 10
    assert len(watcher.looks) == 2


@pytest.mark.parametrize(
    ("picture", "flags"),
    [
        (texture(), ()),
        (texture() // 10, ("dark",)),
        (cv2.GaussianBlur(texture(), (0, 0), 4), ("blurred",)),
        (np.full(SIZE, 170, np.uint8), ("blurred",)),
        ((texture() // 8 + 150), ()),
    ],
    ids=["sharp", "dark", "blurred", "fog too thick", "haze"],
)
def test_images_in_which_little_can_be_seen_are_flagged(picture, flags) -> None:
    seen = glance(pair_at(0, jpeg(picture)).camera)
    assert seen is not None
    assert seen.flags == flags
    assert seen.cells.shape == (32, 32)


def damaged(image: bytes) -> Sequence[bytes]:
    middle = len(image) // 2
    return image[:middle] + image[-40:], image[:middle] + bytes(len(image) - middle - 40) + image[-40:]


@pytest.mark.parametrize("mode", ["keep", "thin"])
def test_images_that_do_not_unpack_drop_their_pair(mode, capfd) -> None:
    ok, png = cv2.imencode(".png", texture())
    assert ok
    curator, watcher = curator_on(lambda _: "car", curation=mode)
    bad = [pair_at(n, image) for n, image in enumerate(damaged(plain_image()))]
    bad += [pair_at(n + 2, image, encoding="png") for n, image in enumerate(damaged(png.tobytes()))]
    bad += [pair_at(4, jpeg(texture()[:80]))]  # not of the size it was sent as
    kept, dropped = curator.curate("yard", [*bad, pair_at(9), pair_at(10, png.tobytes(), encoding="png")])
    capfd.readouterr()  # libpng complains on stderr
    assert [pair.id.captured_at_ns for pair in kept] == [9 * 10**9, 10 * 10**9]
    assert dropped == [(pair, "unreadable") for pair in bad]
    assert watcher.looks == [9.0, 10.0]


def test_counts_add_up_to_the_pairs_given() -> None:
    curator, _ = curator_on(blocks("car", "empty", "", each_s=20), duplicate_interval_s=1.0, max_empty_share=0.2)
    pairs = [pair_at(n / 10, jpeg(texture(n % 7))) for n in range(300)] + [pair_at(31, b"\xff\xd8\xff\xd9")]
    kept, dropped = curator.curate("yard", pairs)
    counts = {what: num for (_, what), num in curator.counts.items()}
    assert counts["kept"] == len(kept)
    where = Counter(why for _, why in dropped)
    assert {what: counts[what] for what in where} == where
    assert len(kept) + len(dropped) == 301
    assert counts["saw_car"] + counts["saw_empty"] == 60


def test_without_a_detector_images_are_checked_and_nothing_is_seen() -> None:
    curator = make_curator(CurationSettings(curation="keep"))
    assert curator is not None
    kept, _ = curator.curate("yard", [pair_at(0), pair_at(1, jpeg(texture() // 10))])
    assert [pair.seen for pair in kept] == [None, Seen("", 0.0, flags=("dark",))]


def test_forgotten_site_starts_anew() -> None:
    curator, watcher = curator_on(lambda _: "car")
    play(curator, [pair_at(0)])
    curator.forget("yard")
    play(curator, [pair_at(0.1)])
    assert watcher.looks == [0.0, 0.1]


def test_switched_off_there_is_no_curator_and_no_image_library() -> None:
    assert make_curator(CurationSettings()) is None
    code = (
        "import sys; from services.ingest.curation import make_curator; "
        "from services.ingest.curation_settings import CurationSettings; "
        "assert make_curator(CurationSettings()) is None; "
        "print(sorted({'cv2', 'simplejpeg', 'onnxruntime'} & set(sys.modules)))"
    )
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_thinning_without_a_detector_is_refused_and_the_setting_named(monkeypatch) -> None:
    monkeypatch.setenv("ECHOSIGHT_CURATION", "thin")
    with pytest.raises(
        SettingsError, match=r"setting ECHOSIGHT_DETECTOR_PATH is '': .*curation thin needs a detector"
    ):
        IngestSettings.read()


def test_bad_detector_is_refused_when_the_curator_is_made(tmp_path) -> None:
    (tmp_path / "no.onnx").write_text("no network")
    with pytest.raises(SettingsError, match=r"no\.onnx does not load"):
        make_curator(CurationSettings(curation="keep", detector_path=str(tmp_path / "no.onnx")))
