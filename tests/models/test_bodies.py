"""A body is its stem, blocks, poolings and head in a row; padded features; exits of a convolutional network."""

import pytest
import torch
from torch import nn

from moe_lab.exits import MultiExitNetwork, exit_costs
from moe_lab.exits.cost import gate_multiply_adds
from moe_lab.exits.joint import JointExits, Phases
from moe_lab.models import ConvNet, ExitBody, VisionTransformer, t2t_vit_7
from moe_lab.models.t2t_vit import SMALL_SPLITS
from moe_lab.models.vit import PatchStem

SMALL_T2T = {"width": 16, "layers": 3, "heads": 2, "token_width": 8, "n_features": 4, "splits": SMALL_SPLITS}
BODIES = {
    "vit": lambda: VisionTransformer(side=8, channels=2, n_classes=4, width=16, layers=3, heads=2, dropout=0.2),
    "cnn": lambda: ConvNet(side=8, channels=2, n_classes=4, stages=(4, 8), blocks_per_stage=(1, 2)),
    "t2t": lambda: t2t_vit_7(8, 2, 4, **SMALL_T2T),
}
WIDTHS = {"vit": (16, 16, 16), "cnn": (4, 8, 8), "t2t": (16, 16, 16)}


@pytest.fixture(params=BODIES)
def kind(request):
    return request.param


@pytest.fixture
def body(kind):
    """With norms that are not the identity and running statistics that are not 0 and 1."""
    model = BODIES[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for _ in range(3):
            model.train()(2 * torch.randn(16, 2, 8, 8) + 1)
    return model.eval()


def test_logits_are_stem_blocks_last_pooling_and_head_in_a_row(body):
    x = torch.randn(5, 2, 8, 8)
    parts = nn.Sequential(body.stem, *body.blocks, body.pools[-1], body.head)
    assert torch.equal(body(x), parts(x)) and body(x).shape == (5, 4)


def test_features_are_what_hooks_see_behind_every_block_and_zeros_from_there_on(body, kind):
    x, seen = torch.randn(5, 2, 8, 8), []
    hooks = [block.register_forward_hook(lambda module, args, out: seen.append(out)) for block in body.blocks]
    with torch.no_grad():
        body(x)
    for hook in hooks:
        hook.remove()
    features = body.train().features(x)
    assert body.training and not features.requires_grad and body.widths == WIDTHS[kind]
    assert features.shape == (5, len(body.blocks), max(body.widths))
    body.eval()
    for index, (h, pool, width) in enumerate(zip(seen, body.pools, body.widths, strict=True)):
        assert torch.equal(features[:, index, :width], pool(h)) and pool(h).shape == (5, width)
        assert not features[:, index, width:].any()
    assert torch.equal(body.head(features[:, -1, : body.widths[-1]]), body(x))


def test_the_last_exit_of_a_network_with_exits_is_the_body(body):
    x = torch.randn(5, 2, 8, 8)
    linears = [nn.Linear(width, 4) for width in body.widths[:-1]]
    network = MultiExitNetwork(list(body.blocks), body.exit_heads(linears), stem=body.stem).eval()
    logits, gates = network(x)
    assert torch.equal(logits[:, -1], body(x)) and gates.shape == (5, 2)
    features = body.features(x)
    for index, (linear, width) in enumerate(zip(linears, body.widths, strict=False)):
        assert torch.equal(logits[:, index], linear(features[:, index, :width]))


def test_the_gradient_reaches_every_trainable_parameter(kind):
    body = BODIES[kind]().train()
    body(torch.randn(8, 2, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in body.parameters())


def test_a_frozen_body_stays_in_eval_mode_and_does_not_move(body):
    heads = body.exit_heads([nn.Linear(width, 4) for width in body.widths[:-1]])
    network = MultiExitNetwork(list(body.blocks), heads, stem=body.stem, freeze_backbone=True).train()
    body_modules = [module for module in body.modules() if module is not body]
    assert network.training and not any(module.training for module in body_modules if list(module.parameters()))
    assert not any(isinstance(m, nn.Dropout | nn.BatchNorm2d) and m.training for m in network.modules())
    before = {name: value.clone() for name, value in body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    x = torch.randn(8, 2, 8, 8)
    for _ in range(2):
        logits, gates = network(x)
        (logits.square().sum() + gates.sum()).backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())
    assert torch.equal(network(x)[0][:3], network(x)[0][:3])  # no dropout
    torch.testing.assert_close(network(x)[0][:3], network(x[:3])[0])  # no statistics of a batch


def test_padding_changes_no_logit_gets_no_gradient_and_is_cut_off_again():
    body = BODIES["cnn"]().eval()
    x = torch.randn(6, 2, 8, 8)
    features = body.features(x)
    joint = JointExits(3, 8, 4, (0.0, 1.0), torch.tensor([0.3, 0.6, 1.0]), phases=Phases())
    logits = joint.logits(features, body.head(features[:, -1]))
    logits.square().sum().backward()
    assert not joint.weight.grad[:, 0, 4:].any() and joint.weight.grad[:, 0, :4].abs().min() > 0
    linears = body.linears(joint.weight[1], joint.bias[1])
    assert [tuple(layer.weight.shape) for layer in linears] == [(4, 4), (4, 8)]
    network = MultiExitNetwork(list(body.blocks), body.exit_heads(linears), stem=body.stem).eval()
    torch.testing.assert_close(network(x)[0], logits[1])


def test_multiply_adds_of_a_convolutional_network_by_hand():
    """Positions x kernel x channels in x channels out; a stride of 2 quarters the positions; norms are free."""
    body = ConvNet(side=8, channels=3, n_classes=5, stages=(4, 6), blocks_per_stage=1)
    heads = body.exit_heads([nn.Linear(4, 5)])
    costs = exit_costs(list(body.blocks), heads, torch.randn(1, 3, 8, 8), 5, stem=body.stem)
    first = 64 * 9 * 3 * 4 + 2 * 64 * 9 * 4 * 4 + 4 * 5 + gate_multiply_adds(5)
    second = 16 * 9 * 4 * 6 + 16 * 9 * 6 * 6 + 16 * 4 * 6 + 6 * 5  # two convolutions, the shortcut, the head
    assert costs.tolist() == [first, first + second]


def test_a_convolutional_block_is_the_residual_formula():
    block = ConvNet(side=4, channels=1, n_classes=2, stages=(2, 4), blocks_per_stage=1).blocks[1].eval()
    x = torch.randn(3, 2, 4, 4)
    conv1, norm1, _, conv2, norm2 = block.layers
    conv3, norm3 = block.shortcut
    inner = norm2(conv2(norm1(conv1(x)).clamp(min=0)))
    assert torch.equal(block(x), (norm3(conv3(x)) + inner).clamp(min=0)) and block(x).shape == (3, 4, 2, 2)
    same = ConvNet(side=4, channels=1, n_classes=2, stages=(2,), blocks_per_stage=2).blocks[1]
    assert isinstance(same.shortcut, nn.Identity)


@pytest.mark.parametrize("side", [8, 28, 32, 64])
def test_a_convolutional_network_takes_the_usual_sides_and_a_seed_gives_its_weights(side):
    def make(seed):
        return ConvNet(side=side, channels=1, n_classes=3, generator=torch.Generator().manual_seed(seed)).eval()

    body, x = make(1), torch.rand(2, 1, side, side)
    assert body.widths == (32, 32, 64, 64, 128, 128) and body.features(x).shape == (2, 6, 128)
    h = body.stem(x)
    for block, expected in zip(body.blocks, (1, 1, 2, 2, 4, 4), strict=True):
        h = block(h)
        assert h.shape[2:] == (side // expected, side // expected)
    assert torch.equal(make(1)(x), body(x)) and not torch.equal(make(2)(x), body(x))


def test_a_seed_gives_the_vision_transformer_the_weights_it_always_gave():
    """Parts are drawn in the order stem, blocks, norm, head; recorded results rest on it."""
    torch.manual_seed(3)
    body = VisionTransformer(side=8, channels=2, n_classes=4, width=16, layers=1, heads=2)
    torch.manual_seed(3)
    project = nn.Conv2d(2, 16, 4, stride=4)
    token, position = torch.empty(1, 1, 16).normal_(0.0, 0.02), torch.empty(1, 5, 16).normal_(0.0, 0.02)
    linears = [nn.Linear(16, f) for f in (16, 32, 16, 32)] + [nn.Linear(32, 16), nn.Linear(16, 4)]
    assert torch.equal(body.stem.project.weight, project.weight) and torch.equal(body.stem.token, token)
    assert torch.equal(body.stem.position, position) and torch.equal(body.head.weight, linears[-1].weight)
    attention = body.blocks[0].attention
    assert torch.equal(attention.query.weight, linears[0].weight)
    assert torch.equal(attention.key_value.weight, linears[1].weight)
    assert {name.split(".")[0] for name in body.state_dict()} == {"stem", "blocks", "pool", "head"}
    assert all(pool is body.pool for pool in body.pools)


@pytest.mark.parametrize(("channels", "side", "patch"), [(1, 8, 4), (3, 6, 3), (5, 4, 1), (2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_patches_as_rows_of_a_product_are_the_convolution(channels, side, patch, dtype):
    stem, x = PatchStem(side, channels, patch, 7).to(dtype), torch.randn(3, channels, side, side, dtype=dtype)
    exact = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    for images in (x, x.to(memory_format=torch.channels_last), x[:0]):
        patches = stem.patches(images)
        assert patches.shape == (len(images), (side // patch) ** 2 + 1, channels * patch**2) and not patches[:, 0].any()
        torch.testing.assert_close(stem.embed(patches), stem(images), atol=exact, rtol=0)
    weights = torch.randn_like(stem(x))
    found, expected = (
        torch.autograd.grad((h * weights).sum(), list(stem.parameters()))
        for h in (stem.embed(stem.patches(x)), stem(x))
    )
    torch.testing.assert_close(found, expected, atol=20 * exact, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_stem_takes_the_product_and_answers_as_on_a_cpu():
    stem, x = PatchStem(6, 3, 3, 7).double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    expected = stem(x)
    torch.testing.assert_close(stem.cuda()(x.cuda()).cpu(), expected)
    stem.project.forward = None  # is not asked
    assert stem(x.cuda()).shape == (4, 5, 7)


class Wrong(nn.Module):
    def forward(self, x):
        return x[:, :2]


def toy(**changes):
    parts = {"stem": nn.Flatten(), "blocks": [nn.Linear(4, 4), nn.Linear(4, 4)], "pool": nn.Identity()}
    return ExitBody(**{**parts, "head": nn.Linear(4, 3), **changes})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: toy(pool=[nn.Identity()]), "as many poolings and widths, got 1 and 2"),
        (lambda: toy(widths=(4,)), "got 2 and 1"),
        (lambda: toy(blocks=[]), "at least 1"),
        (lambda: toy(widths=(4, 5)), "head reads 4 features, the last exit has 5"),
        (lambda: toy(pool=Wrong()).features(torch.ones(3, 4, 1, 1)), r"pools\[0\] gives \(3, 2\) instead of \(3, 4\)"),
        (lambda: toy().exit_heads([]), "2 exits need 1 linear layers"),
        (lambda: toy().exit_heads([nn.Linear(5, 3)]), r"linears\[0\] reads 5 features, exit 0 has 4"),
        (lambda: toy().linears(torch.ones(1, 5, 3), torch.ones(1, 3)), r"= \(1, 4, 3\)"),
        (lambda: toy().linears(torch.ones(1, 4, 3), torch.ones(2, 3)), "bias"),
        (lambda: BODIES["cnn"]()(torch.ones(1, 3, 8, 8)), r"takes images \(N, 2, 8, 8\), got \(1, 3, 8, 8\)"),
        (lambda: BODIES["vit"]()(torch.ones(1, 2, 8, 12)), "other `channels` and `side`"),
        (lambda: BODIES["t2t"]()(torch.ones(1, 2, 16, 16)), "other `channels` and `side`"),
        (lambda: ConvNet(side=30, channels=1, n_classes=2), "does not halve evenly 2 times: take a multiple of 4"),
        (lambda: ConvNet(side=7, channels=1, n_classes=2, stages=(4, 8)), "multiple of 2"),
        (lambda: ConvNet(side=0, channels=1, n_classes=2), "a side of 0"),
        (lambda: ConvNet(side=8, channels=1, n_classes=2, stages=()), "need stages"),
        (lambda: ConvNet(side=8, channels=1, n_classes=2, blocks_per_stage=(1, 2)), "at least one block in each"),
        (lambda: ConvNet(side=8, channels=1, n_classes=2, blocks_per_stage=0), "at least one block in each"),
    ],
)
def test_parts_and_images_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
