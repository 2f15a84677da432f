"""Models over Hugging Face checkpoints."""

from executor_service.models.config import ModelConfig, UnsupportedCheckpointError, load_config
from executor_service.models.decoder import CausalLM

__all__ = ["CausalLM", "ModelConfig", "UnsupportedCheckpointError", "load_config"]
