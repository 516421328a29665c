"""How many kernels an operation launches on a GPU, for counting those of a step on fake tensors."""

from __future__ import annotations

from torch._ops import OpOverload

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
"""Our own operations that launch more than one. The head loss and vid count as one: see `ops` for them."""


def launches(operation: OpOverload) -> int:
    """One for an operation that computes, none for one that gives a view or allocates."""
    schema = operation._schema
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    if views or schema.name in _NONE or not schema.name.startswith(("aten::", "ibdistill::")):
        return 0
    return _OURS.get(schema.name, 1)
