"""A model in pieces answers as the model, a torchvision or timm look-alike too; wrong cuts say what to do."""

import copy

import pytest
import torch
from torch import nn

from moe_lab.exits import (
    MultiExitNetwork,
    Pieces,
    check_pieces,
    exit_costs,
    linear_heads,
    merge_blocks,
    multiply_adds,
    split_by_name,
)
from moe_lab.exits.cost import gate_multiply_adds
from moe_lab.exits.heads import Token


class Basic(nn.Module):
    """As torchvision's BasicBlock: child names and functional steps."""

    def __init__(self, d, f, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(d, f, 3, stride, 1, bias=False), nn.BatchNorm2d(f)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(f, f, 3, 1, 1, bias=False), nn.BatchNorm2d(f)
        self.downsample = None
        if stride > 1 or d != f:
            self.downsample = nn.Sequential(nn.Conv2d(d, f, 1, stride, bias=False), nn.BatchNorm2d(f))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class ResNet(nn.Module):
    """As torchvision's: the flatten between avgpool and fc is a function."""

    def __init__(self, widths=(4, 6, 8, 10), n_classes=5):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0])
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        for index, (d, f) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            stage = nn.Sequential(Basic(d, f, 1 if index == 0 else 2), Basic(f, f))
            setattr(self, f"layer{index + 1}", stage)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(widths[-1], n_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class VGG(nn.Module):
    """As torchvision's: nested Sequentials, and the flatten between two of them."""

    def __init__(self):
        super().__init__()
        relu = nn.ReLU()  # one module in several places
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), relu, nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), relu, nn.MaxPool2d(2)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(24, 8), relu, nn.Dropout(), nn.Linear(8, 5))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class MobileNet(nn.Module):
    """As torchvision's MobileNetV2: pooling and flatten are functions."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 6, 3, 2), nn.Conv2d(6, 8, 3))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """As timm's: class token and positions are added in forward, the class token is read by indexing."""

    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 8))
        layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(4)]
        self.blocks, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class Stem(nn.Module):
    """The one that the docstring of `exits.split` shows."""

    def __init__(self, vit):
        super().__init__()
        self.patch_embed, self.cls_token, self.pos_embed = vit.patch_embed, vit.cls_token, vit.pos_embed

    def forward(self, x):
        patches = self.patch_embed(x)
        return torch.cat((self.cls_token.expand(len(x), -1, -1), patches), 1) + self.pos_embed


STAGES = ["layer1", "layer2", "layer3", "layer4"]


def x32(n=3):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def settled(model):
    """With running statistics that are not 0 and 1."""
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


def test_a_resnet_of_torchvision_in_pieces_answers_as_the_model():
    model, x = settled(ResNet()), x32()
    modes = [(m, m.training) for m in model.train().modules()]
    pieces = split_by_name(model, STAGES, example=x)
    assert all(m.training == mode for m, mode in modes)
    model.eval()
    assert torch.equal(pieces(x), model(x))
    assert pieces.blocks == [model.layer1, model.layer2, model.layer3, model.layer4]
    assert list(pieces.stem) == [model.conv1, model.bn1, model.relu, model.maxpool]
    pooling, flatten, fc = pieces.tail
    assert (pooling, fc) == (model.avgpool, model.fc) and isinstance(flatten, nn.Flatten)


def test_with_linear_heads_it_is_a_network_with_exits_whose_last_exit_is_the_model():
    model, x = settled(ResNet()), x32(20)
    pieces = split_by_name(model, STAGES, example=x[:2])
    heads = linear_heads(pieces.blocks[:-1], pieces.stem, x[:2], 5)
    assert [head[-1].in_features for head in heads] == [4, 6, 8]
    heads.append(pieces.tail)
    costs = exit_costs(pieces.blocks, heads, x[:1], 5, stem=pieces.stem)
    whole = multiply_adds(model, x[:1]) + sum(c * 5 for c in (4, 6, 8)) + 3 * gate_multiply_adds(5)
    assert int(costs[-1]) == whole
    network = MultiExitNetwork(pieces.blocks, heads, stem=pieces.stem, costs=costs, freeze_backbone=True).train()
    assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.equal(network(x)[0][:, -1], model(x))
    assert torch.equal(network.predict(x).exits, network.predict_masked(x).exits)


@pytest.mark.parametrize(
    "names",
    [
        ["layer1.0", "layer1.1", "layer3", "layer4.0", "layer4"],
        ["conv1", "layer4"],
        ["layer1", "layer2.0"],
        ["layer1.0", "layer1"],
    ],
)
def test_any_names_in_order_cut_at_the_ends_of_their_modules(names):
    model, x = settled(ResNet()), x32()
    pieces = split_by_name(model, names, example=x)
    assert len(pieces.blocks) == len(names) and torch.equal(pieces(x), model(x))
    for block, name in zip(pieces.blocks, names, strict=True):
        ends, last = model.get_submodule(name), block
        while last is not ends and isinstance(last, nn.Sequential):
            last = last[-1]
        while last is not ends and isinstance(ends, nn.Sequential):
            ends = ends[-1]
        assert last is ends


def test_a_flatten_inside_a_block_is_not_guessed():
    with pytest.raises(ValueError, match="stem, blocks and tail by hand"):
        split_by_name(ResNet(), ["layer4", "fc"], example=x32())


def test_names_go_into_nested_sequentials_and_a_module_may_appear_twice():
    model, x = VGG().eval(), x32()
    pieces = split_by_name(model, ["features.2", "features.5"], example=x)
    assert torch.equal(pieces(x), model(x))
    assert list(pieces.stem) == [model.features[0], model.features[1]] and pieces.blocks[0] is model.features[2]
    assert list(pieces.blocks[1]) == list(model.features[3:])
    deep = split_by_name(nn.Sequential(nn.Sequential(model.features, nn.Flatten())), ["0.0.0", "0.0.3", "0.1"], x)
    assert [len(list(part.modules())) for part in (deep.stem, deep.tail)] == [1, 1]  # nothing before, nothing behind
    conv, middle, end = deep.blocks
    assert conv is model.features[0] and list(middle) == list(model.features[1:4])
    assert list(end)[:2] == list(model.features[4:]) and isinstance(end[2], nn.Flatten)


def test_pieces_share_the_model_s_parameters():
    model = ResNet()
    pieces = split_by_name(model, STAGES)
    owned = nn.ModuleList([pieces.stem, *pieces.blocks, pieces.tail])
    assert {id(p) for p in owned.parameters()} == {id(p) for p in model.parameters()}


def test_a_tail_is_given_where_the_model_pools_by_a_function():
    model, x = MobileNet().eval(), x32()
    names = ["features.0", "features.1", "features.2"]
    with pytest.raises(ValueError, match=r"do not answer as the model does: they stop with .* by hand"):
        split_by_name(model, names, example=x)
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier)
    pieces = split_by_name(model, names, example=x, tail=tail)
    assert pieces.tail is tail and torch.equal(pieces(x), model(x))


def test_a_vision_transformer_of_timm_is_cut_by_hand_and_compared():
    model, x = ViT().eval(), x32(6)[..., :16, :16]
    with pytest.raises(ValueError, match="class token"):
        split_by_name(model, ["blocks.1", "blocks.3"], example=x)
    tail = nn.Sequential(model.norm, Token("class"), model.head)
    pieces = check_pieces(Pieces(Stem(model), list(model.blocks), tail), model, x)
    heads = [*linear_heads(pieces.blocks[:-1], pieces.stem, x, 5), pieces.tail]
    network = MultiExitNetwork(pieces.blocks, heads, stem=pieces.stem, freeze_backbone=True).eval()
    torch.testing.assert_close(network(x)[0][:, -1], model(x))
    without = nn.Sequential(model.norm, Token("mean"), model.head)
    with pytest.raises(ValueError, match="answers differ by up to"):
        check_pieces(Pieces(Stem(model), list(model.blocks), without), model, x)


class Doubling(nn.Module):
    """A step that no child does and no shape shows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.c(2 * self.b(self.a(x)))


class Pair(nn.Sequential):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        (ResNet, ["layer1", "layer5"], "unknown child 'layer5'; did you mean 'layer"),
        (
            ResNet,
            ["layer1.2", "layer2"],
            r"unknown child 'layer1.2'; did you mean 'layer1\..*Valid: layer1.0, layer1.1",
        ),
        (ResNet, ["conv1.weight", "layer2"], "unknown child 'conv1.weight'; did you mean 'conv1'"),
        (ResNet, ["layer1.0.conv1", "layer2"], "inside 'layer1.0', a Basic, which may do more .* Cut at 'layer1.0'"),
        (ResNet, ["layer1", "layer1"], "a name appears twice"),
        (ResNet, ["layer2", "layer1"], "'layer1' runs before 'layer2'"),
        (ResNet, ["layer1", "layer1.0"], "'layer1.0' runs before 'layer1'"),
        (ResNet, ["layer1", "layer1.1"], "'layer1.1' ends where 'layer1' ends"),
        (ResNet, ["layer1"], "at least two names"),
        (ResNet, "layer1", "at least two names"),
        (ResNet, [], "at least two names"),
    ],
)
def test_wrong_names_are_refused(model, names, message):
    with pytest.raises(ValueError, match=message):
        split_by_name(model(), names)


def test_a_step_that_is_no_child_is_found_by_comparing():
    x = torch.randn(4, 3)
    assert len(split_by_name(Doubling(), ["a", "b"]).blocks) == 2  # without an example nothing is run
    with pytest.raises(ValueError, match=r"answers differ by up to .* by hand"):
        split_by_name(Doubling(), ["a", "b"], example=x)
    with pytest.raises(ValueError, match="the model returns a tuple"):
        split_by_name(Pair(nn.Linear(3, 3), nn.Linear(3, 2)), ["0", "1"], example=x)
    shorter = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"return a float32 tensor \(4, 3\), the model a float32 tensor \(4, 2\)"):
        split_by_name(shorter, ["0", "1"], example=x, tail=nn.Identity())


def test_merged_blocks_keep_fewer_exits_and_the_same_answer():
    blocks, x = [nn.Linear(4, 4) for _ in range(5)], torch.randn(3, 4)
    merged = merge_blocks(blocks, (1, 2, 4))
    assert len(merged) == 3 and merged[1] is blocks[2]
    torch.testing.assert_close(nn.Sequential(*merged)(x), nn.Sequential(*blocks)(x), rtol=0, atol=0)
    assert torch.equal(merged[0](x), blocks[1](blocks[0](x)))
    with pytest.raises(ValueError, match="name a block twice"):
        merge_blocks(blocks, (1, 1, 4))


class Out(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_heads_are_made_for_maps_tokens_and_vectors():
    maps, sequence, vector = torch.randn(3, 4, 2, 5), torch.randn(3, 7, 6), torch.randn(3, 2)
    blocks = [Out(maps), Out(sequence), Out(vector)]
    heads = linear_heads(blocks, None, torch.zeros(3), 4)
    plain = [head[-1] for head in heads]
    assert torch.equal(heads[0](maps), plain[0](maps.mean((2, 3))))
    first = sequence[:, 0]
    normed = (first - first.mean(1, keepdim=True)) / (first.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(heads[1](sequence), plain[1](normed))
    assert torch.equal(heads[2](vector), plain[2](vector)) and heads[2](vector).shape == (3, 4)
    (mean,) = linear_heads([Out(sequence)], None, torch.zeros(3), 4, token="mean")
    torch.testing.assert_close(mean(sequence), mean[1:](sequence.mean(1)))
    assert all(parameter.requires_grad for head in heads for parameter in head.parameters())


def test_heads_come_from_their_generator_and_move_no_other_draw():
    block = Out(torch.randn(3, 16))

    def weights(seed):
        (head,) = linear_heads([block], None, torch.zeros(3), 4, generator=torch.Generator().manual_seed(seed))
        return head[-1].weight

    before = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert weights(1).abs().max() <= 0.25 and weights(1).abs().max() > 0.2  # 1 / sqrt(16)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((torch.ones(3, 2), torch.ones(3, 2)), r"output of blocks\[1\], a tuple"),
        (torch.ones(3), r"a float32 tensor \(3,\)"),
        (torch.ones(3, 2, 2, 2, 2), r"\(3, 2, 2, 2, 2\)"),
        (torch.ones(3, 2, dtype=torch.int64), "an? int64 tensor"),
    ],
)
def test_an_output_that_no_head_is_known_for_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        linear_heads([Out(torch.ones(3, 2)), Out(value)], None, torch.zeros(3), 4)


def test_a_misspelt_token_is_refused():
    with pytest.raises(ValueError, match="did you mean 'class'"):
        linear_heads([Out(torch.ones(3, 2))], None, torch.zeros(3), 4, token="clas")
    assert "mean" in repr(Token("mean"))


def test_running_the_example_leaves_the_model_as_it_was():
    model = ResNet().train()
    before = copy.deepcopy(model.state_dict())
    pieces = split_by_name(model, STAGES, example=x32())
    linear_heads(pieces.blocks, pieces.stem, x32(), 5)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
