"""The dense family against transformers, in float64."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import fstep
import fstep.testing
from fstep_models.config import ConfigError, stored_dtype
from fstep_models.dense import Config, Dense
from tests.hf_oracle import make_hf, run_separately

TINY = dict(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ROPES = {
    "linear": dict(rope_type="linear", rope_theta=1e4, factor=4.0),
    "dynamic": dict(rope_type="dynamic", rope_theta=1e4, factor=4.0),
    "yarn": dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16),
    "yarn-mscale": dict(
        rope_type="yarn",
        rope_theta=1e4,
        factor=4.0,
        original_max_position_embeddings=16,
        mscale=0.7,
        mscale_all_dim=1.3,
        beta_fast=4.0,
        beta_slow=2.0,
        truncate=False,
    ),
    "yarn-one-mscale": dict(
        rope_type="yarn", rope_theta=40.0, factor=3.0, original_max_position_embeddings=64, mscale=0.7, beta_slow=0.005
    ),
    "yarn-attention": dict(
        rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=32, attention_factor=0.8
    ),
    "llama3": dict(
        rope_type="llama3",
        rope_theta=5e5,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
SLIDING = dict(use_sliding_window=True, sliding_window=3, max_window_layers=1)
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "llama-biases-tied": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16),
    "llama-one-kv-head": LlamaConfig(**{**TINY, "num_key_value_heads": 1}, hidden_act="gelu", rms_norm_eps=1e-3),
    "qwen2": Qwen2Config(**TINY),
    "qwen2-tied-sliding": Qwen2Config(**TINY, tie_word_embeddings=True, **SLIDING),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "qwen3-tied-biases-mixed": Qwen3Config(
        **TINY,
        head_dim=8,
        attention_bias=True,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral-sliding": MistralConfig(**TINY, sliding_window=3, hidden_act="gelu_pytorch_tanh"),
    "mistral-full": MistralConfig(**TINY, sliding_window=None, head_dim=10),
    **{
        f"rope-{name}": LlamaConfig(
            **{**TINY, "max_position_embeddings": 8 if name == "dynamic" else 64}, rope_parameters=rope
        )
        for name, rope in ROPES.items()
    },
    "qwen3-rope-yarn": Qwen3Config(**TINY, head_dim=16, rope_parameters=ROPES["yarn"]),
    "mistral-rope-dynamic": MistralConfig(
        **{**TINY, "max_position_embeddings": 6}, sliding_window=4, rope_parameters=ROPES["dynamic"]
    ),
}


def documents() -> tuple[list[list[int]], list[list[float]]]:
    g = torch.Generator().manual_seed(3)
    # In this order a model that keeps the frequencies of an earlier, longer document would give wrong ones later.
    docs = [torch.randint(0, 37, (n,), generator=g).tolist() for n in (11, 1, 5, 7, 2)]
    weights = [torch.rand(len(d), generator=g, dtype=torch.float64).tolist() for d in docs]
    weights[3] = [0.0] * len(docs[3])
    return docs, weights


def pack(multiple_of: int = 4, length: int | None = None) -> fstep.Packed:
    docs, weights = documents()
    batch = fstep.make_docs(docs, weights=[torch.tensor(w, dtype=torch.float64) for w in weights])
    return fstep.pack_thd(batch, multiple_of=multiple_of, length=length)


def from_module(model: Dense, module: torch.nn.Module) -> dict:
    names = dict(module.named_parameters())
    return fstep.tree_map(lambda t: names[t.name].detach().clone(), model.spec())


def gradients(model: Dense, params: dict, packed: fstep.Packed) -> tuple[fstep.Ratio, dict]:
    def loss_fn(p, x, mb):
        return fstep.sft_loss(model.logprobs(p, x, mb), mb.weights)

    return fstep.pp_forward_backward(model.stage(), loss_fn, params, [packed])


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float64
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_every_gradient_equal_transformers(name: str) -> None:
    config = CONFIGS[name]
    module, (docs, weights) = make_hf(config), documents()
    # A fresh rotary state for each document: transformers' dynamic scaling remembers the longest it has seen.
    logits, total, expected = [], 0, {}
    for d, w in zip(docs, weights, strict=True):
        alone = make_hf(config)
        one_logits, one_total, one_grads = run_separately(alone, [d], [w])
        logits += one_logits
        total = total + one_total
        expected = {k: expected.get(k, 0) + g for k, g in one_grads.items()}

    model = Dense(Config.from_hf(config))
    params, packed = from_module(model, module), pack()
    got = fstep.split_documents(model.logits(params, model.stage()(params, None, packed)), packed)
    assert max(error(a, b) for a, b in zip(got, logits, strict=True)) < 1e-10

    loss, grads = gradients(model, params, packed)
    assert abs(float(loss.num / total) - 1) < 1e-12
    assert float(loss.den) == pytest.approx(sum(sum(w[1:]) for w in weights), rel=1e-12)
    by_name = {t.name: g for t, g in zip(fstep.tree_leaves(model.spec()), fstep.tree_leaves(grads), strict=True)}
    assert by_name.keys() == expected.keys()
    # The bias of the keys shifts all scores of a query alike, so its true gradient is 0 and only rounding is left of it.
    errors = {k: error(by_name[k], expected[k]) for k in expected if not k.endswith("k_proj.bias")}
    assert max(errors.values()) < 1e-10, errors
    scale = max(float(g.norm()) for g in expected.values())
    for k in expected:
        assert float((by_name[k] - expected[k]).norm()) < 1e-12 * scale


def test_packing_does_not_change_what_a_document_computes() -> None:
    model = Dense(Config.from_hf(CONFIGS["qwen3-tied-biases-mixed"]))
    params = model.init(fstep.Key.seed(0), dtype=torch.float64)
    docs, _ = documents()
    alone = [model.stage()(params, None, fstep.pack_thd(fstep.make_docs([d]))) for d in docs]
    for packed in (pack(1), pack(4), pack(8, 64)):
        together = fstep.split_documents(model.stage()(params, None, packed), packed)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_padding_carries_nothing() -> None:
    model = Dense(Config.from_hf(CONFIGS["mistral-sliding"]))
    params = model.init(fstep.Key.seed(0), dtype=torch.float64)
    loss, grads = gradients(model, params, pack(1))
    loss_padded, grads_padded = gradients(model, params, pack(8, 72))
    assert float(loss.den) == pytest.approx(float(loss_padded.den), rel=1e-14)
    fstep.testing.assert_trees_close(grads_padded, grads, rtol=1e-12)
    empty = fstep.pack_thd(fstep.make_docs([]), multiple_of=4)
    loss, grads = gradients(model, params, empty)
    assert float(loss.num) == float(loss.den) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in fstep.tree_leaves(grads))


def test_a_stage_runs_the_parts_its_params_have() -> None:
    model = Dense(Config.from_hf(CONFIGS["qwen3-tied-biases-mixed"]))
    params, packed = model.init(fstep.Key.seed(0), dtype=torch.float64), pack()
    whole = model.stage()(params, None, packed)
    first = {"embed": params["embed"], "layers": {0: params["layers"][0]}}
    rest = {"layers": {i: params["layers"][i] for i in (1, 2)}, "norm": params["norm"], "head": params["head"]}
    x = model.stage()(first, None, packed)
    assert not torch.equal(x, whole)
    assert torch.equal(model.stage()(rest, x, packed), whole)


@pytest.mark.parametrize("options", [{"attention": "math"}, {"attention": "documents"}, {"remat": "full"}])
def test_options_change_how_not_what(options: dict) -> None:
    plain = Dense(Config.from_hf(CONFIGS["qwen3-tied-biases-mixed"]))
    params, packed = plain.init(fstep.Key.seed(0), dtype=torch.float64), pack()
    loss, grads = gradients(plain, params, packed)
    loss_too, grads_too = gradients(replace(plain, **options), params, packed)
    assert float(loss_too.num) == pytest.approx(float(loss.num), rel=1e-13)
    fstep.testing.assert_trees_close(grads_too, grads, rtol=0 if "remat" in options else 1e-10, atol=1e-14)


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_params() -> None:
    plain = Dense(Config.from_hf(CONFIGS["llama"]))
    params, packed = plain.init(fstep.Key.seed(0)), fstep.cast(pack(), torch.float32)
    half = replace(plain, dtype=torch.bfloat16)
    x = half.stage()(params, None, packed)
    assert x.dtype == torch.bfloat16
    assert half.logprobs(params, x, packed).dtype == torch.float32
    loss, grads = gradients(plain, params, packed)
    loss_half, grads_half = gradients(half, params, packed)
    assert {g.dtype for g in fstep.tree_leaves(grads_half)} == {torch.float32}
    assert float(loss_half.num) == pytest.approx(float(loss.num), rel=2e-3)
    for path, a, b in zip(fstep.tree_paths(grads), fstep.tree_leaves(grads), fstep.tree_leaves(grads_half), strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99, path


def test_frozen_leaves_have_no_gradient_and_change_none() -> None:
    model = Dense(Config.from_hf(CONFIGS["qwen3"]))
    params, packed = model.init(fstep.Key.seed(0), dtype=torch.float64), pack()
    _, grads = gradients(model, params, packed)

    def loss_fn(p, x, mb):
        return fstep.sft_loss(model.logprobs(p, x, mb), mb.weights)

    def chosen(path: str) -> bool:
        return path.startswith("layers.1.")

    _, some = fstep.pp_forward_backward(model.stage(), loss_fn, params, [packed], trainable=chosen)
    assert fstep.tree_paths(some) == [p for p in fstep.tree_paths(grads) if chosen(p)]
    assert all(torch.equal(some["layers"][1][k], grads["layers"][1][k]) for k in grads["layers"][1])


@pytest.mark.parametrize("name", CONFIGS)
def test_config_round_trip(name: str) -> None:
    config = Config.from_hf(CONFIGS[name])
    assert Config.from_hf(config.to_hf()) == config
    assert Config.from_hf(json.loads(json.dumps(CONFIGS[name].to_dict()))) == config


def test_switches_that_are_off_are_no_obstacle() -> None:
    # As in the config.json of Qwen2.5 and of SmolLM.
    extra = {
        "use_mrope": False,
        "rope_interleaved": False,
        "is_llama_config": True,
        "eos_token_id": [1, 2],
        "pad_token_id": None,
    }
    assert Config.from_hf({"model_type": "llama", **TINY, **extra}) == Config.from_hf({"model_type": "llama", **TINY})


def test_older_config_files_are_read() -> None:
    old = dict(
        TINY, model_type="llama", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="bfloat16"
    )
    rope = Config.from_hf(old).rope
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 5e5, 2.0)
    # Defaults come from transformers, not from here: 8 key heads is Mistral's own.
    assert Config.from_hf({"model_type": "mistral"}).kv_heads == 8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"made_up_key": 3}, "made_up_key=3"),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "3 key heads"),
        ({"sliding_window": 7}, "sliding_window=7"),
        ({"rope_parameters": LONGROPE}, "rope_type 'longrope' is not supported"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"rope_parameters": {**LONGROPE, "rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_config_values_that_would_be_ignored_are_refused(change: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        Config.from_hf({"model_type": "llama", **TINY, **change})


def test_layer_types_without_a_window_are_refused() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ConfigError, match="sliding_window is not set"):
        Config.from_hf({"model_type": "qwen3", **TINY, "layer_types": kinds})
    with pytest.raises(ConfigError, match="chunked_attention"):
        Config.from_hf({"model_type": "qwen3", **TINY, "layer_types": ["chunked_attention"] * 3})


@pytest.mark.parametrize("given", ["nowhere", {"hidden_size": 3}])
def test_what_is_no_config_is_refused(given: object, tmp_path) -> None:
    with pytest.raises(ConfigError, match="Hugging Face model"):
        Config.from_hf(tmp_path / given if isinstance(given, str) else given)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ConfigError, match="is not JSON"):
        Config.from_hf(tmp_path)


def test_wrong_microbatches_are_refused() -> None:
    model = Dense(Config.from_hf(CONFIGS["llama"]))
    params = model.init(fstep.Key.seed(0))
    docs = fstep.make_docs([[1, 2, 99]])
    with pytest.raises(TypeError, match="pack_thd"):
        model.stage()(params, None, docs)
    with pytest.raises(ValueError, match="token 99 at place 2 is not in the vocabulary of 37"):
        model.stage()(params, None, fstep.pack_thd(docs))


def test_init_does_not_depend_on_other_leaves() -> None:
    config = Config.from_hf(CONFIGS["llama"])
    small, large = (Dense(replace(config, layers=n, windows=(0,) * n)).init(fstep.Key.seed(5)) for n in (1, 3))
    assert torch.equal(small["layers"][0]["q"], large["layers"][0]["q"])
    assert not torch.equal(large["layers"][0]["q"], large["layers"][1]["q"])
    assert float(large["embed"].std()) == pytest.approx(config.init_std, rel=0.1)


@pytest.mark.parametrize("name", ["llama-biases-tied", "qwen3", "mistral-full"])
def test_load_and_save_with_transformers(name: str, tmp_path, caplog) -> None:
    from transformers import AutoModelForCausalLM

    make_hf(CONFIGS[name]).float().save_pretrained(tmp_path / "theirs")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    model, params = Dense.load(tmp_path / "theirs")
    assert isinstance(params["head"], fstep.Tied) == model.config.tied
    assert all(x.dtype == torch.float32 for x in fstep.tree_leaves(params))
    model.save(tmp_path / "ours", params, like=tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert not caplog.records
    ids = torch.tensor([[1, 5, 9, 3]])
    assert torch.equal(again(ids).logits, module(ids).logits)
    mine = model.logits(params, model.stage()(params, None, fstep.pack_thd(fstep.make_docs(ids.tolist()))))
    torch.testing.assert_close(mine, again(ids).logits[0], rtol=1e-4, atol=1e-5)


def test_saving_in_another_dtype_says_so(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    module = make_hf(CONFIGS["llama"]).bfloat16()
    module.save_pretrained(tmp_path / "theirs")
    assert stored_dtype(tmp_path / "theirs") == torch.bfloat16
    model, params = Dense.load(tmp_path / "theirs")
    model.save(tmp_path / "wide", params, like=tmp_path / "theirs")
    model.save(tmp_path / "half", params, like=tmp_path / "theirs", dtype=torch.bfloat16)
    ids = torch.tensor([[1, 5, 9, 3]])
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert wide.dtype == torch.float32 and torch.equal(wide.model.norm.weight, params["norm"])
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(ids).logits)


@pytest.mark.parametrize("change", [{"heads": 0}, {"kv_heads": 0}, {"eps": -1.0}, {"windows": (-1, 0, 0)}, {"head_dim": 6}])
def test_configs_that_cannot_be_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match="dense: "):
        replace(Config.from_hf(CONFIGS["llama"]), **change)


def test_an_axis_of_experts_is_refused() -> None:
    model = Dense(Config.from_hf(CONFIGS["llama"]))
    with pytest.raises(NotImplementedError, match=r"Dense.stage: axis 'ep' has size 2"):
        fstep.simulate(model.stage, ep=2)
