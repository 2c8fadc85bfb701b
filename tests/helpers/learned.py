"""A learned basis after few steps, for tests in which scores need not be good."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from stride_lightning.steering.module import StrideModule
from stride_lightning.steering.published.fitting import PublishedOperators


@contextmanager
def few_steps(max_steps=60):
    """Learned bases are trained for a tenth of their time."""
    with ExitStack() as stack:
        for kind in (StrideModule, PublishedOperators):
            stack.enter_context(patch.dict(kind.__init__.__kwdefaults__, max_steps=max_steps))
        yield
