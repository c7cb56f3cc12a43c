"""The language models that a writer may ask, all of them by LlamaIndex.

To add one: a config with a `kind` and `load`, which gives a `chat_model.ChatModel`, and a line in the union.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prima_ray.knowledge.llm_endpoint import OpenAiLikeConfig
from prima_ray.knowledge.llm_transformers import TransformersConfig

LlmConfig = Annotated[OpenAiLikeConfig | TransformersConfig, Field(discriminator="kind")]
