"""The label log: bounded, and followed by readers through every replacement."""

import time

import pytest

from services.core.errors import StoreError
from services.core.frames import FrameId
from services.core.labels import LabelLog
from tests.conftest import label


def log_of(directory) -> LabelLog:
    directory.mkdir(parents=True, exist_ok=True)
    return LabelLog(directory, site="north")


def say(log: LabelLog, num: int, *, start: int = 0, name: str = "car") -> None:
    log.append([label(seq, name, seq=seq) for seq in range(start, start + num)])


def test_log_is_written_anew_once_most_of_its_frames_are_gone_and_old(tmp_path, monkeypatch) -> None:
    log, reader = log_of(tmp_path), log_of(tmp_path)
    say(log, 1500)
    reader.refresh()
    assert not log.compact(is_stored=lambda at: at.seq < 10, max_age_s=3600)  # their pairs may be on their way
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 4000)
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    say(log, 5, start=2000)
    assert log.compact(is_stored=lambda at: at.seq < 10, max_age_s=3600)
    assert len(log.path.read_bytes().splitlines()) == 15
    assert sorted(at.seq for at in log.labels) == [*range(10), *range(2000, 2005)]
    say(log, 1, start=3000, name="cyclist")
    reader.refresh()
    assert reader.labels == log.labels
    assert reader.labels[label(3000, "", seq=3000).id].label == "cyclist"
    log.close()
    reader.close()


def test_log_of_live_labels_is_left_alone(tmp_path) -> None:
    log = log_of(tmp_path)
    say(log, 1500)
    before = log.path.stat().st_ino
    assert not log.compact(is_stored=lambda _: True, max_age_s=0)
    assert log.path.stat().st_ino == before
    log.close()


def test_label_that_is_said_again_and_again_takes_one_line_in_the_end(tmp_path) -> None:
    log = log_of(tmp_path)
    for turn in range(1100):
        log.append([label(0, ("car", "empty")[turn % 2])])
    assert log.compact(is_stored=lambda _: True, max_age_s=3600)
    assert log.num_lines == 1
    assert log.labels[FrameId(0, 0)].label == "empty"
    log.close()


def test_two_replacements_between_two_looks_are_noticed(tmp_path) -> None:
    log, reader = log_of(tmp_path), log_of(tmp_path)
    say(log, 2)
    reader.refresh()
    for _ in range(2):
        log.rewrite()
    say(log, 1, start=2)
    reader.refresh()
    assert reader.labels == log.labels
    assert len(reader.labels) == 3
    log.close()
    reader.close()


def test_line_of_an_unknown_version_is_refused_aloud(tmp_path) -> None:
    (tmp_path / "labels.jsonl").write_bytes(b'{"v":9}\n')
    log = log_of(tmp_path)
    with pytest.raises(StoreError, match="line of version 9; upgrade"):
        log.refresh()
    log.close()
