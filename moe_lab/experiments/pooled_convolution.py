"""Convolution, bias, 2 x 2 max-pool and ReLU of many small networks at once.

Legend: G groups (an expert of a trial), N inputs with G / N groups each, B images, C channels, D = k k C.

    y[g, b, i, j, o] = relu( bias[g, o] + max over dy, dx in {0, 1} of
                             sum over u, v, c of x[n, b, 2i + dy + u, 2j + dx + v, c] W[g, (u, v, c), o] )

with n = g N // G, the input of group g.

Where Triton runs, a convolution is three kernels without patches in memory (`pooled_kernels`). It keeps x and, for each
output, one byte: which of the four won, or that ReLU cut it off. Sums, maximum, bias and ReLU are float32; y is rounded
to x's dtype, and so are the filters before and the gradient of x after. The largest is found before any rounding. Of
equal sums the first wins; equal patches have equal sums up to the last bit only, as their terms come in another order.

Elsewhere, and as their oracle, a convolution is a product of patches: K x E grouped convolutions with a handful of
channels each are what cuDNN is slowest at, and a product of stacks is again a product. The price is P x D numbers per
image and group for P positions.

    patches (B, P, D)  ->  patches @ W (D, C)  ->  2 x 2 max-pool  ->  + bias, ReLU

Both run under `torch.func.vmap`; none has second derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_lab.experiments import pooled_launch


class _Patches(torch.autograd.Function):
    """x (G, H, W, C) -> (G, h, w, D'): a row per position, columns (ky, kx, C), then zeros up to D'.

    Padded rows are aligned for the product; as one operation nothing is copied twice. The backward adds each column to
    the pixel that it came from, first along rows, then along columns.
    """

    @staticmethod
    def forward(x: Tensor, kernel: int, padded: int) -> Tensor:
        n_images, height, width, channels = x.shape
        h, w, d = height - kernel + 1, width - kernel + 1, kernel * kernel * channels
        rows = x.new_empty(n_images, h, w, padded)
        rows[..., d:] = 0
        windows = x.unfold(1, kernel, 1).unfold(2, kernel, 1).movedim(3, -1)
        rows[..., :d].view(windows.shape).copy_(windows)
        return rows

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.kernel, _ = inputs
        ctx.shape = x.shape

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (n_images, height, width, channels), kernel = ctx.shape, ctx.kernel
        _, h, w, _ = gradient.shape
        by_column = gradient[..., : kernel * kernel * channels].view(n_images, h, w, kernel, kernel, channels)
        add = torch.ops.aten.unfold_backward
        by_row = add(by_column.transpose(-1, -2), [n_images, h, width, kernel, channels], 2, kernel, 1)
        return add(by_row.transpose(-1, -2), [n_images, height, width, channels], 1, kernel, 1), None, None

    @staticmethod
    def vmap(info, in_dims, x: Tensor, kernel: int, padded: int):
        x = x.movedim(in_dims[0], 0)
        return _Patches.apply(x.flatten(0, 1), kernel, padded).unflatten(0, x.shape[:2]), 0


def _padded(n: int) -> int:
    """The next multiple of 8: 16 bytes of bfloat16."""
    return -(-n // 8) * 8


def _convolution(x: Tensor, weight: Tensor, kernel: int) -> Tensor:
    """x (G, B, H, W, C), weight (G, D, C') -> (G, B, h // 2, w // 2, C'), pooled."""
    groups, n_images = x.shape[:2]
    d, c_out = weight.shape[1:]
    patches = _Patches.apply(x.flatten(0, 1), kernel, _padded(d))
    filters = nn.functional.pad(weight, (0, _padded(c_out) - c_out, 0, _padded(d) - d)).to(x.dtype)
    y = torch.bmm(patches.unflatten(0, (groups, n_images)).flatten(1, 3), filters)
    y = y.view(*patches.shape[:3], _padded(c_out)).permute(0, 3, 1, 2)
    return nn.functional.max_pool2d(y, 2).permute(0, 2, 3, 1)[..., :c_out].unflatten(0, (groups, n_images))


def pooled_convolution_oracle(x: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Tensor:
    """`pooled_convolution` in products of patches."""
    if len(x) == len(weight):
        y = _convolution(x, weight, kernel)
    else:  # the groups of an input look at the same patches: one wide product
        wide = weight.unflatten(0, (len(x), -1))
        y = _convolution(x, wide.transpose(1, 2).flatten(2), kernel)
        y = y.unflatten(-1, (wide.shape[1], -1)).movedim(-2, 1).flatten(0, 1)
    return (y + bias[:, None, None, None]).relu().to(x.dtype)  # a bias in front of the pool would change nothing


class _PooledConvolution(torch.autograd.Function):
    """By the kernels. Its second result, the index, is for the backward only."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
        return pooled_launch.forward(x.contiguous(), weight.contiguous(), bias.contiguous(), kernel)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, ctx.kernel = inputs
        ctx.bias_dtype = bias.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        x, weight, index = ctx.saved_tensors
        known = (x.contiguous(), weight.contiguous(), index.contiguous(), grad.contiguous(), ctx.kernel)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = pooled_launch.image_gradient(*known)
        if any(ctx.needs_input_grad[1:3]):
            of_weight, of_bias = pooled_launch.weight_gradient(*known)
            of_weight, of_bias = of_weight.to(weight.dtype), of_bias.to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None

    @staticmethod
    def vmap(info, in_dims, x: Tensor, weight: Tensor, bias: Tensor, kernel: int):
        n, batched = info.batch_size, []
        for tensor, dim in zip((x, weight, bias), in_dims, strict=False):
            if dim is not None:
                tensor = tensor.movedim(dim, 0).flatten(0, 1)
            elif tensor is not x or len(x) > 1:  # the one input of all groups stays one
                tensor = tensor.expand(n, *tensor.shape).flatten(0, 1)
            batched.append(tensor)
        results = _PooledConvolution.apply(*batched, kernel)
        return tuple(result.unflatten(0, (n, -1)) for result in results), (0, 0)


def pooled_convolution(x: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Tensor:
    """Convolve ('valid'), add the bias, take the largest of 2 x 2 positions, ReLU.

    An odd last row or column of positions is dropped, as `max_pool2d` does, and has no gradient. The gradient of x is
    in x's dtype, those of weight and bias in theirs.

    Args:
        x: (N, B, H, W, C) in the dtype of the products' operands. On CUDA the kernels take 16-bit numbers only.
        weight: (G, D, C'), rows (ky, kx, C). G is a multiple of N: groups g N // G = n look at x[n].
        bias: (G, C').
        kernel: k, the side of a filter.

    Returns:
        (G, B, (H - k + 1) // 2, (W - k + 1) // 2, C') in x's dtype.
    """
    if pooled_launch.kernels_run(x, weight, kernel):
        return _PooledConvolution.apply(x, weight, bias, kernel)[0]
    return pooled_convolution_oracle(x, weight, bias, kernel)
