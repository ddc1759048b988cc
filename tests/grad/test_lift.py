"""lift beside the module itself, its own backward pass and torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import fstep
from fstep.grad.lift import lift
from fstep.key import Key
from fstep.tree import tree_map

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    return Tied().double()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2).double(),
    "mlp": mlp,
    "tied": tied,
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double(),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double(),
    "lstm": lambda: nn.LSTM(3, 2, num_layers=2).double(),
}


def loss_of(out: Any) -> Tensor:
    return (out[0] if isinstance(out, tuple) else out).square().sum()


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in [*module.named_parameters(), *module.named_buffers()]}


@pytest.mark.parametrize("name", MODULES)
def test_equals_the_module_and_leaves_it_alone(name: str) -> None:
    module = MODULES[name]()
    params, apply = lift(module)
    before, versions = bits(module), [x._version for x in (*module.parameters(), *module.buffers())]
    value, grads = fstep.value_and_grad(lambda p: loss_of(apply(p, X)))(params)
    again, _ = fstep.value_and_grad(lambda p: loss_of(apply(p, X)))(params)
    assert torch.equal(value, again)
    after = bits(module)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert versions == [x._version for x in (*module.parameters(), *module.buffers())]
    assert all(p.grad is None for p in module.parameters())

    expected = loss_of(module(X))
    expected.backward()
    assert torch.equal(value, expected)
    assert grads.keys() == dict(module.named_parameters()).keys()
    for k, p in module.named_parameters():
        assert torch.equal(grads[k], p.grad)


def test_parameters_are_the_argument() -> None:
    module = mlp()
    params, apply = lift(module)
    moved = tree_map(lambda p: p + 0.1 * torch.randn_like(p), params)
    other = mlp()
    other.load_state_dict(moved)
    assert torch.equal(apply(moved, X), other(X))
    assert torch.equal(apply(params, input=X), module(X))


def test_apply_is_a_snapshot() -> None:
    """What becomes of the module later, or of the first params, is nothing to apply."""
    module = MODULES["batch norm"]()
    params, apply = lift(module)
    expected = apply(params, X)
    module.eval()
    with torch.no_grad():
        for x in (*module.parameters(), *module.buffers()):
            x.zero_()
    assert torch.equal(apply(params, X), expected)


def test_buffers_are_copied_for_each_call() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("calls", torch.ones(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) * self.calls

    module = Counter()
    params, apply = lift(module)
    expected = 2 * module.linear(X.float())
    assert torch.equal(apply(params, X.float()), expected) and torch.equal(apply(params, X.float()), expected)
    assert module.calls == 1
    module.calls += 5
    assert torch.equal(apply(params, X.float()), expected)


def test_copy_or_share() -> None:
    module = nn.Linear(3, 2)
    for copy in (True, False):
        params, _ = lift(module, copy=copy)
        assert (params["weight"].data_ptr() == module.weight.data_ptr()) == (not copy)
        assert not params["weight"].requires_grad
    params, _ = lift(tied())
    assert list(params) == ["a.weight", "a.bias", "b.bias"]


@pytest.mark.parametrize("copy", [True, False])
def test_a_donated_update_writes_to_the_module_only_if_it_shares(copy: bool) -> None:
    module = nn.Linear(3, 2).double()
    before = bits(module)
    params, apply = lift(module, copy=copy)
    state = fstep.init_state(params, fstep.adamw)
    _, grads = fstep.value_and_grad(lambda p: loss_of(apply(p, X)))(state.params)
    fstep.adamw.update(state, grads, lr=0.1, donate=True)
    assert all(torch.equal(before[k], x) == copy for k, x in bits(module).items())


# Randomness ----------------------------------------------------------------------------------------------------------


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, self.training)


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5)),
    "functional": FunctionalDropout,
    "lstm": lambda: nn.LSTM(3, 8, num_layers=2, dropout=0.5),
}


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_takes_a_key(name: str) -> None:
    module = RANDOM[name]().double()
    params, apply = lift(module)
    who = {"dropout": "'1' draws", "functional": "the forward drew", "lstm": "'LSTM' draws"}[name]
    with pytest.raises(ValueError, match=rf"lift: {who} random .*pass apply\(..., key=key\), or lift module.eval\(\)"):
        apply(params, X)
    key = Key.seed(3)
    before = torch.get_rng_state()
    first, second, other = (loss_of(apply(params, X, key=k)) for k in (key, key, key.fold_in(1)))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(7)
    assert torch.equal(loss_of(apply(params, X, key=key)), first)
    _, grads = fstep.value_and_grad(lambda p: loss_of(apply(p, X, key=key)))(params)
    run = fstep.remat(lambda p: apply(p, X, key=key))
    _, again = fstep.value_and_grad(lambda p: loss_of(run(p)))(params)
    assert all(torch.equal(grads[k], again[k]) for k in grads)
    module.eval()
    params, apply = lift(module)
    assert torch.equal(loss_of(apply(params, X)), loss_of(module(X)))


def test_dropout_of_nothing_needs_no_key() -> None:
    params, apply = lift(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.0)))
    apply(params, X.float())


# A transformers model ------------------------------------------------------------------------------------------------


def llama(tie: bool = False, **options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tie, use_cache=False, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double()


IDS = torch.arange(24).reshape(2, 12) * 7 % 23


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_training_equals_torch(tie: bool, donate: bool) -> None:
    """Four steps of AdamW: value_and_grad and adamw beside backward and torch.optim, leaf by leaf in float64."""
    module = llama(tie)
    params, apply = lift(module)
    before = bits(module)
    state = fstep.init_state(params, fstep.AdamW(betas=(0.9, 0.95), weight_decay=0.1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    take = fstep.value_and_grad(lambda p, ids: apply(p, input_ids=ids, labels=ids).loss)
    assert ("lm_head.weight" in params) == (not tie)
    losses = []
    for step in range(4):
        ids = (IDS + step) % 23
        value, grads = take(state.params, ids)
        if step == 0:
            assert all(torch.equal(before[k], x) for k, x in bits(module).items())
        expected = module(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        expected.backward()
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
        for k, p in module.named_parameters():
            torch.testing.assert_close(grads[k], p.grad, rtol=1e-9, atol=1e-12)
        optimizer.step()
        state = fstep.AdamW(betas=(0.9, 0.95), weight_decay=0.1).update(state, grads, lr=1e-2, donate=donate)
        for k, p in module.named_parameters():
            torch.testing.assert_close(state.params[k], p.detach(), rtol=1e-9, atol=1e-10)
        losses.append(float(value))
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_is_refused_and_remat_does_it() -> None:
    """A checkpoint inside the forward runs again outside of functional_call, on the module's own parameters."""
    module = llama().train()
    params, apply = lift(module)
    moved = tree_map(lambda p: p + 0.05 * torch.randn_like(p), params)

    def loss(p: Any) -> Tensor:
        return apply(p, input_ids=IDS, labels=IDS).loss

    _, expected = fstep.value_and_grad(loss)(moved)
    _, grads = fstep.value_and_grad(fstep.remat(loss))(moved)
    assert all(torch.equal(grads[k], expected[k]) for k in grads)

    for part in module.modules():  # what gradient_checkpointing_enable sets
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = True
    with pytest.raises(
        ValueError, match=r"lift: 'model.*' has gradient checkpointing on, .*wrap the function in fstep.remat"
    ):
        lift(module)
    lift(module.eval())


def test_a_checkpoint_of_ones_own_fails_rather_than_using_old_parameters() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: self.linear(x).sin(), x, use_reentrant=False)

    params, apply = lift(Own())
    with pytest.raises(RuntimeError, match="meta"):
        fstep.value_and_grad(lambda p: apply(p, X.float()).sum())(params)


# Transforms and errors -----------------------------------------------------------------------------------------------


def test_under_torch_func() -> None:
    module = mlp()
    params, apply = lift(module)

    def f(p: Any, x: Tensor) -> Tensor:
        return apply(p, x).square().sum()

    each = torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))(params, X)
    for i, x in enumerate(X):
        _, one = fstep.value_and_grad(f)(params, x)
        for k in one:
            torch.testing.assert_close(each[k][i], one[k], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled() -> None:
    module = mlp()
    params, apply = lift(module)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(apply, backend="eager", fullgraph=True)(params, X), module(X))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"weight": p["weight"]}, r"lift: params do not have the module's names; \['bias'\]"),
        (lambda p: {**p, "wieght": p["weight"]}, r"\['wieght'\] are in one of the two only"),
    ],
)
def test_params_have_to_be_the_modules(change: Callable, message: str) -> None:
    params, apply = lift(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=message):
        apply(change(params), X)


class Beside(nn.Module):
    """Reaches its weight by another way than its name."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.l = nn.Linear(2, 2)
        self.kept = {"list": [self.l.weight], "dict": {"w": (self.l.weight,)}}[where]

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("where", ["list", "dict"])
def test_a_parameter_that_cannot_be_replaced_is_refused(where: str) -> None:
    with pytest.raises(ValueError, match="lift: 'Beside' keeps a parameter in 'kept', where it cannot be replaced"):
        lift(Beside(where))


def test_a_module_that_rescales_its_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="lift: '0' has max_norm, and rescales its weight in place"):
        lift(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)))


def test_only_modules() -> None:
    with pytest.raises(TypeError, match=r"lift: got a function; pass an nn.Module"):
        lift(mlp)


def test_freezing_is_said_to_whoever_takes_gradients() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    module[0].requires_grad_(False)
    params, apply = fstep.lift(module)
    chosen = fstep.value_and_grad(
        lambda p, x: apply(p, x).sum(), trainable=lambda name: module.get_parameter(name).requires_grad
    )
    _, grads = chosen(params, torch.ones(3, 2))
    assert fstep.tree_paths(grads) == ["1.bias", "1.weight"]
