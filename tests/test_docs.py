"""The documents are true: names in docs/method.md exist, the map is the workflow's, files that texts name are there."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "CONTRIBUTING.md", ROOT / "config" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Rules that the default study does not run: on demand, gathering, or for other configs.
ASIDE = {"all", "timings", "page", "pretrain", "train_unet", "readme", "ledger", "map"}
FILES_NAMED = re.compile(r"`((?:dag|workflow|config|docs|tests|examples)/[\w./-]+\.\w+)`")


def _members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or class defines, by name."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found[target.id] = node
    return found


def defined(dotted: str) -> bool:
    """Whether a module of the package, or a function, class or method in one, has this name. Read, not imported."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if file.is_file():
            body = ast.parse(file.read_text(encoding="utf-8")).body
            for name in parts[count:]:
                node = _members(body).get(name)
                if node is None:
                    return False
                body = getattr(node, "body", [])
            return True
    return False


def test_names_are_looked_up_in_the_code():
    assert defined("dag.sampling.sample_ddim")
    assert defined("dag.diffusion.Diffusion.q_sample")
    assert not defined("dag.diffusion.Diffusion.sample_q")
    assert not defined("dag.sampling.sample_edm")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_what_exists(document):
    text = document.read_text(encoding="utf-8")
    names = set(re.findall(r"`(dag\.[\w.]+)`", text))
    assert not [name for name in sorted(names) if not defined(name)]
    assert not [name for name in sorted(set(FILES_NAMED.findall(text))) if not (ROOT / name).exists()]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert not [link for link in links if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_name_is_in_the_file_that_is_named_with_it(document):
    """ "`guided` in `dag/stages/sampling.py`": recipes lead to where they say."""
    for name, file in re.findall(r"`(\w+)` (?:in|of)\s`((?:dag|workflow)/[\w/]+\.py)`", document.read_text(encoding="utf-8")):
        assert name in _members(ast.parse((ROOT / file).read_text(encoding="utf-8")).body), (name, file)


def test_the_method_names_its_code():
    assert len(set(re.findall(r"`(dag\.[\w.]+)`", (ROOT / "docs" / "method.md").read_text()))) > 30


def test_the_map_is_the_workflows():
    text = (ROOT / "docs" / "workflow.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^    (\w+) --> ", text, re.MULTILINE)) | set(re.findall(r" --> (\w+)$", text, re.MULTILINE))
    sources = [ROOT / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]
    rules = {name for source in sources for name in re.findall(r"^ *rule (\w+):", source.read_text(), re.MULTILINE)}
    lost = {name for name in ASIDE if name not in rules}
    assert not lost, f"no such rules: {lost}"
    # Rules whose only neighbours are gathering ones are not drawn.
    assert shown <= rules - ASIDE, "run `snakemake map`"
    assert {"sample", "heads", "prior", "judge", "describe", "measure", "downstream", "figure_guidance", "table_guidance"} <= shown


def test_the_map_is_drawn_from_snakemakes_graph(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow" / "scripts"))
    sys.modules.pop("workflow_map", None)
    import workflow_map

    graph = "flowchart TB\n\tid0[all]\n\tid1[sample]\n\tid2[heads]\n\tstyle id0 fill:#D95757\n\tid2 --> id1\n\tid1 --> id0\n"
    document = "# A\n\n<!-- map: x -->\nold\n<!-- /map -->\n"
    drawn = workflow_map.build(document, graph)
    assert "```mermaid\nflowchart LR\n    heads --> sample\n```" in drawn
    assert "old" not in drawn
    assert workflow_map.build(drawn, graph) == drawn
    with pytest.raises(ValueError, match="0 places for the map"):
        workflow_map.build("# A\n", graph)
