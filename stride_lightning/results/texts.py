"""Scores and names as texts, the same in tables, figures and pages."""

import math

#: The name of the standard deviation wherever one is shown: it knows nothing of seeds and of features that move.
STD = "uncalibrated std"
#: The same as a column's name.
STD_COLUMN = STD.replace(" ", "_")


def score_text(score: float) -> str:
    """A score with its sign and at least two significant digits, with an exponent only if it is tiny or huge.

    Example:
        >>> score_text(0.0123), score_text(-0.5), score_text(12.34), score_text(4.2e-7)
        ('+0.012', '-0.50', '+12', '+4.2e-07')
    """
    if score != 0 and not 1e-3 <= abs(score) < 1e5:
        return f"{score:+.1e}"
    decimals = 2 if score == 0 else max(0, 1 - math.floor(math.log10(abs(score))))
    return f"{score:+.{decimals}f}"


def interval_text(score: float, std: float | None) -> str:
    """A score, and its standard deviation unless that is None.

    Example:
        >>> interval_text(0.0123, 0.00456), interval_text(0.0123, None)
        ('+0.012 ± 0.0046', '+0.012')
    """
    if std is None:
        return score_text(score)
    return f"{score_text(score)} ± {score_text(std).removeprefix('+')}"


def shortened(text: str, length: int) -> str:
    """Text on one line, cut with an ellipsis after ``length`` characters.

    Example:
        >>> shortened("one line, and more", 12)
        'one line, a…'
    """
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
