"""Whose prediction scores explain: what a readout says of a query, beside what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: The column of ``query_info`` that says whether the readout predicts what the model predicts.
AGREES = "readout agrees"
#: Stands after the number of a query where the readout disagrees.
MARK = "!"
#: What the mark means; a view says it once.
EXPLANATION = f"{MARK} the readout disagrees with the model on this query: its scores explain another prediction"


def is_of_readout(name: str, info: Mapping[str, Any]) -> bool:
    """Whether a column of ``query_info`` describes the readout, or the model beside it.

    Example:
        >>> info = {"loss": [0.1], "readout loss": [0.2], "id": ["a"]}
        >>> [is_of_readout(name, info) for name in info]
        [True, True, False]
    """
    return name.startswith("readout ") or f"readout {name}" in info


def agreement_text(info: Mapping[str, Sequence[Any]]) -> str | None:
    """On how many queries the readout agrees; None where no readout is.

    Example:
        >>> agreement_text({"readout agrees": [True, False, True]})
        'agrees with the model on 2 of 3 queries'
    """
    if AGREES not in info:
        return None
    return f"agrees with the model on {sum(map(bool, info[AGREES]))} of {len(info[AGREES])} queries"
