"""What a job asks of a cluster: memory and time, computed from image size, networks, batch and counts. Knows no torch.

Upper estimates: a scheduler kills what asks for too little. Each further attempt of a job asks for that many times as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dag.stages.arrays import PART
from dag.stages.sheet import COMPARISONS, in_sweep
from dag.stages.study import Study

START_MIB = 1500  # Python with torch and diffusers, and a network of this study: about half of it
# Activations kept for the gradient, float32, in arrays of a ResNet's output. The 256x256 U-Net of guided-diffusion, 4.8 GiB an image, has 10.8.
ARRAYS_PER_RESNET = 11
# MiB a pixel of a picture with depth, uint8 and float32: drawn at twice the side, or read and given its depth by an estimator.
_PICTURE, _LABELLED_PICTURE = 40 / 2**20, 16 / 2**20
_PICTURE_ALONE = 6 / 2**20  # before it is given its depth
_WHOLE_SPLIT = 1000  # pictures, where the config leaves it to the dataset
START_MINUTES, MARGIN = 10, 2
# A depth network of transformers, as large as Intel/dpt-large: 344 M float32 parameters, and two operations each for 577 patches and the decoder.
_LABELLER_MIB, _LABELLER_GFLOP = 4000, 800
_EXTRACTOR_GFLOP = 12  # FID's Inception, the largest
CORE_GFLOPS = 10  # of one slow core: what stages without a network compute with
PASS_SECONDS = 0.03  # of a training's forward and backward pass, however small its network: the GPU waits for the start of some thousand kernels
_DISK_MB = 200  # a second, of stored features: from a file system that many nodes share, on one thread, converted to float32
_BY_CORES = ("prepare", "join", "moments", "measure", "measure_sweep")


def asked(study: Study, stage: str, side: int | None = None, times: int = 1) -> dict:
    """`mem_mb` and `runtime` (minutes) of a stage's job, as functions of `attempt`.

    side: of the images, where it is not the domain's. times: how many runs the job takes one after the other.
    """
    mib, gflop = _needs(study, stage, side or study["domain"]["size"])
    speed = study.compute["gflops"]
    if stage in _BY_CORES:
        speed = CORE_GFLOPS * (study.compute["cores"] if stage.startswith("measure") else 1)
    minutes = START_MINUTES + MARGIN * max(times * gflop / speed, _seconds(study, stage)) / 60
    return {"mem_mb": lambda wildcards, attempt: attempt * math.ceil(mib), "runtime": lambda wildcards, attempt: attempt * math.ceil(minutes)}


def _seconds(study: Study, stage: str) -> float:
    """What a job takes however few its operations: stored features to write or to read, and for each pass of a training at least PASS_SECONDS."""
    if stage in ("features", "heads", "blocks"):
        labels, recipe = study["heads"]["labels"], study["heads"]["training"]
        row = _stored(study) / 2**20
        # Read twice in whole, to know the data and for the provenance; each step of single blocks reads whole rows.
        rows = 2 * labels[study["heads"]["guide"]] * study["heads"]["guide"] + recipe["steps"] * recipe["batch_size"] * (stage == "blocks")
        return rows * row / _DISK_MB + recipe["steps"] * PASS_SECONDS * (stage != "features")
    recipe = study.config.get(stage, {}).get("training")
    if recipe is None:
        return 0
    trainings = study["downstream"]["seeds"] if stage == "downstream" else 1
    recipes = [recipe] + [section["training"] for name, section in study[stage].items() if name == "reference_whole"]
    return trainings * max(r["steps"] * r.get("gradient_accumulation_steps", 1) for r in recipes) * PASS_SECONDS


def _stored(study: Study) -> float:
    """Bytes of the features of every decoder block of one picture at one noise level: a level's last block is that of the next finer one in size."""
    unet = study.unet_architecture()
    return 2 * (unet["layers_per_block"] + 2) * sum((study["domain"]["size"] >> level) ** 2 * c for level, c in enumerate(unet["block_out_channels"]))


def processes(study: Study, section: str) -> int:
    """How many processes share the training of a network, a config section like "unet": each with a thread, and a GPU where there are any."""
    return study[section].get("training", {}).get("processes", 1)


def _needs(study: Study, stage: str, size: int) -> tuple[float, float]:
    """MiB and 10^9 operations."""
    batch, unet = study["sampling"]["batch_size"], study.unet_architecture()
    counts = {name: use.count or _WHOLE_SPLIT for name, use in study.uses.items()}
    longest = int(study.runs.n.max())
    shard = min(longest, study.compute["shard_size"] or longest)
    forward, kept = operations(unet, size), activations(unet, size)
    picture = (_LABELLED_PICTURE if "estimator" in study.config else _PICTURE) * size**2
    if stage == "prepare":
        largest = max(count for name, count in counts.items() if name != "unet")  # whose scenes are drawn as they are needed
        held = largest * size**2 * _PICTURE_ALONE if "estimator" in study.config else largest * picture
        return START_MIB + held, largest * size**2 * 5e-5
    if stage == "join":
        # It holds the pictures of one part at a time.
        return START_MIB + 3 * shard * 3 * size**2 / 2**20, longest * size**2 * 1e-6
    if stage in ("moments", "measure", "measure_sweep"):
        return measuring(study, stage, counts["reference"])
    if stage == "known_answers":
        return START_MIB + 2 * counts["heldout"] * picture, 10 * counts["heldout"] * _EXTRACTOR_GFLOP  # real depth, and three faults of three strengths
    if stage == "label":
        largest = max(count for name, count in counts.items() if name != "unet")
        return START_MIB + _LABELLER_MIB + largest * picture, largest * _LABELLER_GFLOP
    if stage in ("sample", "trajectory"):
        # A guided step: the U-Net forward and, to x, backward, and less than that again for heads and prior.
        return START_MIB + batch * kept, int(study.runs.steps.max()) * shard * 4 * forward
    if stage == "features":
        levels = max(count * levels for count, levels in study["heads"]["labels"].items())
        return START_MIB + batch * kept, levels * forward
    if stage == "describe":
        # The depth that it keeps lies on the disk, and of pictures it holds a part.
        return START_MIB + batch * kept + max(PART, batch) * _PICTURE * size**2, max(longest, counts["reference"]) * (forward + 2)
    if stage in ("heads", "blocks"):
        return _heads(study, stage, size)
    section = {"train_unet": "unet"}.get(stage, stage)
    if "training" not in study[section]:  # a pretrained network is looked at and taken as it is
        return START_MIB + _LABELLER_MIB, 0
    trained = [(study[section], size)]
    if stage == "downstream" and "reference_whole" in study["downstream"]:  # one estimate for the job of every source
        larger = study["downstream"]["reference_whole"]
        trained.append((larger, math.isqrt(math.prod(larger["shape"]))))
        picture *= max(1, math.prod(larger["shape"]) / size**2)
    # A prior is given whole maps, whatever its resolution.
    data = 0 if stage == "train_unet" else counts.get(stage, 0) * picture * (study["domain"]["size"] / size) ** 2
    trainings = study["downstream"]["seeds"] if stage == "downstream" else 1
    data += 4 * longest * size**2 / 2**20 if stage == "downstream" else 0  # depth of a whole run, of which it takes a part
    kept, gflop = (max(needs) for needs in zip(*(_training(made, unet, side) for made, side in trained), strict=True))
    # Each process of a training has its own Python and data.
    return (START_MIB + data) * processes(study, section) + kept, trainings * gflop


def _training(section: Mapping, unet: dict, size: int) -> tuple[float, float]:
    """MiB of activations, of one part of the processes' shares at a time, and 10^9 operations of a network's training."""
    recipe, architecture = section["training"], section["architecture"]
    if "layers_per_block" not in architecture:  # an encoder of classification: about as large as the U-Net
        architecture = unet
    at_once = recipe["batch_size"] / recipe.get("gradient_accumulation_steps", 1)
    return 2 * at_once * activations(architecture, size), recipe["steps"] * recipe["batch_size"] * 3 * operations(architecture, size)


def _heads(study: Study, stage: str, size: int) -> tuple[float, float]:
    section, unet = study["heads"], study.unet_architecture()
    recipe, width, layers = section["training"], section["width"], section["layers"]
    pixels, batch = size**2 * width, recipe["batch_size"]
    if stage == "heads":
        per_image = pixels * (len(section["strong"]) + layers + 1)
        return START_MIB + batch * per_image * 40 / 2**20, recipe["steps"] * batch * 6 * per_image * width / 1e9
    # A head on every block, trained together: three arrays a layer of each, and the rows of this step and the next in half and full precision.
    heads = (unet["layers_per_block"] + 1) * len(unet["block_out_channels"])
    held = pixels * heads * layers * 3 * 4 + 2 * 3 * _stored(study)
    return START_MIB + batch * held / 2**20, recipe["steps"] * batch * 6 * pixels * heads * layers * width / 1e9


def measuring(study: Study, stage: str, reference: int) -> tuple[float, float]:
    """Of distances: all features in memory, three kinds a picture; for each resampled set a product of them and the eigenvalues of their moments."""
    section, d, features = study["evaluation"], study["evaluation"]["dims"], 3 * 4 * study["evaluation"]["dims"]
    if stage == "moments":
        return START_MIB + reference * 3 * features / 2**20, 3 * 2 * reference * d**2 / 1e9
    runs = [row for row in study.runs.itertuples() if in_sweep(row.tables) == (stage == "measure_sweep")]
    resamples = section["resamples"]
    operations_, most = 0.0, max((row.n for row in runs), default=0)
    for row in runs:
        smaller = min(row.n, d)
        one, pairs = 2 * row.n * d * smaller + 4 * smaller**3, 2 * row.n * (row.n + reference) * d
        operations_ += 3 * 2 * resamples * one
        tables, seldom = set(row.tables.split(",")), min(resamples, 200)
        if {*COMPARISONS, "controls"} & tables:  # dFID beyond that of the own head
            operations_ += 2 * 2 * seldom * one
        if {*COMPARISONS} & tables:  # FD-infinity, fifteen distances for one; KID, precision and recall
            operations_ += 2 * 2 * (15 * min(resamples, 100) * one + 3 * seldom * pairs)
    held = (sum(row.n for row in runs) + 2 * reference) * features + study.compute["cores"] * 6 * most * d * 8
    return START_MIB + held / 2**20, operations_ / 1e9


def activations(architecture: dict, size: int) -> float:
    """MiB that a U-Net keeps for the gradient of one image."""
    resnets = 2 * architecture["layers_per_block"] + 1
    values = sum((size >> level) ** 2 * channels for level, channels in enumerate(architecture["block_out_channels"]))
    return values * resnets * ARRAYS_PER_RESNET * 4 / 2**20


def operations(architecture: dict, size: int) -> float:
    """10^9 operations of one image's forward pass: two 3x3 convolutions a ResNet, whose first sees twice the channels in the decoder."""
    encoder, decoder = architecture["layers_per_block"], architecture["layers_per_block"] + 1
    return sum((size >> level) ** 2 * channels**2 * (encoder * 36 + decoder * 54) / 1e9 for level, channels in enumerate(architecture["block_out_channels"]))
