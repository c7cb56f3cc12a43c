"""A language model of transformers in this process, as one of LlamaIndex's: greedy, one call at a time.

LlamaIndex's own package for it counts no tokens, wants a chat template, and lets a text write the model's special
tokens: a passage that holds the mark of an answer's beginning would end the question.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from prima_ray.base import InputPath, PrimaError, StrictConfig
from prima_ray.data.features import hash_tensors
from prima_ray.knowledge.chat_model import ChatModel, Message, RefusedError, Reply, apart, as_llama_messages, as_reply
from prima_ray.models.tokenizer import TextTokenizer, first_line, resolve_text_model

if TYPE_CHECKING:
    from llama_index.core.llms import LLM


class TransformersConfig(StrictConfig):
    """A causal language model that was trained to follow instructions."""

    kind: Literal["transformers"] = "transformers"
    name: str | None = None
    """A hub name such as `Qwen/Qwen3-8B`, or a local folder."""
    path: InputPath | None = None
    """A local folder instead of `name`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: as it was saved."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where there is one."""
    context_window: int | None = Field(default=None, ge=256)
    """Tokens of prompt and answer; None: what the model was made for."""
    max_tokens: int = Field(default=1024, ge=16)
    template_options: dict[str, Any] = Field(default_factory=dict)
    """For its chat template, e.g. `enable_thinking: false`."""

    def load(self) -> ChatModel:
        """The model, on its device.

        Raises:
            PrimaError: none is named, or it is not to be had.
        """
        from transformers import AutoModelForCausalLM

        source = self.path or self.name
        if source is None:
            raise PrimaError(
                "llm: no model is named", mend="Name one in writer.llm.name, or its folder in writer.llm.path."
            )
        tokenizer = TextTokenizer(source, max_tokens=self.max_tokens).loaded
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        mend = "Name a local folder in writer.llm.path, or bring the model with `prima fetch`."
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                resolve_text_model(source), use_safetensors=True, output_loading_info=True, dtype=self.dtype
            )
            model = model.eval().requires_grad_(False).to(device)
        except PrimaError:
            raise
        except Exception as error:  # safetensors, huggingface_hub and torch have each their own
            raise PrimaError(f"no language model to be had ({first_line(error)})", where=source, mend=mend) from None
        if report["missing_keys"]:
            raise PrimaError(
                f"is no language model: it has no weights for {sorted(report['missing_keys'])[0]}",
                where=source,
                mend="Name a model that was trained to write.",
            )
        longest = getattr(model.config, "max_position_embeddings", None)
        window = self.context_window or longest
        if window is None or (longest and window > longest) or window < 2 * self.max_tokens:
            raise PrimaError(
                f"context_window {window} does not do: it has room for twice max_tokens ({self.max_tokens}), "
                f"and the model for {longest}",
                where=source,
                mend="Set writer.llm.context_window and writer.llm.max_tokens.",
            )
        # A published model is told by its commit, a folder by its weights, whatever lay there before.
        commit = getattr(model.config, "_commit_hash", None)
        identity = {
            "kind": self.kind,
            "model": Path(source).name if Path(source).is_absolute() else source,
            "weights": commit or hash_tensors(model.state_dict()),
            "tokenizer": commit or tokenizer.backend_tokenizer.to_str(),
            "template": tokenizer.chat_template,
            "dtype": str(model.dtype),
            "max_tokens": self.max_tokens,
            "template_options": self.template_options,
        }
        llm = _llama_llm(model, tokenizer, self, window)
        return _Local(identity=identity, where=source, context_window=window, config=self, llm=llm, tokenizer=tokenizer)


@dataclass(frozen=True)
class _Local:
    identity: Mapping[str, Any]
    where: str
    context_window: int
    config: TransformersConfig
    llm: LLM
    tokenizer: Any

    @property
    def max_tokens(self) -> int:
        return self.config.max_tokens

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def cost(self, prompt_tokens: int, completion_tokens: int) -> None:  # noqa: ARG002 - as the protocol has them
        return None

    def chat(self, messages: Sequence[Message], *, schema: Mapping[str, Any]) -> Reply:  # noqa: ARG002
        return as_reply(self.llm.chat(as_llama_messages(messages)))


def _llama_llm(model: Any, tokenizer: Any, config: TransformersConfig, window: int) -> LLM:
    """The model as an LLM of LlamaIndex's. In a function, since LlamaIndex is imported where it is needed."""
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.llms import ChatMessage, CompletionResponse, CustomLLM, LLMMetadata
    from llama_index.core.llms.callbacks import llm_completion_callback
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = ends[0] if isinstance(ends, list) else ends
    # Not the model's own: published ones sample, and an answer would be another each time.
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=config.max_tokens, eos_token_id=ends, pad_token_id=padding
    )
    special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
    marks = re.compile("|".join(re.escape(mark) for mark in special if len(mark) > 1 and mark.strip()) or "(?!)")

    class TransformersLlm(CustomLLM):  # type: ignore[misc]  # LlamaIndex's classes are untyped here
        _lock: Any = PrivateAttr(default_factory=threading.Lock)

        @property
        def metadata(self) -> LLMMetadata:
            return LLMMetadata(
                context_window=window,
                num_output=config.max_tokens,
                is_chat_model=True,
                model_name=config.path or config.name,
            )

        @llm_completion_callback()  # type: ignore[untyped-decorator]
        def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:
            # A template that was filled in has its special tokens already.
            encoded = tokenizer(prompt, add_special_tokens=not formatted, return_tensors="pt", verbose=False)
            num_prompt = encoded["input_ids"].shape[1]
            if num_prompt + config.max_tokens > window:
                raise RefusedError(f"{num_prompt} tokens and an answer do not fit into the context window of {window}")
            with self._lock, torch.inference_mode():
                made = model.generate(
                    input_ids=encoded["input_ids"].to(model.device),
                    attention_mask=encoded["attention_mask"].to(model.device),
                    generation_config=greedy,
                )
            answer = made[0, num_prompt:].tolist()
            ended = bool(answer) and answer[-1] in (ends if isinstance(ends, list) else [ends])
            return CompletionResponse(
                text=tokenizer.decode(answer, skip_special_tokens=True),
                additional_kwargs={
                    "prompt_tokens": num_prompt,
                    "completion_tokens": len(answer),
                    "finish_reason": "stop" if ended else "length",
                },
            )

        def stream_complete(self, prompt: str, formatted: bool = False, **options: Any) -> Any:
            """The whole answer as one piece."""
            yield self.complete(prompt, formatted=formatted, **options)

    def to_prompt(messages: Sequence[ChatMessage]) -> str:
        plain = [{"role": item.role.value, "content": apart(item.content or "", marks)} for item in messages]
        return _fill_template(tokenizer, plain, config.template_options)

    return TransformersLlm(messages_to_prompt=to_prompt)


def _fill_template(tokenizer: Any, messages: list[dict[str, str]], options: Mapping[str, Any]) -> str:
    if not tokenizer.chat_template:
        parts = [f"{item['role'].capitalize()}:\n{item['content']}\n\n" for item in messages]
        return f"{tokenizer.bos_token or ''}{''.join(parts)}Assistant:\n"
    filled: str
    try:
        filled = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception:  # a template's own exception: some models know no system message
        if messages[0]["role"] != "system":
            raise
        first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        filled = tokenizer.apply_chat_template(
            [first, *messages[2:]], tokenize=False, add_generation_prompt=True, **options
        )
    return filled
