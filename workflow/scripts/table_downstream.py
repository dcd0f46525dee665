"""Table 4: a depth network trained on real data, on unguided samples and on guided samples, tested on real images."""

from collections.abc import Mapping
from types import MappingProxyType

import intervals
import pandas as pd
from table_format import Block, Column, Table, published_block

ERRORS = ["abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "si_log", "delta1", "delta2", "delta3"]
PAIRED = ["abs_rel", "delta1"]
READERS = {"abs_rel": "AbsRel ↓", "rmse": "RMSE (m) ↓", "log10": "log10 ↓", "delta1": "δ<1.25 ↑", "delta2": "δ<1.25² ↑", "delta3": "δ<1.25³ ↑"}
ALIGNMENTS = {"none": "no alignment (metres)", "median": "median-aligned", "scale_shift": "scale-and-shift-aligned"}
ALIGNMENTS["scale_shift_disparity"] = "scale and shift of disparity aligned"
_PAIRED = (
    " Δ: guided less unguided samples whose labels come from the same network, paired by the training's seed, which gives both the same first weights and"
    " the same order of pictures [95 % interval by Student's t, of these samples and test images]; * where it leaves out 0, not corrected for the number of"
    " rows."
)
_NYU = "Published, for context only: NYU-Depth v2, unverified, by networks trained on other pictures and many more of them; not comparable."
_OTHER = "Published, for context only: NYU-Depth v2, unverified; not comparable with the numbers above."


def build(
    errors: pd.DataFrame,
    published: pd.DataFrame,
    domain: str = "rooms",
    protocol: str = "",
    section: dict | None = None,
    baselines: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """errors: the rows of all metrics/downstream/*.csv, one per training seed, test image and alignment. published: config/published.tsv.

    domain: of the test images. protocol: how they are measured, for the footnote. section: `downstream` of the config, which says how
    `reference_whole` was trained. baselines: of a source of guided samples, that of unguided ones.
    """
    means = errors.groupby(["source", "alignment", "seed"])[ERRORS].mean()
    rows = []
    for (source, alignment), group in errors.groupby(["source", "alignment"], sort=False):
        own, baseline = means.loc[source, alignment], baselines.get(source, "")
        row = {"source": source, "alignment": alignment, "baseline": baseline, "n_train": int(group["n_train"].iloc[0])}
        row |= {"trainings": len(own), "n": group["image"].nunique()}
        for name in ERRORS:
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), intervals.over_trainings(own[name]), strict=True))
        for name in PAIRED:
            difference = (own - means.loc[baseline, alignment])[name].dropna() if baseline else []
            row |= dict(zip((f"{name}_diff", f"{name}_diff_low", f"{name}_diff_high", f"{name}_p"), intervals.paired(difference), strict=True))
        rows.append(row)
    frame = pd.DataFrame(rows)
    columns = [Column("trained on", "source"), Column("images", "n_train"), Column("trainings", "trainings")]
    for name, title in READERS.items():
        columns.append(Column(title, name, interval=True, digits=3))
        if name in PAIRED and frame[f"{name}_diff"].notna().any():
            columns.append(Column(f"Δ{title.rstrip(' ↓↑')}", f"{name}_diff", interval=True, difference_of=name, p=f"{name}_p"))
    blocks = [Block(ALIGNMENTS[how][0].upper() + ALIGNMENTS[how][1:], rows, columns) for how, rows in frame.groupby("alignment", sort=False)]
    told = {"reference_whole": _whole(section)} if section and "reference_whole" in section else {}
    told |= {"constant_disparity": " constant_disparity: the mean training disparity map.", "flat": " flat: the image's own median depth everywhere."}
    return Table(
        frame,
        "Table 4: depth networks trained on real and on generated images, tested on real images",
        f"Mean over {frame['n'].iloc[0]} test images, then over trainings [95 % interval by Student's t over trainings, which differ in their seed alone]. "
        "constant: the mean of the training depth maps, as coded, a baseline that looks at no picture."
        + (_PAIRED if baselines else "")
        + "".join(text for source, text in told.items() if (frame["source"] == source).any())
        + (f" Measured on {protocol}." if protocol else ""),
        [*blocks, *published_block(published, "table4", _NYU if domain == "nyu" else _OTHER)],
    )


def _whole(section: dict) -> str:
    (height, width), own, others = section["reference_whole"]["shape"], section["reference_whole"]["training"], section["training"]
    pairs = {key: (own.get(key, "the default"), others.get(key, "the default")) for key in {**own, **others}}
    told = ", ".join(f"{key.replace('_', ' ')} {value} instead of {other}" for key, (value, other) in pairs.items() if value != other)
    return f" reference_whole: whole photographs, scaled to {height} x {width} pixels, with a training of their own ({told})."


if job := globals().get("snakemake"):  # set by the rule's `script:`
    errors = pd.concat([pd.read_csv(path) for path in job.input.errors])
    published, chosen = pd.read_csv(job.input.published, sep="\t", dtype=str), job.params
    build(errors, published, chosen.domain, chosen.protocol, chosen.section, chosen.baselines).write(**job.output)
