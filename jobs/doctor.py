"""`ray job submit -- python jobs/doctor.py CONFIG [--set key=value]`: the same arguments as `prima doctor`."""

import sys

from prima_ray.cli import run_stage_from_argv

if __name__ == "__main__":
    sys.exit(run_stage_from_argv("doctor"))
