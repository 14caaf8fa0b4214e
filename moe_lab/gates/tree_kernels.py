"""The Triton code of `comet_kernels`, which says what is computed, for which sizes, and starts the two kernels."""

from __future__ import annotations

from functools import partial

from moe_lab.triton_support import jit, tl, triton

# n_tokens is the stride of rows; were it known to be a multiple of 16, Triton would give each thread four tokens of a
# row to load, and every step from level to level would go through shared memory.
_launched = jit if triton is None else partial(triton.jit, do_not_specialize=("n_tokens",))


@jit
def _unit(z, inverse_gamma):
    u = tl.maximum(z * inverse_gamma + 0.5, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(u, 1.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def _step(z, inverse_gamma):
    u = _unit(z, inverse_gamma)
    return u * u * (3 - 2 * u)


@jit
def _slope(z, inverse_gamma):
    u = _unit(z, inverse_gamma)
    return 6 * inverse_gamma * u * (1 - u)


@jit
def _at(base, first, offset, tree, t, n_tokens, K: tl.constexpr):
    """Addresses of (ROWS, TOKENS) numbers: rows first + offset (ROWS,) of one tree, K rows for each node."""
    row = (first * K + tree + tl.zeros((1,), tl.int64)) * n_tokens  # 64 bits once, not for every row: fewer registers
    return base + row[:, None] + (offset * (K * n_tokens))[:, None] + t[None, :]


@jit
def _split_logits(logits, bias, first, tree, t, n_tokens, E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """z of ROWS consecutive splits, and which of them exist: behind split E - 2 come leaves."""
    i = tl.arange(0, ROWS)
    exists = (first + i < E - 1)[:, None]
    z = tl.load(_at(logits, first, i, tree, t, n_tokens, K), mask=exists & (t < n_tokens)[None, :], other=0.0)
    return z + tl.load(bias + (first + i) * K + tree, mask=first + i < E - 1, other=0.0)[:, None], exists


@jit
def _go(z, exists, inverse_gamma):
    """S(z) and S(-z). A leaf one level above the lowest gets a child to the left: itself."""
    return tl.where(exists, _step(z, inverse_gamma), 1.0), tl.where(exists, _step(-z, inverse_gamma), 0.0)


@jit
def _children(left, right, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    return tl.join(left, right).permute(0, 2, 1).reshape(2 * ROWS, TOKENS)


@jit
def _leaves(subtree, E: tl.constexpr, TOP: tl.constexpr, LEVELS: tl.constexpr):
    """The first leaf of a subtree at depth TOP; what is added to it at each place below; which places are leaves."""
    i, lower = tl.arange(0, 1 << LEVELS), 2 * E - (1 << (TOP + LEVELS))  # leaves on the lowest level
    first = subtree << LEVELS
    if lower == E:
        offset, exists = i, i >= 0
    else:  # behind them come the leaves one level higher, each in place of two
        place = first + i
        exists = (place < lower) | (i % 2 == 0)
        first = tl.where(first < lower, first, (lower + first) // 2)
        offset = tl.where(place < lower, place, (lower + place) // 2) - first
    return first, offset, exists[:, None]


@jit
def _arrive(
    logits, bias, subtree, tree, t, n_tokens, inverse_gamma, K: tl.constexpr, TOP: tl.constexpr, TOKENS: tl.constexpr
):
    """(TOKENS,) probability of arriving at a subtree at depth TOP; 0 behind the last token."""
    reach = tl.where(t < n_tokens, 1.0, 0.0)
    for depth in tl.static_range(TOP):
        v = (1 << depth) - 1 + (subtree >> (TOP - depth))
        right = (subtree >> (TOP - 1 - depth)) & 1
        row = v * K + tree
        z = tl.load(logits + row * n_tokens + t, mask=t < n_tokens, other=0.0) + tl.load(bias + row)
        reach *= _step(tl.where(right == 1, -z, z), inverse_gamma)
    return reach


@jit
def _leaf_logits(logits, bias, first, offset, there, tree, t, n_tokens, E: tl.constexpr, K: tl.constexpr):
    a = tl.load(_at(logits, E - 1 + first, offset, tree, t, n_tokens, K), mask=there, other=0.0)
    return a + tl.load(bias + (E - 1 + first + offset) * K + tree)[:, None]


@_launched
def forward_kernel(
    logits, bias, weights, log_mass, shift, entropy, n_tokens, inverse_gamma, eps,
    E: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr, LEVELS: tl.constexpr, ENTROPY: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    highest = tl.full((TOKENS,), -3e38, tl.float32)  # finite, so that no difference of two is NaN
    total, uncertain = tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS,), tl.float32)
    for subtree in range(1 << TOP):
        leaf, offset, there = _leaves(subtree, E, TOP, LEVELS)
        there &= (t < n_tokens)[None, :]
        mass = tl.zeros((1 << LEVELS, TOKENS), tl.float32)
        for tree in range(K):
            reach = _arrive(logits, bias, subtree, tree, t, n_tokens, inverse_gamma, K, TOP, TOKENS)
            if tl.max(reach, 0) > 0:
                p = reach[None, :]
                for level in tl.static_range(LEVELS):
                    first = (((1 << TOP) + subtree) << level) - 1
                    z, exists = _split_logits(logits, bias, first, tree, t, n_tokens, E, K, 1 << level)
                    left, right = _go(z, exists, inverse_gamma)
                    p = _children(p * left, p * right, 1 << level, TOKENS)
                a = tl.where(p > 0, _leaf_logits(logits, bias, leaf, offset, there, tree, t, n_tokens, E, K), -3e38)
                higher = tl.maximum(highest, tl.max(a, 0))
                shrink = tl.exp(highest - higher)
                more = p * tl.exp(a - higher[None, :])
                mass = mass * shrink[None, :] + more
                total = total * shrink + tl.sum(more, 0)
                highest = higher
                if ENTROPY:
                    uncertain -= tl.sum(p * tl.log(p + eps), 0)
        if TOP == 0:
            mass = mass / total[None, :]
        else:
            tl.store(shift + subtree * n_tokens + t, highest, mask=t < n_tokens)
        tl.store(_at(weights, leaf, offset, 0, t, n_tokens, 1), mass, mask=there)
    tl.store(log_mass + t, highest + tl.log(total), mask=t < n_tokens)
    if ENTROPY:
        tl.store(entropy + t, uncertain, mask=t < n_tokens)
    if TOP > 0:  # every subtree was shifted by the highest logit so far; now the highest of all is known
        tl.debug_barrier()
        for subtree in range(1 << TOP):
            leaf, offset, there = _leaves(subtree, E, TOP, LEVELS)
            there &= (t < n_tokens)[None, :]
            at = _at(weights, leaf, offset, 0, t, n_tokens, 1)
            then = tl.load(shift + subtree * n_tokens + t, mask=t < n_tokens, other=0.0)
            scale = tl.exp(then - highest) / total
            tl.store(at, tl.load(at, mask=there, other=0.0) * scale[None, :], mask=there)


@jit
def _leaf_gradients(
    p, leaf, offset, there, logits, bias, grad, log_m, grad_weights, dot, grad_entropy, eps, tree, t, n_tokens,
    E: tl.constexpr, K: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """D; stores the gradient of the leaf logits."""
    a = _leaf_logits(logits, bias, leaf, offset, there, tree, t, n_tokens, E, K)
    g = tl.load(_at(grad_weights, leaf, offset, 0, t, n_tokens, 1), mask=there, other=0.0)
    d = tl.where(p > 0, tl.exp(a - log_m[None, :]) * (g - dot[None, :]), 0.0)
    at = _at(grad, E - 1 + leaf, offset, tree, t, n_tokens, K)
    tl.store(at, (p * d).to(grad.dtype.element_ty), mask=there)
    if ENTROPY:
        d = tl.where(p > 0, d - grad_entropy * (tl.log(p + eps) + p / (p + eps)), 0.0)
    return d


@jit
def _climb(
    reach, root, values, leaf, offset, there, logits, bias, grad, log_m, grad_weights, dot, grad_entropy, eps,
    inverse_gamma, tree, t, n_tokens,
    E: tl.constexpr, K: tl.constexpr, LEVEL: tl.constexpr, LEVELS: tl.constexpr, LEAVES: tl.constexpr,
    ENTROPY: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """V of level LEVEL below ``root``; stores the gradients of all splits below. At the bottom V is D, or ``values``
    if LEAVES is false."""
    if LEVEL < LEVELS:
        first = ((root + 1) << LEVEL) - 1
        z, exists = _split_logits(logits, bias, first, tree, t, n_tokens, E, K, 1 << LEVEL)
        left, right = _go(z, exists, inverse_gamma)
        below = _climb(
            _children(reach * left, reach * right, 1 << LEVEL, TOKENS), root, values, leaf, offset, there, logits, bias,
            grad, log_m, grad_weights, dot, grad_entropy, eps, inverse_gamma, tree, t, n_tokens,
            E, K, LEVEL + 1, LEVELS, LEAVES, ENTROPY, TOKENS,
        )  # fmt: skip
        from_left, from_right = below.reshape(1 << LEVEL, 2, TOKENS).permute(0, 2, 1).split()
        dz = reach * _slope(z, inverse_gamma) * (from_left - from_right)
        at = _at(grad, first, tl.arange(0, 1 << LEVEL), tree, t, n_tokens, K)
        tl.store(at, dz.to(grad.dtype.element_ty), mask=exists & (t < n_tokens)[None, :])
        result = left * from_left + right * from_right
    elif LEAVES:
        result = _leaf_gradients(
            reach, leaf, offset, there, logits, bias, grad, log_m, grad_weights, dot, grad_entropy, eps, tree, t,
            n_tokens, E, K, ENTROPY,
        )  # fmt: skip
    else:
        result = values
    return result


@jit
def _forget(
    grad, subtree, leaf, offset, there, tree, t, n_tokens,
    E: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Exact zeros for all gradients of a subtree."""
    for level in tl.static_range(LEVELS):
        first, i = (((1 << TOP) + subtree) << level) - 1, tl.arange(0, 1 << level)
        at = _at(grad, first, i, tree, t, n_tokens, K)
        exists = (first + i < E - 1)[:, None] & (t < n_tokens)[None, :]
        tl.store(at, tl.zeros(at.shape, grad.dtype.element_ty), mask=exists)
    at = _at(grad, E - 1 + leaf, offset, tree, t, n_tokens, K)
    tl.store(at, tl.zeros(at.shape, grad.dtype.element_ty), mask=there)


@_launched
def backward_kernel(
    logits, bias, weights, log_mass, grad_weights, grad_entropy, grad, n_tokens, inverse_gamma, eps,
    E: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr, LEVELS: tl.constexpr, ENTROPY: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) // K * TOKENS + tl.arange(0, TOKENS)
    tree = tl.program_id(0) % K  # one tree a program: the K programs of a block run together and share their cache
    log_m = tl.load(log_mass + t, mask=t < n_tokens, other=0.0)
    h = tl.load(grad_entropy) / n_tokens if ENTROPY else 0.0
    dot = tl.zeros((TOKENS,), tl.float32)
    for subtree in range(1 << TOP):
        leaf, offset, there = _leaves(subtree, E, TOP, LEVELS)
        there &= (t < n_tokens)[None, :]
        g = tl.load(_at(weights, leaf, offset, 0, t, n_tokens, 1), mask=there, other=0.0)
        dot += tl.sum(g * tl.load(_at(grad_weights, leaf, offset, 0, t, n_tokens, 1), mask=there, other=0.0), 0)
    values = tl.zeros((1 << TOP, TOKENS), tl.float32)
    for subtree in range(1 << TOP):
        leaf, offset, there = _leaves(subtree, E, TOP, LEVELS)
        there &= (t < n_tokens)[None, :]
        reach = _arrive(logits, bias, subtree, tree, t, n_tokens, inverse_gamma, K, TOP, TOKENS)
        if tl.max(reach, 0) > 0:
            value = _climb(
                reach[None, :], (1 << TOP) - 1 + subtree, values, leaf, offset, there, logits, bias, grad, log_m,
                grad_weights, dot, h, eps, inverse_gamma, tree, t, n_tokens,
                E, K, 0, LEVELS, True, ENTROPY, TOKENS,
            )  # fmt: skip
            values = tl.where((tl.arange(0, 1 << TOP) == subtree)[:, None], value, values)
        else:
            _forget(grad, subtree, leaf, offset, there, tree, t, n_tokens, E, K, TOP, LEVELS)
    if TOP > 0:
        everywhere = tl.where(t < n_tokens, 1.0, 0.0)[None, :]
        _climb(
            everywhere, 0, values, 0, t, t, logits, bias, grad, log_m, grad_weights, dot, h, eps, inverse_gamma,
            tree, t, n_tokens, E, K, 0, TOP, False, ENTROPY, TOKENS,
        )  # fmt: skip
