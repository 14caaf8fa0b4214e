"""Downloads over loopback: what arrives is checked, what goes wrong leaves nothing behind and says what to do."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from moe_lab.datasets import archives, download
from moe_lab.datasets import cache as cache_module
from moe_lab.datasets.commands import check_command, fetch_command, list_command
from moe_lab.datasets.download import DownloadFailed, check, fetch
from moe_lab.datasets.registry import SOURCES
from moe_lab.datasets.sources import RemoteFile, Source


class Server:
    """Answers with `files`; cuts a path off half-way as often as `cuts` says; remembers what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, int] = {}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                body = server.files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if server.cuts.get(self.path, 0):
                    server.cuts[self.path] -= 1
                    body = body[: len(body) // 2]
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # a proxy of the environment knows nothing of our loopback
    running = Server()
    yield running
    running.close()


def remote(path: str, content: bytes, *urls: str) -> RemoteFile:
    return RemoteFile(path, urls, "sha256:" + hashlib.sha256(content).hexdigest(), len(content))


def source_of(*files: RemoteFile, instead: tuple[RemoteFile, ...] = ()) -> Source:
    return Source("Tiny", "Nobody, 2024", "none", "http://tiny.example", files, "here", instead)


def zipped(**members: str | bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def get(file: RemoteFile, folder: Path) -> Path:
    return download.download(file, source_of(file), folder, progress=False)


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_good_archive_is_stored_and_unpacked_and_not_asked_for_again(server: Server, cache: Path):
    content = zipped(**{"tiny/u.data": "1\t2\t3\t4\n"})
    server.files["/tiny.zip"] = content
    file = remote("tiny.zip", content, server.url + "/tiny.zip")
    assert get(file, cache).read_bytes() == content
    assert (cache / "tiny/tiny/u.data").read_text() == "1\t2\t3\t4\n"
    assert everything_in(cache) == ["tiny", "tiny.zip", "tiny/tiny", "tiny/tiny/u.data"]  # no temporary file left
    get(file, cache)
    assert server.asked == ["/tiny.zip"]


def test_the_next_mirror_is_tried_after_a_404(server: Server, cache: Path):
    server.files["/second/a.mat"] = b"content"
    get(remote("svhn/a.mat", b"content", server.url + "/first/a.mat", server.url + "/second/a.mat"), cache)
    assert server.asked == ["/first/a.mat", "/second/a.mat"]  # a 404 is an answer: not asked twice
    assert (cache / "svhn/a.mat").read_bytes() == b"content"


def test_a_404_names_the_file_the_url_the_place_and_the_way_out(server: Server, cache: Path):
    file = remote("ml.zip", b"content", server.url + "/ml.zip")
    with pytest.raises(DownloadFailed) as caught:
        get(file, cache)
    message = str(caught.value)
    for part in ("ml.zip", server.url + "/ml.zip", "404", str(cache / "ml.zip"), "by hand", "http://tiny.example"):
        assert part in message
    assert everything_in(cache) == []


@pytest.mark.parametrize("wrong", [b"an error page", b"conten"])
def test_a_wrong_or_shortened_file_never_enters_the_cache(server: Server, cache: Path, wrong: bytes):
    server.files["/ml.zip"] = wrong
    with pytest.raises(DownloadFailed, match="not the expected file, or cut short"):
        get(remote("ml.zip", b"content", server.url + "/ml.zip"), cache)
    assert everything_in(cache) == []


def test_a_connection_cut_half_way_is_tried_again_from_the_start(server: Server, cache: Path):
    content = bytes(range(256)) * 2000
    server.files["/big.mat"] = content
    server.cuts["/big.mat"] = download.ATTEMPTS - 1
    assert get(remote("big.mat", content, server.url + "/big.mat"), cache).read_bytes() == content
    assert len(server.asked) == download.ATTEMPTS
    assert everything_in(cache) == ["big.mat"]


def test_a_connection_that_is_always_cut_ends_in_an_error_and_an_empty_cache(server: Server, cache: Path):
    server.files["/big.mat"] = bytes(100_000)
    server.cuts["/big.mat"] = 100
    with pytest.raises(DownloadFailed, match=r"big\.mat"):
        get(remote("big.mat", bytes(100_000), server.url + "/big.mat"), cache)
    assert len(server.asked) == download.ATTEMPTS
    assert everything_in(cache) == []


def test_a_server_that_is_not_there_is_an_error_not_a_traceback(server: Server, cache: Path):
    url = server.url + "/x.mat"
    server.close()
    with pytest.raises(DownloadFailed, match=r"could not get x\.mat"):
        get(remote("x.mat", b"content", url), cache)


def test_a_corrupt_file_in_the_cache_is_replaced_and_a_failed_replacement_leaves_it(server: Server, cache: Path):
    (cache / "a.mat").write_bytes(b"rotten")
    file = remote("a.mat", b"content", server.url + "/a.mat")
    with pytest.raises(DownloadFailed):
        get(file, cache)
    assert (cache / "a.mat").read_bytes() == b"rotten"
    server.files["/a.mat"] = b"content"
    assert get(file, cache).read_bytes() == b"content"


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "../../secret"
    return info


def zip_link() -> bytes:
    info = zipfile.ZipInfo("inside/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("first.txt", "harmless")
        archive.writestr(info, "/etc/passwd")
    return out.getvalue()


OUTSIDE = Path(tempfile.gettempdir()).resolve() / f"moe_lab-evil-{os.getpid()}.txt"
HOSTILE = {
    "zip up": ("a.zip", zipped(**{"first.txt": "harmless", "../evil.txt": "evil"})),
    "zip up inside": ("a.zip", zipped(**{"ok/../../evil.txt": "evil"})),
    "zip backslash": ("a.zip", zipped(**{"..\\evil.txt": "evil"})),
    "zip absolute": ("a.zip", zipped(**{str(OUTSIDE): "evil"})),
    "zip drive": ("a.zip", zipped(**{"C:/evil.txt": "evil"})),
    "zip link": ("a.zip", zip_link()),
    "tar up": ("a.tar.gz", tarred((tarfile.TarInfo("../evil.txt"), b"evil"))),
    "tar absolute": ("a.tar.gz", tarred((tarfile.TarInfo(str(OUTSIDE)), b"evil"))),
    "tar symbolic link": ("a.tar.gz", tarred((link("l", tarfile.SYMTYPE), b""))),
    "tar hard link": ("a.tar.gz", tarred((link("l", tarfile.LNKTYPE), b""))),
    "tar device": ("a.tar.gz", tarred((link("l", tarfile.CHRTYPE), b""))),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_writes_nothing_and_is_not_kept(server: Server, cache: Path, case: str):
    name, content = HOSTILE[case]
    server.files["/" + name] = content
    with pytest.raises(DownloadFailed, match="refused"):
        get(remote(name, content, f"{server.url}/{name}"), cache)
    assert everything_in(cache) == []
    assert everything_in(cache.parent) == ["cache"]
    assert not OUTSIDE.exists()


def test_an_archive_that_grows_beyond_the_limit_is_refused(tmp_path: Path):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10_000_000))
    with pytest.raises(archives.UnsafeArchive, match="more than 1,000,000 bytes"):
        archives.extract(bomb, tmp_path / "out", max_bytes=1_000_000)
    assert (tmp_path / "out/zeros").stat().st_size <= 1_000_000
    archives.extract(bomb, tmp_path / "fits", max_bytes=10_000_000)
    assert (tmp_path / "fits/zeros").stat().st_size == 10_000_000


@pytest.mark.parametrize("content", [b"not an archive", zipped(a="x" * 1000)[:-30]])
def test_a_damaged_archive_put_there_by_hand_is_explained(cache: Path, content: bytes):
    (cache / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match="not a zip or tar archive, or a damaged one"):
        cache_module.unpack(cache / "a.zip")
    assert everything_in(cache) == ["a.zip"]


def test_a_cache_that_cannot_be_written_to_is_explained(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("a file where the folder should be")
    server.files["/a.mat"] = b"content"
    with pytest.raises(DownloadFailed, match="cannot be written to"):
        get(remote("a.mat", b"content", server.url + "/a.mat"), tmp_path / "file")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, server: Server) -> dict[str, RemoteFile]:
    """Two of the registry's sources replaced by tiny ones that only a mirror has."""
    content = zipped(**{"ml-100k/u.data": "1\t1\t5\t0\n"})
    files = {"zip": remote("ml-100k.zip", content), "idx": remote("mnist/labels.gz", b"labels")}
    server.files |= {"/m/ml-100k.zip": content, "/m/mnist/labels.gz": b"labels"}
    monkeypatch.setitem(SOURCES, "ml-100k", source_of(files["zip"], instead=(remote("ml-100k.npz", b"compact"),)))
    monkeypatch.setitem(SOURCES, "mnist", source_of(files["idx"]))
    return files


def test_fetch_takes_a_mirror_and_the_name_of_a_data_set_or_of_a_source(server: Server, cache: Path, tiny):
    assert fetch("multimnist", mirror=server.url + "/m/", progress=False) == [cache / "mnist/labels.gz"]
    assert fetch("mnist", progress=False) == [cache / "mnist/labels.gz"]
    assert server.asked == ["/m/mnist/labels.gz"]
    assert fetch("multidigits") == []
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        fetch("mnits")


def test_an_intact_compact_file_makes_the_download_unnecessary(server: Server, cache: Path, tiny):
    (cache / "ml-100k.npz").write_bytes(b"compact")
    assert fetch("ml-100k", progress=False) == [cache / "ml-100k.npz"]
    (cache / "ml-100k.npz").write_bytes(b"compromised")
    assert fetch("ml-100k", mirror=server.url + "/m", progress=False) == [cache / "ml-100k.zip"]


def test_check_tells_ok_missing_corrupt_and_unpacked_by_hand(server: Server, cache: Path, tiny, capsys):
    def states() -> dict[str, str]:
        return {status.path.name: status.state for status in check() if status.source in ("ml-100k", "mnist")}

    assert states() == {"ml-100k.zip": "missing", "ml-100k.npz": "missing", "labels.gz": "missing"}
    assert check_command() == 0
    fetch("mnist", mirror=server.url + "/m", progress=False)
    (cache / "ml-100k").mkdir()
    assert states() == {"ml-100k.zip": "unpacked", "ml-100k.npz": "missing", "labels.gz": "ok"}
    (cache / "mnist/labels.gz").write_bytes(b"lables")
    assert states()["labels.gz"] == "corrupt"
    assert check_command() == 1
    assert "moe-lab data fetch mnist" in capsys.readouterr().err


def test_the_commands_print_what_a_user_needs(server: Server, cache: Path, tiny, capsys):
    assert list_command() == 0
    listed = capsys.readouterr().out
    assert str(cache) in listed
    assert "planted-recommender  embedded" in listed
    assert fetch_command("ml-100k", server.url + "/m") == 0
    fetched = capsys.readouterr().out
    assert "Licence: none" in fetched
    assert str(cache / "ml-100k.zip") in fetched
    assert fetch_command("multidigits") == 0
    assert fetch_command("ml-100") == 1
    server.files.clear()
    assert fetch_command("mnist", server.url) == 1
    assert "could not get mnist/labels.gz" in capsys.readouterr().err
