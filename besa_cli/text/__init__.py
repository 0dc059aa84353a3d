"""Text and data sets: the sources of `--data`, read in bounded memory, and their token ids."""
