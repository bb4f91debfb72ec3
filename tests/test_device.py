"""What is set before any arithmetic runs."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import psutil, torch
from temper.engine import device
if {kept}:
    device.keep_memory()
resident = lambda: psutil.Process().memory_info().rss
before = resident()
piece = torch.ones(16 * 2**20)  # 64 MiB
full = resident() - before
del piece
print(full, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_the_allocator_keeps_what_tensors_leave(kept: bool) -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM.format(kept=kept)], capture_output=True, text=True, check=True)
    full, left = map(int, ran.stdout.split())
    assert full > 60 * 2**20
    assert (left > 60 * 2**20) == kept
