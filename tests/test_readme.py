"""README and docs/results.md are true: their tables are the studies', their links lead somewhere, the example's names exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/results.md")}
README = PAGES["README.md"]
PLACES = [(page, place) for page, text in PAGES.items() for place in re.findall(r"<!-- /([\w-]+/\w+) -->", text)]


@pytest.mark.parametrize(("page", "place"), PLACES)
def test_a_table_is_the_one_that_was_measured(page, place, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow" / "scripts"))
    import readme

    study, table = place.split("/")
    assert table in readme.places(PAGES[page], study)
    measured = (ROOT / "results" / study / "tables" / f"{table}.md").read_text(encoding="utf-8")
    assert readme.build(PAGES[page], place, measured) == PAGES[page], f"run `snakemake --cores 1 readme --configfile config/{study}.yaml`"


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


def test_chosen_columns_of_a_table_are_shown_without_its_protocol(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow" / "scripts"))
    import readme

    table = "**Table**\n\n| run | dFID ↓ of 5 | p | FID ↓ of 5 | p |\n| --- | ---: | ---: | ---: | ---: |\n| a | 1 [0, 2] | – | 3 | 0.1 |\n\nProtocol.\n"
    page = "<!-- s/t (run, FID, dFID): by rule -->\nold\n<!-- /s/t -->"
    rows = "| run | FID ↓ of 5 | dFID ↓ of 5 |\n| --- | ---: | ---: |\n| a | 3 | 1 [0, 2] |"
    assert readme.places(page, "s") == ["t"]
    assert readme.build(page, "s/t", table) == f"<!-- s/t (run, FID, dFID): by rule -->\n\n{rows}\n\n<!-- /s/t -->"
    for columns in ("run, KID", "p"):  # none, and two
        with pytest.raises(ValueError, match=f"s/t: no one column '{columns.split(', ')[-1]}', expected some of run, dFID, p, FID, p"):
            readme.build(page.replace("run, FID, dFID", columns), "s/t", table)
