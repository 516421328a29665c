"""Makes the tools importable for the tests of them, as they are when they run as scripts."""

from __future__ import annotations

import sys

from harness import ROOT

sys.path.append(str(ROOT / "tools"))
