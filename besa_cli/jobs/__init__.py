"""Jobs: each takes a checked request to a finished stage, export or repository."""
