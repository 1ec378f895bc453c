"""A file on a server as a file to read and seek in, of which only what is read is fetched."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from clipmill.errors import DecodeError

_BLOCK_BYTES = 1 << 18  # 10 s of what YouTube serves
_LARGEST_BYTES = 1 << 20  # a block grows while it is read on and on, as it is of uncompressed sound
_PIECE_BYTES = 1 << 16


class RemoteFile:
    """Reads a file on a server in blocks, by Range; where the server knows no Range, it is fetched whole.

    `error` is the first thing that went wrong: a codec that reads from here may take it for the end of the file.
    """

    def __init__(self, get: Callable[[dict[str, str]], Any], spool: Path) -> None:
        """`get` asks the server with more headers, and returns a response of yt-dlp's; `spool` may be written to."""
        self.error: Exception | None = None
        self._get = get
        self._spool = spool
        self._whole: IO[bytes] | None = None
        self._blocks: dict[int, bytes] = {}  # where it begins -> bytes
        self._size: int | None = None
        self._at = 0

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._whole:
            self._whole.close()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where it is read next, in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere else; only the end of the file may need a request."""
        if whence == io.SEEK_END and self._size is None:
            self._guarded(0)
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, maybe fewer; none at the end.

        Raises:
            yt_dlp.utils.YoutubeDLError: the server refuses, or the connection fails.
            DecodeError: what it serves has no bytes, or is a web page.
            OSError: `spool` cannot be written.
        """
        data = self._guarded(self._at)
        data = data if size < 0 else data[:size]
        self._at += len(data)
        return data

    def _guarded(self, at: int) -> bytes:
        if self.error:
            raise self.error
        try:
            return self._from(at)
        except Exception as error:
            self.error = error
            raise

    def _from(self, at: int) -> bytes:
        """Bytes from there on; none past the end."""
        for begins, block in self._blocks.items():
            if begins <= at < begins + len(block):
                return block[at - begins :]
        if self._whole is None and (self._size is None or at < self._size):
            self._ask(at)
            return self._from(at)
        if self._whole is None:
            return b""
        self._whole.seek(at)
        return self._whole.read(_PIECE_BYTES)

    def _ask(self, at: int) -> None:
        from yt_dlp.networking.exceptions import HTTPError

        before = next((block for begins, block in self._blocks.items() if begins + len(block) == at), b"")
        length = min(max(2 * len(before), _BLOCK_BYTES), _LARGEST_BYTES)
        try:
            response = self._get({"Range": f"bytes={at}-{at + length - 1}", "Accept-Encoding": "identity"})
        except HTTPError as error:
            if error.status != 416:
                raise
            self._end_at(at)  # there is nothing from there on
            return
        try:
            self._take(response, at)
        finally:
            response.close()

    def _end_at(self, size: int) -> None:
        if not size:
            raise DecodeError("empty", "the server sent no bytes")
        self._size = size

    def _take(self, response: Any, at: int) -> None:
        from yt_dlp.networking.exceptions import IncompleteRead, TransportError

        if response.status == 206:
            stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if stated is None or int(stated[1]) != at:
                raise TransportError(
                    f"asked for the bytes from {at}, the server sent {response.headers.get('Content-Range')!r}"
                )
            expected: int | None = int(stated[2]) - at + 1
            self._size = None if stated[3] == "*" else int(stated[3])
            data = self._blocks[at] = b"".join(iter(lambda: response.read(_PIECE_BYTES), b""))
            head, arrived = data[:512], len(data)
        else:
            length = response.headers.get("Content-Length")
            expected = int(length) if length else None
            self._whole = open(self._spool, "w+b")  # noqa: SIM115
            while piece := response.read(_PIECE_BYTES):
                self._whole.write(piece)
            arrived = self._size = self._whole.tell()
            self._whole.seek(0)
            head = self._whole.read(512)
        if expected is not None and arrived < expected:
            raise IncompleteRead(arrived, expected - arrived)
        if not arrived:
            self._end_at(at)
        if at == 0 and re.match(rb"\s*<(!doctype html|html)", head, re.IGNORECASE):
            raise DecodeError("no-audio", "the server sent a web page, not media")
