"""`ray job submit -- python jobs/evaluate.py RUN [--out FOLDER]`: the same arguments as `prima evaluate`."""

import sys

from prima_ray.cli import run_stage_from_argv

if __name__ == "__main__":
    sys.exit(run_stage_from_argv("evaluate"))
