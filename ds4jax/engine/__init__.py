"""The engine: a model on its devices, and any number of sequences that share it. Tokens in and out, no text.

Request ── AsyncEngine (a thread, streams) ──► Engine (the loop) ──► Token, …, Finished
                                                 │
    scheduler.py     which sequence computes     │   sequence.py     one request on its way
    prefix_reuse.py  where it starts             │   prefix_cache.py, kv_store.py   what is kept, where
                                                 ▼
    model_runner.py  weights, cache and slots on the device ── compiled_steps.py   prefill and decoding
"""
