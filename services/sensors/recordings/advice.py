"""What to do about a recording, out of what the doctor found: sentences for people. Nothing is read here."""

from collections.abc import Iterator

from services.sensors.recordings.doctor import Clockwork, Examination

_SATURATED_SHARE = 0.01
_SHORT_S = 60.0
_FEW_PAIRS_SHARE = 0.9
_NAMES_SHOWN = 3


def advise(found: Examination) -> list[str]:
    """The most important first; empty when there is nothing to say."""
    return [*_on_sensors(found), *_on_pairs(found), *_on_files(found), *_on_values(found), *_on_labels(found)]


def shorten(names: tuple[str, ...]) -> str:
    """The first few names and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _on_sensors(found: Examination) -> Iterator[str]:
    if found.radar.num_frames == 0:
        yield "There is no readable radar frame: nothing can be learnt. Check the names below."
    if found.camera.num_frames == 0:
        yield "There is no readable image: nothing will pair, and nothing can be learnt without a camera."
    for name, sensor in (("radar", found.radar), ("camera", found.camera)):
        yield from _on_clock(name, sensor)
    if 0 < found.radar.span_s < _SHORT_S:
        yield f"The radar runs for {found.radar.span_s:.1f} s: enough to try the path, too short to train on."


def _on_clock(name: str, sensor: Clockwork) -> Iterator[str]:
    if sensor.num_same_time:
        yield (
            f"{sensor.num_same_time} {name} frames carry the time of the frame before: a duplicate, or a clock "
            "too coarse. Both are kept where seq differs."
        )
    if sensor.gaps:
        longest = max(sensor.gaps, key=lambda gap: gap.seconds)
        yield (
            f"The {name} has {len(sensor.gaps)} gap{'s' if len(sensor.gaps) > 1 else ''}; the longest is "
            f"{longest.seconds:.2f} s after {longest.at_s:.2f} s. What the other sensor saw then may stay alone."
        )


def _on_pairs(found: Examination) -> Iterator[str]:
    pairing = found.pairing
    if found.radar.num_frames == 0 or found.camera.num_frames == 0:
        return
    if pairing.overlap_s == 0:
        yield (
            f"The sensors never run at the same time: images are {pairing.offset_ms / 1e3:+.3f} s from the "
            "nearest radar frame. Check units (s or ns), time zones, and whether both files belong together."
        )
        return
    overlapping = pairing.overlap_s * found.radar.rate_hz
    if pairing.num_pairs < _FEW_PAIRS_SHARE * overlapping:
        yield (
            f"{pairing.num_pairs} of about {overlapping:.0f} radar frames find an image within "
            f"{pairing.window_ms:g} ms; {pairing.enough_window_ms:.0f} ms would reach 95 %."
        )
    if abs(pairing.offset_ms) > max(2 * pairing.offset_spread_ms, found.camera.step_ms / 4):
        yield (
            f"Images are a steady {pairing.offset_ms:+.1f} ms from the radar (spread "
            f"{pairing.offset_spread_ms:.1f} ms): the clocks differ; subtract it from the camera's times."
        )


def _on_files(found: Examination) -> Iterator[str]:
    report = found.report
    if report.missing:
        yield f"{len(report.missing)} listed files are missing ({shorten(report.missing)}); they are passed over."
    if report.corrupt:
        first = report.corrupt[0]
        yield f"{len(report.corrupt)} files cannot be used; the first is {first.name}: {first.reason}."
    if report.surplus:
        yield f"{len(report.surplus)} files are in no index ({shorten(report.surplus)}); they are not played."


def _on_values(found: Examination) -> Iterator[str]:
    values = found.values
    if len(values.shapes) > 1:
        yield f"Heatmaps have several shapes ({', '.join(values.shapes)}); split the recording, one radar each."
    if values.num_constant:
        yield f"{values.num_constant} heatmaps hold one single value: the radar was off, or the file is not a map."
    if values.saturated_share > _SATURATED_SHARE:
        yield f"{values.saturated_share:.1%} of the values are 255: the radar was overdriven, or the scale clips."
    if len(found.image_shapes) > 1:
        yield f"Images have several shapes ({', '.join(found.image_shapes)}); that works, if it is meant."


def _on_labels(found: Examination) -> Iterator[str]:
    have = [name for name, count in found.classes.items() if count]
    if not have:
        yield "No frame is labelled: learning works without, but no accuracy can be told. Label a few dozen."
    elif len(have) == 1:
        yield f"Every label says {have[0]}: a classifier needs examples of at least two classes."
