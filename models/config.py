"""Reading a Hugging Face config strictly: every value is honoured, known not to matter, or refused by name.

A config key that a model silently ignores is a model that is silently wrong. `read_config` gives a dict out of
which a family pops each key that it honours; what is left over at the end is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from fstep import Rope
from fstep.ops.rope import KINDS

# Keys that say nothing about the computation: bookkeeping, generation defaults, and outputs fstep does not offer.
IRRELEVANT = frozenset(
    """_name_or_path architectures bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id
    unk_token_id chunk_size_feed_forward dtype torch_dtype id2label label2id problem_type return_dict output_attentions
    output_hidden_states transformers_version use_cache model_type pretraining_tp max_position_embeddings
    initializer_range torchscript auto_map use_return_dict num_labels generation_config tokenizer_class
    decoder_start_token_id is_llama_config unsloth_version unsloth_fixed _attn_implementation_autoset
    transformers.js_config max_sequence_length""".split()
)


class ConfigError(ValueError):
    """Raised for a Hugging Face config that a model family does not honour in full."""


def read_json(folder: str | Path) -> dict[str, Any]:
    """Return a model folder's config.json as it is."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ConfigError(f"read_config: {folder} has no config.json; pass the folder of a Hugging Face model")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"read_config: {file} is not JSON ({error}); copy it again") from error


def stored_dtype(folder: str | Path) -> torch.dtype | None:
    """Return the dtype that a model folder says its weights have, if it says."""
    config = read_json(folder)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def read_config(source: str | Path | Mapping[str, Any] | PretrainedConfig) -> dict[str, Any]:
    """Return the config of a folder, a mapping or a transformers config as a plain dict with defaults filled in."""
    if isinstance(source, PretrainedConfig):
        return source.to_dict()
    given = read_json(source) if isinstance(source, (str, Path)) else dict(source)
    if not isinstance(given, dict) or "model_type" not in given:
        raise ConfigError("read_config: the config has no model_type; pass the config.json of a Hugging Face model")
    try:
        return AutoConfig.for_model(**given).to_dict()
    except ConfigError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(f"read_config: transformers refuses this config: {error}") from error


def read_rope(config: dict[str, Any], dim: int, max_positions: int) -> Rope:
    """Take ``rope_parameters`` out of a config and return the `Rope` they describe."""
    given = dict(config.pop("rope_parameters", None) or {})
    if any(isinstance(v, Mapping) for v in given.values()):
        raise ConfigError(f"read_rope: rope_parameters per layer type ({sorted(given)}) are not supported by this family")
    given.pop("type", None)  # the older name of rope_type, which transformers has filled in
    kind = given.pop("rope_type", "default")
    if (part := given.pop("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ConfigError(f"read_rope: partial_rotary_factor is {part}; this family turns whole heads (1.0)")
    if kind not in KINDS:
        raise ConfigError(f"read_rope: rope_type {kind!r} is not supported by this family; it runs {', '.join(KINDS)}")
    fields: dict[str, Any] = {"theta": float(given.pop("rope_theta")), "dim": dim, "kind": kind}
    trained = given.pop("original_max_position_embeddings", None)
    if kind == "dynamic":
        if trained not in (None, max_positions):
            raise ConfigError(
                f"read_rope: dynamic rope with original_max_position_embeddings {trained} and max_position_embeddings "
                f"{max_positions}; its formula has one length, so make them equal"
            )
        fields["trained_length"] = max_positions
    elif kind in ("yarn", "llama3"):
        fields["trained_length"] = trained or max_positions
    allowed = {
        "linear": ["factor"],
        "dynamic": ["factor"],
        "yarn": ["factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
    }.get(kind, [])
    for name in allowed:
        if (value := given.pop(name, None)) is not None:
            fields[name] = value
    if kind == "yarn" and "factor" not in fields:
        fields["factor"] = max_positions / fields["trained_length"]
    if left := {k: v for k, v in given.items() if v is not None}:
        raise ConfigError(f"read_rope: rope_parameters {left} mean nothing to rope_type {kind!r}; remove them")
    try:
        return Rope(**fields)
    except ValueError as error:
        raise ConfigError(f"read_rope: {error}") from error


def write_rope(rope: Rope) -> dict[str, Any]:
    """Return the ``rope_parameters`` that `read_rope` reads as ``rope``."""
    out: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        out["factor"] = rope.factor
    if rope.kind in ("yarn", "llama3"):
        out["original_max_position_embeddings"] = rope.trained_length
    if rope.kind == "llama3":
        out |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            out["attention_factor"] = rope.attention_factor
        if rope.mscale or rope.mscale_all_dim:
            out |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    return out


# Switches that some checkpoints carry, and the one value of each that asks for nothing.
OFF = {
    "attention_dropout": 0.0,
    "add_cross_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}


def refuse_rest(family: str, config: dict[str, Any]) -> None:
    """Raise for every value left in ``config`` that is neither irrelevant nor switched off."""
    wrong = {k: v for k, v in config.items() if k not in IRRELEVANT and v is not None and v != OFF.get(k)}
    if wrong:
        said = ", ".join(f"{k}={v!r}" + (f" (only {OFF[k]!r})" if k in OFF else "") for k, v in wrong.items())
        raise ConfigError(
            f"{family}: the config has values this family does not honour: {said}; remove "
            "them if the checkpoint was not trained with them, or use another family"
        )


def tokenizer_files(folder: str | Path) -> list[Path]:
    """List the files of a model folder that belong to its tokenizer and to generation."""
    patterns = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
    found = {f for pattern in (*patterns, "generation_config.json") for f in Path(folder).glob(pattern) if f.is_file()}
    return sorted(found)
