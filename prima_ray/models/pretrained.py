"""Models of transformers: from a folder or a hub by name, or from an architecture alone, with random weights."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch

from prima_ray.base import PrimaError
from prima_ray.models.tokenizer import first_line, resolve_text_model

_UNUSED = ("pooler.",)
"""BERT's pooler belongs to next-sentence prediction; checkpoints of masked language models lack it."""


def load_pretrained(
    source: str, *, key: str, model_type: str | None = None, attention: str | None = None
) -> tuple[Any, Any]:
    """A base model in fp32 without dropout, and its output layer where that has weights of its own, else None.

    On the meta device (`with torch.device("meta")`) the architecture alone is read: there are no weights to fill.

    Args:
        source: a hub name, a local folder, or the offline text model.
        key: the config key of the local folder, for the mend.
        model_type: the only one that will do; None: any. With it, output layers are looked for.

    Raises:
        PrimaError: nothing there, damaged, of another type, or weights that do not fit their config.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    architecture = read_architecture(source, key=key)
    if model_type is not None and architecture.model_type != model_type:
        raise PrimaError(f"is a {architecture.model_type} model, expected {model_type}", where=source)
    options = {} if attention is None else {"attn_implementation": attention}
    untied = model_type is not None and not architecture.tie_word_embeddings
    model, missing = read_weights(
        AutoModelForCausalLM if untied else AutoModel, source, architecture, key=key, **options
    )
    refuse_missing(missing, source)
    return (model.get_decoder(), model.get_output_embeddings()) if untied else (model, None)


def read_architecture(source: str, *, key: str) -> Any:
    """The transformers config of a model, with every dropout at 0; see `load_pretrained`."""
    from transformers import AutoConfig

    try:
        architecture = AutoConfig.from_pretrained(resolve_text_model(source))
    except (OSError, ValueError) as error:
        raise PrimaError(f"no model to be had ({first_line(error)})", where=source, mend=_mend(key)) from None
    no_dropout(architecture)
    return architecture


def read_weights(auto: Any, source: str, architecture: Any, *, key: str, **options: Any) -> tuple[Any, list[str]]:
    """A model in fp32, and the names of its weights that the checkpoint lacks: those are random.

    Args:
        auto: the class of transformers that makes it.
    """
    options["dtype"] = torch.float32
    if torch.get_default_device().type == "meta":
        return auto.from_config(architecture, **options), []
    # What it reports of weights that the checkpoint has beside the model (a masked-LM head) is no news; nor is what it
    # says of tied ones that lack, for what lacks is looked at.
    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(_no_report)
    try:
        model, report = auto.from_pretrained(
            resolve_text_model(source),
            config=architecture,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # safetensors, huggingface_hub and torch have each their own
        raise PrimaError(f"no weights to be had ({first_line(error)})", where=source, mend=_mend(key)) from None
    finally:
        reporter.removeFilter(_no_report)
    return model, sorted(report["missing_keys"])


def refuse_missing(missing: list[str], source: str) -> None:
    """Weights that the checkpoint should have.

    Raises:
        PrimaError: naming the first.
    """
    wanted = [name for name in missing if not name.startswith(_UNUSED)]
    if wanted:
        raise PrimaError(
            f"the weights do not fit their config: {len(wanted)} are missing ({wanted[0]}, ...)", where=source
        )


def _mend(key: str) -> str:
    return f"Name a local folder in {key}, or bring the model with `prima fetch`."


def _no_report(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in ("LOAD REPORT", "tied weights mapping"))


def check_architecture(fields: Mapping[str, Any], *, key: str) -> None:
    """Refuse fields that transformers would keep without reading them, and values that no model can have.

    Not for what a run has saved: that may be of another version of transformers, whose config had other fields.

    Args:
        fields: `model_type` and what else its transformers config takes, as a person wrote them.
        key: where they stand in the config.

    Raises:
        PrimaError: naming the field, and the nearest that there is.
    """
    from transformers import AutoConfig

    try:
        default = AutoConfig.for_model(fields["model_type"])
    except (KeyError, TypeError, ValueError) as error:
        raise PrimaError(f"{key}.model_type: {first_line(error)}") from None
    known = sorted(name for name in vars(default) if not name.startswith("_"))
    for name, value in fields.items():
        before = getattr(default, name, None)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name.endswith(("_size", "_heads", "_dim")) and isinstance(before, int) and not (whole and value > 0):
            raise PrimaError(f"{key}.{name}: expected a whole number from 1 (got {value!r})")
    try:
        made = AutoConfig.for_model(**fields)
    except Exception as error:  # each model's config has checks of its own, and huggingface_hub types for them
        raise PrimaError(f"{key}: {' '.join(str(error).split())}") from None
    # What a config reads under an older name it takes away; what it does not know it keeps as it is.
    odd = [name for name in fields if not hasattr(default, name) and name in vars(made)]
    if odd:
        near = difflib.get_close_matches(odd[0], known, n=1, cutoff=0.5)
        hint = f", did you mean {f'{key}.{near[0]}'!r}?" if near else f"; known: {', '.join(known)}"
        raise PrimaError(f"unknown key {f'{key}.{odd[0]}'!r}{hint}")


def from_architecture(fields: Mapping[str, Any], tokenizer: Any, *, attention: str | None = None) -> Any:
    """A base model with random weights, in fp32, without dropout but for what ``fields`` ask.

    Args:
        fields: `model_type` and what else its transformers config takes; what concerns the vocabulary is filled in.
        tokenizer: a transformers tokenizer.

    Raises:
        PrimaError: no such type, impossible sizes, or a vocabulary smaller than the tokenizer's.
    """
    from transformers import AutoConfig, AutoModel

    try:
        architecture = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **fields})
    except (KeyError, TypeError, ValueError) as error:
        raise PrimaError(f"config: {first_line(error)}") from None
    if architecture.vocab_size < len(tokenizer):
        raise PrimaError(
            f"config.vocab_size is {architecture.vocab_size}, the tokenizer has {len(tokenizer)} tokens",
            mend="Leave vocab_size out, or name the model's own tokenizer.",
        )
    for name in _SPECIAL:
        # By default they are those of the vocabulary that the architecture was published with.
        if (getattr(architecture, name, None) or 0) >= architecture.vocab_size:
            setattr(architecture, name, getattr(tokenizer, name, None))
    no_dropout(architecture, but=fields)
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        return AutoModel.from_config(architecture, dtype=torch.float32, **options)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise PrimaError(f"config: {first_line(error)}") from None


_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


def no_dropout(architecture: Any, *, but: Collection[str] = ()) -> None:
    """Published rates are of another training; what a config asks for (``but``) stays, and is keyed by exam."""
    for key, value in vars(architecture).items():
        if "dropout" in key and key not in but and isinstance(value, float):
            setattr(architecture, key, 0.0)


def refuse_attention_dropout(fields: Mapping[str, Any]) -> None:
    """Attention draws its masks inside of a fused kernel, by the worker: nothing outside can key them by exam.

    Raises:
        ValueError: naming the field of a transformers config, for a validator.
    """
    for name, value in fields.items():
        if "attention" in name and "dropout" in name and value:
            raise ValueError(
                f"config.{name}: its masks are drawn inside of the attention, by the worker; leave it at 0 (other "
                "dropout can be keyed by exam)"
            )


def architecture_of(model: Any) -> dict[str, Any]:
    """A model's transformers config as plain data, without where it came from."""
    fields: dict[str, Any] = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"):
        fields.pop(key, None)
    return fields
