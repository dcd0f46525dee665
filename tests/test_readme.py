"""The README is true: its table is the study's, its links lead somewhere, its example's names exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("place", re.findall(r"<!-- /([\w-]+/\w+) -->", README))
def test_a_table_is_the_one_that_was_measured(place, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow" / "scripts"))
    import readme

    study, table = place.split("/")
    assert table in readme.places(README, study)
    measured = (ROOT / "results" / study / "tables" / f"{table}.md").read_text(encoding="utf-8")
    assert readme.build(README, place, measured) == README, f"run `snakemake --cores 1 readme --configfile config/{study}.yaml`"


def test_the_main_result_is_shown():
    assert "<!-- /rooms/table1_guidance -->" in README


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


def test_a_table_of_several_blocks_is_shown_with_the_title_of_its_first(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow" / "scripts"))
    import readme

    place = "<!-- a/t: by rule -->\nold\n<!-- /a/t -->"
    for title, expected in (("", "| 1 |"), ("In metres\n\n", "In metres\n\n| 1 |")):
        text = readme.build(f"Text\n{place}\nmore", "a/t", f"**Table**\n\n{title}| 1 |\n\nOther\n\n| 2 |\n\nProtocol.\n")
        assert text == f"Text\n<!-- a/t: by rule -->\n\n{expected}\n\nProtocol.\n\n<!-- /a/t -->\nmore"
