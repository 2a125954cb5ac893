"""Who is measured: rlkl's trainers, each as a shipped configuration sets it, and trl's two."""

import json
import time
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
import yaml

from benchmarks.workload import Clock, Meter, Workload, scattered

CONFIGS = Path(__file__).parents[1] / "configs"
OURS = {
    "reinforce": "presets/rloo.yaml",
    "grpo": "presets/grpo.yaml",
    "ppo": "ppo.yaml",
    "token_likelihood": "token_likelihood.yaml",
    "dpo": "dpo.yaml",
}
"""Name to the file whose trainer, credit and KL it takes."""
PAIRS = {"reinforce": "RLOOTrainer", "grpo": "GRPOTrainer"}
"""Which of ours does the work of which of trl's."""
NAMES = ("reinforce", "RLOOTrainer", "grpo", "GRPOTrainer", "ppo", "token_likelihood", "dpo")
RATE = 1e-6


class Contestant(Protocol):
    """Somebody who can make a step."""

    meter: Meter

    def turn(self) -> dict[str, float]:
        """One step to warm up and one that counts; its seconds by stage, whole (``step``), and of all processors."""


def build(name: str, workload: Workload, folder: Path) -> Contestant:
    """A contestant on the model in ``folder``/model."""
    return Ours(name, workload, folder) if name in OURS else Theirs(name, workload, folder)


class Ours:
    """A run of rlkl without its files and evaluations: a turn is two training steps of the loop."""

    def __init__(self, name: str, workload: Workload, folder: Path) -> None:
        from rlkl import lane, launch, loop, settings, tracking

        config = settings.load(configuration(name, workload, folder))
        self.accelerator = launch.accelerator(config)
        self.lane = lane.build(config)
        self.lane.eos_ids = []  # nothing ends early
        self.lane.place(self.accelerator)
        self.loop, self.tracking, self.done, self.clock = loop, tracking, 0, Clock()
        self.clock.time(self.lane.optimiser, "step", "optimiser")
        self.clock.time(self.accelerator, "clip_grad_norm_", "optimiser")
        models: list[Any] = [self.lane.policy.model, self.lane.policy.reference]
        self.meter = Meter(workload, [model.base_model for model in models])

    def step(self) -> dict[str, float]:
        """One step."""
        self.done += 1
        self.clock.seconds.clear()
        self.meter.reset()
        busy = time.process_time()
        with mock.patch.object(self.tracking, "Stopwatch", waiting(self.tracking.Stopwatch)):
            metrics = self.loop.train_step(self.lane, self.done, self.accelerator)
        stages = {name: metrics[f"time/{name}"] for name in ("sample", "reward", "score", "update", "step")}
        optimiser, update = self.clock.seconds["optimiser"], stages.pop("update")
        busy = time.process_time() - busy
        return {**stages, "loss+backward": update - optimiser, "optimiser": optimiser, "processor": busy}

    def turn(self) -> dict[str, float]:
        """One step to warm up and one that counts."""
        self.step()
        return self.step()


def configuration(name: str, workload: Workload, folder: Path) -> dict[str, Any]:
    """The shipped objective on the workload, everything in one micro-batch."""
    shipped = yaml.safe_load((CONFIGS / OURS[name]).read_text(encoding="utf-8"))
    reward: dict[str, Any] = {"type": "function", "path": "benchmarks.workload:scattered"}
    if name == "token_likelihood":
        weights = {"right": 1, "wrong": -1}
        reward = {"type": "annotations", "labeller": "benchmarks.workload:marks", "weights": weights}
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in workload.texts()), encoding="utf-8")
    return {
        **{section: shipped[section] for section in ("trainer", "credit", "kl") if section in shipped},
        "name": name,
        "model": {"type": "pretrained", "path": str(folder / "model")},
        "data": {"type": "jsonl", "path": str(prompts), "held_out": 0.25},
        "rewards": {"reward": reward},
        "rollout": {
            "prompts": workload.prompts,
            "samples_per_prompt": workload.samples,
            "max_new_tokens": workload.new_tokens,
            "micro_batch": workload.rows,
        },
        "optimiser": {"learning_rate": RATE},
        "train": {"steps": 10**6, "micro_batch": workload.rows},
    }


def waiting(stopwatch: Any) -> Any:
    """A stopwatch that waits for the device at every lap."""

    class Waiting(stopwatch):  # type: ignore[misc]
        def lap(self, name: str) -> None:
            Clock.now()
            super().lap(name)

    return Waiting


class Theirs:
    """A trainer of trl: a turn is a training of two steps. It reports nowhere and writes nothing."""

    def __init__(self, name: str, workload: Workload, folder: Path) -> None:
        import trl
        from datasets import Dataset
        from transformers import AutoTokenizer, PrinterCallback

        more: dict[str, Any] = {"beta": 0.05} if name == "RLOOTrainer" else {"beta": 0.04, "loss_type": "grpo"}
        arguments = getattr(trl, name.replace("Trainer", "Config"))(
            output_dir=str(folder / name),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=workload.rows,
            num_generations=workload.samples,
            max_completion_length=workload.new_tokens,
            generation_kwargs={"min_new_tokens": workload.new_tokens},  # nothing ends early
            max_steps=2,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            dataloader_pin_memory=False,
            **more,
        )
        self.clock = Clock()
        self.trainer = getattr(trl, name)(
            model=str(folder / "model"),
            reward_funcs=scattered,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": text} for text in workload.texts()]),
            processing_class=AutoTokenizer.from_pretrained(folder / "model", padding_side="left"),
        )
        self.trainer.remove_callback(PrinterCallback)
        self.meter = Meter(workload, [self.trainer.model.base_model, self.trainer.ref_model.base_model])
        self.trainer.add_callback(_steps(self))
        self.clock.time(self.trainer.model, "generate", "sample")

    def turn(self) -> dict[str, float]:
        """One step to warm up and one that counts."""
        self.trainer.train()
        return dict(self.clock.seconds)


def _steps(trainer: Theirs) -> Any:
    """Starts clock and meter at the begin of every step, so that those of the last one stay."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *given: Any, **named: Any) -> None:
            trainer.clock.seconds.clear()
            trainer.meter.reset()
            self.started, self.busy = Clock.now(), time.process_time()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            trainer.clock.seconds["step"] = Clock.now() - self.started
            trainer.clock.seconds["processor"] = time.process_time() - self.busy

    return Steps()
