"""Single files out of zip archives that a data set keeps beside its tables, here or on the Hugging Face Hub.

Of an archive on the Hub, its list of members is read and then the members asked for, through range requests: nothing else is
downloaded, and nothing stays on disk.
"""

import errno
import re
import stat
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from modes_cli.data.images import Unusable
from modes_cli.errors import BadData, first_line
from modes_cli.files import failing_clearly

MAX_MEMBER_BYTES = 2 << 30
MAX_RATIO = 100  # of unpacked to packed bytes; a video hardly packs at all, and zeros reach 1,030
PIECE = 1 << 20
PLAIN = re.compile(r"[\w-][\w.-]*")
ENCRYPTED = 0x1  # flag bit of a member


class Archives:
    """The members of all .zip files in one folder, by the last part of their names. What macOS adds (`__MACOSX/._name`) is
    not there. Archives stay open as long as this lives. No member's path is ever used on this machine's disk.

    Args:
        files: an fsspec file system.
        folder: the folder's path in it.
        suffix: only members whose names end so.

    Raises:
        BadData: no archives, or one that cannot be read as such.
    """

    def __init__(self, files: Any, folder: str, suffix: str) -> None:
        self._members: dict[str, list[tuple[ZipFile, ZipInfo, str]]] = {}
        paths = sorted(str(path) for path in files.glob(f"{folder}/*.zip"))
        if not paths:
            raise BadData(f"`{folder}` has no .zip archives, where its videos should be", hint="fetch the data set again")
        for path in paths:
            name = PurePosixPath(path).name
            file = files.open(path, "rb")
            weakref.finalize(self, file.close)
            try:
                archive = ZipFile(file)
            except (BadZipFile, NotImplementedError, ValueError) as error:
                raise BadData(
                    f"`{name}` in `{folder}` is not a readable zip archive: {first_line(error)}", hint="fetch it again"
                ) from error
            for member in archive.infolist():
                where = PurePosixPath(member.filename)
                if where.suffix == suffix and PLAIN.fullmatch(where.name) and "__MACOSX" not in where.parts:
                    self._members.setdefault(where.name, []).append((archive, member, name))

    def place(self, name: str) -> str:
        """The archive that holds a member, without `.zip`.

        Raises:
            Unusable: none does, or several do.
        """
        return self._find(name)[2].removesuffix(".zip")

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """One member as a nameless temporary file (in $TMPDIR) of at most MAX_MEMBER_BYTES, at its start.

        Raises:
            Unusable: no such member, damaged, encrypted, too large, or not a regular file.
            WriteFailed: no room in $TMPDIR.
        """
        archive, member, place = self._find(name)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG) or member.is_dir():
            raise Unusable(f"is not a regular file in `{place}`")
        if member.flag_bits & ENCRYPTED:
            raise Unusable(f"is encrypted in `{place}`")
        if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):  # others may ask for gigabytes to unpack a few bytes
            raise Unusable(f"is compressed in `{place}` by method {member.compress_type}; known are stored and deflated")
        if member.file_size > MAX_MEMBER_BYTES:
            raise Unusable(f"has {member.file_size} bytes, the limit is {MAX_MEMBER_BYTES}")
        if member.file_size > MAX_RATIO * member.compress_size + PIECE:
            raise Unusable(f"unfolds from {member.compress_size} to {member.file_size} bytes, as no video does")
        with tempfile.TemporaryFile() as file:
            try:
                with archive.open(member) as source:
                    while piece := source.read(PIECE):  # at most `file_size` bytes in all; its CRC-32 is checked at the end
                        with failing_clearly(Path(tempfile.gettempdir())):
                            file.write(piece)
            # Of OSError only the one for a place before the beginning: the network's failures are no fault of the member.
            except (BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
                raise Unusable(f"is damaged in `{place}`: {first_line(error)}") from error
            except OSError as error:
                if type(error) is not OSError or error.errno != errno.EINVAL:
                    raise
                raise Unusable(f"is damaged in `{place}`: it begins outside the archive") from error
            if file.tell() != member.file_size:
                raise Unusable(f"is truncated in `{place}`: {file.tell()} of {member.file_size} bytes")
            file.seek(0)
            yield file

    def _find(self, name: str) -> tuple[ZipFile, ZipInfo, str]:
        found = self._members.get(name, [])
        if len(found) == 1:
            return found[0]
        where = ", ".join(f"`{place}`" for _, _, place in found)
        raise Unusable(f"is there more than once, in {where}" if found else "is in none of the archives")


def archives_of(dataset: str, suffix: str) -> Archives:
    """Those at the root of a data set: a folder that exists, or one of the Hub, which with HF_HUB_OFFLINE=1 must have been
    downloaded in full.

    Raises:
        BadData: see Archives. Errors of the network and of a cache that lacks the data set come as they are.
    """
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped,unused-ignore]
    from huggingface_hub import HfFileSystem, constants, snapshot_download

    if Path(dataset).is_dir():
        return Archives(LocalFileSystem(), dataset, suffix)
    if constants.HF_HUB_OFFLINE:
        here = snapshot_download(dataset, repo_type="dataset", local_files_only=True)
        return Archives(LocalFileSystem(), here, suffix)
    return Archives(HfFileSystem(), f"datasets/{dataset}", suffix)
