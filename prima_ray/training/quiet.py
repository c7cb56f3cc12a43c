"""What Ray's processes say on a user's terminal: warnings that a user can act on, and our own progress.

Ray runs `set_up_worker` in every process that it starts for a job of ours (`worker_process_setup_hook`).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

_LEVELS = {
    "ray.data": logging.WARNING,
    "ray.train.v2": logging.WARNING,
    # Asks the dashboard whether the controller lives, once a second, and complains each time where none runs.
    "ray.train.v2._internal.execution.controller.placement_group_cleaner": logging.ERROR,
    # A traceback whenever the autoscaler is slow to answer, on a busy machine; it asks again.
    "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client": logging.ERROR,
    "DeepSpeed": logging.WARNING,
}


def set_up_worker() -> None:
    """Quiet, and nothing on stdout: Ray repeats it on the driver's, whose last line is the answer of a command."""
    sys.stdout.flush()
    # The descriptor, not `sys.stdout`: compiled code (DeepSpeed's op) prints as well.
    os.dup2(2, 1)
    quiet_worker()


def quiet_worker() -> None:
    """Turn libraries' chatter in this process down to warnings."""
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def runtime_env() -> dict[str, str]:
    """What `ray.init` is told of a job of ours."""
    return {"worker_process_setup_hook": "prima_ray.training.quiet.set_up_worker"}
