"""Many wrong arguments and what is said of each."""

import pytest


def assert_refused(function, *cases, error=ValueError):
    """The function raises for each case, ``(message, *arguments)``."""
    for message, *arguments in cases:
        with pytest.raises(error, match=message):
            function(*arguments)
