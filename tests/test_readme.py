"""The README is true: its table is the study's, its links lead somewhere, its example's names exist."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("study", "table"), [("rooms", "table1")])
def test_the_table_is_the_one_that_was_measured(study, table):
    sys.path.insert(0, str(ROOT / "workflow" / "scripts"))
    import readme

    measured = (ROOT / "results" / study / "tables" / f"{table}_guidance.md").read_text(encoding="utf-8")
    assert readme.build(README, measured, study) == README, f"run `snakemake --cores 1 readme --configfile config/{study}.yaml`"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README)) - set(re.findall(r"\]\((https?:[^)]+)\)", README))))
def test_a_link_leads_somewhere(link):
    assert (ROOT / link).exists()


def test_the_example_imports_what_exists():
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    imports = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names)
