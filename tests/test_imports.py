"""The structure of the package: who imports whom, what is optional, what is never used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "convexheads"
PACKAGE = "convexheads"

# Data flow one way: a file imports only from its own row and from rows above it. A name stands for the
# file `name.py` and for everything in the folder `name/`.
LAYERS: list[list[str]] = [
    ["errors", "types"],
    ["memory", "distributed", "products"],
    ["inputs", "targets"],
    ["tokens"],
    ["datasets", "backbones"],
    ["architectures"],
    ["gates"],
    ["operator"],
    ["losses"],
    ["spectral"],
    ["problem", "evaluation"],  # an evaluation is of a problem, which evaluates
    ["subspace"],
    ["certificate"],  # knows no solver; solvers stop at the gap that it certifies
    ["solvers"],
    ["checkpoint"],
    ["path"],
    ["relu"],
    ["heads"],
    ["networks", "baselines"],
    ["explain"],
    ["certification"],
    ["estimators", "storage"],
    ["model_selection"],
    ["bench"],
    ["report", "cli", "commands"],
    ["__init__", "__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# The command line imports lazily, inside functions, so that `--help` is fast.
LAZY = {"cli", "commands"}

OPTIONAL = ["transformers", "timm", "onnx", "onnxruntime", "matplotlib", "pyarrow", "pandas", "jinja2", "cvxpy", "scnn"]

FILES = sorted(SOURCE.rglob("*.py"))
ids = [str(path.relative_to(SOURCE)) for path in FILES]


def parts(path: Path) -> list[str]:
    """Module path below the package: ``tokens/store.py`` is ``["tokens", "store"]``."""
    return list(path.relative_to(SOURCE).with_suffix("").parts)


def is_module(names: list[str]) -> bool:
    base = SOURCE.joinpath(*names)
    return base.with_suffix(".py").exists() or base.is_dir()


def imports(tree: ast.AST, names: list[str], *, functions: bool) -> Iterator[tuple[int, str]]:
    """(line, first name below the package) of every import from the package itself."""
    package = names[:-1]  # of a file and of an __init__ alike
    for node in walk(tree, functions=functions):
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = alias.name.split(".")
                if target[0] == PACKAGE:
                    yield node.lineno, target[1] if len(target) > 1 else "__init__"
        elif isinstance(node, ast.ImportFrom):
            target = node.module.split(".") if node.module else []
            if node.level:
                target = package[: len(package) - node.level + 1] + target
            elif target and target[0] == PACKAGE:
                target = target[1:]
            else:
                continue
            for alias in node.names:
                # `from . import name` names a module where there is one, else an object of __init__.
                if target:
                    yield node.lineno, target[0]
                else:
                    yield node.lineno, alias.name if is_module([alias.name]) else "__init__"


def walk(tree: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield from walk(child, functions=functions)


def layering_faults(source: str, names: list[str]) -> list[str]:
    """What is wrong with the imports of a file, one line each."""
    own = names[0]
    faults = []
    for line, target in imports(ast.parse(source), names, functions=own not in LAZY):
        where = f"{'/'.join(names)}.py, line {line}: imports {target}"
        if target not in RANK:
            faults.append(f"{where}, which has no place in LAYERS")
        elif RANK[target] > RANK[own]:
            faults.append(f"{where}, which is below it")
    return list(dict.fromkeys(faults))  # one line for several names of one import


def dangerous_uses(source: str) -> list[str]:
    """Everything in a file that would run code out of data: pickle in any form, eval and exec."""
    faults = []
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
            if node.module == "torch" and any(alias.name == "load" for alias in node.names):
                faults.append(f"line {node.lineno}: from torch import load")
        else:
            names = set()
        faults += [f"line {node.lineno}: import {name}" for name in sorted(names & modules)]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("eval", "exec", "builtins.eval", "builtins.exec", "__import__"):
            faults.append(f"line {node.lineno}: {name}")
        if name == "torch.load" and keywords.get("weights_only") != "True":
            faults.append(f"line {node.lineno}: torch.load without weights_only=True")
        if keywords.get("allow_pickle", "False") != "False":
            faults.append(f"line {node.lineno}: {name} with allow_pickle")
    return faults


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_layering(path: Path) -> None:
    names = parts(path)
    assert names[0] in RANK, f"give {names[0]} a place in LAYERS (tests/test_imports.py)"
    assert not layering_faults(path.read_text(encoding="utf-8"), names)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_code_out_of_data(path: Path) -> None:
    assert not dangerous_uses(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.cli"])
def test_import_is_light(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {OPTIONAL!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("names", "source", "faults"),
    [
        (["tokens", "store"], "from ..errors import InputError\nfrom . import files", 0),
        (["tokens", "store"], "from ..backbones import load", 1),
        (["tokens", "__init__"], "from ..backbones import load", 1),
        (["tokens", "store"], "def f():\n    from convexheads.heads import head", 1),
        (["tokens", "store"], "from .. import heads", 1),
        (["tokens", "store"], "import convexheads", 1),
        (["operator"], "import convexheads.estimators as e", 1),
        (["operator"], "from .nowhere import x", 1),
        (["certificate"], "from .solvers import factored", 1),
        (["path"], "from .solvers.factored import solve\nfrom .certificate import certificate", 0),
        (["cli"], "def main():\n    from convexheads import load", 0),
        (["cli"], "from convexheads import load", 1),
        (["__init__"], "from .estimators import load", 0),
    ],
)
def test_the_layering_check_itself(names: list[str], source: str, faults: int) -> None:
    assert len(layering_faults(source, names)) == faults


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("module.eval()\nre.compile(x)\nnumpy.load(f)\nnumpy.load(f, allow_pickle=False)", 0),
        ("torch.load(f, weights_only=True)", 0),
        ("torch.load(f)", 1),
        ("torch.load(f, weights_only=False)", 1),
        ("from torch import load", 1),
        ("import os, pickle", 1),
        ("def f():\n    from joblib import load", 1),
        ("numpy.load(f, allow_pickle=True)", 1),
        ("eval(text); exec(text)", 2),
    ],
)
def test_the_check_for_code_out_of_data_itself(source: str, faults: int) -> None:
    assert len(dangerous_uses(source)) == faults
