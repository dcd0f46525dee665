# Pictures with depth, one file for each use.


rule prepare:
    output:
        data=f"{RESULTS}/data/{{use}}.npz",
        provenance=f"{RESULTS}/data/{{use}}.json",
    log:
        f"{RESULTS}/logs/prepare/{{use}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/prepare/{{use}}.tsv"
    wildcard_constraints:
        use="|".join(sorted(set(config["data"]) - {"unet"})),
    threads: 1
    params:
        command=dag("prepare"),
        stamp=lambda w: f"{domain_stamp('data')}-{config['data'][w.use]}",
    shell:
        "{params.command} --use {wildcards.use} --out {output.data} 2> {log}"
