"""`ray job submit -- python jobs/compare.py RUN RUN ...`: the same arguments as `prima compare`."""

import sys

from prima_ray.cli import run_stage_from_argv

if __name__ == "__main__":
    sys.exit(run_stage_from_argv("compare"))
