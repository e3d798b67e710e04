"""Members of zip archives: found by name alone, read without the rest of the archive, refused when they are not plain files."""

import json
import re
import stat
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem

from modes_cli.data import archives
from modes_cli.data.archives import Archives, archives_of
from modes_cli.data.images import Unusable
from modes_cli.errors import BadData, WriteFailed

FILM = bytes(range(256)) * 40


def pack(path: Path, members: dict[str, bytes], *, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def read(folder: Path, name: str) -> bytes:
    with archives_of(str(folder), ".mp4").open(name) as file:
        return file.read()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_by_the_last_part_of_its_name(tmp_path: Path, method: int) -> None:
    pack(tmp_path / "Art.zip", {"Art/a_1.mp4": FILM, "__MACOSX/Art/._a_1.mp4": b"x", "Art/a_1.txt": b"y"}, method=method)
    pack(tmp_path / "Science.zip", {"b_2.mp4": FILM[::-1]}, method=method)
    found = archives_of(str(tmp_path), ".mp4")
    assert (found.place("a_1.mp4"), found.place("b_2.mp4")) == ("Art", "Science")
    assert (read(tmp_path, "a_1.mp4"), read(tmp_path, "b_2.mp4")) == (FILM, FILM[::-1])
    for name in ("._a_1.mp4", "a_1.txt", "Art/a_1.mp4", "c.mp4", "../Art.zip", ""):
        with pytest.raises(Unusable, match="is in none of the archives"):
            found.place(name)


class Counting(LocalFileSystem):  # type: ignore[misc]
    """Counts the bytes that are read, as a server would."""

    cachable = False
    read_bytes = 0

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        outer, file = self, Path(path).open(mode, buffering=0)  # noqa: SIM115 - whoever opens it closes it
        plain = file.read

        class Counted:
            def read(self, size: int = -1) -> bytes:
                data = plain(size)
                outer.read_bytes += len(data)
                return bytes(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Counted()


def test_only_the_list_of_members_and_the_wanted_member_are_read(tmp_path: Path) -> None:
    pack(tmp_path / "Art.zip", {f"a_{i}.mp4": FILM * 50 for i in range(20)})
    files = Counting()
    found = Archives(files, str(tmp_path), ".mp4")
    assert files.read_bytes < 100_000  # the end of the archive of 10 MB
    with found.open("a_7.mp4") as file:
        assert len(file.read()) == len(FILM) * 50
    assert files.read_bytes < 100_000 + 1.1 * len(FILM) * 50


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as finding and reading one file of a data set takes."""

    data = b""
    sent = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if "/resolve/" in self.path:
            first, last = map(int, span.groups()) if span else (0, len(self.data) - 1)
            self.answer(self.data[first : last + 1], 206 if span else 200)
            type(self).sent += last + 1 - first
        elif "/tree/" in self.path:
            self.answer([{"type": "file", "path": "Art.zip", "size": len(self.data), "oid": "a" * 40}])
        else:
            self.answer({"id": "owner/name", "sha": "b" * 40, "private": False, "siblings": [{"rfilename": "Art.zip"}]})

    def answer(self, said: Any, status: int = 200) -> None:
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_range_requests_to_the_hub_fetch_only_what_is_read(tmp_path: Path) -> None:
    rng = Random(0)
    films = {f"Art/a_{i}.mp4": rng.randbytes(1 << 20) for i in range(16)}
    pack(tmp_path / "Art.zip", films)
    served = type("Served", (Hub,), {"data": (tmp_path / "Art.zip").read_bytes()})
    with ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            files = HfFileSystem(endpoint=f"http://127.0.0.1:{server.server_port}", token=False, skip_instance_cache=True)
            found = Archives(files, "datasets/owner/name", ".mp4")
            assert served.sent < 10_000
            with found.open("a_8.mp4") as file:
                assert file.read() == films["Art/a_8.mp4"]
            assert served.sent < 7 << 20  # huggingface_hub reads 5 MB at a time
        finally:
            server.shutdown()


def test_members_that_are_no_plain_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "Art.zip", "w") as archive:
        link = zipfile.ZipInfo("link.mp4")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("../../up.mp4", FILM)
        archive.writestr("/etc/root.mp4", FILM)
        archive.writestr("twice.mp4", FILM)
    pack(tmp_path / "Business.zip", {"b/twice.mp4": FILM})
    with pytest.raises(Unusable, match=r"is not a regular file in `Art.zip`"):
        read(tmp_path, "link.mp4")
    with pytest.raises(Unusable, match=r"more than once, in `Art.zip`, `Business.zip`"):
        read(tmp_path, "twice.mp4")
    before = sorted(tmp_path.rglob("*"))
    assert read(tmp_path, "up.mp4") == read(tmp_path, "root.mp4") == FILM  # where it says it lies is never used
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/etc/root.mp4").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_members(tmp_path: Path, method: int) -> None:
    path = tmp_path / "Art.zip"
    pack(path, {"a.mp4": FILM, "b.mp4": FILM}, method=method)
    whole = path.read_bytes()
    middle = len(whole) // 4
    path.write_bytes(whole[:middle] + bytes(byte ^ 0x55 for byte in whole[middle : middle + 20]) + whole[middle + 20 :])
    with pytest.raises(Unusable, match=r"is damaged in `Art.zip`"):
        read(tmp_path, "a.mp4")
    assert read(tmp_path, "b.mp4") == FILM
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("a.mp4").header_offset
    path.write_bytes(whole[: at + 8] + b"\x63\x00" + whole[at + 10 :])  # another name for the method in its own header
    central = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[: central + 8] + b"\x01\x00" + whole[central + 10 :])
    with pytest.raises(Unusable, match=r"is encrypted in `Art.zip`"):
        read(tmp_path, "a.mp4")
    path.write_bytes(whole[: central + 10] + b"\x63\x00" + whole[central + 12 :])
    with pytest.raises(Unusable, match=r"is compressed in `Art.zip` by method 99"):
        read(tmp_path, "a.mp4")


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path / "Art.zip", {"bomb.mp4": bytes(1 << 20)}, method=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", (1 << 20) - 1)
    with pytest.raises(Unusable, match="has 1048576 bytes, the limit is 1048575"):
        read(tmp_path, "bomb.mp4")


def test_a_member_that_is_longer_than_it_says_ends_where_it_says(tmp_path: Path) -> None:
    path = tmp_path / "Art.zip"
    pack(path, {"bomb.mp4": bytes(1 << 20)}, method=zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    central = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[: central + 24] + (1000).to_bytes(4, "little") + whole[central + 28 :])
    with pytest.raises(Unusable, match="is damaged"):
        read(tmp_path, "bomb.mp4")


def test_folders_without_archives_and_archives_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"has no \.zip archives"):
        archives_of(str(tmp_path), ".mp4")
    (tmp_path / "Art.zip").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(BadData, match=r"`Art.zip` in .* is not a readable zip archive"):
        archives_of(str(tmp_path), ".mp4")


def test_no_room_for_a_member_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path / "Art.zip", {"a.mp4": FILM})
    found = archives_of(str(tmp_path), ".mp4")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: Path("/dev/full").open("wb", buffering=0))  # noqa: SIM115
    with pytest.raises(WriteFailed, match="No space left"), found.open("a.mp4"):
        pass
