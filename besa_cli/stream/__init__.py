"""The one loop over the model: load a block, change it, store it, pass the activations on, drop it."""
