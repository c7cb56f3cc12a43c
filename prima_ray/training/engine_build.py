"""DeepSpeed's communication op for CPUs, built once at set-up so that no training run waits for a compiler.

`deepspeed.init_distributed` compiles it at the first start on a machine, once per version of torch and Python, into
`TORCH_EXTENSIONS_DIR` (by default a folder of the user's cache). `make setup` runs `python -m
prima_ray.training.engine_build`; where that was not done, the first training run does it and takes a minute longer.
The lock that a killed build used to leave behind is gone with torch 2.15 (pytorch/pytorch#189245), which is why that
is the oldest torch allowed.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import sysconfig

from prima_ray.base import PrimaError


def prepare_environment() -> None:
    """Set what DeepSpeed reads from the environment when it is imported; values that are set already stay.

    Its builder calls `ninja` by name, and the one that came with it is found only where `PATH` leads to this Python's
    scripts: in an activated environment, but not for `.venv/bin/prima` or for a Ray worker.
    """
    scripts, path = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)
    if scripts not in path.split(os.pathsep):
        os.environ["PATH"] = f"{path}{os.pathsep}{scripts}"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")


def build_communication_op() -> str:
    """Compile the op, or load it where it is compiled already; takes seconds to minutes.

    Returns:
        the path of the compiled library.

    Raises:
        PrimaError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise PrimaError(
            f"no C++ compiler ({compiler}); DeepSpeed needs one to run on CPUs",
            mend="Install g++ (Debian, Ubuntu: apt-get install g++), or train with `engine.kind: torch`.",
        )
    prepare_environment()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    return str(ShareMemCommBuilder().load(verbose=False).__file__)


def main() -> int:
    """Entry point of `make setup`."""
    logging.disable(logging.WARNING)  # torch warns that it looked for CUDA and found none
    try:
        library = build_communication_op()
    except PrimaError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stderr.write(f"DeepSpeed's communication op: {library}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
