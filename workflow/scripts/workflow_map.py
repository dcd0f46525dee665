"""Puts the graph of the study's rules into docs/workflow.md, between its two marks."""

import re
import subprocess
import sys
from pathlib import Path

MARKS = re.compile(r"(<!-- map: .*? -->\n).*?(<!-- /map -->)", re.S)
GATHERING = {"all", "timings", "page"}  # they take from nearly every rule, and would hide what the others do


def edges(graph: str) -> list[tuple[str, str]]:
    """(rule, rule that takes from it) of Snakemake's rule graph in mermaid's language, sorted."""
    names = dict(re.findall(r"^\s*(id\d+)\[(\w+)\]$", graph, re.MULTILINE))
    pairs = {(names[giver], names[taker]) for giver, taker in re.findall(r"^\s*(id\d+) --> (id\d+)$", graph, re.MULTILINE)}
    return sorted(pair for pair in pairs if not GATHERING & set(pair))


def build(document: str, graph: str) -> str:
    """The document with a rule graph, as `snakemake --rulegraph mermaid-js` prints it."""
    lines = "\n".join(f"    {giver} --> {taker}" for giver, taker in edges(graph))
    text, count = MARKS.subn(lambda marks: f"{marks[1]}\n```mermaid\nflowchart LR\n{lines}\n```\n\n{marks[2]}", document)
    if count != 1:
        raise ValueError(f"docs/workflow.md: {count} places for the map, expected one")
    return text


if job := globals().get("snakemake"):  # set by the rule's `script:`
    command = [sys.executable, "-m", "snakemake", "--rulegraph", "mermaid-js", "--nolock", "--configfile", job.params.config]
    graph = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    path = Path(job.params.document)
    path.write_text(build(path.read_text(encoding="utf-8"), graph), encoding="utf-8")
