# SPDX-License-Identifier: MIT
"""What ``open_pool`` and ``connect`` return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, Generic, TypeVar

from kucomms.exceptions import UsageError

__all__ = ["Once"]

T = TypeVar("T")


class Once(ABC, Generic[T]):
    """To be awaited, which opens something, or entered, which closes it as well; once."""

    _begun = False
    _opened: T

    @abstractmethod
    async def _open(self) -> T:
        """Called once."""

    @abstractmethod
    async def _close(self, opened: T) -> None:
        """At the end of the block."""

    async def _open_once(self) -> T:
        if self._begun:
            raise UsageError("this was awaited or entered before; call what made it again")
        self._begun = True
        return await self._open()

    def __await__(self) -> Generator[Any, None, T]:
        """Open it; closing is left to its ``aclose()``."""
        return self._open_once().__await__()

    async def __aenter__(self) -> T:
        self._opened = await self._open_once()
        return self._opened

    async def __aexit__(self, *_: object) -> None:
        await self._close(self._opened)
