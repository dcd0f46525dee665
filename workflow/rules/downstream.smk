# A depth network trained on reference or generated pairs, tested on held-out scenes (Table 4).


# Whole pictures are read from the dataset itself; the files of squares are inputs all the same, made anew where the dataset is another.
WHOLE_PICTURES = config["downstream"].get("whole", False)


def downstream_pictures(wildcards):
    run = STUDY.run_of(wildcards.source)
    return f"{RESULTS}/samples/{run}.npz" if run else f"{RESULTS}/data/downstream.npz"


def pictures_option(wildcards, input):
    return "" if WHOLE_PICTURES and wildcards.source in ("reference_whole", "constant") else f"--pictures {input.pictures}"


def downstream_labels(wildcards):
    run = STUDY.run_of(wildcards.source)
    return f"{RESULTS}/judged/{run}.npz" if run else []


rule downstream:
    input:
        pictures=downstream_pictures,
        judged=downstream_labels,
        test=f"{RESULTS}/data/test.npz",
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
        pictures=pictures_option,
        test=lambda w, input: "" if WHOLE_PICTURES else f"--test {input.test}",
        judged=lambda w, input: f"--judged {input.judged}" if input.judged else "",
        stamp=lambda w: stamp("downstream", *STUDY.downstream_keys(w.source), "depth", "data.downstream"),
    shell:
        "{params.command} --source {wildcards.source} {params.pictures} {params.test} {params.judged} --out {output} 2> {log}"
