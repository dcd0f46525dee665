"""Table 4: a depth network trained on real data, on unguided samples and on guided samples, tested on real images."""

import intervals
import pandas as pd
from table_format import Block, Column, Table, published_block

ERRORS = ["abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "si_log", "delta1", "delta2", "delta3"]
READERS = {"abs_rel": "AbsRel ↓", "rmse": "RMSE (m) ↓", "log10": "log10 ↓", "delta1": "δ<1.25 ↑", "delta2": "δ<1.25² ↑", "delta3": "δ<1.25³ ↑"}
_ALIGNMENTS = {"none": "No alignment (metres)", "median": "Median-aligned", "scale_shift": "Scale-and-shift-aligned"}
_ALIGNMENTS["scale_shift_disparity"] = "Scale and shift of disparity aligned"
_NYU = "Published, by networks trained on other pictures and many more of them: NYU-Depth v2, unverified."
_OTHER = "Published, for context only: NYU-Depth v2, unverified; not comparable with the numbers above."


def build(errors: pd.DataFrame, published: pd.DataFrame, domain: str = "rooms", protocol: str = "", section: dict | None = None) -> Table:
    """errors: the rows of all metrics/downstream/*.csv, one per training seed, test image and alignment. published: config/published.tsv.

    domain: of the test images. protocol: how they are measured, for the footnote. section: `downstream` of the config, which says how
    `reference_whole` was trained.
    """
    rows = []
    for (source, alignment), group in errors.groupby(["source", "alignment"], sort=False):
        per_training = group.groupby("seed")[ERRORS].mean()
        numbers = [number for name in ERRORS for number in intervals.over_trainings(per_training[name])]
        rows.append([source, alignment, int(group["n_train"].iloc[0]), len(per_training), group["image"].nunique(), *numbers])
    measured = [f"{name}{part}" for name in ERRORS for part in ("", "_low", "_high")]
    frame = pd.DataFrame(rows, columns=["source", "alignment", "n_train", "trainings", "n", *measured])
    columns = [Column("trained on", "source"), Column("images", "n_train"), Column("trainings", "trainings")]
    columns += [Column(title, name, interval=True, digits=3) for name, title in READERS.items()]
    blocks = [Block(_ALIGNMENTS.get(how, how), rows, columns) for how, rows in frame.groupby("alignment", sort=False)]
    told = {"reference_whole": _whole(section)} if section and "reference_whole" in section else {}
    told |= {"constant_disparity": " constant_disparity: the mean training disparity map.", "flat": " flat: the image's own median depth everywhere."}
    return Table(
        frame,
        "Table 4: depth networks trained on real and on generated images, tested on real images",
        f"Mean over {frame['n'].iloc[0]} test images, then over trainings [95 % interval by Student's t over trainings, which differ in their seed alone]. "
        "constant: the mean training depth map, the floor."
        + "".join(text for source, text in told.items() if (frame["source"] == source).any())
        + (f" Measured on {protocol}." if protocol else ""),
        [*blocks, *published_block(published, "table4", _NYU if domain == "nyu" else _OTHER)],
    )


def _whole(section: dict) -> str:
    (height, width), own, others = section["reference_whole"]["shape"], section["reference_whole"]["training"], section["training"]
    steps = f"{own['steps']:,} steps of training instead of {others['steps']:,}"
    return f" reference_whole: whole photographs, at {height} x {width} pixels, with a training of their own ({steps})."


if job := globals().get("snakemake"):  # set by the rule's `script:`
    errors = pd.concat([pd.read_csv(path) for path in job.input.errors])
    build(errors, pd.read_csv(job.input.published, sep="\t", dtype=str), job.params.domain, job.params.protocol, job.params.section).write(**job.output)
