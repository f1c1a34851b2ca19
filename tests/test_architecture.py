"""Who may import whom, and what importing the package costs."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import gmail_lightning
from gmail_lightning.tasks import AlignmentTask, BaseTask

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
LAYERS["command"] = set(LAYERS)
OUTSIDE = {"__init__", "__main__"}  # the name of the package, and ``python -m``


def room(path: Path) -> str:
    """The folder or file at the top that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


# An installed package carries the recipes too, which are data: one of them holds the script that makes its weights.
SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if room(path) != "recipes"]
FILES = [path for path in SOURCES if room(path) in LAYERS]


def imported_files(path: Path) -> set[Path]:
    """Files of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [(str(node.module), alias.name) for alias in node.names]
        else:
            names = [(alias.name, "__init__") for alias in node.names] if isinstance(node, ast.Import) else []
        for module, name in names:
            if module.partition(".")[0] == "gmail_lightning":
                place = ROOT.joinpath(*module.split(".")[1:])
                candidates = (place / f"{name}.py", place / name / "__init__.py", place / "__init__.py")
                found.add(next(file for file in (*candidates, place.with_suffix(".py")) if file.is_file()))
    return found


def test_every_file_is_in_a_layer() -> None:
    assert {room(path) for path in SOURCES} == LAYERS.keys() | OUTSIDE


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    imported = {room(file) for file in imported_files(path)}
    assert imported - {room(path), "__init__"} <= LAYERS[room(path)]


@pytest.mark.parametrize("path", sorted((ROOT / "generation").rglob("*.py")), ids=lambda p: p.stem)
def test_making_data_knows_no_lightning(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert not [name for name in imported if str(name).partition(".")[0] == "lightning"]


@pytest.mark.slow
def test_no_files_import_each_other() -> None:
    """In no circle, however long."""
    imports = {path: imported_files(path) for path in SOURCES}
    left = dict(imports)
    while free := [path for path, needed in left.items() if not needed & left.keys()]:
        for path in free:
            del left[path]
    assert not [str(path.relative_to(ROOT)) for path in left]
    assert sum(map(len, imports.values())) > 300


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


def test_no_folder_is_full() -> None:
    sizes = Counter(str(path.parent.relative_to(ROOT)) for path in SOURCES)
    assert {folder: files for folder, files in sizes.items() if files > 16} == {}


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
    assert "TunesPipeline.on_save_checkpoint" in overrides
    assert len(overrides) >= 20
    assert not skipping


def arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


def test_constructors_of_tasks_take_few_arguments() -> None:
    tasks = {cls for cls in classes() if cls.__module__.startswith("gmail_lightning.tasks.")}
    assert {AlignmentTask, BaseTask} <= tasks
    assert {cls.__name__: len(arguments(cls)) for cls in tasks if len(arguments(cls)) > 18} == {}
    assert len(arguments(AlignmentTask) - arguments(BaseTask)) <= 14
