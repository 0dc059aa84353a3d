"""Commands of the command line, one per file: each parses its options, runs a job and shows the result."""
