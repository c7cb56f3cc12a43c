"""One file a stage: its config class and `run(config)`; the table of contents of the product."""
