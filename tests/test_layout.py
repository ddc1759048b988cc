"""The laws of the code that can be read off its source: who imports whom, and what nobody does.

Each rule is a function from a parsed file to its findings. `test_rule_sees` gives every rule a line that breaks it, so
that a rule that has gone blind fails too.
"""

from __future__ import annotations

import ast
import graphlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 300

# Imports point from right to left. The words at the root (tree, ratio, key, ...) come before every room. State sits
# left of update: an update takes and returns a state.
ROOMS = ["mesh", "batch", "ops", "grad", "loss", "rollout", "state", "update"]
IMPORT_EVERYTHING = {"fstep/__init__.py", "fstep/testing.py"}
NEVER_IMPORTED = {"fstep_models", "models", "transformers", "tests", "examples", "benchmarks"}

# Reading `.data` of a tensor defeats autograd's version check. These expressions are not tensors.
DATA_ALLOWED = {
    ("fstep/key.py", "self.data"): "the one field of a Key",
    ("fstep/grad/lift.py", "key.data"): "the one field of a Key",
    ("fstep/state/files.py", "x.reshape(-1).view(torch.uint8).numpy().data"): "the memory of a numpy array",
}

# torchrun tells a process who it is through the environment; nothing else is read from there.
ENVIRONMENT_HOME = "fstep/mesh/launch.py"

# Everything private that is used of torch, and where. It may go away with any release, so each name has one home.
TORCH_PRIVATE = {
    "torch._C._functorch.peek_interpreter_stack": "fstep/trace.py",
    "torch._foreach_copy_": "fstep/grad/pieces.py",
    "torch._foreach_mul": "fstep/update/finalize.py",
    "torch._foreach_mul_": "fstep/update/finalize.py",
    "torch._foreach_norm": "fstep/update/finite.py",
    "torch._fused_adamw_": "fstep/update/adamw.py",
    "torch._fused_sgd_": "fstep/update/sgd.py",
    "torch.autograd.graph._engine_run_backward": "fstep/grad/engine.py",
    "torch.nn.modules.dropout._DropoutNd": "fstep/grad/lift.py",
    "torch.ops.aten._flash_attention_backward": "fstep/ops/flash.py",
    "torch.ops.aten._flash_attention_forward": "fstep/ops/flash.py",
    "torch.ops.aten._scaled_dot_product_cudnn_attention": "fstep/ops/dense.py",
    "torch.ops.aten._scaled_dot_product_cudnn_attention_backward": "fstep/ops/dense.py",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "fstep/ops/flash.py",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "fstep/ops/flash.py",
    "torch.utils._pytree.GetAttrKey": "fstep/tree.py",
    "torch.utils._pytree.register_pytree_node": "fstep/tree.py",
}


class Source:
    """A parsed file, and what the names in it stand for."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.tree = ast.parse(text)
        self.names = dict(self._imported())
        for node in ast.walk(self.tree):  # aten = torch.ops.aten
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Attribute() as value):
                    if (dotted := self.dotted(value)) is not None:
                        self.names.setdefault(name, dotted)

    def _imported(self) -> Iterator[tuple[str, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name.split(".")[0]
                    yield (alias.asname, alias.name) if alias.asname else (root, root)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield alias.asname or alias.name, f"{self.origin(node)}.{alias.name}"

    def origin(self, node: ast.ImportFrom) -> str:
        """Name the module that a ``from`` import reads, resolving leading dots."""
        if not node.level:
            return node.module or ""
        package = self.path.removesuffix(".py").removesuffix("/__init__").split("/")
        drop = node.level - (1 if self.path.endswith("__init__.py") else 0)
        return ".".join([*package[: len(package) - drop], *([node.module] if node.module else [])])

    def dotted(self, node: ast.AST) -> str | None:
        """Write ``F.linear`` as ``torch.nn.functional.linear``; None for what does not start at an imported name."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute) and (base := self.dotted(node.value)) is not None:
            return f"{base}.{node.attr}"
        return None

    def imports(self) -> Iterator[tuple[int, str]]:
        """Yield every imported dotted name with its line."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.lineno, f"{self.origin(node)}.{alias.name}") for alias in node.names)

    def chains(self) -> Iterator[tuple[int, str, str]]:
        """Yield (line, dotted name, outermost function or class) for every longest use of an imported name."""
        yield from self._chains(self.tree, "")

    def _chains(self, node: ast.AST, home: str) -> Iterator[tuple[int, str, str]]:
        if isinstance(node, ast.Attribute | ast.Name) and (dotted := self.dotted(node)) is not None:
            yield node.lineno, dotted, home
            return
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from self._chains(child, home or (getattr(child, "name", "") if named else ""))


def sources() -> list[Source]:
    files = sorted([*ROOT.glob("fstep/**/*.py"), *ROOT.glob("models/**/*.py")])
    return [Source(f.relative_to(ROOT).as_posix(), f.read_text("utf-8")) for f in files]


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


Findings = Iterable[tuple[int, str]]


def distributed_outside_mesh(src: Source) -> Findings:
    if not src.path.startswith("fstep/mesh/"):
        uses = [*src.imports(), *((line, name) for line, name, _ in src.chains())]
        yield from ((line, f"{name}: only fstep/mesh/ talks") for line, name in uses if below(name, "torch.distributed"))


def environment(src: Source) -> Findings:
    if src.path == ENVIRONMENT_HOME:
        return
    uses = [*src.imports(), *((line, name) for line, name, _ in src.chains())]
    for line, name in uses:
        if any(below(name, f"os.{what}") for what in ("environ", "environb", "getenv", "putenv", "unsetenv")):
            yield line, f"{name}: take an argument instead"


def global_statement(src: Source) -> Findings:
    for node in ast.walk(src.tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}: pass the value and return the new one"


def data_attribute(src: Source) -> Findings:
    for node in ast.walk(src.tree):
        if isinstance(node, ast.Attribute) and node.attr == "data":
            expression = ast.unparse(node)
            if (src.path, expression) not in DATA_ALLOWED and src.dotted(node) != "torch.utils.data":
                yield node.lineno, f"{expression}: use .detach(); if it is no tensor, list it in DATA_ALLOWED"


def backward_call(src: Source) -> Findings:
    for node in ast.walk(src.tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="backward")) if src.path != "fstep/grad/autodiff.py":
                yield (
                    node.lineno,
                    f"{ast.unparse(node.func)}(: it writes .grad; take gradients through grad/autodiff.py",
                )


def prints(src: Source) -> Findings:
    for node in ast.walk(src.tree):
        if isinstance(node, ast.Name) and node.id == "print" and src.path.startswith("fstep/"):
            yield node.lineno, "print: return the value"


def wrong_way_import(src: Source) -> Findings:
    if not src.path.startswith("fstep/"):
        return
    here = rank(src.path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    for line, name in src.imports():
        if name.split(".")[0] in NEVER_IMPORTED:
            yield line, f"{name}: fstep imports no model and no tool of this repository"
        elif below(name, "fstep") and src.path not in IMPORT_EVERYTHING:
            if not is_module(name):
                yield line, f"{name}: inside fstep, import from the module that defines it"
            elif rank(name) > here:
                yield line, f"{name}: {' < '.join(['root', *ROOMS])}"


def is_module(name: str) -> bool:
    """Tell ``fstep.mesh.axis.Axis``, read from a module, from ``fstep.Axis``, read from the public names."""
    room = room_of(name)
    return room in ROOMS or (room != "" and (ROOT / "fstep" / f"{room}.py").is_file())


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def rank(module: str) -> int:
    """Place a module in the order of imports: 0 for the words at the root, then the rooms, then who sees everything."""
    room = room_of(module)
    if room in ("", "testing"):
        return len(ROOMS) + 1
    return ROOMS.index(room) + 1 if room in ROOMS else 0


def too_long(src: Source) -> Findings:
    lines = len(src.text.splitlines())
    if lines > MAX_LINES:
        yield lines, f"{lines} lines; {MAX_LINES} is what can be read in one sitting"


RULES: dict[Callable[[Source], Findings], list[tuple[str, str]]] = {
    distributed_outside_mesh: [
        ("fstep/ops/a.py", "import torch.distributed as dist"),
        ("fstep/ops/a.py", "from torch import distributed"),
        ("fstep/ops/a.py", "from torch.distributed.tensor import DTensor"),
        ("models/a.py", "import torch\ntorch.distributed.barrier()"),
    ],
    environment: [
        ("fstep/mesh/a.py", "import os\nos.environ['RANK']"),
        ("fstep/mesh/a.py", "from os import environ"),
        ("fstep/mesh/a.py", "import os as system\nsystem.getenv('RANK')"),
    ],
    global_statement: [("fstep/a.py", "def f():\n    global x")],
    data_attribute: [
        ("fstep/key.py", "x.data"),
        ("fstep/ops/a.py", "self.data"),
        ("fstep/ops/a.py", "from fstep.key import weight\nweight.data = 1"),
    ],
    backward_call: [("fstep/ops/a.py", "loss.backward()"), ("fstep/a.py", "import torch\ntorch.autograd.backward(y)")],
    prints: [("fstep/a.py", "print(1)"), ("fstep/a.py", "f = print")],
    wrong_way_import: [
        ("fstep/tree.py", "from fstep.mesh.axis import Axis"),
        ("fstep/mesh/a.py", "import fstep.batch.pack"),
        ("fstep/state/a.py", "from fstep.update import optim"),
        ("fstep/loss/a.py", "def f():\n    from fstep.state.state import TrainState"),
        ("fstep/grad/a.py", "from ..loss import sft"),
        ("fstep/grad/a.py", "from fstep import Ratio"),
        ("fstep/grad/a.py", "import fstep"),
        ("fstep/grad/a.py", "from fstep import testing"),
        ("fstep/ops/a.py", "import transformers"),
        ("fstep/testing.py", "from fstep_models.llama import init"),
    ],
    too_long: [("models/a.py", "x = 1\n" * (MAX_LINES + 1))],
}
ALLOWED: dict[Callable[[Source], Findings], list[tuple[str, str]]] = {
    distributed_outside_mesh: [("fstep/mesh/a.py", "import torch.distributed as dist")],
    environment: [
        ("fstep/mesh/a.py", "import os\nos.path.join('a', 'b')"),
        ("fstep/mesh/launch.py", "import os\nos.environ['RANK']"),
    ],
    data_attribute: [
        ("fstep/key.py", "self.data"),
        ("fstep/a.py", "import torch.utils.data\ntorch.utils.data.Dataset"),
    ],
    backward_call: [("fstep/grad/autodiff.py", "import torch\ntorch.autograd.backward(y)")],
    prints: [("models/a.py", "print(1)")],
    wrong_way_import: [
        ("fstep/update/a.py", "from fstep.state.state import TrainState"),
        ("fstep/update/a.py", "from fstep.update.lr import constant\nfrom fstep.tree import tree_map"),
        ("fstep/mesh/a.py", "from fstep import tree"),
        ("fstep/mesh/a.py", "from .axis import Axis"),
        ("fstep/testing.py", "import fstep.update.optim"),
        ("models/a.py", "import transformers\nimport fstep"),
    ],
    too_long: [("models/a.py", "x = 1\n" * MAX_LINES)],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Callable[[Source], Findings]) -> None:
    found = [f"{src.path}:{line}: {what}" for src in sources() for line, what in rule(src)]
    assert not found, "\n" + "\n".join(sorted(set(found)))


@pytest.mark.parametrize(("rule", "case"), [(r, c) for r, cases in RULES.items() for c in cases])
def test_rule_sees(rule: Callable[[Source], Findings], case: tuple[str, str]) -> None:
    assert list(rule(Source(*case)))


@pytest.mark.parametrize(("rule", "case"), [(r, c) for r, cases in ALLOWED.items() for c in cases])
def test_rule_leaves_alone(rule: Callable[[Source], Findings], case: tuple[str, str]) -> None:
    assert not list(rule(Source(*case)))


def test_every_folder_is_a_room() -> None:
    folders = {p.parent.name for p in ROOT.glob("fstep/*/*.py")}
    assert folders <= set(ROOMS), f"no place in the order of imports: {sorted(folders - set(ROOMS))}; add it to ROOMS"


def test_no_allowance_is_stale() -> None:
    used = {(s.path, ast.unparse(n)) for s in sources() for n in ast.walk(s.tree) if isinstance(n, ast.Attribute)}
    assert not set(DATA_ALLOWED) - used


def test_no_cycle_between_modules() -> None:
    modules = {s.path.removesuffix(".py").replace("/", "."): s for s in sources() if not s.path.endswith("__init__.py")}
    graph = {m: {n for _, i in s.imports() for n in modules if below(i, n)} for m, s in modules.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def private_name(dotted: str) -> str | None:
    """Cut a dotted name of torch behind the private part: the function itself, or the member of a private module."""
    parts = dotted.split(".")
    private = [i for i, part in enumerate(parts) if part.startswith("_") and not part.startswith("__")]
    if parts[0] != "torch" or not private:
        return None
    return ".".join(parts[: private[-1] + (1 if below(dotted, "torch.ops") else 2)])


def private_uses(files: list[Source]) -> dict[str, set[tuple[str, str]]]:
    """Map each private name to the (file, outermost function) pairs that use it; a bare import is a use of its own."""
    uses: dict[str, set[tuple[str, str]]] = {}
    for src in files:
        used = [(name, home) for _, dotted, home in src.chains() if (name := private_name(dotted))]
        for name, home in used:
            uses.setdefault(name, set()).add((src.path, home))
        for _, dotted in src.imports():
            if (name := private_name(dotted)) and not any(below(u, name) for u, _ in used):
                uses.setdefault(name, set()).add((src.path, "import"))
    return uses


def test_private_torch_is_listed_and_has_one_home() -> None:
    uses = private_uses(sources())
    found = {name: sorted({path for path, _ in places}) for name, places in uses.items()}
    assert found == {name: [path] for name, path in TORCH_PRIVATE.items()}, "TORCH_PRIVATE and the code disagree"
    spread = {name: places for name, places in uses.items() if len(places) > 1}
    assert not spread, f"used in more than one function; put it behind one: {spread}"


@pytest.mark.parametrize("name", TORCH_PRIVATE)
def test_private_torch_is_still_there(name: str) -> None:
    parts = name.split(".")
    here = importlib.import_module("torch")
    for i, part in enumerate(parts[1:], start=1):
        if not hasattr(here, part):
            try:
                importlib.import_module(".".join(parts[: i + 1]))
            except ModuleNotFoundError:
                pytest.fail(f"this torch has no {name}, which {TORCH_PRIVATE[name]} uses", pytrace=False)
        here = getattr(here, part)


def test_private_uses_sees() -> None:
    text = """
import torch, torch.utils._pytree as p
from torch.x._y import z
from torch.nn import functional as F
aten = torch.ops.aten
def f(): p.register(1); F._g; x._private; torch.__version__
def h():
    def inner(): return aten._flash.default(z)
"""
    assert private_uses([Source("fstep/a.py", text)]) == {
        "torch.utils._pytree.register": {("fstep/a.py", "f")},
        "torch.nn.functional._g": {("fstep/a.py", "f")},
        "torch.x._y.z": {("fstep/a.py", "h")},
        "torch.ops.aten._flash": {("fstep/a.py", "h")},
    }
