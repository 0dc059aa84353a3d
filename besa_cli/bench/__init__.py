"""Speed and memory of a model on this machine: dense, from packed weights, and in llama.cpp, measured in turns."""
