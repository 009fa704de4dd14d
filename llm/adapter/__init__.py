"""Small changes to a frozen network, which are all that is trained."""

from llm.adapter.lora import Lora, switched_off

__all__ = ["Lora", "switched_off"]
