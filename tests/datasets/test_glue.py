"""GLUE's official files, tiny ones written here; the planted sentences against their grammar."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from moe_lab.datasets import DatasetNotFound
from moe_lab.datasets.download import DownloadFailed, fetch
from moe_lab.datasets.glue import TextRows, load_task, metrics_of, task_names
from moe_lab.datasets.glue_files import FORMATS
from moe_lab.datasets.planted_sentences import DOMAINS, WORTH, planted_sentences
from moe_lab.datasets.registry import SOURCES, TASKS
from moe_lab.datasets.sources import RemoteFile, Source

N = 20  # rows of train

MNLI_HEAD = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
MNLI_TRAIN = (*MNLI_HEAD.split(), "sentence1", "sentence2", "label1", "gold_label")
MNLI_DEV = (*MNLI_HEAD.split(), "sentence1", "sentence2", *(f"label{i}" for i in range(1, 6)), "gold_label")
MRPC_HEADER = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in ([header] if header else []) + rows)


def mnli(columns: tuple[str, ...], rows: list[tuple[str, str, str]]) -> str:
    """Rows of premise, hypothesis, gold label; a wrong label stands in the other columns of labels."""
    given = [dict(zip(("sentence1", "sentence2", "gold_label"), row, strict=True)) for row in rows]
    return table(columns, [tuple(row.get(column, "neutral") for column in columns) for row in given])


def write_zip(path: Path, **members: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def official(name: str) -> dict[str, str]:
    """train.tsv and dev.tsv (dev_matched.tsv ...) of an archive: N and 3 rows, half of train of each label."""
    halves = range(N)
    entailment = ("entailment", "not_entailment")
    if name == "cola":
        return {
            "train.tsv": table((), [("gj04", i % 2, "*" * (1 - i % 2), f"Sentence {i}.") for i in halves]),
            "dev.tsv": table((), [("gj04", i % 2, "", f"Dev {i}.") for i in range(3)]),
            "test.tsv": table(("index", "sentence"), [(0, "No label.")]),
        }
    if name == "sst2":
        return {
            "train.tsv": table(("sentence", "label"), [(f"sentence {i} ", i % 2) for i in halves]),
            "dev.tsv": table(("sentence", "label"), [(f"dev {i} ", i % 2) for i in range(3)]),
        }
    if name == "qqp":
        header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
        return {
            "train.tsv": table(header, [(i, 1, 2, f"question {i}", f"other {i}", i % 2) for i in halves]),
            "dev.tsv": table(header, [(i, 1, 2, f"dev {i}", f"other {i}", i % 2) for i in range(3)]),
        }
    if name == "mnli":
        labels = FORMATS["mnli"].labels
        dev = [(f"dev {i}", f"other {i}", labels[i]) for i in range(3)]
        return {
            "train.tsv": mnli(MNLI_TRAIN, [(f"premise {i}", f"other {i}", labels[i % 2]) for i in halves]),
            "dev_matched.tsv": mnli(MNLI_DEV, dev),
            "dev_mismatched.tsv": mnli(
                MNLI_DEV, [(f"far {i}", other, label) for i, (_, other, label) in enumerate(dev)]
            ),
        }
    texts = ("question", "sentence") if name == "qnli" else ("sentence1", "sentence2")
    return {
        "train.tsv": table(("index", *texts, "label"), [(i, f"text {i}", f"b {i}", entailment[i % 2]) for i in halves]),
        "dev.tsv": table(("index", *texts, "label"), [(i, f"dev {i}", f"b {i}", entailment[i % 2]) for i in range(3)]),
    }


ARCHIVES = {name: form.archive for name, form in FORMATS.items() if form.archive}


def put(cache: Path, name: str, **changed: str) -> Path:
    """The official archive with some members changed."""
    members = official(name) | {key.replace("_tsv", ".tsv"): content for key, content in changed.items()}
    folder = "QQP" if name == "qqp" else "QNLI" if name == "qnli" else ARCHIVES[name].removesuffix(".zip")
    write_zip(cache / ARCHIVES[name], **{f"{folder}/{member}": content for member, content in members.items()})
    return cache / ARCHIVES[name]


def put_mrpc(cache: Path, rows: list[tuple] | None = None, ids: str = "3\t103\n5\t105\n", bom: str = "\ufeff") -> None:
    rows = [(i % 2, i, 100 + i, f"news {i}", f"other {i}") for i in range(N)] if rows is None else rows
    (cache / "mrpc").mkdir(exist_ok=True)
    (cache / "mrpc/msr_paraphrase_train.txt").write_text(bom + table(MRPC_HEADER, rows), encoding="utf-8")
    (cache / "mrpc/mrpc_dev_ids.tsv").write_text(ids, encoding="utf-8")


def all_first(task) -> list[str]:
    return sorted(task.train.first + task.valid.first)


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_archive_gives_train_validation_and_the_dev_set(cache: Path, name: str):
    put(cache, name)
    task = load_task(name, n_valid=4)
    assert [len(task.train), len(task.valid), len(task.test)] == [N - 4, 4, 3]
    start = task.train.first[0].rsplit(" ", 1)[0]
    dot = "." if name == "cola" else ""
    assert all_first(task) == sorted(f"{start} {i}{dot}" for i in range(N))
    assert task.test.first == [f"{'Dev' if name == 'cola' else 'dev'} {i}{dot}" for i in range(3)]  # official order
    assert task.test.label.tolist() == ([0, 1, 2] if name == "mnli" else [0, 1, 0])
    for rows in (task.train, task.valid):
        numbers = [int(text.rstrip(".").rsplit(" ", 1)[1]) for text in rows.first]
        assert rows.label.tolist() == [i % 2 for i in numbers]  # a label stays with its text
        assert (rows.second is None) == (name in ("cola", "sst2"))
        assert rows.second is None or [int(text.rsplit(" ", 1)[1]) for text in rows.second] == numbers
    assert task.valid.label.tolist().count(1) == 2  # stratified
    assert (task.n_classes, task.metrics) == (3 if name == "mnli" else 2, metrics_of(name))
    assert task.train.label.dtype == np.int64


def test_the_mismatched_dev_set_of_mnli_is_an_option(cache: Path):
    put(cache, "mnli")
    task = load_task("mnli", n_valid=4, mismatched=True)
    assert task.test.first == ["far 0", "far 1", "far 2"]
    assert task.title == "MNLI, inference, mismatched"
    put(cache, "rte")
    with pytest.raises(ValueError, match="mismatched=True is for 'mnli'"):
        load_task("rte", mismatched=True)


def test_mrpc_is_cut_by_the_list_of_ids(cache: Path):
    put_mrpc(cache)
    task = load_task("mrpc", n_valid=4)
    assert task.test.first == ["news 3", "news 5"] and task.test.second == ["other 3", "other 5"]
    assert all_first(task) == sorted(f"news {i}" for i in range(N) if i not in (3, 5))
    put_mrpc(cache, bom="")
    assert load_task("mrpc", n_valid=4).test.first == ["news 3", "news 5"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("3\t103\n5\t999\n", "has 1 of the 2 pairs"),  # both ids must be those of one pair
        ("", "has 0 of the 0 pairs"),
        ("3 103\n", "line 1: 1 fields, expected the two ids"),
    ],
)
def test_a_list_of_ids_that_is_another_one_is_refused(cache: Path, ids: str, message: str):
    put_mrpc(cache, ids=ids)
    with pytest.raises(ValueError, match=message):
        load_task("mrpc")


def test_quotation_marks_are_characters_and_hide_no_rows(cache: Path):
    odd = ['"An opened quote', 'a "whole" one', '"', "it's 5\" long", '""']
    train = table(
        ("index", "sentence1", "sentence2", "label"), [(i, text, text, "entailment") for i, text in enumerate(odd)]
    )
    put(cache, "rte", train_tsv=train)
    task = load_task("rte", n_valid=1)
    assert all_first(task) == sorted(odd)
    assert sorted(task.train.second + task.valid.second) == sorted(odd)


def test_rows_that_lack_fields_are_skipped_in_qqp_and_only_there(cache: Path):
    header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    good = [(i, 1, 2, f"question {i}", "", i % 2) for i in range(4)]  # an empty question is a question
    broken = [(7, 1, 2, "a question with a"), ("line break", "other", 1), (8, 1, 2, "a", "b", "")]
    put(cache, "qqp", train_tsv=table(header, good[:2] + broken + good[2:]))
    assert all_first(load_task("qqp", n_valid=1)) == [f"question {i}" for i in range(4)]
    header = ("index", "sentence1", "sentence2", "label")
    put(cache, "rte", train_tsv=table(header, [(0, "a", "b", "entailment"), (1, "a", "b")]))
    with pytest.raises(ValueError, match=r"line 3: 3 fields, expected 4 \(index, sentence1, sentence2, label\)"):
        load_task("rte")


@pytest.mark.parametrize("name", ARCHIVES)
def test_files_that_are_cut_short_empty_or_another_table_are_refused(cache: Path, name: str):
    whole = official(name)["train.tsv"]
    lines = whole.splitlines(keepends=True)
    shortened = "".join(lines[:-1]) + lines[-1].split("\t")[0]
    cases = {"the file is empty|no rows": "", "no column|fields, expected 4": "a\tb\n1\t2\n"}
    if name != "qqp":  # there a short row is nothing special: the checksum is what notices
        cases["1 fields, expected|2 fields, expected"] = shortened
    if name != "cola":  # it has no header
        cases["no rows"] = lines[0]
    for message, content in cases.items():
        for leftover in sorted(cache.rglob("*"), reverse=True):
            leftover.rmdir() if leftover.is_dir() else leftover.unlink()
        put(cache, name, train_tsv=content)
        with pytest.raises(ValueError, match=message) as caught:
            load_task(name)
        assert "train.tsv" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong"), [("cola", "2"), ("sst2", "positive"), ("qnli", "contradiction"), ("mnli", "-")]
)
def test_a_label_that_the_task_does_not_have_is_refused_with_its_line(cache: Path, name: str, wrong: str):
    rows = {
        "cola": table((), [("gj04", 1, "", "Fine."), ("gj04", wrong, "", "Odd.")]),
        "sst2": table(("sentence", "label"), [("fine", 1), ("odd", wrong)]),
        "qnli": table(("index", "question", "sentence", "label"), [(0, "a", "b", "entailment"), (1, "a", "b", wrong)]),
        "mnli": mnli(MNLI_TRAIN, [("a", "b", "neutral"), ("a", "b", wrong)]),
    }
    put(cache, name, train_tsv=rows[name])
    line = 2 if name == "cola" else 3
    with pytest.raises(ValueError, match=rf"line {line}: label '{wrong}', expected one of "):
        load_task(name)


def test_columns_are_found_by_name_not_by_place(cache: Path):
    put(cache, "sst2", train_tsv=table(("label", "content"), [(i % 2, f"sentence {i}") for i in range(N)]))
    assert all_first(load_task("sst2", n_valid=4)) == sorted(f"sentence {i}" for i in range(N))


def test_a_folder_unpacked_by_hand_is_enough_and_nothing_at_all_names_the_command(cache: Path):
    with pytest.raises(DatasetNotFound, match="moe-lab data fetch rte"):
        load_task("rte")
    with pytest.raises(DatasetNotFound, match="moe-lab data fetch mrpc"):
        load_task("mrpc")
    (cache / "RTE").mkdir()
    for member, content in official("rte").items():
        (cache / "RTE" / member).write_text(content)
    assert len(load_task("rte").test) == 3


def test_the_seed_draws_the_validation_rows_and_fewer_rows_are_the_first_of_all(cache: Path):
    put(cache, "rte")
    whole, again, other = (load_task("rte", seed, n_valid=6) for seed in (3, 3, 4))
    assert whole.train.first == again.train.first and whole.valid.first == again.valid.first
    assert whole.valid.first != other.valid.first
    few = load_task("rte", 3, n_valid=6, n_train=5, n_test=2)
    assert few.train.first == whole.train.first[:5] and few.train.second == whole.train.second[:5]
    assert few.valid.first == whole.valid.first
    assert len(few.test) == 2 and set(few.test.first) < set(whole.test.first)
    assert len(load_task("rte").valid) == N // 10  # a tenth, where 2,000 would be too many
    for wrong in ({"n_valid": 0}, {"n_valid": N}, {"n_train": N}, {"n_train": 0}, {"n_test": 4}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            load_task("rte", **wrong)


def test_names_are_those_of_the_registry_and_a_misspelt_one_is_corrected():
    assert set(task_names()) == set(TASKS) - {"squad-v2"}
    with pytest.raises(ValueError, match="did you mean 'mnli'"):
        load_task("mnlli")
    with pytest.raises(ValueError, match="did you mean 'cola'"):
        metrics_of("colla")


def test_rows_are_taken_in_the_order_asked_for():
    rows = TextRows(["a", "b", "c"], ["A", "B", "C"], np.array([0, 1, 2]), np.array([5, 6, 7]))
    taken = rows.take(np.array([2, 0]))
    assert (taken.first, taken.second, taken.label.tolist(), taken.domain.tolist()) == (
        ["c", "a"],
        ["C", "A"],
        [2, 0],
        [7, 5],
    )
    assert len(rows.take(np.array([]))) == 0
    with pytest.raises(ValueError, match="same number of rows"):
        TextRows(["a"], None, np.array([0, 1]))


# Downloads: the registry's files replaced by tiny ones, on loopback.


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a server, and the folder that it serves."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()


def register(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> None:
    """The source as it is, but recognised by what lies in ``folder``."""
    source = SOURCES[name]
    files = []
    for file in source.files:
        content = (folder / file.path).read_bytes()
        files.append(RemoteFile(file.path, (), "sha256:" + hashlib.sha256(content).hexdigest(), len(content)))
    tiny = Source(source.title, source.citation, source.licence, source.homepage, tuple(files), "here")
    monkeypatch.setitem(SOURCES, name, tiny)


def test_an_archive_is_fetched_unpacked_and_read(monkeypatch, cache: Path, mirror: tuple[str, Path]):
    url, folder = mirror
    put(folder, "cola")
    register(monkeypatch, "cola", folder)
    fetch("cola", mirror=url, progress=False)
    assert len(load_task("cola", n_valid=4).train) == N - 4


def test_a_file_that_was_cut_short_on_the_way_is_noticed(monkeypatch, cache: Path, mirror: tuple[str, Path]):
    url, folder = mirror
    put_mrpc(folder)
    register(monkeypatch, "mrpc", folder)
    path = folder / "mrpc/msr_paraphrase_train.txt"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DownloadFailed, match="cut short"):
        fetch("mrpc", mirror=url, progress=False)
    put_mrpc(folder)
    fetch("mrpc", mirror=url, progress=False)
    assert len(load_task("mrpc", n_valid=4).test) == 2


# The embedded task.


def judged(text: str, domain: int) -> int:
    """The label, from the grammar as the docstring tells it: written without looking at the generator."""
    words = text.removesuffix(" .")
    if words.startswith("although "):
        clause = words.split(" , ")[1]
    elif " but " in words:
        clause = words.split(" but ")[1]
    else:
        clause = words.split(" although ")[0]
    *before, word = clause.split()
    if word in WORTH:
        good = bool(WORTH[word][domain])
    else:
        good = word in ("good", "great", "fine", "lovely", "nice")
        assert good or word in ("bad", "poor", "awful", "dull", "weak")
    return int(good != bool({"not", "never"} & set(before)))


def test_planted_labels_follow_from_the_grammar():
    texts, label, domain = planted_sentences(5, n=600)
    assert [judged(text, d) for text, d in zip(texts, domain.tolist(), strict=True)] == label.tolist()
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) == 5 and max(lengths) == 13


def test_planted_sentences_are_balanced_all_different_and_known_by_their_seed():
    texts, label, domain = planted_sentences(1, n=802)
    assert len(set(texts)) == 802
    counts = np.bincount(2 * domain + label, minlength=2 * len(DOMAINS))
    assert counts.max() - counts.min() <= 1
    assert planted_sentences(1, n=802)[0] == texts != planted_sentences(2, n=802)[0]
    with pytest.raises(ValueError, match="n must be at least 1"):
        planted_sentences(n=0)


def test_each_word_that_depends_on_the_domain_is_praise_in_two_of_four():
    assert sorted(WORTH.values()) == sorted({tuple(map(int, f"{i:04b}")) for i in range(16) if i.bit_count() == 2})


def test_planted_words_alone_say_little_about_the_label():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    task = load_task("planted-sentences", n_train=1500, n_test=800)
    counter = CountVectorizer().fit(task.train.first)
    model = LogisticRegression(max_iter=300).fit(counter.transform(task.train.first), task.train.label)
    assert model.score(counter.transform(task.test.first), task.test.label) < 0.65


def test_the_planted_task_has_the_sizes_asked_for_and_needs_no_files(cache: Path):
    task = load_task("planted-sentences", 2, n_train=30, n_valid=10, n_test=20)
    assert [len(rows) for rows in (task.train, task.valid, task.test)] == [30, 10, 20]
    assert len({*task.train.first, *task.valid.first, *task.test.first}) == 60
    assert set(task.train.domain.tolist()) == {0, 1, 2, 3}
    whole = load_task("planted-sentences")
    assert [len(rows) for rows in (whole.train, whole.valid, whole.test)] == [4000, 500, 1000]
    with pytest.raises(ValueError, match="n_test=0"):
        load_task("planted-sentences", n_test=0)


# Official counts, where the files are.

OFFICIAL_ROWS = {
    "sst2": (67_349, 872),
    "cola": (8_551, 1_043),
    "mrpc": (3_668, 408),
    "qqp": (363_846, 40_430),
    "mnli": (392_702, 9_815),
    "qnli": (104_743, 5_463),
    "rte": (2_490, 277),
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", OFFICIAL_ROWS)
def test_the_official_files_have_the_published_counts(name: str):
    from moe_lab.datasets.cache import is_available

    if not is_available(name):
        pytest.skip(f"{name} is not here: moe-lab data fetch {name}, or set MOE_LAB_DATA")
    task = load_task(name)
    assert (len(task.train) + len(task.valid), len(task.test)) == OFFICIAL_ROWS[name]
    assert len(task.valid) == min(2000, OFFICIAL_ROWS[name][0] // 10)
    assert abs(np.mean(task.valid.label == 0) - np.mean(task.train.label == 0)) < 0.01
    if name == "sst2":
        assert task.test.first[0] == "one long string of cliches ." and task.test.label[0] == 0
        assert float(task.test.label.mean()) == pytest.approx(444 / 872)
