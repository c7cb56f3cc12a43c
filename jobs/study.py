"""`ray job submit -- python jobs/study.py CONFIG`: the same arguments as `prima study`."""

import sys

from prima_ray.cli import run_stage_from_argv

if __name__ == "__main__":
    sys.exit(run_stage_from_argv("study"))
