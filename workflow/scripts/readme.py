"""Puts Table 1 as it was measured into the README, between its two marks."""

import re
from pathlib import Path

MARKS = re.compile(r"(<!-- table1: .*? -->\n).*?(<!-- /table1 -->)", re.S)


def build(readme: str, table: str) -> str:
    """The README with the first table of a markdown file and that file's last paragraph, the protocol."""
    blocks = table.strip().split("\n\n")
    rows = next(block for block in blocks if block.startswith("|"))
    text, count = MARKS.subn(lambda marks: f"{marks[1]}\n{rows}\n\n{blocks[-1]}\n\n{marks[2]}", readme)
    if count != 1:
        raise ValueError(f"README.md: {count} places for table 1, expected one")
    return text


if job := globals().get("snakemake"):  # set by the rule's `script:`
    path = Path(job.params.readme)
    path.write_text(build(path.read_text(encoding="utf-8"), Path(job.input.table).read_text(encoding="utf-8")), encoding="utf-8")
