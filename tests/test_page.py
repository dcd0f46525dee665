"""The report page as a file: its numbers are those of the csv files, its sentences follow from them, and it stands alone."""

import base64
import dataclasses
import hashlib
import io
import json
import re
import shutil
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import made_up_page
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_report_scripts import ROOT, SCRIPTS, reporting

from dag.stages.artefacts import content_hash

ASSETS = ROOT / "workflow/assets/three"


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    made_up_page.make(root, seeds=6)
    return root


@pytest.fixture(scope="module")
def html(study):
    import page

    return page.build(made_up_page.sources(study, seeds=4))


class Cells(HTMLParser):
    """Of every table with an id: rows of (exact strings, text)."""

    def __init__(self, html: str):
        super().__init__()
        self.tables, self.rows, self.cell = {}, None, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "table":
            self.rows = self.tables.setdefault(attributes.get("id"), [])
        elif tag == "tr" and self.rows is not None:
            self.rows.append([])
        elif tag in ("td", "th") and "data-raw" in attributes:
            self.cell = [attributes["data-raw"].split("|"), ""]
            self.rows[-1].append(self.cell)

    def handle_data(self, text):
        if self.cell:
            self.cell[1] += text

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None


def numbers(text: str) -> list[float]:
    return [float(found.replace("−", "-").replace(",", "")) for found in re.findall(r"[+−-]?[\d,]*\.?\d+(?:e[+-]?\d+)?", text)]


def test_every_number_of_every_table_is_the_csv_s(html, study):
    shown = Cells(html).tables
    files = sorted((study / "tables").glob("*.csv"))
    assert len(files) == 11
    for path in files:
        exact = pd.read_csv(path, dtype=str, keep_default_na=False)
        rows = [row for row in shown[f"data-{path.stem}"] if row]
        assert len(rows) == len(exact)
        for row, (_, line) in zip(rows, exact.iterrows(), strict=True):
            # Every field of the csv is there, once, as it is written.
            assert sorted(part for raw, _ in row for part in raw) == sorted(line)
            for raw, text in row:
                if re.fullmatch(r"[-+.\deE]+", raw[0]) and text.strip() != raw[0]:
                    wanted = [float(part) for part in raw if part]
                    found = numbers(text.replace("–", ""))
                    assert len(found) == len(wanted), (path.name, raw, text)
                    digits = len(text.strip().partition(" ")[0].partition(".")[2])
                    assert found == pytest.approx(wanted, abs=0.5001 * 10**-digits), (path.name, raw, text)


def test_a_table_keeps_its_caption_footnote_and_provenance(html, study):
    for path in (study / "tables").glob("*.md"):
        assert path.read_text().splitlines()[0].strip("*").split(":")[0] in html
        table = html.partition(f'id="table-{path.stem}"')[2].partition("</article>")[0]
        for name in ("dFID by own head", "dFID by the second judge"):
            assert (f"{name} ↓" in table) == (f"{name}: the same on depth that" in table)
    assert "paired by seed" in html
    assert "feedfeedfeedfeed" in html
    assert "0123456789abcdef" in html
    assert "Not comparable" in html  # beside the published numbers
    published = pd.read_csv(ROOT / "config/published.tsv", sep="\t", dtype=str)
    shown = [row for row in Cells(html).tables["data-published"] if row]
    assert [row[3][1] for row in shown] == list(published.loc[published["table"].isin(["table1", "table4"]), "value"])  # 0.144, not 0.14


def test_every_table_and_figure_says_what_it_was_made_from(html, study):
    """The hashes are those of the files as they are."""
    parts = re.findall(r'<(?:article id="table|figure class="plate" id="figure)-(\w+)">(.*?)</(?:article|figure)>', html, flags=re.S)
    records = {Path(name).stem: record for record in json.loads((study / "manifest.json").read_text())["records"] for name in record["outputs"]}
    assert records.keys() == {name for name, _ in parts} - {"published"}
    for name, part in parts:
        said = dict(re.findall(r"<li>(\S+) <code>([0-9a-f]{16})</code></li>", part))
        assert said == {path: content_hash(path)[:16] for path in records[name]["inputs"]} if name != "published" else not said


def test_the_page_stands_alone(html):
    assert "default-src 'none'" in html
    for attribute, address in re.findall(r'\b(src|href)="([^"]*)"', html):
        assert address.startswith(("data:", "#")) or (attribute == "href" and address.startswith("https://")), address[:80]
    assert not re.search(r"url\((?!\"\$\{|&)", re.sub(r"<script>.*?</script>", "", html, flags=re.S))


def test_the_same_inputs_give_the_same_bytes(html, study):
    import page

    assert page.build(made_up_page.sources(study, seeds=4)) == html


def test_the_ledger_and_the_captions_are_rendered(html):
    assert "<h3>The ledger: what the paper leaves open</h3>" in html
    assert "Fig. 4a: Depth by block" in html
    assert "guided-diffusion&#x27;s output blocks" in html or "guided-diffusion's output blocks" in html
    assert "{{" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert '<td data-head="our choice">' in html


def test_a_page_too_large_for_a_phone_is_refused(study, monkeypatch):
    import page

    monkeypatch.setattr(page, "LARGEST", 0.1)
    with pytest.raises(ValueError, match=r"the page has [\d.]+ MB, expected at most 0.1: lower page.seeds"):
        page.build(made_up_page.sources(study, seeds=1))


def test_text_of_a_study_is_no_markup(study):
    import page

    sources = made_up_page.sources(study, seeds=1)
    html = page.build(dataclasses.replace(sources, hashes={"U-Net": "</script><script>alert(1)</script>"}))
    assert "<script>alert" not in html


def test_pictures_and_depth_survive_the_page():
    import page_pictures

    tiles = np.random.default_rng(0).integers(0, 256, (19, 8, 8, 3), np.uint8)
    kind, _, text = page_pictures.sprite(tiles).partition(",")
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
    assert kind == "data:image/webp;base64"
    np.testing.assert_array_equal(sheet[8:16, 16:24], tiles[18])  # the third of the second row
    np.testing.assert_array_equal(sheet[:8, 120:128], tiles[15])
    depth = np.random.default_rng(1).uniform(0.5, 10, (3, 8, 8))
    limits = page_pictures.depth_range(depth)
    codes = np.frombuffer(base64.b64decode(page_pictures.coded(depth, limits)), "<u2").reshape(depth.shape)
    np.testing.assert_allclose(limits[0] * (limits[1] / limits[0]) ** (codes / 65535), depth, rtol=3e-5)
    with pytest.raises(ValueError, match="expected positive and finite metres"):
        page_pictures.depth_range(depth, np.zeros(3))


def test_runs_without_a_common_seed_are_named(study):
    import page_pictures

    samples = {run: study / f"samples/{run}.npz" for run in ("baseline", "sweep_0_0")}
    judged = {run: study / f"judged/{run}.npz" for run in samples}
    with pytest.raises(ValueError, match="baseline, sweep_0_0 have no seed in common"):
        page_pictures.gallery(pd.read_csv(study / "metrics/runs.csv").set_index("run"), samples, judged, 4)


def table(**columns):
    """A table of runs with paired differences, as the page reads it."""
    import page_tables

    return page_tables.ShownTable("table1_guidance", "Table 1: x", "", ["run"], [False], [], pd.DataFrame(columns), "")


def sheet(names):
    weights = {"baseline": (0, 0), "dpg": (0, 30), "dcg": (100, 0), "both": (100, 30)}
    return pd.DataFrame([{"run": name, "w_dc": weights[name][0], "w_dp": weights[name][1], "sampler": "ddim"} for name in names]).set_index("run")


def differences(metric, low, high, p=(np.nan,) * 3):
    import page_summary

    names = ["baseline", "dpg", "dcg", "both"]
    middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    numbers = {metric: [5.0, *(5 + m for m in middle)], f"{metric}_diff": [np.nan, *middle], f"{metric}_diff_low": [np.nan, *low]}
    numbers |= {f"{metric}_diff_high": [np.nan, *high], f"{metric}_p": [np.nan, *p], "baseline": ["", *["baseline"] * 3]}
    return page_summary.differences(table(run=names, **numbers), sheet(names))


def test_a_difference_counts_by_its_interval_and_its_p_in_the_direction_of_its_metric():
    import page_summary

    low, high = [-2.0, -1.0, 0.5], [-1.0, 1.0, 2.0]
    assert [d.verdict for d in differences("dfid", low, high)] == ["better", "noise", "worse"]
    assert [d.verdict for d in differences("recall", low, high)] == ["worse", "noise", "better"]
    assert [d.verdict for d in differences("dfid", low, high, p=(0.2, 0.2, 0.001))] == ["noise", "noise", "worse"]
    found = differences("dfid", low, high)
    assert [d.label for d in found] == ["DPG (w_dp = 30)", "DCG (w_dc = 100)", "Both (w_dc = 100, w_dp = 30)"]
    assert found[0].numbers == "3.500 against 5.000, difference −1.500 [−2.000, −1.000]"
    assert page_summary.headline(found) == "Guidance improved dFID (lower is better) in 1 of 3 guided runs: 1 within noise, 1 worse."
    all_worse = page_summary.headline(differences("dfid", [1] * 3, [2] * 3))
    assert all_worse == "Guidance did not improve dFID (lower is better) in any of 3 guided runs: 3 worse."
    assert page_summary.headline(differences("recall", [1] * 3, [2] * 3)) == "Guidance improved recall (higher is better) in all 3 guided runs."
    name = "dFID (lower is better)"
    said = [f"improved {name}", f"changed {name} by no more than chance can", f"made {name} worse"]
    assert [page_summary.headline([one]) for one in found] == [f"Guidance {words} in its one run." for words in said]


def test_what_has_no_pairs_counts_when_intervals_are_apart():
    import page_summary

    for strong, verdict in ((0.1, "better"), (0.17, "noise"), (0.3, "worse")):
        values = np.array([strong, 0.2])
        frame = pd.DataFrame(
            {"head": ["strong", "weak"], "labels": 10, "t": 50, "abs_rel": values, "abs_rel_low": values - 0.02, "abs_rel_high": values + 0.02}
        )
        labels = dataclasses.replace(table(run=[]), name="fig4b_labels", frame=frame)
        found = page_summary.findings({"fig4b_labels": labels}, sheet(["baseline"]), 10)
        assert [f.verdict for f in found] == [verdict]
        assert "strong head, 10 labels" in found[0].what


def test_a_study_is_told_in_brief(html):
    (brief,) = re.findall(r'<ul class="brief">(.*?)</ul>', html, flags=re.S)
    told = dict(re.findall(r'<span class="what">(.*?)</span>.*?<a href="#table-(\w+)">', brief))
    assert list(told.values()) == ["fig4b_labels", "table1_guidance", "fig8_scale", "controls", "table4_downstream"]
    assert "256 samples a run of the domain rooms, 32 × 32 pixels" in html


def controls(low, high):
    runs = ["s_default", "flipped", "noise", "equal_compute"]
    middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    frame = {
        "run": ["baseline", *runs],
        "what": ["unguided", "guided", "reversed", "noise", "63 steps"],
        "control": ["none", "none", "flipped", "noise", "none"],
    }
    frame |= {"w_dc": [0, 30, 30, 30, 0], "w_dp": [0, 30, 30, 30, 0], "baseline": ["", *["baseline"] * 4], "dfid": [5.0, *(5 + m for m in middle)]}
    frame |= {"dfid_diff": [np.nan, *middle], "dfid_diff_low": [np.nan, *low], "dfid_diff_high": [np.nan, *high]}
    return dataclasses.replace(table(**frame), name="controls", caption="Controls: x")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ([-9, -1, -2, -4], [-8, 1, 2, 1], "None of 3 controls, which should not help, improves dFID; nearest to it: 63 steps, run equal_compute"),
        ([1, -3, -2, -9], [2, -2, 2, 1], "1 of 3 controls, which should not help, improves dFID; most: reversed, run flipped"),
        ([1, -3, -2, -4], [2, -2, -1, 1], "2 of 3 controls, which should not help, improve dFID; most: reversed, run flipped"),
    ],
)
def test_controls_that_help_are_counted_without_the_guidance_itself(low, high, expected):
    """The one that is named is among those that are counted, whatever the noise of another."""
    import page_brief

    runs = pd.DataFrame({"run": ["baseline"], "w_dc": 0, "w_dp": 0, "sampler": "ddim"}).set_index("run")
    (found,) = page_brief.brief({"controls": controls(low, high)}, runs, {"heads": {"guide": 10}, "figures": {"guided": "both"}})
    assert found.what == expected


def test_a_control_that_improves_is_told_as_one():
    import page_summary

    runs = pd.DataFrame({"run": ["baseline"], "w_dc": 0, "w_dp": 0, "sampler": "ddim"}).set_index("run")
    found = page_summary.findings({"controls": controls([-9, -1, -2, -4], [-8, 1, 2, -1])}, runs, 10)
    assert [f.what for f in found if f.verdict == "better"] == ["dFID: guided, run s_default", "dFID: control: 63 steps, run equal_compute"]


def test_of_many_that_got_worse_the_worst_is_told():
    import page_summary

    names = [f"run{i}" for i in range(7)]
    middle = np.array([1000.0, 3000.0, 2000.0, -5.0, -6.0, -7.0])
    numbers = {
        "dfid": [5.0, *(5 + middle)],
        "dfid_diff": [np.nan, *middle],
        "dfid_diff_low": [np.nan, *(middle - 1)],
        "dfid_diff_high": [np.nan, *(middle + 1)],
    }
    runs = pd.DataFrame({"run": names, "w_dc": range(7), "w_dp": 0, "sampler": "ddim"}).set_index("run")
    found = page_summary.findings({"x": table(run=names, **numbers, baseline=["", *["run0"] * 6])}, runs, 10)
    assert [(f.verdict, f.what) for f in found] == [
        ("better", "dFID: 3 of 6 runs; the best of them DCG (w_dc = 6)"),
        ("worse", "dFID: 3 of 6 runs; the worst of them DCG (w_dc = 2)"),
    ]
    assert "difference +3,000 [+2,999, +3,001]" in found[1].numbers


def test_what_is_made_on_demand_is_shown_where_it_is_there(study, tmp_path):
    """Each U-Net's guided run is compared with the unguided run of that U-Net."""
    import page

    shutil.copytree(study, tmp_path / "study")
    made_up_page.add_gain(tmp_path / "study")
    html = page.build(made_up_page.sources(tmp_path / "study", seeds=1))
    assert "<h3>Gain of guidance against training</h3>" in re.search(r'<figure class="plate" id="figure-gain">.*?</figure>', html, flags=re.S)[0]
    said = dict(re.findall(r'<span class="what">dFID: (Both.*?)</span> <span class="numbers">(.*?)</span> <a href="#table-gain">', html))
    assert {text.partition(", U-Net of ")[2]: numbers.partition(", difference")[0] for text, numbers in said.items()} == {
        "1,000 images": "7.000 [6.750, 7.250] against 9.000 [8.750, 9.250]",
        "2,000 images": "3.500 [3.250, 3.750] against 4.000 [3.750, 4.250]",
    }


def test_every_sentence_has_the_numbers_of_its_table(html):
    listed = re.findall(r'<span class="what">(.*?)</span> <span class="numbers">(.*?)</span> <a href="#table-(\w+)">', html)
    assert len(listed) > 15
    shown = Cells(html).tables
    for _, said, name in listed:
        known = [number for row in shown[f"data-{name}"] for _, text in row for number in numbers(text.replace("–", ""))]
        for number in numbers(re.sub(r", p = .*", "", said)):
            assert any(abs(number - other) < 1e-9 for other in known), (name, said)


def contrast(first: str, second: str) -> float:
    """Ratio of WCAG 2 of two colours #rrggbb."""

    def light(colour):
        parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    high, low = sorted((light(first), light(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_words_stand_out_in_both_themes():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    css = (SCRIPTS / "page.css").read_text()
    themes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r"\{[^{}]*--ground:[^{}]*\}", css)]
    assert len(themes) == 3
    assert themes[1] == themes[2]  # dark by the button and dark by the system
    for theme in themes:
        for words in ("ink", "soft", "accent", "better", "noise", "worse"):
            for ground in ("ground", "card", "accent-soft"):
                assert contrast(theme[words], theme[ground]) >= 4.5, (words, ground, theme)


def test_the_library_is_the_one_that_is_described():
    described = re.search(r"`([0-9a-f]{64})`", (ASSETS / "README.md").read_text())[1]
    content = (ASSETS / "three.min.js").read_bytes()
    assert hashlib.sha256(content).hexdigest() == described
    assert b"</script" not in content
    assert "MIT License" in (ASSETS / "LICENSE").read_text()


def test_the_rule_makes_the_page_and_snakemake_reports_every_table_and_figure(tmp_path):
    (tmp_path / "results").mkdir()
    made_up_page.make(tmp_path / "results", seeds=6)
    snakemake = reporting(tmp_path, 'report: "workflow/report/workflow.rst"\n')

    assert "page" in snakemake("results/index.html")
    page = (tmp_path / "results/index.html").read_text()
    assert "sampling" in page
    assert "Nothing to be done" in snakemake("results/index.html")
    made_up_page.add_gain(tmp_path / "results")
    assert "rule page" in snakemake("results/index.html")  # shown, but neither made nor made anew
    assert 'id="table-gain"' in (tmp_path / "results/index.html").read_text()
    assert "Nothing to be done" in snakemake("results/index.html")
    snakemake("results/index.html", "--report", "report.zip")
    with zipfile.ZipFile(tmp_path / "report.zip") as report:
        listed = next(name for name in report.namelist() if name.endswith("report.html"))
        text = report.read(listed).decode()
    for path in sorted((tmp_path / "results").glob("*/*")):
        if path.stem != "gain" and (path.suffix == ".csv" and path.parent.name == "tables" or path.suffix == ".png"):
            assert path.name in text, path


def test_pairs_of_table_4_are_told_for_each_alignment():
    import page_summary

    frame = {"source": ["unguided", "dag"] * 2, "alignment": ["none"] * 2 + ["scale_shift"] * 2, "baseline": ["", "unguided"] * 2}
    frame |= {"abs_rel": [0.4, 0.5, 0.2, 0.1], "abs_rel_diff": [np.nan, 0.1, np.nan, -0.1]}
    frame |= {"abs_rel_diff_low": [np.nan, 0.05, np.nan, -0.25], "abs_rel_diff_high": [np.nan, 0.15, np.nan, 0.05], "abs_rel_p": [np.nan, 0.01, np.nan, 0.1]}
    shown = dataclasses.replace(table(run=[]), name="table4_downstream", frame=pd.DataFrame(frame))
    found = page_summary.findings({"table4_downstream": shown}, sheet(["baseline"]), 10)
    assert [(f.verdict, f.what) for f in found] == [
        ("worse", "AbsRel: depth network trained on samples of dag, no alignment (metres)"),
        ("noise", "AbsRel: depth network trained on samples of dag, scale-and-shift-aligned"),
    ]
    assert found[0].numbers.startswith("0.500 against 0.400, difference +0.100 [+0.050, +0.150]")
    many = pd.concat([pd.DataFrame(frame)] * 4, ignore_index=True)
    many["alignment"] = np.repeat(["none", "median", "scale_shift", "scale_shift_disparity"], 4)[: len(many)]
    many["source"] = ["unguided", "dag", "unguided_judged", "dag_judged"] * 4
    many["baseline"] = ["", "unguided", "", "unguided_judged"] * 4
    told = page_summary.findings({"table4_downstream": dataclasses.replace(shown, frame=many)}, sheet(["baseline"]), 10)
    assert len(told) == 8  # each, as no alignment's is the worst of all
    assert "AbsRel: depth network trained on samples of dag_judged, scale and shift of disparity aligned" in [f.what for f in told]


def test_small_differences_have_digits_enough():
    from table_format import Column

    frame = pd.DataFrame({"abs_rel": [0.4, 0.4004], "abs_rel_diff": [np.nan, 0.0004], "fid": [17.05, 17.01], "fid_diff": [np.nan, -0.04]})
    assert [Column(name, name, difference_of=name.removesuffix("_diff") if "_diff" in name else None).texts(frame)[1] for name in frame] == [
        "0.400",
        "+0.0004",
        "17.01",
        "−0.040",
    ]
