# Pictures with depth, one file for each use.


rule prepare:
    output:
        data=f"{RESULTS}/data/{{use}}.npz",
        provenance=f"{RESULTS}/data/{{use}}.json",
    params:
        command=dag("prepare"),
        stamp=lambda w: f"{stamp('data', 'domain')}-{config['data'][w.use]}",
    wildcard_constraints:
        use="|".join(set(config["data"]) - {"unet"}),
    benchmark:
        f"{RESULTS}/benchmarks/prepare/{{use}}.tsv"
    threads: 1
    shell:
        "{params.command} --threads {threads} --use {wildcards.use} --out {output.data}"
