"""The dense family on a mesh beside one process, in float64: the loss, every gradient leaf, and where the params live."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from fstep import Key, Mesh, Packed
from fstep_models.config import ConfigError
from fstep_models.dense import Config, Dense
from tests.hf_oracle import make_hf, run_separately
from tests.models.test_dense import CONFIGS, documents, from_module, pack

F64 = torch.float64


def params_of(model: Dense) -> dict:
    """Params in which no norm is 1 and no bias 0, so that each of them matters."""
    drawn = model.init(Key.seed(1), dtype=torch.float64)
    leaves = fstep.tree_leaves(drawn)
    noise = [Key.seed(i).normal(x.shape, dtype=torch.float64) * 0.1 for i, x in enumerate(leaves)]
    return fstep.tree_replace_leaves(drawn, [x + n for x, n in zip(leaves, noise, strict=True)])


def objective(model: Dense, mb: Packed, mesh: Mesh, **options: Any) -> Callable[[Any], tuple[Tensor, Any]]:
    """A loss that uses log probabilities and entropies, each in its own way for every token."""

    def loss(p: Any) -> tuple[Tensor, Any]:
        x = model.stage(mesh)(p, None, mb)
        logp, entropy = model.logprobs(p, x, mb, mesh=mesh, entropy=True, **options)
        place = mb.tokens + 3 * mb.positions
        return (logp * mb.weights + 0.1 * entropy * torch.cos(place)).sum(), (logp.detach(), entropy.detach())

    return loss


def run(model: Dense, whole: dict, packed: Packed, mesh: Mesh, **options: Any) -> Any:
    """On one rank: the loss, the log probabilities and entropies, and the place of every leaf with its gradient."""
    params = model.part(whole, mesh=mesh)
    mb = fstep.cp_shard(packed, axis=mesh.cp)
    (loss, out), grads = fstep.value_and_grad(objective(model, mb, mesh, **options), has_aux=True)(params)
    return loss, out, list(zip(fstep.places(grads), fstep.tree_leaves(grads), strict=True))


def assemble(ranks: list[Any], tp: int = 1) -> dict[str, Tensor]:
    """Put gradients together: shards side by side, replicated leaves once, and everything added over the other axes."""
    whole: dict[str, Tensor] = {}
    for rank, (*_, leaves) in enumerate(ranks):
        for i, (place, g) in enumerate(leaves):
            total = whole.setdefault(place.path, torch.zeros(place.shape, dtype=g.dtype))
            if place.axes:
                total[tuple(slice(*span) for span in place.box)] += g
            elif rank % tp == 0:
                total += g
            else:
                assert torch.equal(g, ranks[rank - rank % tp][2][i][1]), f"{place.path} differs over tp"
    return whole


def check(got: dict[str, Tensor], want: dict[str, Tensor], *, floor: float = 1e-8) -> None:
    """Every leaf to 1e-10 of itself; one that is smaller than ``floor`` of the largest, which is rounding, of that."""
    assert got.keys() == want.keys()
    least = max(floor * max(float(g.norm()) for g in want.values()), 1e-30)
    errors = {path: float((got[path] - g).norm() / g.norm().clamp(min=least)) for path, g in want.items()}
    # Without a norm behind it the bias of the keys shifts all scores of a query alike, so its true gradient is 0.
    shifts = [path for path in want if path.endswith("k_bias") and path.replace("k_bias", "k_norm") not in want]
    biases = {path: errors.pop(path) * float(want[path].norm().clamp(min=least)) for path in shifts}
    assert max(errors.values()) < 1e-10, errors
    assert all(e < 1e-12 * least / floor for e in biases.values()), biases


def compare(model: Dense, packed: Packed, *, floor: float = 1e-8, **sizes: int) -> None:
    whole = params_of(model)
    alone = run(model, whole, packed, Mesh(), temperature=0.7)
    ranks = fstep.simulate(lambda mesh: run(model, whole, packed, mesh, temperature=0.7), **sizes)
    tp = sizes.get("tp", 1)
    for rank, (loss, out, _) in enumerate(ranks):
        first = ranks[rank - rank % tp]
        assert torch.equal(loss, first[0]) and all(map(torch.equal, out, first[1])), "replicated over tp"
    torch.testing.assert_close(sum(r[0] for r in ranks[::tp]), alone[0], rtol=1e-12, atol=0)
    if sizes.get("cp", 1) == 1:
        for got, want in zip(ranks[0][1], alone[1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    check(assemble(ranks, tp), assemble([alone]), floor=floor)


SMALL = [
    "llama-biases-tied", "llama-one-kv-head", "qwen2-tied-sliding", "qwen3", "qwen3-tied-biases-mixed", "mistral-sliding",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel(name: str, tp: int) -> None:
    # 37 ids and 48 features: uneven parts of the vocabulary; 26 or 27 tokens: the last shard is short.
    model = Dense(Config.from_hf(CONFIGS[name]))
    compare(model, pack(1), tp=tp)


def test_heads_that_have_their_own_keys() -> None:
    model = Dense(Config.from_hf({**CONFIGS["qwen3"].to_dict(), "num_key_value_heads": 4}))
    compare(model, pack(1, 29), tp=4)


@pytest.mark.parametrize("context", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("name", ["qwen3-tied-biases-mixed", "mistral-rope-dynamic"])
def test_context_parallel(name: str, context: str) -> None:
    compare(replace(Dense(Config.from_hf(CONFIGS[name])), context=context), pack(4), cp=2)


@pytest.mark.parametrize("name", ["llama-biases-tied", "qwen3-tied-biases-mixed", "llama-one-kv-head"])
def test_tensor_and_context_parallel(name: str) -> None:
    compare(Dense(Config.from_hf(CONFIGS[name])), pack(4), tp=2, cp=2)


@pytest.mark.parametrize("options", [{"remat": "full"}, {"attention": "math", "context": "allgather"}], ids=str)
def test_options_on_a_mesh(options: dict) -> None:
    compare(replace(Dense(Config.from_hf(CONFIGS["qwen3-tied-biases-mixed"])), **options), pack(4), tp=2, cp=2)


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"tp": 2, "cp": 2}], ids=str)
@pytest.mark.parametrize("context", ["ring", "allgather", "ulysses"])
def test_selective_remat_on_a_mesh(context: str, sizes: dict) -> None:
    """What is kept is found again in the backward pass, in which the ranks arrive in another order."""
    aten = torch.ops.aten
    kept = [aten.mm.default, aten.add.Tensor, aten.clone.default, aten.stack.default]
    config = CONFIGS["qwen3-tied-biases-mixed"]
    compare(replace(Dense(Config.from_hf(config)), remat=kept, context=context), pack(4), **sizes)


@pytest.mark.parametrize("docs", [[], [[5]], [[1, 2]]], ids=["no document", "a token", "two tokens"])
def test_a_row_of_almost_nothing(docs: list) -> None:
    """Fewer tokens than ranks, and none. A token that sees itself only has no gradient of its query and key."""
    packed = fstep.cast(fstep.pack_thd(fstep.make_docs(docs)), F64)
    compare(Dense(Config.from_hf(CONFIGS["llama-biases-tied"])), packed, tp=4, floor=1e-3)


def test_transformers_on_a_mesh() -> None:
    """One comparison that never goes through the one-process model."""
    config, (docs, weights) = CONFIGS["qwen3-tied-biases-mixed"], documents()
    module = make_hf(config)
    _, total, want = run_separately(module, docs, weights)
    model, packed = Dense(Config.from_hf(config)), pack(4)
    whole = from_module(model, module)

    def on(mesh: Mesh) -> Any:
        mb = fstep.cp_shard(packed, axis=mesh.cp)

        def loss(p: Any) -> Tensor:
            logp = model.logprobs(p, model.stage(mesh)(p, None, mb), mb, mesh=mesh)
            return fstep.sft_loss(logp, mb.weights).num

        value, grads = fstep.value_and_grad(loss)(model.part(whole, mesh=mesh))
        return value, None, list(zip(fstep.places(grads), fstep.tree_leaves(grads), strict=True))

    ranks = fstep.simulate(on, tp=2, cp=2)
    torch.testing.assert_close(ranks[0][0] + ranks[2][0], total, rtol=1e-12, atol=0)
    got = assemble(ranks, 2)
    names = dict(zip(fstep.tree_paths(model.spec()), fstep.tree_leaves(model.spec()), strict=True))
    check({names[path].name: g for path, g in got.items()}, want)


@pytest.mark.parametrize("tp", [2, 4])
def test_logits_on_a_mesh(tp: int) -> None:
    model, packed = Dense(Config.from_hf(CONFIGS["qwen2-tied-sliding"])), pack(1)
    whole, tokens = params_of(model), len(packed.tokens)
    want = model.logits(whole, model.stage()(whole, None, packed), temperature=0.5)

    def on(mesh: Mesh) -> Tensor:
        p = model.part(whole, mesh=mesh)
        return model.logits(p, model.stage(mesh)(p, None, packed), mesh=mesh, tokens=tokens, temperature=0.5)

    for got in fstep.simulate(on, tp=tp):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_mixed_precision_on_a_mesh() -> None:
    plain = Dense(Config.from_hf(CONFIGS["qwen3"]))
    model, packed = replace(plain, dtype=torch.bfloat16), fstep.cast(pack(4), torch.float32)
    whole = fstep.cast(params_of(plain), torch.float32)
    want = assemble([run(plain, whole, packed, Mesh())])
    ranks = fstep.simulate(lambda mesh: run(model, whole, packed, mesh), tp=2, cp=2)
    for path, g in assemble(ranks, 2).items():
        assert g.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(g.flatten(), want[path].flatten(), dim=0) > 0.99, path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_is_between_two_exchanges_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    eager = Dense(Config.from_hf(CONFIGS["qwen3-tied-biases-mixed"]))
    whole, packed = params_of(eager), pack(4)
    for options in ({}, {"remat": "full"}):
        got, want = (
            fstep.simulate(lambda mesh, m=m: run(m, whole, packed, mesh), tp=2, cp=2)
            for m in (replace(eager, compile=True, **options), eager)
        )
        for a, b in zip(got, want, strict=True):
            assert all(torch.equal(x, y) for (_, x), (_, y) in zip(a[2], b[2], strict=True))
    torch._dynamo.reset()


def test_frozen_leaves_on_a_mesh() -> None:
    """What is left out of the gradient is left out of the sum over tp too, on every rank."""
    model, packed = Dense(Config.from_hf(CONFIGS["qwen3-tied-biases-mixed"])), pack(1)
    whole = params_of(model)

    def chosen(path: str) -> bool:
        return path in ("layers.1.q", "layers.1.k_norm", "layers.2.o_bias")

    def on(mesh: Mesh) -> Any:
        pick, rest = fstep.split_trainable(model.part(whole, mesh=mesh), chosen)
        loss = objective(model, packed, mesh)
        value, grads = fstep.value_and_grad(lambda p: loss(fstep.tree_merge(p, rest))[0])(pick)
        return value, None, list(zip(fstep.places(grads), fstep.tree_leaves(grads), strict=True))

    want = assemble([run(model, whole, packed, Mesh())])
    check(assemble(fstep.simulate(on, tp=2), 2), {path: g for path, g in want.items() if chosen(path)})


# Where the params live ---------------------------------------------------------------------------------------------------


def mesh_of(rank: int, **sizes: int) -> Mesh:
    return fstep.simulate(lambda mesh: mesh, **sizes)[rank]


def whole_of(model: Dense, parts: list[Any]) -> dict[str, Tensor]:
    """Put the parts of all ranks together, and check that they fit."""
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for params in parts:
        for place, x in zip(fstep.places(params), fstep.tree_leaves(params), strict=True):
            at = tuple(slice(*span) for span in place.box)
            total = whole.setdefault(place.path, torch.zeros(place.shape, dtype=x.dtype))
            known = seen.setdefault(place.path, torch.zeros(place.shape, dtype=torch.bool))
            assert x.shape == total[at].shape and (not known[at].any() or torch.equal(total[at], x))
            total[at], known[at] = x, True
    assert all(known.all() for known in seen.values())
    return whole


PLACES: list[tuple[dict, Any]] = [
    ({}, "1f1b"),
    ({"tp": 2}, "1f1b"),
    ({"pp": 3}, "gpipe"),
    ({"pp": 2, "tp": 2}, "1f1b"),
    ({"pp": 2}, "interleaved"),
    ({"pp": 2}, fstep.zbv),
    ({"pp": 2}, fstep.dualpipev(2, 4)),
]


def short(x: Any) -> str:
    """Name an argument: the same in every process that collects the tests."""
    return getattr(x, "__name__", getattr(x, "name", str(x)))


def config_of(tied: bool, layers: int = 5) -> Config:
    change = {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers, "tie_word_embeddings": tied}
    return Config.from_hf({**CONFIGS["qwen3-tied-biases-mixed"].to_dict(), **change})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("sizes", "schedule"), PLACES, ids=short)
def test_every_param_has_its_place(sizes: dict, schedule: Any, tied: bool, tmp_path: Any) -> None:
    """Drawn, cut and loaded parts are the same numbers, make up the whole, and are written as the whole is."""
    model = Dense(config_of(tied))
    key = Key.seed(3)
    whole = model.init(key, dtype=torch.float32)
    folder = model.save(tmp_path / "model", whole)
    by_path = dict(zip(fstep.tree_paths(whole), fstep.tree_leaves(whole), strict=True))

    def on(mesh: Mesh) -> Any:
        drawn = model.init(key, mesh=mesh, schedule=schedule)
        cut = model.part(whole, mesh=mesh, schedule=schedule)
        _, loaded = Dense.load(folder, mesh=mesh, schedule=schedule)
        spec = model.spec(mesh, schedule)
        assert fstep.places(cut) == fstep.places(drawn) == fstep.places(loaded) == fstep.places(spec)
        for other in (drawn, loaded):
            assert all(map(torch.equal, fstep.tree_leaves(other), fstep.tree_leaves(cut)))
        model.save(tmp_path / "again", cut, mesh=mesh)
        return cut

    got = whole_of(model, fstep.simulate(on, **sizes))
    assert got.keys() == by_path.keys()
    assert all(torch.equal(got[path], x) for path, x in by_path.items())
    files = [sorted((file.name, file.read_bytes()) for file in at.iterdir()) for at in (folder, tmp_path / "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("sizes", "schedule"), PLACES, ids=short)
def test_stages_one_after_another_are_the_model(sizes: dict, schedule: Any, tied: bool) -> None:
    model, packed = Dense(config_of(tied)), pack(1)
    whole = params_of(model)
    want = model.logprobs(whole, model.stage()(whole, None, packed), packed)

    def on(mesh: Mesh) -> Any:
        # The parts of all stages, each taken from its rank: what a pipeline hands on, without one.
        params, ranks = model.part(whole, mesh=mesh, schedule=schedule), (0,)
        if mesh.pp.size > 1:
            ranks = fstep.stage_ranks(schedule, mesh.pp.size)
        parts = params.parts if isinstance(params, fstep.Stages) else {ranks.index(mesh.pp.rank): params}
        run, x = model.stage(mesh), None
        for stage, rank in enumerate(ranks):
            shape = -(-len(packed.tokens) // mesh.tp.size), model.config.dim
            if rank == mesh.pp.rank:
                part = parts[stage]
                if isinstance(part.get("head"), fstep.Tied) and "embed" not in part:
                    part = {**part, "embed": parts[0]["embed"]}
                x = run(part, x, packed)
            else:
                x = torch.zeros(shape, dtype=F64)
            if mesh.pp.size > 1:
                x = fstep.broadcast(x, axis=mesh.pp, src=rank, grad="slice")
        return model.logprobs(part, x, packed, mesh=mesh) if ranks[-1] == mesh.pp.rank else None

    for got in fstep.simulate(on, **sizes):
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-11 if "tp" in sizes else 0, atol=1e-12 if "tp" in sizes else 0)


def test_a_tied_embedding_is_at_both_ends() -> None:
    model = Dense(config_of(True))
    specs = fstep.simulate(lambda mesh: model.spec(mesh), pp=3, tp=2)
    for rank, spec in enumerate(specs):
        embed = spec.get("embed")
        assert (embed is None) == (rank // 2 == 1)
        assert ("head" in spec) == (rank // 2 == 2)
        if embed is not None:
            assert isinstance(embed, fstep.Copied) and embed.ranks == (0, 2)
            assert isinstance(embed.value, fstep.Shard) and embed.value.value.shape == (37, 32)
    # Both ends on one rank: one leaf, and the other part refers to it.
    (spec, other) = fstep.simulate(lambda mesh: model.spec(mesh, "zbv"), pp=2)
    assert isinstance(spec.parts[0]["embed"], fstep.HFTensor)
    assert spec.parts[3]["head"] == fstep.Tied("embed") and "embed" not in spec.parts[3]
    assert not any("embed" in path for path in fstep.tree_paths(other))


def test_layers_are_dealt_evenly() -> None:
    def layers(n: int, **sizes: int) -> list[list[int]]:
        model = Dense(config_of(False, n))
        return [sorted(spec["layers"]) for spec in fstep.simulate(lambda mesh: model.spec(mesh), **sizes)]

    assert layers(7, pp=3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert layers(8, pp=3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert layers(3, pp=3) == [[0], [1], [2]]
    with pytest.raises(ConfigError, match="dense: 2 layers do not make 3 stages; take at most 2"):
        layers(2, pp=3)


def test_one_rank_has_one_stage_whatever_the_schedule_is_called() -> None:
    model = Dense(config_of(True))
    assert model.spec(Mesh(), "interleaved") == model.spec(Mesh(), fstep.zbv) == model.spec()
    parts = model.spec(Mesh(), fstep.zbv(1, 2)).parts
    assert [sorted(part["layers"]) for part in parts.values()] == [[0, 1, 2], [3, 4]]


def test_init_holds_one_whole_leaf_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mesh = Dense(config_of(False)), mesh_of(1, tp=2)
    whole = sum(x.numel() for x in fstep.tree_leaves(model.init(Key.seed(0))))
    drawn: list[weakref.ref] = []
    most, cut = 0, fstep.Place.cut

    def watch(place: fstep.Place, x: Tensor) -> Tensor:
        nonlocal most
        drawn.append(weakref.ref(x))
        most = max(most, sum(ref() is not None for ref in drawn))
        return cut(place, x)

    monkeypatch.setattr(fstep.Place, "cut", watch)
    params = model.init(Key.seed(0), mesh=mesh)
    assert sum(x.untyped_storage().nbytes() // 4 for x in fstep.tree_leaves(params)) < 0.55 * whole
    kept = sum(not place.axes for place in fstep.places(params))
    assert most <= kept + 1


@pytest.mark.parametrize("remat", ["none", "full"])
def test_zero_on_a_mesh_is_the_same(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, embedding, norm and head in pieces over the ranks that hold other documents."""
    model = Dense(config_of(True, 3), remat=remat)
    whole, packed = params_of(model), pack(4)
    kinds, fold = set(), fstep.fold_layers

    def watch(f: Any, layers: Any, x: Any, **more: Any) -> Any:
        kinds.update(type(layer) for layer in layers.values())
        return fold(f, layers, x, **more)

    monkeypatch.setattr(fstep, "fold_layers", watch)

    def on(mesh: Mesh) -> Any:
        params = model.part(whole, mesh=mesh)
        mb = fstep.cp_shard(packed, axis=mesh.cp)
        zero = fstep.shard_params(params, mesh.cp)
        loss = objective(model, mb, mesh)
        _, grads = fstep.value_and_grad(loss, has_aux=True)(zero)
        _, plain = fstep.value_and_grad(loss, has_aux=True)(params)
        return fstep.unshard_params(grads), fstep.psum(plain, axis=mesh.cp)

    for sizes in ({"cp": 2}, {"tp": 2, "cp": 2}):
        for got, want in fstep.simulate(on, **sizes):
            assert fstep.tree_paths(got) == fstep.tree_paths(want)
            for path, a, b in zip(fstep.tree_paths(got), fstep.tree_leaves(got), fstep.tree_leaves(want), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=path)
    assert kinds == {fstep.Pieces, dict}, "layers are gathered one at a time, by the loop over them"


@pytest.mark.parametrize("schedule", ["1f1b", fstep.zbv], ids=["1f1b", "zbv"])
def test_a_pipeline_of_tensor_parallel_stages(schedule: Any) -> None:
    """Gradients come from a pipeline with split backward passes too, over tp at every stage."""
    model = Dense(config_of(True, 4))
    whole, rows = params_of(model), [pack(1), pack(1, 29), pack(4)]

    def on(mesh: Mesh) -> Any:
        def loss(p: Any, x: Tensor, mb: Packed) -> fstep.Ratio:
            return fstep.sft_loss(model.logprobs(p, x, mb, mesh=mesh), mb.weights)

        params = model.part(whole, mesh=mesh, schedule=schedule)
        total, grads = fstep.pp_forward_backward(model.stage(mesh), loss, params, rows, axis=mesh.pp, schedule=schedule)
        assert isinstance(total, fstep.Ratio)
        return total.num, None, list(zip(fstep.places(grads), fstep.tree_leaves(grads), strict=True))

    (alone,) = fstep.simulate(on)
    ranks = fstep.simulate(on, pp=2, tp=2)
    for loss, *_ in ranks:
        torch.testing.assert_close(loss, alone[0], rtol=1e-12, atol=0)
    check(assemble(ranks, 2), assemble([alone]))


# Refused -----------------------------------------------------------------------------------------------------------------


def test_heads_that_do_not_divide_are_refused() -> None:
    model = Dense(replace(config_of(False), heads=6, kv_heads=3))
    for call in (model.spec, model.stage):
        with pytest.raises(
            ConfigError, match=r"6 query and 3 key heads do not divide .* 'tp' of size 2; sizes that do: 1, 3, 6"
        ):
            fstep.simulate(call, tp=2)
    for size in (1, 3, 6):
        fstep.simulate(model.spec, tp=size)
    with pytest.raises(ConfigError, match=r"6 query and 2 key heads .* size 4; sizes that do: 1, 2, 6"):
        fstep.simulate(Dense(replace(config_of(False), heads=6, kv_heads=2)).spec, tp=4)


def test_a_vocabulary_smaller_than_tp_is_refused() -> None:
    model = Dense(replace(config_of(False), vocab=3))
    message = r"4 query and 2 key heads, or 3 ids of the vocabulary, do not divide over axis 'tp' of size 4; .* do: 1, 2\n"
    for call in (model.spec, model.stage):
        with pytest.raises(ConfigError, match=message):
            fstep.simulate(call, tp=4)
    fstep.simulate(model.spec, tp=2)


def test_fewer_features_than_ranks() -> None:
    """A rank without any adds nothing, and is right."""
    config = Config.from_hf({**CONFIGS["qwen3-tied-biases-mixed"].to_dict(), "intermediate_size": 3})
    compare(Dense(config), pack(1), tp=4)


def test_heads_that_ulysses_cannot_deal_out_are_refused() -> None:
    model = Dense(config_of(False), context="ulysses")
    with pytest.raises(
        ConfigError,
        match=r"2 query heads of a rank do not divide over axis 'cp' of size 4, .*; sizes that do: 1, 2, or pass",
    ):
        fstep.simulate(model.stage, tp=2, cp=4)
    fstep.simulate(model.stage, cp=4)
    fstep.simulate(model.stage, tp=2, cp=2)
    fstep.simulate(replace(model, context="ring").stage, tp=2, cp=4)


def test_words_that_nobody_knows_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="Dense: context 'rings' is unknown; pass one of auto, ring, allgather, ulysses"):
        Dense(config_of(False), context="rings")
    with pytest.raises(ValueError, match="Dense: attention 'fast' is unknown; pass one of auto"):
        Dense(config_of(False), attention="fast")


def test_a_row_of_another_mesh_is_refused() -> None:
    """Every rank would compute with whole documents, or with parts as if they were documents: finite, and wrong."""
    model, row = Dense(config_of(False)), pack(4)
    whole = params_of(model)

    def hidden(mesh: Mesh, mb: Packed) -> Tensor:
        return model.stage(mesh)(whole, None, mb)

    def part(mesh: Mesh) -> Packed:
        return fstep.cp_shard(row, axis=mesh.cp)

    calls: list[tuple[str, Callable[[Mesh], Any]]] = [
        (r"stage: .* a whole row \(parts=1\), and axis 'cp' has size 2; pass it through cp_shard", lambda m: hidden(m, row)),
        (
            r"stage: .* one of 2 shards \(parts=2\), and axis 'cp' has size 1; call stage with .*, mesh=mesh",
            lambda m: hidden(Mesh(), part(m)),
        ),
        (
            r"logprobs: .* a whole row \(parts=1\), and axis 'cp' has size 2; pass .*cp_shard\(packed, axis=mesh.cp\)",
            lambda m: model.logprobs(whole, hidden(m, part(m)), row, mesh=m),
        ),
        (
            r"logprobs: .* one of 2 shards \(parts=2\), and axis 'cp' has size 1; call logprobs with .*, mesh=mesh",
            lambda m: model.logprobs(whole, hidden(m, part(m)), part(m)),
        ),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match="Dense." + message):
            fstep.simulate(call, cp=2)
    with pytest.raises(TypeError, match=r"Dense.logprobs: the microbatch is a Tensor; pass it through pack_thd first"):
        model.logprobs(whole, hidden(Mesh(), row), row.labels)  # type: ignore[call-overload]


def test_a_forgotten_mesh_over_tp_is_named() -> None:
    model, packed = Dense(config_of(False)), pack(1)
    whole = params_of(model)

    def on(mesh: Mesh) -> list[str]:
        p, said = model.part(whole, mesh=mesh), []
        x = model.stage(mesh)(p, None, packed)
        later = {"layers": p["layers"]}, torch.zeros(len(packed.tokens), model.config.dim, dtype=F64)
        message = r"axis 'tp' has size 1; give this call the mesh .*, as with mesh=mesh"
        for call in (
            lambda: model.stage()(p, None, packed),
            lambda: model.stage()(*later, packed),
            lambda: model.logprobs(p, x, packed),
            lambda: model.logits(p, x),
        ):
            with pytest.raises(ValueError, match=message) as caught:
                call()
            said.append(str(caught.value).partition(":")[0])
        return said

    assert fstep.simulate(on, tp=2)[1] == ["tp_embed", "Dense.stage", "tp_token_logprobs", "tp_head_logits"]


def test_a_save_without_the_mesh_is_refused(tmp_path: Any) -> None:
    model = Dense(config_of(False))
    with pytest.raises(fstep.WeightsError, match="save_hf: mesh is not given, and the program runs on 2 ranks"):
        fstep.simulate(lambda mesh: model.save(tmp_path / "model", model.init(Key.seed(0), mesh=mesh)), dp=2)
    assert not list(tmp_path.iterdir())


def test_params_of_another_mesh_are_refused() -> None:
    model, packed = Dense(config_of(False)), pack(1)
    whole = model.init(Key.seed(0))
    with pytest.raises(ValueError, match="tp_embed: weight is not cut, and axis 'tp' has size 2"):
        fstep.simulate(lambda mesh: model.stage(mesh)(whole, None, packed), tp=2)
    layers, x = {"layers": whole["layers"]}, torch.zeros(13, 32)
    with pytest.raises(ValueError, match=r"Dense.stage: layers.0.q: weight is not cut.*model.part\(params, mesh=mesh\)"):
        fstep.simulate(lambda mesh: model.stage(mesh)(layers, x, packed), tp=2)
    with pytest.raises(ValueError, match=r"cut_like: whole has no leaf 'layers\.4"):
        model.part({**whole, "layers": {i: whole["layers"][i] for i in range(4)}}, mesh=Mesh())
    with pytest.raises(ValueError, match=r"Place.cut: 'embed' has shape \(3, 32\), and the whole one \(37, 32\)"):
        model.part({**whole, "embed": torch.ones(3, 32)}, mesh=Mesh())
