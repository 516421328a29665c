"""How many kernels a step launches on a GPU: an operation's, the head loss's, the update's.

All of these figures are counted without a GPU, and tests hold them to the code.
"""

from __future__ import annotations

from torch._ops import OpOverload

from ibdistill.ops.head_loss.api import CHUNK_BYTES

_NONE = frozenset(
    {
        "aten::_unsafe_view",
        "aten::detach",
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
    }
)
_OURS = {"ibdistill::biased_attention_backward": 4}
"""Our own operations that launch more than one. The head loss and vid count as one; for the head loss there
is `head_loss_launches` besides."""

UPDATE = 250
"""Launches of an update, at most (tests/runtime/test_deepspeed_fixes.py, for bf16 without ZeRO)."""


def launches(operation: OpOverload) -> int:
    """One for an operation that computes, none for one that gives a view or allocates."""
    schema = operation._schema
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    if views or schema.name in _NONE or not schema.name.startswith(("aten::", "ibdistill::")):
        return 0
    return _OURS.get(schema.name, 1)


def head_loss_launches(rows: int, vocabulary: int, itemsize: int, *, pooled: bool, distils: bool) -> int:
    """Launches of one head loss in Triton, forward and backward, at most: so many for each group of rows.

    Most of them are torch's, on small tensors (tests/planning/test_kernels.py counts them).

    Args:
        rows: target tokens.
        vocabulary, itemsize: of the logits.
        pooled: whether there is a mutual-information term on pooled distributions.
        distils: whether a teacher's distributions stand beside the student's.
    """
    size = max(1, CHUNK_BYTES["gpu"] // (itemsize * vocabulary * (1 + distils)))
    return 20 + -(-rows // size) * (25 + 52 * pooled + 17 * distils)
