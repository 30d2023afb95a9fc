"""Text files by path or URL: kind, size and reading, on disk, web servers or object stores."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from homodistil.errors import UserError

KINDS = (".txt", ".jsonl", ".parquet", ".xml")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_BLOCK_BYTES = 8 << 20  # of a remote file per request
_IDENTITY = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created", "size")


@dataclass(frozen=True)
class TextFile:
    """One file of a source."""

    location: str
    """Path, or URL supported by fsspec (s3://, gs://, memory://, https://, ...)."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.location

    @property
    def suffix(self) -> str:
        """Kind and compression, such as .jsonl.gz."""
        kind = self.kind
        return (kind or "") + (self._last if self.compression or not kind else "")

    @property
    def _last(self) -> str:
        return os.path.splitext(self.location)[1]

    @property
    def compression(self) -> str | None:
        """Name of the compression in fsspec; None for plain text."""
        return COMPRESSIONS.get(self._last)

    @property
    def kind(self) -> str | None:
        """One of KINDS; None for other files. The names of dumps are NAME.xml.bz2 and NAME.xml-p1p41242.bz2."""
        stem = self.location.removesuffix(self._last) if self.compression else self.location
        last = os.path.splitext(stem)[1]
        if last.startswith(".xml-p"):
            last = ".xml"
        is_packed_parquet = last == ".parquet" and self.compression is not None
        return last if last in KINDS and not is_packed_parquet else None

    def num_bytes(self) -> int | None:
        """Size of the stored (compressed) file; None if a server does not report it. Raises `UserError`."""
        with self._errors():
            if not self.is_remote:
                return os.stat(self.location).st_size
            filesystem, path = _filesystem(self.location)
            return filesystem.info(path).get("size")

    def has_ranges(self) -> bool:
        """Whether ranges of the file can be requested; some web servers only send whole files."""
        if not self.location.startswith(("http://", "https://")):
            return True
        with self._errors():
            filesystem, path = _filesystem(self.location)
            return bool(filesystem.info(path).get("partial"))

    def identity(self) -> str:
        """A text that changes when the store reports a change of a remote file. Raises `UserError`."""
        with self._errors():
            filesystem, path = _filesystem(self.location)
            info = filesystem.info(path)
        return ";".join([self.location, *(f"{key}={info[key]}" for key in _IDENTITY if info.get(key) is not None)])

    @contextlib.contextmanager
    def reading(self, unpack: bool = True) -> Iterator[BinaryIO]:
        """Open the file for reading bytes; errors inside this context become a `UserError` that names the file.

        Args:
            unpack: whether to decompress.
        """
        with self._errors():
            compression = self.compression if unpack else None
            if not self.is_remote and compression is None:
                with open(self.location, "rb") as raw:
                    yield raw
                return
            import fsspec

            is_stream = not self.has_ranges()
            options = {"block_size": 0 if is_stream else _BLOCK_BYTES} if self.is_remote else {}
            with fsspec.open(self.location, "rb", compression=compression, **options) as raw:
                yield io.BufferedReader(_Forward(raw), _BLOCK_BYTES) if is_stream else raw

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise self.unreadable(error) from None
        except Exception as error:
            if _is_missing_codec(error):
                raise UserError(
                    f"data.sources: reading {self.location!r} needs a package for {self._last} files; "
                    f"pip install zstandard, or unpack the file"
                ) from None
            if not self.is_remote and type(error).__name__ != "ZstdError":
                raise
            raise self.unreadable(error) from None  # clients of stores raise exceptions of many types

    def unreadable(self, error: Exception) -> UserError:
        """The `UserError` for an `error` while the file was read."""
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        if not self.is_remote:
            is_of_system = isinstance(error, OSError) and error.errno is not None
            kind = f"whole {self.compression} file" if self.compression else "file without damage"
            remedy = "check its permissions" if is_of_system else f"give a {kind}, or remove it"
            return UserError(f"data.sources: cannot read {self.location!r} ({reason}); {remedy}")
        return UserError(
            f"data.sources: cannot read {self.location!r} ({type(error).__name__}: {reason[:300]}); check the URL, its "
            f"credentials and the connection"
        )


class _Forward(io.RawIOBase):
    """A raw stream that is only read from start to end; line reading in fsspec would seek."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        content = self._raw.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _is_missing_codec(error: Exception) -> bool:
    return isinstance(error, ValueError) and "ompression type" in str(error)


def check_regular(path: Path) -> None:
    """Raise `UserError` unless `path` is a regular file; reading a pipe or a device could take for ever.

    Links are followed; a broken or circular link is an error, too. Raises FileNotFoundError if there is nothing.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            raise
        raise UserError(
            f"data.sources: {str(path)!r} is a link to {os.readlink(path)!r}, which does not exist; remove it, or put "
            f"the file there"
        ) from None
    except OSError as error:
        raise UserError(
            f"data.sources: cannot read {str(path)!r} ({error.strerror}); remove it, or put a readable file there"
        ) from None
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _SPECIAL.items() if test(mode)), "special file")
        raise UserError(
            f"data.sources: {str(path)!r} is a {kind}, expected a regular file; write its text into one, or remove it"
        )


_SPECIAL = {
    stat.S_ISFIFO: "named pipe (FIFO)",
    stat.S_ISSOCK: "socket",
    stat.S_ISCHR: "device",
    stat.S_ISBLK: "device",
    stat.S_ISDIR: "folder",
}


def is_url(name: str) -> bool:
    """Whether an entry of `data.sources` is a URL."""
    return "://" in name


def local_path(name: str) -> str:
    """`name` without file://."""
    return name.removeprefix("file://")


def remote_files(url: str) -> list[TextFile]:
    """The file at `url`, or all files of a readable kind below it, in the order of their names. Raises `UserError`."""
    asked = TextFile(url)
    if asked.kind:
        asked.num_bytes()
        return [asked]
    with asked._errors():
        filesystem, path = _filesystem(url)
        below = sorted(filesystem.find(path))
        files = [TextFile(filesystem.unstrip_protocol(name)) for name in below]
    readable = [file for file in files if file.kind and not Path(file.location).name.startswith(".")]
    if not readable:
        raise UserError(
            f"data.sources: {url!r} is no {', '.join(KINDS)} file (also {', '.join(COMPRESSIONS)}) and holds none; "
            f"found {len(files)} other file(s)"
        )
    return readable


def _filesystem(url: str):
    import fsspec

    return fsspec.core.url_to_fs(url)
