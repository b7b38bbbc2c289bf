"""The engine: seals, opens and moves packets in batches, in C; `engine.pyx` is its binding."""
