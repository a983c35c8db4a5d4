"""The examples run as they stand; `test_readme.py` runs the one that reloads an export."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_sampler_lowers_a_loss_of_ones_own_within_the_budget(
    tiny_folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/own_study.py"), str(tiny_folder), "50KiB", "12"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "MPSEARCH_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, best = done.stdout.splitlines()
    nats, sizes = zip(*(re.findall(r"[\d,.]+(?= (?:nats|bytes))", line)
                        for line in (first, best)), strict=True)  # fmt: skip
    assert best.startswith("best of 12: ")
    assert float(nats[1]) < float(nats[0])
    assert all(int(size.replace(",", "")) <= 50 * 2**10 for size in sizes)
