"""Running of pruned models from their packed weights, without expanding them in memory."""
