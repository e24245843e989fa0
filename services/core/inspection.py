"""What a person wants to know of the store, and can do to it: describe, verify, repair.

`describe` and `verify` only read, while others write. `repair` takes the site over as a writer does.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from services.core.encodings import DIRECTORY, EncodedIds
from services.core.errors import StoreError
from services.core.fence import Fence, data_dir, newest_token, owner_of
from services.core.frames import FrameId, check_site
from services.core.labels import FILE_NAME
from services.core.reader import StoreReader
from services.core.records import FLAGS_AT, ROW
from services.core.recovery import SUFFIXES, recover, recover_all
from services.core.sealing import read_seal
from services.core.segments import SegmentReader
from services.core.shares import site_sizes
from services.core.upgrade import move_version_1


@dataclass(frozen=True, slots=True)
class SiteDescription:
    """One site of the store. oldest_at_ns, newest_at_ns: capture times, None without pairs.

    num_images_dropped: for privacy. versions: of the segments' format. token, owner: of who wrote it last.
    """

    site: str
    num_segments: int
    num_pairs: int
    num_bytes: int
    oldest_at_ns: int | None
    newest_at_ns: int | None
    num_labels: int
    num_images_dropped: int
    versions: tuple[int, ...]
    token: int
    owner: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be. row: of the segment, or line of the labels; None for a whole file."""

    file: str
    row: int | None
    what: str


def describe(store_dir: Path) -> list[SiteDescription]:
    """Every site of the store, by name. Raises StoreError."""
    sizes = site_sizes(store_dir)
    with contextlib.closing(StoreReader(store_dir)) as reader:
        reader.refresh()
        return [_describe(reader, store_dir, site, num_bytes=sizes[site]) for site in sorted(sizes)]


def _describe(reader: StoreReader, store_dir: Path, site: str, *, num_bytes: int) -> SiteDescription:
    segments = reader.segments(site)
    pairs = [pair for pair in reader if pair.site == site]
    return SiteDescription(
        site,
        num_segments=len(segments),
        num_pairs=len(pairs),
        num_bytes=num_bytes,
        oldest_at_ns=pairs[0].id.captured_at_ns if pairs else None,
        newest_at_ns=pairs[-1].id.captured_at_ns if pairs else None,
        num_labels=sum(pair.site == site for pair, _ in reader.labelled()),
        num_images_dropped=sum(not pair.has_image for pair in pairs),
        versions=tuple(sorted({segment.version for segment in segments})),
        token=newest_token(store_dir, site),
        owner=owner_of(store_dir / site),
    )


def verify(store_dir: Path, site: str, *, progress: Callable[[int, int], None] | None = None) -> Iterator[Finding]:
    """Read every byte of a site, and say what is wrong with it. What is evicted meanwhile is passed over.

    progress: called with the number of segments that are done and of all.
    """
    site_dir = _site_dir(store_dir, site)
    directory = data_dir(site_dir)
    names = sorted({path.stem for path in directory.iterdir() if path.suffix in SUFFIXES})
    for num_done, name in enumerate(names):
        directory = data_dir(site_dir)  # a writer that takes the site over meanwhile renames it
        yield from _verify_segment(directory, name)
        if progress is not None:
            progress(num_done + 1, len(names))
    yield from _verify_labels(directory / FILE_NAME)
    yield from _verify_encodings(store_dir / site)


def _verify_segment(directory: Path, name: str) -> Iterator[Finding]:
    missing = [suffix for suffix in SUFFIXES[:2] if not (directory / f"{name}{suffix}").exists()]
    if len(missing) == 1 and any((directory / f"{name}{suffix}").exists() for suffix in SUFFIXES):
        yield Finding(f"{name}{missing[0]}", None, "is missing")
    if missing:
        return
    try:
        if (directory / f"{name}.end").exists() and read_seal(directory, name) is None:
            yield Finding(f"{name}.end", None, "the seal is damaged")
        with contextlib.closing(SegmentReader(directory, name)) as reader:
            num_rows = reader.refresh()
            if reader.seal and reader.seal.num_rows > num_rows:
                yield Finding(f"{name}.idx", None, f"has {num_rows} of {reader.seal.num_rows} rows")
            for row, _ in reader.ids():
                yield from _verify_row(reader, row)
    except FileNotFoundError:
        return
    except (StoreError, OSError) as error:
        yield Finding(name, None, str(error))


def _verify_row(reader: SegmentReader, index: int) -> Iterator[Finding]:
    file, row = f"{reader.name}.seg", reader.rows[index]
    if reader.read_radar(index, site="-") is None:
        yield Finding(file, index, "the checksum of the radar frame does not hold")
    elif not reader.is_intact(index):
        yield Finding(file, index, "the checksum of the image does not hold")
    elif reader.version != 1:
        copy = reader.read_bytes(int(row["offset"]) - ROW.itemsize, FLAGS_AT)
        if copy != row.tobytes()[:FLAGS_AT]:
            yield Finding(file, index, "the row differs from its copy in the index")


def _verify_labels(path: Path) -> Iterator[Finding]:
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            orjson.loads(line)
        except orjson.JSONDecodeError:
            yield Finding(path.name, number, "is no JSON; a crash left it, and its label came again")


def _verify_encodings(site_dir: Path) -> Iterator[Finding]:
    try:
        with contextlib.closing(EncodedIds(site_dir)) as ids:
            ids.take()
    except StoreError as error:
        yield Finding(DIRECTORY, None, error.what)


def repair(store_dir: Path, site: str) -> list[str]:
    """Take a site over and put right what can be; return what was done, a sentence each.

    Indexes are made again from the data, damaged rows made void, leftovers removed. No pair that is whole is lost.
    Stop ingest first: it would take the site back in the middle. Raises StoreError, OSError.
    """
    try:
        return _repair(_site_dir(store_dir, site))
    except FileNotFoundError:
        raise StoreError(
            f"another process took site {site} back while it was being repaired", remedy="stop ingest first"
        ) from None


def _repair(site_dir: Path) -> list[str]:
    directory = Fence.take(site_dir, token=None, owner="repair").directory
    move_version_1(site_dir, directory)
    done = []
    before = {path.name for path in directory.iterdir()}
    for path in sorted(directory.glob("*.seg")):
        old = _ids(directory, path.stem)
        recover(directory, path.stem)
        new = _ids(directory, path.stem)
        if new - old:
            done.append(f"{path.stem}: {len(new - old)} pairs found again")
        if old - new:
            done.append(f"{path.stem}: {len(old - new)} damaged pairs made void")
    recover_all(directory)
    done += [f"{name}: removed" for name in sorted(before - {path.name for path in directory.iterdir()})]
    return done


def _ids(directory: Path, name: str) -> set[FrameId]:
    """What a reader sees of a segment once it is sealed."""
    try:
        with contextlib.closing(SegmentReader(directory, name)) as reader:
            seal = read_seal(directory, name)
            reader.rows = reader.read_rows(0)[: seal.num_rows if seal else None]
            return {frame_id for _, frame_id in reader.ids()}
    except FileNotFoundError:
        return set()


def _site_dir(store_dir: Path, site: str) -> Path:
    site_dir = store_dir / check_site(site)
    if not site_dir.is_dir():
        raise StoreError(f"the store {store_dir} has no site {site}", remedy="look at `echosight store info`")
    return site_dir
