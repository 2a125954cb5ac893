"""A lane: all the state of one run, and how it is built from its configuration."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rlkl import models, moved, pairs, recording, rewards, sharding, tracking
from rlkl.config import Config
from rlkl.data import stored
from rlkl.data.prompts import PromptSet, records
from rlkl.data.stored import Stored
from rlkl.policy import Policy
from rlkl.rewards import WeightedSum
from rlkl.sampling import ALTERNATIVES, EVALUATE, MINIBATCHES, TRAIN, Prompts, permutation, sample, uniforms
from rlkl.trainers import TRAINERS
from rlkl.types import Need, Rollout, Trainer

STATE = ("step", "beta", "ema", "generated", "queries", "labels", "seconds", "due", "base")


@dataclass
class Lane:
    """All the state of one run.

    ``step`` is the last one done, ``saved`` that of the newest checkpoint. ``judge`` are the sources that can judge
    new samples; ``marked`` is the fixed set on which the run measures what annotations moved. ``due`` is the row of the
    last step, while its evaluation is not done. ``base`` are mean and standard deviation of what every source gave the
    ``untrained`` policy's held-out samples.
    """

    config: Config
    policy: Policy
    tokenizer: Any
    trainer: Trainer
    reward: WeightedSum
    judge: WeightedSum | None
    train_prompts: PromptSet
    held_out: Prompts
    eos_ids: list[int]
    optimiser: torch.optim.Optimizer
    beta: float
    ema: float | None = None
    generated: int = 0
    queries: int = 0
    labels: int = 0
    base: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0
    due: dict[str, float] | None = None
    step: int = 0
    saved: int = 0
    forward: Any = None
    rank: int = 0
    ranks: int = 1
    signature: recording.Signature | None = None
    stored: Stored | None = None
    marked: moved.Marked | None = None
    held_pairs: Rollout | None = None
    untrained: Rollout | None = None

    def place(self, accelerator: Accelerator) -> None:
        """Move to the accelerator's device. ``forward`` is the prepared policy, the only one to be called."""
        if self.config.train.shard:
            self.forward, self.optimiser = sharding.place(self.policy, self.optimiser, accelerator)
        else:
            self.forward, self.optimiser = accelerator.prepare(self.policy, self.optimiser)
        self.reward.bind(self.forward)
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        if self.stored is not None:
            held = recording.share(self.stored.held, self.rank, self.ranks).to(accelerator.device)
            if held.pair_B is None:
                self.marked = moved.stored(held)
            else:
                self.held_pairs = held

    def state(self) -> dict[str, Any]:
        """What changes from step to step beside weights, optimiser and rewards: plain numbers."""
        return {name: getattr(self, name) for name in STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        for name in STATE:
            setattr(self, name, state[name])
        self.saved = self.step

    def minibatches(self, rollout: Rollout, step: int, epoch: int) -> Iterator[tuple[Tensor, float]]:
        """Rows of this process in each update of a pass, and what their weights are multiplied by.

        Completions are dealt out by a permutation of the whole batch, the same whatever the processes. A process
        without a row in some minibatch takes part with one of weight 0, so that gradients can meet. Where there are
        preference pairs, their two rows stand together and completions in no pair are left out.
        """
        count = self.trainer.minibatches
        if count == 1:
            yield (torch.arange(len(rollout)), 1.0) if rollout.pair_B is None else pairs.adjacent(rollout.pair_B)
            return
        rollouts = self.config.rollout
        total = rollouts.prompts * self.config.samples
        place = torch.tensor(permutation(self.config.seed, MINIBATCHES + epoch, step, total))
        place_B = place.to(rollout.sample_id_B.device)[rollout.sample_id_B]
        for k in range(count):
            rows = (place_B % count == k).nonzero().squeeze(1).cpu()
            yield (rows, float(count)) if len(rows) else (torch.zeros(1, dtype=torch.long), 0.0)

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device

    @property
    def score_need(self) -> set[Need]:
        """What the policy at sampling must tell credit and KL."""
        needed: set[Need] = {"logp", "ref_logp"}
        if self.config.needs_value:
            needed.add("value")
        return needed


def build(config: Config) -> Lane:
    """A lane from its configuration; nothing is written but the cache of embedded models.

    Raises:
        ValueError: the data, model or a reward cannot be used as configured.
    """
    reward = rewards.build(config.rewards)
    train_rows, held_rows = records(config.data, config.seed)
    model, reference, tokenizer = models.load(config.model, train_rows, config.seed)
    rewards.check(reward, tokenizer)
    context, length = models.context_length(model), config.rollout.max_new_tokens
    train_prompts, held = (
        PromptSet.tokenise(rows, tokenizer, config.seed, context, length, config.data)
        for rows in (train_rows, held_rows)
    )
    train_prompts = replace(train_prompts, dropped=train_prompts.dropped + held.dropped)
    eos_ids = models.eos_ids(model, tokenizer)
    completions = stored.build(config, train_prompts, held, eos_ids) if config.offline else None
    held = stored.asked(held) if config.offline else held
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(
        model,
        reference=reference,
        value_head=config.needs_value,
        separate_critic=config.model.critic == "separate",
        head_chunk=config.train.head_chunk,
    ).train()
    reward.bind(policy)
    trained = [p for p in policy.parameters() if p.requires_grad]
    o = config.optimiser
    lane = Lane(
        config=config,
        policy=policy,
        tokenizer=tokenizer,
        trainer=TRAINERS[config.trainer.type](config),
        reward=reward,
        judge=rewards.judges(reward) if config.offline else reward,
        train_prompts=train_prompts,
        held_out=held.take(range(min(config.evaluate.prompts, len(held.ids)))),
        eos_ids=eos_ids,
        optimiser=torch.optim.AdamW(trained, lr=o.learning_rate, weight_decay=o.weight_decay, betas=o.betas),
        beta=config.kl.beta,
        signature=recording.check(config, train_prompts),
        stored=completions,
    )
    if lane.judge is not None:
        lane.judge.probe(draw(lane, lane.held_out.first(4), step=0, stream=EVALUATE))
    return lane


def collect(lane: Lane, step: int) -> Rollout:
    """The training samples of a step, of this process: sampled, and recorded if asked; or stored; or replayed."""
    config, device = lane.config, lane.device
    if lane.stored is not None:
        whole = lane.stored.batch(step, config.rollout.prompts)
        rollout = recording.share(whole, lane.rank, lane.ranks).to(device)
    elif config.rollout.replay is not None:
        whole = recording.load(Path(config.rollout.replay), step, lane.signature, lane.tokenizer)
        rollout = recording.share(whole, lane.rank, lane.ranks).to(device)
    else:
        prompts = lane.train_prompts.batch(step, config.rollout.prompts)
        rollout = draw(lane, prompts.part(lane.rank, lane.ranks), step)
    if config.rollout.record and lane.signature is not None:
        parts = gather_object([replace(rollout.to(torch.device("cpu")), decode=None)])
        if lane.rank == 0:
            recording.save(recording.joined(parts), tracking.run_folder(config), step, lane.signature)
    if "alt_logp" in lane.trainer.need:
        width = rollout.tokens_BT.shape[1]
        u_BT = uniforms(config.seed, ALTERNATIVES, step, rollout.sample_id_B, width)
        rollout = replace(rollout, alt_u_BT=u_BT.to(device))
    return rollout


def draw(lane: Lane, prompts: Prompts, step: int, stream: int = TRAIN) -> Rollout:
    """The samples of a step."""
    config = lane.config.rollout
    return sample(
        lane.forward or lane.policy,
        prompts,
        samples_per_prompt=config.samples_per_prompt,
        max_new_tokens=config.max_new_tokens,
        eos_ids=lane.eos_ids,
        stop=config.stop,
        seed=lane.config.seed,
        step=step,
        stream=stream,
        temperature=config.temperature,
        micro_batch=config.micro_batch,
    )
