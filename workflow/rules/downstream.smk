# A depth network trained on reference or generated pairs, tested on held-out scenes (Table 4).


WHOLE_PICTURES = config["downstream"].get("whole", False)  # pictures are measured whole, as the dataset has them


def downstream_pictures(wildcards):
    if WHOLE_PICTURES and wildcards.source in ("reference_whole", "constant"):  # read from the dataset itself
        return []
    run = STUDY.run_of(wildcards.source)
    return f"{RESULTS}/samples/{run}.npz" if run else f"{RESULTS}/data/downstream.npz"


def downstream_labels(wildcards):
    run = STUDY.run_of(wildcards.source)
    return f"{RESULTS}/judged/{run}.npz" if run else []


# Whole pictures are read from the dataset.
downstream_stamp = domain_stamp if WHOLE_PICTURES else stamp


rule downstream:
    input:
        pictures=downstream_pictures,
        judged=downstream_labels,
        test=[] if WHOLE_PICTURES else f"{RESULTS}/data/test.npz",
    output:
        f"{RESULTS}/metrics/downstream/{{source}}.csv",
    log:
        f"{RESULTS}/logs/downstream/{{source}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{source}}.tsv"
    wildcard_constraints:
        source="|".join(STUDY.sources),
    # Its jobs are long: started last, they would leave the other cores idle.
    priority: 1
    threads: 1
    resources:
        **asked(STUDY, "downstream"),
        gpu=GPU,
    params:
        command=dag("downstream"),
        pictures=lambda w, input: f"--pictures {input.pictures}" if input.pictures else "",
        test=lambda w, input: f"--test {input.test}" if input.test else "",
        judged=lambda w, input: f"--judged {input.judged}" if input.judged else "",
        stamp=lambda w: downstream_stamp("downstream", *STUDY.downstream_keys(w.source), "depth", "data.downstream"),
    shell:
        "{params.command} --source {wildcards.source} {params.pictures} {params.test} {params.judged} --out {output} 2> {log}"
