"""Hugging Face folders in and out: transformers is the oracle."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fstep.state import weights
from fstep.state.hf_folder import WeightsError
from fstep.state.weights import HFTensor, load_hf, save_hf, stream_hf
from fstep.tree import Tied, tree_leaves, tree_map, tree_paths

D, F, V, N = 8, 12, 32, 2
TIED = {"lm_head.weight": "embed"}


def llama_config(*, tie: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=D,
        intermediate_size=F,
        vocab_size=V,
        num_hidden_layers=N,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
    )


def llama_spec(*, tie: bool) -> dict[str, Any]:
    def layer(i: int) -> dict[str, HFTensor]:
        shapes = {
            "self_attn.q_proj": (D, D),
            "self_attn.k_proj": (D // 2, D),
            "self_attn.v_proj": (D // 2, D),
            "self_attn.o_proj": (D, D),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
        }
        return {name.split(".")[-1]: HFTensor(f"model.layers.{i}.{name}.weight", s) for name, s in shapes.items()}

    return {
        "embed": HFTensor("model.embed_tokens.weight", (V, D)),
        "layers": {i: layer(i) for i in range(N)},
        "norm": HFTensor("model.norm.weight", (D,)),
        "head": Tied("embed") if tie else HFTensor("lm_head.weight", (V, D)),
    }


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.messages.append(record.getMessage())


@contextlib.contextmanager
def silence_required() -> Iterator[None]:
    heard = Heard()
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(heard)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(heard)
    assert heard.messages == []


def hf_model(folder: Path, *, tie: bool, **options: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama_config(tie=tie)).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms that are not all ones
            p.normal_()
    model.save_pretrained(folder, **options)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


def test_a_word_of_transformers_would_be_heard(tmp_path: Path) -> None:
    hf_model(tmp_path, tie=False)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="LOAD REPORT"), silence_required():
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("tie", [False, True])
def test_transformers_to_params_and_back_gives_the_same_logits_without_a_word(
    tmp_path: Path, tie: bool, shards: int
) -> None:
    options: dict[str, Any] = {} if shards == 1 else {"max_shard_size": 2000}
    model = hf_model(tmp_path / "hf", tie=tie, **options)
    assert (tmp_path / "hf" / "model.safetensors").exists() == (shards == 1)
    spec = llama_spec(tie=tie)
    params = load_hf(tmp_path / "hf", spec)
    named = dict(model.named_parameters())
    assert len(named) == len(tree_leaves(params)) == 9 * N + (2 if tie else 3)
    for leaf, x in zip(tree_leaves(spec), tree_leaves(params), strict=True):
        assert torch.equal(x, named[leaf.name]), leaf.name
    assert params["head"] == Tied("embed") if tie else isinstance(params["head"], Tensor)

    config = model.config.to_dict()
    limit = 5_000_000_000 if shards == 1 else 2000
    path = save_hf(tmp_path / "out", params, spec, config=config, max_shard_bytes=limit)
    assert path == tmp_path / "out"
    with silence_required():
        again = AutoModelForCausalLM.from_pretrained(path)
    assert type(again) is LlamaForCausalLM
    assert torch.equal(logits(again), logits(model))
    assert not tie or again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    back = load_hf(path, spec)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(back), tree_leaves(params), strict=True))


def test_layout_of_a_sharded_folder(tmp_path: Path) -> None:
    spec = {name: HFTensor(f"{name}.weight", (2, 5)) for name in "abcde"}
    params = {name: torch.randn(2, 5) for name in "abcde"}
    path = save_hf(tmp_path / "out", params, spec, max_shard_bytes=80, config={"z": 1, "architectures": ["Mine"]})
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(path)) == ["config.json", *shards, "model.safetensors.index.json"]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"] == {f"{n}.weight": shards[i // 2] for i, n in enumerate("abcde")}
    read = {k: v for shard in shards for k, v in load_file(path / shard).items()}
    assert all(torch.equal(read[f"{n}.weight"], params[n]) for n in "abcde")
    assert (path / "config.json").read_text() == '{\n  "architectures": [\n    "Mine"\n  ],\n  "z": 1\n}\n'


def test_dtypes_are_converted_and_integers_are_not(tmp_path: Path) -> None:
    spec = {"w": HFTensor("w", (3,)), "h": HFTensor("h", (2,)), "n": HFTensor("n", ())}
    params = {"w": torch.randn(3, dtype=torch.float64), "h": torch.randn(2).half(), "n": torch.tensor(5)}
    path = save_hf(tmp_path / "a", params, spec)
    kept = load_hf(path, spec)
    assert {k: v.dtype for k, v in kept.items()} == {"w": torch.float64, "h": torch.float16, "n": torch.int64}
    assert all(torch.equal(kept[k], params[k]) for k in params)
    cast = load_hf(path, spec, dtype=torch.bfloat16)
    assert {k: v.dtype for k, v in cast.items()} == {"w": torch.bfloat16, "h": torch.bfloat16, "n": torch.int64}
    assert torch.equal(cast["w"], params["w"].bfloat16()) and int(cast["n"]) == 5
    small = load_file(save_hf(tmp_path / "b", params, spec, dtype=torch.bfloat16) / "model.safetensors")
    assert {k: v.dtype for k, v in small.items()} == {"w": torch.bfloat16, "h": torch.bfloat16, "n": torch.int64}
    assert torch.equal(small["w"], params["w"].bfloat16())
    assert load_hf(path, spec, device="meta")["w"].device.type == "meta"


def test_params_do_not_depend_on_the_file_after_loading(tmp_path: Path) -> None:
    spec = {"w": HFTensor("w", (100,))}
    path = save_hf(tmp_path / "a", {"w": torch.ones(100)}, spec)
    params = load_hf(path, spec)
    file = path / "model.safetensors"
    with open(file, "r+b") as handle:  # the same file, not a new one of its name
        handle.write(b"\0" * file.stat().st_size)
    assert params["w"].tolist() == [1.0] * 100


def test_save_reads_one_tensor_at_a_time_and_changes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = llama_spec(tie=False)
    params = tree_map(lambda leaf: torch.randn(leaf.shape, requires_grad=True), spec)
    versions = [x._version for x in tree_leaves(params)]
    events: list[str] = []
    deliver = weights.deliver

    def spy(*args: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
        for name, x in deliver(*args, **options):
            events.append(name)
            yield name, x

    monkeypatch.setattr(weights, "deliver", spy)
    monkeypatch.setattr(weights, "write_safetensors", lambda *a: events.append("file") or [*a[2]])
    save_hf(tmp_path / "out", params, spec, max_shard_bytes=3000)
    # Shard by shard, each when it is written.
    assert events[0] == "file" and events.count("file") == 3
    assert [e for e in events if e != "file"] == [leaf.name for leaf in tree_leaves(spec)]
    assert versions == [x._version for x in tree_leaves(params)]


def test_stream_yields_every_tensor_under_its_name_and_no_copy() -> None:
    spec = llama_spec(tie=True)
    params = tree_map(lambda leaf: torch.randn(leaf.shape, requires_grad=True), spec)
    streamed = list(stream_hf(params, spec))
    assert [name for name, _ in streamed] == [leaf.name for leaf in tree_leaves(spec)]
    assert "lm_head.weight" not in dict(streamed)
    for (_, x), p in zip(streamed, tree_leaves(params), strict=True):
        assert x.data_ptr() == p.data_ptr() and not x.requires_grad


# Parts and ties -------------------------------------------------------------------------------------------------------


def test_a_stage_reads_only_its_own_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_model(tmp_path / "hf", tie=False, max_shard_size=2000)
    spec = llama_spec(tie=False)
    part = {"layers": {1: spec["layers"][1]}, "head": spec["head"]}
    with pytest.raises(WeightsError, match=r"has 11 tensors that spec lacks: 'model.embed_tokens.weight'.*strict=False"):
        load_hf(tmp_path / "hf", part)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {index[leaf.name] for leaf in tree_leaves(part)}
    for shard in set(index.values()) - needed:  # what is not needed is not even opened
        (tmp_path / "hf" / shard).write_bytes(b"")
    assert needed < set(index.values())
    params = load_hf(tmp_path / "hf", part, strict=False)
    assert tree_paths(params) == tree_paths(part)
    assert torch.equal(params["layers"][1]["q_proj"], model.model.layers[1].self_attn.q_proj.weight)


def test_ignored_names(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2), "a.rotary_emb.inv_freq": torch.ones(1)}, tmp_path / "model.safetensors")
    spec = {"w": HFTensor("w", (2,))}
    with pytest.raises(WeightsError, match=r"has 1 tensors that spec lacks: 'a.rotary_emb.inv_freq'; .*pass ignore="):
        load_hf(tmp_path, spec)
    assert load_hf(tmp_path, spec, ignore=["rotary_emb.inv_freq"])["w"].tolist() == [1, 1]


def test_a_tied_tensor_on_disk_must_be_the_same(tmp_path: Path) -> None:
    spec = {"embed": HFTensor("model.embed_tokens.weight", (2, 2)), "head": Tied("embed")}
    embed = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    file = tmp_path / "model.safetensors"
    save_file({"model.embed_tokens.weight": embed, "lm_head.weight": embed.clone()}, file)
    assert load_hf(tmp_path, spec, tied=TIED)["head"] == Tied("embed")
    with pytest.raises(WeightsError, match=r"1 tensors that spec lacks: 'lm_head.weight'"):
        load_hf(tmp_path, spec)
    for other in (
        embed + torch.tensor([[0.0, 0.0], [0.0, 1e-6]]),
        embed * torch.tensor(-1.0),
        embed.half(),
        embed[:1],
        embed.view(4, 1),
    ):
        save_file({"model.embed_tokens.weight": embed, "lm_head.weight": other.clone()}, file)
        with pytest.raises(
            WeightsError, match=r"spec ties 'lm_head.weight' to .*different values; set tie_word_embeddings=f"
        ):
            load_hf(tmp_path, spec, tied=TIED)
    save_file({"model.embed_tokens.weight": embed}, file)
    assert load_hf(tmp_path, spec, tied=TIED)["head"] == Tied("embed")
    with pytest.raises(WeightsError, match=r"tied names 'embd', spec has no such leaf; it has 'embed'"):
        load_hf(tmp_path, spec, tied={"lm_head.weight": "embd"})


def test_a_tie_is_looked_at_only_where_the_spec_has_it(tmp_path: Path) -> None:
    untied = {"embed": HFTensor("model.embed_tokens.weight", (2,)), "head": HFTensor("lm_head.weight", (2,))}
    path = save_hf(tmp_path / "a", {"embed": torch.zeros(2), "head": torch.ones(2)}, untied)
    assert load_hf(path, untied, tied=TIED)["head"].tolist() == [1, 1]
    assert load_hf(path, {"head": untied["head"]}, tied=TIED, strict=False)["head"].tolist() == [1, 1]
    assert load_hf(path, {"head": Tied("embed")}, tied=TIED, strict=False) == {"head": Tied("embed")}


# Folders that are not right -------------------------------------------------------------------------------------------

SPEC = {"a": HFTensor("a.weight", (2, 3)), "b": HFTensor("b.weight", (4,))}


def good_folder(folder: Path, *, sharded: bool = False) -> Path:
    params = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    return save_hf(folder, params, SPEC, config={"model_type": "mine"}, max_shard_bytes=24 if sharded else 10**9)


def test_folder_missing_or_no_model(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"load_hf: there is no folder .*nowhere; download the model first"):
        load_hf(tmp_path / "nowhere", SPEC)
    with pytest.raises(WeightsError, match=r"is no model folder: it needs model.safetensors, or .*, and has nothing; pass"):
        load_hf(tmp_path, SPEC)
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").touch()
    with pytest.raises(WeightsError, match=r"has 'config.json', 'pytorch_model.bin'; convert its pickled weights"):
        load_hf(tmp_path, SPEC)


def test_missing_tensors_are_all_named(tmp_path: Path) -> None:
    many = SPEC | {f"x{i:02d}": HFTensor(f"x{i:02d}", (1,)) for i in range(25)}
    match = r"lacks 25 of 27 tensors: 'x00', .*'x19' and 5 more; it has 'a.weight', 'b.weight'; make spec"
    with pytest.raises(WeightsError, match=match):
        load_hf(good_folder(tmp_path / "m"), many)


def test_wrong_shapes_are_all_named(tmp_path: Path) -> None:
    spec = {"a": HFTensor("a.weight", (3, 2)), "b": HFTensor("b.weight", (5,))}
    match = r"'a.weight' is \(2, 3\) and spec says \(3, 2\); 'b.weight' is \(4,\) and spec says \(5,\)"
    with pytest.raises(WeightsError, match=match):
        load_hf(good_folder(tmp_path / "m"), spec)


def test_bad_index(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "m", sharded=True)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    for bad in ("", "{", "[]", "{}", '{"weight_map": 3}', "\x00"):
        index.write_text(bad)
        with pytest.raises(WeightsError, match=r"model.safetensors.index.json is no index with a weight_map"):
            load_hf(folder, SPEC)
    index.write_text(good.replace("00002-of", "00001-of"))  # names a file that is there, for a tensor that is not in it
    with pytest.raises(WeightsError, match=r"model-00001-of-00002.safetensors is damaged .*'b.weight' is not in it"):
        load_hf(folder, SPEC)
    index.write_text(good)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"index.json names 'model-00002-of-00002.safetensors', absent from the folder"):
        load_hf(folder, SPEC)


@pytest.mark.parametrize("ours", [True, False])
def test_every_truncation_names_the_file(tmp_path: Path, ours: bool) -> None:
    folder = good_folder(tmp_path / "m")
    file = folder / "model.safetensors"
    if not ours:
        save_file(load_file(file), file)
    good = file.read_bytes()
    for size in range(0, len(good), 3):
        file.write_bytes(good[:size])
        with pytest.raises(WeightsError, match=f"{re.escape(str(file))} is damaged or cut short"):
            load_hf(folder, SPEC)


def test_no_flipped_bit_of_a_folder_we_wrote_changes_what_is_loaded(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "m", sharded=True)
    right = load_hf(folder, SPEC)
    spans = {"model-00001-of-00002.safetensors": ("a.weight", 24), "model-00002-of-00002.safetensors": ("b.weight", 16)}
    rng = random.Random(0)
    caught = unharmed = 0
    for file in sorted(folder.glob("model*")):
        good = file.read_bytes()
        size = 8 * len(good)
        name, nbytes = spans.get(file.name, ("", 0))
        for place in {*range(64), *rng.sample(range(size), 600), *range(size - 8 * nbytes, size)}:
            bad = bytearray(good)
            bad[place // 8] ^= 1 << place % 8
            file.write_bytes(bad)
            if place // 8 >= len(good) - nbytes:
                with pytest.raises(WeightsError, match=f"{re.escape(str(file))} is damaged .*tensor '{name}' does not"):
                    load_hf(folder, SPEC)
                continue
            try:
                loaded = load_hf(folder, SPEC)
            except WeightsError as error:
                assert str(folder) in str(error)
                caught += 1
            else:  # say, in the index's total_size
                unharmed += 1
                assert all(torch.equal(loaded[k], right[k]) and loaded[k].dtype == right[k].dtype for k in right)
        file.write_bytes(good)
    assert caught > 5 * unharmed


def test_folders_without_checksums_load(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    assert load_hf(tmp_path, SPEC)["a"].sum() == 6


# What may not be written ----------------------------------------------------------------------------------------------


def test_params_that_do_not_fit_the_spec(tmp_path: Path) -> None:
    good = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    for params, message in [
        ({"a": good["a"]}, r"params have no leaf 'b', which spec has"),
        (good | {"b": None}, r"params have no leaf 'b', which spec has"),
        (good | {"c": good["b"]}, r"spec has no leaf 'c', which params have"),
        (
            good | {"a": {"base": good["a"]}},
            r"no leaf 'a', which spec has; spec has no leaf 'a.base', .*merge adapters",
        ),
        (good | {"b": torch.zeros(2, 2)}, r"leaf 'b' has the shape \(2, 2\), spec says \(4,\) for 'b.weight'"),
    ]:
        with pytest.raises(WeightsError, match=message):
            stream_hf(params, SPEC)
        with pytest.raises(WeightsError, match=message):
            save_hf(tmp_path / "out", params, SPEC)
    with pytest.raises(WeightsError, match=r"spec has a tuple at 'a'|spec has a str at 'a.0'"):
        stream_hf(good, {"a": ("a.weight",)})
    with pytest.raises(WeightsError, match=r"spec has 'w' at 'a' and 'b'; put Tied\('a'\) at 'b'"):
        load_hf(tmp_path, {"a": HFTensor("w", (1,)), "b": HFTensor("w", (1,))})
    for x in (torch.zeros(4, device="meta"), torch.zeros(4, dtype=torch.complex128)):
        with pytest.raises(WeightsError, match=r"'b.weight' is torch.* which no file can hold"):
            save_hf(tmp_path / "out", good | {"b": x}, SPEC)
    assert os.listdir(tmp_path) == []


def test_only_model_folders_are_replaced(tmp_path: Path) -> None:
    params = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    folder = good_folder(tmp_path / "m", sharded=True)
    (folder / "stale.txt").touch()
    save_hf(folder, params, SPEC)
    assert os.listdir(folder) == ["model.safetensors"] and load_hf(folder, SPEC)["a"].sum() == 0
    (tmp_path / "link").symlink_to(folder)
    assert save_hf(tmp_path / "link", {"a": params["a"] + 1, "b": params["b"]}, SPEC) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink() and load_hf(folder, SPEC)["a"].sum() == 6
    (tmp_path / "link").unlink()
    (folder / "checkpoints").mkdir()
    with pytest.raises(WeightsError, match=r"would be replaced, folders 'checkpoints' in it too"):
        save_hf(folder, params, SPEC)
    (tmp_path / "mine").mkdir()
    save_hf(tmp_path / "mine", params, SPEC)  # empty: nothing to lose
    shutil.rmtree(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(WeightsError, match=r"exists and is no model folder, it has 'thesis.tex'; pass another path"):
        save_hf(tmp_path / "mine", params, SPEC)
    with pytest.raises(WeightsError, match=r"thesis.tex is a file; pass the path of a folder"):
        save_hf(tmp_path / "mine" / "thesis.tex", params, SPEC)
    assert sorted(os.listdir(tmp_path)) == ["m", "mine"]


def test_a_save_that_fails_halfway_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = good_folder(tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(weights.shutil, "copyfile", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(OSError, match="No space"):
        save_hf(folder, {"a": torch.zeros(2, 3), "b": torch.zeros(4)}, SPEC, extra_files=[tmp_path / "tokenizer.json"])
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["m", "tokenizer.json"]


def test_extra_files_and_config(tmp_path: Path) -> None:
    params = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    old = good_folder(tmp_path / "m")
    (old / "tokenizer.json").write_text("{}")
    # Also from the very folder that is replaced.
    save_hf(old, params, SPEC, extra_files=[old / "tokenizer.json"])
    assert sorted(os.listdir(old)) == ["model.safetensors", "tokenizer.json"]
    assert (old / "tokenizer.json").read_text() == "{}"
    for extra in (tmp_path / "absent", tmp_path, old / "model.safetensors"):
        with pytest.raises(WeightsError, match=r"extra_files has .*, no file or of a name already written"):
            save_hf(tmp_path / "new", params, SPEC, extra_files=[extra])
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(WeightsError, match=r"extra_files has .*tokenizer.json', no file or of a name already written"):
        save_hf(tmp_path / "new", params, SPEC, extra_files=[old / "tokenizer.json", tmp_path / "tokenizer.json"])
    with pytest.raises(WeightsError, match=r"config is not JSON: .*; pass plain values"):
        save_hf(tmp_path / "new", params, SPEC, config={"dtype": torch.float32})
    assert sorted(os.listdir(tmp_path)) == ["m", "tokenizer.json"]
