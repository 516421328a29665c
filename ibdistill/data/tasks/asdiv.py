"""ASDiv: word problems of school books (Miao et al., ACL 2020, arXiv 2106.15772).

The label is the answer's number. LLM text is written and parsed, and answers are judged, as for SVAMP.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ibdistill.data.json_rows import field_text
from ibdistill.data.tasks.published import Published
from ibdistill.data.tasks.svamp import SVAMP


def fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """Question, the answer's number (`9 (apples)` -> `9`, `1 1/2 (hours)` -> `1 + 1/2`) and no rationale."""
    row = {key.lower(): value for key, value in row.items()}
    number = re.match(r"\S*(?: [0-9]+/[0-9]+)?", field_text(row, "answer"))[0].replace(" ", " + ")
    return f"{field_text(row, 'body')}\n{field_text(row, 'question')}", number, ""


ASDIV = replace(
    SVAMP,
    name="asdiv",
    read=Published(
        fields=fields,
        hub=("EleutherAI/asdiv", None, "refs/convert/parquet"),
        hub_splits={"train": "validation"},  # its only split; a tenth of it becomes the test split
    ).read,
    derives_rationales=False,
)
