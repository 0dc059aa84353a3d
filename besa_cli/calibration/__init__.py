"""Calibration sets: sampling, storage, and checks against a model."""
