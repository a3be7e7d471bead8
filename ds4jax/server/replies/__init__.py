"""The answers of the four APIs: the engine's events as server-sent events, or as one object."""
