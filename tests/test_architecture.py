"""Who may import whom, and what importing the package costs."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import gmail_lightning

ROOT = Path(gmail_lightning.__file__).parent
LAYERS = {
    "types": set(),
    "cache": set(),
    "distributed": set(),
    "optim": set(),
    "losses": {"types", "distributed"},
    "metrics": {"types", "cache", "distributed"},
    "transforms": {"types", "distributed"},
    "models": {"types", "distributed", "losses", "transforms"},
    "datasets": {"types", "cache", "transforms"},
    "leakage": {"types", "transforms", "distributed", "datasets"},
    "samplers": {"types", "datasets"},
    "generation": {"types", "transforms", "datasets", "models", "metrics"},
    "datamodules": {"types", "distributed", "datasets", "leakage", "samplers", "generation"},
    "tasks": {"types", "distributed", "optim", "losses", "metrics", "transforms", "models"},
    "callbacks": {"types", "distributed", "metrics", "models", "tasks", "datasets", "datamodules", "generation"},
    "export": {"types", "models", "tasks"},
    "testing": {"types", "models", "datasets"},
}
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0].removesuffix(".py") in LAYERS]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gmail_lightning."):
            imported.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            imported |= {a.name.split(".")[1] for a in node.names if a.name.startswith("gmail_lightning.")}
    assert imported - {own} <= LAYERS[own]


@pytest.mark.parametrize("path", sorted((ROOT / "generation").rglob("*.py")), ids=lambda p: p.stem)
def test_making_data_knows_no_lightning(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert not [name for name in imported if str(name).partition(".")[0] == "lightning"]


def imported_files(path: Path) -> set[Path]:
    """Files of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gmail_lightning":
            module = ROOT.joinpath(*str(node.module).split(".")[1:])
            for name in (alias.name for alias in node.names):
                candidates = (module / f"{name}.py", module.with_suffix(".py"), module / "__init__.py")
                found.add(next(candidate for candidate in candidates if candidate.is_file()))
    return found


def test_no_files_import_each_other() -> None:
    """In no circle, however long."""
    imports = {path: imported_files(path) for path in ROOT.rglob("*.py")}
    left = dict(imports)
    while free := [path for path, needed in left.items() if not needed & left.keys()]:
        for path in free:
            del left[path]
    assert not [str(path.relative_to(ROOT)) for path in left]
    assert sum(map(len, imports.values())) > 300


def test_import_loads_no_heavy_package() -> None:
    heavy = {"torch", "lightning", "diffusers", "transformers", "open_clip"}
    code = f"import sys, gmail_lightning; print({heavy} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


HOOKS = ("on_", "setup", "teardown", "configure_", "optimizer_step", "state_dict", "load_state_dict", "transfer_batch")


def ours(cls: type) -> bool:
    return cls.__module__.startswith("gmail_lightning.")


def classes() -> list[type]:
    """Every class of the package."""
    modules = [p.relative_to(ROOT).with_suffix("").parts for p in FILES if p.stem != "__init__"]
    found = {}
    for parts in modules:
        module = importlib.import_module(".".join(("gmail_lightning", *parts)))
        found |= {cls: None for _, cls in inspect.getmembers(module, inspect.isclass) if ours(cls)}
    return list(found)


def test_an_override_of_a_hook_calls_that_of_its_base() -> None:
    """A hook that a base of ours defines checks or restores something, which a subclass must not skip."""
    overrides, skipping = [], []
    for cls in classes():
        for name, function in vars(cls).items():
            if not name.startswith(HOOKS) or not inspect.isfunction(function):
                continue
            bases = [base for base in cls.__mro__[1:] if ours(base) and name in vars(base)]
            if bases and not getattr(vars(bases[0])[name], "__isabstractmethod__", False):
                overrides.append(f"{cls.__name__}.{name}")
                if f"super().{name}(" not in inspect.getsource(function):
                    skipping.append(overrides[-1])
    assert "TextToImageTask.on_fit_start" in overrides
    assert len(overrides) >= 20
    assert not skipping
