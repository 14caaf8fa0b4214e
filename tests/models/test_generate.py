"""Sampling draws from the model's distribution; beam search finds what enumeration and arithmetic by hand find."""

import itertools
import math

import pytest
import torch
from torch import nn

from moe_lab.datasets.tokens import END, MASK, PAD, START, UNKNOWN
from moe_lab.gates import SwitchGate
from moe_lab.models.generate import beam_search, sample
from moe_lab.models.language import LanguageModel, TransformerSize, Translator
from moe_lab.models.transformer import Attention

V, S, D = 12, 10, 16
SPECIAL_FOR_SAMPLING = (PAD, START, MASK, UNKNOWN)


def sharpened(model, seed):
    """Random weights, large where position and attention work: the tied output layer alone repeats the last token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.embedding.token.weight.normal_(0.0, 0.7, generator=generator)
        model.embedding.position.weight.normal_(0.0, 2.0, generator=generator)
        for module in model.modules():
            if isinstance(module, Attention):
                module.query.weight.mul_(3)
                module.out.weight.mul_(8)
    return model


def gpt(seed=0, *, vocabulary=V, length=S, moe=True, dropout=0.0):
    torch.manual_seed(seed)
    size = TransformerSize(vocabulary, length, layers=2, width=D, heads=2, dropout=dropout, moe_every=2 if moe else 0)
    return sharpened(LanguageModel(size, causal=True, make_gate=lambda i: SwitchGate(D, 3)), seed)


def translator(seed=0, *, vocabulary=V, length=S, dropout=0.0):
    torch.manual_seed(seed)
    size = TransformerSize(vocabulary, length, layers=2, width=D, heads=2, dropout=dropout, moe_every=2)
    return sharpened(Translator(size, make_gate=lambda i: SwitchGate(D, 3)), seed)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts(rows=3, length=4, seed=0, vocabulary=V):
    return torch.randint(5, vocabulary, (rows, length), generator=seeded(seed))


def sources(lengths=(3, 7, 1, 5), seed=0, vocabulary=V):
    rows = torch.full((len(lengths), max(lengths)), PAD)
    for row, n in zip(rows, lengths, strict=True):
        row[:n] = torch.randint(3, vocabulary, (n,), generator=seeded(seed + n))
        row[n - 1] = END
    return rows


def same_translation(a, b):
    """Equal up to the padding behind."""
    return a[a != PAD].tolist() == b[b != PAD].tolist()


# Sampling


def test_temperature_zero_is_a_loop_of_argmax_over_the_last_window():
    model, prompt = gpt().eval(), prompts()
    expected = prompt
    with torch.no_grad():
        for _ in range(14):  # the window of 10 moves
            logits = model(expected[:, -S:])[0][:, -1]
            logits[:, list(SPECIAL_FOR_SAMPLING)] = -math.inf
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), 1)
    drawn = sample(model, prompt, 14, temperature=0)
    assert torch.equal(drawn, expected) and torch.equal(drawn[:, :4], prompt)
    assert len(drawn[:, 4:].unique()) > 3


def test_what_is_before_the_last_window_is_not_read():
    model, prompt = gpt(), prompts(50, S + 3)
    new = sample(model, prompt, 6, generator=seeded())[:, -6:]
    assert torch.equal(sample(model, prompt[:, -S:], 6, generator=seeded())[:, -6:], new)
    for place, is_equal in ((slice(0, 3), True), (slice(3, 8), False)):
        changed = prompt.clone()
        changed[:, place] = 5 + (changed[:, place] - 4) % (V - 5)
        assert torch.equal(sample(model, changed, 6, generator=seeded())[:, -6:], new) == is_equal


@pytest.mark.parametrize("options", [{"temperature": 1e-30}, {"top_k": 1}])
def test_no_temperature_and_one_candidate_are_greedy(options):
    model, prompt = gpt(), prompts()
    greedy = sample(model, prompt, 8, temperature=0)
    assert torch.equal(sample(model, prompt, 8, generator=seeded(), **options), greedy)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (2.0, None), (1.0, 3), (0.7, 5)])
def test_frequencies_are_the_models_probabilities(temperature, top_k):
    n, model = 20_000, gpt(moe=False)
    prompt = prompts(1)
    with torch.no_grad():
        logits = model.eval()(prompt)[0][0, -1].double()
    logits[list(SPECIAL_FOR_SAMPLING)] = -math.inf
    if top_k is not None:
        logits[logits.argsort(descending=True)[top_k:]] = -math.inf
    p = (logits / temperature).softmax(-1)
    drawn = sample(model, prompt.expand(n, -1), 1, temperature=temperature, top_k=top_k, generator=seeded(3))[:, -1]
    share = torch.bincount(drawn, minlength=V) / n
    assert (share[p == 0] == 0).all()
    assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-6).all()


def test_the_generator_alone_decides():
    model, prompt = gpt(), prompts()
    one, again, other = (sample(model, prompt, 10, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    sample(model, prompt, 2, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_forbidden_tokens_never_come_and_others_do():
    model, prompt = gpt(), prompts(50)
    new = sample(model, prompt, 12, temperature=50.0, generator=seeded())[:, 4:]
    assert not set(new.unique().tolist()) & set(SPECIAL_FOR_SAMPLING)
    assert set(new.unique().tolist()) == set(range(V)) - set(SPECIAL_FOR_SAMPLING)
    everything = sample(model, prompt, 12, temperature=50.0, generator=seeded(), forbidden=())[:, 4:]
    assert set(everything.unique().tolist()) == set(range(V))
    only = sample(model, prompt, 3, forbidden=[i for i in range(V) if i != 7])[:, 4:]
    assert (only == 7).all()


def test_sampling_is_without_dropout_and_leaves_the_modes_alone():
    model, prompt = gpt(dropout=0.5), prompts()
    model.train()
    model.body.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    drawn = sample(model, prompt, 5, temperature=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(drawn, sample(model.eval(), prompt, 5, temperature=0)) and not drawn.requires_grad
    assert torch.equal(sample(model, prompt, 0), prompt)


def test_sampling_explains_mistakes():
    model, prompt = gpt(), prompts()
    for options, message in (
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"forbidden": range(V)}, "forbidden"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(model, prompt, 1, **options)
    with pytest.raises(ValueError, match="n_new"):
        sample(model, prompt, -1)
    for empty in (prompt[:, :0], prompt[0]):
        with pytest.raises(ValueError, match="prompt"):
            sample(model, empty, 1)
    encoder = LanguageModel(TransformerSize(V, S, layers=1, width=D, heads=2, moe_every=0), causal=False)
    with pytest.raises(ValueError, match="causal=True"):
        sample(encoder, prompt, 1)


# Beam search


def argmax_loop(model, source, max_length):
    """One sentence, written down as plainly as possible."""
    seen, tokens = torch.ones_like(source, dtype=torch.bool), [START]
    with torch.no_grad():
        memory, _ = model.encode(source, seen)
        while len(tokens) <= max_length and tokens[-1] != END:
            logits, _ = model.decode(torch.tensor([tokens]), None, memory, seen)
            logits[..., [PAD, START]] = -math.inf
            tokens.append(int(logits[0, -1].argmax()))
    return torch.tensor(tokens[1:])


def log_probability(model, source, tokens):
    """Teacher forcing of one sentence."""
    seen, target = torch.ones_like(source, dtype=torch.bool), torch.tensor([[START, *tokens[:-1]]])
    with torch.no_grad():
        log_p = model(source, seen, target, torch.ones_like(target, dtype=torch.bool))[0].log_softmax(-1)
    return float(log_p[0, range(len(tokens)), list(tokens)].sum())


@pytest.mark.parametrize("seed", range(6))
def test_one_beam_is_a_loop_of_argmax(seed):
    model, source = translator(seed).eval(), sources(seed=seed)
    got = beam_search(model, source, beam=1, max_length=8)
    for row, sentence in zip(got, source, strict=True):
        assert same_translation(row, argmax_loop(model, sentence[sentence != PAD].unsqueeze(0), 8))


@pytest.mark.parametrize(("vocabulary", "longest"), [(5, 4), (6, 3)])
def test_a_beam_that_leaves_nothing_out_finds_the_best_of_all_sentences(vocabulary, longest):
    words = range(3, vocabulary)
    sentences = [(*body, END) for n in range(longest) for body in itertools.product(words, repeat=n)]
    found, missed = set(), 0
    for seed in range(4):
        model = translator(seed, vocabulary=vocabulary).eval()
        source = sources((3, 5), seed, vocabulary)
        scores = [{y: log_probability(model, x[x != PAD].unsqueeze(0), y) for y in sentences} for x in source]
        greedy = beam_search(model, source, beam=1, max_length=longest)
        for alpha in (0.0, 1.0):
            got = beam_search(model, source, beam=vocabulary**longest, max_length=longest, length_penalty=alpha)
            for row, first, log_p in zip(got, greedy, scores, strict=True):
                best = max(log_p, key=lambda y: log_p[y] / len(y) ** alpha)
                assert tuple(row[row != PAD].tolist()) == best
                found.add(best)
                missed += tuple(first[first != PAD].tolist()) != best
    assert len(found) > 3 and missed > 3  # otherwise there was little to find


@pytest.mark.parametrize("beam", [1, 3])
def test_a_translation_does_not_depend_on_its_neighbours(beam):
    model, source = translator(1).eval(), sources((3, 7, 1, 5, 7, 2), seed=2)
    together = beam_search(model, source, beam=beam, max_length=9)
    assert len({tuple(row.tolist()) for row in together}) > 2
    for row, sentence in zip(together, source, strict=True):
        alone = beam_search(model, sentence[sentence != PAD].unsqueeze(0), beam=beam, max_length=9)
        assert same_translation(row, alone[0])
    backwards = beam_search(model, source.flip(0), beam=beam, max_length=9)
    assert torch.equal(backwards.flip(0), together)
    wider = torch.nn.functional.pad(source, (0, 2), value=PAD)
    assert torch.equal(beam_search(model, wider, beam=beam, max_length=9), together)


def test_rows_end_with_one_end_and_padding():
    model, source = translator(3), sources((4, 6, 2, 7, 5), seed=4)
    for beam in (1, 4):
        rows = beam_search(model, source, beam=beam, max_length=S)
        assert rows.shape[1] <= S and (rows != PAD).any(0).all() and not (rows == START).any()
        for row in rows:
            tokens = row[row != PAD].tolist()
            assert row.tolist() == tokens + [PAD] * (len(row) - len(tokens))
            assert END not in tokens[:-1] and (tokens[-1] == END or len(tokens) == S)


class Markov(nn.Module):
    """The next token depends on the last one only: a table of probabilities in a translator's clothes."""

    def __init__(self, table):
        super().__init__()
        self.size = TransformerSize(len(table), S)
        self.log_p = torch.tensor(table, dtype=torch.float32).log()
        self.embedding = Logits(self.log_p)
        self.asked = []

    def encode(self, source, seen):
        self.asked.append(seen)
        return torch.zeros(*source.shape, 1), []

    def decoder(self, x, *others):
        return x, []


class Logits(nn.Module):
    def __init__(self, log_p):
        super().__init__()
        self.log_p = log_p

    def forward(self, tokens):
        return self.log_p[tokens]

    def logits(self, hidden):
        return hidden


A, B, C = 3, 4, 5
NEVER = [0, 0, 1, 0, 0, 0]


def table(**rows):
    """After <s>, a, b, c: the probabilities of </s>, a, b, c."""
    after = {START: rows["start"], A: rows["a"], B: rows["b"], C: rows["c"]}
    return [[0, 0, *after[i]] if i in after else NEVER for i in range(6)]


SOMETHING = torch.tensor([[A, END]])


def test_two_beams_see_behind_the_better_first_word():
    # Greedy: a </s> = 0.6 * 0.5 = 0.3.   Better: b </s> = 0.4 * 1.
    model = Markov(table(start=[0, 0.6, 0.4, 0], a=[0.5, 0.3, 0.2, 0], b=[1, 0, 0, 0], c=[1, 0, 0, 0]))
    options = {"max_length": 6, "length_penalty": 0.0}
    assert beam_search(model, SOMETHING, beam=1, **options).tolist() == [[A, END]]
    assert beam_search(model, SOMETHING, beam=2, **options).tolist() == [[B, END]]


def test_the_length_penalty_decides_between_short_and_long():
    # </s>: log 0.4 = -0.92.   a b </s>: log(0.6 * 0.6) = -1.02, per token -0.34.
    model = Markov(table(start=[0.4, 0.6, 0, 0], a=[0, 0, 0.6, 0.4], b=[1, 0, 0, 0], c=[0.5, 0.5, 0, 0]))
    assert beam_search(model, SOMETHING, beam=2, max_length=6, length_penalty=0.0).tolist() == [[END]]
    assert beam_search(model, SOMETHING, beam=2, max_length=6, length_penalty=1.0).tolist() == [[A, B, END]]
    # -0.92 = -1.02 / 3^alpha at alpha = log(1.02 / 0.92) / log 3 = 0.0992
    edge = math.log(math.log(0.36) / math.log(0.4)) / math.log(3)
    assert beam_search(model, SOMETHING, beam=2, max_length=6, length_penalty=edge - 0.01).tolist() == [[END]]
    assert beam_search(model, SOMETHING, beam=2, max_length=6, length_penalty=edge + 0.01).tolist() == [[A, B, END]]


def test_a_sentence_is_decided_when_as_many_hypotheses_as_beams_have_finished():
    # </s>: log 0.6 = -0.51.   a b </s>: log 0.4 = -0.92, per token -0.31: better, but one beam has ended by then.
    model = Markov(table(start=[0.6, 0.4, 0, 0], a=[0, 0, 1, 0], b=[1, 0, 0, 0], c=[1, 0, 0, 0]))
    assert beam_search(model, SOMETHING, beam=1, max_length=6).tolist() == [[END]]
    assert beam_search(model, SOMETHING, beam=2, max_length=6).tolist() == [[A, B, END]]


def test_a_finished_hypothesis_is_kept_although_prefixes_of_higher_probability_follow():
    # </s> = 0.3 finishes first; a a a ... = 0.7 * 0.9 * 0.9 ... stays above it for long, but its endings are below.
    model = Markov(table(start=[0.3, 0.7, 0, 0], a=[0.1, 0.9, 0, 0], b=[1, 0, 0, 0], c=[1, 0, 0, 0]))
    for beam in (2, 4, 20):
        assert beam_search(model, SOMETHING, beam=beam, max_length=8, length_penalty=0.0).tolist() == [[END]]
    assert beam_search(model, SOMETHING, beam=1, max_length=8).tolist() == [[A] * 8]


def test_what_never_ends_is_cut_off_only_where_nothing_ended():
    # From a the text goes round and round; from b it ends, though that is less probable.
    rows = {"a": [0, 1, 0, 0], "b": [1, 0, 0, 0], "c": [1, 0, 0, 0]}
    endless = Markov(table(start=[0, 0.9, 0.1, 0], **rows))
    assert beam_search(endless, SOMETHING, beam=1, max_length=4).tolist() == [[A, A, A, A]]
    assert beam_search(endless, SOMETHING, beam=2, max_length=4).tolist() == [[B, END]]
    assert beam_search(endless, SOMETHING, beam=2, max_length=1).tolist() == [[A]]


def test_the_encoder_runs_once_and_sees_the_real_tokens_only():
    model = Markov(table(**{row: [0.1, 0.3, 0.3, 0.3] for row in ("start", "a", "b", "c")}))
    source = sources(vocabulary=6)
    beam_search(model, source, beam=3, max_length=7)
    assert len(model.asked) == 1 and torch.equal(model.asked[0], source != PAD)


def test_translating_is_deterministic_without_dropout_and_leaves_the_modes_alone():
    model, source = translator(dropout=0.5), sources()
    model.train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    one, two = (beam_search(model, source, max_length=6) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(one, beam_search(model.eval(), source, max_length=6))
    assert torch.equal(torch.random.get_rng_state(), state)
    model.train()
    model.encoder.eval()
    beam_search(model, source, max_length=2)
    assert [module.training for module in model.modules()] == modes


def test_no_sentence_gives_no_translation():
    assert beam_search(translator(), sources()[:0], max_length=3).shape == (0, 0)


def test_other_special_ids_can_be_named():
    model = translator(2)
    rows = beam_search(model, sources(), beam=2, max_length=6, start=6, end=7, pad=PAD)
    assert not (rows == 6).any() and all(7 not in row[row != PAD].tolist()[:-1] for row in rows)


def test_beam_search_explains_mistakes():
    model, source = translator(), sources()
    for options, message in (
        ({"beam": 0}, "beam"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": S + 1}, "model's length"),
        ({"length_penalty": -0.1}, "length_penalty"),
        ({"end": START}, "three ids"),
    ):
        with pytest.raises(ValueError, match=message):
            beam_search(model, source, **{"max_length": 4} | options)
    for wrong in (source[0], torch.full((2, 3), PAD)):
        with pytest.raises(ValueError, match="source"):
            beam_search(model, wrong, max_length=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_texts():
    model, prompt, source = gpt(), prompts(), sources()
    here = sample(model, prompt, 12, temperature=0)
    assert torch.equal(sample(model.cuda(), prompt.cuda(), 12, temperature=0).cpu(), here)
    drawn = sample(model, prompt.cuda(), 5, top_k=3, generator=torch.Generator("cuda").manual_seed(0))
    assert drawn.is_cuda and drawn.shape == (3, 9)
    other = translator(1)
    here = beam_search(other, source, beam=3, max_length=8)
    assert torch.equal(beam_search(other.cuda(), source.cuda(), beam=3, max_length=8).cpu(), here)
