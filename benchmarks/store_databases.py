"""What benchmarks/store.py compares: SQLite, LMDB and RocksDB, set up for values of 64 KiB.

RocksDB checks its blocks itself; SQLite and LMDB do not, and carry an xxh3 of each payload beside it.
"""

import contextlib
import sqlite3
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import lmdb
import numpy as np
import rocksdict
from store_engines import (
    HEATMAP_SHAPE,
    PAIR_BYTES,
    RADAR_BYTES,
    Engine,
    Heatmap,
    Reader,
    frame_id,
    head_of,
    heatmap_from,
    image_from,
    key_of,
    radar_bytes,
    seq_of,
)

from services.core.store import Pair

_SLICES = 8
"""RocksDB drops about this part of the cap at a time, as our segments do."""
_BLOB_BYTES = 16 * 1024**2


class Sqlite(Engine):
    """One table in WAL mode, synchronous=FULL. Deletes ride in the transaction of the append."""

    name = "SQLite"

    def _open(self) -> None:
        self._db = sqlite3.connect(self.directory / "pairs.db", isolation_level=None)
        self._db.execute("PRAGMA page_size=65536")  # before the first table: fewer links in a blob's chain
        self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(f"PRAGMA synchronous={'FULL' if self.durable else 'OFF'}")
        self._db.execute("PRAGMA wal_autocheckpoint=512")  # 32 MiB: each page twice to disk, but not more
        self._db.execute("PRAGMA journal_size_limit=33554432")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS pairs (id INTEGER PRIMARY KEY, captured_at_ns INTEGER, seq INTEGER, "
            "head BLOB, radar BLOB, image BLOB, UNIQUE (captured_at_ns, seq))"
        )
        self._num_pairs: int = self._db.execute("SELECT count(*) FROM pairs").fetchone()[0]

    def append(self, pairs: Sequence[Pair]) -> None:
        rows = [(*pair.id, head_of(pair), radar_bytes(pair), pair.camera.image) for pair in pairs]
        self._db.execute("BEGIN IMMEDIATE")
        self._delete_oldest(self._num_over(self._num_pairs + len(pairs)))
        done = self._db.executemany(
            "INSERT OR IGNORE INTO pairs (captured_at_ns, seq, head, radar, image) VALUES (?, ?, ?, ?, ?)", rows
        )
        self._num_pairs += done.rowcount
        self._db.execute("COMMIT")

    def _delete_oldest(self, num: int) -> None:
        if num:
            first: int = self._db.execute("SELECT min(id) FROM pairs").fetchone()[0]
            self._num_pairs -= self._db.execute("DELETE FROM pairs WHERE id < ?", (first + num,)).rowcount

    def shrink(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._delete_oldest(self._num_over(self._num_pairs))
        self._db.executescript("PRAGMA incremental_vacuum")  # execute() would step it once: one page
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        self._db.close()

    @classmethod
    def read(cls, directory: Path) -> Reader:
        return _SqliteReader(directory)


class _SqliteReader(Reader):
    def __init__(self, directory: Path) -> None:
        self._db = sqlite3.connect(directory / "pairs.db", isolation_level=None)
        self._db.execute("PRAGMA query_only=ON")

    def seqs(self) -> list[int]:
        return [seq for (seq,) in self._db.execute("SELECT seq FROM pairs ORDER BY captured_at_ns, seq")]

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        yield
        self._db.execute("COMMIT")

    def radar(self, seq: int) -> Heatmap | None:
        found = self._db.execute(
            "SELECT head, radar FROM pairs WHERE captured_at_ns = ? AND seq = ?", frame_id(seq)
        ).fetchone()
        return heatmap_from(*found) if found else None

    def image(self, seq: int) -> bytes | None:
        found = self._db.execute(
            "SELECT head, image FROM pairs WHERE captured_at_ns = ? AND seq = ?", frame_id(seq)
        ).fetchone()
        return image_from(*found) if found else None

    def close(self) -> None:
        self._db.close()


class Lmdb(Engine):
    """One value a pair, keys in order; deletes ride in the transaction of the append."""

    name = "LMDB"

    def _open(self) -> None:
        size = self.max_bytes + self.max_bytes // 2 + 256 * 1024**2
        self._env = lmdb.open(str(self.directory), map_size=size, sync=self.durable, metasync=self.durable)
        self._num_pairs = self._env.stat()["entries"]

    def append(self, pairs: Sequence[Pair]) -> None:
        with self._env.begin(write=True) as turn:
            self._delete_oldest(turn, self._num_over(self._num_pairs + len(pairs)))
            for pair in pairs:
                head = head_of(pair)
                value = b"".join((len(head).to_bytes(4, "little"), head, radar_bytes(pair), pair.camera.image))
                self._num_pairs += turn.put(key_of(pair.id), value, overwrite=False)

    def _delete_oldest(self, turn: lmdb.Transaction, num: int) -> None:
        cursor = turn.cursor()
        for _ in range(num):
            cursor.first()
            cursor.delete()
        self._num_pairs -= num

    def shrink(self, max_bytes: int) -> None:
        """The file keeps its size: only a copy, made while nobody writes, would be smaller."""
        self.max_bytes = max_bytes
        with self._env.begin(write=True) as turn:
            self._delete_oldest(turn, self._num_over(self._num_pairs))

    def close(self) -> None:
        self._env.close()

    @classmethod
    def read(cls, directory: Path) -> Reader:
        return _LmdbReader(directory)


class _LmdbReader(Reader):
    def __init__(self, directory: Path) -> None:
        size = (directory / "data.mdb").stat().st_size + 2 * 1024**3
        self._env = lmdb.open(str(directory), readonly=True, map_size=size)

    def seqs(self) -> list[int]:
        with self._env.begin() as turn:
            return [seq_of(bytes(key)) for key in turn.cursor().iternext(values=False)]

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with self._env.begin(buffers=True) as self._turn:
            yield

    def _parts(self, seq: int) -> tuple[bytes, memoryview]:
        value = self._turn.get(key_of(frame_id(seq)))
        assert value is not None, f"pair {seq} is not there"
        start = 4 + int.from_bytes(value[:4], "little")
        return bytes(value[4:start]), value[start:]

    def radar(self, seq: int) -> Heatmap | None:
        head, data = self._parts(seq)
        return heatmap_from(head, data[:RADAR_BYTES])

    def image(self, seq: int) -> bytes | None:
        head, data = self._parts(seq)
        return image_from(head, bytes(data[RADAR_BYTES:]))

    def close(self) -> None:
        self._env.close()


class Rocks(Engine):
    """Synced write-ahead log, values in blob files that go whole once their keys were dropped by range."""

    name = "RocksDB"

    def _open(self) -> None:
        self._db = rocksdict.Rdict(str(self.directory / "db"), _rocks_options(self.max_bytes))
        self._write = rocksdict.WriteOptions()
        self._write.sync = self.durable
        self._kept = deque(_rocks_seqs(self._db))

    def append(self, pairs: Sequence[Pair]) -> None:
        if self._num_over(len(self._kept) + len(pairs)):
            self._drop(max(len(pairs), self.max_bytes // PAIR_BYTES // _SLICES))
        group = rocksdict.WriteBatch(raw_mode=True)
        for pair in pairs:
            key, head = key_of(pair.id), head_of(pair)
            group.put(b"h" + key, head)
            group.put(b"i" + key, pair.camera.image)
            group.put(b"r" + key, bytes(radar_bytes(pair)))
        self._db.write(group, self._write)
        self._kept.extend(pair.id.seq for pair in pairs)

    def _drop(self, num: int) -> None:
        """Forget the oldest `num` by range; compacting their keys is what lets the blob files go."""
        gone = [self._kept.popleft() for _ in range(min(num, len(self._kept)))]
        for prefix in (b"h", b"i", b"r"):
            first, end = prefix + key_of(frame_id(gone[0])), prefix + key_of(frame_id(gone[-1] + 1))
            self._db.delete_range(first, end, self._write)
        self._db.flush()
        self._db.compact_range(None, None)

    def shrink(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._drop(self._num_over(len(self._kept)))

    def close(self) -> None:
        self._db.close()

    @classmethod
    def read(cls, directory: Path) -> Reader:
        return _RocksReader(directory)


def _rocks_options(max_bytes: int) -> rocksdict.Options:
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_compression_type(rocksdict.DBCompressionType.none())
    options.set_blob_compression_type(rocksdict.DBCompressionType.none())
    options.set_enable_blob_files(True)
    options.set_min_blob_size(4096)
    slice_bytes = min(max(max_bytes // _SLICES, _BLOB_BYTES), 4 * _BLOB_BYTES)
    options.set_blob_file_size(slice_bytes)
    options.set_write_buffer_size(slice_bytes)
    options.set_max_write_buffer_number(3)
    options.set_max_background_jobs(2)
    options.set_bytes_per_sync(1024**2)
    return options


def _rocks_seqs(db: rocksdict.Rdict) -> list[int]:
    """By the heads, which lie in the tables: the iterator opens no blob."""
    heads = rocksdict.ReadOptions()
    heads.set_iterate_upper_bound(b"i")
    return [seq_of(key[1:]) for key in db.keys(from_key=b"h", read_opt=heads) if isinstance(key, bytes)]


class _RocksReader(Reader):
    """A read-only instance, opened anew to see what is new.

    A secondary instance, made to follow a writer, dies of signal 11 when it meets a blob (rocksdict 3.0.0).
    """

    def __init__(self, directory: Path) -> None:
        self._dir = directory
        self._db = self._opened()

    def _opened(self) -> rocksdict.Rdict:
        access = rocksdict.AccessType.read_only(error_if_log_file_exist=False)
        return rocksdict.Rdict(str(self._dir / "db"), _rocks_options(0), access_type=access)

    def seqs(self) -> list[int]:
        self._db.close()
        self._db = self._opened()
        return _rocks_seqs(self._db)

    def radar(self, seq: int) -> Heatmap | None:
        data = self._get(b"r", seq)
        return None if data is None else np.frombuffer(data, np.float32).reshape(HEATMAP_SHAPE)

    def image(self, seq: int) -> bytes | None:
        return self._get(b"i", seq)

    def _get(self, prefix: bytes, seq: int) -> bytes | None:
        try:
            found: bytes | None = self._db.get(prefix + key_of(frame_id(seq)))
        except Exception:  # a block whose checksum does not hold: the library has no class for it
            return None
        return found

    def close(self) -> None:
        self._db.close()
