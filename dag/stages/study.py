"""A study: a config file, its run sheet, where its files lie, and what each of them depends on. Knows no torch."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import pandas as pd
import yaml

from dag.data.domain import DOMAINS, check
from dag.stages.architectures import faults, misfits, safetensors_size
from dag.stages.artefacts import digest, writing
from dag.stages.locks import ALONE, SHARED, locked
from dag.stages.sheet import GUIDED, in_sweep, read_sheet
from dag.stages.validation import StudyError, validate

COMPUTE = {"device": "auto", "shard_size": None, "runs_per_job": 1, "cores": 1, "gflops": 10}


class Study:
    """A validated config with its run sheet. `study["heads"]` is a config section, `study.run("dcg")` a row of the sheet."""

    def __init__(self, config: dict, source: str = "config"):
        self.config, self.source = config, source
        self._validate_config()
        for name in config.get("variants", {}):
            self.varied(name)._validate_config()
        # How and where it is computed: of no effect on results, so a study need not say it.
        self.compute = {**COMPUTE, **config.get("compute", {})}
        self._check_shards()
        # Files that the stage under way was given and, besides its `out`, makes: what its provenance holds the hashes of.
        self.inputs: list[Path] = []
        self.other_outputs: list[Path] = []
        self.runs = read_sheet(config, source)
        self._check_named_runs()

    @classmethod
    def load(cls, path: str | Path) -> Study:
        path = Path(path)
        if not path.is_file():
            raise StudyError(f"{path}: no such config file; the shipped ones are in config/")
        try:
            config = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise StudyError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
        return cls(config, str(path))

    def __getitem__(self, section: str):
        return self.config[section]

    @property
    def drawn(self) -> bool:
        """Whether the domain's pictures are drawn, each from a number of its own."""
        return DOMAINS[self["domain"]["name"]].drawn

    def domain_of(self, use: str) -> dict:
        """Where the pictures of a use come from: a section like `domain`. Downstream networks may be tested on another domain than the study's."""
        other = self["downstream"].get("domain") if use == "test" else None
        return self["domain"] if other is None else {**other, "size": self["domain"]["size"]}

    @property
    def root(self) -> Path:
        return Path("results") / self.config["study"]

    def run(self, name: str) -> dict:
        if name not in self.runs.index:
            raise StudyError(f"{self['runs']}: no run {name!r}; there are {', '.join(self.runs.index)}")
        return {"run": name, **self.runs.loc[name].to_dict()}

    def baseline_of(self, name: str) -> str | None:
        """The first unguided run with the same sampler, eta and seeds, of the sweep for a run of the sweep, and for a guided run with the
        same steps; None where it is that run itself."""
        row, guided = self.runs.loc[name], self._guided()
        shared = ["sampler", "eta", "n", "first_seed", *(["steps"] if guided[name] else [])]
        same = (self.runs[shared] == row[shared]).all(axis=1) & (self.runs.tables.map(in_sweep) == in_sweep(row.tables))
        first = next(iter(self.runs.index[same & ~guided]), None)
        return None if first == name else first

    def varied(self, variant: str) -> Study:
        """The study as a variant of the config has it, for the training of its heads and prior; itself for "none"."""
        if variant == "none":
            return self
        other = copy.copy(self)
        other.config, other.source = copy.deepcopy(self.config), f"{self.source}: variants.{variant}"
        for dotted, value in self._variant(variant).items():
            *path, last = dotted.split(".")
            section = other.config
            for key in path:
                section = section[key]
            section[last] = value
        return other

    def variant_of(self, name: str, network: str) -> str:
        """The variant that changes the "heads" or the "prior" of a run; "" where those are the study's own."""
        variant = self.runs.at[name, "variant"]
        sections = {dotted.partition(".")[0] for dotted in (self._variant(variant) if variant != "none" else ())}
        return variant if sections & {network, "depth"} else ""

    def _variant(self, name: str) -> dict:
        variants = self.config.get("variants", {})
        if name not in variants:
            raise StudyError(f"{self.source}: no variant {name!r}; there are {', '.join(variants) or 'none'}")
        return variants[name]

    @property
    def imports_unet(self) -> bool:
        """Whether a checkpoint that is no folder of diffusers yet, or an asset that is not here yet, becomes one."""
        path = self["unet"]["path"]
        return path is not None and bool(self.assets_at(path) or Path(path).suffix in (".pt", ".pth"))

    def assets_at(self, path: str) -> list[str]:
        """Names of the assets of others that a place of the config holds, or lies in."""
        places = {name: Path(entry["path"]) for name, entry in self.config.get("assets", {}).items()}
        return [name for name, place in places.items() if Path(path).is_relative_to(place) or place.is_relative_to(path)]

    @property
    def trains_judge(self) -> bool:
        """Whether a judge is trained on the pictures of `data.judge`."""
        return any("architecture" in self.config.get(name, {}) for name in ("judge", "second_judge"))

    def run_of(self, source: str) -> str | None:
        """The run whose samples a source of table 4 trains on; None for real pictures."""
        value = self["downstream"]["sources"].get(source)
        return value["run"] if isinstance(value, dict) else value

    @property
    def sources(self) -> list[str]:
        """What the downstream networks of table 4 are trained on, in its order."""
        section = self["downstream"]
        return ["reference", *["reference_whole"] * ("reference_whole" in section), *section["sources"], "constant"]

    def downstream_protocol(self) -> str:
        """How the numbers of table 4 are measured, in words."""
        section, whole = self["downstream"], self["downstream"].get("whole", False)
        size = "whole pictures at their own size" if whole else f"squares of {self['domain']['size']} pixels"
        parts = [size, f"depth below {self['depth']['far']:g} m"] + ["Eigen crop"] * (section.get("crop") == "eigen")
        parts += ["in-painted depth counted with the rest"] * (self.domain_of("test")["name"] == "nyu")
        return ", ".join(parts + ["each estimate the mean of those of a picture and its mirror image"] * whole)

    def labels_of(self, source: str) -> str:
        """Who labels the pictures of a source of table 4: "strong" or "judged"."""
        value = self["downstream"]["sources"].get(source)
        return value["labels"] if isinstance(value, dict) else self["downstream"]["labels"]

    def baseline_source(self, source: str) -> str | None:
        """The source of table 4 that is what a guided one is compared with: unguided samples of the same seeds, labelled by the same; None of others."""
        run = self.run_of(source)
        baseline = self.baseline_of(run) if run and self._guided()[run] else None
        alike = (other for other in self["downstream"]["sources"] if self.run_of(other) == baseline and self.labels_of(other) == self.labels_of(source))
        return next(alike, None) if baseline else None

    def downstream_keys(self, source: str) -> list[str]:
        """Keys of the section `downstream`, dotted, that a source of table 4 depends on: what `section_hash` takes."""
        section, own = self["downstream"], self["downstream"]["sources"]
        apart = {"sources", "reference_whole", *([] if source in own else ["labels"])}
        if source == "reference_whole":
            apart |= {"architecture", "training"}
            apart -= {"reference_whole"}
        return [f"downstream.{key}" for key in sorted(section.keys() - apart)] + [f"downstream.sources.{source}"] * (source in own)

    def _guided(self) -> pd.Series:
        return (self.runs[list(GUIDED)] != 0).any(axis=1)

    def section_hash(self, *sections: str) -> str:
        """Hash of config sections or dotted keys: what a rule passes as a param, so that a changed key reruns only what reads it."""
        return digest(json.dumps({s: self._at(s) for s in sections}, sort_keys=True, default=str))

    def _at(self, dotted: str):
        value = self.config
        for key in dotted.split("."):
            value = value[key]
        return value

    def run_hash(self, name: str, *without: str) -> str:
        """Hash of one row of the run sheet, without some columns; which tables show the run changes none of its samples."""
        return digest(json.dumps({k: v for k, v in self.run(name).items() if k not in ("tables", *without)}, sort_keys=True, default=str))

    def save(self) -> None:
        """Write the config as it was resolved, and the run sheet, for the stages to read: later edits do not reach a study under way.

        The study is this process's alone until it ends, however it ends. Raises StudyError where it is another's, or where jobs of an earlier one
        go on: they would write what they make among the files of the new ones.
        """
        sheet, config = self.root / "runs.tsv", self.saved_config
        self.root.mkdir(parents=True, exist_ok=True)
        self._held = locked(self.root / ".lock", ALONE, "another Snakemake is making this study; wait for its end, or give yours another `study` name")
        outlived = "jobs are at work on this study, of a killed Snakemake or begun by hand; wait for their end, or end them (Slurm: squeue --me, scancel)"
        try:
            locked(self.root / ".jobs", ALONE, outlived).close()
        except StudyError:
            self._held.close()
            raise
        with writing(sheet) as aside:
            self.runs.to_csv(aside, sep="\t")
        with writing(config) as aside:
            aside.write_text(yaml.safe_dump({**self.config, "runs": str(sheet)}, sort_keys=False))

    def at_work(self) -> AbstractContextManager:
        """Within, or until this process ends, however it ends, no Snakemake begins the study anew: this one, a job, works on it."""
        # Whoever may not write there makes nothing there.
        return locked(self.root / ".jobs", SHARED, "") if os.access(self.root, os.W_OK) else nullcontext()

    @property
    def saved_config(self) -> Path:
        return self.root / "config.yaml"

    def _validate_config(self) -> None:
        validate(self.config, "config.schema.yaml", self.source)
        try:
            self.uses = check(self["domain"], self["data"], {"test": self.domain_of("test")} if "domain" in self["downstream"] else {})
        except ValueError as error:
            raise StudyError(f"{self.source}: {error}") from None
        if self.drawn and "crop" in self["unet"]:
            raise StudyError(
                f"{self.source}: unet.crop is {self['unet']['crop']}, but the domain {self['domain']['name']!r} draws every scene anew, expected no such key"
            )
        if self["depth"]["near"] >= self["depth"]["far"]:
            raise StudyError(f"{self.source}: depth.near is {self['depth']['near']} and depth.far {self['depth']['far']}, expected near < far (metres)")
        for name in ("judge", "second_judge"):
            self._check_judge(name)
        for fault in faults(self.config, self._pretrained_architecture()):
            raise StudyError(f"{self.source}: {fault}")
        for fault in misfits(self.config, self.unet_architecture()):
            raise StudyError(f"{self.source}: {fault}")
        blocks = decoder_block_count(self.unet_architecture())
        for head in ("strong", "weak"):
            wrong = [b for b in self["heads"][head] if not 0 <= b < blocks]
            if wrong:
                raise StudyError(f"{self.source}: heads.{head} names decoder blocks {wrong}; this U-Net has blocks 0 to {blocks - 1}")
        counts, available = list(self["heads"]["labels"]), self.uses["labels"].count
        if wrong := [c for c in counts if not isinstance(c, int) or c < 1]:
            raise StudyError(f"{self.source}: heads.labels has the label counts {wrong}, expected whole numbers from 1")
        if available is not None and max(counts) > available:
            raise StudyError(f"{self.source}: heads.labels asks for {max(counts)} labelled images; data.labels has {available}")
        if self["heads"]["guide"] not in counts:
            raise StudyError(f"{self.source}: heads.guide is {self['heads']['guide']}, expected one of heads.labels {counts}")

    def _check_judge(self, name: str) -> None:
        """A judge is trained by the study or pretrained; the second one may be left out."""
        if (section := self.config.get(name)) is None:
            return
        pretrained, trained = {"model", "output", "bounds"} & section.keys(), {"architecture", "training"} & section.keys()
        if "model" in pretrained and trained:
            raise StudyError(f"{self.source}: {name}.{min(trained)} is set, but {name}.model names a network that is trained, expected one or the other")
        if "model" not in pretrained and len(trained) < 2:
            missing = min({"architecture", "training"} - trained)
            raise StudyError(f"{self.source}: {name}.{missing} is missing, expected architecture and training, or model")
        if "model" not in pretrained and pretrained:
            raise StudyError(f"{self.source}: {name}.{min(pretrained)} is set without {name}.model, expected no such key for a judge that is trained")

    def _check_shards(self) -> None:
        size, batch = self.compute["shard_size"], self["sampling"]["batch_size"]
        if size is not None and size % batch:
            raise StudyError(
                f"{self.source}: compute.shard_size is {size}, expected a multiple of sampling.batch_size {batch}: a seed keeps its batch-mates and its bits"
            )

    def unet_architecture(self) -> dict:
        """Of the pretrained U-Net where it is there to be asked, else the config's."""
        pretrained = self._pretrained_architecture()
        if pretrained is None and "architecture" not in self["unet"]:
            raise self._no_unet()
        return self["unet"]["architecture"] if pretrained is None else pretrained

    def _no_unet(self) -> StudyError:
        advice = "null trains the U-Net in the study (snakemake pretrain), `assets` fetches one from the hub or an address"
        return StudyError(f"{self.source}: unet.path is {self['unet']['path']}, which does not exist; {advice}")

    def _pretrained_architecture(self) -> dict | None:
        path = self["unet"]["path"]
        described = [Path(path) / "unet" / "config.json", Path(path) / "config.json"] if path else []
        for file in described:
            if file.is_file():
                try:
                    architecture = json.loads(file.read_text())
                except ValueError as error:
                    raise StudyError(f"{file}: not readable as JSON: {error}") from None
                if not isinstance(architecture, dict) or not {"block_out_channels", "layers_per_block"} <= architecture.keys():
                    raise StudyError(f"{file}: not the config of a UNet2DModel: it has no block_out_channels or layers_per_block")
                return architecture
        return None

    @cache  # noqa: B019 one study lives as long as its process
    def check_weights(self) -> None:
        """Refuse pretrained weights that are missing or cut short, by the header of the file alone."""
        path = Path(self["unet"]["path"])
        if not path.exists():
            raise self._no_unet()
        files = self._weight_files()
        if not files:
            raise StudyError(f"{self.source}: unet.path is {path}, a folder without weights (*.safetensors or *.bin)")
        for file in [f for f in files if f.suffix == ".safetensors"]:
            size, expected = file.stat().st_size, safetensors_size(file)
            if size != expected:
                wanted = "the header of a safetensors file" if expected is None else expected
                raise StudyError(
                    f"{file}: {size} bytes, expected {wanted}: the file is damaged; fetch it again (one of the repository: git checkout -- {file})"
                )

    def _weight_files(self) -> list[Path]:
        path = Path(self["unet"]["path"])
        if not path.exists():  # an asset that is still to be fetched
            return []
        return sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".bin")) if path.is_dir() else [path]

    @cache  # noqa: B019
    def weights_hash(self) -> str:
        """Tells pretrained weights apart by size and both ends: a change inside a folder leaves the folder's own date alone."""
        parts = []
        for file in self._weight_files() if self["unet"]["path"] else []:
            with open(file, "rb") as stream:
                size, head = file.stat().st_size, stream.read(1 << 20)
                stream.seek(max(0, size - (1 << 20)))
                parts.append((file.name, size, hashlib.sha256(head + stream.read()).hexdigest()))
        return digest(json.dumps(parts))

    def _check_named_runs(self) -> None:
        """The config names runs of the sheet."""
        figures, sources = self["figures"], self["downstream"]["sources"]
        sources = {name: self.run_of(name) for name in sources}
        named = [(f"figures.{key}", figures[key]) for key in ("unguided", "guided")] + [("figures.runs", name) for name in figures["runs"]]
        for key, name in named + [(f"downstream.sources.{source}", name) for source, name in sources.items()]:
            if name not in self.runs.index:
                raise StudyError(f"{self.source}: {key} is {name!r}, expected a run of {self['runs']}: {', '.join(self.runs.index)}")
        pictures = self.uses["downstream"].count or 0
        for source, name in sources.items():
            if (n := self.runs.at[name, "n"]) < pictures:
                found = f"data.downstream has {pictures} pictures, the run {name!r} of downstream.sources.{source} {n} samples"
                raise StudyError(f"{self.source}: {found}; expected no more pictures than samples: all sources train on equally many")
        if "gain" in self.config and self.baseline_of(figures["guided"]) != figures["unguided"]:
            raise StudyError(f"{self.source}: gain compares figures.guided {figures['guided']!r} with its baseline, expected that as figures.unguided")
        first, second = (self.runs.loc[figures[key]] for key in ("unguided", "guided"))
        shared = min(first.first_seed + first.n, second.first_seed + second.n) - max(first.first_seed, second.first_seed)
        if shared < figures["seeds"]:
            raise StudyError(f"{self.source}: figures.seeds is {figures['seeds']}, but {first.name} and {second.name} share {max(0, shared)} seeds")


def decoder_block_count(architecture: dict) -> int:
    """One block per decoder ResNet: every level has layers_per_block + 1."""
    return len(architecture["block_out_channels"]) * (architecture["layers_per_block"] + 1)
