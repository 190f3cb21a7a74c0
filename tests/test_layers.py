"""Imports run one way: every layer can be read knowing only what is before it."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGES = ("vision_moe", "mllm", "eval", "demo")

# What a file may import of ours: package or module -> prefixes. The longest entry that covers the file counts.
# The layers of vision_moe, in order: kernels -> moe -> model -> upcycle, cluster -> train.
ALLOWED = {
    "vision_moe.version": (),
    "vision_moe.kernels": ("vision_moe.kernels",),
    "vision_moe.moe": ("vision_moe.kernels", "vision_moe.moe"),
    "vision_moe.model": ("vision_moe.kernels", "vision_moe.moe", "vision_moe.model"),
    "vision_moe": ("vision_moe",),
    "mllm": ("vision_moe", "mllm"),
    "eval": ("vision_moe", "mllm", "eval"),
    "demo": ("vision_moe", "mllm", "demo"),
}
# Within vision_moe: the modules that build on each of these; nothing before them may import them.
FORBIDDEN = {
    "vision_moe.upcycle": ("vision_moe.train", "vision_moe.stages", "vision_moe.dmu", "vision_moe.trainer"),
    "vision_moe.freeze": ("vision_moe.train", "vision_moe.stages", "vision_moe.dmu", "vision_moe.trainer"),
    "vision_moe.cluster": ("vision_moe.train", "vision_moe.stages", "vision_moe.dmu", "vision_moe.model"),
    "vision_moe.data": ("vision_moe.train", "vision_moe.stages", "vision_moe.dmu", "vision_moe.model"),
    "vision_moe.contrastive": ("vision_moe.train", "vision_moe.model", "vision_moe.data"),
    "vision_moe.convert": ("vision_moe.train", "vision_moe.stages", "vision_moe.dmu"),
}


def covers(prefix: str, module: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def module_name(file: Path) -> str:
    """Dotted name; a package keeps its `.__init__`, so that relative imports resolve as in any other file."""
    return ".".join(file.relative_to(CHECKOUT).with_suffix("").parts)


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    """Modules of ours that the source imports, anywhere in it, with the line; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*module.split(".")[: -node.level], node.module] if node.level else [node.module]
            found = [".".join(filter(None, [*base, alias.name])) for alias in node.names]
        else:
            continue
        for name in found:
            if name.split(".")[0] in (*PACKAGES, "tests", "scripts"):
                yield name, node.lineno


def violations(source: str, module: str) -> list[str]:
    """What the file may not import, and every `import eval`, which would hide the builtin of that name."""
    tree = ast.parse(source)
    layer = max((name for name in ALLOWED if covers(name, module)), key=len)
    barred = [target for name, targets in FORBIDDEN.items() if covers(name, module) for target in targets]
    found = [
        f"{module}:{line} imports {name}"
        for name, line in imports(tree, module)
        if not any(covers(prefix, name) for prefix in ALLOWED[layer]) or any(covers(target, name) for target in barred)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "eval" for alias in node.names):
            found.append(f"{module}:{node.lineno} writes `import eval`; write `from eval.x import y`")
        if isinstance(node, ast.ImportFrom) and node.module == "eval" and not node.level:
            found.append(f"{module}:{node.lineno} writes `from eval import`; write `from eval.x import y`")
    return found


def sources(package: str) -> list[Path]:
    return sorted((CHECKOUT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    found = [line for file in sources(package) for line in violations(file.read_text(), module_name(file))]
    assert not found, "\n".join(found)


def test_the_packages_have_sources():
    assert sources("vision_moe")
    assert sources("mllm")


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("vision_moe.moe.layer", "from vision_moe.model import CLIPMoEModel", True),
        ("vision_moe.moe.layer", "from vision_moe import model", True),
        ("vision_moe.moe.layer", "from ..model import clip_moe", True),
        ("vision_moe.moe.layer", "def f():\n    import vision_moe.upcycle", True),
        ("vision_moe.moe.layer", "from vision_moe.moe.router import Router", False),
        ("vision_moe.moe.layer", "from .router import Router", False),
        ("vision_moe.model.clip_moe", "from vision_moe.moe.router import Router", False),
        ("vision_moe.model.clip_moe", "from vision_moe.upcycle import upcycle", True),
        ("vision_moe.upcycle", "from vision_moe.train import main", True),
        ("vision_moe.train", "from vision_moe.upcycle import upcycle", False),
        ("vision_moe.train", "from mllm.generate import load", True),
        ("mllm.generate", "from vision_moe.model import CLIPMoEModel", False),
        ("mllm.generate", "from eval.metrics import recall", True),
        ("eval.run", "from mllm.generate import load", False),
        ("eval.run", "from demo.app import build", True),
        ("eval.run", "import eval.metrics", True),
        ("eval.run", "from eval import metrics", True),
        ("eval.run", "from eval.metrics import recall", False),
        ("demo.app", "from tests.conftest import CHECKOUT", True),
    ],
)
def test_the_check_itself_sees_what_it_should(module, source, expected):
    assert bool(violations(source, module)) is expected


def test_moe_layer_knows_nothing_of_clip():
    """A mixture is ignorant of images and text: it names no transformers model."""
    for file in sources("vision_moe/moe"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not [name for name in names if "clip" in name.lower() or "transformers.models" in name], file


def test_tests_are_no_package_and_are_not_imported():
    assert not list((CHECKOUT / "tests").rglob("__init__.py"))
    for file in sources("tests"):
        modules = [name for name, _ in imports(ast.parse(file.read_text()), module_name(file))]
        assert not [name for name in modules if covers("tests", name) or covers("scripts", name)], file


def test_the_wheel_ships_vision_moe_and_mllm_only():
    """`eval` and `demo` are names that other wheels bring too; installed side by side they overwrite each other."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    assert project["project"]["name"] == "vision-moe"
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.split(".")[0] for pattern in patterns} == {"vision_moe", "mllm"}
    assert set(project["tool"]["setuptools"]["package-data"]) <= {"vision_moe", "mllm"}
