"""The shape of the code: imports point downwards, figures need no torch, dependencies are declared, files hold one idea."""

import ast
import re
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FLOORS = {
    "command": ("dag.__main__", "dag.usage"),
    "stages": ("dag.stages",),
    "library": ("dag.networks", "dag.pipeline"),
    "ideas": ("dag.guidance", "dag.controls", "dag.sampling", "dag.heads", "dag.estimators", "dag.training"),
    "foundations": (
        "dag.accelerator",
        "dag.processes",
        "dag.diffusion",
        "dag.unet",
        "dag.weights",
        "dag.guided_diffusion",
        "dag.tensor_files",
        "dag.interruption",
        "dag.devices",
        "dag.data",
        "dag.metrics",
    ),
    "package": ("dag",),  # __init__.py: the version, which everything may read
}
HEIGHT = {name: height for height, name in enumerate(reversed(FLOORS))}
SHARED = {"command", "stages", "library", "foundations"}  # floors whose modules may import one another, as long as that makes no circle
HEAVY = {"torch", "torchvision", "diffusers", "transformers"}
MOST_LINES, LONGEST_FUNCTION = 300, 60  # lines of a file that are not blank; all lines of a function


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in sorted((ROOT / "dag").rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(), path) for module, path in FILES.items()}
SCRIPTS = sorted((ROOT / "workflow").rglob("*.py"))


def _floor(module: str) -> str:
    for floor, members in FLOORS.items():
        if any(module == member or (member != "dag" and module.startswith(member + ".")) for member in members):
            return floor
    raise AssertionError(f"{module} stands on no floor: name it in FLOORS")


def _imports(nodes, package: str = "") -> set[str]:
    """Dotted names that the import statements among `nodes` name, relative ones resolved against `package`."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")
                base = ".".join([*parent[: len(parent) - node.level + 1], *filter(None, [base])])
            # `from dag.data import rooms` imports a module, `from dag.data.rooms import render` a name of one.
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return names


def _package(module: str) -> str:
    return module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]


def _at_module_level(tree: ast.Module):
    """Statements that run on import: not those of functions, nor those for type checkers alone."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        yield node
        todo += ast.iter_child_nodes(node)


EDGES = {module: _imports(ast.walk(tree), _package(module)) & FILES.keys() - {module} for module, tree in TREES.items()}


def _top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names if name}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downwards(module):
    here = _floor(module)
    for imported in sorted(EDGES[module]):
        there = _floor(imported)
        allowed = HEIGHT[there] < HEIGHT[here] or (here == there and here in SHARED)
        assert allowed, f"{module} ({here}) imports {imported} ({there}): imports point to lower floors only"


def test_imports_make_no_circle():
    try:
        list(TopologicalSorter(EDGES).static_order())
    except CycleError as error:
        pytest.fail("circular import: " + " <- ".join(error.args[1]))


def test_tables_and_figures_need_no_torch():
    sources = {path: ast.parse(path.read_text(), path) for path in SCRIPTS}
    roots = set()
    for path, tree in sources.items():
        imported = _imports(ast.walk(tree))
        assert not _top_level(imported) & HEAVY, f"{path.relative_to(ROOT)} imports {_top_level(imported) & HEAVY}: scripts read csv and npz"
        roots |= imported & FILES.keys()
    for path in [ROOT / "Snakefile", *(ROOT / "workflow").rglob("*.smk")]:
        # Snakemake's language is not Python's, its import lines are.
        lines = re.findall(r"^ *((?:from|import) [^\n#]+)$", path.read_text(), re.MULTILINE) if path.exists() else []
        roots |= _imports(ast.walk(ast.parse("\n".join(lines)))) & FILES.keys()
    todo, reached = list(roots), set()
    while todo:
        module = todo.pop()
        if module in reached:
            continue
        reached.add(module)
        imported = _imports(_at_module_level(TREES[module]), _package(module))
        assert not _top_level(imported) & HEAVY, f"{module}, which the workflow imports, imports {_top_level(imported) & HEAVY} on import"
        todo += imported & FILES.keys()


def test_imported_packages_are_declared():
    """A package that something else happens to bring along is missing on the day that something else drops it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    declared = {_canonical(re.match(r"[\w.-]+", r)[0]) for r in requirements}
    distributions = packages_distributions()
    programs = [*SCRIPTS, *(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    local = {"dag", *(path.stem for path in programs)}
    for path in [*FILES.values(), *programs]:
        for name in _top_level(_imports(ast.walk(ast.parse(path.read_text())))) - sys.stdlib_module_names - local:
            # A package of the extra `paper` need not be installed; then its name is the distribution's.
            owners = {_canonical(d) for d in distributions.get(name, [name])}
            assert owners & declared, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not require"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_stay_small(module):
    lines = [line for line in FILES[module].read_text().splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES, f"{FILES[module].relative_to(ROOT)} has {len(lines)} lines"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{module}.{node.name} has {length} lines"


def test_file_names_say_what_a_file_is_about():
    named = [*FILES.values(), *SCRIPTS, *(ROOT / "workflow").rglob("*.smk"), *(ROOT / "tests").rglob("*.py")]
    vague = [path.relative_to(ROOT) for path in named if re.fullmatch(r"(utils?|helpers?|base|misc)", path.stem)]
    assert not vague


def test_rule_files_define_no_name_twice():
    """Snakemake's rule files share one namespace: a name that two of them define has, in a rule's functions, the later one's value."""
    defined = re.compile(r"^(?:def )?(\w+)(?=\(.*:$| = )", re.MULTILINE)
    names = [name for path in [ROOT / "Snakefile", *sorted((ROOT / "workflow" / "rules").glob("*.smk"))] for name in set(defined.findall(path.read_text()))]
    assert {"RESULTS", "downstream_pictures"} <= set(names)
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_every_config_key_is_described():
    described = set(re.findall(r"`([\w.]+)`", (ROOT / "config" / "README.md").read_text()))
    words = {part for name in described for part in name.split(".")}
    for schema in sorted((ROOT / "workflow" / "schemas").glob("*.yaml")):
        missing = _keys(yaml.safe_load(schema.read_text())) - words
        assert not missing, f"config/README.md does not describe {sorted(missing)} of {schema.name}"


def _keys(schema) -> set[str]:
    """Names of all properties anywhere in a JSON schema."""
    if isinstance(schema, list):
        return {key for item in schema for key in _keys(item)}
    if not isinstance(schema, dict):
        return set()
    return {*schema.get("properties", {}), *(key for value in schema.values() for key in _keys(value))}
