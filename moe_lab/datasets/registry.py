"""Every data set: where it comes from, what may be done with it, how its files are recognised.

The one place that knows URLs and checksums; `data/README.md` is generated from it by `moe_lab.datasets.readme`. A
checksum is written here only where it was found in a source, named beside it as ``checksum_from``; none is made up.
"""

from __future__ import annotations

from moe_lab.datasets.glue_sources import GLUE_SOURCES, TASKS
from moe_lab.datasets.image_sources import IMAGE_SOURCES
from moe_lab.datasets.sources import Entry, RemoteFile, Source, stand_in
from moe_lab.names import unknown_name

_MOVIELENS_LICENCE = (
    "Research use with acknowledgement; no redistribution and no commercial use without permission "
    "(the README in the archive)"
)
_MOVIELENS_CITATION = (
    "F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015, "
    "doi:10.1145/2827872"
)
_EIGENTASTE = "https://eigentaste.berkeley.edu/dataset/"
_WAYBACK = "https://web.archive.org/web/20250409222630id_/"
_RAW = "https://raw.githubusercontent.com/"


def _jester(part: int, sha256: str, size: int) -> RemoteFile:
    name = f"jester_dataset_1_{part}.zip"
    urls = (f"{_EIGENTASTE}archive/{name}", f"{_EIGENTASTE}{name}", f"{_WAYBACK}{_EIGENTASTE}archive/{name}")
    return RemoteFile(name, urls, f"sha256:{sha256}", size)


def _wheel(name: str, blake2b: str, sha256: str, size: int) -> RemoteFile:
    """PyPI names a file's folder by its BLAKE2b-256."""
    url = f"https://files.pythonhosted.org/packages/{blake2b[:2]}/{blake2b[2:4]}/{blake2b[4:]}/{name}"
    return RemoteFile(f"python-code/{name}", (url,), f"sha256:{sha256}", size)


def _multi30k(name: str, sha256: str, size: int) -> RemoteFile:
    url = f"{_RAW}multi30k/dataset/master/data/task1/raw/{name}.gz"
    return RemoteFile(f"multi30k/{name}.gz", (url,), f"sha256:{sha256}", size)


SOURCES: dict[str, Source] = {
    "ml-100k": Source(
        "MovieLens 100K",
        _MOVIELENS_CITATION,
        _MOVIELENS_LICENCE,
        "https://grouplens.org/datasets/movielens/100k/",
        (
            RemoteFile(
                "ml-100k.zip",
                ("https://files.grouplens.org/datasets/movielens/ml-100k.zip",),
                "md5:0e33842e24a9c977be4e0107933c0723",
                4_924_029,
            ),
        ),
        "GroupLens, ml-100k.zip.md5 beside the archive",
        (stand_in("ml-100k.npz", "20631423c396261b4e05c8c94850edc003a62d4febe7848bb1bb535c46345f17", 784_940),),
    ),
    "ml-1m": Source(
        "MovieLens 1M",
        _MOVIELENS_CITATION,
        _MOVIELENS_LICENCE,
        "https://grouplens.org/datasets/movielens/1m/",
        (
            RemoteFile(
                "ml-1m.zip",
                ("https://files.grouplens.org/datasets/movielens/ml-1m.zip",),
                "md5:c4d9eecfca2ab87c1945afe126590906",
                5_917_549,
            ),
        ),
        "GroupLens, ml-1m.zip.md5 beside the archive",
    ),
    "jester": Source(
        "Jester, dataset 1 (April 1999 to May 2003)",
        "K. Goldberg, T. Roeder, D. Gupta, C. Perkins, Eigentaste: A Constant Time Collaborative Filtering Algorithm, "
        "Information Retrieval 4(2), 133-151, 2001",
        "Free for research use with the citation",
        "https://eigentaste.berkeley.edu/dataset/",
        (
            _jester(1, "cb7841756ded125b15f3d95c9f8241224065e96354c132a46ae4214deeab7615", 4_171_628),
            _jester(2, "4d312fd824d8c8cb2c9c952a7b1fb7c00d1f5fd3ece370f7285aa701d371748b", 3_924_205),
            _jester(3, "7f548d3762d3506cf7cd37d8cb9e3adb67984a7da7aa2d2096d5e0b1b884758d", 2_151_299),
        ),
        "not published by the authors; two public projects that read the archived official files give the same values",
    ),
    "book-crossing": Source(
        "Book-Crossing",
        "C.-N. Ziegler, S. M. McNee, J. A. Konstan, G. Lausen, Improving Recommendation Lists Through Topic "
        "Diversification, WWW 2005, "
        "doi:10.1145/1060745.1060754",
        "Free for research use with the citation (the authors' page, now offline; no licence text in the archive)",
        "http://www2.informatik.uni-freiburg.de/~cziegler/BX/",
        (
            RemoteFile(
                "BX-CSV-Dump.zip",
                (
                    "http://www2.informatik.uni-freiburg.de/~cziegler/BX/BX-CSV-Dump.zip",
                    f"{_WAYBACK}http://www2.informatik.uni-freiburg.de/~cziegler/BX/BX-CSV-Dump.zip",
                ),
                "md5:37d647ee9e18ba134ea6d78ee4fe5292",
                26_085_508,
            ),
        ),
        "not published by the authors; recorded by the bookdata-tools project (data/BX-CSV-Dump.zip.dvc) from the "
        "official URL",
    ),
    "tiny-shakespeare": Source(
        "Tiny Shakespeare",
        "A. Karpathy, char-rnn, 2015; the plays are W. Shakespeare's",
        "public domain text; the repository is MIT",
        "https://github.com/karpathy/char-rnn",
        (
            RemoteFile(
                "tinyshakespeare.txt",
                (f"{_RAW}karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
                "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                1_115_394,
            ),
        ),
        "computed from the file in the public repository",
    ),
    "multi30k": Source(
        "Multi30k, task 1, English and German",
        "D. Elliott, S. Frank, K. Sima'an, L. Specia, Multi30K: Multilingual English-German Image Descriptions, "
        "Workshop on Vision and Language 2016",
        "CC BY-NC-SA 4.0 (the repository's licence text); captions of Flickr30k, research use",
        "https://github.com/multi30k/dataset",
        (
            _multi30k("train.en", "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f", 568_929),
            _multi30k("train.de", "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6", 637_044),
            _multi30k("val.en", "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28", 21_650),
            _multi30k("val.de", "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a", 24_681),
            _multi30k(
                "test_2016_flickr.en", "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9", 21_077
            ),
            _multi30k(
                "test_2016_flickr.de", "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8", 22_890
            ),
        ),
        "computed from the files in the public repository",
    ),
    "sst2": Source(
        "SST-2, as in GLUE",
        "R. Socher et al., Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank, EMNLP 2013; "
        "A. Wang et al., GLUE, ICLR 2019",
        "research use (no licence text; the authors' page asks for the citation)",
        "https://nlp.stanford.edu/sentiment/",
        (
            RemoteFile(
                "SST-2.zip",
                ("https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",),
                "md5:9f81648d4199384278b86e315dac217c",
                7_439_277,
            ),
        ),
        "torchtext, torchtext/datasets/sst2.py",
        (
            stand_in("sst2/train.tsv", "dc4a10637729af71aeb11f573482b10031ba7ffe53159403599d06759e484e30", 3_738_731),
            stand_in("sst2/dev.tsv", "84207e6be5873fb18db798cc6faec86871f5a426554650ff64a1c34e87665f6f", 94_414),
        ),
    ),
    "python-code": Source(
        "Source code of SymPy 1.14.0, NetworkX 3.7, Django 6.1.3 and JAX 0.12.0.1",
        "their authors; A. Meurer et al., SymPy: symbolic computing in Python, PeerJ CS 3:e103, 2017; A. Hagberg, "
        "D. Schult, P. Swart, Exploring Network Structure, Dynamics, and Function using NetworkX, SciPy 2008; Django "
        "Software Foundation; J. Bradbury et al., JAX: composable transformations of Python+NumPy programs, 2018",
        "BSD 3-Clause; JAX: Apache 2.0",
        "https://pypi.org/",
        (
            _wheel(
                "sympy-1.14.0-py3-none-any.whl",
                "a20977d55d46fd61b4a135c444fc97158ef34a095e5681d0a6c10b75bf356191",
                "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
                6_299_353,
            ),
            _wheel(
                "networkx-3.7-py3-none-any.whl",
                "7ecdfe58041e9011f307c490e3e17dd48cc516448f7c698a3f2d9d9d65d7e6a8",
                "e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0",
                2_142_205,
            ),
            _wheel(
                "django-6.1.3-py3-none-any.whl",
                "77f2adbe0352c6673f7b608724be5f69962c80ba1d06f8ed60fa4bfbec258b08",
                "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
                8_424_610,
            ),
            _wheel(
                "jax-0.12.0.1-py3-none-any.whl",
                "f95dbe6a4b67161462d1a0a97c7405459c2f76a4c23c66b39ad496527f68a17d",
                "e9dfd256ba090259b10f97f0755d4fc92535b8cb38c0a40df6488a8c8a7dd8ae",
                3_466_959,
            ),
        ),
        "PyPI's index, which pip compared with the files",
    ),
    **IMAGE_SOURCES,
    **GLUE_SOURCES,
}

DATASETS: dict[str, Entry] = {
    "planted-recommender": Entry("two-task recommender with planted user clusters", "COMET recommender, profile quick"),
    "planted-clusters": Entry("clusters in a tree, each with its own target function", "gates, local search"),
    "multidigits": Entry("two overlapping 8 x 8 digits (scikit-learn), one task each", "COMET vision, profile quick"),
    "digits-mixture": Entry("digits (scikit-learn) in two visual domains, domain known", "COMET vision, profile quick"),
    "planted-text": Entry("four little languages in turn, known which (characters)", "EvoMoE language models, quick"),
    "planted-judgements": Entry("their sentences, right or wrong", "EvoMoE masked language models, quick"),
    "planted-pairs": Entry("English phrases into a made-up language", "EvoMoE translation, quick"),
    "moved-digits": Entry("digits (scikit-learn) turned, scaled, shifted, noisy", "early exits, profile quick"),
    "planted-difficulty": Entry("digits (scikit-learn) of four known difficulties", "early exits, profile quick"),
    "text-file": Entry(
        "your own text: path=... of a file or a folder", "language models on WikiText, OpenWebText, ...", yours=True
    ),
    "ml-100k": Entry("MovieLens 100K as watch / rating tasks", "COMET recommender, profile standard", ("ml-100k",)),
    "ml-1m": Entry("MovieLens 1M as watch / rating tasks", "COMET recommender, profile paper", ("ml-1m",)),
    "jester": Entry("Jester 1 as rated / rating tasks", "COMET recommender, profile paper", ("jester",)),
    "books": Entry("Book-Crossing as read / rating tasks", "COMET recommender, profile paper", ("book-crossing",)),
    "multimnist": Entry(
        "two overlapping MNIST digits, one task each", "COMET vision, profiles standard and paper", ("mnist",)
    ),
    "multifashion": Entry(
        "two overlapping Fashion-MNIST images, one task each", "COMET vision, profile paper", ("fashion-mnist",)
    ),
    "mnist-svhn": Entry(
        "the paper's Digits: MNIST and SVHN, 32 x 32, grey",
        "COMET vision, profile paper",
        ("mnist", "svhn", "svhn-extra"),
    ),
    "mnist": Entry("handwritten digits, 28 x 28, grey", "early exits", ("mnist",)),
    "svhn": Entry("house numbers, 32 x 32, colour, without the extra part", "early exits", ("svhn",)),
    "cifar-10": Entry("photographs of 10 classes, 32 x 32, colour", "early exits", ("cifar-10",)),
    "cifar-100": Entry("photographs of 100 classes, 32 x 32, colour", "early exits", ("cifar-100",)),
    "cifar-10-lt": Entry("CIFAR-10 with a long tail of rare classes", "early exits", ("cifar-10",)),
    "cifar-100-lt": Entry("CIFAR-100 with a long tail of rare classes", "early exits", ("cifar-100",)),
    "tiny-shakespeare": Entry(
        "1.1 MB of Shakespeare", "EvoMoE language models, profile standard", ("tiny-shakespeare",)
    ),
    "python-code": Entry(
        "40 MB of Python: SymPy, NetworkX, Django, JAX", "EvoMoE language models, profile paper", ("python-code",)
    ),
    "sst2": Entry("film reviews, positive or negative", "EvoMoE masked language models, profile standard", ("sst2",)),
    "multi30k": Entry("image descriptions, English to German", "EvoMoE translation, profile standard", ("multi30k",)),
}


def sources_of(name: str) -> dict[str, Source]:
    """The sources behind a data set or a text task (or a source's own name); empty for embedded data.

    Raises:
        ValueError: none of them, with the nearest valid name.
    """
    entries = TASKS | DATASETS
    if name in entries:
        return {source: SOURCES[source] for source in entries[name].sources}
    if name in SOURCES:
        return {name: SOURCES[name]}
    raise unknown_name("data set", name, {*entries, *SOURCES})
