"""Where images come from; `moe_lab.datasets.registry` takes them in."""

from __future__ import annotations

from moe_lab.datasets.sources import RemoteFile, Source, stand_in

_SVHN = "http://ufldl.stanford.edu/housenumbers/"


_SVHN_CITATION = (
    "Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu, A. Y. Ng, Reading Digits in Natural Images with "
    "Unsupervised Feature Learning, NIPS Workshop 2011"
)
_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_CIFAR_CITATION = (
    "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, University of Toronto, "
    "2009"
)
_CIFAR_LICENCE = "no licence text; the author's page asks for the citation"

_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _idx_files(
    folder: str, mirrors: tuple[str, ...], md5: tuple[str, ...], sizes: tuple[int, ...]
) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(f"{folder}/{name}", tuple(mirror + name for mirror in mirrors), f"md5:{digest}", size)
        for name, digest, size in zip(_IDX, md5, sizes, strict=True)
    )


def _svhn(part: str, md5: str, size: int) -> RemoteFile:
    return RemoteFile(f"svhn/{part}_32x32.mat", (f"{_SVHN}{part}_32x32.mat",), f"md5:{md5}", size)


def _cifar(n_classes: int, md5: str, size: int) -> RemoteFile:
    name = f"cifar-{n_classes}-python.tar.gz"
    return RemoteFile(name, (_CIFAR + name,), f"md5:{md5}", size)


IMAGE_SOURCES: dict[str, Source] = {
    "mnist": Source(
        "MNIST",
        "Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document recognition, Proc. "
        "IEEE 86(11), 1998",
        "CC BY-SA 3.0 as commonly stated; the authors' page gives no licence text",
        "http://yann.lecun.com/exdb/mnist/",
        _idx_files(
            "mnist",
            (
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
                "http://yann.lecun.com/exdb/mnist/",
            ),
            (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
            (9_912_422, 28_881, 1_648_877, 4_542),
        ),
        "torchvision, torchvision/datasets/mnist.py",
        (stand_in("mnist.npz", "39b9b1ffaa0ba4d8995a616551f0966941fe02a3fe79ba4a9db7373db16d53ad", 11_490_559),),
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST",
        "H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
        "Algorithms, arXiv 1708.07747",
        "MIT",
        "https://github.com/zalandoresearch/fashion-mnist",
        _idx_files(
            "fashion-mnist",
            (
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            ),
            (
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
            (26_421_880, 29_515, 4_422_102, 5_148),
        ),
        "torchvision, torchvision/datasets/mnist.py, and the project's README",
    ),
    "svhn": Source(
        "SVHN, cropped digits (train, test)",
        _SVHN_CITATION,
        "Non-commercial use only",
        "http://ufldl.stanford.edu/housenumbers/",
        (
            _svhn("train", "e26dedcc434d2e4c54c9b2d4a06d8373", 182_040_794),
            _svhn("test", "eb5a983be6a315427106f1b164d9cef3", 64_275_384),
        ),
        "torchvision, torchvision/datasets/svhn.py",
    ),
    "svhn-extra": Source(
        "SVHN, cropped digits (extra)",
        _SVHN_CITATION,
        "Non-commercial use only",
        "http://ufldl.stanford.edu/housenumbers/",
        (_svhn("extra", "a93ce644f1a588dc4d68dda5feec44a7", 1_329_278_602),),
        "torchvision, torchvision/datasets/svhn.py",
    ),
    "cifar-10": Source(
        "CIFAR-10",
        _CIFAR_CITATION,
        _CIFAR_LICENCE,
        f"{_CIFAR}cifar.html",
        (_cifar(10, "c58f30108f718f92721af3b95e74349a", 170_498_071),),
        "torchvision, torchvision/datasets/cifar.py; of the JPEG copy, computed from the file",
        (
            stand_in(
                "cifar10-jpeg.npz",
                "0e1cba086528afbc3e1af14614fe74bfa82951dc795310a870988d9bb480cb12",
                55_793_101,
                lossy="JPEG",
            ),
        ),
    ),
    "cifar-100": Source(
        "CIFAR-100",
        _CIFAR_CITATION,
        _CIFAR_LICENCE,
        f"{_CIFAR}cifar.html",
        (_cifar(100, "eb9058c3a382ffc7106e4002c42a8d85", 169_001_437),),
        "torchvision, torchvision/datasets/cifar.py",
    ),
}
