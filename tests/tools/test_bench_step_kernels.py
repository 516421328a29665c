"""tools/bench/step_kernels.py, and the budget of kernels of a step."""

import importlib.util
import re
from pathlib import Path

PATH = Path(__file__).parents[2] / "tools/bench/step_kernels.py"
spec = importlib.util.spec_from_file_location("step_kernels", PATH)
step_kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(step_kernels)

BUDGET = {"google-t5/t5-base": 2600, "Qwen/Qwen2.5-0.5B": 2060}
"""Before the layers had forms for a GPU: 6373 and 3194."""


def test_a_step_launches_no_more_kernels_than_its_budget(capsys):
    """The count does not depend on the batch, so a small one will do."""
    step_kernels.main(questions=2, label=4, rationale=8, lengths=(16,), models=tuple(BUDGET))
    rows = re.findall(r"^\| (\S+) +\| +(\d+) \| ([\d.]+) \|$", capsys.readouterr().out, re.M)
    counted = {name: int(kernels) for name, kernels, _ in rows}
    assert counted.keys() == BUDGET.keys()
    assert all(0.9 * BUDGET[name] < counted[name] <= BUDGET[name] for name in counted), counted
