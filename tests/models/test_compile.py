"""One compiled block for all layers: how many graphs, for which batches, and the same numbers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fstep
from fstep.tree import tree_leaves, tree_map
from fstep_models.compiled import compiled as compiled_apart
from fstep_models.dense import Config, Dense

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
MM = torch.ops.aten.mm.default


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Count the graphs that the models compile, and run them as they are."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def model(windows: tuple[int, ...] = (0, 0, 0, 0), **options: Any) -> Dense:
    config = Config(
        family="qwen3", vocab=64, dim=16, ffn=24, layers=len(windows), heads=4, kv_heads=2, head_dim=8,
        rope=fstep.Rope(theta=1e4, dim=8), windows=windows, tied=True, qk_norm=True,
    )  # fmt: skip
    return Dense(config, **options)


def batches(num: int = 6) -> list[fstep.Packed]:
    """Rows of different lengths, different numbers of documents, and different longest documents."""
    g = torch.Generator().manual_seed(0)
    return [
        fstep.pack_thd(
            fstep.make_docs(
                [torch.randint(0, 64, (int(n),), generator=g) for n in torch.randint(2, 30, (3 + i,), generator=g)]
            )
        )
        for i in range(num)
    ]


def run(m: Dense, p: Any, mb: fstep.Packed) -> tuple[fstep.Ratio, Any]:
    def loss(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(m.logprobs(p, x, mb), mb.weights)

    return fstep.pp_forward_backward(m.stage(), loss, p, [mb])


@pytest.mark.parametrize(
    "options", [{}, {"remat": "full"}, {"remat": (MM,)}, {"attention": "math"}, {"dtype": torch.bfloat16}], ids=str
)
def test_one_graph_for_all_layers_and_all_rows(options: dict, counter: CompileCounter) -> None:
    """A graph for the first row, one with symbolic sizes for the second, and none from then on."""
    compiled, eager = model(compile=True, **options), model(**options)
    p = eager.init(fstep.Key.seed(0))
    graphs = []
    for mb in batches():
        got, expected = run(compiled, p, mb), run(eager, p, mb)
        graphs.append(counter.frame_count)
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True))
    assert graphs == [1, 2, 2, 2, 2, 2]


def test_the_compiled_block_calls_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked about transforms while compiling has the answer that it has outside."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    m = model(compile=True)
    run(m, m.init(fstep.Key.seed(0)), batches(1)[0])
    assert "fstep.attend" in graphs[0] and "softmax" not in graphs[0]


def test_a_transform_inside_a_compiled_function_is_seen() -> None:
    def asked(x: Tensor) -> Tensor:
        return x + fstep.in_transform()

    compiled = torch.compile(lambda x: (asked(x), torch.func.vmap(asked)(x)), backend="eager", fullgraph=True)
    assert [y.tolist() for y in compiled(torch.zeros(2))] == [[0.0, 0.0], [1.0, 1.0]]


def test_rows_of_one_length_need_one_graph(counter: CompileCounter) -> None:
    m = model(compile=True)
    p = m.init(fstep.Key.seed(0))
    for docs in ([[1, 2, 3], [4, 5]], [[1, 2], [3, 4, 5, 6]], [[7] * 4, [8] * 3]):
        run(m, p, fstep.pack_thd(fstep.make_docs(docs), length=32))
    assert counter.frame_count <= 2  # the second if max_seqlen changes


@pytest.fixture
def symbols(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note for each graph how many sizes of its inputs are variables, other than the first of a tensor."""
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        shapes = [x.meta["example_value"].shape for x in graph.graph.find_nodes(op="placeholder") if _is_tensor(x)]
        found.append(sum(isinstance(n, torch.SymInt) for shape in shapes for n in shape[1:]))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return found


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


@pytest.mark.parametrize("half", [False, True], ids=["whole", "in halves"])
def test_two_models_have_graphs_of_their_own(half: bool, symbols: list[int]) -> None:
    """A teacher of another width leaves the student's widths constants: kernels compute no indices from variables."""
    student, rows = model(compile=True), batches(2)
    wide = dataclasses.replace(student.config, dim=32, ffn=40, heads=8, head_dim=4, rope=fstep.Rope(theta=1e4, dim=4))
    teacher = dataclasses.replace(student, config=wide)
    for m in (student, teacher, student, dataclasses.replace(teacher)):
        p = m.init(fstep.Key.seed(0))
        for mb in rows:
            if half:
                cos = torch.ones(len(mb.tokens), m.config.head_dim // 2)
                x = torch.ones(len(mb.tokens), m.config.dim)
                layer = fstep.tree_map(lambda w: w.requires_grad_(), p["layers"][0])
                m._block_in_halves(layer, x, cos, cos, mb.cu_seqlens_padded, mb.max_seqlen, 0, m, fstep.Mesh())
            else:
                run(m, p, mb)
    assert symbols == [0, 0, 0, 0]  # two each, one for all rows of a length; equal models share them


def test_new_params_need_no_new_graph(counter: CompileCounter) -> None:
    m = model(compile=True)
    p = m.init(fstep.Key.seed(0))
    rows = batches(3)
    for mb in rows:
        _, grads = run(m, p, mb)
    before = counter.frame_count
    state = fstep.adamw.update(fstep.init_state(p, fstep.adamw), grads, lr=0.1)
    for mb in rows:
        run(m, state.params, mb)
    assert counter.frame_count == before


def test_windows_share_a_graph_too(counter: CompileCounter) -> None:
    """Two windows in the first row, and any number of them from then on."""
    m = model((0, 4, 0, 8, 0, 16), compile=True)
    p = m.init(fstep.Key.seed(0))
    graphs = []
    for mb in batches(4):
        run(m, p, mb)
        graphs.append(counter.frame_count)
    assert graphs == [2, 3, 3, 3]


def test_evaluation_compiles_once_more(counter: CompileCounter) -> None:
    m = model(compile=True)
    p = m.init(fstep.Key.seed(0))
    rows = batches(3)
    for mb in rows:
        run(m, p, mb)
    before = counter.frame_count
    graphs = []
    for mb in rows:
        fstep.pp_forward(m.stage(), lambda p, x, mb: x, p, [mb])
        graphs.append(counter.frame_count - before)
    assert graphs == [1, 1, 1]


def test_documents_attention_compiles(counter: CompileCounter) -> None:
    """It reads the boundaries on the host, inside an operation that the compiler does not look into."""
    compiled, eager = (model(compile=compile, attention="documents") for compile in (True, False))
    p = eager.init(fstep.Key.seed(0), dtype=torch.float64)
    for mb in batches(2):
        for a, b in zip(tree_leaves(run(compiled, p, mb)), tree_leaves(run(eager, p, mb)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert counter.frame_count <= 2


def test_bad_boundaries_are_seen_by_the_compiled_kernel(counter: CompileCounter) -> None:
    m = model(compile=True)
    good = batches(1)[0]
    bad = dataclasses.replace(good, cu_seqlens_padded=good.cu_seqlens_padded - 1)
    with pytest.raises(ValueError, match="packed_attention: cu_seqlens are"):
        run(m, m.init(fstep.Key.seed(0)), bad)


def test_inductor_in_float64() -> None:
    """The real compiler, forward and backward."""
    compiled, eager = model((3, 3), compile=True, remat=(MM,)), model((3, 3))
    p = tree_map(lambda x: x + 0.1 * torch.randn_like(x), eager.init(fstep.Key.seed(0), dtype=torch.float64))
    mb = batches(1)[0]
    got, expected = run(compiled, p, mb), run(eager, p, mb)
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_gated_product_is_made_again() -> None:
    """Of what is as wide as the MLP, a compiled block remembers gate and up; their product is in no saved tensor."""
    packed = fstep.pack_thd(fstep.make_docs([torch.arange(30), torch.arange(18)]))
    saved: dict[bool, int] = {}
    for compiled in (False, True):
        dense = model(compile=compiled)
        config = dataclasses.replace(dense.config, ffn=88)
        dense = dataclasses.replace(dense, config=config)
        params = fstep.tree_map(lambda x: x.requires_grad_(), dense.init(fstep.Key.seed(0)))
        shapes: list[tuple[int, ...]] = []

        def pack(t: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            dense.stage()(params, None, packed)
        saved[compiled] = shapes.count((48, 88)) // config.layers
    assert saved == {False: 4, True: 2}


def test_options_have_graphs_of_their_own(counter: CompileCounter) -> None:
    """Else eight of them together would be the end: torch compiles one code eight times, and then raises."""
    p = model((0, 5)).init(fstep.Key.seed(0))
    for options in ({"dtype": torch.bfloat16}, {"attention": "math"}, {"remat": "full"}, {"attention": "documents"}):
        m = model((0, 5), compile=True, **options)
        for mb in batches(3):
            run(m, p, mb)
            fstep.pp_forward(m.stage(), lambda p, x, mb: x, p, [mb])
    assert counter.frame_count > 8


def test_a_model_that_has_run_can_be_pickled(counter: CompileCounter) -> None:
    m = model(compile=True, remat="full")
    p = m.init(fstep.Key.seed(0))
    run(m, p, batches(1)[0])
    assert pickle.loads(pickle.dumps(m)) == m == copy.deepcopy(m)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"remat": "foo"}, ValueError, "Dense: remat: policy 'foo' is unknown"),
        ({"remat": None}, TypeError, "Dense: remat is a NoneType"),
        ({"remat": (MM for _ in "x")}, TypeError, "Dense: remat is a generator"),
        ({"dtype": "bfloat16"}, TypeError, "Dense: dtype is 'bfloat16'"),
        ({"dtype": torch.int32}, TypeError, "Dense: dtype is torch.int32"),
        ({"attention": "foo"}, ValueError, "Dense: attention"),
        ({"context": "foo"}, ValueError, "Dense: context 'foo' is unknown"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(**options)


def test_what_has_no_code_cannot_be_compiled_apart() -> None:
    with pytest.raises(TypeError, match="compiled: f is a partial; pass a function"):
        compiled_apart(functools.partial(print), of=0)
