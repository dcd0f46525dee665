# The whole study: `snakemake --cores all`, or another one with `--configfile config/<study>.yaml`.
from snakemake.utils import min_version

min_version("9.0")


# A study is one whole config: Snakemake would mix a second file into this one, and what the second lacks would go unseen.
if not workflow.configfiles:

    configfile: "config/rooms.yaml"


# The words above the report that `snakemake --report` writes.
report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/assets.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/sampling.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/downstream.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/gain.smk"


rule all:
    default_target: True
    input:
        # The measurements are asked for by name: tables and figures are committed, and a fresh clone must not take them for its own.
        MEASUREMENTS,
        TABLES,
        FIGURES,
        NEIGHBOURS,
        f"{RESULTS}/timings.md",
        f"{RESULTS}/index.html",
        f"{RESULTS}/manifest.json",
    localrule: True


# The pretrained U-Net, trained again from nothing.
rule pretrain:
    input:
        f"{RESULTS}/models/unet",
    localrule: True
