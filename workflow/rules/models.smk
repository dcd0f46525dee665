# Networks: the pretrained U-Net (on demand), depth heads on its features, priors over depth, the judge.


if IMPORTED:

    rule convert_unet:
        input:
            assets_at(config["unet"]["path"]) or config["unet"]["path"],
        output:
            directory(f"{RESULTS}/models/unet"),
        log:
            f"{RESULTS}/logs/convert_unet/unet.log",
        benchmark:
            f"{RESULTS}/benchmarks/convert_unet/unet.tsv"
        threads: 1
        resources:
            mem_mb=lambda w, attempt: attempt * 8000,  # half a billion parameters in float32, themselves and as they are written
        params:
            command=dag("convert", config_file=False),
            source=shlex.quote(config["unet"]["path"]),
            flags=f"--flags {shlex.quote(config['unet']['flags'])}" if "flags" in config["unet"] else "",
            stamp=lambda w: f"{code_hash('weights')}-{STUDY.weights_hash()}",
        shell:
            "{params.command} {params.source} {output} {params.flags} --precision fp32 2> {log}"

else:

    rule train_unet:
        output:
            directory(f"{RESULTS}/models/unet"),
        log:
            f"{RESULTS}/logs/train_unet/unet.log",
        benchmark:
            f"{RESULTS}/benchmarks/train_unet/unet.tsv"
        threads: processes(STUDY, "unet")
        resources:
            **asked(STUDY, "train_unet"),
            gpu=GPU * processes(STUDY, "unet"),
        params:
            command=dag("pretrain"),
            stamp=f"{domain_stamp('pretraining', 'unet')}-{config['data']['unet']}",
        shell:
            "{params.command} --out {output} 2> {log}"


rule features:
    input:
        unet=unet,
        data=f"{RESULTS}/data/labels.npz",
    output:
        rows=f"{RESULTS}/features/labels{{labels}}.npy",
        index=f"{RESULTS}/features/labels{{labels}}.json",
    log:
        f"{RESULTS}/logs/features/labels{{labels}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/features/labels{{labels}}.tsv"
    threads: 1
    resources:
        **asked(STUDY, "features"),
        gpu=GPU,
    params:
        command=dag("features"),
        # The heads that guide are compared with heads on every single block, so their images keep every block.
        blocks=lambda w: "all" if int(w.labels) == config["heads"]["guide"] else "heads",
        levels=lambda w: {str(k): v for k, v in config["heads"]["labels"].items()}[w.labels],
        stamp=lambda w: unet_stamp("models", "heads.strong", "heads.weak", "sampling.batch_size"),
    shell:
        "{params.command} --unet {input.unet} --data {input.data} --levels {params.levels}"
        " --blocks {params.blocks} --count {wildcards.labels} --out {output.rows} 2> {log}"


rule validation_features:
    input:
        unet=unet,
        data=f"{RESULTS}/data/validation.npz",
    output:
        rows=f"{RESULTS}/features/validation.npy",
        index=f"{RESULTS}/features/validation.json",
    log:
        f"{RESULTS}/logs/features/validation.log",
    benchmark:
        f"{RESULTS}/benchmarks/features/validation.tsv"
    threads: 1
    resources:
        **asked(STUDY, "features"),
        gpu=GPU,
    params:
        command=dag("features"),
        stamp=lambda w: unet_stamp("models", "heads.validation_t", "sampling.batch_size"),
    shell:
        "{params.command} --unet {input.unet} --data {input.data} --levels validation --blocks all --out {output.rows} 2> {log}"


rule heads:
    input:
        data=f"{RESULTS}/data/labels.npz",
        features=lambda w: f"{RESULTS}/features/labels{config['heads']['guide'] if w.heads == 'blocks' else w.heads[6:]}.npy",
        validation=f"{RESULTS}/data/validation.npz",
        validation_features=f"{RESULTS}/features/validation.npy",
    output:
        heads=f"{RESULTS}/models/heads/{{heads}}{{variant}}.safetensors",
        metrics=f"{RESULTS}/metrics/heads/{{heads}}{{variant}}.csv",
    log:
        f"{RESULTS}/logs/heads/{{heads}}{{variant}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/heads/{{heads}}{{variant}}.tsv"
    wildcard_constraints:
        heads=r"labels\d+|blocks",
    threads: 1
    resources:
        mem_mb=lambda w, attempt: asked(STUDY, "blocks" if w.heads == "blocks" else "heads")["mem_mb"](w, attempt),
        runtime=lambda w, attempt: asked(STUDY, "blocks" if w.heads == "blocks" else "heads")["runtime"](w, attempt),
        gpu=GPU,
    params:
        command=dag("heads"),
        kind=lambda w: "blocks" if w.heads == "blocks" else "pair",
        variant=variant_option,
        stamp=lambda w: stamp("models", "depth", *(f"heads.{key}" for key in ("strong", "weak", "width", "layers", "time_width", "training")), study=varied(w)),
    shell:
        "{params.command} --kind {params.kind} {params.variant} --data {input.data} --features {input.features}"
        " --validation {input.validation} --validation-features {input.validation_features}"
        " --out {output.heads} --metrics {output.metrics} 2> {log}"


rule prior:
    input:
        f"{RESULTS}/data/prior.npz",
    output:
        directory(f"{RESULTS}/models/prior{{resolution}}{{variant}}{{shuffled}}"),
    log:
        f"{RESULTS}/logs/prior/{{resolution}}{{variant}}{{shuffled}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/prior/{{resolution}}{{variant}}{{shuffled}}.tsv"
    wildcard_constraints:
        shuffled="|_shuffled",
    threads: processes(STUDY, "prior")
    resources:
        mem_mb=lambda w, attempt: asked(STUDY, "prior", int(w.resolution))["mem_mb"](w, attempt),
        runtime=lambda w, attempt: asked(STUDY, "prior", int(w.resolution))["runtime"](w, attempt),
        gpu=GPU * processes(STUDY, "prior"),
    params:
        command=dag("prior"),
        pixels=lambda w: "shuffled" if w.shuffled else "in_place",
        variant=variant_option,
        stamp=lambda w: stamp("models", "prior", "depth", study=varied(w)),
    shell:
        "{params.command} --resolution {wildcards.resolution} --pixels {params.pixels} {params.variant} --data {input} --out {output} 2> {log}"


rule judge:
    input:
        # A pretrained judge needs no pictures.
        lambda w: assets_at(config[w.judge].get("model")),
        data=lambda w: f"{RESULTS}/data/judge.npz" if "architecture" in config[w.judge] else [],
    output:
        f"{RESULTS}/models/{{judge}}.safetensors",
    log:
        f"{RESULTS}/logs/judge/{{judge}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/judge/{{judge}}.tsv"
    wildcard_constraints:
        judge="judge|second_judge",
    threads: 1
    resources:
        **asked(STUDY, "judge"),
        gpu=GPU,
    params:
        command=dag("judge"),
        data=lambda w, input: f"--data {input.data}" if input.data else "",
        stamp=lambda w: stamp("models", w.judge, "depth", "domain"),
    shell:
        "{params.command} --name {wildcards.judge} {params.data} --out {output} 2> {log}"
