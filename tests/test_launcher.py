"""The settings of the process are made before torch is there, and never against the user's own."""

import os
import subprocess
import sys

import pytest

from tests.closure import ROOT

PROGRAM = """
import os, sys
from pipeline import launcher, stage
def main(*_, **__):
    import torch
    print(os.environ["GOMP_SPINCOUNT"], os.environ["THP_MEM_ALLOC_ENABLE"])
sys.argv = ["stage"]
stage.load_params = lambda: {}
stage.read_stages = lambda: {"x": {"deps": []}}
os.makedirs(".runs", exist_ok=True)
stage.run("x", main)
"""


@pytest.mark.parametrize(("own", "expected"), [({}, "3000 1"), ({"GOMP_SPINCOUNT": "7"}, "7 1")])
def test_every_stage_settles_threads_and_memory_and_your_own_setting_wins(tmp_path, own, expected):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment | own | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == expected, done.stderr
