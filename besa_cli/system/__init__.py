"""Operating system services: files, locks, signals, devices, and the processes (ranks) that share a job."""
