"""What the command says of itself: the list of stages, what the words of their options mean, an example of each. Imports no stage."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Mapping
from pathlib import Path

STAGES = Path(__file__).parent / "stages"

# Options of one meaning wherever they occur.
WORDS = {
    "blocks": "decoder blocks to keep: those that the strong and weak head read, or all",
    "config": "a study's config",
    "count": "how many images, from the first",
    "data": "pictures with depth, of `dag prepare` (.npz)",
    "distances": "distances of the sweep's runs, of `dag measure` (.csv)",
    "earlier": "distances already measured, which the table is to hold too (.csv)",
    "features": "features of the labelled images, of `dag features` (.npy)",
    "first": "first seed to draw, where it is not the run's",
    "first_seed": "first of the consecutive seeds; a seed is the same picture here and in a study",
    "flags": "for a .pt without its flags beside it: their file, or the name of a preset",
    "folder": "results of a study: results/<study>",
    "gpus": "table of GPUs and their peak throughput (.tsv)",
    "grid": "picture to write (.png)",
    "heads": "depth heads: a file of `dag heads`, or a folder of DepthHeads.save_pretrained",
    "heldout": "held-out real pictures with depth (.npz)",
    "images": "how many pictures it is trained on, where that is not unet.training's",
    "judge": "the depth judge, of `dag judge` (.safetensors)",
    "judged": "described pictures, of `dag describe` (.npz), one file for each run in the order of --runs",
    "kind": "the strong and the weak head together, or one head on each single block",
    "levels": "how many timesteps each image is noised to, or `validation` for heads.validation_t",
    "log": "the log beside the state (.jsonl)",
    "metrics": "table to write: depth errors of the heads (.csv)",
    "model": "pretrained U-Net: a diffusers folder, or a guided-diffusion .pt with its flags beside it",
    "more": "keys of the config that another size of the study has, which is planned too (.yaml)",
    "moments": "of the reference pictures, of `dag moments` (.npz)",
    "n": "number of samples",
    "name": "a key of the config's section `assets`",
    "out": "file or folder to write",
    "parts": "samples of the run's seed ranges, in any order (.npz)",
    "pictures": "samples of a run, or pictures of `dag prepare` (.npz)",
    "pixels": "`shuffled`: the control that learns from depth maps without their shape",
    "precision": "of the weights written: fp16, bf16 or fp32",
    "prior": "depth prior: a folder of `dag prior` or of DepthPrior.save_pretrained",
    "provenance": "the records beside the samples (.json), one for each run",
    "real": "described held-out pictures, the floor of every distance (.npz)",
    "reference": "described reference pictures (.npz)",
    "resolution": "side of the depth maps, pixels",
    "rule": "how the gradient enters the step",
    "run": "a row of the run sheet",
    "runs": "rows of the run sheet",
    "scale": "the weights that stand for `best`, of `dag scale` (.json)",
    "second_judge": "another judge, of `dag judge --name second_judge` (.safetensors)",
    "share": "of a GPU's peak throughput that a job is taken to reach",
    "source": "whose pictures: reference, reference_whole, constant, or a name in downstream.sources",
    "state": "the saved state of the training (.state.pt)",
    "steps": "DDIM steps: a number that an integer stride over the model's timesteps takes, such as 10, 25 or 50",
    "stop": "seed before which to stop, where it is not the run's last",
    "tau": "noise level of the prior: a timestep, or a range LOW-HIGH to draw from",
    "test": "pictures with depth to test on (.npz)",
    "unet": "pretrained U-Net: a folder or file",
    "use": "a key of the config's section `data`",
    "variant": "a key of the config's section `variants`, or none",
    "validation": "validation pictures with depth (.npz)",
    "validation_features": "their features, of `dag features --levels validation` (.npy)",
    "w_dc": "weight of depth-consistency guidance",
    "w_dp": "weight of depth-prior guidance",
    "window": "timesteps at which guidance acts, LOW-HIGH",
}
# Where a stage means something else by a word.
OWN_WORDS = {
    ("convert", "out"): "folder to write",
    ("convert", "source"): "a guided-diffusion .pt, a diffusers folder or hub name, or a .safetensors of this project",
    ("downstream", "judged"): "described pictures whose depth labels them (.npz); without it they carry their own",
    ("downstream", "pictures"): "samples of a run, or pictures of `dag prepare` (.npz); not for reference_whole, which reads the dataset",
    ("judge", "name"): "the config's section that describes it",
    ("sample", "run"): "rows of the run sheet; --heads, --prior and --out have one of each for a run",
    ("label", "pictures"): "pictures without depth, of `dag prepare` (.npz)",
}
_UNET, _HEADS, _PRIOR = "results/smoke/models/unet", "results/smoke/models/heads/labels10.safetensors", "results/smoke/models/prior16"
_DATA, _JUDGED, _METRICS = "results/smoke/data", "results/smoke/judged", "results/smoke/metrics"
# Every one runs as it stands after `snakemake --cores all --configfile config/smoke.yaml`; of a stage with a study without its --config.
EXAMPLES = {
    "asset": "--name unet --out unet.json",
    "fetch": "--name unet",
    "label": "--pictures results/paper-mini/data/pictures/labels.npz --out labels.npz",
    "prepare": "--use labels --out labels.npz",
    "pretrain": "--out unet",
    "snapshot": "--state results/smoke/models/unet.state.pt --log results/smoke/models/unet.log.jsonl --out unet",
    "features": f"--unet {_UNET} --data {_DATA}/labels.npz --levels 8 --blocks heads --count 10 --out features.npy",
    "heads": f"--kind pair --data {_DATA}/labels.npz --features results/smoke/features/labels10.npy --validation {_DATA}/validation.npz "
    "--validation-features results/smoke/features/validation.npy --out heads.safetensors --metrics heads.csv",
    "prior": f"--resolution 16 --data {_DATA}/prior.npz --out prior16",
    "judge": f"--data {_DATA}/judge.npz --out judge.safetensors",
    "sample": f"--run dcg --unet {_UNET} --heads {_HEADS} --prior {_PRIOR} --scale {_METRICS}/scale.json --out dcg.npz",
    "join": "--run dcg --parts results/smoke/samples/dcg.npz --out dcg.npz",
    "trajectory": f"--run dcg --unet {_UNET} --heads {_HEADS} --prior {_PRIOR} --scale {_METRICS}/scale.json --out trajectory.npz",
    "describe": f"--pictures results/smoke/samples/dcg.npz --unet {_UNET} --heads {_HEADS} --judge results/smoke/models/judge.safetensors --out dcg.npz",
    "moments": f"--reference {_JUDGED}/reference.npz --out moments.npz",
    "measure": f"--runs baseline dcg --judged {_JUDGED}/baseline.npz {_JUDGED}/dcg.npz --reference {_JUDGED}/reference.npz --moments {_METRICS}/moments.npz"
    " --out distances.csv",
    "scale": f"--distances {_METRICS}/sweep.csv --out scale.json",
    "runs": "--provenance results/smoke/samples/baseline.json results/smoke/samples/dcg.json --out runs.csv",
    "geometry": f"--runs baseline dcg --judged {_JUDGED}/baseline.npz {_JUDGED}/dcg.npz --heldout {_DATA}/heldout.npz --out geometry.csv",
    "known_answers": f"--heldout {_DATA}/heldout.npz --out known_answers.csv",
    "downstream": f"--source dag --pictures results/smoke/samples/both.npz --test {_DATA}/test.npz --judged {_JUDGED}/both.npz --out dag.csv",
    "plan": "--gpus config/gpus.tsv --out plan.md",
    "convert": "models/rooms32 rooms32-flat --precision fp32",
    "picture": "--model models/rooms32 --heads results/rooms/models/heads/labels100.safetensors --w-dc 300 --n 16 --grid out.png",
    "verify": "results/smoke",
    "doctor": "--config config/rooms.yaml",
}
# Whose example is of another study than the smoke study.
OF_PAPER = ("asset", "fetch", "label", "plan")
WITHOUT_STUDY = ("convert", "picture", "doctor", "verify")


class Parser(argparse.ArgumentParser):
    """One whose errors are one line: what was found, what is allowed, where to read more."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help tells more\n")


def word(stage: str, option: str, default: object) -> str:
    """The help of an option, with its default where it has one."""
    text = OWN_WORDS.get((stage, option)) or WORDS.get(option, "")
    return text if default in (None, inspect.Parameter.empty) else f"{text} (default {default})"


def example(stage: str) -> list[str]:
    """The words of a command that works, `dag` first; nothing for a stage without one."""
    if stage not in EXAMPLES:
        return []
    study = [] if stage in WITHOUT_STUDY else ["--config", _study(stage)]
    return ["dag", stage, *study, *EXAMPLES[stage].split()]


def _study(stage: str) -> str:
    return "config/paper-mini.yaml" if stage in OF_PAPER else "config/smoke.yaml"


def epilog(stage: str) -> str:
    """The example as the last part of a stage's help, broken before its options."""
    after = "" if stage in WITHOUT_STUDY else f", after the study {_study(stage)}"
    text = f"example{after}:\n  {_broken(stage)}" if example(stage) else ""
    # `dag sample --model` draws a picture.
    return f"{text}\n\nof a model by itself, without a study (dag picture --help tells more):\n  {_broken('picture', 'sample')}" if stage == "sample" else text


def _broken(stage: str, name: str = "") -> str:
    return " ".join(["dag", name or stage, *example(stage)[2:]]).replace(" --", " \\\n      --")


def overview(stages: Mapping[str, str]) -> str:
    """The help of `dag`: every stage with the first sentence of what it says of itself. stages: name of a stage -> its module."""
    lines = ["Depth-aware guidance for diffusion models: the stages of a study, one at a time. Snakemake runs them all in order."]
    width = max(map(len, stages)) + 2
    for title, shown in (("stages of a study", stages.keys() - set(WITHOUT_STUDY)), ("without a study", set(WITHOUT_STUDY))):
        lines += ["", f"{title}:", *(f"  {name:{width}}{_summary(name, module)}" for name, module in stages.items() if name in shown)]
    return "\n".join([*lines, "", "dag STAGE --help tells what a stage does and needs, with an example; dag --version the version."])


def _summary(name: str, module: str) -> str:
    """The first line of a stage's docstring, read without importing its module."""
    tree = ast.parse((STAGES / f"{module}.py").read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return ast.get_docstring(function).splitlines()[0]
