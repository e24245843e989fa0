"""The file of API keys: what is kept of a key, how one is found, and what is no such file."""

from pathlib import Path

import pytest

from services.core.errors import SettingsError
from services.core.keys import MAX_FILE_BYTES, KeyFile, Keys, changed_at, digest, read_keys, write_keys


def test_a_key_is_found_by_its_text_alone_and_the_file_does_not_have_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    file, north = KeyFile().added("north", ("predict", "label"), requests_per_s=5.0)
    file, ops = file.added("ops", ("admin",), requests_per_s=None)
    write_keys(path, file)
    keys = Keys(read_keys(path))
    found = keys.find(north.encode())
    assert found is not None
    assert (found.name, found.scopes, found.requests_per_s) == ("north", ("predict", "label"), 5.0)
    assert found in keys
    assert path.stat().st_mode & 0o777 == 0o600
    for key in (north, ops):
        assert key.split("_", 2)[2] not in path.read_text()
    mixed = north[:16] + ops[16:]
    for wrong in (b"", b"es_", mixed.encode(), north[:-1].encode(), digest(north.encode()), found.sha256.encode()):
        assert keys.find(wrong) is None


def test_no_two_keys_are_alike() -> None:
    file, texts = KeyFile(), set()
    for number in range(50):
        file, text = file.added(f"key-{number}", ("predict",), requests_per_s=None)
        texts.add(text)
    assert len({text.split("_", 2)[2] for text in texts}) == 50
    assert all(len(text) >= 56 for text in texts)


def test_admin_may_do_everything_and_the_others_their_own() -> None:
    file, _ = KeyFile().added("ops", ("admin",), requests_per_s=None)
    file, _ = file.added("north", ("label",), requests_per_s=None)
    ops, north = file.keys
    assert all(ops.allows(scope) for scope in ("predict", "label", "admin"))
    assert [north.allows(scope) for scope in ("predict", "label", "admin")] == [False, True, False]


def test_a_name_is_had_once_and_removed_by_itself() -> None:
    file, _ = KeyFile().added("north", ("predict",), requests_per_s=None)
    with pytest.raises(SettingsError, match="already"):
        file.added("north", ("label",), requests_per_s=None)
    with pytest.raises(SettingsError, match="there are: north"):
        file.removed("south")
    assert file.removed("north").keys == ()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 2, "keys": []}',
        '{"version": 1, "keys": [], "more": 1}',
        '{"version": 1, "keys": [{"id": "0123456789ab", "name": "a", "sha256": "00", "scopes": ["predict"],'
        ' "created_at_s": 1}]}',
        "x" * (MAX_FILE_BYTES + 1),
    ],
)
def test_what_is_no_file_of_keys_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"keys\.json"):
        read_keys(path)


def test_two_keys_of_one_name_or_id_are_refused(tmp_path: Path) -> None:
    file, _ = KeyFile().added("north", ("predict",), requests_per_s=None)
    [key] = file.keys
    for twin in (key.model_copy(update={"name": "south"}), key.model_copy(update={"id": "0" * 12})):
        write_keys(tmp_path / "keys.json", KeyFile.model_construct(version=1, keys=(key, twin)))
        with pytest.raises(SettingsError, match="two keys have one"):
            read_keys(tmp_path / "keys.json")


def test_a_change_is_seen_through_a_link_and_an_end_too(tmp_path: Path) -> None:
    """As orchestrators swap mounted secrets."""
    link, file = tmp_path / "keys.json", KeyFile()
    assert changed_at(link) is None
    seen = set()
    for name in ("one", "two"):
        write_keys(tmp_path / name, file)
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        seen.add(changed_at(link))
    assert len(seen) == 2
