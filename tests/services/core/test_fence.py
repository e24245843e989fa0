"""A writer that was paused at any moment while another took its site over does no harm, and learns of it."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from services.core import disks
from services.core.encodings import checksum, header_of, row_dtype
from services.core.errors import StoreError, StoreFencedError
from services.core.fence import Fence, newest_token, owner_of
from services.core.frames import FrameId
from services.core.records import record_of
from services.core.store import StoreLimits, StoreReader, StoreWriter
from tests.conftest import MS, label, pair

LIMITS = StoreLimits(min_free_bytes=0)
CALLS = (
    *("open", "pwrite", "pwritev", "write", "fdatasync", "fsync", "ftruncate", "link", "unlink", "rename", "stat"),
    *("utime", "listdir", "close"),
)


def ids(store_dir: Path) -> list[FrameId]:
    """What a reader lists that starts now; all of it must be whole."""
    reader = StoreReader(store_dir)
    reader.refresh()
    assert all(one.radar() is not None and one.camera() is not None for one in reader if one.has_image)
    found = [one.id for one in reader]
    reader.close()
    return found


def test_first_writer_of_a_site_has_token_1_and_the_next_one_more(store_dir) -> None:
    assert newest_token(store_dir, "north") == 0
    for token in (1, 2):
        writer = StoreWriter(store_dir, "north", owner="me")
        assert writer.token == newest_token(store_dir, "north") == token
        writer.close()
    assert owner_of(store_dir / "north") == "me"


@pytest.mark.parametrize("token", [1, 6, 7])
def test_token_that_is_not_the_highest_is_refused(store_dir, token) -> None:
    StoreWriter(store_dir, "north", token=7).close()
    with pytest.raises(StoreFencedError, match=f"written under token 7, ours is {token}"):
        StoreWriter(store_dir, "north", token=token)
    assert newest_token(store_dir, "north") == 7


def test_writer_that_was_replaced_is_refused_whatever_it_does(store_dir) -> None:
    old = StoreWriter(store_dir, "north", token=1, limits=LIMITS)
    old.append([pair(0)])
    new = StoreWriter(store_dir, "north", token=2, limits=LIMITS)
    for act in (
        lambda: old.append([pair(0)]),
        lambda: old.append([pair(1, seq=1)]),
        lambda: old.append_labels([label(0, "car")]),
        lambda: old.evict(),
        lambda: old.drop_encoded_images(),
        lambda: old.check_token(),
    ):
        with pytest.raises(StoreFencedError):
            act()
    assert new.append([pair(0), pair(1, seq=1)]) == 1
    assert len(new) == len(ids(store_dir)) == 2
    old.close()
    new.close()


class Pause:
    """Lets something happen just before, or after, the n-th system call of what runs meanwhile."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, at: int, after: bool, happens: Callable[[], None]
    ) -> None:
        self.num_calls = 0
        self._at = at
        self._after = after
        self._happens = happens
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            self.num_calls += 1
            is_now = self.num_calls == self._at
            if not is_now:
                return call(*args, **kwargs)
            self.num_calls = 10_000  # what happens makes calls as well
            if self._after:
                try:
                    return call(*args, **kwargs)
                finally:
                    self._happens()
            self._happens()
            return call(*args, **kwargs)

        return wrapped


def encode(store_dir: Path, frame_ids: list[FrameId]) -> None:
    """What the trainer writes of images that it has encoded."""
    rows = np.zeros(len(frame_ids), row_dtype(2))
    for row, frame_id in zip(rows, frame_ids, strict=True):
        row["captured_at_ns"], row["seq"] = frame_id
        row["sum"] = checksum(row)
    path = store_dir / "north" / "encodings" / "e.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header_of(2) + rows.tobytes())


def append(writer: StoreWriter) -> None:
    assert writer.append([pair(seq, seq=seq) for seq in (10, 11)]) == 2


def append_to_a_full_segment(writer: StoreWriter) -> None:
    writer.limits = StoreLimits(min_free_bytes=0, segment_bytes=1, max_bytes=100_000)
    append(writer)


def add_label(writer: StoreWriter) -> None:
    assert writer.append_labels([label(0, "cyclist")]) == 1


def evict(writer: StoreWriter) -> None:
    writer.limits = StoreLimits(min_free_bytes=2**62, segment_bytes=1000)
    writer.evict()


def drop_images(writer: StoreWriter) -> None:
    writer.drop_encoded_images()


ACTS = [append, append_to_a_full_segment, add_label, evict, drop_images]


def scene(store_dir: Path) -> StoreWriter:
    """Three segments, the last one open; pairs 0 and 5 have a label, 0 to 3 are encoded."""
    old = StoreWriter(store_dir, "north", token=1, limits=LIMITS)
    old.append_labels([label(0, "car"), label(5, "empty", seq=5)])
    old.limits = StoreLimits(min_free_bytes=0, segment_bytes=1000, max_bytes=100_000)
    for seq in range(0, 9, 3):
        old.append([pair(at, seq=at) for at in range(seq, seq + 3)])
    encode(store_dir, [pair(seq, seq=seq).id for seq in range(4)])
    return old


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_take_over_at_any_system_call_of_the_old_writer_loses_and_doubles_nothing(
    tmp_path, monkeypatch, act, after
) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None)  # processes pause here, no machine fails
    outcomes = set()
    for at in range(1, 400):
        store_dir = tmp_path / str(at)
        old = scene(store_dir)
        follower = StoreReader(store_dir)
        follower.refresh()
        taken: list[StoreWriter] = []
        with monkeypatch.context() as patch:
            pause = Pause(
                patch,
                at=at,
                after=after,
                happens=lambda: taken.append(StoreWriter(store_dir, "north", token=2, limits=LIMITS)),  # noqa: B023
            )
            try:
                act(old)
                is_done = True
            except StoreFencedError:
                is_done = False
        if not taken:
            assert is_done
            assert pause.num_calls < at
            break
        new = taken[0]
        outcomes.add(is_done)
        if is_done and act in (append, append_to_a_full_segment):
            assert pair(11, seq=11).id in new
        if is_done and act is add_label:
            assert new.labels.labels[pair(0).id].label == "cyclist"
        # Nothing shows that the new writer does not know, and what is pinned is there.
        assert ids(store_dir) == sorted(new._ids)
        assert pair(0).id in ids(store_dir)
        with pytest.raises(StoreFencedError):
            old.append([pair(20, seq=20)])
        assert new.append([pair(30, seq=30)]) == 1
        follower.refresh()
        assert [one.id for one in follower] == ids(store_dir)
        follower.close()
        before = ids(store_dir)
        old.close()
        new.close()
        heir = StoreWriter(store_dir, "north", limits=LIMITS)
        assert sorted(heir._ids) == before == ids(store_dir)
        heir.close()
    else:
        pytest.fail("the act never ended without a take-over")
    assert outcomes == ({True, False} if after else {False})


def test_rows_that_the_old_writer_adds_after_the_take_over_count_for_nobody(store_dir) -> None:
    old = StoreWriter(store_dir, "north", token=1, limits=LIMITS)
    old.append([pair(0)])
    reader = StoreReader(store_dir)
    reader.refresh()
    new = StoreWriter(store_dir, "north", token=2, limits=LIMITS)
    assert old._open is not None
    old._open.append([record_of(pair(1, seq=1))])  # it passed its check before the pause
    assert reader.refresh() == len(ids(store_dir)) == len(new) == 1
    assert new.append([pair(1, seq=1)]) == 1
    assert reader.refresh() == len(ids(store_dir)) == 2
    reader.close()
    old.close()
    new.close()


def test_rows_written_while_the_site_changes_hands_wait_for_the_seal(store_dir) -> None:
    old = StoreWriter(store_dir, "north", token=1, limits=LIMITS)
    old.append([pair(0)])
    reader = StoreReader(store_dir)
    reader.refresh()
    Fence.take(store_dir / "north", token=2, owner="")  # and it dies before it has sealed anything
    assert old._open is not None
    old._open.append([record_of(pair(1, seq=1))])
    assert reader.refresh() == 1
    new = StoreWriter(store_dir, "north", token=3, limits=LIMITS)
    assert reader.refresh() == len(new) == 2
    reader.close()
    old.close()
    new.close()


def test_labels_that_the_old_writer_adds_after_the_take_over_count_for_nobody(store_dir) -> None:
    old = StoreWriter(store_dir, "north", token=1, limits=LIMITS)
    old.append_labels([label(0, "car")])
    log = (store_dir / "north" / "writer-1" / "labels.jsonl").open("ab")
    new = StoreWriter(store_dir, "north", token=2, limits=LIMITS)
    new.append_labels([label(0, "cyclist")])
    with log:
        log.write(b'{"v":1,"captured_at_ns":0,"seq":0,"label":"empty","source":"late"}\n')
    new.append_labels([label(MS, "car", seq=1)])
    assert new.labels.labels[FrameId(0, 0)].label == "cyclist"
    old.close()
    new.close()


def test_of_many_takers_at_once_the_highest_token_wins_and_keeps_all_pairs(store_dir) -> None:
    for round_ in range(10):
        first = StoreWriter(store_dir, "north", limits=LIMITS)
        first.append([pair(round_, seq=round_)])

        def take(token: int) -> int | None:
            try:
                StoreWriter(store_dir, "north", token=token, limits=LIMITS).close()
            except StoreFencedError:
                return None
            return token

        tokens = [first.token + number for number in range(1, 6)]
        with ThreadPoolExecutor(5) as pool:
            won = set(pool.map(take, tokens))
        assert tokens[-1] in won
        assert newest_token(store_dir, "north") == tokens[-1]
        assert [frame_id.seq for frame_id in ids(store_dir)] == list(range(round_ + 1))
        first.close()


def test_two_directories_that_takers_of_a_new_site_made_become_one(store_dir) -> None:
    for name in ("writer-3", "writer-5"):
        (store_dir / "north" / name).mkdir(parents=True)
    with pytest.raises(StoreFencedError):
        Fence.take(store_dir / "north", token=4, owner="")
    Fence.take(store_dir / "north", token=6, owner="")
    assert [path.name for path in (store_dir / "north").iterdir()] == ["writer-6"]


def test_sites_that_change_hands_for_ever_do_not_fill_with_small_segments(store_dir) -> None:
    for seq in range(40):
        writer = StoreWriter(store_dir, "north", limits=LIMITS)
        assert len(writer) == seq
        writer.append([pair(seq, seq=seq)])
        writer.close()
    assert len(list(store_dir.rglob("*.idx"))) < 10
    assert [frame_id.seq for frame_id in ids(store_dir)] == list(range(40))


@pytest.fixture
def small_segments(store_dir) -> Path:
    """Eight of them: the next writer makes them one."""
    for seq in range(8):
        writer = StoreWriter(store_dir, "north", limits=LIMITS)
        writer.append([pair(seq, seq=seq)])
        writer.close()
    return store_dir


@pytest.mark.parametrize("call", ["rename", "link", "unlink", "fsync"])
def test_crash_while_small_segments_become_one_loses_and_doubles_nothing(
    small_segments, monkeypatch, call
) -> None:
    num_done, real = 0, getattr(os, call)
    for num_allowed in range(30):
        num_done = 0

        def crash(*args: object, **kwargs: object) -> object:
            nonlocal num_done
            num_done += 1
            if num_done > num_allowed:  # noqa: B023
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, crash)
            try:
                StoreWriter(small_segments, "north", limits=LIMITS).close()
            except KeyboardInterrupt:
                assert set(ids(small_segments)) <= {pair(seq, seq=seq).id for seq in range(8)}
                continue
        break
    StoreWriter(small_segments, "north", limits=LIMITS).close()
    assert [frame_id.seq for frame_id in ids(small_segments)] == list(range(8))
    assert len(list(small_segments.rglob("*.idx"))) == 1


def mountinfo(*mounts: tuple[str, str]) -> str:
    return "".join(f"36 35 98:0 / {point} rw shared:1 - {kind} source rw\n" for point, kind in mounts)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/data/store", ("nfs4", "/data")),
        ("/data/local/store", ("xfs", "/data/local")),
        ("/data2", ("ext4", "/")),
        ("/my disk/store", ("cifs", "/my disk")),
        ("/top/x", ("tmpfs", "/top")),
    ],
)
def test_file_system_is_that_of_the_deepest_and_last_mount(path, found) -> None:
    mounts = [("/", "ext4"), ("/data", "nfs4"), ("/data/local", "xfs"), ("/my\\040disk", "cifs")]
    info = mountinfo(*mounts, ("/top", "nfs"), ("/top", "tmpfs"))
    assert disks.file_system_of(Path(path), mountinfo=info) == found


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "ceph", "lustre", "afs", "glusterfs"]
)
def test_network_file_system_is_refused_in_words(tmp_path, kind) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(mountinfo(("/", "ext4"), (str(tmp_path), kind)))
    with pytest.raises(
        StoreError, match=rf"store {tmp_path}/store lies on .* \({kind}, mounted at .*put it on a disk"
    ):
        disks.require_local_disk(tmp_path / "store", mounts=mounts)
    disks.require_local_disk(tmp_path.parent, mounts=mounts)
