"""Text, sentences and pairs: round trips, windows, planted rules, official files in small."""

import gzip
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.datasets import DatasetNotFound, load
from moe_lab.datasets.pairs import planted_pair
from moe_lab.datasets.planted_text import DOMAINS, planted_text, spoil, write_sentence
from moe_lab.datasets.registry import SOURCES
from moe_lab.datasets.sentences import padded
from moe_lab.datasets.text import corpus, kept_tokens, windows
from moe_lab.datasets.tokens import (
    END,
    MASK,
    PAD,
    SPECIAL,
    START,
    UNKNOWN,
    BytePairs,
    Characters,
    pieces,
    train_tokenizer,
)

PROSE = "The quick brown fox jumps over the lazy dog, twice. " * 30


@given(st.text(max_size=60))
def test_byte_pairs_give_back_every_text(text):
    assert PAIRS.decode(PAIRS.encode(text)) == text


PAIRS = BytePairs.train([PROSE], 300)


def test_byte_pairs_merge_what_is_frequent_and_survive_their_description():
    assert len(PAIRS.encode(PROSE)) < len(PROSE) / 2
    assert 256 + len(SPECIAL) < PAIRS.n_tokens <= 300
    again = BytePairs(PAIRS.description)
    assert again.encode(PROSE) == PAIRS.encode(PROSE)
    assert again.decode([START, *again.encode("fox"), END, PAD]) == "fox"


def test_characters_know_their_alphabet_and_show_what_they_do_not_know():
    letters = Characters.train(["abc", "cd"])
    assert letters.alphabet == ("a", "b", "c", "d") and letters.n_tokens == len(SPECIAL) + 4
    assert letters.decode(letters.encode("dab")) == "dab"
    assert letters.encode("x") == [UNKNOWN]
    assert letters.decode([START, 5, MASK, UNKNOWN, END, PAD]) == "a▢\N{REPLACEMENT CHARACTER}"


def test_tokenizers_explain_mistakes():
    with pytest.raises(ValueError, match="characters"):
        train_tokenizer("character", ["text"])
    with pytest.raises(ValueError, match="empty"):
        train_tokenizer("characters", ["", ""])
    with pytest.raises(ValueError, match="261"):
        BytePairs.train([PROSE], 100)


@given(st.integers(2, 200), st.integers(1, 20))
def test_windows_overlap_by_one_so_that_every_token_is_a_target_once(n, length):
    ids = np.arange(n)
    if n <= length:
        with pytest.raises(ValueError, match="do not fill"):
            windows(ids, length)
        return
    rows = windows(ids, length)
    assert rows.shape[1] == length + 1
    assert torch.equal(rows[:, 1:].flatten(), torch.arange(1, len(rows) * length + 1))
    assert torch.equal(rows[1:, 0], rows[:-1, -1])


def test_a_corpus_is_split_in_order_and_its_vocabulary_is_that_of_train():
    data = corpus("toy", "ab" * 40 + "cd" * 10, length=4, tokenizer="characters", n_tokens=0, train_share=0.8)
    tokenizer = data.info["tokenizer"]
    assert tokenizer.alphabet == ("a", "b")
    assert (data.train["tokens"] >= len(SPECIAL)).all()
    assert (data.valid["tokens"] == UNKNOWN).all() and (data.test["tokens"] == UNKNOWN).all()
    with pytest.raises(ValueError, match="train_share"):
        corpus("toy", "abc", length=1, tokenizer="characters", n_tokens=0, train_share=1.0)


@given(st.text(alphabet="ab \n", max_size=80), st.integers(1, 20))
def test_pieces_are_the_text_and_begin_with_a_line(text, at_least):
    cut = pieces(text, at_least)
    assert "".join(cut) == text
    assert all(len(piece) >= at_least and piece.endswith("\n") for piece in cut[:-1])
    assert not any(piece[:1].isspace() for piece in cut[1:])
    whole = PAIRS._tokenizer.encode(text).ids
    assert [id_ for piece in cut for id_ in PAIRS._tokenizer.encode(piece).ids] == whole


def test_a_long_text_has_the_ids_of_its_pieces():
    text = "def f(x):\n    return x\n\n\na = 1\nb = 2\n" * 9000
    assert PAIRS.decode(PAIRS.encode(text)) == text
    assert len(pieces(text)) > 1 and PAIRS.encode(text) == PAIRS._tokenizer.encode(text).ids


@pytest.fixture
def a_long_text(monkeypatch, tmp_path):
    """Two parts, long enough to be kept in a cache; and how often a tokenizer was trained."""
    trained = []
    monkeypatch.setattr("moe_lab.datasets.text._LONG", 1000)
    monkeypatch.setattr("moe_lab.datasets.text.data_dir", lambda: tmp_path)
    learn = BytePairs.train
    monkeypatch.setattr(BytePairs, "train", lambda *a: trained.append(1) or learn(*a))
    return [PROSE, "A dog. " * 9], trained, tmp_path / "tokens"


def test_tokens_of_a_long_text_are_kept(a_long_text):
    parts, trained, folder = a_long_text
    (first, ids), (again, kept) = (kept_tokens(parts, 300) for _ in range(2))
    assert len(trained) == 1 and first.description == again.description
    for a, b, part in zip(ids, kept, parts, strict=True):
        assert a.tolist() == b.tolist() == first.encode(part)
    kept_tokens(parts, 310), kept_tokens(parts[::-1], 300)
    assert len(trained) == 3 and len(list(folder.iterdir())) == 3


def test_a_spoilt_cache_is_made_anew_and_one_that_cannot_be_written_is_no_error(a_long_text, monkeypatch):
    parts, trained, folder = a_long_text
    kept_tokens(parts, 300)
    (file,) = folder.iterdir()
    good = file.read_bytes()
    flipped = [good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :] for place in range(60, len(good), 97)]
    for content in (b"", b"no archive", good[:-40], *flipped):
        file.write_bytes(content)
        assert kept_tokens(parts, 300)[1][1].tolist() == kept_tokens(parts, 300)[1][1].tolist()
    assert len(trained) > 4
    blocked = folder / "a file"
    blocked.write_text("")
    monkeypatch.setattr("moe_lab.datasets.text.data_dir", lambda: blocked)
    assert len(kept_tokens(parts, 300)[1]) == 2
    assert len(kept_tokens(["short", "text"], 300)[1]) == 2


# --- Python code -----------------------------------------------------------------------------------------------------


def test_python_code_is_the_modules_of_all_packages_without_tests(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_LAB_DATA", str(tmp_path))
    with pytest.raises(DatasetNotFound, match="moe-lab data fetch python-code"):
        load("python-code")
    (tmp_path / "python-code").mkdir()
    for number, file in enumerate(SOURCES["python-code"].files):
        with zipfile.ZipFile(tmp_path / file.path, "w") as wheel:
            wheel.writestr(f"p{number}/a.py", f"package = {number}\n" * 40)
            wheel.writestr(f"p{number}/__init__.py", "\n")
            wheel.writestr(f"p{number}/tests/test_a.py", "never\n")
            wheel.writestr(f"p{number}/data.json", "never")
    data = load("python-code", length=16, tokenizer="characters")
    decode = data.info["tokenizer"].decode
    text = "".join(decode(row[:-1].tolist()) for split in data.splits.values() for row in split["tokens"])
    assert "never" not in text and data.info["length"] == 16
    found = re.findall(r"package = (\d)", text)
    assert set(found) == {"0", "1", "2", "3"} and found != sorted(found)  # in the order of checksums


def test_wheels_are_at_the_address_that_pypi_gives_them():
    for file in SOURCES["python-code"].files:
        (url,) = file.urls
        assert re.fullmatch(
            r"https://files\.pythonhosted\.org/packages/[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{60}/[^/]+\.whl", url
        )
        assert url.endswith(Path(file.path).name)


# --- the little languages --------------------------------------------------------------------------------------------


def is_right(sentence: str, domain: int) -> bool:
    """An independent judge of each rule."""
    body = sentence.removesuffix(".")
    if domain == 0:
        a, b, answer = map(int, re.fullmatch(r"\((\d+)\+(\d+)\)=(\d+)", body).groups())
        return a + b == answer
    if domain == 1:
        words = body.split()
        many = words[0] in ("two", "six", "ten", "all")
        verb = next(w for w in words[1:] if w.removesuffix("s") in ("see", "hear", "like", "fear", "find"))
        return verb.endswith("s") != many
    if domain == 2:
        opened = []
        for bracket in body:
            if bracket in "([{":
                opened.append(bracket)
            elif not opened or {"(": ")", "[": "]", "{": "}"}[opened.pop()] != bracket:
                return False
        return not opened
    first, second = body.split("|")
    return first[::-1] == second


@given(st.integers(0, 3), st.integers(0, 10_000))
def test_every_sentence_keeps_its_rule_and_a_spoilt_one_breaks_it(domain, seed):
    rng = np.random.default_rng(seed)
    sentence = write_sentence(domain, rng)
    assert is_right(sentence, domain)
    assert not is_right(spoil(sentence, domain, rng), domain)


def test_planted_text_says_which_language_each_character_belongs_to():
    text, domain = planted_text(3, n_characters=5000)
    assert len(text) == len(domain) == 5000 and set(domain) == set(range(len(DOMAINS)))
    begin = 0
    for sentence in text.split(".")[:-1]:
        here = domain[begin : begin + len(sentence) + 1]
        assert len(set(here)) == 1 and is_right(sentence + ".", here[0])
        begin += len(sentence) + 1
    assert planted_text(3, n_characters=5000)[0] == text != planted_text(4, n_characters=5000)[0]


def test_the_text_is_the_same_on_every_machine():
    """A checksum of what was made when this was written: data sets must not change under recorded results."""
    assert planted_text(0, n_characters=60)[0] == "abdcaad|daacdba.a big hen likes a fox.an owl finds an owl.(0"


def test_judgements_are_half_right_and_labels_say_so():
    data = load("planted-judgements", n_train=400, n_valid=40, n_test=80)
    tokenizer = data.info["tokenizer"]
    for split in data.splits.values():
        assert split["label"].float().mean().item() == pytest.approx(0.5, abs=0.06)
        for tokens, label, domain in zip(split["tokens"], split["label"], split["domain"], strict=True):
            assert is_right(tokenizer.decode(tokens), int(domain)) == bool(label)


def translate(sentence: str) -> str:
    """The made-up language once more, from the English words alone."""
    words = sentence.split()
    verb_at = next(
        i for i, w in enumerate(words) if w.removesuffix("s") in ("see", "hear", "like", "fear", "find", "help")
    )
    nouns = {
        "owl": "owl",
        "fox": "fox",
        "cat": "mur",
        "dog": "bal",
        "hen": "kik",
        "bee": "zum",
        "cow": "lod",
        "ant": "pik",
    }
    adjectives = {"old": "mil", "red": "tur", "big": "gra", "shy": "pel", "wet": "nos", "odd": "dri"}
    verbs = {"see": "se", "hear": "he", "like": "ama", "fear": "tim", "find": "tro", "help": "jut"}

    def phrase(part):
        many = part[0] == "the"
        noun = part[-1].removesuffix("es") if part[-1] == "foxes" else part[-1].removesuffix("s")
        made = f"{'zi' if many else 'zo'}-{nouns[noun]}{'u' if many else 'a'}"
        return " ".join([made, *(adjectives[w] for w in part[1:-1])])

    subject, object_ = words[:verb_at], words[verb_at + 1 :]
    article = "zi" if subject[0] == "the" else "zo"
    return f"{phrase(subject)} {phrase(object_)} {verbs[words[verb_at].removesuffix('s')]}-{article}"


@given(st.integers(0, 10_000))
def test_the_translation_follows_from_the_english(seed):
    english, foreign = planted_pair(np.random.default_rng(seed))
    assert translate(english) == foreign


def test_no_test_sentence_is_in_train_and_pairs_are_framed():
    data = load("planted-pairs", n_train=300, n_valid=30, n_test=50)
    tokenizer = data.info["tokenizer"]
    train = {tokenizer.decode(row) for row in data.train["source"]}
    assert len(train) == 300 and not train & set(data.info["sources"]["test"])
    row = data.test["target"][0]
    end = int((row == END).nonzero())
    assert row[0] == START and (row[end + 1 :] == PAD).all()
    assert tokenizer.decode(row) == data.info["references"]["test"][0]
    with pytest.raises(ValueError, match="too few"):
        load("planted-pairs", n_train=10**6)


def test_a_long_sentence_is_cut_and_still_ends():
    assert padded([[7, 8, 9], [7]], 4, start=True, end=True).tolist() == [[START, 7, 8, END], [START, 7, END, PAD]]
    with pytest.raises(ValueError, match="no room"):
        padded([[7]], 2, start=True, end=True)


# --- official files, in small -----------------------------------------------------------------------------------------


def test_sst2_is_read_from_the_official_archive_and_from_the_stand_ins(cache: Path):
    rows = [("a fine film", 1), ("dull , dull", 0)] * 12
    official = "sentence\tlabel\n" + "".join(f"{text} \t{label}\n" for text, label in rows)
    other = "label\tcontent\n" + "".join(f"{label}\t{text}\n" for text, label in rows)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("SST-2/train.tsv", official)
        zipped.writestr("SST-2/dev.tsv", official)
    (cache / "SST-2.zip").write_bytes(archive.getvalue())
    first = load("sst2", n_tokens=300, n_valid=4)
    (cache / "sst2").mkdir()
    for name in ("train", "dev"):
        (cache / "sst2" / f"{name}.tsv").write_text(other)
    second = load("sst2", n_tokens=300, n_valid=4)
    assert first.sizes == second.sizes == {"train": 20, "valid": 4, "test": 24}
    assert torch.equal(first.test["tokens"], second.test["tokens"])
    assert first.test["label"].tolist() == [1, 0] * 12
    assert first.info["tokenizer"].decode(first.test["tokens"][1]) == "dull , dull"
    assert load("sst2", n_tokens=300, n_valid=4, n_train=7).sizes["train"] == 7


def test_multi30k_is_read_line_by_line_and_refused_when_languages_do_not_match(cache: Path):
    (cache / "multi30k").mkdir()
    for split, n in (("train", 6), ("val", 2), ("test_2016_flickr", 3)):
        for language, word in (("en", "dog"), ("de", "Hund")):
            text = "".join(f"{word} number {i}.\n" for i in range(n))
            (cache / "multi30k" / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    data = load("multi30k", n_tokens=300)
    assert data.sizes == {"train": 6, "valid": 2, "test": 3}
    assert data.info["references"]["test"][1] == "Hund number 1."
    assert data.info["tokenizer"].decode(data.train["target"][5]) == "Hund number 5."
    (cache / "multi30k" / "val.de.gz").write_bytes(gzip.compress(b"Hund.\n"))
    with pytest.raises(ValueError, match="do not match"):
        load("multi30k", n_tokens=300)


def test_your_own_text_is_a_file_or_a_folder(tmp_path: Path):
    (tmp_path / "b.txt").write_text(PROSE)
    (tmp_path / "a.txt").write_text("first " * 50)
    folder = load("text-file", path=str(tmp_path), length=8, tokenizer="characters")
    assert folder.info["tokenizer"].decode(folder.train["tokens"][0]).startswith("first fir")
    single = load("text-file", path=str(tmp_path / "b.txt"), length=8, n_tokens=280)
    assert single.info["tokenizer"].kind == "bpe"
    (tmp_path / "empty.txt").write_text(" \n")
    for path, says in (
        ("", "needs path"),
        (str(tmp_path / "no"), "no text at"),
        (str(tmp_path / "empty.txt"), "no text"),
    ):
        with pytest.raises(ValueError, match=says):
            load("text-file", path=path)


@pytest.mark.parametrize("name", ["tiny-shakespeare", "sst2", "multi30k"])
def test_missing_real_text_says_how_to_get_it(name, cache: Path):
    with pytest.raises(DatasetNotFound, match=f"moe-lab data fetch {name}"):
        load(name)
