# Files that others publish: checked before anything is made of them, downloaded only when asked to (`snakemake --cores 1 fetch`).


rule asset:
    output:
        f"{RESULTS}/assets/{{name}}.json",
    log:
        f"{RESULTS}/logs/asset/{{name}}.log",
    wildcard_constraints:
        name="|".join(config.get("assets", {})) or "none",
    localrule: True
    params:
        command=dag("asset"),
        stamp=lambda w: f"{code_hash('stages.assets')}-{config['assets'][w.name]}",
    shell:
        "{params.command} --name {wildcards.name} --out {output} 2> {log}"


# `snakemake --cores 1 fetch` asks for each of them; nothing else does. Whether one is there is looked up anew every time: it ends by removing the marks.
rule fetch_asset:
    output:
        touch(f"{RESULTS}/assets/{{name}}.fetched"),
    wildcard_constraints:
        name="|".join(config.get("assets", {})) or "none",
    localrule: True
    params:
        command=dag("fetch"),
        # Of a call that failed marks stay: one is made anew when its asset has come or gone since.
        there=lambda w: Path(config["assets"][w.name]["path"]).exists(),
    shell:
        "{params.command} --name {wildcards.name}"


rule fetch:
    input:
        expand(f"{RESULTS}/assets/{{name}}.fetched", name=config.get("assets", {})),
    localrule: True
    shell:
        "rm -f {input}"
