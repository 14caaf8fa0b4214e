"""Smooth-step: a cubic that reaches exactly 0 and exactly 1.

Source: Hazimeh et al. 2020 ("The Tree Ensemble Layer"); COMET, KDD 2023, section on the gate. With width gamma,

    S(t) = 0                                        t <= -gamma/2
         = -2 t^3/gamma^3 + 3 t/(2 gamma) + 1/2     in between
         = 1                                        t >=  gamma/2

We compute it as u = clip(t/gamma + 1/2, 0, 1), S = u^2 (3 - 2u), the same polynomial. The expanded cubic cancels: in
float32 it returns -6e-8 strictly inside the interval for gamma = 0.1 or 10; the u-form never leaves [0, 1].
"""

from __future__ import annotations

from torch import Tensor


def smooth_step(t: Tensor, gamma: float = 1.0) -> Tensor:
    """S_gamma(t), elementwise, in [0, 1]: slope 3/(2 gamma) at 0, exactly 0 or 1 (slope 0) from |t| = gamma/2 on.

    Going the other way is ``smooth_step(-t)``, which equals 1 - S(t) but keeps tiny values that the subtraction loses.
    """
    u = (t / gamma + 0.5).clamp(0, 1)
    return u * u * (3 - 2 * u)
