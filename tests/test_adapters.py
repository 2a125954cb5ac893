"""LoRA, references, precision and checkpointing through the one wrapper."""

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import Tree, metrics
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rlkl
from rlkl import exact
from rlkl.adapters import FROZEN, TRAINED
from rlkl.config import KLConfig
from rlkl.policy import Policy
from rlkl.runs import evaluate_run, export_run

V, T = 5, 2


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).double()


def adapted(model: Any, identity: bool = True, targets: Any = "all-linear", **kwargs: Any) -> Any:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=identity, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    return get_peft_model(model, config, autocast_adapter_dtype=False, **kwargs)


def move(policy: Policy) -> None:
    """Change what trains."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


ATOMS = exact.enumerate_completions([1], V, T)
NEED: Any = {"logp", "ref_logp", "kl", "kl_forward", "entropy"}


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_the_reference_of_an_adapter_is_the_start_and_stays(identity: bool, targets: Any) -> None:
    model = adapted(llama(), identity, targets)
    start = Policy(copy.deepcopy(model).merge_and_unload())(ATOMS, {"logp"}).get("logp_BT")
    policy = Policy(model)
    before = policy(ATOMS, NEED)
    assert not before.get("kl_BT").any()
    assert (FROZEN in model.peft_config) != identity  # off where that is the same function, else a frozen copy
    move(policy)
    after = policy(ATOMS, NEED)
    assert torch.equal(after.get("ref_logp_BT"), before.get("ref_logp_BT"))
    assert torch.allclose(after.get("ref_logp_BT"), start, atol=1e-6)
    assert float(after.get("kl_BT").detach().min()) > 1e-4
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all(f".{TRAINED}." in name for name in trained)


@pytest.mark.parametrize("identity", [True, False])
def test_gradients_reach_the_adapter_and_nothing_else(identity: bool) -> None:
    policy = Policy(adapted(llama(), identity))
    move(policy)
    out = policy(ATOMS, NEED)
    (out.get("logp_BT").sum() + out.get("kl_BT").sum()).backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_lora_equals_its_merged_weights() -> None:
    policy = Policy(adapted(llama()))
    move(policy)
    ours = policy(ATOMS, {"logp", "entropy"})
    theirs = Policy(copy.deepcopy(policy.model).merge_and_unload())(ATOMS, {"logp", "entropy"})
    assert torch.allclose(ours.get("logp_BT"), theirs.get("logp_BT"), atol=1e-6)
    assert torch.allclose(ours.get("entropy_BT"), theirs.get("entropy_BT"), atol=1e-6)


def test_lora_on_a_tied_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.lora\.targets: names the output embedding.*ties"):
        Policy(adapted(llama(tied=True), targets=["q_proj", "lm_head"]))


def test_a_reference_with_another_vocabulary_is_refused() -> None:
    other = LlamaForCausalLM(LlamaConfig(vocab_size=V + 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"has 6 tokens, the policy's 5"):
        Policy(llama(), reference=other)


@pytest.mark.parametrize("variant", ["lora", "checkpointing", "one position a chunk"])
def test_the_oracle_holds_through(variant: str) -> None:
    """The expected gradient of REINFORCE with k1 in the reward is the exact one."""
    model = adapted(llama()) if variant == "lora" else llama()
    if variant == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, head_chunk=1 if variant == "one position a chunk" else 1024).train()
    move(policy)
    problem = oracle.Problem(policy, oracle.numbered(ATOMS))
    reward_N = torch.linspace(-1, 1, len(ATOMS), dtype=torch.float64).sin()
    logp_N, ref_N = exact.sequence_logp(policy, ATOMS)
    truth = exact.flat_gradient(policy, exact.objective(logp_N, ref_N, reward_N, 0.3))
    with torch.no_grad():
        law_N = logp_N.exp()
    penalised = oracle.PLAIN, KLConfig(beta=0.3)
    estimate = oracle.expected_gradient(problem, oracle.terminal(ATOMS, reward_N), *penalised, probability_N=law_N)
    oracle.assert_close(estimate, truth, oracle.TRANSFORMER)


def test_bfloat16_is_within_its_rounding() -> None:
    """Weights that bfloat16 can hold give the same log-probs to bfloat16's rounding, and KL 0 at the start."""
    wide = llama().bfloat16().float()
    narrow = copy.deepcopy(wide).bfloat16()
    ours, theirs = Policy(narrow)(ATOMS, NEED), Policy(wide)(ATOMS, NEED)
    assert ours.get("logp_BT").dtype == torch.float32
    assert float(ours.get("kl_BT").detach().abs().max()) <= 1e-4
    scale = float(theirs.get("logp_BT").detach().abs().max())
    assert torch.allclose(ours.get("logp_BT"), theirs.get("logp_BT"), atol=2**-6 * scale)


# Runs.


def test_a_lora_run_trains_saves_and_reads_back(tiny_config: Tree, tiny_model: Path, tmp_path: Path) -> None:
    tiny_config["model"]["lora"] = {"rank": 4, "alpha": 8}
    tiny_config["optimiser"]["learning_rate"] = 0.05
    run = rlkl.train(tiny_config)
    last = metrics(run)[-1]
    assert last["kl/sequence"] > 0
    assert not (run / "reference").exists()  # the base with the adapter off
    tuned = AutoPeftModelForCausalLM.from_pretrained(run / "final")
    assert tuned.peft_config[TRAINED].r == 4
    assert evaluate_run(run, None, None, None)["kl/sequence"] == pytest.approx(last["kl/sequence"], rel=1e-5)
    export_run(run, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(6)[None]
    assert torch.allclose(merged(ids).logits, tuned(ids).logits, atol=1e-4)
    export_run(run, tmp_path / "adapter", merge=False)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="not empty"):
        export_run(run, tmp_path / "merged", merge=True)
    for folder in ("/proc/merged", "x" * 300):
        with pytest.raises(ValueError, match=rf"^{folder}: cannot be written \(.*\); name another folder$"):
            export_run(run, folder, merge=True)


def test_a_loaded_adapter_trains_on_against_a_frozen_copy(tiny_config: Tree) -> None:
    tiny_config["model"]["lora"] = {"rank": 2, "alpha": 4}
    tiny_config["optimiser"]["learning_rate"] = 0.05
    first = rlkl.train(tiny_config, ["name=first"])
    tiny_config["model"] = {"type": "pretrained", "path": str(first / "final")}
    second = rlkl.train(tiny_config, ["name=second"])
    rows = metrics(second)
    assert rows[0]["kl/sequence"] == 0 and rows[-1]["kl/sequence"] > 0
    assert rows[0]["reward/eval/varied"] == pytest.approx(metrics(first)[-1]["reward/eval/varied"])
    assert (second / "reference" / FROZEN / "adapter_config.json").is_file()
    assert evaluate_run(second, None, None, None)["kl/sequence"] == pytest.approx(rows[-1]["kl/sequence"], rel=1e-5)


def test_a_reference_from_a_path_makes_kl_count_from_there(tiny_config: Tree) -> None:
    tiny_config["optimiser"]["learning_rate"] = 0.05
    first = rlkl.train(tiny_config, ["name=first"])
    tiny_config["model"]["reference"] = str(first / "final")
    second = rlkl.train(tiny_config, ["name=second"])
    rows = metrics(second)
    assert rows[0]["kl/sequence"] > 0
    assert not (second / "reference").exists()
    assert evaluate_run(second, None, None, None)["kl/sequence"] == pytest.approx(rows[-1]["kl/sequence"], rel=1e-5)


def test_a_separate_critic_leaves_the_trunk_to_the_policy(tiny_config: Tree) -> None:
    tiny_config["credit"] = {"baseline": "value"}
    tiny_config["model"]["critic"] = "separate"
    from rlkl import settings
    from rlkl.lane import build

    policy = build(settings.load(tiny_config)).policy
    rollout = exact.enumerate_completions([1], 3, 2)
    with torch.no_grad():
        policy.value_head.weight.fill_(0.1)
    policy(rollout, {"value"}).get("value_BT").sum().backward()
    touched = {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None}
    assert touched == {"critic", "value_head"}
    assert rlkl.train(tiny_config).is_dir()


@pytest.mark.parametrize("keys", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "lora": {"rank": 2, "alpha": 4}}])
def test_bfloat16_weights_train(keys: Tree, tiny_config: Tree) -> None:
    tiny_config["model"].update(keys)
    tiny_config["optimiser"]["learning_rate"] = 0.05
    rows = metrics(rlkl.train(tiny_config))
    assert rows[0]["kl/sequence"] <= 1e-4 and rows[-1]["kl/sequence"] > 0


def test_mixed_precision_computes_in_bfloat16(tiny_config: Tree) -> None:
    plain = metrics(rlkl.train(tiny_config, ["name=plain"]))
    mixed = metrics(rlkl.train(tiny_config, ["name=mixed", "train.mixed_precision=bf16"]))
    assert plain[1]["policy/grad_norm"] != mixed[1]["policy/grad_norm"]
    assert mixed[0]["kl/sequence"] <= 1e-4


@pytest.mark.parametrize("keys", [{}, {"lora": {"rank": 2, "alpha": 4}}])
def test_gradient_checkpointing_changes_nothing(keys: Tree, tiny_config: Tree) -> None:
    tiny_config["model"].update(keys)
    plain = metrics(rlkl.train(tiny_config, ["name=plain"]))
    saved = metrics(rlkl.train(tiny_config, ["name=saved", "train.gradient_checkpointing=true"]))
    for ours, theirs in zip(plain, saved, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6, nan_ok=True)


def test_unknown_targets_are_refused_with_what_there_is(tiny_config: Tree) -> None:
    tiny_config["model"]["lora"] = {"targets": ["qproj"]}
    with pytest.raises(ValueError, match=r"model\.lora\.targets=\['qproj'\].*q_proj"):
        rlkl.train(tiny_config)
