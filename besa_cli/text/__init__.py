"""Text and data sets: what `--data` names, read in bounded memory, and its token ids."""
