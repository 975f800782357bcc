"""Run a module in a process of its own, with Triton's interpreter."""

import json
import os
import subprocess
import sys


def run_interpreted(module, *arguments):
    """Return what `module` prints last, JSON. Triton reads TRITON_INTERPRET at import, so it can't be set later."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])
