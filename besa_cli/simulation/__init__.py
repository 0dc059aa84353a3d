"""Simulations of whole checkpoints: run.py makes them, record.py keeps them, plots.py draws them."""
