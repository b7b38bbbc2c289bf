"""Runs whose directory is kept where they failed."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from cli.demo.scene import Scene


class KeptScene(Scene):
    """A scene with a directory, which goes with it unless `failed` is set: by an error, or by
    whoever looks at what came of it."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.failed = False

    def __enter__(self) -> Self:
        (self.directory / "qlog").mkdir(parents=True)
        with ExitStack() as stack:
            stack.callback(self._clean)
            self.failed = True  # until everything stands
            self._build(stack)
            self.failed = False
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            self.failed = True
            error.add_note(f"what happened is in {self.directory}")
        super().__exit__(kind, error, trace)

    def _clean(self) -> None:
        if not self.failed:
            shutil.rmtree(self.directory, ignore_errors=True)
