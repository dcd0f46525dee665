# Samples of every row of the run sheet.
from dag.stages.shards import split, together


@cache
def heads_of(run):
    return f"{RESULTS}/models/heads/{heads_name(run)}.safetensors"


@cache
def scale_of(run):
    """Only a run with a weight `best` waits for the sweep."""
    return f"{RESULTS}/metrics/scale.json" if "best" in (RUNS.at[run, "w_dc"], RUNS.at[run, "w_dp"]) else []


@cache
def prior_of(run):
    return f"{RESULTS}/models/prior{prior_name(run)}"


def scale_option(wildcards, input):
    return f"--scale {input.scale}" if input.scale else ""


SHARDS = {run: split(RUNS.first_seed[run], RUNS.n[run], STUDY.compute["shard_size"]) for run in RUNS.index}
SPLIT = [run for run in RUNS.index if len(SHARDS[run]) > 1]
# Lists of runs that one job draws.
TOGETHER = together(RUNS.drop(index=SPLIT), STUDY.compute["runs_per_job"])
# Whatever is wrong with assets, with pictures, or with the networks of others that judge and describe shows before the first of the long jobs.
CHECKED = [
    *ASSETS,
    *([] if STUDY.drawn else expand(f"{RESULTS}/data/{{use}}.npz", use=USES)),
    *([MOMENTS] if "weights" in config["evaluation"] or "model" in config["judge"] else []),
]
# Names of all sampling jobs: the run, of several the first, or run/first seed for each shard.
DRAWN = [*(runs[0] for runs in TOGETHER), *(f"{run}/{first}" for run in SPLIT for first, _ in SHARDS[run])]


rule sample:
    input:
        unet=unet,
        heads=lambda w: heads_of(w.run),
        prior=lambda w: prior_of(w.run),
        scale=lambda w: scale_of(w.run),
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
        run=one_of(runs[0] for runs in TOGETHER if len(runs) == 1),
    threads: 1
    resources:
        **asked(STUDY, "sample"),
        gpu=GPU,
    params:
        command=dag("sample"),
        scale=scale_option,
        seeds="",
        stamp=lambda w: run_stamp(w.run),
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
        scale=scale_option,
        seeds=lambda w: "--first {} --stop {}".format(*next(shard for shard in SHARDS[w.run] if shard[0] == int(w.first))),
        stamp=lambda w: f"{shards_stamp(w.run)}-{w.first}",


# With compute.runs_per_job: the same job for several runs, a rule for each list of them, whose names have nothing in common for a wildcard.
for runs in TOGETHER:
    if len(runs) > 1:

        rule:
            name:
                f"sample_from_{runs[0]}"
            input:
                unet=unet,
                heads=[heads_of(run) for run in runs],
                prior=[prior_of(run) for run in runs],
                scale=scale_of(runs[0]),
                checked=[ancient(file) for file in CHECKED],
            output:
                samples=[update(f"{RESULTS}/samples/{run}.npz") for run in runs],
                provenance=[update(f"{RESULTS}/samples/{run}.json") for run in runs],
            log:
                f"{RESULTS}/logs/sample/{runs[0]}.log",
            benchmark:
                f"{RESULTS}/benchmarks/sample/{runs[0]}.tsv"
            threads: 1
            resources:
                **asked(STUDY, "sample", times=len(runs)),
                gpu=GPU,
            params:
                command=dag("sample"),
                runs=runs,
                scale=scale_option,
                stamp=[run_stamp(run) for run in runs],
            shell:
                "{params.command} --run {params.runs} --unet {input.unet} --heads {input.heads}"
                " --prior {input.prior} {params.scale} --out {output.samples} 2> {log}"


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
        heads=heads_of(TRAJECTORY),
        prior=prior_of(TRAJECTORY),
        # The run's own samples say that its weights are settled; they are read from the same place.
        scale=scale_of(TRAJECTORY),
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
        scale=scale_option,
        stamp=lambda w: run_stamp(TRAJECTORY) + STUDY.section_hash("figures"),
    shell:
        "{params.command} --run {params.run} --unet {input.unet} --heads {input.heads} --prior {input.prior} {params.scale} --out {output} 2> {log}"
