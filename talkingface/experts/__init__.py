"Sync experts; `load_expert` loads any of them."

from .checkpoints import load_expert
