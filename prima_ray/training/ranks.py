"""Gloo ranks as processes of this machine, without Ray: how tests and benchmarks hold several workers beside one."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def start_ranks(main: Callable[..., None], world_size: int, *args: Any) -> None:
    """Run `main(rank, *args)` in `world_size` new processes with one thread each, and wait for all.

    `main` and `args` are pickled; `main` finds the default process group made, and RANK, LOCAL_RANK and WORLD_SIZE
    set. Raises `torch.multiprocessing.ProcessRaisedException` with the traceback of the first rank that fails; the
    others are then stopped.
    """
    with tempfile.TemporaryDirectory(prefix="prima-ranks-") as folder:
        spawn(_run_rank, (world_size, f"file://{folder}/rendezvous", main, args), world_size)  # type: ignore[no-untyped-call]


def _run_rank(rank: int, world_size: int, rendezvous: str, main: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    main(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    # Not by way of the interpreter's end: a thread of gloo that still lets go of its last tensor then asks for the
    # interpreter's lock, is ended by Python inside a destructor, and takes the process with it (SIGABRT).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
