"""From a run directory to a diagnosis, without Ray; `batch` alone uses Ray Data."""
