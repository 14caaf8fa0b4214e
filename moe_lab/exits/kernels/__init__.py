"""Triton kernels for an exit, where a dozen small operations take longer than the network's own block.

Legend: C rows of a batch, N samples, K classes, L exits, D numbers per row.

    judge               softmax, the four features (`features`) and the gate (`gate`) of one exit;
    judge_tokens        the same for several exits, with their heads linear(norm(class token)) in front
    leave_and_choose    the decision (`probability`) at several exits; the answer of each row that leaves, with what
                        must be checked of it; and who takes the places of rows that have left
    move                they do, in place: all others stay where they are, so C' (C - C') / C rows move instead of C'

What they compute, and in which order of rows, is defined in plain torch in `inside`, which calls them. Judging needs no
other row and no other exit, so it is spread over the whole device; deciding needs little but all in order.
"""

from moe_lab.exits.kernels.judging import MOST_CLASSES, judge, judge_tokens, token_fits
from moe_lab.exits.kernels.leaving import MOST_ROWS, Answers, leave_and_choose
from moe_lab.exits.kernels.rows import move
from moe_lab.triton_support import INTERPRETED, usable

__all__ = [
    "INTERPRETED",
    "MOST_CLASSES",
    "MOST_ROWS",
    "Answers",
    "judge",
    "judge_tokens",
    "leave_and_choose",
    "move",
    "token_fits",
    "usable",
]
