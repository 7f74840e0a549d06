"""How the text of a file is wrapped: compressed or not; a table, JSON lines, one JSON array, Parquet.

Told from its first bytes, never from its name.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from sim.outside import clip
from sim.types import ConfigError

Progress = Callable[[int, int], object]
"""Called with the bytes done so far, and the bytes there are."""
Wrapping = Literal["table", "lines", "array", "parquet"]

TELL_BYTES = 2**18  # between two calls of a Progress
LONGEST_CELL = 2**26  # Python's csv module stops at 131,072 characters: too few for a long prompt's hashes
CHUNK = 2**16
HEAD = 2**16  # characters, enough for any header
GZIP, ZSTD, BZIP2, XZ, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00", b"PAR1"
SEPARATORS = ",;\t|"
COMMENT = "#"


def open_text(path: Path, progress: Progress | None = None, newline: str | None = None) -> TextIO:
    """A text file, decompressed where it is gzip, Zstandard, bzip2 or xz, a byte-order mark ignored.

    ``progress`` is told of every ``TELL_BYTES`` read from the disk, and of the end.
    """
    raw = io.BufferedReader(_Watched(path, progress))
    text = _Text(_unpacked(raw), newline=newline, encoding="utf-8-sig")
    text.raw_file = raw
    return text


class _Text(io.TextIOWrapper):
    """Closes the file under the decompressor too."""

    raw_file: Any = None

    def close(self) -> None:
        super().close()
        if self.raw_file is not None:
            self.raw_file.close()


def _unpacked(raw: Any) -> Any:
    magic = raw.peek(6)[:6]
    if magic.startswith(GZIP):
        return gzip.GzipFile(fileobj=raw)
    if magic.startswith(BZIP2):
        import bz2

        return bz2.BZ2File(raw)
    if magic.startswith(XZ):
        import lzma

        return lzma.LZMAFile(raw)
    if magic.startswith(ZSTD):
        import pyarrow as pa

        return io.BufferedReader(cast(Any, pa.CompressedInputStream(raw, "zstd")))
    return raw


class _Watched(io.FileIO):
    """A file that tells how much of it has been read."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        super().__init__(path)
        self.progress, self.size = progress, path.stat().st_size
        self.done = self.told = 0

    def readinto(self, buffer: Any) -> int | None:
        read = super().readinto(buffer)
        if self.progress is not None:
            self.done += read or 0
            if not read or self.done >= self.told + TELL_BYTES:
                self.told = self.done
                self.progress(self.done, self.size)
        return read


def wrapping_of(path: Path) -> Wrapping:
    """What the file's text is. ConfigError for an empty file."""
    with path.open("rb") as file:
        if file.read(4) == PARQUET:
            return "parquet"
    with open_text(path) as text:
        head = text.read(HEAD).lstrip()
    if not head:
        raise ConfigError(f"{path}: the file is empty; expected a trace")
    return "lines" if head[0] == "{" else "array" if head[0] == "[" else "table"


def separator_of(header: str) -> str:
    """The separator that splits a header line into the most names, quotes respected; a comma if none does."""
    outside = "".join(header.split('"')[::2])
    return max(SEPARATORS, key=outside.count)


def skip_comments(file: TextIO) -> tuple[str, int]:
    """The first line that is neither blank nor a comment, and how many lines came before it."""
    for skipped, line in enumerate(iter(lambda: file.readline(LONGEST_CELL), "")):
        if line.strip() and not line.lstrip().startswith(COMMENT):
            return line, skipped
    return "", 0


def json_items(path: Path, file: TextIO) -> Iterator[Any]:
    """The items of one JSON array, or JSON values one after the other; memory for one item.

    ConfigError for what is no JSON, or an item of more than 64 Mi characters.
    """
    decode = json.JSONDecoder().raw_decode
    text, place, wanted, number = "", 0, CHUNK, 1
    while True:
        while place < len(text) and text[place] in "[],\n\r\t ":
            place += 1
        with suppress(ValueError, RecursionError):
            item, place = decode(text, place)
            yield item
            number, wanted = number + 1, CHUNK
            continue
        more = file.read(wanted)
        text, place, wanted = text[place:] + more, 0, wanted * 2
        if not more and text:
            raise ConfigError(f"{path}: item {number} is {clip(repr(text[:80]))}; expected JSON")
        if not more:
            return
        if len(text) > LONGEST_CELL:
            raise ConfigError(
                f"{path}: item {number} is {clip(repr(text[:80]))}; expected JSON of less than 64 Mi characters"
            )
