# Samples of every row of the run sheet.


def heads_of(wildcards):
    count = RUNS.heads[wildcards.run]
    return f"{RESULTS}/models/heads/labels{config['heads']['guide'] if count == 'guide' else count}.safetensors"


def scale_of(wildcards):
    """Only a run with a weight `best` waits for the sweep."""
    return f"{RESULTS}/metrics/scale.json" if "best" in tuple(RUNS.loc[wildcards.run, ["w_dc", "w_dp"]]) else []


def prior_of(wildcards):
    return f"{RESULTS}/models/prior{prior_name(wildcards.run)}"


rule sample:
    input:
        unet=unet,
        heads=heads_of,
        prior=prior_of,
        scale=scale_of,
        # Whatever is wrong with an asset shows before the first of the long jobs.
        assets=[ancient(asset) for asset in ASSETS],
    output:
        samples=f"{RESULTS}/samples/{{run}}.npz",
        provenance=f"{RESULTS}/samples/{{run}}.json",
    log:
        f"{RESULTS}/logs/sample/{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample/{{run}}.tsv"
    wildcard_constraints:
        run="|".join(RUNS.index),
    threads: 1
    resources:
        gpu=1,
    params:
        command=dag("sample"),
        scale=lambda w, input: f"--scale {input.scale}" if input.scale else "",
        stamp=run_stamp,
    shell:
        "{params.command} --run {wildcards.run} --unet {input.unet} --heads {input.heads}"
        " --prior {input.prior} {params.scale} --out {output.samples} 2> {log}"


TRAJECTORY = config["figures"]["guided"]


rule trajectory:
    input:
        unet=unet,
        heads=lambda w: heads_of(type("Guided", (), {"run": TRAJECTORY})),
        prior=f"{RESULTS}/models/prior{prior_name(TRAJECTORY)}",
        # The run's own samples say that its weights are settled; they are read from the same place.
        scale=lambda w: scale_of(type("Guided", (), {"run": TRAJECTORY})),
    output:
        f"{RESULTS}/samples/trajectory.npz",
    log:
        f"{RESULTS}/logs/trajectory/trajectory.log",
    benchmark:
        f"{RESULTS}/benchmarks/trajectory/trajectory.tsv"
    threads: 1
    resources:
        gpu=1,
    params:
        command=dag("trajectory"),
        run=TRAJECTORY,
        scale=lambda w, input: f"--scale {input.scale}" if input.scale else "",
        stamp=lambda w: run_stamp(type("Guided", (), {"run": TRAJECTORY})) + STUDY.section_hash("figures"),
    shell:
        "{params.command} --run {params.run} --unet {input.unet} --heads {input.heads} --prior {input.prior} {params.scale} --out {output} 2> {log}"
