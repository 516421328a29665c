"""The products of a mixture of experts in dry runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from transformers.integrations import moe


@contextmanager
def experts_in_any_dtype() -> Iterator[None]:
    """Within this context the experts' grouped products run on fake tensors of any dtype.

    torch's grouped product knows only the shapes of its results in bf16; transformers' own stands in for it,
    with the same inputs, results and tensors kept for the backward pass.
    """
    with mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: False):
        yield
