# Tables and figures: scripts that read csv and npz. What they draw is in workflow/report/*.rst.
import hashlib
from pathlib import Path

from dag.stages.artefacts import code_hash, content_hash


def look(*modules):
    """Content hash of what a script takes from its own folder, modules or (by their whole name) files: Snakemake notices a change of the
    script, not of these."""
    folder = Path(workflow.basedir) / "workflow/scripts"
    files = [folder / (name if "." in name else f"{name}.py") for name in modules]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def table(name):
    return {kind: f"{RESULTS}/tables/{name}.{kind}" for kind in ("md", "tex")}


def block_resolutions():
    """Pixels along a side of each decoder block's output: the last block of a level includes the upsampler to the next."""
    architecture, size = STUDY.unet_architecture(), config["domain"]["size"]
    levels = len(architecture["block_out_channels"])
    sides = [size >> level for level in reversed(range(levels))]
    return [side for at, side in enumerate(sides) for side in [side] * architecture["layers_per_block"] + [sides[min(at + 1, levels - 1)]]]


def figure_runs(folder):
    """Files of the runs that figures 5 and 6 set side by side."""
    return {side: f"{RESULTS}/{folder}/{config['figures'][side]}.npz" for side in ("unguided", "guided")}


TITLE = COMPARISON.replace("table", "Table ")
# Box rooms are what this geometry measures.
GEOMETRY = config["domain"]["name"] == "rooms" and bool(COMPARED)
# What a model repeats can be asked where its training pictures are few.
MEMORY = not STUDY.drawn
# A table of runs exists where the run sheet asks for it.
TABLES = expand(
    f"{RESULTS}/tables/{{table}}.{{kind}}",
    table=["fig4a_blocks", "fig4b_labels", "table4_downstream", "known_answers"]
    + [f"{COMPARISON}_{name}" for name in ("guidance", "distances") if COMPARED]
    + [name for name in ("table3_prior_resolution", "fig8_scale", "controls", "sensitivity") if measured(name.split("_")[0])]
    + ["geometry"] * GEOMETRY
    + ["memorisation"] * MEMORY,
    kind=["csv", "md", "tex"],
)
FIGURES = expand(
    f"{RESULTS}/figures/{{figure}}.{{kind}}",
    figure=["fig3", "fig4a", "fig4b", "fig5", "fig6", "samples"] + ["fig7"] * bool(measured("table2")) + ["fig8"] * bool(SWEEP),
    kind=["png", "svg"],
)
# On no page: it shows training pictures.
NEIGHBOURS = expand(f"{RESULTS}/figures/neighbours.{{kind}}", kind=["png", "svg"] * MEMORY)
# The job of every file that the tables and figures stand on.
JOBS = [
    *expand("prepare/{use}", use=USES),
    *expand("label/{use}", use=USES if LABELLED else []),
    *expand("features/labels{count}", count=config["heads"]["labels"]),
    *sorted({f"heads/labels{count}" for count in config["heads"]["labels"]} | {f"heads/{heads_name(run)}" for run in RUNS.index}),
    "features/validation",
    "heads/blocks",
    *sorted({f"prior/{prior_name(run)}" for run in RUNS.index}),
    *[f"judge/{judge}" for judge in ("judge", "second_judge") if judge in config],
    *expand("sample/{part}", part=DRAWN),
    *expand("join/{run}", run=SPLIT),
    "trajectory/trajectory",
    *expand("describe/{run}", run=[*RUNS.index, "reference", "real"]),
    "measure/final",
    *(["measure/sweep", "scale/scale"] if SWEEP else []),
    "runs/runs",
    "known_answers/known_answers",
    *["geometry/geometry"] * GEOMETRY,
    *expand("downstream/{source}", source=STUDY.sources),
    *(["convert_unet/unet"] if IMPORTED else [] if config["unet"]["path"] else ["train_unet/unet"]),
]


localrules:
    table_blocks,
    table_labels,
    table_guidance,
    table_prior_resolution,
    table_scale,
    table_downstream,
    table_controls,
    table_sensitivity,
    table_distances,
    table_geometry,
    table_known_answers,
    table_memorisation,
    figure_trajectory,
    figure_blocks,
    figure_labels,
    figure_guidance,
    figure_pairs,
    figure_points,
    figure_scale,
    figure_samples,
    figure_neighbours,
    timings,
    page,
    manifest,


rule table_blocks:
    input:
        errors=f"{RESULTS}/metrics/heads/blocks.csv",
    output:
        **table("fig4a_blocks"),
        csv=report(f"{RESULTS}/tables/fig4a_blocks.csv", caption="../report/fig4a.rst", category="Tables", labels={"name": "Fig. 4a"}),
    params:
        resolutions=block_resolutions(),
        look=look("intervals", "table_format"),
    script:
        "../scripts/table_blocks.py"


rule table_labels:
    input:
        errors=expand(f"{RESULTS}/metrics/heads/labels{{count}}.csv", count=config["heads"]["labels"]),
    output:
        **table("fig4b_labels"),
        csv=report(f"{RESULTS}/tables/fig4b_labels.csv", caption="../report/fig4b.rst", category="Tables", labels={"name": "Fig. 4b"}),
    params:
        levels=config["heads"]["labels"],
        look=look("intervals", "table_format"),
    script:
        "../scripts/table_labels.py"


rule table_guidance:
    input:
        runs=f"{RESULTS}/metrics/runs.csv",
        distances=f"{RESULTS}/metrics/distances.csv",
        published="config/published.tsv",
    output:
        **table(f"{COMPARISON}_guidance"),
        csv=report(f"{RESULTS}/tables/{COMPARISON}_guidance.csv", caption="../report/guidance.rst", category="Tables", labels={"name": TITLE}),
    params:
        table=COMPARISON,
        dataset=config.get("published"),
        look=look("run_rows", "table_format"),
    script:
        "../scripts/table_guidance.py"


rule table_prior_resolution:
    input:
        runs=f"{RESULTS}/metrics/runs.csv",
        distances=f"{RESULTS}/metrics/distances.csv",
    output:
        **table("table3_prior_resolution"),
        csv=report(f"{RESULTS}/tables/table3_prior_resolution.csv", caption="../report/table3.rst", category="Tables", labels={"name": "Table 3"}),
    params:
        look=look("run_rows", "table_format"),
    script:
        "../scripts/table_prior_resolution.py"


rule table_scale:
    input:
        runs=f"{RESULTS}/metrics/runs.csv",
        distances=f"{RESULTS}/metrics/distances.csv",
        scale=f"{RESULTS}/metrics/scale.json",
    output:
        **table("fig8_scale"),
        csv=report(f"{RESULTS}/tables/fig8_scale.csv", caption="../report/fig8.rst", category="Tables", labels={"name": "Fig. 8"}),
    params:
        look=look("run_rows", "table_format"),
    script:
        "../scripts/table_scale.py"


rule table_downstream:
    input:
        errors=expand(f"{RESULTS}/metrics/downstream/{{source}}.csv", source=STUDY.sources),
        published="config/published.tsv",
    output:
        **table("table4_downstream"),
        csv=report(f"{RESULTS}/tables/table4_downstream.csv", caption="../report/table4.rst", category="Tables", labels={"name": "Table 4"}),
    params:
        look=look("intervals", "table_format"),
        domain=config["domain"]["name"],
        protocol=STUDY.downstream_protocol(),
        section=config["downstream"],
        baselines={source: baseline for source in STUDY.sources if (baseline := STUDY.baseline_source(source))},
    script:
        "../scripts/table_downstream.py"


rule table_controls:
    input:
        runs=f"{RESULTS}/metrics/runs.csv",
        distances=f"{RESULTS}/metrics/distances.csv",
    output:
        **table("controls"),
        csv=report(f"{RESULTS}/tables/controls.csv", caption="../report/controls.rst", category="Tables", labels={"name": "Controls"}),
    params:
        look=look("run_rows", "table_format"),
    script:
        "../scripts/table_controls.py"


rule table_sensitivity:
    input:
        runs=f"{RESULTS}/metrics/runs.csv",
        distances=f"{RESULTS}/metrics/distances.csv",
    output:
        **table("sensitivity"),
        csv=report(f"{RESULTS}/tables/sensitivity.csv", caption="../report/sensitivity.rst", category="Tables", labels={"name": "Sensitivity"}),
    params:
        variants=config.get("variants", {}),
        look=look("run_rows", "table_format"),
    script:
        "../scripts/table_sensitivity.py"


rule table_distances:
    input:
        runs=f"{RESULTS}/metrics/runs.csv",
        distances=f"{RESULTS}/metrics/distances.csv",
    output:
        **table(f"{COMPARISON}_distances"),
        csv=report(
            f"{RESULTS}/tables/{COMPARISON}_distances.csv", caption="../report/distances.rst", category="Tables", labels={"name": f"{TITLE}, other distances"}
        ),
    params:
        table=COMPARISON,
        look=look("run_rows", "table_format"),
    script:
        "../scripts/table_distances.py"


rule table_geometry:
    input:
        scores=f"{RESULTS}/metrics/geometry.csv",
    output:
        **table("geometry"),
        csv=report(f"{RESULTS}/tables/geometry.csv", caption="../report/geometry.rst", category="Tables", labels={"name": "Geometry"}),
    params:
        baselines={run: STUDY.baseline_of(run) for run in COMPARED if STUDY.baseline_of(run)},
        look=look("table_format"),
    script:
        "../scripts/table_geometry.py"


rule table_known_answers:
    input:
        answers=f"{RESULTS}/metrics/known_answers.csv",
    output:
        **table("known_answers"),
        csv=report(f"{RESULTS}/tables/known_answers.csv", caption="../report/known_answers.rst", category="Tables", labels={"name": "Known answers"}),
    params:
        look=look("table_format"),
    script:
        "../scripts/table_known_answers.py"


rule table_memorisation:
    input:
        reference=f"{RESULTS}/judged/reference.npz",
        real=f"{RESULTS}/judged/real.npz",
        runs=expand(f"{RESULTS}/judged/{{run}}.npz", run=config["figures"]["runs"]),
    output:
        **table("memorisation"),
        csv=report(f"{RESULTS}/tables/memorisation.csv", caption="../report/memorisation.rst", category="Tables", labels={"name": "Memorisation"}),
    params:
        runs=config["figures"]["runs"],
        look=look("intervals", "table_format"),
    script:
        "../scripts/table_memorisation.py"


rule figure_trajectory:
    input:
        trajectory=f"{RESULTS}/samples/trajectory.npz",
    output:
        png=report(f"{RESULTS}/figures/fig3.png", caption="../report/fig3.rst", category="Figures", labels={"name": "Fig. 3"}),
        svg=f"{RESULTS}/figures/fig3.svg",
    params:
        look=look("style"),
    script:
        "../scripts/figure_trajectory.py"


rule figure_blocks:
    input:
        table=f"{RESULTS}/tables/fig4a_blocks.csv",
    output:
        png=report(f"{RESULTS}/figures/fig4a.png", caption="../report/fig4a.rst", category="Figures", labels={"name": "Fig. 4a"}),
        svg=f"{RESULTS}/figures/fig4a.svg",
    params:
        look=look("style"),
    script:
        "../scripts/figure_blocks.py"


rule figure_labels:
    input:
        table=f"{RESULTS}/tables/fig4b_labels.csv",
    output:
        png=report(f"{RESULTS}/figures/fig4b.png", caption="../report/fig4b.rst", category="Figures", labels={"name": "Fig. 4b"}),
        svg=f"{RESULTS}/figures/fig4b.svg",
    params:
        look=look("style"),
    script:
        "../scripts/figure_labels.py"


rule figure_guidance:
    input:
        **figure_runs("samples"),
        **{f"{side}_depth": path for side, path in figure_runs("judged").items()},
    output:
        png=report(f"{RESULTS}/figures/fig5.png", caption="../report/fig5.rst", category="Figures", labels={"name": "Fig. 5"}),
        svg=f"{RESULTS}/figures/fig5.svg",
    params:
        seeds=config["figures"]["seeds"],
        fov_degrees=config["figures"]["fov_degrees"],
        look=look("style") + code_hash("data.geometry"),
    script:
        "../scripts/figure_guidance.py"


rule figure_pairs:
    input:
        **figure_runs("samples"),
    output:
        png=report(f"{RESULTS}/figures/fig7.png", caption="../report/fig7.rst", category="Figures", labels={"name": "Fig. 7"}),
        svg=f"{RESULTS}/figures/fig7.svg",
    params:
        look=look("style"),
    script:
        "../scripts/figure_pairs.py"


rule figure_points:
    input:
        **figure_runs("samples"),
        **{f"{side}_depth": path for side, path in figure_runs("judged").items()},
    output:
        png=report(f"{RESULTS}/figures/fig6.png", caption="../report/fig6.rst", category="Figures", labels={"name": "Fig. 6"}),
        svg=f"{RESULTS}/figures/fig6.svg",
    params:
        seeds=min(3, config["figures"]["seeds"]),
        fov_degrees=config["figures"]["fov_degrees"],
        look=look("style", "figure_guidance") + code_hash("data.geometry"),
    script:
        "../scripts/figure_points.py"


rule figure_scale:
    input:
        table=f"{RESULTS}/tables/fig8_scale.csv",
    output:
        png=report(f"{RESULTS}/figures/fig8.png", caption="../report/fig8.rst", category="Figures", labels={"name": "Fig. 8"}),
        svg=f"{RESULTS}/figures/fig8.svg",
    params:
        look=look("style"),
    script:
        "../scripts/figure_scale.py"


rule figure_samples:
    input:
        real=f"{RESULTS}/data/heldout.npz",
        samples=expand(f"{RESULTS}/samples/{{run}}.npz", run=config["figures"]["runs"]),
    output:
        png=report(f"{RESULTS}/figures/samples.png", caption="../report/samples.rst", category="Figures", labels={"name": "Samples"}),
        svg=f"{RESULTS}/figures/samples.svg",
    params:
        runs=config["figures"]["runs"],
        look=look("style"),
    script:
        "../scripts/figure_samples.py"


rule figure_neighbours:
    input:
        reference=f"{RESULTS}/judged/reference.npz",
        real=f"{RESULTS}/judged/real.npz",
        runs=expand(f"{RESULTS}/judged/{{run}}.npz", run=config["figures"]["runs"]),
        training_images=f"{RESULTS}/data/reference.npz",
        real_images=f"{RESULTS}/data/heldout.npz",
        run_images=expand(f"{RESULTS}/samples/{{run}}.npz", run=config["figures"]["runs"]),
    output:
        png=f"{RESULTS}/figures/neighbours.png",
        svg=f"{RESULTS}/figures/neighbours.svg",
    params:
        runs=config["figures"]["runs"],
        look=look("style", "table_memorisation"),
    script:
        "../scripts/figure_neighbours.py"


rule timings:
    input:
        benchmarks=expand(f"{RESULTS}/benchmarks/{{job}}.tsv", job=JOBS),
        startup=f"{RESULTS}/metrics/startup.json",
    output:
        md=f"{RESULTS}/timings.md",
    script:
        "../scripts/timings.py"


# Everything on one page that opens from disk.
PAGE = {"seeds": 48, "sweep_seeds": 8, **config.get("page", {})}


def made_aside():
    """Tables and figures that are made on demand (`snakemake gain`), where they are there, with a hash of each. They are no inputs: the page never
    has them made."""
    found = {
        "tables": [path for path in [f"{RESULTS}/tables/gain.csv"] if Path(path).is_file() and Path(path).with_suffix(".md").is_file()],
        "figures": [path for path in [f"{RESULTS}/figures/gain.png"] if Path(path).is_file() and Path(path).with_suffix(".svg").is_file()],
    }
    return {**found, "content": [content_hash(path) for paths in found.values() for path in paths]}


rule page:
    input:
        runs=f"{RESULTS}/metrics/runs.csv",
        # Shown in the order in which they are asked for; the Markdown beside a csv has its caption and footnote.
        tables=[path for path in TABLES if path.endswith(".csv")],
        tables_markdown=[path for path in TABLES if path.endswith(".md")],
        figures=[path for path in FIGURES if path.endswith(".png")],
        figures_svg=[path for path in FIGURES if path.endswith(".svg")],
        captions=sorted(str(path) for path in (Path(workflow.basedir) / "workflow/report").glob("*.rst")),
        published="config/published.tsv",
        samples=expand(f"{RESULTS}/samples/{{run}}.npz", run=config["figures"]["runs"]),
        judged=expand(f"{RESULTS}/judged/{{run}}.npz", run=config["figures"]["runs"]),
        sweep_samples=expand(f"{RESULTS}/samples/{{run}}.npz", run=SWEEP),
        sweep_judged=expand(f"{RESULTS}/judged/{{run}}.npz", run=SWEEP),
        trajectory=f"{RESULTS}/samples/trajectory.npz",
        provenance=expand(f"{RESULTS}/samples/{{run}}.json", run=RUNS.index),
        timings=f"{RESULTS}/timings.md",
        manifest=f"{RESULTS}/manifest.json",
        # A study in a folder of its own has no ledger.
        ledger=["docs/ledger.md"] if Path("docs/ledger.md").is_file() else [],
    output:
        report(f"{RESULTS}/index.html", caption="../report/page.rst", category="Page", labels={"name": "Everything on one page"}),
    params:
        seeds=PAGE["seeds"],
        sweep_seeds=PAGE["sweep_seeds"],
        aside=lambda w: made_aside(),
        hashes=lambda w: {
            "U-Net": STUDY.weights_hash(),
            **{f"dag {stage}": code_hash(f"stages.{stage}") for stage in ("models", "sampling", "evaluation", "downstream")},
        },
        look=look("style", "intervals", "run_rows", "table_format", "table_distances", "table_downstream", "table_geometry")
        + look(
            "page_brief",
            "page_pictures",
            "page_tables",
            "page_summary",
            "page.html.j2",
            "page.css",
            "page.js",
            "page_cloud.js",
            "../assets/three/three.min.js",
        ),
        shown={key: config[key] for key in sorted(config)},
    script:
        "../scripts/page.py"


# What every table and figure was made from, for `dag verify`.
rule manifest:
    input:
        TABLES,
        FIGURES,
    output:
        f"{RESULTS}/manifest.json",
    params:
        drawn=[
            ([str(file) for file in drawing.output], [str(file) for file in drawing.input])
            for drawing in workflow.rules
            if drawing.name.startswith(("table_", "figure_"))
        ],
    script:
        "../scripts/manifest.py"


# On demand: README and docs/results.md show tables of a study that they have a place for.
rule readme:
    input:
        [file for file in TABLES if file.endswith(".md")],
    localrule: True
    params:
        pages=["README.md", "docs/results.md"],
        study=config["study"],
    script:
        "../scripts/readme.py"


# On demand: the ledger shows what the sensitivity runs measured.
rule ledger:
    input:
        table=f"{RESULTS}/tables/sensitivity.csv",
    localrule: True
    params:
        ledger="docs/ledger.yaml",
        runs=list(RUNS.index),
        page="docs/ledger.md",
    script:
        "../scripts/ledger.py"


# On demand: the map of the default study's rules in docs/workflow.md.
rule map:
    localrule: True
    params:
        config="config/rooms.yaml",
        document="docs/workflow.md",
    script:
        "../scripts/workflow_map.py"


# On demand: what the study costs on GPUs. Made anew each time: the page is part of the project, and a fresh clone does not know what it was made from.
rule plan:
    input:
        gpus="config/gpus.tsv",
        more=[file for file in [f"config/runs/{config['study']}50k.yaml"] if Path(file).exists()],
    log:
        f"{RESULTS}/logs/plan/plan.log",
    localrule: True
    params:
        command=dag("plan"),
        more=lambda w, input: f"--more {input.more}" if input.more else "",
        page=f"docs/{config['study']}-scale.md",
    shell:
        "{params.command} --gpus {input.gpus} {params.more} --out {params.page} 2> {log}"
