"""The README is true: its table is the study's, its links lead somewhere, its example's names exist."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = ROOT / "results" / "rooms" / "tables" / "table1_guidance.md"


def test_the_table_is_the_one_that_was_measured():
    sys.path.insert(0, str(ROOT / "workflow" / "scripts"))
    import readme

    assert readme.build(README, TABLE.read_text(encoding="utf-8")) == README, "run `snakemake readme`"


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
