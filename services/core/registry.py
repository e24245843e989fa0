"""Handoff 3: the model registry, in the layout that model servers share.

    models/NAME/3/manifest.json            what the model expects, is, has measured and came from
    models/NAME/3/checkpoint.safetensors   the trainer's weights: encoder, head, site clutter maps
    models/NAME/3/model.onnx               once exported and found equal to the checkpoint
    models/NAME/3/model.int8.onnx          the same with its encoder in int8, if that is as accurate
    models/NAME/3/probes.npz               some stored frames, and what the checkpoint says of them
    models/NAME/aliases.json               champion (served), candidate (newest), previous (to roll back to)
    models/NAME/history.jsonl              who moved what, when and why; the oldest of many moves go in the end

A version appears whole, by a rename. Neither torch nor onnxruntime is known here.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from services.core.errors import RegistryError
from services.core.files import sync_directory, sync_tree, write_atomically

CHECKPOINT_FILE = "checkpoint.safetensors"
MODEL_FILE = "model.onnx"
INT8_FILE = "model.int8.onnx"
PROBES_FILE = "probes.npz"
MANIFEST_FILE = "manifest.json"
Alias = Literal["champion", "candidate", "previous"]
Verdict = Literal["promote", "hold", "refuse"]
_ALIASES = TypeAdapter(dict[str, int])
_MAX_HISTORY_BYTES = 4 * 2**20
"""About a week of a version a minute. It is read whole by whoever asks for what was refused."""
_BY_THEMSELVES = ("trainer", "api")
"""Who moves aliases without a person."""


class InputContract(BaseModel):
    """What may be posted: the raw heatmap, as the sensor delivers it; preprocessing is inside the graph."""

    model_config = ConfigDict(frozen=True)

    shape: Annotated[tuple[int, ...], Field(min_length=3, max_length=3)]
    """(channel, range, azimuth)"""
    dtypes: tuple[str, ...] = ("float32", "float16", "uint8")
    unit: str = "dB"
    channels: tuple[str, ...] = ()


class Parity(BaseModel):
    """How far ONNX is from torch on real stored frames."""

    model_config = ConfigDict(frozen=True)

    num_frames: int
    batch_sizes: tuple[int, ...]
    max_abs_probability_error: float
    max_allowed: float
    num_label_changes: int
    max_abs_embedding_error: float | None = None
    max_rel_unknown_error: float | None = None
    """Of the unknown score, relative to its threshold. None: not compared, or no such output."""


class Int8(BaseModel):
    """How far the int8 graph is from the fp32 one on stored frames that did not calibrate it; why it is kept.

    label_agreement, accuracy_fp32, accuracy_int8: shares of frames; accuracy on those that a person has named.
    """

    model_config = ConfigDict(frozen=True)

    is_kept: bool
    why: str
    num_calibration_frames: int = 0
    num_frames: int = 0
    label_agreement: float | None = None
    max_abs_probability_error: float | None = None
    mean_abs_probability_error: float | None = None
    num_labelled: int = 0
    accuracy_fp32: float | None = None
    accuracy_int8: float | None = None
    calibration_s: float | None = None
    judgement_s: float | None = None


class Manifest(BaseModel):
    """The description of one version. Unknown fields of the same format version are kept out of the way."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: Literal[1] = 1
    name: str
    version: int
    created_at_s: float
    classes: tuple[str, ...]
    input: InputContract
    sites: tuple[str, ...]
    """Sites whose clutter map is in the graph, in the order of input `site`; index 0, "", is any other site."""
    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    metrics: dict[str, Any]
    lineage: dict[str, Any]
    parity: Parity | None = None
    int8: Int8 | None = None
    """None: not tried."""
    unknown_threshold: float | None = None
    """From this value of the graph's output `unknown_score` on, a frame is a stranger. None: no such output."""
    abstain_below: Annotated[float, Field(ge=0, le=1)] | None = None
    """Confidence from which on an answer is given. None: too few named frames, or an older version."""

    @property
    def verdict(self) -> Verdict:
        """What the trainer's gate said; a version from before there was a gate may be promoted."""
        found: Verdict = self.metrics.get("gate", {}).get("verdict", "promote")
        return found

    @property
    def verdict_why(self) -> str:
        return str(self.metrics.get("gate", {}).get("why", "published"))


class Registry:
    """The versions of one model."""

    def __init__(self, registry_dir: Path, name: str) -> None:
        self.name = name
        self.dir = registry_dir / name
        self._aliases_path = self.dir / "aliases.json"
        self._history_path = self.dir / "history.jsonl"

    def versions(self) -> list[int]:
        """All whole versions, oldest first."""
        try:
            return sorted(int(entry.name) for entry in os.scandir(self.dir) if entry.name.isdecimal())
        except FileNotFoundError:
            return []

    def path(self, version: int) -> Path:
        """The directory of a version. Raises RegistryError if there is none."""
        path = self.dir / str(version)
        if not path.is_dir():
            known = ", ".join(map(str, self.versions()[-5:])) or "none yet"
            raise RegistryError(f"model {self.name} has no version {version}", remedy=f"the newest are: {known}")
        return path

    def manifest(self, version: int) -> Manifest:
        """Raises RegistryError if the version is unknown, or its manifest damaged or of another format."""
        path = self.path(version) / MANIFEST_FILE
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except OSError as error:
            raise RegistryError(f"cannot read {path}: {error}", remedy="roll back to another version") from None
        except ValidationError as error:
            raise RegistryError(
                f"cannot read {path}: {_first(error)}", remedy="roll back to another version"
            ) from None

    def publish(self, describe: Callable[[int], Manifest], fill: Callable[[Path], None]) -> int:
        """Add a version and return its number; it becomes the candidate if its gate says "promote".

        fill: writes the version's files into a directory aside. describe: its manifest, given the number.
        A version that is held or refused is noted as such and leaves the candidate alone.
        """
        self.dir.mkdir(parents=True, exist_ok=True)
        with self._locked():
            version = (self.versions() or [0])[-1] + 1
            aside = self.dir / f".{version}.aside"
            shutil.rmtree(aside, ignore_errors=True)  # of a trainer that was killed here
            aside.mkdir()
            fill(aside)
            manifest = describe(version)
            (aside / MANIFEST_FILE).write_bytes(_json(manifest))
            sync_tree(aside)
            aside.rename(self.dir / str(version))
            sync_directory(self.dir)
            match manifest.verdict:
                case "promote":
                    self._move({"candidate": version}, by="trainer", why=manifest.verdict_why)
                case "hold":
                    self._note({"held": version}, by="trainer", why=manifest.verdict_why)
                case "refuse":
                    self._note({"refused": version}, by="trainer", why=manifest.verdict_why)
        return version

    def attach_model(self, version: int, model: Path, parity: Parity, *, probes: bytes = b"") -> None:
        """Put an exported graph beside its checkpoint: 1. the graph, 2. the manifest that vouches for it.

        probes: the content of PROBES_FILE. An int8 graph from an export before counts no more.
        """
        directory = self.path(version)
        if probes:
            write_atomically(directory / PROBES_FILE, probes)
        write_atomically(directory / MODEL_FILE, model.read_bytes())
        self._vouch(version, parity=parity, int8=None)

    def attach_int8(self, version: int, model: Path, int8: Int8) -> None:
        """Put the int8 graph beside the fp32 one and vouch for it; or, if it was not kept, write down why."""
        if int8.is_kept:
            write_atomically(self.path(version) / INT8_FILE, model.read_bytes())
        self._vouch(version, int8=int8)
        if not int8.is_kept:
            (self.path(version) / INT8_FILE).unlink(missing_ok=True)

    def _vouch(self, version: int, **update: Any) -> None:
        manifest = self.manifest(version).model_copy(update=update)
        write_atomically(self.path(version) / MANIFEST_FILE, _json(manifest))

    def aliases(self) -> dict[str, int]:
        """The version behind each alias. Raises RegistryError if the file is damaged."""
        try:
            return _ALIASES.validate_json(self._aliases_path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValidationError as error:
            raise RegistryError(
                f"{self._aliases_path} is damaged: {_first(error)}", remedy='write {"champion": VERSION} into it'
            ) from None

    def promote(self, version: int, *, by: str, why: str) -> None:
        """Make `version` the champion, and the one before `previous`; take back that it was refused.

        Raises RegistryError if it is unknown.
        """
        self.path(version)
        with self._locked():
            champion = self.aliases().get("champion")
            if champion == version and version not in self.refused():
                return
            moves = {"champion": version} | ({"previous": champion} if champion not in (None, version) else {})
            self._move(moves, by=by, why=why)

    def rollback(self, *, by: str, why: str) -> int:
        """Make `previous` the champion again, and return it. Raises RegistryError if there is none."""
        previous = self.aliases().get("previous")
        if previous is None:
            raise RegistryError(
                f"model {self.name} has no previous version", remedy="promote one of its versions instead"
            )
        self.promote(previous, by=by, why=why)
        return previous

    def refuse(self, version: int, *, by: str, why: str) -> None:
        """Write down that a version will not be served."""
        with self._locked():
            self._note({"refused": version}, by=by, why=why)

    def refused(self) -> dict[int, str]:
        """Versions that were refused, with the reason; a promotion after that takes the refusal back."""
        return self._said("refused")

    def held(self) -> dict[int, str]:
        """Versions that wait for a person, with the reason."""
        return self._said("held")

    def _said(self, what: str) -> dict[int, str]:
        found: dict[int, str] = {}
        for row in self.history():
            if what in row["moved"]:
                found[row["moved"][what]] = row["why"]
            elif "champion" in row["moved"]:
                found.pop(row["moved"]["champion"], None)
        return found

    def history(self) -> list[dict[str, Any]]:
        """Every move, oldest first."""
        try:
            lines = self._history_path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        rows = []
        for line in lines:
            with contextlib.suppress(orjson.JSONDecodeError):  # the torn last line of a crash
                rows.append(orjson.loads(line))
        return rows

    def prune(self, *, keep: int) -> list[int]:
        """Remove the oldest versions beyond `keep`, never one that an alias names. Return what went.

        A long history loses its oldest moves with them; those of people, and of versions that are here, stay.
        """
        named = set(self.aliases().values())
        gone = [version for version in self.versions()[:-keep] if version not in named]
        for version in gone:
            aside = self.dir / f".{version}.gone"
            (self.dir / str(version)).rename(aside)
            shutil.rmtree(aside)
        self._shorten_history()
        return gone

    def _shorten_history(self) -> None:
        if not self._history_path.exists() or self._history_path.stat().st_size <= _MAX_HISTORY_BYTES:
            return
        with self._locked():
            rows, here = self.history(), set(self.versions())
            half = len(rows) // 2
            stay = [
                row for row in rows[:half] if row["by"] not in _BY_THEMSELVES or here & {*row["moved"].values()}
            ]
            lines = (orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in (*stay, *rows[half:]))
            write_atomically(self._history_path, b"".join(lines))

    def _move(self, moves: dict[str, int], *, by: str, why: str) -> None:
        write_atomically(self._aliases_path, orjson.dumps(self.aliases() | moves))
        self._note(moves, by=by, why=why)

    def _note(self, moved: dict[str, int], *, by: str, why: str) -> None:
        row = {"at_s": round(time.time(), 3), "moved": moved, "by": by, "why": why}
        with self._history_path.open("a+b") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")  # close the torn line of a crash first
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.dir.mkdir(parents=True, exist_ok=True)
        with (self.dir / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _first(error: ValidationError) -> str:
    """What is wrong, in one line, and where."""
    found = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in found["loc"])
    return f"{where} is {found['input']!r:.80}: {found['msg']}" if where else found["msg"]


def _json(manifest: Manifest) -> bytes:
    return orjson.dumps(manifest.model_dump(mode="json"), option=orjson.OPT_INDENT_2)
