"""Decoding with a cache beside transformers' own generation, and beside the forward pass that trains."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import fstep
import fstep.testing
from fstep import Docs, Key, Mesh, Packed
from fstep_models import dense_decode
from fstep_models.config import ConfigError
from fstep_models.dense import Config, Dense
from tests.hf_oracle import make_hf, true_float64
from tests.models.test_dense import CONFIGS, ROPES, TINY, from_module
from tests.models.test_dense_mesh import params_of

F64 = torch.float64
KEY = Key.seed(2)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [30, 31, 32], [7, 7]]
NAMES = ["llama", "llama-biases-tied", "llama-one-kv-head", "qwen2", "qwen3", "qwen3-tied-biases-mixed", "mistral-sliding",
         "mistral-full", "rope-linear", "rope-yarn-mscale", "rope-llama3"]  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_decode, "BLOCK", 4)  # so that every cache grows


def answers(docs: Docs, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    tokens = docs.tokens.split(docs.lengths.tolist())
    return [t[len(p) :].tolist() for t, p in zip(tokens, prompts, strict=True)]


@pytest.mark.parametrize("name", ["llama", "llama-one-kv-head", "qwen2", "qwen3", "mistral-sliding", "rope-llama3"])
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    module = make_hf(CONFIGS[name], seed=6)
    model = Dense(Config.from_hf(CONFIGS[name]))
    docs = fstep.generate(
        model.decode, from_module(model, module), fstep.make_docs(PROMPTS), KEY, most=15, temperature=0, stop=[11]
    )
    want = []
    with true_float64(), torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            out = module.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=15, eos_token_id=11, pad_token_id=0
            )
            want.append(out[0, len(prompt) :].tolist())
    assert answers(docs) == want
    assert len({t for a in want for t in a}) > 8  # not the same token over and over


def logits_by_place(model: Dense, params: Any, docs: Docs) -> tuple[Tensor, ...]:
    packed = fstep.pack_thd(docs)
    return fstep.split_documents(model.logits(params, model.stage()(params, None, packed)), packed)


def one_token(tokens: Tensor, positions: Tensor) -> Packed:
    mb = fstep.pack_thd(fstep.make_docs([[int(t)] for t in tokens]))
    return Packed(**{**vars(mb), "positions": positions})


@pytest.mark.parametrize("multiple_of", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_logits_at_every_place_are_those_of_the_whole_row(name: str, multiple_of: int) -> None:
    model = Dense(Config.from_hf(CONFIGS[name]))
    params = params_of(model)
    full = [torch.randint(0, 37, (len(p) + 13,), generator=torch.Generator().manual_seed(i)) for i, p in enumerate(PROMPTS)]
    want = logits_by_place(model, params, fstep.make_docs(full))
    row = fstep.pack_thd(fstep.make_docs([x[: len(p)] for x, p in zip(full, PROMPTS, strict=True)]), multiple_of=multiple_of)
    logits, cache = model.decode(params, None, row)
    for n in range(13):
        places = torch.tensor([len(p) + n for p in PROMPTS])
        expected = torch.stack([w[i - 1] for w, i in zip(want, places.tolist(), strict=True)])
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-11)
        tokens = torch.stack([x[i] for x, i in zip(full, places.tolist(), strict=True)])
        logits, cache = model.decode(params, cache, one_token(tokens, places))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-10)])
@pytest.mark.parametrize("name", ["llama", "qwen3-tied-biases-mixed", "mistral-sliding"])
def test_log_probabilities_are_those_that_training_computes(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = Dense(Config.from_hf(CONFIGS[name]))
    params = fstep.cast(params_of(model), dtype)
    options: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "stop": [0, 1], "samples": 3}
    docs = fstep.generate(model.decode, params, fstep.make_docs(PROMPTS), KEY, most=30, **options)
    assert docs.targets["generator"].dtype == dtype and 0 < int(docs.per_document["finished"].sum()) < 12
    # In another order, beside other documents, as microbatches of training are.
    for part in fstep.split_microbatches(docs, num=3):
        mb = fstep.pack_thd(part, multiple_of=4)
        scored = model.logprobs(params, model.stage()(params, None, mb), mb, temperature=0.7)
        assert float(((scored - mb.targets["generator"]) * mb.weights).abs().max()) < tolerance
        assert float((mb.targets["generator"] * (mb.weights == 0)).abs().max()) == 0


def test_on_policy_the_first_ratio_is_one_and_the_generator_is_the_policy() -> None:
    model = Dense(Config.from_hf(CONFIGS["qwen3"]))
    params = fstep.cast(params_of(model), torch.float32)
    docs = fstep.generate(model.decode, params, fstep.make_docs(PROMPTS), KEY, most=20, stop=[0], samples=4)
    advantages = fstep.group_advantages(torch.arange(16.0) % 3, docs.per_document["prompt"])
    row = fstep.pack_thd(docs)
    old = model.logprobs(params, model.stage()(params, None, row), row).detach()
    spread = fstep.spread_documents(advantages, row)

    def loss_fn(p: Any, x: Tensor, mb: Packed) -> tuple[Any, Any]:
        logprobs = model.logprobs(p, x, mb)
        loss, metrics = fstep.clipped_loss(logprobs - old, spread, mb.weights)
        return loss, {**metrics, "kl": fstep.kl_loss(mb.targets["generator"], old, mb.weights)}

    loss, metrics = loss_fn(params, model.stage()(params, None, row), row)
    assert float(metrics["ratio"].mean()) == 1.0 and float(metrics["clip_high"].mean()) == 0.0
    assert abs(float(metrics["kl"].mean())) < 1e-5
    factors, _ = fstep.importance_weights(old - row.targets["generator"], row.weights)
    torch.testing.assert_close(factors, torch.ones_like(factors), rtol=0, atol=1e-4)
    assert float(loss.den) == float(docs.weights.sum()) > 16


def test_half_precision_is_computed_as_in_training() -> None:
    model = Dense(Config.from_hf(CONFIGS["qwen3"]), dtype=torch.bfloat16)
    params = fstep.cast(params_of(model), torch.float32)
    docs = fstep.generate(model.decode, params, fstep.make_docs(PROMPTS), KEY, most=12, samples=2)
    _, cache = model.decode(params, None, fstep.pack_thd(fstep.make_docs(PROMPTS)))
    assert {x.dtype for x in fstep.tree_leaves(cache.layers)} == {torch.bfloat16}
    mb = fstep.pack_thd(docs)
    scored = model.logprobs(params, model.stage()(params, None, mb), mb)
    assert scored.dtype == docs.targets["generator"].dtype == torch.float32
    assert float(((scored - mb.targets["generator"]) * mb.weights).abs().max()) < 0.15
    once = fstep.cast(params, torch.bfloat16)  # instead of once a token
    same = fstep.generate(model.decode, once, fstep.make_docs(PROMPTS), KEY, most=12, samples=2)
    fstep.testing.assert_trees_close(same, docs, rtol=0)


def test_who_is_beside_it_does_not_change_a_documents_tokens() -> None:
    model = Dense(Config.from_hf(CONFIGS["mistral-sliding"]))
    params, prompts = params_of(model), fstep.make_docs(PROMPTS)
    whole = fstep.generate(model.decode, params, prompts, KEY, most=20, stop=[3], samples=2)
    part = fstep.generate(model.decode, params, fstep.select_documents(prompts, [2, 0]), KEY, most=20, stop=[3], samples=2)
    same = fstep.select_documents(whole, [4, 5, 0, 1])
    assert torch.equal(part.tokens, same.tokens) and torch.equal(part.lengths, same.lengths)
    torch.testing.assert_close(part.targets["generator"], same.targets["generator"], rtol=1e-10, atol=1e-12)


def test_layers_run_in_the_order_of_their_numbers() -> None:
    model = Dense(Config.from_hf(CONFIGS["llama"]))
    params, row = params_of(model), fstep.pack_thd(fstep.make_docs(PROMPTS))
    turned = {**params, "layers": dict(reversed(params["layers"].items()))}
    assert torch.equal(model.decode(params, None, row)[0], model.decode(turned, None, row)[0])


def test_params_and_prompts_stay_as_they_are() -> None:
    model = Dense(Config.from_hf(CONFIGS["qwen3"]))
    params = fstep.tree_map(lambda x: x.requires_grad_(), params_of(model))
    docs = fstep.testing.assert_pure(
        fstep.generate, model.decode, params, fstep.make_docs(PROMPTS), KEY, most=9, stop=[3], samples=2
    )
    logits, _ = model.decode(params, None, fstep.pack_thd(fstep.make_docs(PROMPTS)))
    assert not docs.targets["generator"].requires_grad and not logits.requires_grad


def test_a_cache_that_grows_never_stands_beside_a_second_one() -> None:
    model = Dense(Config.from_hf(CONFIGS["llama"]))
    params = params_of(model)
    _, cache = model.decode(params, None, fstep.pack_thd(fstep.make_docs(PROMPTS)))
    assert cache.longest == 8 and {x.shape for x in fstep.tree_leaves(cache.layers)} == {(4, 12, 2, 8)}
    alive: list[int] = []
    old = [weakref.ref(x) for x in fstep.tree_leaves(cache.layers)]

    class Watch(dict):
        def __getitem__(self, i: int) -> Any:
            alive.append(sum(ref() is not None for ref in old))
            return super().__getitem__(i)

    watched = {**params, "layers": Watch(params["layers"])}
    for n in range(5):
        _, cache = model.decode(watched, cache, one_token(torch.tensor([1, 2, 3, 4]), torch.tensor([8, 1, 3, 2]) + n))
    assert {x.shape for x in fstep.tree_leaves(cache.layers)} == {(4, 16, 2, 8)}
    assert alive == [6] * 12 + [6, 4, 2]  # while a layer grows, those done are gone


def test_what_is_refused() -> None:
    model = Dense(Config.from_hf(CONFIGS["llama"]))
    params = params_of(model)
    row = fstep.pack_thd(fstep.make_docs(PROMPTS))
    _, cache = model.decode(params, None, row)
    with pytest.raises(ValueError, match="16 tokens in 4 documents, and the cache has 4; pass one token a document"):
        model.decode(params, cache, fstep.pack_thd(fstep.make_docs([[1] * 4] * 4)))
    with pytest.raises(ValueError, match="3 tokens in 3 documents, and the cache has 4"):
        model.decode(params, cache, one_token(torch.tensor([1, 2, 3]), torch.tensor([8, 1, 3])))
    step = one_token(torch.tensor([1, 2, 3, 4]), torch.tensor([8, 1, 3, 2]))
    model.decode(params, cache, step)
    with pytest.raises(ValueError, match="the cache was used up by an earlier call; pass the one that this call returned"):
        model.decode(params, cache, step)
    _, cache = model.decode(params, None, row)
    with pytest.raises(ValueError, match=r"at positions \[8, 1, 4, 2\], and their documents have \[8, 1, 3, 2\] tokens"):
        model.decode(params, cache, one_token(torch.tensor([1, 2, 3, 4]), torch.tensor([8, 1, 4, 2])))
    dynamic = Dense(Config.from_hf(LlamaConfig(**{**TINY, "max_position_embeddings": 8}, rope_parameters=ROPES["dynamic"])))
    with pytest.raises(ConfigError, match="rope kind 'dynamic' turns all keys"):
        dynamic.decode(params_of(dynamic), None, row)


# From a mesh ----------------------------------------------------------------------------------------------------------

MESHES = [{"pp": 2}, {"tp": 2}, {"dp": 2}, {"pp": 3, "tp": 2}, {"pp": 2, "dp": 2}, {"dp": 2, "tp": 2}]


def parts(model: Dense, whole: Any, mesh: Mesh) -> Any:
    """This rank's params: stages, slices, and over dp a part of every layer."""
    part = model.part(whole, mesh=mesh)
    return fstep.shard_params(part, mesh.dp) if mesh.dp.size > 1 else part


@pytest.mark.parametrize("name", ["llama-biases-tied", "qwen3", "qwen2-tied-sliding"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_whole_params_from_any_mesh(name: str, mesh: dict[str, int]) -> None:
    model = Dense(Config.from_hf(CONFIGS[name]))
    params = params_of(model)
    names = [leaf.name for leaf in fstep.tree_leaves(model.spec())]

    def f(mesh: Mesh) -> tuple[Any, Any, Any]:
        mine = parts(model, params, mesh)
        streamed = [name for name, _ in model.stream_weights(mine, mesh=mesh)]
        return streamed, model.whole(mine, mesh=mesh), model.whole(mine, mesh=mesh, dtype=torch.bfloat16)

    for streamed, whole, rounded in fstep.simulate(f, **mesh):
        assert streamed == names and len(set(names)) == len(names)
        assert ("lm_head.weight" in names) == (not model.config.tied)
        fstep.testing.assert_trees_close(whole, params, rtol=0)
        fstep.testing.assert_trees_close(rounded, fstep.cast(params, torch.bfloat16), rtol=0)


@pytest.mark.parametrize(
    ("mesh", "dtype"),
    [({"pp": 2}, torch.float32), ({"dp": 2}, torch.float32), ({"dp": 2, "tp": 2}, torch.float32), ({"dp": 2}, None)],
    ids=str,
)
def test_weights_are_streamed_one_at_a_time(mesh: dict[str, int], dtype: torch.dtype | None) -> None:
    model = Dense(Config.from_hf(CONFIGS["llama"]))
    params = params_of(model)

    def f(mesh: Mesh) -> int:
        mine = parts(model, params, mesh)
        own = {id(x) for x in fstep.tree_leaves(mine)}
        seen: list[Any] = []
        most = 0
        stream = model.stream_weights(mine, mesh=mesh, dtype=dtype)
        while (item := next(stream, None)) is not None:
            seen.append(weakref.ref(item[1]))
            assert id(item[1]) not in own
            del item
            most = max(most, sum(ref() is not None for ref in seen))
        return most

    assert set(fstep.simulate(f, **mesh)) == {0}


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied-biases-mixed"])
def test_params_that_are_a_part_are_refused_with_the_fix(name: str, mesh: dict[str, int]) -> None:
    model = Dense(Config.from_hf(CONFIGS[name]))
    params = params_of(model)
    row = fstep.pack_thd(fstep.make_docs(PROMPTS))

    def f(mesh: Mesh) -> str:
        mine = parts(model, params, mesh)
        with pytest.raises(ValueError, match="params are a part of the model") as error:
            model.decode(mine, None, row)
        model.decode(model.whole(mine, mesh=mesh), None, row)
        return str(error.value)

    assert all("model.whole(params, mesh=mesh)" in message for message in fstep.simulate(f, **mesh))


def test_ranks_that_divide_the_prompts_draw_what_one_process_draws() -> None:
    model = Dense(Config.from_hf(CONFIGS["qwen3"]))
    params, prompts = params_of(model), fstep.make_docs(PROMPTS)
    options: dict[str, Any] = {"most": 12, "stop": [3], "samples": 2}

    def f(mesh: Mesh) -> Docs:
        mine = fstep.divide_documents(prompts, axis=mesh.dp)
        return fstep.generate(model.decode, model.whole(parts(model, params, mesh), mesh=mesh), mine, KEY, **options)

    want = fstep.generate(model.decode, params, prompts, KEY, **options)
    got = fstep.join_documents(fstep.simulate(f, dp=2, pp=1))
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.index, want.index)
    torch.testing.assert_close(got.targets["generator"], want.targets["generator"], rtol=1e-10, atol=1e-12)
