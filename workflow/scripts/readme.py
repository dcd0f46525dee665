"""Puts the study's comparison, Table 1 or 2, as it was measured into the README, between the two marks of the study."""

import re
from pathlib import Path


def build(readme: str, table: str, study: str) -> str:
    """The README with the first table of a markdown file and that file's last paragraph, the protocol."""
    blocks = table.strip().split("\n\n")
    rows = next(block for block in blocks if block.startswith("|"))
    marks = rf"(<!-- {re.escape(study)}: .*? -->\n).*?(<!-- /{re.escape(study)} -->)"
    text, count = re.subn(marks, lambda found: f"{found[1]}\n{rows}\n\n{blocks[-1]}\n\n{found[2]}", readme, flags=re.S)
    if count != 1:
        raise ValueError(f"README.md: {count} places for the study {study!r}, expected one: <!-- {study}: ... --> and <!-- /{study} -->")
    return text


if job := globals().get("snakemake"):  # set by the rule's `script:`
    path = Path(job.params.readme)
    text = build(path.read_text(encoding="utf-8"), Path(job.input.table).read_text(encoding="utf-8"), job.params.study)
    path.write_text(text, encoding="utf-8")
