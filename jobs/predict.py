"""`ray job submit -- python jobs/predict.py RUN --shards SHARDS --out FILE`: the same arguments as `prima predict`."""

import sys

from prima_ray.cli import run_stage_from_argv

if __name__ == "__main__":
    sys.exit(run_stage_from_argv("predict"))
