"""What Ray's processes say on a user's terminal: warnings that a user can act on, and our own progress.

Ray runs `set_up_worker` in every process that it starts for a job of ours (`worker_process_setup_hook`), and copies
what they write on stderr to the driver's; `quiet_driver` leaves lines out there that no level of a logger governs.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings

_LEVELS = {
    "ray.data": logging.WARNING,
    "ray.train.v2": logging.WARNING,
    # Asks the dashboard whether the controller lives, once a second, and complains each time where none runs.
    "ray.train.v2._internal.execution.controller.placement_group_cleaner": logging.ERROR,
    # A traceback whenever the autoscaler is slow to answer, on a busy machine; it asks again.
    "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client": logging.ERROR,
    # That tokens guard a cluster of one's own is the safe default, and nothing to warn of.
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    # "No CUDA runtime is found", whenever an operation of DeepSpeed's is loaded on a CPU.
    "torch.utils.cpp_extension": logging.ERROR,
    "DeepSpeed": logging.WARNING,
}

_LEFT_OUT = (
    # Ray Train sets its loggers up after our hook has run, at INFO.
    r"Requesting resources:",
    r"Attempting to start training worker group",
    r"Setting up process group for:",
    r"Started training worker group of size",
    r"- \(ip=\S+ pid=\d+\) world_rank=",
    # https://github.com/ray-project/ray/issues/53727: said of an actor of Ray's own.
    r"Actor with class name: 'PreemptionWatcher'",
    r"Progress bars disabled\.",
    r"DeepSpeed \S+ built successfully",
    # When Serve is shut down, its own calls to the controller that it has ended.
    r"Task ServeController\.",
)


_STARTED = "PRIMA_WORKER_STARTED"


def process_started() -> float:
    """When this worker process was set up, in seconds since the epoch; now, where nobody set it up."""
    return float(os.environ.get(_STARTED) or time.time())


def set_up_worker() -> None:
    """Quiet, and nothing on stdout: Ray repeats it on the driver's, whose last line is the answer of a command.

    Ray Train's watchers look for a cluster on this machine by themselves (`ray.util.state`). Beside another cluster
    they may ask that one, learn that it knows no such training, and take its workers away: they are told ours.
    """
    import ray

    os.environ[_STARTED] = str(time.time())
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    sys.stdout.flush()
    # The descriptor, not `sys.stdout`: compiled code (DeepSpeed's op) prints as well.
    os.dup2(2, 1)
    quiet_worker()


def quiet_driver() -> None:
    """To be called before Ray is imported, which reads the variable then."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "|".join(_LEFT_OUT))
    quiet_worker()


def quiet_worker() -> None:
    """Turn libraries' chatter in this process down to warnings."""
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Said at every program that is started; one that is replaced by another at once does nothing with LanceDB.
    warnings.filterwarnings("ignore", message="lancedb fork support is experimental")


def runtime_env() -> dict[str, str]:
    """What `ray.init` is told of a job of ours."""
    return {"worker_process_setup_hook": "prima_ray.training.quiet.set_up_worker"}
