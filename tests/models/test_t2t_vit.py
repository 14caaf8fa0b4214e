"""T2T-ViT: performer attention against exact attention, the specification's multiply-adds, the authors' names."""

import math

import pytest
import torch
from scipy.special import gamma, iv
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, unfold

from moe_lab.exits import exit_costs
from moe_lab.models.performer import performer_attention, random_features
from moe_lab.models.t2t_vit import SMALL_SPLITS, SPLITS, T2TViT, sinusoids, t2t_vit_7, t2t_vit_14
from moe_lab.models.t2t_weights import load_official


def phi(x, rows):
    return (x @ rows.T - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(rows))


def performer_as_written(query, key, value, rows, epsilon=0.0):
    """The textbook form: features by their formula, token by token."""
    y = torch.empty_like(value)
    for n in range(len(query)):
        written = phi(key[n], rows).T @ value[n]
        total = phi(key[n], rows).sum(0)
        for i, q in enumerate(phi(query[n], rows)):
            y[n, i] = q @ written / (q @ total + epsilon)
    return y


def tokens(n=2, s=7, e=6, size=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(n, s, e, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("epsilon", [0.0, 1e-8, 0.3])
def test_two_softmaxes_are_the_performer_and_so_are_their_gradients(epsilon):
    query, key, value = (y.requires_grad_() for y in tokens())
    rows = random_features(5, 6, generator=torch.Generator().manual_seed(1)).double()
    fast, slow = (f(query, key, value, rows, epsilon) for f in (performer_attention, performer_as_written))
    torch.testing.assert_close(fast, slow)
    weights = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * weights).sum(), (query, key, value)),
        torch.autograd.grad((slow * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_every_token_reads_a_mean_of_values():
    query, key, _ = tokens(size=3.0)
    rows = random_features(4, 6).double()
    n_tokens = key.shape[1]
    weights = performer_attention(query, key, torch.eye(n_tokens, dtype=torch.float64).expand(2, -1, -1), rows)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, n_tokens, dtype=torch.float64))


def test_long_vectors_neither_overflow_nor_divide_by_zero():
    query, key, value = (y.float() for y in tokens(size=60.0))
    rows = random_features(8, 6)
    assert not performer_as_written(query, key, value, rows).isfinite().all()
    y = performer_attention(query, key, value, rows)
    assert y.isfinite().all() and (y.abs().amax((1, 2)) <= value.abs().amax((1, 2)) + 1e-4).all()
    assert performer_attention(query, key, value, rows, 1e-8).isfinite().all()


def test_the_error_against_exact_softmax_attention_falls_like_one_over_the_root_of_the_number_of_features():
    query, key, value = tokens(s=9, e=8, size=0.25)
    exact = (query @ key.transpose(1, 2)).softmax(-1) @ value
    generator = torch.Generator().manual_seed(4)

    def error(n_features):
        found = [
            performer_attention(query, key, value, random_features(n_features, 8, generator=generator).double())
            for _ in range(20)
        ]
        return float(torch.stack([(y - exact).square().mean() for y in found]).mean().sqrt())

    few, more, many = error(64), error(1024), error(16384)
    assert 2.5 < few / more < 6 and 2.5 < more / many < 6  # 4 = sqrt(16) each
    assert many < 0.02 * float(exact.square().mean().sqrt())


def test_features_estimate_the_softmax_kernel_without_bias():
    query, key, _ = tokens(n=1, s=3, e=4, size=0.4)
    generator = torch.Generator().manual_seed(5)
    rows = random_features(200_000, 4, generator=generator).double()
    torch.testing.assert_close(
        phi(query, rows) @ phi(key, rows).transpose(1, 2), (query @ key.transpose(1, 2)).exp(), rtol=0.02, atol=0
    )


def test_rows_of_one_length_estimate_the_kernel_of_the_sphere_which_is_nearly_a_colder_gaussian():
    """Mean of exp(w . z) over the sphere |w| = r in e dimensions: Gamma(e/2) (2 / r|z|)^(e/2 - 1) I_{e/2-1}(r|z|)."""
    e, m = 64, 32
    generator = torch.Generator().manual_seed(6)
    query, key = 0.2 * torch.randn(2, 4, e, generator=generator, dtype=torch.float64)
    rows = random_features(100_000, e, length=math.sqrt(m), generator=generator).double()  # each as one of the m
    found = (phi(query, rows) * phi(key, rows)).sum(-1)
    length = (query + key).norm(dim=-1).numpy() * math.sqrt(m)
    sphere = gamma(e / 2) * (2 / length) ** (e / 2 - 1) * iv(e / 2 - 1, length)
    kernel = torch.as_tensor(sphere) * (-(query.square().sum(-1) + key.square().sum(-1)) / 2).exp()
    torch.testing.assert_close(found, kernel, rtol=0.02, atol=0)
    torch.testing.assert_close(kernel, (-(query - key).square().sum(-1) / 4).exp(), rtol=0.1, atol=0)


@pytest.mark.parametrize(("m", "e"), [(32, 64), (5, 2), (1, 3)])
def test_random_rows_are_orthogonal_and_drawn_from_their_generator(m, e):
    rows = random_features(m, e, length=2.0, generator=torch.Generator().manual_seed(2))
    for block in rows.split(e):
        torch.testing.assert_close(block @ block.T, 4 * torch.eye(len(block)), atol=1e-5, rtol=0)
    assert torch.equal(rows, random_features(m, e, length=2.0, generator=torch.Generator().manual_seed(2)))
    assert not torch.equal(rows, random_features(m, e, length=2.0, generator=torch.Generator().manual_seed(3)))
    free = random_features(m, e)
    assert free.shape == (m, e)
    for block in free.split(e):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diag().diag(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("make", "n_classes", "first", "last"),
    [(t2t_vit_7, 10, 407.7, 1146.6), (t2t_vit_14, 100, 619.3, 4783.6)],
)
def test_multiply_adds_are_the_specification_s(make, n_classes, first, last):
    """JEI-DNN specification, section 4, millions at 224 px, printed to one decimal.

    It counts one thing more than our performer runs: the denominators, S x m products per performer, (3136 + 784) x 32.
    Ours come out of a logsumexp. With them the numbers agree to the last decimal printed; without, to 0.04 %.
    """
    body = make(224, 3, n_classes).to("meta")
    linears = [nn.Linear(width, n_classes, device="meta") for width in body.widths[:-1]]
    x = torch.empty(1, 3, 224, 224, device="meta")
    costs = exit_costs(list(body.blocks), body.exit_heads(linears), x, n_classes, stem=body.stem)
    millions = (costs + (3136 + 784) * 32) / 1e6
    layers = len(body.blocks)
    expected = torch.linspace(first, last, layers, dtype=torch.float64)
    assert layers == {10: 7, 100: 14}[n_classes]
    torch.testing.assert_close(millions, expected, atol=0.06, rtol=0)  # both ends are rounded to 0.1
    assert (round(float(millions[0]), 1), round(float(millions[-1]), 1)) == (first, last)
    torch.testing.assert_close(costs / 1e6, expected, rtol=4e-4, atol=0)


@pytest.mark.parametrize(("make", "millions"), [(t2t_vit_7, 4.3), (t2t_vit_14, 21.5)])
def test_sizes_are_those_of_the_paper(make, millions):
    """T2T-ViT paper, table 1: parameters in millions, 1000 classes, features and positions included."""
    with torch.device("meta"):
        body = make(224, 3, 1000)
    assert round(sum(value.numel() for value in body.state_dict().values()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("side", "splits", "sides"),
    [(224, SPLITS, [56, 28, 14]), (32, SMALL_SPLITS, [16, 8, 8]), (32, SPLITS, [8, 4, 2]), (8, ((3, 2, 1),), [4])],
)
def test_soft_splits_leave_the_tokens_they_should(side, splits, sides):
    body = t2t_vit_7(side, 1, 2, layers=1, token_width=4, n_features=2, splits=splits).eval()
    assert body.stem.sides == sides
    assert body.stem(torch.rand(1, 1, side, side)).shape == (1, sides[-1] ** 2 + 1, 256)


def small(seed=0, **changes) -> T2TViT:
    sizes = {"side": 16, "channels": 2, "n_classes": 3, "width": 12, "layers": 2, "heads": 2, "ratio": 3}
    options = {"token_width": 8, "n_features": 4, "splits": SMALL_SPLITS}
    return T2TViT(**{**sizes, **options, **changes}, generator=torch.Generator().manual_seed(seed))


def test_the_class_token_moves_with_the_image_and_a_far_pixel_reaches_it():
    body = small().eval()
    x = torch.rand(1, 2, 16, 16)
    other = x.clone()
    other[0, 0, 15, 15] += 1
    assert torch.equal(body.stem(x)[:, 0], body.stem(other)[:, 0])  # before the blocks it knows nothing
    moved = (body.features(x) - body.features(other)).abs().amax(-1)
    assert (moved > 0).all()


def test_positions_and_random_features_are_fixed():
    body = small()
    body(torch.rand(2, 2, 16, 16)).sum().backward()
    fixed = {name for name, _ in body.named_buffers()}
    assert fixed == {"stem.position", "stem.performers.0.rows", "stem.performers.1.rows"}
    assert not any(buffer.requires_grad for buffer in body.buffers())
    assert fixed <= body.state_dict().keys() and not fixed & dict(body.named_parameters()).keys()


def test_positions_by_hand():
    table = sinusoids(3, 5)[0]
    for position in range(3):
        for column, (function, power) in enumerate(
            [(math.sin, 0), (math.cos, 0), (math.sin, 2 / 5), (math.cos, 2 / 5), (math.sin, 4 / 5)]
        ):
            assert float(table[position, column]) == pytest.approx(function(position / 10000**power), abs=1e-6)


def test_dropout_of_the_token_module_is_off_in_eval_mode():
    body, x = small(), torch.rand(2, 2, 16, 16)
    assert not torch.equal(body.train()(x), body(x))
    assert torch.equal(body.eval()(x), body(x))


def test_a_seed_gives_the_weights():
    assert all(torch.equal(a, b) for a, b in zip(small(1).parameters(), small(1).parameters(), strict=True))
    x = torch.rand(2, 2, 16, 16)
    assert not torch.equal(small(1).eval()(x), small(2).eval()(x))


def test_half_precision_keeps_the_exponents_exact():
    body, x = small().eval(), torch.rand(4, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rough = body(x)
    torch.testing.assert_close(rough.float(), body(x), atol=0.02, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 18}, "divide the side by 4, which 18 is not a multiple of"),
        ({"side": 20, "splits": SPLITS}, "divide the side by 16"),
        ({"side": 0}, "which 0 is not"),
        ({"splits": ((3, 2, 0), (3, 2, 1))}, "gives a side of 7 instead of 8: take a padding"),
        ({"splits": ()}, "no soft split"),
        ({"width": 13}, "not divisible by 2 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def official_weights(layers=2, c=2, width=12, e=8, m=4, ratio=3, n_classes=3, n_tokens=17):
    """Random weights under the names and shapes of the authors' state dict."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, n_tokens, width)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (n_classes, width), "head.bias": (n_classes,)}
    shapes |= {"tokens_to_token.project.weight": (width, 9 * e), "tokens_to_token.project.bias": (width,)}
    for index, d in ((1, 9 * c), (2, 9 * e)):
        name = f"tokens_to_token.attention{index}"
        shapes |= {f"{name}.w": (m, e), f"{name}.kqv.weight": (3 * e, d), f"{name}.kqv.bias": (3 * e,)}
        for part, size in (("norm1", d), ("norm2", e)):
            shapes |= {f"{name}.{part}.weight": (size,), f"{name}.{part}.bias": (size,)}
        for part in ("proj", "mlp.0", "mlp.2"):
            shapes |= {f"{name}.{part}.weight": (e, e), f"{name}.{part}.bias": (e,)}
    for index in range(layers):
        name = f"blocks.{index}"
        shapes |= {f"{name}.attn.qkv.weight": (3 * width, width)}
        for part, f, d in (
            ("attn.proj", width, width),
            ("mlp.fc1", ratio * width, width),
            ("mlp.fc2", width, ratio * width),
        ):
            shapes |= {f"{name}.{part}.weight": (f, d), f"{name}.{part}.bias": (f,)}
        for part in ("norm1", "norm2"):
            shapes |= {f"{name}.{part}.weight": (width,), f"{name}.{part}.bias": (width,)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def official_forward(w, x, heads=2, layers=2, splits=SMALL_SPLITS):
    """The architecture from its equations, straight from the authors' names."""

    def dense(name, y):
        return linear(y, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name, y):
        return layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    for index, (window, stride, padding) in enumerate(splits):
        t = unfold(x, window, padding=padding, stride=stride).transpose(1, 2)
        if index < 2:
            name = f"tokens_to_token.attention{index + 1}"
            k, q, v = dense(f"{name}.kqv", norm(f"{name}.norm1", t)).chunk(3, -1)
            t = v + dense(f"{name}.proj", performer_as_written(q, k, v, w[f"{name}.w"], 1e-8))
            t = t + dense(f"{name}.mlp.2", gelu(dense(f"{name}.mlp.0", norm(f"{name}.norm2", t))))
            side = math.isqrt(t.shape[1])
            x = t.transpose(1, 2).reshape(len(x), -1, side, side)
    t = torch.cat((w["cls_token"].expand(len(x), -1, -1), dense("tokens_to_token.project", t)), 1) + w["pos_embed"]
    for index in range(layers):
        name = f"blocks.{index}"
        q, k, v = dense(f"{name}.attn.qkv", norm(f"{name}.norm1", t)).chunk(3, -1)
        d = q.shape[-1] // heads
        parts = [
            (q[..., h] @ k[..., h].transpose(1, 2) / math.sqrt(d)).softmax(-1) @ v[..., h]
            for h in (slice(i * d, (i + 1) * d) for i in range(heads))
        ]
        t = t + dense(f"{name}.attn.proj", torch.cat(parts, -1))
        t = t + dense(f"{name}.mlp.fc2", gelu(dense(f"{name}.mlp.fc1", norm(f"{name}.norm2", t))))
    return dense("head", norm("norm", t)[:, 0])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_under_the_authors_names_give_the_architecture_s_answers(prefix):
    weights = official_weights()
    body = load_official(small(), {prefix + name: value for name, value in weights.items()}).eval()
    x = torch.rand(3, 2, 16, 16)
    torch.testing.assert_close(body(x), official_forward(weights, x), atol=1e-4, rtol=1e-4)
    assert sum(value.numel() for value in weights.values()) == sum(v.numel() for v in body.state_dict().values())


def test_a_body_for_other_classes_keeps_its_own_head():
    body = small(n_classes=5)
    own = body.head.weight.clone()
    weights = official_weights(n_classes=7)
    load_official(body, weights, head=False)
    assert torch.equal(body.head.weight, own) and torch.equal(body.pool.norm.weight, weights["norm.weight"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda w: w.pop("norm.bias"), r"1 names are missing \['norm.bias'\], 0 are unexpected"),
        (lambda w: w.update({"blocks.2.norm1.bias": torch.ones(12)}), r"unexpected \['blocks.2.norm1.bias'\]"),
        (
            lambda w: w.update({"pos_embed": torch.ones(1, 5, 12)}),
            r"pos_embed has shape \(1, 5, 12\), .* \(1, 17, 12\)",
        ),
        (lambda w: w.update({"head.bias": torch.ones(9)}), "head=False keeps"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(changed, message):
    body, weights = small(), official_weights()
    changed(weights)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_official(body, weights)
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())
