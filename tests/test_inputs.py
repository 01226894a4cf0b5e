"""A stage under DVC refuses inputs whose bytes are not those that dvc.lock records."""

import os
import subprocess
import sys

import pytest

from pipeline import inputs
from pipeline.stage import Refusal

DEFINITION = """
stages:
  make: {cmd: mkdir -p made/deep && echo a > made/deep/x && echo b > made/y && echo c > single, outs: [made, single]}
  use: {cmd: cat made/y single > used, deps: [made, single], outs: [used]}
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository that DVC itself has run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(DEFINITION)
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    for command in (["init", "--no-scm", "-q"], ["repro", "-q"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True, env=environment)
    monkeypatch.setenv("DVC_STAGE", "use")
    return tmp_path


def test_what_dvc_recorded_is_accepted_and_a_flipped_byte_is_not(repository, monkeypatch):
    inputs.check("use")
    for name in ("made/deep/x", "single"):
        file = repository / name
        before, times = file.read_bytes(), file.stat()
        file.write_bytes(b"z" + before[1:])
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(Refusal, match=rf"{name.split('/')[0]} is not what stage make wrote.*make verify REPAIR=1"):
            inputs.check("use")
        file.write_bytes(before)
    inputs.check("use")
    (repository / "made" / "y").unlink()
    with pytest.raises(Refusal, match="made is not what stage make wrote"):
        inputs.check("use")
    monkeypatch.delenv("DVC_STAGE")
    inputs.check("use")  # by hand: dvc.lock tells of another time
