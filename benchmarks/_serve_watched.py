"""`prima serve`, and at each change how many replicas Serve means to have: a line of unix seconds and count in a file.

Only a process of its own can ask its Ray. Arguments: the file, then those of `prima serve`.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path


def watch(file: Path) -> None:
    import ray
    from ray import serve

    last = 0
    while True:
        time.sleep(0.1)
        if not ray.is_initialized():
            continue
        for application in serve.status().applications.values():
            states = application.deployments["Model"].replica_states if application.deployments else {}
            # Those that start count, those that stop do not.
            count = sum(number for state, number in states.items() if state != "STOPPING")
            if count != last:
                last = count
                with file.open("a") as stream:
                    stream.write(f"{time.time():.2f} {count}\n")


def main() -> int:
    from prima_ray.cli import main as prima

    file, *arguments = sys.argv[1:]
    threading.Thread(target=watch, args=(Path(file),), daemon=True).start()
    return prima(["serve", *arguments])


if __name__ == "__main__":
    sys.exit(main())
