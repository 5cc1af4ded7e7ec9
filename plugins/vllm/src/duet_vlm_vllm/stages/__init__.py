"""Drops between decoder layers inside vLLM: later layers read fewer rows, and own fewer blocks of the KV cache.

A stage is a run of layers that read the same rows (``duet_vlm.serve.decoder_stages``); stage 0 is vLLM's own. Later
stages have

- attention that is told its own rows and slots (``attention``) and a cache group of its own (``kv_cache``),
- a decoder that drops rows where a stage begins (``decoder``, ``ranking``),
- a worker that says which requests a step holds (``worker``), and a scheduler that never cuts a prompt with images
  (``scheduler``).

What cannot be served is refused at the start (``engine_checks``) or with the request (``request_checks``).
"""
