"""The report page: one file with every table, figure and picture of a study, to be opened from disk without a network.

The words are in page.html.j2 and, of the results, made by page_summary.py; the look is page.css; the viewers are page.js and, for points
in space, page_cloud.js over three.js. The same inputs give the same bytes: nothing here asks for the date or the machine.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import page_brief
import page_pictures
import page_summary
import page_tables
import pandas as pd
import style
import yaml
from docutils.core import publish_parts
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from PIL import Image

from dag.stages.arrays import PART, rows_of
from dag.stages.artefacts import writing

HERE = Path(__file__).parent
LIBRARY = HERE.parent / "assets" / "three" / "three.min.js"
LARGEST = 15  # MB of a page: what a phone opens
NAMES = {
    "fig3": "Depth along the trajectory",
    "fig4a": "Depth by block",
    "fig4b": "Depth by labels",
    "fig5": "Samples, depth, normals",
    "fig6": "Point clouds",
    "fig7": "Same seeds, unguided above guided",
    "fig8": "Scale of guidance",
}

# Metrics of config/published.tsv for readers.
PUBLISHED = {"dfid": "dFID", "abs_rel": "AbsRel", "delta1_percent": "δ<1.25 (%)"}


@dataclass(frozen=True)
class Pictures:
    """Files of the runs that a viewer shows: samples and judged depth by name of the run, and how many seeds it takes."""

    samples: Mapping[str, str]
    judged: Mapping[str, str]
    count: int


@dataclass(frozen=True)
class Sources:
    """What the page is made of. tables: csv with the Markdown beside it. figures: png with the svg beside it. captions: rst by name.

    manifest: what `manifest.py` writes, the files that every table and figure was made from.
    """

    config: dict
    runs: str
    tables: Sequence[str]
    figures: Sequence[str]
    captions: Sequence[str]
    published: str
    gallery: Pictures
    trajectory: str
    sweep: Pictures | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    timings: str | None = None
    ledger: str | None = None
    manifest: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)


def build(sources: Sources) -> str:
    """The page. Raises ValueError where it would be larger than a phone opens."""
    config, runs = sources.config, pd.read_csv(sources.runs, keep_default_na=False).set_index("run")
    loaded = [page_tables.load(csv, Path(csv).with_suffix(".md")) for csv in sources.tables]
    tables = {table.name: table for table in sorted(loaded, key=_place)}
    texts, made = _captions(sources.captions, config), _made_from(sources.manifest)
    viewers = {"gallery": page_pictures.gallery(runs, sources.gallery.samples, sources.gallery.judged, sources.gallery.count)}
    viewers["trajectory"] = page_pictures.trajectory(sources.trajectory)
    if sources.sweep and "fig8_scale" in tables:
        viewers["sweep"] = page_pictures.sweep(tables["fig8_scale"].frame, sources.sweep.samples, sources.sweep.judged, sources.sweep.count)
    provenance = {name: json.loads(Path(path).read_text(encoding="utf-8")) for name, path in sources.provenance.items()}
    facts = {"fov": config["figures"]["fov_degrees"], "colours": _colours(), "limits": _limits(sources.gallery)}
    data = {**viewers, **facts, "records": _records(runs, provenance)}
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("page.html.j2").render(
        config=config,
        summary=_summary(tables, runs, config),
        tables=[
            {"table": table, "text": _caption(texts, table.name), "download": _csv_uri(table), "made": made.get(table.name, {})} for table in tables.values()
        ],
        published=_published(sources.published, tables),
        figures=[{**_figure(path, texts, tables), "made": made.get(Path(path).stem, {})} for path in sources.figures],
        seeds=len(viewers["gallery"]["seeds"]),
        sweep="sweep" in viewers,
        protocol=_protocol(config, tables, runs),
        provenance=_made_by(provenance, sources.hashes),
        settings=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        runs=page_tables.load(sources.runs),
        timings=markdown(sources.timings) if sources.timings else "",
        ledger=markdown(sources.ledger) if sources.ledger else "",
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        scripts=[path.read_text(encoding="utf-8") for path in (HERE / "page.js", LIBRARY, HERE / "page_cloud.js")],
        # A closing tag inside the data would end the script that holds it.
        data=json.dumps(data, sort_keys=True, allow_nan=False, separators=(",", ":")).replace("</", "<\\/"),
    )
    if len(page.encode()) > LARGEST * 1e6:
        raise ValueError(f"the page has {len(page.encode()) / 1e6:.1f} MB, expected at most {LARGEST}: lower page.seeds or page.sweep_seeds in the config")
    return page


def markdown(path: str | Path) -> str:
    """HTML of a Markdown file, its headings two levels lower; links to other files of the project become plain text, as the page is alone."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(Path(path).read_text(encoding="utf-8"))
    heads: list[str] = []
    for token, content in zip(tokens, tokens[1:], strict=False):
        # On a phone the cells of a row stand below one another, each with the name of its column.
        if token.type == "thead_open":
            heads, column = [], 0
        elif token.type == "th_open":
            heads.append(content.content)
        elif token.type == "tr_open":
            column = 0
        elif token.type == "td_open":
            token.attrSet("data-head", heads[column])
            column += 1
    html = parser.renderer.render(tokens, parser.options, {})
    html = re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", html)
    html = re.sub(r"(</?h)([1-4])", lambda tag: f"{tag[1]}{int(tag[2]) + 2}", html)
    return html.replace("<table>", '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>').replace("</table>", "</table></div>")


def smallest(png: str) -> str:
    """A figure as data URI: its svg, or its png without loss as WebP, whichever is smaller."""
    vector = Path(png).with_suffix(".svg").read_bytes()
    aside = page_pictures.lossless(np.asarray(Image.open(png).convert("RGB")))
    return page_pictures.data_uri(vector, "image/svg+xml") if len(vector) <= len(aside) else page_pictures.data_uri(aside, "image/webp")


def _place(table: page_tables.ShownTable) -> tuple[int, bool, str]:
    """The paper's tables first, then the numbers behind its figures, then what is beyond the paper; what has no number of its own comes later."""
    group = next((at for at, start in enumerate(("Table", "Fig.")) if re.match(rf"{start} \d\w*:", table.caption)), 2)
    return group, group == 2 and not table.name.startswith("table"), table.name


def _captions(paths: Sequence[str], config: dict) -> dict[str, str]:
    """HTML by file name of the captions that `snakemake --report` shows too."""
    settings = {"report_level": 5, "halt_level": 5, "raw_enabled": False, "file_insertion_enabled": False, "initial_header_level": 4}
    environment, found = Environment(undefined=StrictUndefined), {}
    for path in paths:
        text = environment.from_string(Path(path).read_text(encoding="utf-8")).render(snakemake={"config": config})
        found[Path(path).stem] = publish_parts(text, writer="html5", settings_overrides=settings)["fragment"]
    return found


def _caption(texts: Mapping[str, str], name: str) -> str:
    """Caption of a table: of its own name, or of the part before or after the first underscore (fig8_scale: fig8, table1_guidance: guidance)."""
    before, _, after = name.partition("_")
    return next((texts[part] for part in (name, before, after) if part in texts), "")


def _figure(path: str, texts: Mapping[str, str], tables: Mapping[str, page_tables.ShownTable]) -> dict:
    """A figure with its title, caption and size; one without a number of its own is called as the table of its name."""
    name = Path(path).stem
    title = tables[name].caption if name in tables else name.replace("_", " ").capitalize()
    if name in NAMES:
        title = f"Fig. {name.removeprefix('fig')}: {NAMES[name]}"
    with Image.open(path) as picture:
        width, height = picture.size
    return {"name": name, "title": title, "uri": smallest(path), "text": texts.get(name, ""), "width": width, "height": height}


def _made_from(manifest: str | None) -> dict[str, dict[str, str]]:
    """By name of a table or figure: the files that it was made from, with the SHA-256 of each."""
    records = json.loads(Path(manifest).read_text(encoding="utf-8"))["records"] if manifest else []
    return {Path(output).stem: record["inputs"] for record in records for output in record["outputs"]}


def _colours() -> str:
    """256 colours of depth, rgb, as base64."""
    table = matplotlib.colormaps[style.DEPTH_COLOURS](np.arange(256), bytes=True)[:, :3]
    return base64.b64encode(table.tobytes()).decode()


def _limits(pictures: Pictures) -> list[float]:
    """Metres that the two ends of the colours stand for, as in the figures: of many pictures, by the first of each run."""
    limits = style.depth_limits(*(next(rows_of(path, "judged", PART)) for path in pictures.judged.values()))
    return [limits["vmin"], limits["vmax"]]


def _csv_uri(table: page_tables.ShownTable) -> str:
    return page_pictures.data_uri(table.text.encode(), "text/csv")


def _records(runs: pd.DataFrame, provenance: Mapping[str, dict]) -> dict[str, dict]:
    """What a reader may ask of a run: its row of the sheet as it was run, and what made it."""
    keep = ("config", "versions", "machine", "seconds", "peak_memory_mib")
    made = {name: {key: record[key] for key in keep if key in record} for name, record in provenance.items()}
    return {str(name): {"settings": {k: str(v) for k, v in row.items()}, "made": made.get(name, {})} for name, row in runs.to_dict("index").items()}


def _summary(tables: Mapping[str, page_tables.ShownTable], runs: pd.DataFrame, config: dict) -> dict:
    """Headline, findings by verdict, and the differences of table 1 or 2 as bars on a common scale."""
    found = page_summary.findings(tables, runs, config["heads"]["guide"])
    first = next((tables[name] for name in ("table1_guidance", "table2_guidance") if name in tables), None)
    shown = page_summary.differences(first, runs) if first else []
    bars = [_bars(metric, [d for d in shown if d.metric == metric]) for metric in dict.fromkeys(d.metric for d in shown)]
    return {
        "headline": page_summary.headline(shown) if shown else "",
        "brief": page_brief.brief(tables, runs, config),
        "samples": int(first.frame["n"].max()) if first else None,
        "bars": bars,
        "findings": {verdict: [f for f in found if f.verdict == verdict] for verdict in page_summary.VERDICTS},
        "verdicts": page_summary.VERDICTS,
        "shorts": {table.name: table.short for table in tables.values()},
        "floor": _floor(first) if first else [],
        "table": first.name if first else "",
    }


def _floor(table: page_tables.ShownTable) -> list[str]:
    """What real images score, for comparison."""
    real = table.frame[table.frame["run"] == "real"].to_dict("records")
    metrics = [metric for metric in page_tables.NAMES if metric in table.frame]
    return [f"{page_tables.NAMES[m]} {page_tables.text_of(table.frame, row, m)}" for row in real for m in metrics]


def _bars(metric: str, rows: list[page_summary.Difference]) -> dict:
    """Intervals of the differences as percentages of a track that shows them all and zero."""
    low, high = min(0.0, *(d.low for d in rows)), max(0.0, *(d.high for d in rows))
    margin = 0.06 * (high - low or 1)
    low, span = low - margin, high - low + 2 * margin

    def at(value: float) -> str:
        return f"{100 * (value - low) / span:.2f}"

    marks = [{"row": d, "left": at(d.low), "width": f"{100 * (d.high - d.low) / span:.2f}", "dot": at(d.diff)} for d in rows]
    return {"metric": page_tables.NAMES[metric], "zero": at(0), "marks": marks, "better": "lower" if metric in page_tables.LOWER else "higher"}


def _published(path: str, tables: Mapping[str, page_tables.ShownTable]) -> dict | None:
    """The authors' own numbers, for the tables that this study has."""
    shown = page_tables.load(path, separator="\t")
    at = {name: shown.heads.index(name) for name in ("table", "metric", "value")}
    present = {name.partition("_")[0] for name in tables}
    for row in shown.rows:
        row[at["value"]] = page_tables.Cell(row[at["value"]].raw[0], row[at["value"]].raw)  # as it was published, not rounded with the others
        row[at["metric"]] = page_tables.Cell(PUBLISHED.get(row[at["metric"]].text, row[at["metric"]].text), row[at["metric"]].raw)
    rows = [row for row in shown.rows if row[at["table"]].text in present]
    return {"heads": shown.heads, "numeric": shown.numeric, "rows": rows} if rows else None


def _protocol(config: dict, tables: Mapping[str, page_tables.ShownTable], runs: pd.DataFrame) -> list[tuple[str, str]]:
    """The protocol card: what every number stands on, from the config and the tables."""
    heads, evaluation, domain = config["heads"], config["evaluation"], config["domain"]
    steps = ", ".join(f"{sampler.upper()} {count} steps" for sampler, count in dict.fromkeys(zip(runs["sampler"], runs["steps"], strict=True)))
    seeds = sorted({(int(row.first_seed), int(row.first_seed) + int(row.n) - 1) for row in runs.itertuples()})
    blocks = {name: ", ".join(map(str, heads[name])) for name in ("strong", "weak")}
    card = [
        ("Images", f"{domain['name']}, {domain['size']} × {domain['size']} pixels"),
        ("Sampling", f"{steps}; the same seeds for every run of a comparison: {', '.join(f'{first}–{last}' for first, last in seeds)}"),
        ("Heads", f"strong reads decoder blocks {blocks['strong']}, weak {blocks['weak']}; {heads['guide']} labelled images"),
        ("Update rule, prior", "; ".join(f"{rule}, tau {tau}" for rule, tau in dict.fromkeys(zip(runs["rule"], runs["tau"], strict=True)))),
        ("Distances", f"{evaluation['extractor']}, {evaluation['dims']} dimensions, pictures at {evaluation['resolution']} pixels"),
        ("Intervals", f"95 %, {evaluation['resamples']} subsamples; differences paired by seed"),
        ("Normals and points", f"from judged depth, for a camera of {config['figures']['fov_degrees']}° field of view"),
    ]
    if "data" in config and {"reference", "heldout"} <= config["data"].keys():
        reference, real = (config["data"][use] for use in ("reference", "heldout"))
        if isinstance(reference, list) and isinstance(real, list):
            card.insert(4, ("Reference", f"{reference[1]:,} images; floor (real): {real[1]:,} others"))
    if "table4_downstream" in tables:
        frame = tables["table4_downstream"].frame
        how = ", ".join(dict.fromkeys(frame["alignment"]))
        card.append(("Depth networks", f"tested on {int(frame['n'].iloc[0])} images; alignment {how}; valid up to {config['depth']['far']:g} m"))
    return card


def _made_by(provenance: Mapping[str, dict], hashes: Mapping[str, str]) -> list[tuple[str, str]]:
    """Hashes and versions; several values where the runs differ."""
    rows = list(hashes.items())
    for key, title in (("config", "config"), ("machine", "machine")):
        values = sorted({str(record[key]) for record in provenance.values() if key in record})
        rows += [(title, ", ".join(values))] if values else []
    versions: dict[str, set] = {}
    for record in provenance.values():
        for package, number in record.get("versions", {}).items():
            versions.setdefault(package, set()).add(number)
    rows += [(package, ", ".join(sorted(numbers))) for package, numbers in sorted(versions.items())]
    return [*rows, ("three.js", f"sha256 {hashlib.sha256(LIBRARY.read_bytes()).hexdigest()[:16]}")]


def _by_name(paths: Sequence[str]) -> dict[str, str]:
    return {Path(path).stem: str(path) for path in paths}


if job := globals().get("snakemake"):  # set by the rule's `script:`
    files = job.input

    def pictures(samples: Sequence[str], judged: Sequence[str], count: int) -> Pictures:
        return Pictures(_by_name(samples), _by_name(judged), count)

    page = build(
        Sources(
            config=job.config,
            runs=files.runs,
            tables=[*files.tables, *job.params.aside["tables"]],
            figures=[*files.figures, *job.params.aside["figures"]],
            captions=files.captions,
            published=files.published,
            gallery=pictures(files.samples, files.judged, job.params.seeds),
            trajectory=files.trajectory,
            sweep=pictures(files.sweep_samples, files.sweep_judged, job.params.sweep_seeds) if files.sweep_samples else None,
            provenance=_by_name(files.provenance),
            timings=files.timings,
            ledger=next(iter(files.ledger), None),
            manifest=files.manifest,
            hashes=job.params.hashes,
        )
    )
    with writing(job.output[0]) as aside:
        aside.write_text(page, encoding="utf-8")
