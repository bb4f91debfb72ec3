"""A run on several processes: by torch's launcher, from the recipe's `launch:` or from the launcher's own flags."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from temper import terminal
from temper.engine import processes
from temper.errors import RunError, TemperError
from temper.recipe import Recipe
from temper.world import World

INSIDE = "WORLD_SIZE"  # set by torchrun and by accelerate
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM}
FIRST = 3.0  # seconds that another process waits with an error which the main one may have met as well


def wanted(recipe: Recipe) -> bool:
    """Whether a recipe asks for processes that are not there yet."""
    return recipe.launch.processes > 1 and INSIDE not in os.environ


def start(recipe: Recipe, words: Sequence[str]) -> int:
    """Run `temper WORDS` in each of a recipe's processes, and wait; the exit code.

    When one ends with an error, torch's launcher ends the others; each tells its own error.
    """
    threads = recipe.threads or max(1, (os.cpu_count() or 1) // recipe.launch.processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning take the others' cores
    for name in [n for n in logging.root.manager.loggerDict if n.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters is told below, and by the processes themselves
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=recipe.launch.processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.5,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "temper", *words)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode == -signal.SIGKILL:
                terminal.tell(f"process {rank} was killed", "", "was the memory full? the same command goes on from the last checkpoint")
        codes = {failure.exitcode for failure in error.failures.values()}
        return codes.pop() if len(codes) == 1 and codes <= STOPPED else 1
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def world(recipe: Recipe) -> World:
    """The processes of this launch; outside of one, this process alone."""
    if int(os.environ.get(INSIDE, "1")) < 2:
        return World()
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    parallel = "fsdp" if sharded else recipe.launch.parallel
    return processes.Processes(parallel, recipe.launch.patience, cards=recipe.device != "cpu")


@contextlib.contextmanager
def among(world: World) -> Iterator[None]:
    """Errors of one process of several, told so that the one that matters is seen.

    Raises:
        RunError: another process has ended, or was waited for in vain.
    """
    if world.size == 1:
        yield
        return
    try:
        yield
    except TemperError as error:
        if world.main:
            raise
        time.sleep(FIRST)  # the main one has told of it, if it met it too, and the launcher ends this one
        raise type(error)(f"process {world.rank}: {error.what}", where=error.where, do=error.do) from error
    except Exception as error:
        if (what := processes.lost(error)) is None:
            raise
        time.sleep(FIRST)
        raise RunError(
            f"process {world.rank}: {what}", do="its own message says why; the same command goes on from the last checkpoint"
        ) from error
