"""Studies: variants × folds × seeds of whole pipelines, each common stage trained once, and one table of them all."""
