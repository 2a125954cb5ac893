"""What the wheel holds, how the packages may be imported, and in which direction they depend on each other."""

import ast
import importlib.util
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"rlkl": ROOT / "rlkl", "rlkl.trainers": ROOT / "trainers", "rlkl.rewards": ROOT / "rewards"}
MAY_USE_OBJECTIVES = {"cli", "grid", "lane", "loop", "runs"}
LIGHT = ["rlkl", "rlkl.__main__", "rlkl.cli", "rlkl.config", "rlkl.settings", "rlkl.summary"]
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "matplotlib", "tokenizers", "numpy"}


def sources() -> dict[str, Path]:
    """Every module of the package with its file."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder).with_suffix("").parts
            if package == "rlkl" and inside[0] in ("trainers", "rewards"):  # the links
                continue
            name = ".".join((package, *inside)).removesuffix(".__init__")
            found[name] = path
    return found


SOURCES = sources()


def imports(path: Path, module: str, inside_functions: bool = True) -> Iterator[str]:
    """The modules that a file imports; those under ``TYPE_CHECKING`` are none."""

    def walk(nodes: list[ast.stmt]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = module.split(".")[: -node.level if path.name != "__init__.py" else None]
                    base = ".".join([*parts, base]).strip(".")
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in SOURCES)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk(node.orelse)
            elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for name in ("body", "orelse", "finalbody"):
                    yield from walk(getattr(node, name, []))
                for handler in getattr(node, "handlers", []):
                    yield from walk(handler.body)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")).body)


def test_imports_are_found_where_they_stand(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        "import os.path\nfrom rlkl import kl\nfrom . import loop\nif TYPE_CHECKING:\n    import hidden\n"
        "def f():\n    try:\n        import inner\n    except ValueError:\n        from handled import x\n"
    )
    assert list(imports(path, "rlkl.m")) == ["os.path", "rlkl", "rlkl.kl", "rlkl", "rlkl.loop", "inner", "handled"]
    assert "inner" not in list(imports(path, "rlkl.m", inside_functions=False))


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> list[str]:
    """The names in the wheel."""
    return zipfile.ZipFile(wheel_file).namelist()


def test_the_wheel_holds_every_module_once_and_nothing_else(wheel):
    modules = {name for name in wheel if name.endswith(".py")}
    assert modules == {
        f"{name.replace('.', '/')}/__init__.py" if path.name == "__init__.py" else f"{name.replace('.', '/')}.py"
        for name, path in SOURCES.items()
    }
    assert {"rlkl/trainers/reinforce.py", "rlkl/rewards/function.py", "rlkl/cli.py"} <= modules
    assert "rlkl/py.typed" in wheel
    assert len(wheel) == len(set(wheel))


def test_the_wheel_has_no_top_level_beside_rlkl(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rlkl"}


@pytest.mark.parametrize("package", ["trainers", "rewards"])
def test_objectives_cannot_be_imported_under_another_name(package):
    spec = importlib.util.spec_from_file_location(package, ROOT / package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"{package}: import this package as rlkl.{package}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("package", ["trainers", "rewards"])
def test_the_links_for_editors_and_checkers_lead_to_the_folders(package):
    link = ROOT / "rlkl" / package
    assert link.is_symlink()
    assert link.readlink() == Path("..") / package


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_the_core_does_not_depend_on_objectives(module):
    used = {
        f"{head}.{tail}"
        for head, tail, *_ in ((*name.split("."), "") for name in imports(SOURCES[module], module) if name)
        if head == "rlkl" and tail in ("trainers", "rewards")
    }
    if module.startswith(("rlkl.trainers", "rlkl.rewards")):
        own = ".".join(module.split(".")[:2])
        assert used <= {own}, f"{module}: trainers and rewards know nothing of each other"
    elif module.removeprefix("rlkl.") not in MAY_USE_OBJECTIVES:
        assert not used, f"{module} imports {used}"


@pytest.mark.parametrize(
    "module", sorted(name for name in SOURCES if name.startswith(("rlkl.trainers", "rlkl.rewards")))
)
def test_objectives_do_not_know_the_loop(module):
    forbidden = {"rlkl.loop", "rlkl.lane", "rlkl.cli", "rlkl.runs", "rlkl.settings", "rlkl.tracking", "rlkl.terminal"}
    assert not forbidden & set(imports(SOURCES[module], module))


def reached(module: str) -> dict[str, str]:
    """The foreign packages that importing a module imports, with the module of ours that does it."""
    todo, seen, foreign = [module], set(), {}
    while todo:
        name = todo.pop()
        parents = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)]
        for own in parents:
            if own in SOURCES and own not in seen:
                seen.add(own)
                for imported in imports(SOURCES[own], own, inside_functions=False):
                    if imported.split(".")[0] == "rlkl":
                        todo.append(imported)
                    else:
                        foreign[imported.split(".")[0]] = own
    return foreign


@pytest.mark.parametrize("module", LIGHT)
def test_what_the_command_line_reads_first_imports_nothing_heavy(module):
    assert {package: by for package, by in reached(module).items() if package in HEAVY} == {}


def test_the_walk_over_imports_finds_torch_where_it_is():
    assert "torch" in reached("rlkl.loop")
    assert "pydantic" in reached("rlkl.cli") or "pydantic" in reached("rlkl.settings")


def test_every_function_of_the_public_face_exists():
    import rlkl

    assert callable(rlkl.train)
    assert issubclass(rlkl.RunError, RuntimeError)
    assert not issubclass(rlkl.RunError, ValueError)


def test_the_readme_names_every_file():
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("README.md is not there yet")
    text = readme.read_text(encoding="utf-8")
    files = [p for p in SOURCES.values() if p.name not in ("__init__.py", "__main__.py")]
    assert [str(p.relative_to(ROOT)) for p in files if p.name not in text] == []
