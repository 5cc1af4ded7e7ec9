"""The page of ``duet-vlm app`` as a Hugging Face Space (docs/app.md): the model in DUET_VLM_MODEL, the embedded one
without it."""

import os

from duet_vlm.api.loading import load
from duet_vlm.app.controls import starting
from duet_vlm.app.serve import serve

loaded = load(os.environ.get("DUET_VLM_MODEL", "tiny"))
serve(loaded, starting(None, None, {}, loaded.model))
