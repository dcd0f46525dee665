# Samples of every row of the run sheet.
from dag.stages.shards import split


def heads_of(wildcards):
    return f"{RESULTS}/models/heads/{heads_name(wildcards.run)}.safetensors"


def scale_of(wildcards):
    """Only a run with a weight `best` waits for the sweep."""
    return f"{RESULTS}/metrics/scale.json" if "best" in tuple(RUNS.loc[wildcards.run, ["w_dc", "w_dp"]]) else []


def prior_of(wildcards):
    return f"{RESULTS}/models/prior{prior_name(wildcards.run)}"


SHARDS = {run: split(RUNS.first_seed[run], RUNS.n[run], STUDY.compute["shard_size"]) for run in RUNS.index}
SPLIT = [run for run in RUNS.index if len(SHARDS[run]) > 1]
# Whatever is wrong with assets, with pictures, or with the networks of others that judge and describe shows before the first of the long jobs.
CHECKED = [
    *ASSETS,
    *([] if STUDY.drawn else expand(f"{RESULTS}/data/{{use}}.npz", use=USES)),
    *([MOMENTS] if "weights" in config["evaluation"] or "model" in config["judge"] else []),
]
# Names of all sampling jobs: the run, or run/first seed for each of its shards.
DRAWN = [part for run in RUNS.index for part in ([f"{run}/{first}" for first, _ in SHARDS[run]] if run in SPLIT else [run])]


rule sample:
    input:
        unet=unet,
        heads=heads_of,
        prior=prior_of,
        scale=scale_of,
        checked=[ancient(file) for file in CHECKED],
    output:
        # Not removed before the job: where a run grows, it draws only what is not there.
        samples=update(f"{RESULTS}/samples/{{run}}.npz"),
        provenance=update(f"{RESULTS}/samples/{{run}}.json"),
    log:
        f"{RESULTS}/logs/sample/{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample/{{run}}.tsv"
    wildcard_constraints:
        run=one_of(set(RUNS.index) - set(SPLIT)),
    threads: 1
    resources:
        **asked(STUDY, "sample"),
        gpu=GPU,
    params:
        command=dag("sample"),
        scale=lambda w, input: f"--scale {input.scale}" if input.scale else "",
        seeds="",
        stamp=run_stamp,
    shell:
        "{params.command} --run {wildcards.run} {params.seeds} --unet {input.unet} --heads {input.heads}"
        " --prior {input.prior} {params.scale} --out {output.samples} 2> {log}"


# A run that compute.shard_size splits: the same job for each of its seed ranges, then one file of them all.
use rule sample as sample_shard with:
    output:
        samples=update(f"{RESULTS}/samples/{{run}}/{{first}}.npz"),
        provenance=update(f"{RESULTS}/samples/{{run}}/{{first}}.json"),
    log:
        f"{RESULTS}/logs/sample/{{run}}/{{first}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample/{{run}}/{{first}}.tsv"
    wildcard_constraints:
        run=one_of(SPLIT),
        first=r"\d+",
    params:
        command=dag("sample"),
        scale=lambda w, input: f"--scale {input.scale}" if input.scale else "",
        seeds=lambda w: "--first {} --stop {}".format(*next(shard for shard in SHARDS[w.run] if shard[0] == int(w.first))),
        stamp=shard_stamp,


rule join:
    input:
        lambda w: [f"{RESULTS}/samples/{w.run}/{first}.npz" for first, _ in SHARDS[w.run]],
    output:
        samples=f"{RESULTS}/samples/{{run}}.npz",
        provenance=f"{RESULTS}/samples/{{run}}.json",
    log:
        f"{RESULTS}/logs/join/{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/join/{{run}}.tsv"
    wildcard_constraints:
        run=one_of(SPLIT),
    resources:
        **asked(STUDY, "join"),
    params:
        command=dag("join"),
        stamp=stamp("shards"),
    shell:
        "{params.command} --run {wildcards.run} --parts {input} --out {output.samples} 2> {log}"


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
        **asked(STUDY, "trajectory"),
        gpu=GPU,
    params:
        command=dag("trajectory"),
        run=TRAJECTORY,
        scale=lambda w, input: f"--scale {input.scale}" if input.scale else "",
        stamp=lambda w: run_stamp(type("Guided", (), {"run": TRAJECTORY})) + STUDY.section_hash("figures"),
    shell:
        "{params.command} --run {params.run} --unet {input.unet} --heads {input.heads} --prior {input.prior} {params.scale} --out {output} 2> {log}"
