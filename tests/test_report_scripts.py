"""Tables and figures from a made-up study: what a reader sees has the numbers of the files, and drawing is reproducible."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dag.data.rooms import render
from dag.metrics.distances import frechet_distance, moments

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "workflow/scripts"
ERRORS = ["abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "si_log", "delta1", "delta2", "delta3"]
LEVELS = [50, 250, 500, 750]
EXTRACTOR = "efficientnet_lite0-40@128"


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)


def depth_rows(rng, level, count, **facts):
    """Rows of depth errors of `count` images around a level of abs_rel."""
    rows = []
    for image in range(count):
        value = level * rng.lognormal(0, 0.35)
        rows.append({**facts, "image": image, **dict.fromkeys(ERRORS, value), "delta1": 1 - value, "delta2": 1 - value / 2, "delta3": 1 - value / 4})
    return rows


def head_files(root, rng):
    blocks = depth_rows(rng, 0.31, 40, head="constant", blocks="", labels=100, t=50)
    for t in LEVELS:
        blocks += [] if t == 50 else depth_rows(np.random.default_rng(1), 0.31, 40, head="constant", blocks="", labels=100, t=t)
        for block in range(10):
            level = 0.22 + 0.006 * (block - 5) ** 2 * (1 - t / 1500) + 0.08 * t / 750
            blocks += depth_rows(rng, level, 40, head=f"block{block}", blocks=str(block), labels=100, t=t)
    write_csv(root / "metrics/heads/blocks.csv", blocks)
    for labels in (1, 10, 100, 1000):
        rows = []
        for t in LEVELS:
            for head, names, extra in (("constant", "", 0.05), ("strong", "2+4+5+6+7", 0.0), ("weak", "6", 0.02)):
                level = 0.3 + extra if head == "constant" else 0.18 + extra + 0.12 * t / 750 + 0.15 / labels**0.5
                rows += depth_rows(rng, level, 40, head=head, blocks=names, labels=labels, t=t)
        write_csv(root / f"metrics/heads/labels{labels}.csv", rows)


def run_sheet():
    rows = []

    def add(run, sampler, w_dc, w_dp, prior, first_seed, n, tables, **changes):
        settings = {
            "run": run,
            "sampler": sampler,
            "steps": 25,
            "eta": 0,
            "w_dc": w_dc,
            "w_dp": w_dp,
            "rule": "score",
            "tau": 300,
            "prior": prior,
            "heads": "guide",
            "window": "0-999",
            "control": "none",
            "variant": "none",
        }
        guided = not w_dc == w_dp == 0
        cost = {"seconds_per_sample": 0.55 if guided else 0.2, "unet_evaluations": 25, "unet_gradients": 25 * guided, "strength": 0.02 * guided}
        rows.append({**settings, "n": n, "first_seed": first_seed, "tables": tables, **cost, **changes})

    for run, dc, dp, tables in (
        ("baseline", 0, 0, "table1,table3,controls"),
        ("dpg", 0, 100, "table1,table3"),
        ("dcg", 300, 0, "table1"),
        ("both", 300, 100, "table1,controls,sensitivity"),
    ):
        add(run, "ddim", dc, dp, 16, 0, 256, tables)
    add("ddpm_baseline", "ddpm", 0, 0, 16, 0, 256, "table1")
    add("ddpm_both", "ddpm", 300, 100, 16, 0, 256, "table1")
    add("flipped", "ddim", 300, 100, 16, 0, 256, "controls", control="flipped")
    add("equal_compute", "ddim", 0, 0, 16, 0, 256, "controls", steps=63, unet_evaluations=63)
    add("s_mean", "ddim", 300, 100, 16, 0, 256, "sensitivity", rule="mean")
    add("s_shallow", "ddim", 300, 100, 16, 0, 256, "sensitivity", variant="shallow")
    add("prior8", "ddim", 0, 100, 8, 0, 256, "table3")
    add("prior32", "ddim", 0, 100, 32, 0, 256, "table3")
    grid = [(0, 0), *[(w, 0) for w in (30, 100, 300, 1000)], *[(0, w) for w in (30, 100, 300, 1000)], *[(a, b) for a in (100, 300) for b in (100, 300)]]
    for dc, dp in grid:
        add(f"sweep_{dc}_{dp}", "ddim", dc, dp, 16, 10000, 128, "fig8")
    return pd.DataFrame(rows)


def distance_rows(runs, rng):
    rows = []
    for run in [*runs.itertuples(), None]:
        name = run.run if run else "real"
        base = {"baseline": "", "both": "baseline", "ddpm_baseline": "", "sweep_0_0": "", "ddpm_both": "ddpm_baseline", "real": ""}
        baseline = base.get(name, "sweep_0_0" if name.startswith("sweep") else "baseline")
        gain = sum(0.25 * np.exp(-((np.log10(w / best)) ** 2)) for w, best in ((run.w_dc, 300), (run.w_dp, 100)) if w) if run else 0.9
        levels = {"dfid": 170.0, "dfid_strong": 120.0, "fid": 42.0, "dfid_second": 150.0}
        if run is None or {"table1", "controls"} & set(run.tables.split(",")):
            levels["dfid_gap"] = 50.0
        if run is None or "table1" in run.tables:
            levels |= {f"{of}{metric}": 0.5 for of in ("d", "") for metric in ("fd_infinity", "kid", "precision", "recall")}
        for metric, level in levels.items():
            value = level * (1 - gain) * rng.uniform(0.98, 1.02)
            row = {"run": name, "metric": metric, "extractor": EXTRACTOR, "dims": 40, "n": run.n if run else 256, "baseline": baseline}
            row |= {"value": value, "low": 0.93 * value, "high": 1.08 * value}
            difference = value - level if baseline else np.nan
            rows.append({**row, "diff": difference, "diff_low": difference - 5, "diff_high": difference + 5, "p": 0.0025 if baseline else np.nan})
    return rows


def picture_files(root, size=32):
    images, depth, _ = render(range(24), size)
    seeds = np.arange(24)
    (root / "samples").mkdir()
    (root / "judged").mkdir()
    (root / "data").mkdir()
    np.savez(root / "data/heldout.npz", images=images[::-1], depth=depth, ids=seeds)
    for run, grain in (("baseline", 20), ("dpg", 12), ("dcg", 10), ("both", 3)):
        noise = np.random.default_rng(grain).normal(0, grain, images.shape)
        np.savez(root / f"samples/{run}.npz", images=np.clip(images + noise, 0, 255).astype(np.uint8), seeds=seeds, t=np.arange(25))
        bumps = 1 + 0.008 * grain * np.sin(np.arange(size) / 3)[None, :, None] * np.cos(np.arange(size) / 4)[None, None]
        np.savez(root / f"judged/{run}.npz", judged=(depth * bumps).astype(np.float32), seeds=seeds)
    t = np.array([999, 759, 559, 359, 159, 0])
    rng, clean, share = np.random.default_rng(3), images[None, :4] / 127.5 - 1, 1 - t[:, None, None, None, None] / 1000
    noisy = share * clean + (1 - share**2) ** 0.5 * rng.standard_normal((1, 4, size, size, 3))
    blurred = share * clean + (1 - share) * clean.mean((2, 3), keepdims=True)
    to_uint8 = [np.clip(127.5 * x + 127.5, 0, 255).astype(np.uint8) for x in (noisy, blurred)]
    strong = share[..., 0] * depth[None, :4] + (1 - share[..., 0]) * depth.mean()
    np.savez(root / "samples/trajectory.npz", seeds=seeds[:4], t=t, x_t=to_uint8[0], pred_xstart=to_uint8[1], strong=strong.astype(np.float32), weak=strong)


def make_study(root):
    """All the files that tables and figures read, under root."""
    rng = np.random.default_rng(0)
    head_files(root, rng)
    runs = run_sheet()
    write_csv(root / "metrics/runs.csv", runs)
    write_csv(root / "metrics/distances.csv", distance_rows(runs, rng))
    best = {"dcg": "sweep_300_0", "dpg": "sweep_0_100", "dcg+dpg": "sweep_300_100"}
    (root / "metrics/scale.json").write_text(json.dumps({kind: {"run": run, "w_dc": 300.0, "w_dp": 100.0} for kind, run in best.items()}))
    (root / "metrics/startup.json").write_text(json.dumps({"import_cpu_seconds": 4.0}))
    for source, level, trainings in (("reference", 0.15, 3), ("unguided", 0.22, 3), ("dag", 0.18, 3), ("constant", 0.31, 1)):
        rows = []
        for seed in range(trainings):
            for alignment, factor in (("none", 1), ("median", 0.8), ("scale_shift", 0.7)):
                rows += depth_rows(rng, level * factor, 20, source=source, seed=seed, alignment=alignment, n_train=256)
        write_csv(root / f"metrics/downstream/{source}.csv", rows)
    geometry = [
        {"run": run, "seed": seed, "axis_share": 0.4 + up + rng.normal(0, 0.05), "roughness": 2 - up, "floor_ceiling_degrees": np.nan if seed % 5 == 0 else 4.0}
        for run, up in (("true depth", 0.3), ("real", 0.2), ("baseline", 0.0), ("both", 0.1))
        for seed in range(40)
    ]
    write_csv(root / "metrics/geometry.csv", geometry)
    answers = [{"instrument": "dFID", "question": "blur planted in real depth", "found": "0.4 → 1.5", "expected": "each above the one before"}]
    write_csv(root / "metrics/known_answers.csv", answers)
    picture_files(root)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    make_study(root)
    return root


def published():
    return pd.read_csv(ROOT / "config/published.tsv", sep="\t", dtype=str)


def build_all(root):
    """Every table of the study, by name."""
    import table_blocks
    import table_controls
    import table_distances
    import table_downstream
    import table_geometry
    import table_guidance
    import table_known_answers
    import table_labels
    import table_prior_resolution
    import table_scale
    import table_sensitivity

    runs, distances = pd.read_csv(root / "metrics/runs.csv"), pd.read_csv(root / "metrics/distances.csv")
    labels = pd.concat([pd.read_csv(root / f"metrics/heads/labels{count}.csv") for count in (1, 10, 100, 1000)])
    downstream = pd.concat([pd.read_csv(root / f"metrics/downstream/{source}.csv") for source in ("reference", "unguided", "dag", "constant")])
    return {
        "fig4a_blocks": table_blocks.build(pd.read_csv(root / "metrics/heads/blocks.csv"), [2, 4, 4, 8, 8, 16, 16, 32, 32, 32]),
        "fig4b_labels": table_labels.build(labels),
        "table1_guidance": table_guidance.build(runs, distances, published()),
        "table3_prior_resolution": table_prior_resolution.build(runs, distances),
        "fig8_scale": table_scale.build(runs, distances, {"sweep_300_0", "sweep_0_100", "sweep_300_100"}),
        "table4_downstream": table_downstream.build(downstream, published(), baselines={"dag": "unguided"}),
        "controls": table_controls.build(runs, distances),
        "sensitivity": table_sensitivity.build(runs, distances, {"shallow": {"heads.layers": 1}}),
        "table1_distances": table_distances.build(runs, distances),
        "geometry": table_geometry.build(pd.read_csv(root / "metrics/geometry.csv"), {"both": "baseline"}),
        "known_answers": table_known_answers.build(pd.read_csv(root / "metrics/known_answers.csv")),
    }


@pytest.fixture(scope="module")
def tables(study):
    sys.path.insert(0, str(SCRIPTS))
    import table_gain

    runs, distances = pd.read_csv(study / "metrics/runs.csv"), pd.read_csv(study / "metrics/distances.csv")
    # Made on demand: on no page.
    gain = table_gain.build(runs, [distances.assign(value=2 * distances["value"]), distances], [5000, 500480], ["baseline", "both"])
    return {**build_all(study), "gain": gain}


def drawings(root, tables):
    """How to draw every figure of the study, by name."""
    import figure_blocks
    import figure_gain
    import figure_guidance
    import figure_labels
    import figure_pairs
    import figure_points
    import figure_samples
    import figure_scale
    import figure_trajectory

    samples = {run: str(root / f"samples/{run}.npz") for run in ("baseline", "dpg", "dcg", "both")}
    depths = {run: str(root / f"judged/{run}.npz") for run in ("baseline", "both")}

    class Files:
        unguided, unguided_depth, guided, guided_depth = samples["baseline"], depths["baseline"], samples["both"], depths["both"]

    trajectory = np.load(root / "samples/trajectory.npz")
    return {
        "fig3": lambda: figure_trajectory.draw(trajectory["x_t"], trajectory["pred_xstart"], trajectory["strong"], trajectory["t"], trajectory["seeds"]),
        "fig4a": lambda: figure_blocks.draw(tables["fig4a_blocks"].frame),
        "fig4b": lambda: figure_labels.draw(tables["fig4b_labels"].frame),
        "fig5": lambda: figure_guidance.draw(*figure_guidance.load(Files, 6), 70),
        "fig6": lambda: figure_points.draw(*figure_guidance.load(Files, 3), 70),
        "fig7": lambda: figure_pairs.draw(*figure_pairs.load(Files.unguided, Files.guided)),
        "fig8": lambda: figure_scale.draw(tables["fig8_scale"].frame),
        "gain": lambda: figure_gain.draw(tables["gain"].frame),
        "samples": lambda: figure_samples.draw(figure_samples.load(str(root / "data/heldout.npz"), samples)),
    }


@pytest.fixture
def figures(study, tables):
    return drawings(study, tables)


def test_written_tables_hold_the_same_numbers_in_every_format(tables, tmp_path):
    for name, table in tables.items():
        paths = {kind: tmp_path / f"{name}.{kind}" for kind in ("csv", "md", "tex")}
        table.write(**paths)
        csv = pd.read_csv(paths["csv"])
        ours = table.frame.select_dtypes("number").astype(float)
        pd.testing.assert_frame_equal(csv[ours.columns].astype(float), ours, rtol=1e-5)
        markdown, latex = paths["md"].read_text(), paths["tex"].read_text()
        for block in table.blocks:
            for column in block.columns:
                for text in column.texts(block.frame):
                    assert f" {text} " in markdown
                    assert text.replace("−", "$-$").replace("–", "--").replace("_", "\\_") in latex
        assert table.caption in markdown
        assert table.footnote in markdown


def test_cells_round_numbers_and_mark_what_is_missing():
    from table_format import Column, chance

    frame = pd.DataFrame({"x": [15.7132, np.nan, 3.0], "x_low": [14.0, np.nan, np.nan], "x_high": [17.26, np.nan, np.nan], "name": ["a", "b", "c"]})
    assert Column("x", "x", interval=True, digits=1).texts(frame) == ["15.7 [14.0, 17.3]", "–", "3.0"]
    assert Column("x", "x", digits=0, difference_of="x").texts(frame[["x"]] - 4) == ["+12", "–", "−1"]
    assert Column("n", "name").texts(frame) == ["a", "b", "c"]
    assert chance("p", "p").texts(pd.DataFrame({"p": [0.0004, 0.001, np.nan]})) == ["<0.001", "0.001", "–"]


def test_a_number_is_rounded_as_the_csv_has_it(tmp_path):
    """2.67950003 is 2.6795 in the csv, whose nearest binary number is below it: both are 2.679 to a reader."""
    from table_format import Block, Column, Table

    frame = pd.DataFrame({"run": ["a", "b"], "dfid": [2.67950003, 1.0], "dfid_low": [2.7545004, 0.5], "dfid_high": [3.0, 2.0]})
    columns = [Column("run", "run"), Column("dFID", "dfid", interval=True)]
    paths = {kind: tmp_path / f"t.{kind}" for kind in ("csv", "md", "tex")}
    Table(frame, "caption", "note", [Block("", frame, columns)]).write(**paths)
    shown = [column.texts(pd.read_csv(paths["csv"])) for column in columns]
    assert all(f"| {run} | {dfid} |" in paths["md"].read_text() for run, dfid in zip(*shown, strict=True))
    assert shown[1][0].startswith("2.679 ")


def test_table1_has_the_four_rows_their_intervals_and_the_floor(tables):
    frame = tables["table1_guidance"].frame
    ddim = frame[frame["sampler"] == "ddim"].set_index("guidance")
    assert list(ddim.index) == ["baseline", "dpg", "dcg", "dcg+dpg"]
    assert list(frame["run"]) == ["baseline", "dpg", "dcg", "both", "ddpm_baseline", "ddpm_both", "real"]
    for metric in ("dfid", "fid"):
        assert (frame[f"{metric}_low"] < frame[metric]).all()
        assert (frame[metric] < frame[f"{metric}_high"]).all()
        assert ddim[f"{metric}_diff"].isna().tolist() == [True, False, False, False]
    assert set(frame["n"]) == {256}
    assert ddim["seconds_per_sample"].notna().all()
    assert "not comparable" in tables["table1_guidance"].markdown()
    assert "15.71" not in frame.to_csv()  # published numbers stay out of ours


def test_table2_is_the_same_comparison_under_its_own_name(study, tables):
    import table_distances
    import table_guidance

    runs, distances = pd.read_csv(study / "metrics/runs.csv"), pd.read_csv(study / "metrics/distances.csv")
    runs["tables"] = runs["tables"].str.replace("table1", "table2")
    for name, table in (
        ("table1_guidance", table_guidance.build(runs, distances, published(), "table2")),
        ("table1_distances", table_distances.build(runs, distances, "table2")),
    ):
        pd.testing.assert_frame_equal(table.frame, tables[name].frame)
        assert "Table 2" in table.markdown()
    assert "17.69" in table_guidance.build(runs, distances, published(), "table2").markdown()


def test_pairs_of_fig7_are_of_the_same_seeds_below_each_other(figures):
    from figure_pairs import SEEDS

    panels = [panel.images[0].get_array() for panel in figures["fig7"]().axes if panel.images]
    assert len(panels) == 2 * SEEDS
    with_noise, less = np.stack(panels).reshape(2, 2, SEEDS // 2, 32, 32, 3).astype(float).transpose(1, 0, 2, 3, 4, 5)
    apart = np.abs(with_noise - less).mean((2, 3, 4))
    assert apart.max() < 30 < np.abs(with_noise - less[::-1]).mean()


def test_best_weights_at_an_end_or_worse_than_none_are_told(study):
    import table_scale

    runs, distances = pd.read_csv(study / "metrics/runs.csv"), pd.read_csv(study / "metrics/distances.csv")
    sweep = table_scale.build(runs, distances, set()).frame
    alone = sweep[sweep["sweep"] == "w_dc"].sort_values("w_dc")["run"].tolist()
    for best, words in ((alone[0], "the lowest of those tried"), (alone[-1], "the highest of those tried"), (alone[1], None)):
        for dfid, worse in ((1.0, False), (1e6, True)):
            changed = distances.copy()
            changed.loc[(changed["run"] == best) & (changed["metric"] == "dfid"), "value"] = dfid
            told = [words] * bool(words) + ["higher in dFID than no guidance"] * worse
            note = table_scale.build(runs, changed, {best}).footnote
            assert note.endswith(f" Of w_dc alone, the best is {' and '.join(told)}." if told else "used by the other tables.")


def test_noise_levels_behind_each_label_count_are_told(study):
    import table_labels

    errors = pd.read_csv(study / "metrics/heads/labels100.csv")
    assert "noise levels of each image: 32 (of 1 image), 8 (of 1,000 images)." in table_labels.build(errors, {1: 32, 1000: 8}).footnote


def test_numbers_of_another_protocol_get_a_block_of_their_own(study):
    import table_guidance

    distances = pd.read_csv(study / "metrics/distances.csv")
    distances.loc[distances["run"].str.startswith("ddpm"), "n"] = 64
    blocks = table_guidance.build(pd.read_csv(study / "metrics/runs.csv"), distances, published()).blocks
    assert [set(block.frame["n"]) for block in blocks[:2]] == [{256}, {64}]
    assert all("n = " in block.title for block in blocks[:2])


def test_self_flattery_has_a_column_where_the_own_head_judges(tables):
    import page_tables

    for name in ("table1_guidance", "controls"):
        assert [c.value for c in tables[name].blocks[0].columns if c.title == "self-flattery"] == ["dfid_gap_diff"]
        assert {"dfid_gap", "dfid_gap_diff_low", "dfid_gap_p"} <= set(tables[name].frame)
        assert "self-flattery: the logarithm of the factor by which dFID changes" in tables[name].footnote
        assert "dFID by the second judge: " in tables[name].footnote
        assert any(c.value == "dfid_second" for c in tables[name].blocks[0].columns)
    assert page_tables.title("dfid_gap_diff") == "self-flattery"
    assert not any("dfid_gap" in column for name in ("sensitivity", "table3_prior_resolution", "gain") for column in tables[name].frame)


def test_other_distances_of_another_n_get_a_block_of_their_own(study):
    import table_distances

    distances = pd.read_csv(study / "metrics/distances.csv")
    distances.loc[distances["run"] == "real", "n"] = 654
    blocks = table_distances.build(pd.read_csv(study / "metrics/runs.csv"), distances).blocks
    assert [block.title.partition(":")[0] for block in blocks] == ["Judged depth", "Judged depth", "Images", "Images"]
    for block, n in zip(blocks, (256, 654, 256, 654), strict=True):
        assert set(block.frame["n"]) == {n}
        assert [column.title for column in block.columns if column.value == "kid"] == [f"1,000 KID ↓ {EXTRACTOR}, n = {n}"]
    assert {row.run for block in blocks[1::2] for row in block.frame.itertuples()} == {"real"}


def test_a_column_says_how_it_was_measured_and_runs_of_too_few_samples_are_marked(study):
    import table_guidance

    distances = pd.read_csv(study / "metrics/distances.csv")
    distances.loc[distances["run"] == "dcg", ["n", "dims"]] = [119, 40]
    table = table_guidance.build(pd.read_csv(study / "metrics/runs.csv"), distances, published())
    for block, n in zip(table.blocks, (256, 119), strict=False):
        named = [column.title for column in block.columns if column.value in ("dfid", "dfid_strong", "fid")]
        assert named == [f"{name} ↓ {EXTRACTOR}, n = {n}" for name in ("dFID", "dFID by own head", "FID")]
    marks = {row.run.partition(" ")[0]: "†" in row.run for block in table.blocks[:2] for row in block.frame.itertuples()}
    assert [run for run, few in marks.items() if few] == ["dcg"]
    assert "† Too few samples" in table.footnote
    assert "| dcg † |" in table.markdown()
    told = re.search(r"in (\d+) dimensions are (\d+) apart at n = ([\d,]+) and (\d+) at n = ([\d,]+)", table.footnote).groups()
    d, *apart = (int(number.replace(",", "")) for number in told)
    for expected, n in zip(apart[::2], apart[1::2], strict=True):
        first, second = np.random.default_rng(0).standard_normal((2, n, d))
        assert frechet_distance(*moments(first), *moments(second)) == pytest.approx(expected, rel=0.03)
    assert "dcg" in set(table.frame["run"])  # programs read the name


def test_a_run_without_a_distance_is_named(study):
    import table_guidance

    distances = pd.read_csv(study / "metrics/distances.csv")
    with pytest.raises(ValueError, match="no dfid of run 'dcg'"):
        table_guidance.build(pd.read_csv(study / "metrics/runs.csv"), distances[distances["run"] != "dcg"], published())


def test_prior_table_is_ordered_by_resolution_under_its_baseline(tables):
    frame = tables["table3_prior_resolution"].frame
    assert list(frame["run"]) == ["baseline", "prior8", "dpg", "prior32"]
    assert frame["prior"].fillna(0).tolist() == [0, 8, 16, 32]


def test_scale_table_marks_the_best_of_each_sweep_and_its_own_seeds(tables):
    table = tables["fig8_scale"]
    assert table.frame.groupby("sweep")["best"].apply(lambda marks: (marks == "best").sum()).to_dict() == {"baseline": 0, "both": 1, "w_dc": 1, "w_dp": 1}
    assert "No other run uses these seeds." in table.footnote


def test_downstream_table_takes_its_interval_over_trainings(tables, study):
    frame = tables["table4_downstream"].frame.set_index(["source", "alignment"])
    errors = pd.read_csv(study / "metrics/downstream/dag.csv").query("alignment == 'median'")
    assert frame.loc[("dag", "median"), "abs_rel"] == pytest.approx(errors["abs_rel"].mean())
    assert frame.loc[("dag", "median"), "trainings"] == 3
    assert frame.loc[("dag", "none"), "abs_rel_low"] < frame.loc[("dag", "none"), "abs_rel"]
    assert np.isnan(frame.loc[("constant", "none"), "abs_rel_low"])  # trained once


def test_sources_of_table_4_are_paired_by_the_seed_of_their_training():
    """Trainings that differ far more than the pair of each seed does: the difference is certain, the two rows' intervals overlap."""
    import table_downstream

    rng, rows = np.random.default_rng(0), []
    for source, shift in (("unguided", 0.0), ("dag", 0.01), ("reference", -0.1)):
        for seed in range(3):
            for image in range(4):
                rows.append({"source": source, "alignment": "none", "seed": seed, "image": image, "n_train": 5})
                rows[-1] |= {name: 0.5 + 0.1 * seed + shift + 1e-4 * rng.random() for name in table_downstream.ERRORS}
    errors = pd.DataFrame(rows).sample(frac=1, random_state=0)  # in whatever order they are read
    table = table_downstream.build(errors, published(), baselines={"dag": "unguided"})
    frame = table.frame.set_index("source")
    means = errors.groupby(["source", "seed"])["abs_rel"].mean()
    expected = means["dag"] - means["unguided"]
    dag = frame.loc["dag"]
    assert (dag["baseline"], dag["abs_rel_diff"]) == ("unguided", pytest.approx(expected.mean()))
    assert dag["abs_rel_diff_high"] - dag["abs_rel_diff"] == pytest.approx(4.302653 * expected.std(ddof=1) / 3**0.5)  # Student's t, two degrees of freedom
    assert dag["abs_rel_p"] < 0.05
    assert dag["abs_rel_low"] < frame.loc["unguided", "abs_rel_high"]
    assert frame.loc[["unguided", "reference"], "abs_rel_diff"].isna().all()
    assert "ΔAbsRel" in table.markdown()
    assert "+0.0100 [" in table.markdown()
    assert "paired" in table.footnote
    alone = table_downstream.build(errors, published())
    assert "Δ" not in alone.markdown()


def test_every_alignment_has_words():
    import table_downstream

    from dag.metrics.depth_errors import ALIGNMENTS

    assert set(table_downstream.ALIGNMENTS) == set(ALIGNMENTS)


def test_what_differs_between_two_recipes_is_told():
    import table_downstream

    section = {"reference_whole": {"shape": [128, 160], "training": {"steps": 600, "batch_size": 16, "precision": "bf16"}}}
    told = table_downstream._whole({**section, "training": {"steps": 200, "batch_size": 16, "warmup": 20}})
    assert "(steps 600 instead of 200, precision bf16 instead of the default, warmup the default instead of 20)" in told


def test_pairs_of_trainings_agree_with_closed_forms():
    import intervals

    mean, low, high, p = intervals.paired(np.array([1.0, 2.0, 3.0]))
    assert (mean, high) == pytest.approx((2.0, 2.0 + 4.302653 / 3**0.5))  # Student's t, two degrees of freedom, sd 1
    assert low == pytest.approx(4 - high)
    assert p == pytest.approx(1 - 12**0.5 / (2 + 12) ** 0.5)  # t = 2 sqrt(3): closed for two degrees of freedom
    one = intervals.paired(np.array([0.5]))
    assert one[0] == 0.5
    assert np.isnan(one[1:]).all()
    assert np.isnan(intervals.paired(np.array([]))).all()
    assert intervals.paired(np.zeros(3))[:3] == (0, 0, 0)  # of alike samples


def test_intervals_agree_with_closed_forms():
    import intervals

    mean, low, high = intervals.over_images(np.random.default_rng(0).normal(3, 2, 400))
    assert (high - low) / 2 == pytest.approx(1.96 * 2 / 20, rel=0.1)
    assert low < mean < high
    mean, low, high = intervals.over_trainings([1.0, 2.0, 3.0])
    assert (mean, high) == pytest.approx((2.0, 2.0 + 4.302653 / 3**0.5))  # Student's t, two degrees of freedom, sd 1
    assert low == pytest.approx(4 - high)
    assert np.isnan(intervals.over_trainings([1.0])[1:]).all()


def test_labels_table_has_a_block_for_aligned_depth(study):
    import table_labels

    errors = pd.read_csv(study / "metrics/heads/labels100.csv")
    table = table_labels.build(errors.assign(abs_rel_aligned=errors["abs_rel"] / 2))
    assert [block.title for block in table.blocks] == ["", "Aligned in scale and shift, image by image"]
    first, second = (block.frame.set_index("head")["t50"] for block in table.blocks)
    np.testing.assert_allclose(second, first / 2)


def test_downstream_table_explains_its_floors_and_protocol(study):
    import table_downstream

    errors = pd.read_csv(study / "metrics/downstream/constant.csv")
    table = table_downstream.build(pd.concat([errors, errors.assign(source="flat")]), published(), "nyu", "whole pictures, Eigen crop")
    assert "flat: the image's own median" in table.footnote
    assert table.footnote.endswith("Measured on whole pictures, Eigen crop.")
    assert "disparity map" not in table.footnote
    section = {"training": {"steps": 200, "learning_rate": 5e-4}}
    section["reference_whole"] = {"shape": [96, 128], "training": {"steps": 1500, "learning_rate": 2e-3}}
    whole = table_downstream.build(errors.assign(source="reference_whole"), published(), "nyu", section=section).footnote
    assert "to 96 x 128 pixels, with a training of their own (steps 1500 instead of 200, learning rate 0.002 instead of 0.0005)" in whole
    assert "by networks trained on other pictures" in table.blocks[-1].title


def test_copies_of_training_pictures_are_found():
    import figure_neighbours
    import table_memorisation

    rng = np.random.default_rng(0)
    training, held_out = rng.normal(2, 3, (200, 4)), rng.normal(2, 3, (100, 4))
    copies, new = training[:50] + 1e-3, rng.normal(2, 3, (400, 4))
    table = table_memorisation.build(training, {"held out": held_out, "copies": copies, "new": new}).frame.set_index("pictures")
    assert table.loc["copies", "close"] == 1
    assert table.loc["held out", "close"] == pytest.approx(0.05)
    assert table.loc["new", "close_low"] < 0.05 < table.loc["new", "close_high"] + 0.05
    assert table.loc["training, to another", "least"] > 0
    assert table.loc["copies", "mean"] < 0.01 < table.loc["new", "mean"]
    pictures = rng.integers(0, 256, (400, 8, 8, 3), dtype=np.uint8)
    shown, neighbours, distances = figure_neighbours.closest(pictures[:60], np.concatenate([new[:10], copies]), pictures[:200], training)
    assert shown.shape == (10, 8, 8, 3)
    assert neighbours.shape == (10, 3, 8, 8, 3)
    assert (np.diff(distances, axis=1) >= 0).all()
    where = [int(np.flatnonzero((pictures[:60] == picture).all((1, 2, 3)))[0]) for picture in shown]
    np.testing.assert_array_equal(neighbours[:, 0], pictures[np.array(where) - 10])  # the copy of picture i is number i + 10
    figure = figure_neighbours.draw({"copies": (shown, neighbours, distances), "few": (shown[:3], neighbours[:3], distances[:3])})
    assert len(figure.axes) == 2 * 4 * 10


ALL_FIGURES = ["fig4a", "fig6", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fig3", "fig4b", "fig5", "fig7", "fig8", "gain", "samples"))]


@pytest.mark.parametrize("name", ALL_FIGURES)
def test_drawing_twice_gives_the_same_bytes(figures, tmp_path, name):
    import style

    for number in (0, 1):
        style.save(figures[name](), str(tmp_path / f"{number}.png"), str(tmp_path / f"{number}.svg"))
    for kind in ("png", "svg"):
        assert (tmp_path / f"0.{kind}").read_bytes() == (tmp_path / f"1.{kind}").read_bytes()
    if name not in ("fig4a", "fig4b", "fig8", "gain"):
        assert "image-rendering:pixelated" in (tmp_path / "0.svg").read_text()


CHARTS = {"fig4b": ("fig4b_labels", ["abs_rel"]), "fig8": ("fig8_scale", ["dfid", "fid"]), "gain": ("gain", ["dfid", "fid", "dfid_diff", "fid_diff"])}


@pytest.mark.parametrize("name", CHARTS)
def test_every_number_of_a_chart_is_drawn(figures, tables, name):
    figure, (table, columns) = figures[name](), CHARTS[name]
    drawn = np.concatenate([line.get_ydata() for panel in figure.axes for line in panel.lines if len(line.get_ydata())])
    for column in columns:
        assert set(tables[table].frame[column].dropna()) <= set(drawn)


def test_gain_has_an_unguided_and_a_guided_row_for_each_unet(tables):
    frame = tables["gain"].frame
    assert list(zip(frame["images"], frame["run"], strict=True)) == [(5000, "baseline"), (5000, "both"), (500480, "baseline"), (500480, "both")]
    first, last = frame["dfid"][:2].to_numpy(), frame["dfid"][2:].to_numpy()
    np.testing.assert_allclose(first, 2 * last)
    assert frame["dfid_diff"].isna().tolist() == [True, False] * 2
    assert "own heads" in tables["gain"].footnote


def test_sensitivity_names_the_keys_of_a_variant_and_shows_the_second_judge(tables, study):
    import table_sensitivity

    table = tables["sensitivity"]
    assert table.frame.set_index("run")["changed"].to_dict() == {"both": "default", "s_mean": "rule mean", "s_shallow": "heads.layers 1"}
    assert f"dFID by the second judge ↓ {EXTRACTOR}, n = 256" in [column.title for column in table.blocks[0].columns]
    assert "another network" in table.footnote
    distances = pd.read_csv(study / "metrics/distances.csv")
    without = table_sensitivity.build(pd.read_csv(study / "metrics/runs.csv"), distances[distances["metric"] != "dfid_second"])
    assert not [column for column in without.frame if "second" in column]
    assert "second judge" not in without.markdown()


def test_trajectory_shows_every_seed_kind_and_noise_level(figures):
    figure = figures["fig3"]()
    assert sum(len(panel.images) for panel in figure.axes) == 4 * 3 * 6
    assert [panel.get_title() for panel in figure.axes[:6]] == [f"$t$ = {t}" for t in (999, 759, 559, 359, 159, 0)]


def test_a_long_trajectory_is_shown_from_its_first_to_its_last_step():
    from figure_trajectory import draw

    t, seeds = np.array([999, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0]), np.array([3])
    pictures, depth = np.zeros((11, 1, 4, 4, 3), np.uint8), np.ones((11, 1, 4, 4)) + t[:, None, None, None] / 1000
    figure = draw(pictures, pictures, depth, t, seeds)
    assert [panel.get_title() for panel in figure.axes[:6]] == [f"$t$ = {step}" for step in (999, 800, 600, 400, 200, 0)]


def test_pictures_are_enlarged_by_whole_pixels(study, figures):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from style import DPI

    figure = figures["samples"]()
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3]
    box = figure.axes[0].get_window_extent()
    top, left = round(drawn.shape[0] - box.y1), round(box.x0)
    tile = drawn[top : top + 160, left : left + 160].reshape(32, 5, 32, 5, 3)
    assert (tile == tile[:, :1, :, :1]).all()
    np.testing.assert_array_equal(tile[:, 0, :, 0], np.load(study / "data/heldout.npz")["images"][0])


def test_facets_of_a_wall_close_up():
    from figure_points import facets

    from dag.data.geometry import camera

    intrinsics = camera(np.array([0.6]), 8)[0]
    depth = np.broadcast_to(1 / np.linspace(0.2, 0.5, 8), (8, 8))  # inverse depth is linear: one slanted plane
    corners = facets(depth, np.zeros((8, 8, 3), np.uint8), intrinsics)[0].reshape(8, 8, 4, 3)
    np.testing.assert_allclose(corners[:, :-1, 1], corners[:, 1:, 0])
    np.testing.assert_allclose(corners[:-1, :, 3], corners[1:, :, 0])


def test_runs_without_enough_common_seeds_are_refused():
    import style

    assert style.common_seeds(np.arange(5), np.array([4, 3, 2]), count=2) == [2, 3]
    with pytest.raises(ValueError, match="figures.seeds is 4, but the runs have 3 seeds in common"):
        style.common_seeds(np.arange(5), np.array([4, 3, 2]), count=4)


def test_timings_extend_readings_to_the_end_and_count_startup(tmp_path):
    import timings

    folder = tmp_path / "results/x/benchmarks"
    header = "s\th:m:s\tmax_rss\tmean_load\tcpu_time\n"
    for rule, name, line in (("sample", "a", "31.0\t0\t800.0\t90\t15.5"), ("sample", "b", "15.5\t0\t900.0\t90\t15.5"), ("scale", "c", "0.2\t0\tNA\tNA\tNA")):
        (folder / rule).mkdir(parents=True, exist_ok=True)
        (folder / rule / f"{name}.tsv").write_text(header + line + "\n")
    text = timings.build(
        timings.read_benchmarks(sorted(map(str, folder.rglob("*.tsv")))), {"plain": 0.1, "torch": 1.0, "diffusers": 1.1}, snakemake_seconds=3.3
    )
    # 31 CPU s (read last at 15.5 s of 31) + 15.5 + 0.2 (never read: taken as busy) + 3.3 of Snakemake = 50; start-up: 2 x 1.1 + 0.1 + 3.3.
    assert "| sample | 2 | 46.5 | 46.5 | 93.0% | 900 |" in text
    assert "| scale | 1 | 0.2 | 0.2 | 0.4% | – |" in text
    assert "**Start-up: 11.2% of all CPU time**: 2 jobs × 1.10 s of imports (diffusers), 0 jobs × 1.00 s of imports (torch), 1 jobs × 0.10 s" in text


SNAKEFILE = """
import sys
import pandas as pd

sys.path.insert(0, "{root}")
configfile: "{root}/config/rooms.yaml"
RESULTS = "results"
facts = {{"unet_architecture": lambda self: config["unet"]["architecture"], "baseline_of": lambda self, run: None, "weights_hash": lambda self: "feed"}}
facts |= {{"drawn": True, "downstream_protocol": lambda self: "no crop", "baseline_source": lambda self, source: None}}
facts |= {{"sources": ["reference", *config["downstream"]["sources"], "constant"]}}
facts |= {{"run_hash": lambda self, run: "f00d", "section_hash": lambda self, *keys: "cafe"}}
STUDY = type("Study", (), facts)()
RUNS = pd.read_csv("results/metrics/runs.csv", index_col="run", keep_default_na=False)


def measured(*tables):
    return [run for run in RUNS.index if set(RUNS.tables[run].split(",")) & set(tables)]


def prior_name(run):
    return RUNS.prior[run]


def heads_name(run):
    return "labels100"


def dag(stage):
    return stage


def stamp(stage, *sections):
    return stage


COMPARISON, COMPARED = "table1", measured("table1")
SWEEP = measured("fig8")
USES, DRAWN, SPLIT, LABELLED, IMPORTED = list(config["data"]), list(RUNS.index), [], False, False
USES, LABELLED, IMPORTED = sorted(set(config["data"]) - {{"unet"}}), False, False


include: "{root}/workflow/rules/report.smk"


rule all:
    default_target: True
    input: TABLES, FIGURES
"""


def reporting(folder, head=""):
    """A call of Snakemake, with arguments, on the report's rules alone in a folder whose results/ are made up; returns what it said."""
    (folder / "Snakefile").write_text(head + SNAKEFILE.format(root=ROOT))
    (folder / "config").symlink_to(ROOT / "config")
    (folder / "workflow").symlink_to(ROOT / "workflow")

    def snakemake(*arguments):
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "--profile", "none", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return snakemake


def test_rules_run_the_scripts_and_have_nothing_to_do_afterwards(tmp_path):
    (tmp_path / "results").mkdir()
    make_study(tmp_path / "results")
    snakemake = reporting(tmp_path)

    targets = ["results/tables/fig4a_blocks.md", "results/figures/fig4a.png"]
    snakemake(*targets)
    assert all((tmp_path / target).stat().st_size for target in targets)
    assert "Nothing to be done" in snakemake(*targets)
