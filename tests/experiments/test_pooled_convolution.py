"""The pooled convolution, by products of patches and by kernels, against torch's layers one group at a time.

The Triton half runs on CUDA, or in Triton's interpreter: TRITON_INTERPRET=1 pytest
tests/experiments/test_pooled_convolution.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap
from torch.nn.functional import conv2d, max_pool2d

from moe_lab.experiments import pooled_launch
from moe_lab.experiments.pooled_convolution import pooled_convolution, pooled_convolution_oracle
from moe_lab.experiments.pooled_launch import Tiles
from moe_lab.triton_support import usable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Operands of the kernels, and the tolerance by norm: on CUDA results, and the gradients that come in, are rounded to
# bfloat16, 2^-9 each; in the interpreter, which cannot multiply bfloat16, only sums differ in their order.
DTYPE, TOLERANCE = (torch.bfloat16, 1e-2) if DEVICE == "cuda" else (torch.float32, 1e-5)
needs_triton = pytest.mark.skipif(
    not usable(torch.empty(1, device=DEVICE)), reason="needs Triton and CUDA, or Triton and TRITON_INTERPRET=1"
)
WAYS = ["patches", pytest.param("kernels", marks=needs_triton)]

# inputs, groups, images, height, width, channels in and out, side of the filter
SHAPES = {
    "an input each, odd rests": (2, 2, 3, 9, 8, 3, 5, 3),
    "one channel, shared input": (1, 3, 2, 10, 9, 1, 5, 5),
    "two inputs of two groups, an even filter": (2, 4, 2, 7, 8, 2, 3, 2),
    "one cell": (1, 1, 1, 6, 6, 1, 1, 5),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small inputs need several tiles, and parts of the sum over cells, and the interpreter few steps."""
    if DEVICE == "cpu":
        for name in pooled_launch.TILES:
            monkeypatch.setitem(pooled_launch.TILES, name, Tiles(16, depth=16, stages=1))


def plain(x, weight, bias, kernel):
    """Group by group."""
    results = []
    for g, (w, b) in enumerate(zip(weight, bias, strict=True)):
        filters = w.unflatten(0, (kernel, kernel, -1)).permute(3, 2, 0, 1)
        z = conv2d(x[g * len(x) // len(weight)].permute(0, 3, 1, 2), filters, b)
        results.append(max_pool2d(z, 2).relu().permute(0, 2, 3, 1))
    return torch.stack(results)


def problem(inputs, groups, images, height, width, c_in, c_out, kernel, dtype, leading=()):
    """x, weight, bias; x and weight are numbers of ``dtype``, the last two float32 (float64 if it is)."""
    precise = torch.promote_types(dtype, torch.float32)
    x = torch.randn(*leading, inputs, images, height, width, c_in).to(DEVICE, dtype)
    weight = (torch.randn(*leading, groups, kernel * kernel * c_in, c_out) / kernel).to(DEVICE, dtype).to(precise)
    return x, weight, torch.randn(*leading, groups, c_out).to(DEVICE, precise)


def with_gradients(function, arguments, kernel, direction=None):
    """The result, a direction, and the gradients of their product."""
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    y = function(*leaves, kernel)
    direction = torch.randn_like(y) if direction is None else direction.to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), leaves)], direction


def exact(arguments):
    return [argument.cpu().double() for argument in arguments]


def close_by_norm(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a.cpu().double() - b).norm() <= tolerance * b.norm()


def setting(way):
    """The function, the dtype of its operands, and a tolerance."""
    if way == "patches":
        return pooled_convolution_oracle, torch.float64, 1e-12
    return pooled_convolution, DTYPE, TOLERANCE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_results_and_all_gradients_are_those_of_torch_s_layers(shape, way, monkeypatch):
    function, dtype, tolerance = setting(way)
    arguments = problem(*shape, dtype)
    kernel = shape[-1]
    found, direction = with_gradients(function, arguments, kernel)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == found[3].dtype == arguments[1].dtype
    expected, _ = with_gradients(plain, exact(arguments), kernel, direction)
    close_by_norm(found, expected, tolerance)
    if way == "kernels":
        assert pooled_launch.kernels_run(arguments[0], arguments[1], kernel)
        for programs in (1, 10**6):  # all cells in one sum; as many sums as tiles
            monkeypatch.setattr(pooled_launch, "PROGRAMS", programs)
            close_by_norm(with_gradients(function, arguments, kernel, direction)[0], expected, tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("own_images", [True, False])
def test_trials_side_by_side_are_each_what_they_are_alone(own_images, way):
    function, dtype, tolerance = setting(way)
    shape = (1, 3, 2, 8, 7, 1, 2, 3)
    x, weight, bias = problem(*shape, dtype, leading=(2,))
    x = x if own_images else x[0]
    leaves = [tensor.clone().requires_grad_() for tensor in (weight, bias)]
    y = vmap(lambda x, w, b: function(x, w, b, 3), in_dims=(0 if own_images else None, 0, 0))(x, *leaves)
    direction = torch.randn_like(y)
    found = torch.autograd.grad((y * direction).sum(), leaves)
    for trial in range(2):
        alone = (x[trial] if own_images else x, weight[trial], bias[trial])
        expected, _ = with_gradients(plain, exact(alone), 3, direction[trial])
        close_by_norm([y[trial].detach(), found[0][trial], found[1][trial]], [expected[0], *expected[2:]], tolerance)


@needs_triton
def test_the_images_of_all_trials_gather_all_their_gradients():
    x, weight, bias = problem(1, 2, 2, 7, 7, 2, 3, 3, DTYPE, leading=(2,))
    x = x[0].requires_grad_()
    y = vmap(lambda w, b: pooled_convolution(x, w, b, 3))(weight, bias)
    direction = torch.randn_like(y)
    (found,) = torch.autograd.grad((y * direction).sum(), x)
    arguments = exact((x, weight.flatten(0, 1), bias.flatten(0, 1)))
    expected, _ = with_gradients(plain, arguments, 3, direction.flatten(0, 1))
    close_by_norm([found], [expected[1]], TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_of_equal_sums_the_first_has_the_gradient_and_cut_cells_have_none(way):
    """An image of ones and filters of ones: all sums are k k = 9 exactly; the second group's bias cuts them off."""
    function, dtype, _ = setting(way)
    x, weight = torch.ones(1, 1, 6, 6, 1, device=DEVICE, dtype=dtype), torch.ones(2, 9, 1, device=DEVICE)
    bias = torch.tensor([[1.0], [-9.0]], device=DEVICE)
    if way == "patches":
        weight, bias = weight.double(), bias.double()
    (y, of_x, of_weight, of_bias), _ = with_gradients(function, (x, weight, bias), 3, torch.ones(2, 1, 2, 2, 1))
    assert y.flatten().tolist() == [10] * 4 + [0] * 4
    assert of_weight.flatten().tolist() == [4] * 9 + [0] * 9 and of_bias.flatten().tolist() == [4, 0]
    rows = torch.tensor([1.0, 1, 2, 1, 1, 0])  # how many of the patches that begin in rows 0 and 2 have this row
    assert torch.equal(of_x.view(6, 6).cpu().float(), rows[:, None] * rows)


@pytest.mark.parametrize("way", WAYS)
def test_a_pixel_that_is_not_a_number_spoils_the_cells_that_see_it_and_no_other_image(way):
    function, dtype, tolerance = setting(way)
    x, weight, bias = problem(2, 2, 2, 8, 8, 1, 2, 3, dtype)
    x[0, 0, 3, 3] = torch.nan
    found, direction = with_gradients(function, (x, weight, bias), 3)
    expected, _ = with_gradients(plain, exact((x, weight, bias)), 3, direction)
    assert torch.equal(found[0].isnan().cpu(), expected[0].isnan())
    assert 0 < found[0].isnan().sum() < found[0][0, 0].numel()
    fine = [tensor[1] for tensor in expected]  # another group with another input
    assert all(tensor.isfinite().all() for tensor in fine)
    close_by_norm([tensor[1] for tensor in found], fine, tolerance)
    close_by_norm([found[0][0, 1]], [expected[0][0, 1]], tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_no_images_have_no_cells_and_gradients_of_zero(way):
    function, dtype, _ = setting(way)
    (y, of_x, of_weight, of_bias), _ = with_gradients(function, problem(1, 2, 0, 8, 8, 1, 3, 3, dtype), 3)
    assert y.shape == (2, 0, 3, 3, 3) and of_x.shape == (1, 0, 8, 8, 1)
    assert of_weight.shape == (2, 9, 3) and not of_weight.any() and of_bias.shape == (2, 3) and not of_bias.any()


@needs_triton
def test_what_the_kernels_cannot_do_is_left_to_patches():
    x, weight, bias = problem(1, 1, 1, 6, 6, 1, 40, 3, DTYPE)
    assert not pooled_launch.kernels_run(x, weight, 3)
    assert not pooled_launch.kernels_run(x.double(), weight[..., :2], 3)
    assert pooled_launch.kernels_run(x, weight[..., :2], 3)
    assert torch.equal(pooled_convolution(x, weight, bias, 3), pooled_convolution_oracle(x, weight, bias, 3))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(1, 16, 70, 36, 36, 1, 10, 5), (4, 4, 70, 16, 16, 10, 20, 5)])
def test_on_a_gpu_the_paper_s_layers_are_within_two_percent_of_float32(shape):
    """Of float32 products of the same numbers: which of four sums wins must not hang on rounding."""
    arguments = problem(*shape, torch.bfloat16)
    assert pooled_launch.kernels_run(arguments[0], arguments[1], 5)
    found, direction = with_gradients(pooled_convolution, arguments, 5)
    expected, _ = with_gradients(plain, [argument.cpu().float() for argument in arguments], 5, direction)
    close_by_norm(found, expected, 2e-2)
    again, _ = with_gradients(pooled_convolution, arguments, 5, direction)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
