"""Train-time log-probs, KL and values against the model's own logits, for real architectures."""

import copy
from dataclasses import replace

import pytest
import torch
from models import (
    ARCHITECTURES,
    CHUNKED,
    COMPLETIONS,
    EOS,
    HIDDEN,
    PROMPTS,
    VOCAB,
    WHOLE,
    assert_same_gradients,
    build,
    gradients,
    make_policy,
    make_rollout,
    naive,
)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlkl import credit, losses
from rlkl.adapters import head_agrees
from rlkl.config import CreditConfig, KLConfig
from rlkl.policy import Policy
from rlkl.reduce import finish
from rlkl.tasks.tabular import random_tabular
from rlkl.types import PolicyOutput, TokenRewards

NEED = ("logp", "ref_logp", "entropy", "kl", "kl_forward")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
architectures = pytest.mark.parametrize("name", ARCHITECTURES)
chunked = pytest.mark.parametrize("name", CHUNKED)


def mixed(out: PolicyOutput | dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
    """A scalar that gives every differentiable output at every position a weight of its own."""
    total = torch.zeros(())
    for k, need in enumerate(n for n in NEED if n != "ref_logp"):
        x_BT = out[need] if isinstance(out, dict) else out.get(f"{need}_BT")
        generator = torch.Generator().manual_seed(k)
        weight_BT = torch.randn(len(PROMPTS), 16, generator=generator)
        if rows is not None:
            weight_BT = weight_BT[rows]
        total = total + (weight_BT[:, : x_BT.shape[1]] * x_BT).sum()
    return total


def assert_same_outputs(actual: PolicyOutput, expected: dict[str, Tensor]) -> None:
    for need in NEED:
        found, width = actual.get(f"{need}_BT"), expected[need].shape[1]
        torch.testing.assert_close(found[:, :width], expected[need], **CLOSE)
        assert not found[:, width:].any()


def as_dict(out: PolicyOutput) -> dict[str, Tensor]:
    return {need: out.get(f"{need}_BT") for need in NEED}


@architectures
def test_a_head_is_taken_apart_only_where_it_gives_the_models_logits(name):
    assert make_policy(name).chunked == (name in CHUNKED)


@pytest.mark.parametrize("name", WHOLE)
def test_soft_capping_and_scaling_are_seen_on_the_small_logits_of_an_untrained_model(name):
    changes = {"final_logit_softcapping": 30.0} if name == "gemma2" else {"logits_scaling": 1.1}
    model = build(name, noise=0.0, initializer_range=0.02, **changes)
    assert model(input_ids=torch.tensor([PROMPTS[0]])).logits.abs().max() < 0.5
    assert not head_agrees(model)


@chunked
def test_the_check_of_the_head_leaves_no_hook_behind(name):
    model = build(name)
    assert head_agrees(model)
    assert not model.get_output_embeddings()._forward_hooks


@architectures
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_outputs_equal_those_of_the_models_own_logits(name, temperature):
    expected = naive(build(name, 0), build(name, 1), temperature=temperature)
    out = make_policy(name)(make_rollout(temperature=temperature), NEED)
    assert_same_outputs(out, expected)
    for need in NEED:
        assert expected[need].abs().max() > 0.1


@architectures
def test_temperature_divides_policy_and_reference(name):
    cold, plain = (naive(build(name, 0), build(name, 1), temperature=t) for t in (0.7, 1.0))
    for need in NEED:
        assert (cold[need] - plain[need]).abs().max() > 0.01, "the comparison above could not see the temperature"


@architectures
@pytest.mark.parametrize("head_chunk", [1, 7, 1024])
def test_gradients_equal_the_naive_ones_whatever_the_chunk(name, head_chunk):
    model = build(name, 0)
    expected = gradients(mixed(naive(model, build(name, 1), temperature=0.7)), model)
    policy = make_policy(name, head_chunk=head_chunk)
    out = policy(make_rollout(temperature=0.7), NEED)
    assert_same_gradients(gradients(mixed(out), policy.model), expected)


@architectures
def test_the_gradient_of_logp_alone_equals_the_naive_one(name):
    model = build(name, 0)
    expected = gradients(naive(model, model)["logp"].sum(), model)
    policy = make_policy(name)
    assert_same_gradients(gradients(policy(make_rollout(), {"logp"}).get("logp_BT").sum(), policy.model), expected)


@architectures
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_stays_on_and_changes_no_gradient(name):
    plain, model = build(name, 0), build(name, 0).train()
    expected = gradients(mixed(naive(plain, build(name, 1))), plain)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, reference=build(name, 1))
    layer, calls = (model.base_model.h if name == "gpt2" else model.base_model.layers)[0], []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(mixed(policy(make_rollout(), NEED)), policy.model)
    assert len(calls) == 2, "a layer runs again in the backward pass"
    assert_same_gradients(found, expected)


@architectures
@pytest.mark.parametrize("head_chunk", [1, 7, 1024])
def test_values_do_not_depend_on_the_chunk(name, head_chunk):
    expected = naive(build(name, 0), build(name, 1))
    assert_same_outputs(make_policy(name, head_chunk=head_chunk)(make_rollout(), NEED), expected)


@architectures
@pytest.mark.parametrize("need", NEED)
def test_an_output_alone_equals_the_one_computed_with_the_others(name, need):
    policy, rollout = make_policy(name), make_rollout()
    alone = policy(rollout, {need})
    torch.testing.assert_close(alone.get(f"{need}_BT"), policy(rollout, NEED).get(f"{need}_BT"), **CLOSE)
    assert all(getattr(alone, f"{other}_BT") is None for other in NEED if other != need)


@architectures
@pytest.mark.parametrize(("wider", "fill"), [(0, 17), (1, EOS), (5, EOS), (9, 0), (9, VOCAB - 1), (2, -100)])
def test_padding_changes_nothing(name, wider, fill):
    policy = make_policy(name)
    exact = policy(make_rollout(), NEED)
    padded = policy(make_rollout(wider=wider, fill=fill), NEED)
    assert padded.get("logp_BT").shape[1] == max(map(len, COMPLETIONS)) + wider
    assert_same_outputs(padded, as_dict(exact))
    one, two = (gradients(mixed(out), policy.model) for out in (padded, exact))
    assert_same_gradients(one, two)


@architectures
def test_row_order_changes_nothing(name):
    policy, rollout, order = make_policy(name), make_rollout(), torch.tensor([2, 0, 3, 1])
    out = policy(rollout, NEED)
    turned = policy(rollout.rows(order), NEED)
    assert_same_outputs(turned, as_dict(out.rows(order)))
    expected = gradients(mixed(out), policy.model)
    assert_same_gradients(gradients(mixed(turned, order), policy.model), expected)


@architectures
@pytest.mark.parametrize("split", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[3, 1], [2, 0]]])
def test_micro_batches_add_up_to_the_batch(name, split):
    policy, rollout = make_policy(name), make_rollout()
    whole = policy(rollout, NEED)
    expected = gradients(mixed(whole), policy.model)
    for rows in map(torch.tensor, split):
        part = policy(rollout.rows(rows), NEED)
        assert_same_outputs(part, as_dict(whole.rows(rows)))
        mixed(part, rows).backward()
    assert_same_gradients({n: p.grad for n, p in policy.model.named_parameters()}, expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "granite"])
def test_a_pad_id_equal_to_eos_changes_nothing(name):
    """A padding index of the embedding would take the gradient from the row of EOS."""
    plain, padded = build(name), build(name, pad_token_id=EOS)
    padded.load_state_dict(plain.state_dict())
    assert padded.get_input_embeddings().padding_idx == EOS
    policy = Policy(padded, reference=build(name, 1, pad_token_id=EOS))
    for model in (policy.model, policy.reference):
        assert model.get_input_embeddings().padding_idx is None
    policy.reference.load_state_dict(build(name, 1).state_dict())
    out = policy(make_rollout(fill=EOS, wider=2), NEED)
    expected = naive(plain, build(name, 1))
    assert_same_outputs(out, expected)
    found = gradients(mixed(out), policy.model)
    assert found["model.embed_tokens.weight"][EOS].abs().max() > 0.01
    assert_same_gradients(found, gradients(mixed(expected), plain))


@architectures
def test_dropout_is_off_in_train_mode_too(name):
    model = build(name).train()
    ids = torch.tensor([PROMPTS[2]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits), "there was no dropout"
    policy = Policy(model, reference=build(name, 1).train())
    assert policy.model.training and policy.reference.training
    one, two = (policy(make_rollout(), NEED) for _ in range(2))
    for need in NEED:
        assert torch.equal(one.get(f"{need}_BT"), two.get(f"{need}_BT"))
    assert policy.model.training and policy.reference.training
    assert_same_outputs(one, naive(build(name, 0), build(name, 1)))


@architectures
def test_evaluation_mode_stays_as_it_was(name):
    policy = Policy(build(name))
    policy(make_rollout(), NEED)
    assert not policy.model.training and not policy.reference.training


@architectures
@pytest.mark.parametrize("grad", [True, False])
def test_kl_is_zero_bit_for_bit_at_the_start(name, grad):
    policy = Policy(build(name).train(), head_chunk=3)
    with torch.set_grad_enabled(grad):
        out = policy(make_rollout(temperature=0.7), NEED)
    assert not out.get("kl_BT").any() and not out.get("kl_forward_BT").any()
    assert torch.equal(out.get("logp_BT"), out.get("ref_logp_BT"))
    assert out.get("kl_BT").requires_grad == grad


@architectures
def test_the_reference_is_a_snapshot_that_never_moves(name):
    model = build(name)
    with torch.no_grad():  # not the weights of any file
        for parameter in model.parameters():
            parameter.add_(0.05)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    policy, rollout = Policy(model), make_rollout()
    start = policy(rollout, NEED)
    optimiser = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        mixed(policy(rollout, NEED)).backward()
        optimiser.step()
    for key, value in policy.reference.state_dict().items():
        assert torch.equal(value, before[key])
    after = policy(rollout, NEED)
    assert torch.equal(after.get("ref_logp_BT"), start.get("ref_logp_BT"))
    assert after.get("kl_BT").detach().sum() > 0.1
    assert not torch.equal(after.get("logp_BT"), start.get("logp_BT"))


@architectures
def test_the_reference_has_no_gradient(name):
    policy = make_policy(name)
    out = policy(make_rollout(), NEED)
    assert not out.get("ref_logp_BT").requires_grad
    mixed(out).backward()
    for parameter in policy.reference.parameters():
        assert not parameter.requires_grad and parameter.grad is None
    assert all(p.grad is not None for p in policy.model.parameters())


class Widest(TorchDispatchMode):
    """Records float tensors with a vocabulary axis: the most rows that one has, and which are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.seen = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            # Weights of the head and their gradients have both axes, V and D.
            if isinstance(x, Tensor) and x.is_floating_point() and VOCAB in x.shape and HIDDEN not in x.shape:
                self.rows = max(self.rows, x.numel() // VOCAB)
                self.seen.append((StorageWeakRef(x.untyped_storage()), x.numel() // VOCAB))
        return out

    def alive(self) -> int:
        return sum(rows for storage, rows in self.seen if not storage.expired())


def watched(policy: Policy) -> tuple[int, int, int]:
    """Most rows of V in one tensor, in the forward and over all, and rows kept between forward and backward."""
    with Widest() as widest:
        loss = mixed(policy(make_rollout(), NEED))
        forward, kept = widest.rows, widest.alive()
        loss.backward()
    return forward, widest.rows, kept


@chunked
@pytest.mark.parametrize("head_chunk", [1, 4])
def test_no_tensor_over_the_vocabulary_has_more_rows_than_a_chunk(name, head_chunk):
    assert watched(make_policy(name, head_chunk=head_chunk)) == (head_chunk, head_chunk, 0)


@chunked
def test_only_completion_positions_pass_the_head(name):
    """With one big chunk there is a row a completion token, none for prompts and padding."""
    tokens = sum(map(len, COMPLETIONS))
    assert watched(make_policy(name)) == (tokens, tokens, 0)


@pytest.mark.parametrize("name", WHOLE)
def test_the_watch_sees_whole_logits_where_the_models_own_forward_is_used(name):
    width = max(len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True))
    assert watched(make_policy(name, head_chunk=4))[0] == width * len(PROMPTS)


@architectures
def test_outputs_of_a_bfloat16_model_are_fp32(name):
    policy = Policy(build(name).to(torch.bfloat16), value_head=name in CHUNKED)
    need = {*NEED, "value"} if name in CHUNKED else {*NEED}
    out = policy(make_rollout(), need)
    for field in need:
        assert out.get(f"{field}_BT").dtype == torch.float32
    assert out.get("kl_BT").abs().max() <= 1e-4 and out.get("kl_forward_BT").abs().max() <= 1e-4
    # Not only the dtype: numbers of bfloat16 have the last 16 bits at zero, and probabilities add up to one.
    logp = out.get("logp_BT")
    assert not torch.equal(logp, logp.to(torch.bfloat16).float())
    assert torch.allclose(logp, naive(build(name), build(name))["logp"], atol=0.5)


def test_outputs_of_a_float64_table_stay_float64():
    policy = Policy(random_tabular(3, 4, 0), reference=random_tabular(3, 4, 1))
    prompts, completions = [[0], [1, 2]], [[2, 1, 0], [0, 2]]
    out = policy(make_rollout(prompts, completions, temperature=0.7), NEED)
    policy.model.eval()
    for field in NEED:
        assert out.get(f"{field}_BT").dtype == torch.float64
    for i, (prompt, tokens) in enumerate(zip(prompts, completions, strict=True)):
        logits = policy.model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)[torch.arange(len(tokens)), tokens]
        torch.testing.assert_close(out.get("logp_BT")[i, : len(tokens)], expected, rtol=1e-14, atol=1e-14)


@chunked
def test_values_start_at_zero_and_reach_only_the_head(name):
    policy = Policy(build(name), value_head=True)
    out = policy(make_rollout(), {"value"})
    assert not out.get("value_BT").any() and not out.get("bootstrap_B").any()
    (out.get("value_BT").sum() + out.get("bootstrap_B").sum()).backward()
    assert not any(p.grad.any() for p in policy.model.parameters() if p.grad is not None)
    assert policy.value_head.weight.grad.abs().max() > 0.1
    assert policy.value_head.bias.grad.item() == sum(map(len, COMPLETIONS)) + len(COMPLETIONS)


@chunked
@pytest.mark.parametrize("wider", [0, 3])
def test_values_belong_to_the_state_before_each_token_and_the_bootstrap_to_the_one_after_the_last(name, wider):
    policy, model = Policy(build(name), value_head=True), build(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        policy.value_head.weight.copy_(torch.randn(1, HIDDEN, generator=generator))
        policy.value_head.bias.fill_(0.3)
    rollout = make_rollout(wider=wider, fill=EOS)
    out = policy(rollout, {"value", "logp"})
    head = copy.deepcopy(policy.value_head)
    total = torch.zeros(())
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = torch.tensor([[*prompt, *tokens]])
        # The last of hidden_states is what the output embedding reads.
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        value = head(hidden).squeeze(-1)
        first, count = len(prompt) - 1, len(tokens)
        torch.testing.assert_close(out.get("value_BT")[i, :count], value[first : first + count], **CLOSE)
        torch.testing.assert_close(out.get("bootstrap_B")[i], value[first + count], **CLOSE)
        assert not out.get("value_BT")[i, count:].any()
        total = total + value[first : first + count].sin().sum() + value[first + count].sin()
    mask = rollout.policy_mask_BT
    loss = (out.get("value_BT").sin() * mask).sum() + out.get("bootstrap_B").sin().sum()
    loss.backward()
    total.backward()
    found = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected)
    torch.testing.assert_close(policy.value_head.weight.grad, head.weight.grad, rtol=1e-4, atol=1e-4)


def test_values_do_not_change_the_log_probs():
    plain, valued = make_policy("llama"), make_policy("llama", value_head=True)
    expected = as_dict(plain(make_rollout(), NEED))
    assert_same_outputs(valued(make_rollout(), {*NEED, "value"}), expected)


@pytest.mark.parametrize("make", [lambda: random_tabular(3, 4, 0), *(lambda n=n: build(n) for n in WHOLE)])
def test_a_value_head_without_a_trunk_is_refused_with_a_remedy(make):
    with pytest.raises(ValueError, match=r"(TabularLM|Gemma2|Granite)\w*: .*hidden states.*baseline"):
        Policy(make(), value_head=True)


def test_a_given_reference_is_used_and_frozen():
    other = build("llama", 1).train()
    policy = Policy(build("llama", 0), reference=other)
    assert policy.reference is other
    assert not any(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize(("ours", "theirs"), [("llama", "granite"), ("gemma2", "gpt2"), ("gpt2", "gemma2")])
def test_a_reference_of_another_architecture_speaks_through_its_own_head(ours, theirs):
    policy = Policy(build(ours, 0), reference=build(theirs, 1))
    assert_same_outputs(policy(make_rollout(), NEED), naive(build(ours, 0), build(theirs, 1)))


@pytest.mark.parametrize("normaliser", ["sequence", "token_mean", "sequence_mean"])
def test_weights_of_a_batch_hold_the_normaliser_of_the_whole_batch(normaliser):
    """So a loss over micro-batches adds up to the whole batch's, in value and gradient."""
    policy, rollout = make_policy("llama"), make_rollout()
    mask = rollout.policy_mask_BT.clone()
    mask[0, 1] = False  # an environment's token
    rollout = replace(rollout, policy_mask_BT=mask)
    reward = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    scored = policy(rollout, {"logp", "ref_logp"})
    cfg = CreditConfig(baseline="none", normaliser=normaliser)
    batch, _ = credit.assign(rollout, TokenRewards(reward, mask), scored, cfg, KLConfig(beta=0.1), 0.1)
    counts = mask.sum(-1, keepdim=True)
    expected = {"sequence": 1 / len(mask), "token_mean": 1 / mask.sum(), "sequence_mean": 1 / (counts * len(mask))}
    torch.testing.assert_close(batch.weight_BT, mask * torch.as_tensor(expected[normaliser]).expand_as(reward))
    assert float(batch.tokens) == mask.sum()

    out = policy(rollout, {"logp"})
    whole, report = losses.policy_gradient(out.get("logp_BT"), batch.adv_BT, batch.weight_BT)
    truth = gradients(whole, policy.model)
    total, parts = torch.zeros(()), {}
    for rows in torch.tensor([[3, 0, 1]]), torch.tensor([[2]]):
        part = batch.rows(rows[0])
        assert float(part.tokens) == mask.sum()
        logp = policy(rollout.rows(rows[0]), {"logp"}).get("logp_BT")
        loss, more = losses.policy_gradient(logp, part.adv_BT, part.weight_BT)
        loss.backward()
        total = total + loss.detach()
        parts = {k: (parts[k][0] + s, parts[k][1] + n) if k in parts else (s, n) for k, (s, n) in more.items()}
    torch.testing.assert_close(total, whole.detach(), **CLOSE)
    assert_same_gradients({n: p.grad for n, p in policy.model.named_parameters()}, truth)
    assert finish(parts) == pytest.approx(finish(report), rel=1e-5)


def test_metrics_of_parts_are_divided_once_after_adding():
    pairs = {"b": (torch.tensor(6.0) + 1.0, torch.tensor(3.0) + 1.0), "a": (torch.tensor(2.0), torch.tensor(8.0))}
    assert finish(pairs) == {"a": 0.25, "b": 7 / 4}
    assert finish({"none": (torch.tensor(0.0), torch.tensor(0.0))}) == {"none": 0.0}
    assert finish({}) == {}


@pytest.mark.parametrize("name", WHOLE)
def test_a_separate_critic_needs_a_trunk_alone(name):
    policy = make_policy(name, value_head=True, separate_critic=True)
    rollout = make_rollout()
    with torch.no_grad():
        policy.value_head.weight.fill_(0.1)
    value_BT = policy(rollout, {"value", "logp"}).get("value_BT")
    value_BT.sum().backward()
    touched = {key.split(".")[0] for key, p in policy.named_parameters() if p.grad is not None}
    assert touched == {"critic", "value_head"}
    assert float(value_BT.detach().abs().max()) > 0
