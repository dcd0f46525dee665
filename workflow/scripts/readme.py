"""Puts tables of the study as they were measured into README and docs/results.md, each between its two marks.

`<!-- study/table: ... -->` and `<!-- /study/table -->`; with titles of columns, `<!-- study/table (run, dFID): ... -->`, only those are shown.
"""

import re
from pathlib import Path


def places(page: str, study: str) -> list[str]:
    """Names of the study's tables that a page has a place for."""
    return re.findall(rf"<!-- {re.escape(study)}/(\w+)(?: \([^)]*\))?: .*? -->", page)


def build(page: str, place: str, table: str) -> str:
    """The page with what a markdown file has between its caption and the end of its first table, and its last paragraph, the protocol.

    place: "study/table". Where it chooses columns, they are shown without the protocol, which speaks of all.
    Raises ValueError where the page has no such place, or it names a column that the table does not have.
    """
    blocks = table.strip().split("\n\n")
    first = next(i for i, block in enumerate(blocks) if block.startswith("|"))
    marks = rf"(<!-- {re.escape(place)}(?: \(([^)]*)\))?: .*? -->\n).*?(<!-- /{re.escape(place)} -->)"
    found = re.findall(marks, page, flags=re.S)
    if len(found) != 1:
        raise ValueError(f"{len(found)} places for {place!r}, expected one: <!-- {place}: ... --> and <!-- /{place} -->")
    shown = [*blocks[1 : first + 1], blocks[-1]]
    if chosen := found[0][1]:
        shown = [*blocks[1:first], _columns(blocks[first], chosen.split(", "), place)]
    text = "\n\n".join(shown)
    return re.sub(marks, lambda found: f"{found[1]}\n{text}\n\n{found[3]}", page, flags=re.S)


def _columns(table: str, chosen: list[str], place: str) -> str:
    """Columns of a table in Markdown by their titles, which end before an arrow ("dFID ↓ ...")."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    titles = [re.split(r" [↓↑]", title)[0] for title in rows[0]]
    if unknown := [name for name in chosen if titles.count(name) != 1]:
        raise ValueError(f"{place}: no one column {unknown[0]!r}, expected some of {', '.join(titles)}")
    return "\n".join("| " + " | ".join(row[titles.index(name)] for name in chosen) + " |" for row in rows)


if job := globals().get("snakemake"):  # set by the rule's `script:`
    measured = {Path(table).stem: Path(table) for table in job.input}
    pages = {path: path.read_text(encoding="utf-8") for path in map(Path, job.params.pages)}
    wanted = {path: places(text, job.params.study) for path, text in pages.items()}
    if not any(wanted.values()):
        raise ValueError(
            f"{', '.join(map(str, pages))}: no place for a table of the study {job.params.study!r}, expected <!-- {job.params.study}/<table>: ... -->"
        )
    for path, names in wanted.items():
        for name in names:
            if name not in measured:
                raise ValueError(f"{path}: a place for {job.params.study}/{name}, expected one of the study's tables: {', '.join(measured)}")
            pages[path] = build(pages[path], f"{job.params.study}/{name}", measured[name].read_text(encoding="utf-8"))
    for path in wanted:
        path.write_text(pages[path], encoding="utf-8")
