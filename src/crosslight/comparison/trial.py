"""One trial: an entrant trained on a task with one seed under one budget, then judged and measured."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import crosslight
from crosslight import registry, tasks
from crosslight.bench import flops, memory
from crosslight.comparison import maps
from crosslight.errors import expect, require
from crosslight.tasks import Entrant, Size, Task

Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every entrant of a table gets. It ends after ``steps``, or after ``seconds`` of training where given."""

    steps: int
    seconds: float | None = None
    batch_size: int
    lr: float
    size: Size

    @classmethod
    def of(cls, task: Task, **changes: Any) -> Budget:
        """The task's own budget with changes: steps, seconds, batch_size, lr, dim, heads, depth."""
        known = ("steps", "seconds", "batch_size", "lr", "dim", "heads", "depth")
        unknown = sorted(set(changes) - set(known))
        expect(not unknown, "budget", ", ".join(unknown), f"some of {', '.join(known)}")
        changes = {name: value for name, value in changes.items() if value is not None}
        for name, value in changes.items():
            expect(isinstance(value, int | float) and value > 0, name, repr(value), "a positive number")
        sides = {name: changes.pop(name) for name in ("dim", "heads", "depth") if name in changes}
        # Seconds alone mean seconds: the number of steps is then whatever fits.
        steps = 10**9 if "seconds" in changes else task.steps
        return cls(
            **{"steps": steps, "batch_size": task.batch_size, "lr": task.lr, **changes},
            size=replace(task.size, **sides),
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Everything that decides a trial."""

    task: str
    entrant: Entrant
    seed: int
    budget: Budget
    device: str
    task_options: Mapping[str, Any] = field(default_factory=dict)

    def decides(self) -> dict[str, Any]:
        """What the key is a hash of: all fields, the versions, the code of entrant and task, the user's file."""
        task = tasks.find(self.task)
        return {
            "task": self.task,
            "task_options": _plain(self.task_options),
            "files": {k: _file(v) for k, v in self.task_options.items() if isinstance(v, str | Path)},
            "id": self.entrant.id,
            "options": _plain(self.entrant.options),
            "seed": self.seed,
            "budget": asdict(self.budget),
            "device": self.device.partition(":")[0],
            "versions": {"crosslight": crosslight.__version__, "torch": torch.__version__.partition("+")[0]},
            "code": [
                self._entrant_source(task),
                registry.source(task.__module__),
                registry.source("crosslight.tasks.trunk"),
                *map(registry.source, _modules_under(task)),
            ],
        }

    def record(self, **outcome: Any) -> dict[str, Any]:
        """The trial's line in the store."""
        task = tasks.find(self.task)
        about = {name: getattr(task, name) for name in ("pattern", "kind", "metric", "higher_is_better")}
        return {"key": self.key, **self.decides(), **about, **outcome}

    def _entrant_source(self, task: type[Task]) -> str:
        return "" if self.entrant.id in task.companions else registry.source_of(self.entrant.id)

    @cached_property
    def key(self) -> str:
        return digest(self.decides())


def _modules_under(task: type[Task]) -> list[str]:
    """The modules of the tasks that a task derives from, but its own."""
    modules = (base.__module__ for base in task.__mro__ if issubclass(base, Task) and base is not Task)
    return [name for name in dict.fromkeys(modules) if name != task.__module__]


def digest(value: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: json.loads(json.dumps(value, default=str)) for name, value in options.items()}


def _file(path: str | Path) -> str:
    """The hash of a file's content; empty for an option that is no file."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def run(trial: Trial, progress: Progress | None = None, weights: Path | None = None) -> dict[str, Any]:
    """Train, judge and measure. Never raises for what a trial does: the record says "failed" or "diverged"."""
    started = time.perf_counter()
    try:
        outcome = _run(trial, progress or (lambda share: None), weights)
    except Exception as error:
        outcome = {"status": "failed", "error": told(error)}
    return trial.record(**outcome, wall_s=round(time.perf_counter() - started, 3))


def told(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _run(trial: Trial, progress: Progress, weights: Path | None) -> dict[str, Any]:
    accelerator = _accelerator(trial.device)
    task, budget = tasks.get(trial.task, **trial.task_options), trial.budget
    torch.manual_seed(trial.seed)
    model = task.model(trial.entrant, budget.size)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record = {"parameters": parameters, **_train(accelerator, task, model, trial, progress)}
    if record["status"] == "diverged":
        return record
    model.eval()
    with torch.no_grad():
        scores = task.evaluate(model)
    if not all(math.isfinite(value) for value in scores.values()):
        return record | {"status": "diverged", "error": "a metric on held-out data is not finite"}
    record |= {"scores": scores, "score": scores[task.metric]}
    if weights is not None and accelerator.is_main_process:
        try:
            maps.save(task, model, weights, accelerator.device)
        except Exception as error:  # the score stands without the picture
            record["weights_error"] = told(error)
    return record


def _accelerator(device: str) -> Any:
    accelerate = require("accelerate", "compare")
    state = require("accelerate.state", "compare")
    current = state.PartialState._shared_state.get("device")
    if current is not None and torch.device(device).type != current.type:
        state.AcceleratorState._reset_state(reset_partial_state=True)  # this process ran on another device before
    # An entrant may leave parameters idle: mean pooling asks no queries.
    idle = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    return accelerate.Accelerator(cpu=torch.device(device).type == "cpu", kwargs_handlers=[idle])


def to(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in batch.items()}


def _train(accelerator: Any, task: Task, model: nn.Module, trial: Trial, progress: Progress) -> dict[str, Any]:
    budget = trial.budget
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return {"status": "ok", "steps": 0, "loss": None, "step_ms": None, "flops": None, "memory": None}
    optimiser: Any = torch.optim.AdamW(parameters, lr=budget.lr, weight_decay=0.01)
    prepared, optimiser = accelerator.prepare(model, optimiser)
    prepared.train()
    batches = task.batches(trial.seed, budget.batch_size)
    durations: list[float] = []
    step, spent, loss = 0, 0.0, math.nan
    cost: dict[str, Any] = {}
    while step < budget.steps and (budget.seconds is None or spent < budget.seconds):
        with accelerator.split_between_processes(next(batches)) as share:
            batch = to(share, accelerator.device)
        if step == 0:
            _check(batch)
            cost = _cost(task, accelerator.unwrap_model(prepared), batch)
        done = max(step / budget.steps, spent / budget.seconds if budget.seconds else 0.0)
        for group in optimiser.param_groups:
            group["lr"] = budget.lr * _schedule(done)
        began = time.perf_counter()
        optimiser.zero_grad()
        value = task.loss(prepared, batch)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        loss = value.item()  # waits for the device, so that the clock sees the whole step
        durations.append(time.perf_counter() - began)
        spent += durations[-1]
        step += 1
        if not math.isfinite(loss):
            return {"status": "diverged", "error": f"the loss is {loss} at step {step}", "steps": step, **cost}
        progress(max(step / budget.steps, spent / budget.seconds if budget.seconds else 0.0))
    return {
        "status": "ok",
        "steps": step,
        "loss": loss,
        "train_s": round(spent, 3),
        "step_ms": round(1e3 * statistics.median(durations[min(3, len(durations) - 1) :]), 4),
        **cost,
    }


def _schedule(done: float) -> float:
    """Share of the learning rate: up over the first tenth of the budget, then down along a cosine."""
    return max(done, 0.002) / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))


def _check(batch: Mapping[str, Tensor]) -> None:
    for name, t in batch.items():
        if t.is_floating_point():
            bad = int((~torch.isfinite(t)).sum())
            expect(bad == 0, name, f"{bad} values that are NaN or infinite", "finite numbers in the input of the task")


def _cost(task: Task, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """FLOPs and peak memory of one training step, taken on a copy, so that training does not notice."""
    copied = copy.deepcopy(model)

    def step() -> None:
        copied.zero_grad()
        task.loss(copied, batch).backward()

    device = next(iter(batch.values())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        step()  # what is made once (tables, compiled code) is no cost of a step
        return {"flops": flops.count(step), "memory": memory.peak_of_tensors(step, device)}
