"""Lines of key=value."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunnel.path.network import Address
from tunnel.shell import log
from tunnel.shell.log import Log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger("martlet")
    handlers, level, propagate = root.handlers[:], root.level, root.propagate
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, root.propagate = handlers, propagate
    root.setLevel(level)


def written(level: str = "info") -> tuple[Log, io.StringIO]:
    stream = io.StringIO()
    log.setup(level, stream)
    return Log("test"), stream


def test_fields_are_key_value_and_quoted_only_where_needed() -> None:
    logger, stream = written()
    logger.info(
        "peer up", peer="office", path=Address("192.0.2.1", 1), why="a b", empty="", rtt=0.25
    )
    line = stream.getvalue()
    expected = 'info    peer up peer=office path=192.0.2.1:1 why="a b" empty="" rtt=0.25\n'
    assert line.split(" ", 1)[1] == expected
    assert line[2] == line[5] == ":"  # the time


def test_fields_that_are_none_are_left_out() -> None:
    logger, stream = written()
    logger.warning("x", peer=None)
    assert stream.getvalue().endswith("warning x\n")


def test_a_value_cannot_forge_a_line() -> None:
    logger, stream = written()
    logger.info("refused", reason='bad\nerror  up peer="x"')
    assert stream.getvalue().count("\n") == 1
    assert r'reason="bad\nerror  up peer=\"x\""' in stream.getvalue()


def test_levels() -> None:
    logger, stream = written("warning")
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    assert stream.getvalue().split()[-1] == "c"
    with pytest.raises(ValueError, match="unknown log level"):
        log.setup("loud")


def test_errors_carry_their_traceback() -> None:
    logger, stream = written()
    try:
        raise ValueError("inner")
    except ValueError as error:
        logger.error("internal error", exc_info=error, count=1)
    assert "internal error count=1\nTraceback" in stream.getvalue()
    assert "ValueError: inner" in stream.getvalue()


def test_no_time_where_journald_adds_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    log.setup()
    Log("test").info("up")
    assert capsys.readouterr().err == "info    up\n"


def test_to_a_file_and_setup_again_replaces(tmp_path: Path) -> None:
    stream = io.StringIO()
    log.setup("info", stream)
    log.setup("info", file=tmp_path / "mt0.log")
    Log("test").info("up")
    assert stream.getvalue() == ""
    assert "info    up" in (tmp_path / "mt0.log").read_text()
