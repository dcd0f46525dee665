"""The ledger page is what its rule makes of its choices and of the committed sensitivity table, and names keys that exist."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parent.parent
LEDGER = yaml.safe_load((ROOT / "docs/ledger.yaml").read_text(encoding="utf-8"))
TABLE = pd.read_csv(ROOT / "results/rooms/tables/sensitivity.csv")
CHOICES = [{"config": section.get("config", "config/rooms.yaml"), **choice} for section in LEDGER["sections"] for choice in section["choices"]]
sys.path.insert(0, str(ROOT / "workflow/scripts"))


def test_the_page_is_what_its_rule_makes():
    import ledger

    assert ledger.build(LEDGER, TABLE) == (ROOT / "docs/ledger.md").read_text(encoding="utf-8"), "run `snakemake ledger`"


def test_a_run_that_was_not_measured_is_refused():
    import ledger

    with pytest.raises(ValueError, match="'s_none'; tables/sensitivity.csv has "):
        ledger.build({"sections": [{"section": "A", "choices": [{**CHOICES[0], "runs": ["s_none"]}]}]}, TABLE)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice["open"][:40])
def test_a_choice_is_complete_and_its_keys_exist(choice):
    assert {"open", "choice", "key", "why"} <= choice.keys()
    assert {"tested", "runs"} & choice.keys()
    config = yaml.safe_load((ROOT / choice["config"]).read_text(encoding="utf-8"))
    sheet = pd.read_csv(ROOT / "config/runs/rooms.tsv", sep="\t").columns
    keys = [key for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", choice["key"]) if not key.startswith("dag.")]
    for key in keys:
        value = config
        for part in key.split("."):
            assert part in value, f"{key} is no key of {choice['config']}"
            value = value[part]
    assert set(re.findall(r"\*([a-z_]+)\*", choice["key"])) <= set(sheet)
