"""DeepSpeed's communication op for CPUs, built once at set-up so that no training run waits for a compiler.

`deepspeed.init_distributed` compiles it at the first start into `TORCH_EXTENSIONS_DIR`, and again whenever the folder
was written by another build: another `ninja`, other header files. `make setup` runs `python -m
prima_ray.training.engine_build`; where that was not done, the first training run says so and takes a minute longer.
The lock that a killed build used to leave behind is gone with torch 2.15 (pytorch/pytorch#189245), which is why that
is the oldest torch allowed.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from prima_ray.base import PrimaError

_log = logging.getLogger(__name__)
_OP = "deepspeed_shm_comm"
NEEDS_COMPILER = "DeepSpeed needs one to run on CPUs"
INSTALL_COMPILER = "Install g++ (Debian, Ubuntu: apt-get install g++), or train with `engine.kind: torch`."


def prepare_environment() -> None:
    """Set what torch's builder reads from the environment; a folder that is set already stays.

    torch calls `ninja` by name, and two versions of it do not take each other's builds: the one that came with this
    Python comes first, whether the environment is activated or not. The build lies in the environment itself, for the
    user's cache is shared by environments whose header files differ, and each would compile it anew. Where the
    environment cannot be written to, the cache has to do.
    """
    scripts, path = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = f"{scripts}{os.pathsep}{path}"
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def compiler_name() -> str:
    """The C++ compiler that torch's builder calls."""
    return os.environ.get("CXX", "c++")


def extensions_folder() -> Path | None:
    """Where torch's builder keeps what it has compiled, after `prepare_environment`; None where torch decides."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    return None if folder is None else Path(folder)


def op_is_built() -> bool:
    """Whether the op is known to be compiled already."""
    folder = extensions_folder()
    return folder is not None and (folder / _OP / f"{_OP}.so").exists()


def tell_of_a_build() -> None:
    """Log that the op will be compiled now, if it will be; minutes of silence look like a hang."""
    folder = extensions_folder()
    if folder is not None and sys.platform == "linux" and not op_is_built():
        _log.info("compiling DeepSpeed's communication op into %s: once, about a minute ...", folder)


def build_communication_op() -> str:
    """Compile the op, or load it where it is compiled already; takes seconds to minutes.

    Returns:
        the path of the compiled library.

    Raises:
        PrimaError: there is no C++ compiler.
    """
    if shutil.which(compiler_name()) is None:
        raise PrimaError(f"no C++ compiler ({compiler_name()}); {NEEDS_COMPILER}", mend=INSTALL_COMPILER)
    prepare_environment()
    tell_of_a_build()
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
