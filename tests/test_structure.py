"""The source keeps to the rules of its layout: who may import whom, who names what is private, how text is opened."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]

#: Top to bottom. A module imports what is on its own floor or below; a package stands for all its modules.
FLOORS = (
    ("fastbf", "fastbf.__main__"),
    ("fastbf.surgery",),
    ("fastbf.plain",),
    ("fastbf.cuda_graphs", "fastbf.averaging", "fastbf.warming"),
    ("fastbf.modules",),
    ("fastbf.functional",),
    ("fastbf.torch_backend", "fastbf.triton_backend"),
    ("fastbf.distributed",),
    (
        "fastbf.autograd",
        "fastbf.backend",
        "fastbf.checks",
        "fastbf.dropout",
        "fastbf.environment",
        "fastbf.joint",
        "fastbf.precision",
        "fastbf.recorder",
        "fastbf.reference",
        "fastbf.repeats",
        "fastbf.signatures",
        "fastbf.suggestions",
        "fastbf.tape",
        "fastbf.torch_state",
        "fastbf.version",
        "fastbf.warned",
    ),
)
BACKENDS = ("fastbf.torch_backend", "fastbf.triton_backend")
DECIDE = ("fastbf.backend", "fastbf.functional")

#: Public functions, whose parameters are fixed by the papers, by torch and by users.
PUBLIC = {
    "fastbf.functional": (
        "activation_dropout",
        "batch_attention",
        "dropout_add_layer_norm",
        "encoder_layer",
        "linear_cross_entropy",
    ),
    "fastbf.modules.batchformer": ("BatchFormer.__init__",),
    "fastbf.modules.classifier": ("SharedClassifier.__init__",),
    "fastbf.modules.layer": ("BatchFormerLayer.__init__", "BatchFormerLayer.forward"),
}
MOST_PARAMETERS = 10


class Import(NamedTuple):
    """One module imports another."""

    by: str
    name: str
    line: int
    deferred: bool  #: it happens when a function is called, or for type checkers only

    def __str__(self) -> str:
        return f"{self.by}, line {self.line}, imports {self.name}"


def _modules() -> dict[str, Path]:
    """Every module of fastbf by name, those of the kernels where they lie: in ``kernels/``."""
    files = {("fastbf", *f.relative_to(ROOT / "fastbf").parts): f for f in (ROOT / "fastbf").rglob("*.py")}
    files = {parts: f for parts, f in files.items() if parts[1] != "kernels"}
    files |= {("fastbf", "kernels", f.name): f for f in (ROOT / "kernels").glob("*.py")}
    return {".".join(parts).removesuffix(".py").removesuffix(".__init__"): f for parts, f in files.items()}


MODULES = _modules()
TREES = {name: ast.parse(file.read_text(encoding="utf-8"), str(file)) for name, file in MODULES.items()}


def _statements(node: ast.AST, deferred: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, deferred
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _statements(child, deferred or function or typing_only)


def _imports(module: str) -> Iterator[Import]:
    for node, deferred in _statements(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                package = module.split(".") + ["__init__"] * (MODULES[module].name == "__init__.py")
                base = ".".join([*package[: -node.level], *base.split(".") * bool(base)])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in inside]
        yield from (Import(module, name, node.lineno, deferred) for name in dict.fromkeys(names))


IMPORTS = [found for module in MODULES for found in _imports(module)]


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def floor(module: str) -> int | None:
    """How many floors are above a module; None of one that has no floor."""
    for above, names in enumerate(FLOORS):
        if module in names or within(module, *[name for name in names if name != "fastbf"]):
            return above
    return None


def of_fastbf(*, kernels: bool = False) -> list[Import]:
    """What imports modules of fastbf, by default those that are not kernels, and is itself not a kernel."""
    found = [i for i in IMPORTS if within(i.name, "fastbf") and not within(i.by, "fastbf.kernels")]
    return [i for i in found if within(i.name, "fastbf.kernels") == kernels]


def assert_none(found: list) -> None:
    assert not found, "\n" + "\n".join(map(str, found))


def test_every_module_has_a_floor():
    assert_none([name for name in MODULES if floor(name) is None and not within(name, "fastbf.kernels")])


def test_imports_go_down():
    floors = [(i, floor(i.by), floor(i.name)) for i in of_fastbf()]
    assert_none([i for i, by, name in floors if by is not None and name is not None and by > name])


def test_imports_have_no_cycles():
    graph = {module: {i.name for i in IMPORTS if i.by == module and i.name != module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_backends_do_not_import_one_another():
    for one, other in (BACKENDS, BACKENDS[::-1]):
        assert_none([i for i in of_fastbf() if within(i.by, one) and within(i.name, other)])


def test_only_functional_and_backend_name_a_backend():
    others = [i for i in of_fastbf() if not within(i.by, *BACKENDS) and i.by not in DECIDE]
    assert_none([i for i in others if within(i.name, *BACKENDS)])


def test_reference_imports_no_backend():
    imports = [i for i in IMPORTS if i.by == "fastbf.reference"]
    assert_none([i for i in imports if within(i.name, *BACKENDS, "fastbf.backend", "fastbf.kernels", "triton")])


def test_modules_are_imported_from_above_only():
    may = ("fastbf", "fastbf.__main__", "fastbf.averaging", "fastbf.plain", "fastbf.surgery")
    found = [i for i in of_fastbf() if within(i.name, "fastbf.modules") and not within(i.by, "fastbf.modules")]
    assert_none([i for i in found if i.by not in may])


def test_kernels_import_torch_triton_and_kernels_only():
    may = ("torch", "triton", "fastbf.kernels", *sys.stdlib_module_names)
    assert_none([i for i in IMPORTS if within(i.by, "fastbf.kernels") and not within(i.name, *may)])


def test_kernels_are_imported_by_the_triton_backend_and_where_it_is_chosen():
    others = [i for i in of_fastbf(kernels=True) if not within(i.by, "fastbf.triton_backend") and i.by not in DECIDE]
    assert_none(others)


def test_what_needs_triton_is_imported_inside_functions():
    needs = [i for i in IMPORTS if within(i.name, "triton", "fastbf.kernels", "fastbf.triton_backend")]
    others = [i for i in needs if not within(i.by, "fastbf.kernels", "fastbf.triton_backend")]
    assert_none([i for i in others if not i.deferred])


def test_importing_fastbf_does_not_import_triton():
    code = "import sys, fastbf; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


#: Private names of torch's modules and tensors. Methods of the same name override torch's.
OF_TORCH = {
    name
    for owner in (Tensor, nn.Module(), nn.MultiheadAttention(1, 1), nn.TransformerEncoderLayer(1, 1), nn.Linear(1, 1))
    for name in dir(owner)
    if is_private(name)
}
OF_NAMEDTUPLE = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}


def _own() -> set[str]:
    """Private names that fastbf gives to functions, classes, variables and its objects' attributes."""
    own = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return {name for name in own if is_private(name)} - OF_TORCH


OWN = _own()


def _private_names_of_torch(module: str) -> Iterator[str]:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            of = getattr(node, "module", None) or ""
            for alias in node.names:
                parts = f"{of}.{alias.name}".strip(".").split(".")
                if parts[0] == "torch" and any(map(is_private, parts)):
                    yield ".".join(parts)
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in OWN | OF_NAMEDTUPLE:
            owner = ast.unparse(node.value)
            if module != "fastbf.kernels.launch" or within(owner, "torch"):  # Triton's private names are in launch.py
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.Constant) and node.value in OF_TORCH:
            yield node.value
        elif isinstance(node, ast.ClassDef):
            yield from (f.name for f in node.body if isinstance(f, ast.FunctionDef) and f.name in OF_TORCH)


def test_private_names_of_torch_are_in_one_file():
    found = [(module, name) for module in MODULES for name in _private_names_of_torch(module)]
    assert "fastbf.torch_state" in [module for module, _ in found], "none are found at all"
    assert_none([f"{module} names {name}" for module, name in found if module != "fastbf.torch_state"])


def _functions(node: ast.AST, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield ".".join([*path, child.name]), child
        named = isinstance(child, ast.FunctionDef | ast.ClassDef)
        yield from _functions(child, (*path, child.name) if named else path)


def _parameters(function: ast.FunctionDef) -> int:
    """How many there are; ``*args`` is one, and ``self``, ``cls`` and ``ctx`` are none."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a]
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def test_functions_have_few_parameters():
    found = [(module, name, node) for module, tree in TREES.items() for name, node in _functions(tree)]
    many = [
        f"{module}.{name} has {_parameters(node)}"
        for module, name, node in found
        if _parameters(node) > MOST_PARAMETERS
        and name not in PUBLIC.get(module, ())
        and not any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert_none(many)


def test_public_functions_exist():
    for module, names in PUBLIC.items():
        assert set(names) <= {name for name, _ in _functions(TREES[module])}


def _text_without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines where a text file is read or written in whatever encoding the system prefers."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        modes = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        says = any(keyword.arg in ("encoding", None) for keyword in node.keywords)
        text = name in ("read_text", "write_text") or (name == "open" and not binary and owner not in ("os", "tarfile"))
        if text and not says:
            yield node.lineno


def test_text_files_are_opened_with_an_encoding():
    folders = ("bench", "examples", "fastbf", "kernels", "tests")
    files = {ROOT / "setup.py", *(f for folder in folders for f in (ROOT / folder).rglob("*.py"))}
    trees = {file.relative_to(ROOT): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    assert_none([f"{file}, line {line}" for file, tree in trees.items() for line in _text_without_encoding(tree)])
