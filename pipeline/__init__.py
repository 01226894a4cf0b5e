"""The stages of the pipeline, one module each, and the few modules they share."""
