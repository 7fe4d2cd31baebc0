"""What a step frees stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from llm_trainer.cli.freed_memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(77)
def step():
    held = [torch.ones(1 << 20) for _ in range(8)]
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_step_after_the_first_needs_no_fresh_pages() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS, "kept"], capture_output=True, text=True, encoding="utf-8")
    if done.returncode == 77:
        pytest.skip("this C library has no mallopt")
    assert int(done.stdout) < 100  # 5 steps of 8 x 4 MiB are 40,960 pages
