"""Regular expressions that name layers."""

from __future__ import annotations

import re
from collections.abc import Iterable


def compiled(option: str, patterns: Iterable[str]) -> list[re.Pattern[str]]:
    """Raises TypeError for a single string in place of a list, ValueError for what is no regular expression."""
    if isinstance(patterns, str):
        raise TypeError(f"{option} is {patterns!r}; use a list of regular expressions")
    result = []
    for pattern in patterns:
        try:
            result.append(re.compile(pattern))
        except re.error as e:
            raise ValueError(f"{option} {pattern!r} is no regular expression: {e}") from None
    return result
