# Depth by the judge, features, distances.


rule describe:
    input:
        pictures=lambda w: f"{RESULTS}/samples/{w.run}.npz" if w.run in RUNS.index else f"{RESULTS}/data/{({'real': 'heldout'}).get(w.run, w.run)}.npz",
        unet=unet,
        heads=f"{RESULTS}/models/heads/labels{config['heads']['guide']}.safetensors",
        judge=f"{RESULTS}/models/judge.safetensors",
        second_judge=f"{RESULTS}/models/second_judge.safetensors" if "second_judge" in config else [],
        extractor=assets_at(config["evaluation"].get("weights")),
    output:
        described=f"{RESULTS}/judged/{{run}}.npz",
    log:
        f"{RESULTS}/logs/describe/{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/describe/{{run}}.tsv"
    threads: 1
    resources:
        **asked(STUDY, "describe"),
        gpu=GPU,
    params:
        command=dag("describe"),
        second_judge=lambda w, input: f"--second-judge {input.second_judge}" if input.second_judge else "",
        stamp=lambda w: unet_stamp("evaluation", "evaluation", "sampling", "depth"),
    shell:
        "{params.command} --pictures {input.pictures} --unet {input.unet} --heads {input.heads} --judge {input.judge} {params.second_judge}"
        " --out {output.described} 2> {log}"


# What FID and dFID of every run are distances to.
rule moments:
    input:
        f"{RESULTS}/judged/reference.npz",
    output:
        MOMENTS,
    log:
        f"{RESULTS}/logs/moments/moments.log",
    benchmark:
        f"{RESULTS}/benchmarks/moments/moments.tsv"
    threads: 1
    resources:
        **asked(STUDY, "moments"),
    params:
        command=dag("moments"),
        stamp=stamp("evaluation"),
    shell:
        "{params.command} --reference {input} --out {output} 2> {log}"


rule measure_sweep:
    input:
        judged=expand(f"{RESULTS}/judged/{{run}}.npz", run=SWEEP),
        reference=f"{RESULTS}/judged/reference.npz",
        moments=MOMENTS,
    output:
        f"{RESULTS}/metrics/sweep.csv",
    log:
        f"{RESULTS}/logs/measure/sweep.log",
    benchmark:
        f"{RESULTS}/benchmarks/measure/sweep.tsv"
    threads: STUDY.compute["cores"]
    resources:
        **asked(STUDY, "measure_sweep"),
    params:
        command=dag("measure", apart=True),
        runs=SWEEP,
        stamp=stamp("evaluation", "evaluation"),
    shell:
        "{params.command} --runs {params.runs} --judged {input.judged} --reference {input.reference} --moments {input.moments} --out {output} 2> {log}"


# The study's instruments, asked what is known beforehand: it ends here when one is off.
rule known_answers:
    input:
        heldout=f"{RESULTS}/data/heldout.npz",
    output:
        f"{RESULTS}/metrics/known_answers.csv",
    log:
        f"{RESULTS}/logs/known_answers/known_answers.log",
    benchmark:
        f"{RESULTS}/benchmarks/known_answers/known_answers.tsv"
    threads: 1
    resources:
        **asked(STUDY, "known_answers"),
        gpu=GPU,
    params:
        command=dag("known_answers"),
        stamp=stamp("known_answers", "evaluation", "depth"),
    shell:
        "{params.command} --heldout {input.heldout} --out {output} 2> {log}"


rule geometry:
    input:
        judged=expand(f"{RESULTS}/judged/{{run}}.npz", run=["real", *COMPARED]),
        heldout=f"{RESULTS}/data/heldout.npz",
    output:
        f"{RESULTS}/metrics/geometry.csv",
    log:
        f"{RESULTS}/logs/geometry/geometry.log",
    benchmark:
        f"{RESULTS}/benchmarks/geometry/geometry.tsv"
    threads: 1
    params:
        command=dag("geometry"),
        runs=["real", *COMPARED],
        stamp=stamp("evaluation", "figures.fov_degrees"),
    shell:
        "{params.command} --runs {params.runs} --judged {input.judged} --heldout {input.heldout} --out {output} 2> {log}"


# The optimum of the sweep, on seeds that the final tables do not use.
rule scale:
    input:
        f"{RESULTS}/metrics/sweep.csv",
    output:
        f"{RESULTS}/metrics/scale.json",
    log:
        f"{RESULTS}/logs/scale/scale.log",
    benchmark:
        f"{RESULTS}/benchmarks/scale/scale.tsv"
    localrule: True
    threads: 1
    params:
        command=dag("scale"),
        stamp=stamp("evaluation"),
    shell:
        "{params.command} --distances {input} --out {output} 2> {log}"


rule measure:
    input:
        judged=expand(f"{RESULTS}/judged/{{run}}.npz", run=FINAL),
        reference=f"{RESULTS}/judged/reference.npz",
        moments=MOMENTS,
        real=f"{RESULTS}/judged/real.npz",
        sweep=f"{RESULTS}/metrics/sweep.csv" if SWEEP else [],
    output:
        f"{RESULTS}/metrics/distances.csv",
    log:
        f"{RESULTS}/logs/measure/final.log",
    benchmark:
        f"{RESULTS}/benchmarks/measure/final.tsv"
    threads: STUDY.compute["cores"]
    resources:
        **asked(STUDY, "measure"),
    params:
        command=dag("measure", apart=True),
        runs=FINAL,
        earlier=f"--earlier {RESULTS}/metrics/sweep.csv" if SWEEP else "",
        stamp=stamp("evaluation", "evaluation", "figures.unguided"),
    shell:
        "{params.command} --runs {params.runs} --judged {input.judged} --reference {input.reference} --moments {input.moments}"
        " --real {input.real} {params.earlier} --out {output} 2> {log}"


rule runs:
    input:
        expand(f"{RESULTS}/samples/{{run}}.json", run=RUNS.index),
    output:
        f"{RESULTS}/metrics/runs.csv",
    log:
        f"{RESULTS}/logs/runs/runs.log",
    benchmark:
        f"{RESULTS}/benchmarks/runs/runs.tsv"
    localrule: True
    threads: 1
    params:
        command=dag("runs"),
        stamp=stamp("evaluation"),
    shell:
        "{params.command} --provenance {input} --out {output} 2> {log}"


# What every job pays before its work begins: the share of this in the study's CPU time is in timings.md.
rule startup:
    output:
        f"{RESULTS}/metrics/startup.json",
    localrule: True
    script:
        "../scripts/startup.py"
