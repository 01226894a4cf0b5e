"""Measurements beside peers, in one run, so that a noisy machine is noisy for both."""
