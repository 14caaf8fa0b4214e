"""SQuAD v2.0: the official JSON, answers as tokens, tokens as answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.datasets import DatasetNotFound
from moe_lab.datasets.cache import is_available
from moe_lab.datasets.squad import Answer, load_squad, read_squad
from moe_lab.datasets.squad_spans import best_spans, span_text, token_span

CONTEXT = "  Owls see at night. Bees do not."  # official contexts begin with white space at times, and offsets count it


def asked(id_: str, *answers: tuple[str, int], plausible: bool = False, **more) -> dict:
    row = {"id": id_, "question": f" Question {id_}? ", "is_impossible": not answers}
    row["answers"] = [{"text": text, "answer_start": start} for text, start in answers]
    if plausible:
        row["plausible_answers"] = [{"text": "Bees", "answer_start": 21}]
    return row | more


def squad(*articles: list[dict], version: str = "v2.0", context: str = CONTEXT) -> dict:
    """Articles of one paragraph each."""
    data = [{"title": f"T{i}", "paragraphs": [{"context": context, "qas": qas}]} for i, qas in enumerate(articles)]
    return {"version": version, "data": data}


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_official_format_is_read(tmp_path: Path):
    rows = [asked("a", ("Owls", 2), ("night", 14)), asked("b", plausible=True)]
    first, second = read_squad(write(tmp_path / "dev.json", squad(rows)))
    assert (first.id, first.title, first.question, first.context) == ("a", "T0", "Question a?", CONTEXT)
    assert first.answers == (Answer("Owls", 2), Answer("night", 14)) and not first.is_impossible
    assert [first.context[a.start : a.end] for a in first.answers] == ["Owls", "night"]
    assert second.is_impossible and second.answers == ()  # the plausible answer is a trap


def test_white_space_around_an_answer_is_taken_off_and_its_place_moves_along(tmp_path: Path):
    (row,) = read_squad(write(tmp_path / "x.json", squad([asked("a", (" Owls ", 1))])))
    assert row.answers == (Answer("Owls", 2),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON, or cut short"),
        (json.dumps(squad([asked("a", ("Owls", 2))]))[:-30], "not JSON, or cut short"),
        ("[]", "version None"),
        (squad([asked("a", ("Owls", 2))], version="1.1"), r"version '1\.1', expected SQuAD 'v2\.0'"),
        ({"version": "v2.0"}, "no field 'data'"),
        ({"version": "v2.0", "data": 3}, "not of the official format"),
        ({"version": "v2.0", "data": []}, "no questions"),
        (squad([asked("a", ("Owls", 1))]), "question 'a': the answer 'Owls' is not at character 1"),
        (squad([asked("a", ("Owls", 2)), asked("b", ("", 2))]), "question 'b': the answer '' is not"),
        (squad([asked("a", ("Owls", 2), is_impossible=True)]), "question 'a': is_impossible is True, but there are 1"),
        (squad([asked("a", is_impossible=False)]), "is_impossible is False, but there are 0 answers"),
        (squad([{"id": "c", "question": "?", "answers": []}]), "question 'c': no field 'is_impossible'"),
    ],
)
def test_what_is_not_squad_v2_is_refused_by_name(tmp_path: Path, content, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        read_squad(write(tmp_path / "bad.json", content))
    assert "bad.json" in str(caught.value)


@pytest.fixture
def official(cache: Path) -> Path:
    articles = [[asked(f"{i}-{j}", ("Owls", 2)) for j in range(4)] for i in range(6)]
    write(cache / "squad-v2/train-v2.0.json", squad(*articles))
    write(cache / "squad-v2/dev-v2.0.json", squad([asked("d0", ("night", 14)), asked("d1"), asked("d2")]))
    return cache


def test_validation_holds_out_whole_articles(official: Path):
    task = load_squad(n_valid=6)
    assert [len(rows) for rows in (task.train, task.valid, task.test)] == [16, 6, 3]
    assert not {row.title for row in task.train} & {row.title for row in task.valid}
    assert [row.id for row in task.test] == ["d0", "d1", "d2"]
    again, other = load_squad(n_valid=6), load_squad(1, n_valid=6)
    assert [row.id for row in again.valid] == [row.id for row in task.valid] != [row.id for row in other.valid]
    few = load_squad(n_valid=6, n_train=5, n_test=2)
    assert (len(few.train), len(few.test)) == (5, 2)
    assert {row.id for row in few.train} < {row.id for row in task.train}


def test_sizes_that_cannot_be_had_are_refused(official: Path):
    with pytest.raises(ValueError, match="leaves none to train on"):
        load_squad()  # 2,000 of 24
    for wrong in ({"n_valid": 0}, {"n_valid": 4, "n_train": 21}, {"n_valid": 4, "n_test": 4}):
        with pytest.raises(ValueError, match=[*wrong][-1]):
            load_squad(**wrong)


def test_missing_files_name_the_command(cache: Path):
    with pytest.raises(DatasetNotFound, match="moe-lab data fetch squad-v2"):
        load_squad()


# Characters to tokens. The window: [CLS] when ? [SEP] owls see at ni ##ght . [SEP] [PAD]

TEXT = "owls see at night."
OFFSETS = [(0, 0), (0, 4), (4, 5), (0, 0), (0, 4), (5, 8), (9, 11), (12, 14), (14, 17), (17, 18), (0, 0), (0, 0)]
INSIDE = [False] * 4 + [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("answer", "span"),
    [
        ((0, 4), (4, 4)),  # not the question's token, which has the same offsets
        ((5, 11), (5, 6)),
        ((12, 17), (7, 8)),  # a word in two pieces
        ((13, 17), (7, 8)),  # begins inside a token
        ((6, 10), (5, 6)),  # begins and ends inside tokens
        ((15, 16), (8, 8)),  # lies inside one token
        ((4, 8), (5, 5)),  # begins with the space between tokens
        ((5, 9), (5, 5)),  # ends with one
        ((4, 5), (0, 0)),  # nothing but the space: no token shows it
        ((0, 18), (4, 9)),
        ((17, 18), (9, 9)),
        (None, (0, 0)),
    ],
)
def test_an_answer_becomes_the_tokens_that_cover_it(answer, span: tuple[int, int]):
    assert token_span(OFFSETS, INSIDE, answer) == span


def test_an_answer_that_the_window_does_not_show_whole_is_no_answer():
    behind = [flag and i < 8 for i, flag in enumerate(INSIDE)]  # cut behind "ni"
    assert token_span(OFFSETS, behind, (12, 17)) == (0, 0)  # ... in the middle of the answer
    assert token_span(OFFSETS, behind, (17, 18)) == (0, 0)  # ... before it
    assert token_span(OFFSETS, behind, (12, 14)) == (7, 7)  # ... just after it
    later = [flag and i >= 6 for i, flag in enumerate(INSIDE)]  # a later window begins at "at"
    assert token_span(OFFSETS, later, (5, 11)) == (0, 0)
    assert token_span(OFFSETS, later, (0, 4)) == (0, 0)
    assert token_span(OFFSETS, later, (9, 17)) == (6, 8)
    assert token_span(OFFSETS, [False] * 12, (0, 4)) == (0, 0)  # a question that leaves no room


def test_answers_and_offsets_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="12 offsets, but 3 flags"):
        token_span(OFFSETS, [True] * 3, (0, 4))
    for answer in ((4, 4), (5, 2), (-1, 2)):
        with pytest.raises(ValueError, match="from start to a later end"):
            token_span(OFFSETS, INSIDE, answer)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=8), st.lists(st.integers(0, 2), min_size=8, max_size=8), st.data()
)
def test_a_span_covers_the_answer_and_no_smaller_one_does(lengths: list[int], gaps: list[int], data):
    offsets, place = [(0, 0)], 0
    for length, gap in zip(lengths, gaps, strict=False):
        offsets.append((place + gap, place + gap + length))
        place += gap + length
    low, high = offsets[1][0], offsets[-1][1]
    start = data.draw(st.integers(low, high - 1))
    end = data.draw(st.integers(start + 1, high))
    touched = [i for i in range(1, len(offsets)) if set(range(*offsets[i])) & set(range(start, end))]
    first, last = token_span(offsets, [False] + [True] * len(lengths), (start, end))
    assert (first, last) == ((touched[0], touched[-1]) if touched else (0, 0))


# Logits to text.


def by_brute_force(start: list[float], end: list[float], inside: list[bool], longest: int, threshold: float):
    """Every pair in turn; the first best."""
    best, place = -float("inf"), (0, 0)
    for i in range(len(start)):
        for j in range(i, min(i + longest, len(start))):
            if inside[i] and inside[j] and start[i] + end[j] > best:
                best, place = start[i] + end[j], (i, j)
    null = start[0] + end[0]
    return ((0, 0) if null - best > threshold else place), best, null - best


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 10_000), st.sampled_from([-2.0, 0.0, 1.0]))
def test_the_best_span_is_that_of_trying_all(s: int, longest: int, seed: int, threshold: float):
    rng = torch.Generator().manual_seed(seed)
    start, end = (torch.randint(-4, 5, (6, s), generator=rng).float() for _ in range(2))  # whole numbers: many ties
    inside = torch.rand(6, s, generator=rng) < 0.7
    inside[:, 0] = False
    found = best_spans(start, end, inside, max_length=longest, threshold=threshold)
    for b in range(6):
        place, best, gap = by_brute_force(start[b].tolist(), end[b].tolist(), inside[b].tolist(), longest, threshold)
        assert (found.start[b].item(), found.end[b].item()) == place
        assert (found.score[b].item(), found.null_gap[b].item()) == (best, gap)


def test_the_threshold_moves_between_never_and_always_an_answer():
    start, end = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 2.0]])  # null 5, best 1 + 2 = 3: gap 2
    inside = torch.tensor([[False, True, True]])
    taken = {t: best_spans(start, end, inside, threshold=t).end.item() for t in (-torch.inf, 0.0, 1.9, 2.0, torch.inf)}
    assert taken == {-torch.inf: 0, 0.0: 0, 1.9: 0, 2.0: 2, torch.inf: 2}
    nothing = best_spans(start, end, torch.zeros_like(inside), threshold=torch.inf)
    assert nothing.start.item() == nothing.end.item() == 0  # a row without context has no answer whatever the threshold


def test_logits_of_half_precision_and_an_empty_batch_are_fine():
    start = torch.tensor([[0.0, 5.0, 1.0]], dtype=torch.bfloat16)
    assert best_spans(start, start, torch.tensor([[False, True, True]])).start.item() == 1
    empty = best_spans(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool))
    assert empty.start.shape == empty.score.shape == (0,)


def test_logits_of_other_shapes_and_lengths_below_one_are_refused():
    with pytest.raises(ValueError, match=r"one shape \(B, S\)"):
        best_spans(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        best_spans(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), max_length=0)


def test_what_was_encoded_is_decoded_with_the_space_between_its_tokens():
    start, end = token_span(OFFSETS, INSIDE, (5, 17))
    logits = [torch.full((1, len(OFFSETS)), -1.0) for _ in range(2)]
    logits[0][0, start] = logits[1][0, end] = 4.0
    found = best_spans(*logits, torch.tensor([INSIDE]))
    assert span_text(TEXT, OFFSETS, found.start.item(), found.end.item()) == "see at night"
    assert span_text(TEXT, OFFSETS, 0, 0) == ""


@pytest.mark.real_data
def test_the_official_files_have_the_published_counts():
    if not is_available("squad-v2"):
        pytest.skip("squad-v2 is not here: moe-lab data fetch squad-v2, or set MOE_LAB_DATA")
    from moe_lab.datasets.cache import official_file

    train, dev = (read_squad(official_file("squad-v2", f"squad-v2/{part}-v2.0.json")) for part in ("train", "dev"))
    assert (len(train), len(dev)) == (130_319, 11_873)
    assert len({row.title for row in train}) == 442 and sum(row.is_impossible for row in dev) == 5_945
