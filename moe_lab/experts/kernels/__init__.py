"""Triton kernels of the fast path (`fast`), each with its oracle in plain torch beside it.

Legend: T tokens, E experts, N routed (token, expert) pairs, D a row's width, H hidden width, K pairs per token.

Pairs are numbered token by token; pair m of expert e lives in row ``place[m]`` of the expert order. Which pairs a
token has is called ``slots``: the integer K (token t has pairs tK .. tK + K - 1), or a tensor (T + 1,) of starts.

    order        expert_order        a counting sort: place of each pair, where experts end, weights in expert order
                 pattern_order       the same for a (T, E) matrix of weights: its non-zeros are the pairs
    rows         scatter_rows        out[place[m]] = x[token of m]
                 sum_rows            y[t] = sum over the token's pairs of rows[place[m]], added in float32
    activation   activate            a = g * act(h + b_e)
                 activate_backward   dh = g * act'(h + b_e) * da,  dg = <act(h + b_e), da>,  db_e = sum of dh over e
    products     product             rows W_e or rows W_e^T, per expert
                 outer               left^T right over the rows of an expert
    tuning       block shapes

No kernel uses atomics: the same input gives the same bits.

Triton runs the kernels on CUDA, and on a CPU if TRITON_INTERPRET=1 was set before this package was imported (slow, for
tests). Elsewhere, and in float64, the oracles run.
"""

from moe_lab.experts.kernels import tuning
from moe_lab.experts.kernels.activation import activate, activate_backward, activate_backward_oracle, activate_oracle
from moe_lab.experts.kernels.common import ACTIVATIONS, Slots
from moe_lab.experts.kernels.order import (
    Order,
    expert_order,
    expert_order_oracle,
    pattern_order,
    pattern_order_oracle,
)
from moe_lab.experts.kernels.products import outer, outer_runs, product, product_runs
from moe_lab.experts.kernels.rows import scatter_rows, scatter_rows_oracle, sum_rows, sum_rows_oracle
from moe_lab.experts.kernels.tuning import BLOCKS, PRODUCTS, Blocks, Product
from moe_lab.triton_support import INTERPRETED, triton, usable

__all__ = [
    "ACTIVATIONS",
    "BLOCKS",
    "INTERPRETED",
    "PRODUCTS",
    "Blocks",
    "Order",
    "Product",
    "Slots",
    "activate",
    "activate_backward",
    "activate_backward_oracle",
    "activate_oracle",
    "expert_order",
    "expert_order_oracle",
    "outer",
    "outer_runs",
    "pattern_order",
    "pattern_order_oracle",
    "product",
    "product_runs",
    "scatter_rows",
    "scatter_rows_oracle",
    "sum_rows",
    "sum_rows_oracle",
    "triton",
    "tuning",
    "usable",
]
