"""BLEU of translations (Papineni et al. 2002), computed by sacrebleu (Post 2018) and never by hand.

    BLEU = 100 min(1, e^{1 - r/c}) (p_1 p_2 p_3 p_4)^{1/4}

with p_n the share of the hypotheses' n-grams that are in the reference (each as often as there, at most), over the
whole corpus, and c, r the number of words in hypotheses and references. Words are sacrebleu's: give it plain text, not
tokens. A BLEU without its signature cannot be compared with another one: tokenisation alone is worth several points.
"""

from __future__ import annotations

from itertools import takewhile

from torch import Tensor

from moe_lab.datasets.tokens import END, Tokenizer


def corpus_bleu(hypotheses: list[str], references: list[str]) -> tuple[float, str]:
    """BLEU with one reference per sentence, sacrebleu's defaults (case counts, "13a" words, exponential smoothing).

    0 when no hypothesis of the corpus has four words, even if all are right: there is no 4-gram then.

    Args:
        hypotheses: translations as plain text.
        references: the right ones, in the same order.

    Returns:
        Score in [0, 100], and sacrebleu's signature.

    Raises:
        ValueError: no sentences, or not as many hypotheses as references.
    """
    from sacrebleu.metrics import BLEU

    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"BLEU needs one reference per hypothesis: got {len(hypotheses)} hypotheses, {len(references)} references"
        )
    metric = BLEU()
    score = metric.corpus_score(hypotheses, [references]).score
    return min(float(score), 100.0), str(metric.get_signature())  # the geometric mean of 1s is 1 + 2e-16 at times


def detokenised(rows: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Text of each row of token ids (B, L): what stands before the first </s>, or all of it; padding and <s> vanish."""
    return [tokenizer.decode(takewhile(lambda id_: id_ != END, row)) for row in rows.tolist()]
