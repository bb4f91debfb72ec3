"""A job file for Slurm: a recipe on several machines by torchrun, which goes on by itself after a pre-emption."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

NOTICE = 300  # seconds before the end of a job in which checkpoints are written

JOB = """\
#!/bin/bash
# {title}. Start it with: sbatch {file}
# Add what your cluster asks for (partition, account, time, memory) as further lines of #SBATCH.
#SBATCH --job-name={name}
#SBATCH --nodes={machines}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --chdir={folder}
#SBATCH --output={name}-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@{notice}

# Before its time is over, and when it is pre-empted, the job gets SIGTERM. Every process is told; Temper saves a checkpoint
# and ends with 143; the job is queued again, and the same command goes on from there.
stopped=
stop() {{
    stopped=yes
    scancel --signal=TERM "$SLURM_JOB_ID"  # its steps; not this script
}}
trap stop TERM

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 {python} -m torch.distributed.run \\
    --nnodes={machines} --nproc-per-node={gpus} --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" \\
    --rdzv-endpoint="$head:$port" --shutdown-timeout={patience} \\
    -m temper run {words} &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do  # the signal ended the waiting, not the step
    wait "$step"
    code=$?
done
if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 143
fi
exit "$code"
"""


def job(file: Path, *, name: str, machines: int, gpus: int, words: Sequence[str], folder: Path) -> str:
    """The text of a job file.

    Args:
        file: what it will be called.
        words: what `temper run` is given.
        folder: where relative paths begin, the same on all machines.
    """
    return JOB.format(
        title=f"{name} on {machines} × {gpus} graphics cards", file=shlex.quote(str(file)), name=shlex.quote(name), machines=machines, gpus=gpus,
        folder=shlex.quote(str(folder)), notice=NOTICE, python=shlex.quote(sys.executable), patience=NOTICE - 60, words=shlex.join(words),
    )  # fmt: skip
