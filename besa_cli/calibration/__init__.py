"""Calibration sets: sampled, stored, and matched with a model."""
