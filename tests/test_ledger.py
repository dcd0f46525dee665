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
SHEET = list(pd.read_csv(ROOT / "config/runs/rooms.tsv", sep="\t")["run"])
CHOICES = [{"config": section.get("config", "config/rooms.yaml"), **choice} for section in LEDGER["sections"] for choice in section["choices"]]
sys.path.insert(0, str(ROOT / "workflow/scripts"))


def test_the_page_is_what_its_rule_makes():
    import ledger

    assert ledger.build(LEDGER, TABLE, SHEET) == (ROOT / "docs/ledger.md").read_text(encoding="utf-8"), "run `snakemake ledger`"


def page(runs: list[str], sheet: list[str] = SHEET, **more) -> str:
    import ledger

    return ledger.build({"sections": [{"section": "A", "choices": [{**CHOICES[0], "runs": runs, **more}]}]}, TABLE, sheet)


def test_a_run_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="'s_none'; the run sheet has "):
        page(["s_none"])


def test_a_run_that_was_not_measured_says_so():
    measured = f"{TABLE.set_index('run').dfid_diff['s_mean']:+.3f}".replace("-", "−")
    assert f"`rule mean` {measured} [" in page(["s_mean", "s_new"], [*SHEET, "s_new"])
    assert "`s_new` not yet run" in page(["s_mean", "s_new"], [*SHEET, "s_new"])


def test_a_choice_may_be_tested_by_another_distance():
    strong = f"{TABLE.set_index('run').dfid_strong_diff['s_mean']:+.3f}".replace("-", "−")
    assert f"by the own head {strong} [" in page(["s_mean"], metric="dfid_strong")


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
