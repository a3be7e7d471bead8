"""The engine: a model on its devices, and sequences that share it."""
