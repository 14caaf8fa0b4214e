"""CIFAR from tiny archives in the official format, from a tiny JPEG copy, and from files that mean harm."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import struct
import tarfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moe_lab.datasets import DatasetNotFound, available, load
from moe_lab.datasets.cifar_files import read_cifar
from moe_lab.datasets.commands import list_command
from moe_lab.datasets.download import DownloadFailed, fetch
from moe_lab.datasets.old_pickles import read_old_pickle
from moe_lab.datasets.registry import SOURCES


def opcodes(value: Any) -> bytes:
    """A value as Python 2 wrote it (protocol 2): strings of bytes, arrays under the names of an old NumPy."""
    if isinstance(value, bytes):
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcodes(key) + opcodes(item) for key, item in value.items()) + b"u"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    shape = b"(" + b"".join(map(opcodes, value.shape)) + b"t"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + opcodes(value.tobytes()) + b"tb"


def old_pickle(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


def tarred(folder: str, members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def batch(n: int, n_classes: int, key: bytes, seed: int) -> dict[bytes, Any]:
    data = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {b"data": data, key: (np.arange(n) % n_classes).tolist(), b"filenames": [b"a.png"] * n}


def members_10(n: int = 20) -> dict[str, bytes]:
    members = {f"data_batch_{i}": old_pickle(batch(n, 10, b"labels", i)) for i in range(1, 6)}
    members["test_batch"] = old_pickle(batch(n, 10, b"labels", 6))
    members["batches.meta"] = old_pickle({b"label_names": [b"class %d" % c for c in range(10)], b"num_vis": 3072})
    return members


def members_100(n: int = 400) -> dict[str, bytes]:
    members = {
        part: old_pickle(batch(size, 100, b"fine_labels", seed) | {b"coarse_labels": [0] * size})
        for seed, (part, size) in enumerate({"train": n, "test": n // 2}.items())
    }
    names = [b"class %d" % c for c in range(100)]
    return members | {"meta": old_pickle({b"fine_label_names": names, b"coarse_label_names": [b"all"]})}


FOLDER = {"cifar-10": "cifar-10-batches-py", "cifar-100": "cifar-100-python"}


def put(cache: Path, source: str, members: dict[str, bytes]) -> Path:
    """The archive in the cache, and where its members lie once they are unpacked."""
    (cache / f"{source}-python.tar.gz").write_bytes(tarred(FOLDER[source], members))
    return cache / f"{source}-python" / FOLDER[source]


def put_jpeg(cache: Path, n_train: int = 100, n_test: int = 20) -> dict[str, np.ndarray]:
    """A tiny cifar10-jpeg.npz; returns what it holds."""
    arrays = {"class_name": np.array([f"class {c}" for c in range(10)])}
    for part, n in (("train", n_train), ("test", n_test)):
        files = []
        for i in range(n):
            out = io.BytesIO()
            shade = np.full((32, 32, 3), (2 * i, 255 - 2 * i, 40 if part == "train" else 200), dtype=np.uint8)
            shade[16:] = 255 - shade[16:]  # top and bottom differ, left and right do not
            Image.fromarray(shade).save(out, "JPEG", quality=95)
            files.append(out.getvalue())
        arrays[f"{part}_bytes"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{part}_end"] = np.cumsum([len(file) for file in files])
        arrays[f"{part}_labels"] = (np.arange(n) % 10).astype(np.uint8)
    np.savez(cache / "cifar10-jpeg.npz", **arrays)
    return arrays


def test_old_pickles_are_read_as_the_trusting_way_reads_them(tmp_path: Path):
    content = batch(3, 10, b"labels", 0)
    (tmp_path / "x").write_bytes(old_pickle(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, about its old names
        trusting = pickle.loads((tmp_path / "x").read_bytes(), encoding="bytes")
    assert trusting.keys() == content.keys() and np.array_equal(trusting[b"data"], content[b"data"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_old_pickle(tmp_path / "x")
    assert np.array_equal(found["data"], content[b"data"])
    assert found["labels"] == [0, 1, 2] and found["filenames"] == [b"a.png"] * 3


def test_an_array_in_the_order_of_fortran_is_put_right(tmp_path: Path):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    plain = old_pickle({b"data": array})
    turned = plain.replace(b"\x89" + opcodes(array.tobytes()), b"\x88" + opcodes(array.T.tobytes()))
    (tmp_path / "x").write_bytes(turned)
    assert turned != plain and np.array_equal(read_old_pickle(tmp_path / "x")["data"], array)


class Runs:
    """Writes a file when it is unpickled, by whatever function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("how", ["os.system", "eval", "open"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path, how: str, protocol: int):
    mark, evil = tmp_path / "ran", tmp_path / "data_batch_1"
    call = {
        "os.system": Runs(os.system, f"echo > {mark}"),
        "eval": Runs(eval, f"open({str(mark)!r}, 'w')"),
        "open": Runs(open, str(mark), "w"),
    }[how]
    evil.write_bytes(pickle.dumps({"data": call}, protocol))
    with pytest.raises(ValueError, match=rf"{evil}.*refused, it asks for .*{how.split('.')[-1]}"):
        read_old_pickle(evil)
    assert not mark.exists()
    pickle.loads(evil.read_bytes())  # the trusting way runs it
    assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cnumpy\nload\n.",  # a function of NumPy that the format does not need
        b"\x80\x02cnumpy.core.multiarray\nfromstring\n.",
        b"\x80\x02U\x01xQ.",  # a persistent id
        b"\x80\x02\x82\x01.",  # a registered extension
        b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",  # attributes for a class
        old_pickle({b"data": np.zeros(2, np.uint8)}).replace(b"U\x02u1", b"U\x02O8"),  # an array of objects
        old_pickle({b"data": np.zeros((2, 3), np.uint8)}).replace(
            b"J\x02\0\0\0", b"J\xff\xff\xff\x7f"
        ),  # a false shape
        old_pickle({b"data": np.zeros(300, np.uint8)})[:-100],  # cut short
        b"",
        b"<html>not found</html>",
        old_pickle([1, 2]),
    ],
)
def test_whatever_else_a_pickle_holds_is_an_error_that_names_the_file(tmp_path: Path, content: bytes):
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch: (not a whole pickle of plain data|holds list)"):
        read_old_pickle(tmp_path / "test_batch")


def test_cifar_10_keeps_the_official_order_planes_and_names(cache: Path):
    put(cache, "cifar-10", members_10())
    files = read_cifar("cifar-10")
    data = np.concatenate([batch(20, 10, b"labels", i)[b"data"] for i in range(1, 6)])
    assert np.array_equal(files.train.pixels(np.arange(100)), data.reshape(100, 3, 32, 32))
    assert files.train.labels.tolist() == [*range(10)] * 10
    assert np.array_equal(files.test.pixels(np.array([3]))[0, 2, 31], batch(20, 10, b"labels", 6)[b"data"][3, -32:])
    assert (files.class_names[9], files.lossy) == ("class 9", "")


def test_both_are_data_sets_of_kind_images(cache: Path):
    for source, members, sizes in (
        ("cifar-10", members_10(), {"train": 70, "valid": 30, "test": 20}),
        ("cifar-100", members_100(), {"train": 100, "valid": 300, "test": 200}),
    ):
        assert not available(source)
        put(cache, source, members)
        assert available(source)
        data = load(source, n_valid=sizes["valid"])
        assert (data.kind, data.sizes, data.info["title"]) == ("images", sizes, source.upper())
        assert data.train["image"].shape[1:] == (3, 32, 32) and data.train["image"].dtype == torch.float32
        assert data.info["flip"] is True and len(data.info["class_names"]) == data.info["n_classes"]
        assert data.valid["label"].bincount().unique().tolist() == [3]  # one in each part
        assert torch.bincount(data.valid["label"] * 3 + data.valid["part"]).unique().tolist() == [1]
        assert data.test["label"].tolist() == (np.arange(len(data.test["label"])) % data.info["n_classes"]).tolist()


def test_long_tailed_versions_have_a_balanced_test_or_one_with_the_same_profile(cache: Path):
    put(cache, "cifar-10", members_10(100))
    data = load("cifar-10-lt", imbalance=0.1, n_valid=10)
    # 50 * 0.1^(c / 9): 50, 38.7, 30.0, 23.2, 18.0, 13.9, 10.8, 8.3, 6.5, 5
    profile = [50, 38, 29, 23, 17, 13, 10, 8, 6, 5]
    assert (data.train["label"].bincount() + data.valid["label"].bincount(minlength=10)).tolist() == profile
    assert (data.sizes["test"], data.info["title"]) == (100, "CIFAR-10-LT")
    same = load("cifar-10-lt", imbalance=0.1, n_valid=10, test="same_profile")
    assert same.test["label"].bincount().tolist() == [10, 7, 5, 4, 3, 2, 2, 1, 1, 1]
    assert same.info["title"] == "CIFAR-10-LT (long-tailed test)"
    assert torch.equal(same.train["image"], data.train["image"])
    with pytest.raises(ValueError, match="did you mean 'same_profile'"):
        load("cifar-10-lt", test="same-profile")
    with pytest.raises(ValueError, match=r"take 0\.02 or more"):
        load("cifar-10-lt")


def test_cifar_100_lt_thins_the_fine_labels(cache: Path):
    put(cache, "cifar-100", members_100(2000))
    data = load("cifar-100-lt", imbalance=0.1, n_valid=30)
    both = data.train["label"].bincount(minlength=100) + data.valid["label"].bincount(minlength=100)
    assert (both[0], both[50], both[99], data.info["title"]) == (20, 6, 2, "CIFAR-100-LT")
    assert data.sizes["test"] == 1000


def test_the_jpeg_copy_is_decoded_and_says_that_it_is_lossy(cache: Path, capsys):
    arrays = put_jpeg(cache)
    files = read_cifar("cifar-10")
    pixels = files.train.pixels(np.array([7, 90]))
    assert pixels.shape == (2, 3, 32, 32) and pixels.dtype == np.uint8
    expected = np.array([[14, 241, 40], [180, 75, 40]])
    assert np.abs(pixels[:, :, :14].astype(int) - expected[:, :, None, None]).max() <= 3  # lossy, most at the edge
    assert np.abs(pixels[:, :, 18:].astype(int) - (255 - expected)[:, :, None, None]).max() <= 3
    first = arrays["test_bytes"][: arrays["test_end"][0]].tobytes()
    assert np.array_equal(
        files.test.pixels(np.array([0]))[0].transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(first)))
    )
    assert load("cifar-10", n_valid=30).info["title"] == "CIFAR-10 (JPEG)"
    data = load("cifar-10-lt", imbalance=0.5, n_valid=9, test="same_profile")
    assert data.info["title"] == "CIFAR-10-LT (JPEG, long-tailed test)"
    assert not available("cifar-100")
    assert list_command() == 0
    assert "cifar-10-lt          here (JPEG)" in capsys.readouterr().out


def test_official_files_come_before_the_lossy_copy(cache: Path):
    put_jpeg(cache)
    put(cache, "cifar-10", members_10())
    data = load("cifar-10", n_valid=30)
    assert (data.info["title"], data.sizes["train"]) == ("CIFAR-10", 70)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """An address on loopback, and the folder that it serves."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "served").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}/", tmp_path / "served"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(("source", "members"), [("cifar-10", members_10), ("cifar-100", members_100)])
def test_from_the_download_to_the_tensors(cache: Path, server, monkeypatch, source: str, members):
    url, served = server
    name, content = f"{source}-python.tar.gz", tarred(FOLDER[source], members())
    official = SOURCES[source].files[0]
    assert official.path == name and official.is_archive
    digest = hashlib.md5(content).hexdigest()
    tiny = replace(SOURCES[source], files=(replace(official, urls=(url + name,), checksum=f"md5:{digest}"),))
    if source == "cifar-10":  # a whole JPEG copy is there; whoever fetches wants the official pixels
        put_jpeg(cache)
        digest = hashlib.sha256((cache / "cifar10-jpeg.npz").read_bytes()).hexdigest()
        tiny = replace(tiny, instead=(replace(tiny.instead[0], checksum=f"sha256:{digest}"),))
    monkeypatch.setitem(SOURCES, source, tiny)
    (served / name).write_bytes(content[:-1] + b"x")
    with pytest.raises(DownloadFailed, match="not the expected file, or cut short"):
        fetch(source, progress=False)
    assert not (cache / name).exists()
    (served / name).write_bytes(content)
    assert fetch(f"{source}-lt", progress=False) == [cache / name]
    assert (cache / f"{source}-python" / FOLDER[source]).is_dir()
    assert load(source, n_valid=10).info["title"] == source.upper()


def test_a_missing_archive_says_how_to_get_it(cache: Path):
    with pytest.raises(DatasetNotFound, match=r"cifar-10-python\.tar\.gz is missing.*moe-lab data fetch cifar-10"):
        load("cifar-10-lt")


@pytest.mark.parametrize("member", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_missing_member_is_named(cache: Path, member: str):
    members = members_10()
    del members[member]
    put(cache, "cifar-10", members)
    with pytest.raises(DatasetNotFound, match=rf"no file '{member}'.*moe-lab data fetch cifar-10"):
        load("cifar-10")


def test_a_damaged_archive_put_there_by_hand_is_named_with_what_to_do(cache: Path):
    archive = cache / "cifar-100-python.tar.gz"
    archive.write_bytes(tarred("cifar-100-python", members_100())[:-2000])
    with pytest.raises(ValueError, match=rf"{archive}: not a zip or tar.*moe-lab data fetch cifar-100"):
        load("cifar-100")
    assert [path.name for path in cache.iterdir()] == [archive.name]


HARMED = {
    "cut short": ("data_batch_2", old_pickle(batch(20, 10, b"labels", 2))[:-200], "not a whole pickle"),
    "hostile": ("test_batch", b"cos\nsystem\n(S'true'\ntR.", "refused, it asks for os.system"),
    "no data": ("data_batch_1", old_pickle({b"labels": [1]}), "no 'data' of 3072 bytes"),
    "other size": ("data_batch_1", old_pickle({b"data": np.zeros((1, 12), np.uint8), b"labels": [1]}), "no 'data'"),
    "no labels": ("data_batch_1", old_pickle({b"data": np.zeros((1, 3072), np.uint8)}), "no 'labels' with a whole"),
    "few labels": ("test_batch", old_pickle(batch(3, 10, b"labels", 0) | {b"labels": [1]}), "for each of 3 images"),
    "odd labels": ("test_batch", old_pickle(batch(1, 10, b"labels", 0) | {b"labels": [b"cat"]}), "a whole number"),
    "no names": ("batches.meta", old_pickle({b"num_vis": 3072}), "no list 'label_names'"),
}


@pytest.mark.parametrize("case", HARMED)
def test_a_harmed_member_is_named_with_what_to_do_and_mended_by_doing_it(cache: Path, case: str):
    member, content, says = HARMED[case]
    folder = put(cache, "cifar-10", members_10())
    load("cifar-10", n_valid=10)
    (folder / member).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        load("cifar-10", n_valid=10)
    message = str(caught.value)
    assert str(folder / member) in message and f"Remove {folder.parent}:" in message
    assert "moe-lab data fetch cifar-10" in message
    for path in sorted(folder.parent.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.parent.rmdir()
    load("cifar-10", n_valid=10)


def spoiled(arrays: dict[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    arrays = dict(arrays)
    if how == "no array":
        del arrays["test_end"]
    elif how == "offsets":
        arrays["train_end"] = arrays["train_end"][::-1]
    elif how == "bytes missing":
        arrays["train_bytes"] = arrays["train_bytes"][:-5]
    return arrays


@pytest.mark.parametrize("how", ["no array", "offsets", "bytes missing", "cut short", "empty", "text"])
def test_a_harmed_jpeg_copy_says_which_file_and_what_to_do(cache: Path, how: str):
    path = cache / "cifar10-jpeg.npz"
    arrays = put_jpeg(cache)
    whole = path.read_bytes()
    np.savez(path, **spoiled(arrays, how))
    if how in ("cut short", "empty", "text"):
        path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "text": b"<html>"}[how])
    with pytest.raises(ValueError, match=rf"{path}: not a whole copy.*moe-lab data fetch cifar-10"):
        load("cifar-10", n_valid=10)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_picture_that_is_no_jpeg_of_the_right_size_is_refused(cache: Path, file_format: str):
    arrays = put_jpeg(cache)
    out = io.BytesIO()
    Image.new("RGB", (32, 32) if file_format == "PNG" else (31, 32)).save(out, file_format)
    arrays["train_bytes"] = np.tile(np.frombuffer(out.getvalue(), dtype=np.uint8), 100)
    arrays["train_end"] = len(out.getvalue()) * np.arange(1, 101)
    np.savez(cache / "cifar10-jpeg.npz", **arrays)
    with pytest.raises(ValueError, match=r"image \d+ is no whole JPEG of 32 x 32"):
        load("cifar-10", n_valid=10)
