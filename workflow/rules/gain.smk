# On demand, `snakemake gain`: the domain's U-Net trained on fewer images, each with features, heads and samples of its own; the prior, which
# sees depth alone, and the judges are the study's.

SHORT = f"{RESULTS}/gain/{{images}}"
PAIR = [config["figures"][side] for side in ("unguided", "guided")]
TRAINED_ON = config.get("gain", {}).get("images", [])
# The training of the study's own U-Net, the longest.
WHOLE = {"steps": 0, "batch_size": 1, **config["unet"].get("training", {})}


rule gain_unet:
    output:
        directory(f"{SHORT}/unet"),
    log:
        f"{RESULTS}/logs/gain/unet{{images}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/gain/unet{{images}}.tsv"
    wildcard_constraints:
        images=one_of(map(str, TRAINED_ON)),
    threads: processes(STUDY, "unet")
    resources:
        **asked(STUDY, "train_unet"),
        gpu=GPU * processes(STUDY, "unet"),
    params:
        command=dag("pretrain"),
        stamp=f"{domain_stamp('pretraining', 'unet')}-{config['data']['unet']}",
    shell:
        "{params.command} --images {wildcards.images} --out {output} 2> {log}"


use rule features as gain_features with:
    input:
        unet=f"{SHORT}/unet",
        data=f"{RESULTS}/data/labels.npz",
    output:
        rows=f"{SHORT}/features/labels{{labels}}.npy",
        index=f"{SHORT}/features/labels{{labels}}.json",
    log:
        f"{RESULTS}/logs/gain/features{{images}}-{{labels}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/gain/features{{images}}-{{labels}}.tsv"


use rule validation_features as gain_validation_features with:
    input:
        unet=f"{SHORT}/unet",
        data=f"{RESULTS}/data/validation.npz",
    output:
        rows=f"{SHORT}/features/validation.npy",
        index=f"{SHORT}/features/validation.json",
    log:
        f"{RESULTS}/logs/gain/validation{{images}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/gain/validation{{images}}.tsv"


use rule heads as gain_heads with:
    input:
        data=f"{RESULTS}/data/labels.npz",
        features=lambda w: f"{RESULTS}/gain/{w.images}/features/{w.heads}.npy",
        validation=f"{RESULTS}/data/validation.npz",
        validation_features=f"{SHORT}/features/validation.npy",
    output:
        heads=f"{SHORT}/heads/{{heads}}{{variant}}.safetensors",
        metrics=f"{SHORT}/heads/{{heads}}{{variant}}.csv",
    log:
        f"{RESULTS}/logs/gain/heads{{images}}-{{heads}}{{variant}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/gain/heads{{images}}-{{heads}}{{variant}}.tsv"
    wildcard_constraints:
        heads=r"labels\d+",


use rule sample as gain_sample with:
    input:
        unet=f"{SHORT}/unet",
        heads=lambda w: f"{RESULTS}/gain/{w.images}/heads/{heads_name(w.run)}.safetensors",
        prior=lambda w: prior_of(w.run),
        scale=lambda w: scale_of(w.run),
    output:
        samples=update(f"{SHORT}/samples/{{run}}.npz"),
        provenance=update(f"{SHORT}/samples/{{run}}.json"),
    log:
        f"{RESULTS}/logs/gain/sample{{images}}-{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/gain/sample{{images}}-{{run}}.tsv"
    wildcard_constraints:
        run=one_of(PAIR),


use rule describe as gain_describe with:
    input:
        pictures=f"{SHORT}/samples/{{run}}.npz",
        unet=f"{SHORT}/unet",
        heads=f"{SHORT}/heads/labels{config['heads']['guide']}.safetensors",
        judge=f"{RESULTS}/models/judge.safetensors",
        second_judge=f"{RESULTS}/models/second_judge.safetensors" if "second_judge" in config else [],
    output:
        described=f"{SHORT}/judged/{{run}}.npz",
    log:
        f"{RESULTS}/logs/gain/describe{{images}}-{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/gain/describe{{images}}-{{run}}.tsv"


use rule measure_sweep as gain_measure with:
    input:
        judged=expand(f"{RESULTS}/gain/{{{{images}}}}/judged/{{run}}.npz", run=PAIR),
        reference=f"{RESULTS}/judged/reference.npz",
        moments=MOMENTS,
    output:
        f"{SHORT}/distances.csv",
    log:
        f"{RESULTS}/logs/gain/measure{{images}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/gain/measure{{images}}.tsv"
    params:
        command=dag("measure", apart=True),
        runs=PAIR,
        stamp=stamp("evaluation", "evaluation"),


rule gain_table:
    input:
        runs=f"{RESULTS}/metrics/runs.csv",
        distances=[*expand(f"{RESULTS}/gain/{{images}}/distances.csv", images=TRAINED_ON), f"{RESULTS}/metrics/distances.csv"],
    output:
        **table("gain"),
        csv=report(f"{RESULTS}/tables/gain.csv", caption="../report/gain.rst", category="Tables", labels={"name": "Gain against training"}),
    localrule: True
    params:
        # What the trainings saw: whole batches.
        images=[WHOLE["batch_size"] * steps for steps in [*(round(images / WHOLE["batch_size"]) for images in TRAINED_ON), WHOLE["steps"]]],
        compared=PAIR,
        look=look("run_rows", "table_format"),
    script:
        "../scripts/table_gain.py"


rule gain_figure:
    input:
        table=f"{RESULTS}/tables/gain.csv",
    output:
        png=report(f"{RESULTS}/figures/gain.png", caption="../report/gain.rst", category="Figures", labels={"name": "Gain against training"}),
        svg=f"{RESULTS}/figures/gain.svg",
    localrule: True
    params:
        look=look("style"),
    script:
        "../scripts/figure_gain.py"


def gain_files(wildcards):
    if not TRAINED_ON:
        sys.exit(f"snakemake: {STUDY.source}: gain is missing; `snakemake gain` trains U-Nets on its `images`")
    return [f"{RESULTS}/{file}" for file in ("tables/gain.csv", "tables/gain.md", "tables/gain.tex", "figures/gain.png", "figures/gain.svg")]


rule gain:
    input:
        gain_files,
    localrule: True
