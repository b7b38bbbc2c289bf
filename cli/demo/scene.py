"""What is built when it is entered, and taken down when it is left, whatever happens between."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self


class Scene:
    """Subclasses say in `_build` what stands; what they put on `stack` is undone in reverse, also
    when building fails half way."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._build(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _build(self, stack: ExitStack) -> None:
        raise NotImplementedError
