"""One command from what is asked to a finished stage."""
