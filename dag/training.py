"""One training loop for every network of the study: the loss is an argument.

Randomness is a function of (seed, step) and data a function of the step, so the loop keeps no generator state: a run
that was killed and resumed from its saved state ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dag.accelerator import on
from dag.diffusion import Diffusion
from dag.interruption import SIGNALS, Interrupted, noticing
from dag.processes import Alone, team

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[nn.Module, object, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: AdamW, linear warm-up then cosine decay to zero, clipped gradients, averaged weights (EMA).

    batch_size counts all processes together. gradient_accumulation_steps: parts of a process's share of it, whose gradients are computed one after the
    other and added up, for less memory. precision is "fp32" or "bf16" (autocast of the forward pass). save_every: steps between
    saved states; unlike everything else here it may change when a training resumes. Raises ValueError on values that cannot be.
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "fp32"
    seed: int = 0
    save_every: int = 500
    processes: int = 1
    gradient_accumulation_steps: int = 1

    def __post_init__(self):
        for key in ("steps", "batch_size", "save_every", "processes", "gradient_accumulation_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, expected at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}, expected 'fp32' or 'bf16'")
        parts = 1
        for key in ("processes", "gradient_accumulation_steps"):
            parts *= getattr(self, key)
            if self.batch_size % parts:
                raise ValueError(f"batch_size {self.batch_size} does not divide by {'processes x ' if parts > getattr(self, key) else ''}{key} = {parts}")

    def rate(self, step: int) -> float:
        """Learning rate of a step (0-based)."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The random numbers of one step on one process."""
    # Distinct for up to a million steps and 1,009 processes; torch's CPU generator looks at the low 32 bits, which still differ for seeds 0 to 3.
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


class Ema:
    """Exponential moving average of a network's parameters, bias-free from the first step: decay grows as (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.weights[key].lerp_(value, 1 - decay)
            else:
                self.weights[key].copy_(value)


class OtherState(ValueError):
    """A saved state that belongs to another recipe, other data or another network."""


def fit(
    model: nn.Module,
    loss: Loss,
    batch: Callable[[int], object],
    recipe: Recipe,
    *,
    state: Path,
    log: Path,
    name: str = "training",
    data: str = "",
    workers: int = 0,
) -> nn.Module:
    """Train `model` and return it with its averaged weights, in eval mode.

    batch(step) returns the data of a step (this process's share of it); it runs in a background thread, one step ahead, or further ahead in so many
    `workers`, processes of their own. loss(model, data, generator) returns a scalar, the mean over that share, or over a part of it.
    state: file for exact resume, written aside and renamed every `recipe.save_every` steps; it is removed by the caller once the result is safe.
    While training goes on, the state before lies beside it as `<state>.previous`, and takes over from one that is torn. log: JSONL, one line per
    logged step. data: what the batches are made of, as any text; a state that was saved with another is not gone on from.
    With recipe.processes > 1 this is one of so many processes of `dag.processes.in_processes`; accelerate averages their gradients. On SIGTERM or
    SIGUSR1 the step under way is finished, the state saved, and Interrupted raised. Raises FloatingPointError when the loss or its gradient is not
    finite, OtherState (a ValueError) when the state belongs to another recipe, data or network, ValueError when it is torn without one before it.
    """
    shared = team(recipe.processes)
    rank, device = shared.process_index, next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    model.train()
    ema = Ema(model, recipe.ema)
    first, history = _resume(state, recipe, data, model, ema, optimiser)
    network = shared.prepare_model(model)
    bar = tqdm(total=recipe.steps, initial=first, desc=name, unit="step", disable=rank > 0 or not sys.stderr.isatty(), mininterval=1)
    with noticing() as asked_to_stop, closing(_ahead(batch, range(first, recipe.steps), workers)) as batches:
        for step, share in enumerate(batches, first):
            share = on(device, share)
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
            mean = _add_gradient(network, loss, share, generator(recipe.seed, step, rank), recipe, shared)
            norm = float(nn.utils.clip_grad_norm_(parameters, recipe.clip))
            if not math.isfinite(mean + norm):  # one more step would put NaN into the weights, and then into the saved state
                found = f"the loss is {mean} and its gradient's norm {norm} at step {step}"
                raise FloatingPointError(f"{name}: {found}; lower learning_rate (now {recipe.learning_rate}) or check the data")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ema.update(model, step)
            bar.update()
            if rank == 0:
                history.append(mean)
                last = step + 1 == recipe.steps
                if (step + 1) % max(1, min(100, recipe.steps // 20)) == 0 or last:
                    _report(log, bar, step, recipe.rate(step), history)
                    history = []
                stop = 0 if last else asked_to_stop()
                if (step + 1) % recipe.save_every == 0 or last or stop:
                    _save(state, {"recipe": asdict(recipe), "data": data, "step": step + 1, "history": history}, model, ema, optimiser)
                if stop:
                    raise Interrupted(stop, f"{name} saved its state after step {step + 1} of {recipe.steps}")
    bar.close()
    model.load_state_dict(ema.weights)
    return model.eval()


class _Batches(Dataset):
    def __init__(self, batch: Callable[[int], object]):
        self.batch = batch

    def __getitem__(self, step: int) -> object:
        return self.batch(step)


def _ahead(batch: Callable[[int], object], steps: range, workers: int) -> Iterator:
    """batch(step) for every step, in order, made while earlier steps are computed."""
    if workers:
        # A generator of its own: the loader's seed is none of the training's random numbers.
        options = {"num_workers": workers, "worker_init_fn": _leave_signals, "generator": torch.Generator()}
        yield from DataLoader(_Batches(batch), batch_size=None, sampler=steps, **options)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(batch, steps[0]) if steps else None
        for step in steps:
            share = coming.result()
            if step + 1 in steps:
                coming = pool.submit(batch, step + 1)
            yield share


def _leave_signals(worker: int) -> None:
    """A worker lives until its training has noticed that it was asked to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _add_gradient(network: nn.Module, loss: Loss, share: object, numbers: torch.Generator, recipe: Recipe, shared: Accelerator | Alone) -> float:
    """The gradient of a step, averaged over parts and processes, in the parameters; returns the mean loss."""
    total, count = 0.0, recipe.gradient_accumulation_steps
    for part, data in enumerate(_parts(share, count), 1):
        # The processes' gradients are brought together once, with the last part's.
        with shared.no_sync(network) if part < count else nullcontext():
            with torch.autocast(next(network.parameters()).device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                value = loss(network, data, numbers) / count
            value.backward()
        total = total + value.detach().float()
    return float(shared.reduce(total, "mean"))


def _parts(data: object, count: int) -> list:
    """Equal parts of tensors, or of tuples of them, along their first axis."""
    if count == 1:
        return [data]
    return list(data.chunk(count) if isinstance(data, Tensor) else zip(*(tensor.chunk(count) for tensor in data), strict=True))


def _report(log: Path, bar: tqdm, step: int, rate: float, history: list[float]) -> None:
    """One line of the log, and the bar's number: the mean loss since the line before."""
    loss = sum(history) / len(history)
    _append(log, {"step": step + 1, "loss": loss, "learning_rate": rate, "time": round(time.time(), 1)})
    bar.set_postfix(loss=f"{loss:.4f}")


def _append(log: Path, row: dict) -> None:
    with open(log, "a") as file:
        file.write(json.dumps(row) + "\n")


def _save(path: Path, facts: dict, model: nn.Module, ema: Ema, optimiser: torch.optim.Optimizer) -> None:
    aside, last = path.with_suffix(".tmp"), facts["step"] == facts["recipe"]["steps"]
    try:
        with open(aside, "wb") as file:
            torch.save({**facts, "model": model.state_dict(), "ema": ema.weights, "optimiser": optimiser.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        # Copied, not renamed: `path` is there at every moment, and whoever finds it missing may take the training for a new one.
        if not last and path.exists():
            shutil.copyfile(path, _previous(path))
        os.replace(aside, path)
    except RuntimeError as error:  # torch's own word for a write that failed
        raise OSError(f"{aside}: could not be written, the disk may be full ({' '.join(str(error).split())})") from None
    finally:
        aside.unlink(missing_ok=True)
    if last:
        _previous(path).unlink(missing_ok=True)


def _resume(path: Path, recipe: Recipe, data: str, model: nn.Module, ema: Ema, optimiser: torch.optim.Optimizer) -> tuple[int, list[float]]:
    """The step to go on from, and the losses since the last line of the log."""
    if not path.exists():
        _previous(path).unlink(missing_ok=True)  # of another training
        return 0, []
    saved, ours = _read_state(path), asdict(recipe)
    theirs = {field.name: field.default for field in fields(Recipe)} | saved["recipe"]  # a key may be younger than the state
    changed = {k: (theirs[k], v) for k, v in ours.items() if theirs[k] != v and k != "save_every"}
    if changed:
        detail = ", ".join(f"{k} was {old!r}, is {new!r}" for k, (old, new) in changed.items())
        raise OtherState(f"{path}: saved by another recipe ({detail}); remove the file to start again")
    if saved.get("data", data) != data:
        raise OtherState(f"{path}: saved with other data ({saved['data']}, not {data}); remove the file to start again")
    theirs, shapes = ({k: tuple(v.shape) for k, v in state.items()} for state in (saved["model"], model.state_dict()))
    if theirs != shapes:
        key = next(k for k in [*shapes, *theirs] if theirs.get(k) != shapes.get(k))
        raise OtherState(f"{path}: saved by another network ({key} was {theirs.get(key)}, is {shapes.get(key)}); remove the file to start again")
    theirs, trained = (sum(len(group["params"]) for group in state["param_groups"]) for state in (saved["optimiser"], optimiser.state_dict()))
    if theirs != trained:
        raise OtherState(f"{path}: saved when {theirs} of the network's parameters were trained, not {trained}; remove the file to start again")
    model.load_state_dict(saved["model"])
    for key, value in ema.weights.items():
        value.copy_(saved["ema"][key])
    optimiser.load_state_dict(saved["optimiser"])
    return saved["step"], saved.get("history", [])


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def _read_state(path: Path) -> dict:
    """The saved state, or the one before where a crash of the machine has torn it."""
    try:
        return _load(path)
    except ValueError as error:
        try:
            saved = _load(_previous(path))
        except ValueError:
            raise error from None
        warnings.warn(f"{error}; going on from the state before, at step {saved['step']}", stacklevel=4)
        return saved


def _load(path: Path) -> dict:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a whole training state ({' '.join(str(error).split())[:80]}); remove the file to start again") from None
    if not isinstance(saved, dict) or not saved.keys() >= {"recipe", "step", "model", "ema", "optimiser"}:
        raise ValueError(f"{path}: no training state; remove the file to start again")
    return saved


def noised(x_start: Tensor, diffusion: Diffusion, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x_start, t, noise): what `denoising_loss` is computed on, for x_start (b, c, h, w) in [-1, 1].

    t is stratified over the batch, which lowers the loss's variance. Draw for a whole batch and share the rows out: then neither processes nor
    parts of a batch change what is drawn.
    """
    b = len(x_start)
    # Drawn on the CPU: the same numbers on every device.
    noise = torch.randn(x_start.shape, generator=generator)
    spread = (torch.arange(b) + torch.rand(b, generator=generator)) / b
    return x_start, (spread * diffusion.num_timesteps).long(), noise


def denoising_loss(diffusion: Diffusion, prediction_type: str) -> Loss:
    """The simple diffusion loss (DDPM eq. 14) on data of `noised`: mean squared error to the target of `prediction_type` at random t."""

    def loss(model: nn.Module, data: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
        x_start, t, noise = data
        output = model(diffusion.q_sample(x_start, t, noise), t).sample
        return (output.float() - diffusion.target(x_start, t, noise, prediction_type)).square().mean()

    return loss
