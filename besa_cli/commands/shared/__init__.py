"""Code that several commands share: options, drivers, and views."""
