# Pictures with depth, one file for each use.

USES = sorted(set(config["data"]) - {"unet"})
# Of pictures without depth, these uses are given one by the config's `estimator`.
LABELLED = ["labels", "validation", "prior", "judge", "downstream", "test"] if "estimator" in config else []


rule prepare:
    output:
        data=f"{RESULTS}/data/{{use}}.npz",
        provenance=f"{RESULTS}/data/{{use}}.json",
    log:
        f"{RESULTS}/logs/prepare/{{use}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/prepare/{{use}}.tsv"
    wildcard_constraints:
        use="|".join(set(USES) - set(LABELLED)),
    threads: 1
    params:
        command=dag("prepare"),
        stamp=lambda w: f"{domain_stamp('data')}-{config['data'][w.use]}",
    shell:
        "{params.command} --use {wildcards.use} --out {output.data} 2> {log}"


if LABELLED:

    use rule prepare as prepare_pictures with:
        output:
            data=temp(f"{RESULTS}/data/pictures/{{use}}.npz"),
            provenance=f"{RESULTS}/data/pictures/{{use}}.json",
        wildcard_constraints:
            use="|".join(LABELLED),

    rule label:
        input:
            f"{RESULTS}/data/pictures/{{use}}.npz",
        output:
            data=f"{RESULTS}/data/{{use}}.npz",
            provenance=f"{RESULTS}/data/{{use}}.json",
        log:
            f"{RESULTS}/logs/label/{{use}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/label/{{use}}.tsv"
        wildcard_constraints:
            use="|".join(LABELLED),
        threads: 1
        resources:
            gpu=1,
        params:
            command=dag("label"),
            stamp=stamp("labelling", "estimator", "depth"),
        shell:
            "{params.command} --pictures {input} --out {output.data} 2> {log}"
