"""The machine below the program: files, locks, signals, processors, and the processes that share a job."""
