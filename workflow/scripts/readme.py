"""Puts tables of the study as they were measured into the README, each between its two marks: <!-- study/table: ... --> and <!-- /study/table -->."""

import re
from pathlib import Path


def places(readme: str, study: str) -> list[str]:
    """Names of the study's tables that the README has a place for."""
    return re.findall(rf"<!-- {re.escape(study)}/(\w+): .*? -->", readme)


def build(readme: str, place: str, table: str) -> str:
    """The README with what a markdown file has between its caption and the end of its first table, and its last paragraph, the protocol.

    place: "study/table".
    Raises ValueError where the README has no such place.
    """
    blocks = table.strip().split("\n\n")
    first = next(i for i, block in enumerate(blocks) if block.startswith("|"))
    rows = "\n\n".join(blocks[1 : first + 1])
    marks = rf"(<!-- {re.escape(place)}: .*? -->\n).*?(<!-- /{re.escape(place)} -->)"
    text, count = re.subn(marks, lambda found: f"{found[1]}\n{rows}\n\n{blocks[-1]}\n\n{found[2]}", readme, flags=re.S)
    if count != 1:
        raise ValueError(f"README.md: {count} places for {place!r}, expected one: <!-- {place}: ... --> and <!-- /{place} -->")
    return text


if job := globals().get("snakemake"):  # set by the rule's `script:`
    path = Path(job.params.readme)
    text = path.read_text(encoding="utf-8")
    if not (tables := places(text, job.params.study)):
        raise ValueError(f"{path}: no place for a table of the study {job.params.study!r}, expected <!-- {job.params.study}/<table>: ... -->")
    measured = {Path(table).stem: Path(table) for table in job.input}
    for name in tables:
        if name not in measured:
            raise ValueError(f"{path}: a place for {job.params.study}/{name}, expected one of the study's tables: {', '.join(measured)}")
        text = build(text, f"{job.params.study}/{name}", measured[name].read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
