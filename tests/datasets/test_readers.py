"""Loaders read the official formats: tiny archives of the same format, written here by hand."""

from __future__ import annotations

import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from moe_lab.datasets import DatasetNotFound, available, load
from moe_lab.datasets.books import frequent
from moe_lab.datasets.mnist import read_idx, read_images
from moe_lab.datasets.svhn import read_colour_svhn, read_svhn

RATED = [(1, 1, 5), (1, 2, 3), (2, 2, 1), (3, 3, 4), (2, 3, 2)]  # user, item, rating; item 4 has no rating


def write_zip(path: Path, **members: str | bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def rows(data) -> list[tuple]:
    """Every rated row of all splits as (user, item, rating)."""
    columns = [torch.cat([split[key] for split in data.splits.values()]) for key in ("user", "item", "rating")]
    rated = torch.cat([split["has_rating"] for split in data.splits.values()])
    return sorted(zip(*(column[rated].tolist() for column in columns), strict=True))


@pytest.mark.parametrize(
    ("name", "member", "line", "shape"),
    [
        ("ml-100k", "ml-100k/u.data", "{}\t{}\t{}\t881250949\n", (943, 1682)),
        ("ml-1m", "ml-1m/ratings.dat", "{}::{}::{}::978300760\n", (6040, 3952)),
    ],
)
def test_movielens_archives(cache: Path, name: str, member: str, line: str, shape: tuple[int, int]):
    write_zip(cache / f"{name}.zip", **{member: "".join(line.format(*row) for row in RATED), f"{name}/README": "x"})
    data = load(name)
    assert rows(data) == sorted((user - 1, item - 1, float(rating)) for user, item, rating in RATED)
    assert (data.info["n_users"], data.info["n_items"]) == shape
    assert data.info["rating_range"] == (1, 5)
    # negatives: users 1 and 2 rated two of three items, so one negative each; user 3 rated one and gets one
    assert sum(data.sizes.values()) == 5 + 3
    (cache / f"{name}.zip").unlink()  # the unpacked folder is enough from now on
    assert rows(load(name)) == rows(data)


def test_compact_movielens_gives_the_same_rows_as_the_archive(cache: Path):
    write_zip(cache / "ml-100k.zip", **{"ml-100k/u.data": "".join("{}\t{}\t{}\t0\n".format(*row) for row in RATED)})
    official = load("ml-100k", seed=1)
    user, item, rating = (np.array(column) for column in zip(*RATED, strict=True))
    np.savez(cache / "ml-100k.npz", user=user, item=item, rating=rating.astype(np.float32))
    compact = load("ml-100k", seed=1)
    for split, arrays in official.splits.items():
        assert all(torch.equal(array, compact.splits[split][key]) for key, array in arrays.items())


def test_ids_beyond_the_vocabulary_are_refused(cache: Path):
    write_zip(cache / "ml-100k.zip", **{"u.data": "944\t1\t3\t0\n"})
    with pytest.raises(ValueError, match="ids up to 944 x 1, expected at most 943 x 1682"):
        load("ml-100k")


def test_an_archive_without_the_expected_file_is_explained(cache: Path):
    write_zip(cache / "ml-1m.zip", readme="nothing else")
    with pytest.raises(DatasetNotFound, match=r"no file 'ratings\.dat'"):
        load("ml-1m")


def biff(matrix: list[list[float]]) -> bytes:
    """An Excel sheet (BIFF 2: begin, a record per number, end), the oldest dialect of the format."""
    records = [struct.pack("<HHHH", 0x0009, 4, 2, 0x10)]
    for row, cells in enumerate(matrix):
        for column, value in enumerate(cells):
            records.append(struct.pack("<HHHH3xd", 0x0003, 15, row, column, value))
    return b"".join(records) + struct.pack("<HH", 0x000A, 0)


def test_jester_sheets_one_below_the_other_with_a_rating_of_zero(cache: Path):
    sheets = [
        [[2, 99, 0.0, -9.95], [1, 99, 99, 10.0]],
        [[3, 1.5, 2.25, -3.0]],
        [[0, 99, 99, 99]],
    ]
    for part, sheet in enumerate(sheets, start=1):
        write_zip(cache / f"jester_dataset_1_{part}.zip", **{f"jester-data-{part}.xls": biff(sheet)})
    data = load("jester")
    assert (data.info["n_users"], data.info["n_items"]) == (4, 3)
    found = [(user, item, round(rating, 2)) for user, item, rating in rows(data)]
    assert found == [(0, 1, 0.0), (0, 2, -9.95), (1, 2, 10.0), (2, 0, 1.5), (2, 1, 2.25), (2, 2, -3.0)]
    assert sum(data.sizes.values()) == 12  # all pairs; the unrated ones are the negatives
    assert (cache / "jester_dataset_1.npz").is_file()
    for sheet in cache.rglob("*.xls"):
        sheet.unlink()  # the parsed matrix is read from now on
    assert rows(load("jester")) == rows(data)


def test_a_sheet_that_is_not_jester_is_refused(cache: Path):
    for part in (1, 2, 3):
        write_zip(cache / f"jester_dataset_1_{part}.zip", **{f"jester-data-{part}.xls": biff([[1, 47.0]])})
    with pytest.raises(ValueError, match=r"outside \[-10, 10\]"):
        load("jester")


def test_book_crossing_keeps_frequent_users_and_books_and_takes_implicit_records_as_negatives(cache: Path):
    lines = ['"User-ID";"ISBN";"Book-Rating"']
    for user in range(5):
        for book in range(5):
            lines.append(f'"{276000 + user}";"034545104{book}";"{(user + book) % 11}"')
    lines.append('"276999";"0345451040";"7"')  # a user with one record
    lines.append('"276000";"rare \xe9dition";"7"')  # a book with one record
    text = "\r\n".join(lines) + "\r\n"
    write_zip(cache / "BX-CSV-Dump.zip", **{"BX-Book-Ratings.csv": text.encode("latin-1"), "BX-Users.csv": "x"})
    data = load("books")
    assert (data.info["n_users"], data.info["n_items"], data.info["rating_range"]) == (5, 5, (1, 10))
    assert sum(data.sizes.values()) == 25
    expected = sorted((u, b, float((u + b) % 11)) for u in range(5) for b in range(5) if (u + b) % 11)
    assert rows(data) == expected
    with pytest.raises(ValueError, match="min_records=50"):
        load("books", min_records=50)


def test_repeating_the_filter_leaves_only_users_and_books_that_still_have_enough():
    # user 2 has 2 records, one of them of a rare book: a second pass removes user 2
    user, item = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 0, 2])
    assert frequent(user, item, 2, repeat=False).tolist() == [0, 1, 2, 3, 4]
    assert frequent(user, item, 2, repeat=True).tolist() == [0, 1, 2, 3]


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def write_mnist(folder: Path, n_train: int = 60, n_test: int = 20) -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", n_train), ("t10k", n_test)):
        arrays[f"{part}-images-idx3"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1"] = (np.arange(n) % 10).astype(np.uint8)
    for name, array in arrays.items():
        (folder / f"{name}-ubyte.gz").write_bytes(idx(array))
    return arrays


@pytest.mark.parametrize(("name", "source"), [("multimnist", "mnist"), ("multifashion", "fashion-mnist")])
def test_idx_files_become_pairs(cache: Path, name: str, source: str):
    arrays = write_mnist(cache / source)
    (images, labels), _ = read_images(source)
    assert np.array_equal(images, arrays["train-images-idx3"])
    assert np.array_equal(labels, arrays["train-labels-idx1"])
    data = load(name)
    assert data.sizes == {"train": 100, "valid": 20, "test": 40}
    assert data.train["image"].shape[1:] == (1, 36, 36)
    known = {image[:8].tobytes() for image in arrays["t10k-images-idx3"].astype(np.int16)}
    assert all(image[0, :8, :28].numpy().tobytes() in known for image in data.test["image"])  # top left, unmixed


def test_compact_mnist_gives_the_same_images(cache: Path):
    arrays = write_mnist(cache / "mnist")
    official = load("multimnist", n_train=10)
    np.savez(
        cache / "mnist.npz",
        train_images=arrays["train-images-idx3"],
        train_labels=arrays["train-labels-idx1"],
        test_images=arrays["t10k-images-idx3"],
        test_labels=arrays["t10k-labels-idx1"],
    )
    assert torch.equal(load("multimnist", n_train=10).train["image"], official.train["image"])


def test_damaged_idx_files_are_explained(tmp_path: Path):
    good = idx(np.zeros((3, 4), dtype=np.uint8))
    for content, says in [
        (good[:-6], "not a whole gzip file"),
        (b"plain", "not a whole gzip file"),
        (gzip.compress(b"\0\0\x0b\1" + bytes(4)), "not an idx file"),
        (gzip.compress(gzip.decompress(good)[:-1]), r"shape \(3, 4\) but holds 11 values"),
    ]:
        (tmp_path / "x.gz").write_bytes(content)
        with pytest.raises(ValueError, match=says):
            read_idx(tmp_path / "x.gz")


def write_svhn(folder: Path, n: dict[str, int]) -> None:
    folder.mkdir()
    for part, size in n.items():
        colour = np.zeros((32, 32, 3, size), dtype=np.uint8)
        colour[:, :, 0], colour[:, :, 1], colour[:, :, 2] = 200, 100, 50
        savemat(folder / f"{part}_32x32.mat", {"X": colour, "y": (1 + np.arange(size) % 10)[:, None].astype(np.uint8)})


def test_svhn_becomes_grey_and_its_class_10_the_digit_0(cache: Path):
    write_svhn(cache / "svhn", {"train": 20})
    images, labels = read_svhn(cache / "svhn/train_32x32.mat")
    assert images.shape == (20, 32, 32)
    assert set(images.reshape(-1).tolist()) == {124}  # 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2
    assert labels.tolist() == [*range(1, 10), 0] * 2


def test_svhn_in_colour_has_channels_first(cache: Path):
    colour = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    savemat(cache / "x.mat", {"X": colour, "y": np.arange(1, 6)[:, None]})
    images, labels = read_colour_svhn(cache / "x.mat")
    assert images.shape == (5, 3, 32, 32) and images.dtype == np.uint8
    assert images[4, 1, 30, 7] == colour[30, 7, 1, 4]
    assert labels.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("compress", [False, True])
def test_a_harmed_svhn_file_is_named_with_what_to_do(cache: Path, compress: bool):
    path = cache / "train_32x32.mat"
    colour = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    savemat(path, {"X": colour, "y": np.arange(1, 6)[:, None]}, do_compression=compress)
    whole = path.read_bytes()
    for content in (b"", b"<html>", whole[:60], whole[:200], whole[:5000], whole[: len(whole) - 30]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}: not a whole SVHN file.*Remove it and fetch it again"):
            read_svhn(path)
    for other in ({"Z": np.zeros(3)}, {"X": colour, "y": np.arange(4)}, {"X": colour / 255, "y": np.arange(5)}):
        savemat(path, other)
        with pytest.raises(ValueError, match="not a whole SVHN file"):
            read_colour_svhn(path)
    with pytest.raises(FileNotFoundError):
        read_svhn(cache / "nothing.mat")


def test_svhn_and_mnist_are_data_sets_of_kind_images_whose_digits_must_not_be_mirrored(cache: Path):
    write_mnist(cache / "mnist")
    write_svhn(cache / "svhn", {"train": 100, "test": 50})
    assert available("svhn") and available("mnist")  # the extra part belongs to mnist-svhn only
    for name, title, sizes, shape in (
        ("mnist", "MNIST", {"train": 30, "valid": 30, "test": 20}, (1, 28, 28)),
        ("svhn", "SVHN", {"train": 70, "valid": 30, "test": 50}, (3, 32, 32)),
    ):
        data = load(name, n_valid=30)
        assert (data.kind, data.sizes, data.info["title"], data.info["flip"]) == ("images", sizes, title, False)
        assert data.train["image"].shape[1:] == shape
        assert torch.bincount(data.valid["label"] * 3 + data.valid["part"]).tolist() == [1] * 30
    assert load("svhn", n_valid=30).test["label"].tolist() == ([*range(1, 10), 0] * 5)
    mnist = load("mnist", n_valid=30)
    raw = mnist.test["image"] * mnist.info["std"][0] + mnist.info["mean"][0]
    expected = write_mnist(cache / "again")["t10k-images-idx3"]
    assert np.array_equal((raw[:, 0] * 255).round().numpy(), expected)


def test_mnist_and_svhn_are_mixed_and_know_their_domain(cache: Path):
    write_mnist(cache / "mnist")
    write_svhn(cache / "svhn", {"train": 100, "test": 50})
    assert not available("mnist-svhn")  # the extra part is missing
    with pytest.raises(DatasetNotFound, match=r"extra_32x32\.mat is missing"):
        load("mnist-svhn")
    data = load("mnist-svhn", extra=False)
    held = round(150 * 75_000 / 630_420)
    assert data.sizes == {"train": 50 + 150 - 2 * held, "valid": 10 + held, "test": 20 + held}
    for split in data.splits.values():
        svhn = split["domain"] == 1
        assert (split["image"][svhn] == 124).all()
        assert (split["image"][~svhn][:, :, :2] == 0).all()  # the border around 28 x 28
        assert split["image"].shape[1:] == (1, 32, 32)
    assert len(set(data.train["domain"][:30].tolist())) == 2  # shuffled together
