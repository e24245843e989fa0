"""One event a line, whoever says it."""

import json
import logging

import pytest
import structlog

from services.core.logs import configure_logs


def test_what_a_library_says_is_a_line_like_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for _ in range(2):  # the second time replaces the first
        configure_logs("api", log_format="json")
    try:
        raise ValueError("deep down")
    except ValueError:
        logging.getLogger("a.library").exception("it failed\n")
    logging.getLogger("a.library").info("too quiet")
    structlog.reset_defaults()
    (line,) = capsys.readouterr().err.splitlines()
    said = json.loads(line)
    assert (said["event"], said["level"], said["process"], said["library"]) == (
        "it failed",
        "error",
        "api",
        "a.library",
    )
    assert said["exception"][0]["exc_value"] == "deep down"
