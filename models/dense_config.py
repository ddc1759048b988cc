"""The config of a dense decoder, read from Hugging Face's and written back.

What the families differ in becomes a switch here (biases, q/k norms, windows), so that `fstep_models.dense` never asks
which family it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fstep import Rope
from fstep_models.config import ConfigError, read_config, read_rope, refuse_rest, write_rope

# Keys of older config files whose content is written under another name.
REWRITTEN = ("rope_scaling", "rope_theta", "rope_parameters", "torch_dtype", "dtype")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Config:
    """Shapes and switches of a dense decoder; `Config.from_hf` reads them from a Hugging Face config."""

    family: str
    vocab: int
    dim: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    windows: tuple[int, ...]  # of each layer: how many tokens it sees, 0 for all
    eps: float = 1e-6
    act: str = "silu"
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 32768
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(f"dense: model_type {self.family!r} is not one of {', '.join(FAMILIES)}")
        if self.act not in ACTIVATIONS:
            raise ConfigError(f"dense: hidden_act {self.act!r} is not one of {', '.join(ACTIVATIONS)}")
        for name in ("vocab", "dim", "ffn", "layers", "heads", "kv_heads", "head_dim", "max_positions"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ConfigError(f"dense: {name} is {value!r}; pass a whole number of 1 or more")
        if not self.eps > 0 or any(w < 0 for w in self.windows):
            raise ConfigError(f"dense: eps {self.eps} must be above 0 and windows {set(self.windows)} 0 or more")
        if self.rope.dim != self.head_dim:
            raise ConfigError(f"dense: rope turns {self.rope.dim} of the heads' {self.head_dim} dimensions; make them equal")
        if self.heads % self.kv_heads:
            raise ConfigError(f"dense: {self.kv_heads} key heads do not divide {self.heads} query heads")
        if len(self.windows) != self.layers:
            raise ConfigError(f"dense: {len(self.windows)} windows for {self.layers} layers; give one a layer, 0 for none")

    @staticmethod
    def from_hf(source: str | Path | Mapping[str, Any] | Any) -> Config:
        """Read a folder's config.json, a mapping or a transformers config; refuse what would not be honoured."""
        c = read_config(source)
        family = c["model_type"]
        if family not in FAMILIES:
            raise ConfigError(f"dense: model_type {family!r} is not one of {', '.join(FAMILIES)}")
        layers, heads = c.pop("num_hidden_layers"), c.pop("num_attention_heads")
        dim, positions = c.pop("hidden_size"), c["max_position_embeddings"]
        head_dim = c.pop("head_dim", None) or dim // heads
        biased = bool(c.pop("attention_bias")) if family in ("llama", "qwen3") else False
        window = c.pop("sliding_window") if family != "llama" else None
        if family == "mistral":
            if window == 0:
                raise ConfigError("dense: sliding_window is 0; give the number of tokens seen, or null for all")
            windows = (window or 0,) * layers
        elif family == "llama":
            windows = (0,) * layers
        else:
            c.pop("use_sliding_window"), c.pop("max_window_layers")  # both are in layer_types by now
            windows = _windows(c.pop("layer_types"), window)
        config = Config(
            family=family,
            vocab=c.pop("vocab_size"),
            dim=dim,
            ffn=c.pop("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=c.pop("num_key_value_heads") or heads,
            head_dim=head_dim,
            rope=read_rope(c, head_dim, positions),
            windows=windows,
            eps=c.pop("rms_norm_eps"),
            act=c.pop("hidden_act"),
            tied=bool(c.pop("tie_word_embeddings")),
            qkv_bias=biased or family == "qwen2",
            out_bias=biased,
            mlp_bias=bool(c.pop("mlp_bias")) if family == "llama" else False,
            qk_norm=family == "qwen3",
            max_positions=positions,
            init_std=c["initializer_range"],
        )
        refuse_rest(f"dense ({family})", c)
        return config

    def to_hf(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the config.json of this model; ``base`` gives the keys that say nothing about the computation."""
        architecture = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[self.family]
        out: dict[str, Any] = {
            **{k: v for k, v in (base or {}).items() if k not in REWRITTEN},
            "model_type": self.family,
            "architectures": [f"{architecture}ForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.dim,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rope_parameters": write_rope(self.rope),
            "rms_norm_eps": self.eps,
            "hidden_act": self.act,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.init_std,
        }
        if self.family in ("llama", "qwen3"):
            out["attention_bias"] = self.qkv_bias
        if self.family == "llama":
            out["mlp_bias"] = self.mlp_bias
        if self.family == "mistral":
            out["sliding_window"] = self.windows[0] or None
        if self.family in ("qwen2", "qwen3"):
            out["layer_types"] = ["sliding_attention" if w else "full_attention" for w in self.windows]
            out["sliding_window"] = max(self.windows) or None
            out["use_sliding_window"] = any(self.windows)
        return out


def _windows(layer_types: list[str], window: int | None) -> tuple[int, ...]:
    for kind in layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"dense: layer_types has {kind!r}; only full_attention and sliding_attention are supported")
        if kind == "sliding_attention" and not window:
            raise ConfigError("dense: layer_types has sliding_attention and sliding_window is not set; give its size")
    return tuple(window or 0 if kind == "sliding_attention" else 0 for kind in layer_types)
