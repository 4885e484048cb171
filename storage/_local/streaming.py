"""A draft that is written piece by piece, while the pieces come."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

from .._runtime.buffers import buffers_of
from .._runtime.shield import to_the_end
from .._storage import Buffer
from .writing import Draft

_MIB = 1024 * 1024


class Pouring:
    """Small pieces are gathered to a MiB, so that a hop is paid for a MiB; a large one is written as it is.

    Every call of aiofiles is seen to its end, also by a cancelled caller: its threads are not told of a
    cancellation, and one of them could still be opening the file that is being removed.
    """

    def __init__(self, draft: Draft, executor: Executor) -> None:
        self._draft, self._executor = draft, executor
        self._file: Any = None
        self._held: list[Buffer] = []
        self._size = 0

    async def add(self, piece: Buffer) -> None:
        """Take a piece; the buffer may be used again afterwards."""
        [view] = buffers_of(piece)
        self._size += len(view)
        if self._size < _MIB:
            self._held.append(bytes(view))
        else:
            self._held.append(view)
            await self._flush()

    async def finish(self) -> None:
        """Write what is held; then the draft is whole."""
        await self._flush()
        await to_the_end(self._file.close())

    async def discard(self) -> None:
        """Leave no draft behind; nothing may be added any more."""
        await to_the_end(self._discard())

    async def _flush(self) -> None:
        file = self._file or await to_the_end(self._open())
        held, self._held, self._size = self._held, [], 0
        await to_the_end(file.writelines(held))

    async def _open(self) -> Any:
        import aiofiles  # 6 ms, most of it the standard library's tempfile and shutil; for streams only

        self._file = await aiofiles.open(
            self._draft.path, "wb", opener=lambda path, flags: self._draft.create(), executor=self._executor
        )
        return self._file

    async def _discard(self) -> None:
        import aiofiles.os

        if self._file is not None:
            try:
                await self._file.close()
            except OSError:
                pass  # what could not be flushed is not wanted
        await aiofiles.os.wrap(self._draft.discard)(executor=self._executor)
