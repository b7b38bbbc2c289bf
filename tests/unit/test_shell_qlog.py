"""Traces are there when asked for, and only then."""

import json
import stat
from pathlib import Path

import pytest

from tunnel.errors import LocalError
from tunnel.shell.qlog import open_keylog, open_qlog


def test_nothing_unless_asked_for() -> None:
    assert open_qlog({}) is None
    assert open_keylog({"SSLKEYLOGFILE": ""}) is None


def test_the_key_log_is_private_appended_to_and_flushed_by_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for line in ("CLIENT_RANDOM a b\n", "CLIENT_RANDOM c d\n"):
        stream = open_keylog({"SSLKEYLOGFILE": str(file)})
        assert stream is not None
        stream.write(line)
        assert file.read_text().endswith(line)
        stream.close()
    assert file.read_text().count("\n") == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_places_that_are_not_there_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "a" / "b")
    with pytest.raises(LocalError, match=f"SSLKEYLOGFILE={missing} cannot be opened: No such"):
        open_keylog({"SSLKEYLOGFILE": missing})
    with pytest.raises(LocalError, match=f"QLOGDIR={missing} is not a writable directory"):
        open_qlog({"QLOGDIR": missing})


def test_qlog_is_written_as_it_happens(tmp_path: Path) -> None:
    logger = open_qlog({"QLOGDIR": str(tmp_path)})
    assert logger is not None
    trace = logger.start_trace(is_client=True, odcid=b"\xab\xcd")
    trace.log_event(category="transport", event="packet_sent", data={"raw": 1})
    (file,) = tmp_path.iterdir()
    assert file.name == "abcd-client.sqlog"
    text = file.read_text()
    assert text.startswith("\x1e")
    head, event = (json.loads(part) for part in text.split("\x1e")[1:])
    assert head["qlog_format"] == "JSON-SEQ"
    assert head["trace"]["common_fields"] == {"ODCID": "abcd"}
    assert head["trace"]["vantage_point"]["type"] == "client"
    assert event["name"] == "transport:packet_sent"
    assert event["data"] == {"raw": 1}
    assert not trace._events  # a connection may last for weeks
    logger.end_trace(trace)
    trace.log_event(category="transport", event="packet_sent", data={})  # after the end: ignored
    assert file.read_text() == text
