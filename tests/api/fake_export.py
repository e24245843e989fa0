"""Stands in for trainer.export: what it does with a version is told by a file in --models-dir.

VERSION.onnx: attach it. VERSION.fail: say its text on stderr and exit with 3. VERSION.later: remove that file, say
its text and exit with 75. VERSION.hang: write its process id
into VERSION.pid and wait. VERSION.killed: remove that file and end by SIGKILL;
"VERSION.killed always": leave it there. VERSION.late: end by SIGKILL once VERSION.onnx is attached.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from services.core.registry import Parity, Registry

parser = argparse.ArgumentParser()
for name in ("--models-dir", "--registry-dir", "--store-dir"):
    parser.add_argument(name, type=Path, required=True)
parser.add_argument("--name", required=True)
parser.add_argument("--version", type=int, required=True)
given = parser.parse_args()

told = given.models_dir / str(given.version)
if told.with_suffix(".killed always").exists():
    os.kill(os.getpid(), signal.SIGKILL)
if told.with_suffix(".killed").exists():
    told.with_suffix(".killed").unlink()
    os.kill(os.getpid(), signal.SIGKILL)
if told.with_suffix(".hang").exists():
    told.with_suffix(".pid").write_text(str(os.getpid()))
    signal.pause()
if told.with_suffix(".later").exists():
    sys.stderr.write(told.with_suffix(".later").read_text())
    told.with_suffix(".later").unlink()
    sys.exit(os.EX_TEMPFAIL)
if told.with_suffix(".fail").exists():
    sys.stderr.write(f"a traceback\n{told.with_suffix('.fail').read_text()}\n\n")
    sys.exit(3)
if told.with_suffix(".onnx").exists():
    parity = Parity(
        num_frames=8,
        batch_sizes=(1, 8),
        max_abs_probability_error=float(os.environ["OMP_NUM_THREADS"]) * 1e-7,
        max_allowed=1e-4,
        num_label_changes=os.getpriority(os.PRIO_PROCESS, 0),
    )
    Registry(given.registry_dir, given.name).attach_model(given.version, told.with_suffix(".onnx"), parity)
    if told.with_suffix(".late").exists():
        os.kill(os.getpid(), signal.SIGKILL)
