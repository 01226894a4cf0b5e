"""A campaign of faults against a real run of the pipeline: `python -m chaos`."""
