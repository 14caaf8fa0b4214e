"""Who is inside, step by step: the torch version against plain Python, the kernels against the torch version.

The kernels run on CUDA, or in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/exits/test_inside.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_lab.exits import ExitGates, exits_taken, kernels, uncertainty_features
from moe_lab.exits.heads import Token
from moe_lab.exits.inside import Inside, Judged, Record
from moe_lab.exits.token_heads import token_head
from moe_lab.models.vit import ClassToken

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not kernels.usable(torch.empty(1, device=DEVICE)), reason="needs Triton and CUDA, or Triton and TRITON_INTERPRET=1"
)
MODELS = ("direct", "stick_breaking", "cumulative")


def gates(n_gates, seed=0):
    made = ExitGates(n_gates, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.weight.copy_(torch.tensor([4.0, -1.0, 2.0, -1.0]))
        made.bias.fill_(-2.0)
    return made.to(DEVICE)


def inside(n, real, n_classes, made, model="direct", fused=False, costs=None):
    return Inside(Record(n, n_classes, costs, device=DEVICE).begin(real), made, model, fused, costs)


@torch.no_grad()
def leave(state, logits, layer, last):
    """At one exit, by logits (C, K)."""
    state.leave(state.judge([logits], layer, 1, last))


def choose(state, keep):
    """Take rows out without that anybody leaves."""
    nothing = torch.zeros(1, len(state.samples), state.record.probabilities.shape[1], device=DEVICE)
    state.model = "cumulative"  # whoever leaves does so for this exit's gate alone
    return state.leave_and_choose(Judged(nothing, nothing[..., 0].contiguous(), 0, False), keep)


@torch.no_grad()
def run(state, logits):
    """All exits of logits (N, L, K), without taking rows out."""
    for layer in range(logits.shape[1]):
        leave(state, logits[:, layer], layer, layer == logits.shape[1] - 1)
    return state


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("model", MODELS)
def test_samples_leave_where_the_rule_says_with_the_logits_of_that_exit(model, fused):
    made, logits = gates(3), 3 * torch.randn(50, 4, 5).to(DEVICE)
    features = uncertainty_features(logits[:, :3])
    expected = exits_taken(made(features).detach().sigmoid(), model)
    costs = torch.tensor([0.1, 0.3, 0.7, 1.0], dtype=torch.float64, device=DEVICE)
    state = run(inside(50, 47, 5, made, model, fused, costs), logits)
    assert state.fused == fused
    answers, (probabilities, exits, cost) = state.record, state.record.answers(47)
    assert torch.equal(answers.exits[:47], expected[:47]) and len(expected.unique()) > 2
    assert (answers.exits[47:50] == -1).all() and (answers.probabilities[47:50] == 0).all()  # padding
    rows = torch.arange(47, device=DEVICE)
    torch.testing.assert_close(answers.probabilities[:47], logits[rows, expected[:47]].softmax(-1))
    assert torch.equal(answers.cost[:47], costs[expected[:47]]) and not answers.cost[47:50].any()
    assert (state.samples == -1).all()
    total, answered = state.record.checks.tolist()
    assert answered == 47 and not math.isnan(total)
    assert torch.equal(exits, answers.exits[:47]) and torch.equal(probabilities, answers.probabilities[:47])
    answers.memory.zero_()
    assert torch.equal(exits, expected[:47]) and probabilities.any(1).all() and torch.equal(cost, costs[exits])


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("where", [(3, 0), (3, 3)])
def test_nan_is_seen_by_the_check_but_not_that_of_padding(fused, where):
    made, logits = gates(3), torch.randn(8, 4, 3, device=DEVICE)
    made.bias.data.fill_(-9.0)  # everybody goes to the last exit
    for row, bad in ((where[0], True), (7, False)):
        poisoned = logits.clone()
        poisoned[row, where[1], 1] = torch.nan
        state = run(inside(8, 7, 3, made, fused=fused), poisoned)
        total, answered = state.record.checks.tolist()
        assert math.isnan(total) == bad and answered == 7 and state.record.cost is None


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_triton)])
def test_samples_that_found_no_place_are_not_counted_as_answered(fused):
    made, h = gates(2), torch.randn(40, 2, device=DEVICE)
    made.bias.data.fill_(-9.0)  # nobody leaves early
    state = inside(40, 33, 3, made, fused=fused)
    state.move(h, choose(state, 20), may_write=fused)
    run(state, torch.randn(20, 3, 3, device=DEVICE))
    assert state.record.checks[1] == 20 and not state.record.checks.isnan().any()
    assert (state.record.exits[:40] < 0).tolist() == [False] * 20 + [True] * 20


@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, None])
def test_a_record_is_one_memory_whatever_its_sizes(n_classes, dtype):
    for n in (1, 2, 5, 8):
        record = Record(n, n_classes, None if dtype is None else torch.ones(3, dtype=dtype))
        names = ["exits", "probabilities", "checks", "samples", "given_away"] + (["cost"] if dtype else [])
        parts = [getattr(record, name) for name in names]
        for value, tensor in enumerate(parts, 1):
            tensor.fill_(value)
        assert all((tensor == value).all() for value, tensor in enumerate(parts, 1))
        assert {tensor.untyped_storage().data_ptr() for tensor in parts} == {record.memory.data_ptr()}
        assert record.probabilities.shape == (n + 1, n_classes) and len(record.exits) == n + 1
        assert record.cost is None if dtype is None else (record.cost.dtype, len(record.cost)) == (dtype, n + 1)


def test_a_record_begins_anew_whatever_was_in_it_and_a_copy_is_its_own():
    record = Record(5, 3, torch.ones(3))
    for count in (5, 2, 0, 5):
        record.memory.fill_(0x5A)
        assert record.begin(count) is record
        copy, answers = record.copy(), record.answers(count)
        record.memory.fill_(0x5A)
        assert [len(part) for part in answers] == [count] * 3 and (answers[1] == -1).all() and not answers[0].any()
        assert copy.samples.tolist() == [*range(count)] + [-1] * (5 - count) and (copy.exits == -1).all()
        assert not any(part.any() for part in (copy.probabilities, copy.checks, copy.given_away, copy.cost))


def by_hand(samples, keep):
    """Places of the rows that end in the first ``keep``, as the module's text says."""
    source = list(range(keep))
    tails = [i for i in range(keep, len(samples)) if samples[i] >= 0]
    for i in range(keep):
        if samples[i] < 0 and tails:
            source[i] = tails.pop(0)
    return source


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_triton)])
@settings(deadline=None, max_examples=15 if kernels.INTERPRETED else 60)
@given(st.lists(st.booleans(), min_size=2, max_size=40), st.data())
def test_gaps_are_filled_from_behind_and_others_stay(fused, alive, data):
    keep = data.draw(st.integers(1, len(alive) - 1))
    n = len(alive)
    state = inside(n, n, 3, gates(2), fused=fused)
    samples = [i if there else -1 for i, there in enumerate(alive)]
    state.samples = torch.tensor(samples, dtype=torch.int32, device=DEVICE)
    state.given_away = torch.arange(n, dtype=torch.float32, device=DEVICE) / 7
    h = torch.randn(n, 3, 5, device=DEVICE)
    before, given_away = h.clone(), state.given_away.clone()
    source = by_hand(samples, keep)
    found = state.move(h, choose(state, keep), may_write=True)
    assert torch.equal(found, before[source]) and state.samples.tolist() == [samples[i] for i in source]
    assert torch.equal(state.given_away, given_away[source])
    if fused:
        assert found.data_ptr() == h.data_ptr()  # in place


def test_nothing_is_written_over_unless_it_may_be():
    state = inside(4, 4, 3, gates(2))
    state.samples = torch.tensor([-1, 1, 2, 3], dtype=torch.int32, device=DEVICE)
    h = torch.randn(4, 2, device=DEVICE)
    before = h.clone()
    assert torch.equal(state.move(h, choose(state, 3)), before[[3, 1, 2]]) and torch.equal(h, before)


@needs_triton
@pytest.mark.parametrize("n_classes", [2, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_triton_decides_like_torch(n_classes, dtype, model):
    made = gates(1)
    made.bias.data.fill_(math.log(n_classes) - 4)
    logits = 4 * torch.randn(70, 2, n_classes, device=DEVICE).to(dtype)
    logits[:3, 0] = torch.tensor([[60.0, -60.0] + [-60.0] * (n_classes - 2), [0.0] * n_classes, [5.0] * n_classes])
    first, second = (inside(70, 66, n_classes, made, model, fused) for fused in (True, False))
    with torch.no_grad():
        leave(first, logits[:, 0], 0, False)
        leave(second, logits[:, 0], 0, False)
    torch.testing.assert_close(first.given_away, second.given_away, atol=2e-6, rtol=2e-5)
    assert torch.equal(first.samples, second.samples) and first.record.checks[1] == second.record.checks[1]
    assert torch.equal(first.record.exits[:70], second.record.exits[:70])
    torch.testing.assert_close(first.record.probabilities[:70], second.record.probabilities[:70], atol=2e-6, rtol=2e-5)


def token_heads_and_inputs(n_exits, n_classes, width, dtype, rows=37):
    """Positions behind the class token are NaN: they must not be read."""
    heads, hs = [], []
    for layer in range(n_exits):
        norm, linear = nn.LayerNorm(width, eps=10.0 ** (-3 - layer)), nn.Linear(width, n_classes)
        nn.init.normal_(norm.weight, 3.0)
        nn.init.normal_(norm.bias)
        heads.append(nn.Sequential(ClassToken(norm), linear).to(DEVICE, dtype))
        hs.append(torch.full((rows, 3, width), torch.nan, device=DEVICE, dtype=dtype))
        hs[-1][:, 0] = 5 * torch.randn(rows, width) + 2
    return heads, hs


HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


@needs_triton
@pytest.mark.parametrize(("n_classes", "width"), [(2, 6), (10, 48), (33, 100), (10, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("last", [False, True])
def test_triton_reads_the_class_token_like_the_head(n_classes, width, dtype, last):
    """Rows and widths that fill no block."""
    made = gates(1)
    made.bias.data.fill_(math.log(n_classes) - 3)
    (head,), (h,) = token_heads_and_inputs(1, n_classes, width, dtype)
    first, second = (inside(37, 33, n_classes, made, fused=fused) for fused in (True, False))
    with torch.no_grad():
        first.leave(first.judge_tokens([h], [token_head(head, n_classes)], 0, last))
        leave(second, head(h), 0, last)
    rough = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(first.given_away, second.given_away, atol=rough, rtol=rough)
    unsure = (2 * second.given_away - 1).abs() < 4 * rough  # rounding decides about them
    assert last or 0 < (second.samples[:33] < 0).sum() < 33
    assert (first.samples == second.samples)[~unsure | last].all() and unsure.sum() < 8
    alike = (first.samples == second.samples).nonzero().squeeze(1)
    for found, expected in zip(first.record.answers(37)[:2], second.record.answers(37)[:2], strict=True):
        torch.testing.assert_close(found[alike], expected[alike], atol=rough, rtol=rough)
    assert not first.record.checks.isnan().any()


@needs_triton
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("skip", "count"), [(0, 2), (1, 3), (0, 5)])
@pytest.mark.parametrize("n_rows", [37, 1030])
def test_several_exits_in_one_kernel_are_one_behind_the_other(model, skip, count, n_rows):
    """Of five exits, all or some; who left at one must not leave again, and costs are of the exit taken."""
    if n_rows > 37 and kernels.INTERPRETED and (skip, model) != (1, "direct"):
        pytest.skip("takes a minute in the interpreter")
    made, costs = gates(4), torch.arange(1.0, 6.0, dtype=torch.float64, device=DEVICE)
    made.bias.data.fill_(-1.5)
    heads, hs = token_heads_and_inputs(5, 10, 48, torch.float32, n_rows)
    token_heads, part = [token_head(head, 10) for head in heads], slice(skip, skip + count)
    first, second = (inside(n_rows, n_rows - 4, 10, made, model, fused, costs) for fused in (True, False))
    with torch.no_grad():
        for layer in range(skip):
            leave(first, heads[layer](hs[layer]), layer, False)
            leave(second, heads[layer](hs[layer]), layer, False)
        first.leave(first.judge_tokens(hs[part], token_heads[part], skip, skip + count == 5))
        for layer in range(skip, skip + count):
            leave(second, heads[layer](hs[layer]), layer, layer == 4)
    assert len(second.record.exits[:33].unique()) > 2
    assert torch.equal(first.samples, second.samples)
    torch.testing.assert_close(first.given_away, second.given_away, atol=1e-5, rtol=1e-5)
    for found, expected in zip(first.record.answers(n_rows), second.record.answers(n_rows), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert first.record.checks[1] == second.record.checks[1]


@needs_triton
@pytest.mark.parametrize(("n_rows", "dtype"), [(37, torch.float32), (37, torch.bfloat16), (1030, torch.float16)])
@pytest.mark.parametrize("last", [False, True])
def test_each_of_several_exits_is_judged_as_if_it_were_alone(n_rows, dtype, last):
    """One warp per row, or a product for 16: whichever, each exit has its own head, norm and gate."""
    made = gates(4)
    made.weight.data += torch.randn_like(made.weight)
    heads, hs = token_heads_and_inputs(3, 10, 48, dtype, n_rows)
    heads, state = [token_head(head, 10) for head in heads], inside(n_rows, n_rows, 10, made, fused=True)
    together = state.judge_tokens(hs, heads, 1, last)
    for index in range(3):
        at_end = last and index == 2
        alone = state.judge_tokens(hs[index : index + 1], heads[index : index + 1], index + 1, at_end)
        assert torch.equal(together.probabilities[index], alone.probabilities[0])
        assert torch.equal(together.gates[index], alone.gates[0]) and alone.gates.any() != at_end


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("last", [False, True])
def test_exits_judged_together_are_decided_one_behind_the_other(fused, last):
    made, logits = gates(4), [3 * torch.randn(40, 5, device=DEVICE) for _ in range(3)]
    together, each = (inside(40, 38, 5, made, fused=fused) for _ in range(2))
    with torch.no_grad():
        together.leave(together.judge(logits, 1, 3, last))
        for index, some in enumerate(logits, 1):
            leave(each, some, index, last and index == 3)
    assert torch.equal(together.samples, each.samples) and torch.equal(together.record.exits, each.record.exits)
    torch.testing.assert_close(together.given_away, each.given_away)
    assert torch.equal(together.record.probabilities[:40], each.record.probabilities[:40])
    assert together.record.checks[1] == each.record.checks[1] == (together.samples[:38] < 0).sum()


@needs_triton
@pytest.mark.parametrize("n_rows", [2, 37, 256, kernels.MOST_ROWS, kernels.MOST_ROWS + 1])
@pytest.mark.parametrize("share", [0.02, 0.4, 1.0])
@pytest.mark.parametrize("sure", [-4.0, -1.5, 0.0])
@torch.no_grad()
def test_leaving_and_closing_up_at_once_is_one_after_the_other(n_rows, share, sure):
    """Nobody, some or nearly everybody leaves; more or fewer than there is room stay."""
    if n_rows > 37 and kernels.INTERPRETED and (sure, share) != (-1.5, 0.4):
        pytest.skip("takes a minute in the interpreter")
    keep, costs = min(max(1, int(share * n_rows)), n_rows - 1), torch.rand(4, device=DEVICE)
    made = gates(3)
    made.bias.data.fill_(sure)
    h, states, found = torch.randn(n_rows, 3, 7 if kernels.INTERPRETED else 700, device=DEVICE), [], []
    logits = [2 * torch.randn(n_rows, 4, device=DEVICE) for _ in range(2)]
    for fused in (True, False):
        state = inside(n_rows, n_rows - n_rows // 9, 4, made, "cumulative", fused, costs)
        states.append(state)
        source = state.leave_and_choose(state.judge(logits, 0, 2, False), keep)
        assert source.dtype == torch.int32
        found.append(state.move(h.clone(), source, may_write=fused))
    first, second = states
    assert torch.equal(*found) and torch.equal(first.samples, second.samples) and len(first.samples) == keep
    torch.testing.assert_close(first.given_away, second.given_away, atol=2e-6, rtol=2e-5)
    assert torch.equal(first.record.exits[:n_rows], second.record.exits[:n_rows])
    assert torch.equal(first.record.cost[:n_rows], second.record.cost[:n_rows])
    torch.testing.assert_close(first.record.probabilities[:n_rows], second.record.probabilities[:n_rows])
    assert first.record.checks[1] == second.record.checks[1]


@needs_triton
def test_the_last_exit_tells_the_host_what_the_checks_are_unless_rows_are_many():
    for n_rows, can in ((37, True), (kernels.MOST_ROWS, True), (kernels.MOST_ROWS + 1, False)):
        state, told = inside(n_rows, n_rows - 3, 3, gates(1), fused=True), torch.full((2,), -1.0)
        told = told.pin_memory() if DEVICE == "cuda" else told
        leave(state, torch.randn(n_rows, 3, device=DEVICE), 0, False)
        assert not state.told
        state.leave(state.judge([torch.randn(n_rows, 3, device=DEVICE)], 1, 1, True), told)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert state.told == can and state.record.checks[1] == n_rows - 3
        assert told.tolist() == (state.record.checks.tolist() if can else [-1.0, -1.0])


@needs_triton
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("row", [3, 36])
def test_nan_in_any_of_several_exits_is_seen_unless_it_is_padding(layer, row):
    made = gates(2)
    made.bias.data.fill_(-9.0)
    heads, hs = token_heads_and_inputs(3, 4, 16, torch.float32)
    hs[layer][row, 0, 1] = torch.nan
    state = inside(37, 33, 4, made, fused=True)
    state.leave(state.judge_tokens(hs, [token_head(head, 4) for head in heads], 0, True))
    total, answered = state.record.checks.tolist()
    assert math.isnan(total) == (row == 3) and answered == 33


@needs_triton
def test_heads_that_do_not_fit_one_kernel_are_left_to_others():
    heads, hs = token_heads_and_inputs(2, 4, 16, torch.float32)
    known, state = [token_head(head, 4) for head in heads], inside(37, 33, 4, gates(1), fused=True)
    assert state.judge_tokens(hs, known, 0, True) is not None
    assert state.judge_tokens(hs, [known[0], None], 0, True) is None
    assert state.judge_tokens([hs[0], hs[1].to(HALF)], known, 0, True) is None
    assert state.judge_tokens([hs[0], hs[1][:, :2].contiguous()], known, 0, True) is None
    assert state.judge_tokens([hs[0], hs[1].transpose(1, 2)], known, 0, True) is None
    assert inside(37, 33, 4, gates(1), fused=False).judge_tokens(hs, known, 0, True) is None


def test_only_a_linear_layer_of_the_normed_class_token_is_one():
    norm, linear, transposed = nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(6, 3)
    transposed.weight = nn.Parameter(torch.randn(6, 3).t())  # a kernel would read it as if it lay there row by row
    assert token_head(nn.Sequential(ClassToken(norm), linear), 3) == (norm, linear)
    assert token_head(nn.Sequential(Token("class"), nn.Sequential(norm, linear)), 3) == (norm, linear)
    for other in (
        nn.Sequential(Token("mean"), norm, linear),
        nn.Sequential(Token("class"), norm, nn.ReLU(), linear),
        nn.Sequential(Token("class"), linear),
        nn.Sequential(Token("class"), nn.LayerNorm(6, bias=False), linear),
        nn.Sequential(Token("class"), norm, nn.Linear(6, 3, bias=False)),
        nn.Sequential(Token("class"), norm, nn.Linear(6, 4)),
        nn.Sequential(Token("class"), norm, nn.Linear(6, 3).double()),
        nn.Sequential(Token("class"), norm, transposed),
        linear,
    ):
        assert token_head(other, 3) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert token_head(nn.Sequential(ClassToken(norm), linear), 3) is None
    norm.register_forward_hook(lambda *_: None)
    assert token_head(nn.Sequential(ClassToken(norm), linear), 3) is None


@needs_triton
@pytest.mark.parametrize(("n", "keep"), [(2600, 1300), (9000, 4700), (4500, 4490), (4500, 7), (4500, 4499)])
def test_triton_closes_up_more_rows_than_one_pass_of_its_program_sees(n, keep):
    states = [inside(n, n, 3, gates(2), fused=fused) for fused in (True, False)]
    alive = torch.rand(n, device=DEVICE) < 0.4
    h = torch.randn(n, 3, device=DEVICE)
    found = []
    for state in states:
        state.samples = torch.where(alive, state.samples, -1)
        found.append(state.move(h.clone(), choose(state, keep), may_write=True))
    assert torch.equal(*found) and torch.equal(states[0].samples, states[1].samples)


def test_gates_of_another_kind_are_asked_themselves():
    class Other(ExitGates):
        pass

    assert not inside(3, 3, 2, Other(2).to(DEVICE), fused=True).fused
    assert not inside(3, 3, 2, ExitGates(2, n_features=5).to(DEVICE), fused=True).fused
