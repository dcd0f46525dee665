# Pictures with depth, one file for each use.

# The U-Net draws its own pictures, and a pretrained judge needs none.
USES = sorted(set(config["data"]) - {"unet"} - (set() if STUDY.trains_judge else {"judge"}))
# Pictures of a domain without depth are given one by the config's `estimator`.
LABELLED = "estimator" in config


rule prepare:
    input:
        lambda w: assets_at(STUDY.domain_of(w.use).get("root")),
    output:
        data=f"{RESULTS}/data/pictures/{{use}}.npz" if LABELLED else f"{RESULTS}/data/{{use}}.npz",
        provenance=f"{RESULTS}/data/pictures/{{use}}.json" if LABELLED else f"{RESULTS}/data/{{use}}.json",
    log:
        f"{RESULTS}/logs/prepare/{{use}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/prepare/{{use}}.tsv"
    wildcard_constraints:
        use="|".join(USES),
    threads: 1
    resources:
        **asked(STUDY, "prepare"),
    params:
        command=dag("prepare"),
        stamp=lambda w: f"{domain_stamp('data', use=w.use)}-{config['data'][w.use]}",
    shell:
        "{params.command} --use {wildcards.use} --out {output.data} 2> {log}"


if LABELLED:

    rule label:
        input:
            assets_at(config["estimator"]["model"]),
            pictures=f"{RESULTS}/data/pictures/{{use}}.npz",
        output:
            data=f"{RESULTS}/data/{{use}}.npz",
            provenance=f"{RESULTS}/data/{{use}}.json",
        log:
            f"{RESULTS}/logs/label/{{use}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/label/{{use}}.tsv"
        wildcard_constraints:
            use="|".join(USES),
        threads: 1
        resources:
            **asked(STUDY, "label"),
            gpu=GPU,
        params:
            command=dag("label"),
            stamp=stamp("labelling", "estimator", "depth"),
        shell:
            "{params.command} --pictures {input.pictures} --out {output.data} 2> {log}"
