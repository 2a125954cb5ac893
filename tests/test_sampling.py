"""Samples have the model's probabilities, at whatever padding, batch and order, and say how they ended."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, EOS, PROMPTS, VOCAB, build, make_policy, make_rollout, next_logp
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rlkl.data.prompts import PromptSet
from rlkl.models import eos_ids, ignored_sampling
from rlkl.policy import DecodeState, Policy
from rlkl.sampling import EVALUATE, Prompts, inverse_cdf, pad, sample, uniforms
from rlkl.tasks.tabular import TabularLM, random_tabular
from rlkl.types import End, Rollout

GROUPS = range(len(PROMPTS))
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def drawn(policy: Policy, prompts: Prompts | None = None, **options) -> Rollout:
    chosen = {"samples_per_prompt": 3, "max_new_tokens": 8, "eos_ids": [EOS], "seed": 0, "step": 1} | options
    return sample(policy, Prompts(PROMPTS, GROUPS) if prompts is None else prompts, **chosen)


def by_sample(rollout: Rollout) -> dict[int, tuple[list[int], int, list[float]]]:
    """Tokens, end and behaviour log-probs of every sample, by its id."""
    ids, ends, logps = rollout.completion_ids(), rollout.end_B.tolist(), rollout.behaviour_logp_BT.tolist()
    rows = zip(rollout.sample_id_B.tolist(), ids, ends, logps, strict=True)
    return {i: (tokens, end, logp[: len(tokens)]) for i, tokens, end, logp in rows}


def assert_same_samples(one: Rollout, two: Rollout) -> None:
    """The same tokens and ends, and log-probs up to rounding, for the sample ids that both have."""
    a, b = by_sample(one), by_sample(two)
    common = a.keys() & b.keys()
    assert common
    for i in common:
        assert a[i][:2] == b[i][:2]
        assert a[i][2] == pytest.approx(b[i][2], rel=1e-4, abs=1e-5)


def tabular_policy(seed: int = 0) -> Policy:
    return Policy(random_tabular(3, 4, seed, scale=1.5))


def tree(model: TabularLM, prompt: tuple[int, ...], length: int, ends: tuple[int, ...], temperature: float) -> dict:
    """Probabilities of all completions, from the model's logits after every prefix."""
    law, frontier = {}, {(): 1.0}
    for _ in range(length):
        grown = {}
        for prefix, mass in frontier.items():
            logits = model(input_ids=torch.tensor([[*prompt, *prefix]])).logits[0, -1].detach().numpy() / temperature
            p = np.exp(logits - logits.max())
            for token, share in enumerate(p / p.sum()):
                target = law if token in ends else grown
                target[(*prefix, token)] = mass * share
        frontier = grown
    law |= frontier
    assert math.isclose(sum(law.values()), 1.0, rel_tol=1e-12)
    return law


def chi_square(counts: Counter, law: dict) -> float:
    """p-value of the counts under the law; rare outcomes are put together."""
    assert counts.keys() <= law.keys()
    total = sum(counts.values())
    common = [y for y in law if total * law[y] >= 5]
    seen, expected = [counts[y] for y in common], [total * law[y] for y in common]
    if total - sum(expected) > 1e-6:
        seen, expected = [*seen, total - sum(seen)], [*expected, total - sum(expected)]
    return float(stats.chisquare(seen, expected).pvalue)


@pytest.mark.parametrize("ends", [(), (2,)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_law_of_a_table(temperature, ends):
    policy = tabular_policy()
    rollout = drawn(
        policy,
        Prompts([[1]], [0]),
        samples_per_prompt=5000,
        max_new_tokens=2,
        eos_ids=ends,
        temperature=temperature,
        micro_batch=5000,
    )
    counts = Counter(map(tuple, rollout.completion_ids()))
    law = tree(policy.model, (1,), 2, ends, temperature)
    assert len(law) == (7 if ends else 9)
    assert chi_square(counts, law) > 1e-3
    wrong = tree(policy.model, (1,), 2, ends, 1.7 - temperature)
    assert chi_square(counts, wrong) < 1e-6, "the test could not see the temperature"
    # Behaviour log-probs add up to those of the law.
    for tokens, _, logps in by_sample(rollout).values():
        assert sum(logps) == pytest.approx(math.log(law[tuple(tokens)]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_next_tokens_follow_the_law_of_a_llama(temperature):
    policy, prompts = Policy(build("llama")), [PROMPTS[0], PROMPTS[2]]
    rollout = drawn(
        policy, Prompts(prompts, [0, 1]), samples_per_prompt=4000, max_new_tokens=1, temperature=temperature
    )
    for group, prompt in enumerate(prompts):
        counts = Counter(rollout.tokens_BT[rollout.group_B == group, 0].tolist())
        for tau in (temperature, 1.7 - temperature):
            p = next_logp(build("llama"), prompt, [0], tau)[0].double().exp()
            law = dict(enumerate((p / p.sum()).tolist()))
            assert (chi_square(counts, law) > 1e-3) == (tau == temperature)


@architectures
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behaviour_logp_equals_the_train_time_logp(name, temperature):
    """The cached decoding of left-padded prompts against one forward of right-padded rows."""
    policy = make_policy(name)
    rollout = drawn(policy, temperature=temperature, max_new_tokens=12, eos_ids=range(EOS, EOS + 4))
    assert rollout.temperature == temperature
    assert {int(End.EOS), int(End.LIMIT)} == set(rollout.end_B.tolist()), "the seed no longer shows both ends"
    again = policy(rollout, {"logp"}).get("logp_BT")
    torch.testing.assert_close(rollout.behaviour_logp_BT, again.detach(), rtol=1e-5, atol=2e-5)
    expected = torch.zeros_like(again)
    for i, tokens in enumerate(rollout.completion_ids()):
        logp = next_logp(build(name), PROMPTS[int(rollout.group_B[i])], tokens, temperature)
        expected[i, : len(tokens)] = logp[torch.arange(len(tokens)), tokens].detach()
    torch.testing.assert_close(rollout.behaviour_logp_BT, expected, rtol=1e-5, atol=2e-5)
    assert expected.abs().max() > 1


@architectures
@pytest.mark.parametrize("training", [True, False])
def test_sampling_does_not_touch_gradients_or_modes(name, training):
    policy = Policy(build(name).train(training))
    policy.model.base_model.eval()  # a mixture is kept too
    before = {module: module.training for module in policy.modules()}
    rollout = drawn(policy)
    assert not rollout.behaviour_logp_BT.requires_grad and torch.is_grad_enabled()
    assert {module: module.training for module in policy.modules()} == before


def test_modes_are_kept_where_decoding_fails():
    policy = Policy(build("llama").train())
    policy.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drawn(policy)
    assert policy.training and policy.model.training


@architectures
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_no_sample(name):
    model = build(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_samples(drawn(Policy(model)), drawn(Policy(build(name))))


@architectures
@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_samples_do_not_depend_on_the_micro_batch(name, micro_batch):
    policy = Policy(build(name))
    whole, split = drawn(policy, micro_batch=256), drawn(policy, micro_batch=micro_batch)
    assert by_sample(whole).keys() == by_sample(split).keys() == set(range(12))
    assert_same_samples(whole, split)
    assert torch.equal(whole.tokens_BT, split.tokens_BT)


@architectures
@pytest.mark.parametrize("chosen", [[2, 0, 3, 1], [1], [3, 2]])
def test_samples_do_not_depend_on_the_other_prompts(name, chosen):
    policy = Policy(build(name))
    part = drawn(policy, Prompts([PROMPTS[i] for i in chosen], chosen))
    assert set(part.group_B.tolist()) == set(chosen)
    assert set(by_sample(part)) == {3 * i + k for i in chosen for k in range(3)}
    assert_same_samples(drawn(policy), part)


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 2}, {"stream": EVALUATE}])
def test_another_seed_step_or_stream_draws_other_samples(change):
    policy = Policy(build("llama"))
    first = [row[:4] for row in drawn(policy, eos_ids=[]).tokens_BT.tolist()]
    other = [row[:4] for row in drawn(policy, eos_ids=[], **change).tokens_BT.tolist()]
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_samples_of_one_prompt_differ():
    rollout = drawn(Policy(build("llama")), Prompts([PROMPTS[0]], [0]), samples_per_prompt=20, eos_ids=[])
    assert len(set(map(tuple, rollout.tokens_BT.tolist()))) == 20


def test_shorter_sampling_is_the_beginning_of_longer_sampling():
    policy = Policy(build("llama"))
    short, long = drawn(policy, max_new_tokens=3, eos_ids=[]), drawn(policy, max_new_tokens=8, eos_ids=[])
    assert torch.equal(short.tokens_BT, long.tokens_BT[:, :3])


@pytest.mark.parametrize("stops", [[], [EOS], [0], [EOS, 40, 12], list(range(0, VOCAB, 2))])
def test_every_eos_id_ends_a_completion_and_nothing_else_does(stops):
    policy = Policy(build("llama"))
    free = drawn(policy, eos_ids=[], samples_per_prompt=30, max_new_tokens=10)
    assert free.tokens_BT.shape == (120, 10) and set(free.length_B.tolist()) == {10}
    rollout = drawn(policy, eos_ids=stops, samples_per_prompt=30, max_new_tokens=10)
    seen = set()
    for i, tokens in enumerate(free.tokens_BT.tolist()):
        at = [t for t, token in enumerate(tokens) if token in stops]
        expected = tokens[: at[0] + 1] if at else tokens
        seen |= {expected[-1]} & set(stops)
        assert rollout.completion_ids()[i] == expected
        assert rollout.end_B[i] == (End.EOS if at else End.LIMIT)
        mask = [t < len(expected) for t in range(rollout.tokens_BT.shape[1])]
        assert rollout.policy_mask_BT[i].tolist() == mask, "EOS is a policy token, padding is none"
        assert not rollout.tokens_BT[i, len(expected) :].any()
        assert not rollout.behaviour_logp_BT[i, len(expected) :].any()
        assert (rollout.behaviour_logp_BT[i, : len(expected)] < 0).all()
    assert len(seen) >= min(len(stops), 20), "too few of the ids came up"
    assert rollout.tokens_BT.shape[1] == int(rollout.length_B.max())


def test_what_follows_an_end_changes_it_no_more():
    """Rows decode on until all of the micro-batch have ended."""
    prompts = Prompts(PROMPTS, GROUPS, decode=lambda ids: "".join(f"<{i}>" for i in ids))
    common = {"samples_per_prompt": 30, "max_new_tokens": 10}
    stops, ends = range(10, 20), range(30, 40)
    policy, kinds = Policy(build("llama")), Counter()
    rollout = drawn(policy, prompts, eos_ids=ends, stop=[f"<{i}>" for i in stops], **common)
    for i, tokens in enumerate(drawn(policy, eos_ids=[], **common).tokens_BT.tolist()):
        at = next((t for t, token in enumerate(tokens) if token in [*stops, *ends]), None)
        end = End.LIMIT if at is None else End.STOP if tokens[at] in stops else End.EOS
        assert rollout.end_B[i] == end
        assert rollout.completion_ids()[i] == tokens[: None if at is None else at + 1]
        assert rollout.texts()[i] == prompts.decode(tokens[:at])
        kinds[end] += 1
    assert len(kinds) == 3


def test_eos_at_the_last_allowed_position_is_an_eos_end():
    tokens = drawn(Policy(build("llama")), eos_ids=[], max_new_tokens=4).tokens_BT
    last = int(tokens[0, 3])
    assert last not in tokens[0, :3]
    rollout = drawn(Policy(build("llama")), eos_ids=[last], max_new_tokens=4)
    assert rollout.length_B[0] == 4 and rollout.end_B[0] == End.EOS


def test_masks_come_from_lengths_so_sampled_pad_ids_are_policy_tokens():
    table = random_tabular(3, 5, 0)
    with torch.no_grad():
        table.table[:, 0] += 3  # the padding id is the likeliest token
    rollout = drawn(Policy(table), Prompts([[1], [0, 0]], [0, 1]), max_new_tokens=3, eos_ids=[2])
    assert (rollout.tokens_BT[rollout.policy_mask_BT] == 0).sum() > 5
    steps = torch.arange(rollout.tokens_BT.shape[1])
    assert torch.equal(rollout.policy_mask_BT, steps < rollout.length_B[:, None])


def test_texts_leave_out_a_terminating_eos_only():
    rollout = replace(
        make_rollout([[1]] * 4, [[7, EOS], [EOS], [7, 8], [7, EOS]], wider=1, fill=EOS),
        end_B=torch.tensor([End.EOS, End.EOS, End.LIMIT, End.STOP]),
        decode=lambda ids: " ".join(map(str, ids)),
    )
    assert rollout.completion_ids() == [[7, EOS], [EOS], [7, 8], [7, EOS]]
    assert rollout.texts() == ["7", "", "7 8", f"7 {EOS}"]


def test_rows_select_every_field_of_a_sample():
    rollout = replace(make_rollout(), pair_B=torch.tensor([1, 0, 3, 2]), annotation_BT=torch.rand(4, 6))
    rollout = rollout.rows(torch.tensor([2, 0]))
    full = replace(make_rollout(), pair_B=torch.tensor([1, 0, 3, 2]))
    assert len(rollout) == 2
    assert rollout.columns == {"prompt": [str(PROMPTS[2]), str(PROMPTS[0])]}
    for field in ("prompt_BP", "prompt_length_B", "tokens_BT", "length_B", "policy_mask_BT", "end_B", "pair_B"):
        assert torch.equal(getattr(rollout, field), getattr(full, field)[[2, 0]])
    assert rollout.sample_id_B.tolist() == rollout.group_B.tolist() == [2, 0]
    assert rollout.annotation_BT.shape == (2, 6) and rollout.behaviour_logp_BT.shape == (2, 6)
    assert len(rollout.rows(torch.tensor([1, 1, 0]))) == 3
    assert rollout.temperature == full.temperature and rollout.origin == full.origin


def test_to_moves_every_tensor_and_keeps_the_rest():
    rollout = replace(make_rollout(temperature=0.7), pair_B=torch.arange(4), annotation_BT=torch.zeros(4, 6))
    moved = rollout.to(torch.device("meta"))
    for field, value in vars(rollout).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, field).device.type == "meta" and value.device.type == "cpu"
        else:
            assert getattr(moved, field) == value


def test_samples_carry_the_columns_of_their_prompt():
    prompts = Prompts(PROMPTS, GROUPS, {"name": ["a", "b", "c", "d"]}, str)
    rollout = drawn(Policy(build("llama")), prompts, samples_per_prompt=2)
    assert rollout.columns == {"name": ["a", "a", "b", "b", "c", "c", "d", "d"]}
    assert rollout.group_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for row, length, group in zip(rollout.prompt_BP, rollout.prompt_length_B, rollout.group_B, strict=True):
        assert row[:length].tolist() == PROMPTS[group] and not row[length:].any()
    assert rollout.texts()[0].startswith("[")
    assert prompts.first(2) == Prompts(PROMPTS[:2], range(2), {"name": ["a", "b"]}, str)


def test_uniforms_do_not_depend_on_length_batch_or_order():
    ids = torch.tensor([5, 0, 2**40])
    u = uniforms(3, 1, 7, ids, 9)
    assert u.dtype == torch.float64 and u.shape == (3, 9) and bool(((u >= 0) & (u < 1)).all())
    assert torch.equal(uniforms(3, 1, 7, ids, 4), u[:, :4])
    assert torch.equal(uniforms(3, 1, 7, ids.flip(0), 9), u.flip(0))
    assert torch.equal(uniforms(3, 1, 7, ids[1:2], 9), u[1:2])


def test_uniforms_of_different_coordinates_share_nothing():
    ids = torch.arange(8)
    seen = [uniforms(seed, stream, step, ids, 16) for seed in (0, 1) for stream in (0, 1) for step in (0, 1)]
    every = torch.stack(seen).flatten()
    assert len(every.unique()) == len(every) == 8 * 8 * 16
    assert stats.kstest(every.numpy(), "uniform").pvalue > 1e-3
    for lag in (1, 16):  # tokens, and samples
        assert abs(float(torch.corrcoef(torch.stack([every[:-lag], every[lag:]]))[0, 1])) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_cdf_gives_each_token_its_interval(dtype):
    p = torch.tensor([0.25, 0.0, 0.5, 0.0, 0.25, 0.0], dtype=dtype)
    below = float(np.nextafter(1.0, 0.0))
    cases = {0.0: 0, 0.2499: 0, 0.2501: 2, 0.5: 2, 0.7499: 2, 0.7501: 4, 0.9999: 4, below: 4}
    u = torch.tensor(list(cases), dtype=torch.float64)
    found = inverse_cdf(p.log().expand(len(u), -1), u)
    assert found.tolist() == list(cases.values()) and found.dtype == torch.long


def test_the_inverse_cdf_never_picks_a_token_without_probability():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 11, generator=generator) * 4
    logits[torch.rand(2000, 11, generator=generator) < 0.4] = -torch.inf
    logits[:, 5] = 0.0
    below = float(np.nextafter(1.0, 0.0))
    for first, last in ((True, False), (False, True), (True, True)):
        logits[:, 0] = -torch.inf if first else 0.0
        logits[:, -1] = -torch.inf if last else 0.0
        logp = logits.log_softmax(-1)
        random = torch.rand(2000, generator=generator, dtype=torch.float64)
        for u in (torch.zeros_like(random), torch.full_like(random, below), random):
            token = inverse_cdf(logp, u)
            assert logp.gather(1, token[:, None]).isfinite().all()


def test_the_inverse_cdf_shares_out_the_mass_there_is():
    """What rounding leaves of, or adds to, a total of one must not go to the last token alone."""
    for total in (0.9, 1.1):
        logp = (total * torch.tensor([0.25, 0.5, 0.25])).log().expand(4, -1)
        u = torch.tensor([0.249, 0.251, 0.749, 0.751], dtype=torch.float64)
        assert inverse_cdf(logp, u).tolist() == [0, 1, 1, 2]


def test_decoding_starts_with_prompts_padded_on_the_left():
    prompt_BP, length_B = pad([[7, 8, 9], [5], [3, 4]])
    assert prompt_BP.tolist() == [[7, 8, 9], [5, 0, 0], [3, 4, 0]] and length_B.tolist() == [3, 1, 2]
    wide = torch.nn.functional.pad(prompt_BP, (0, 1), value=EOS)
    wide[1, 1:] = EOS  # whatever stands in the padding
    state = DecodeState.start(wide, length_B, 0.7)
    assert state.attention_BS.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    assert state.input_BS.tolist() == [[0, 7, 8, 9], [0, 0, 0, 5], [0, 0, 3, 4]]
    seen = state.attention_BS.bool()
    assert state.position_BS[seen].tolist() == [0, 1, 2, 0, 0, 1]
    assert state.temperature == 0.7 and state.cache is None
    state.append(torch.tensor([1, 2, 6]))
    assert state.input_BS.tolist() == [[1], [2], [6]]
    assert state.position_BS.tolist() == [[3], [1], [2]]
    assert state.attention_BS[:, -1].tolist() == [1, 1, 1] and state.attention_BS.shape == (3, 5)
    state.append(torch.tensor([1, 1, 1]))
    assert state.position_BS.tolist() == [[4], [2], [3]] and state.attention_BS.shape == (3, 6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_padding_side_and_pad_token_have_no_effect(side):
    words = {f"w{i}": i for i in range(VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side=side, eos_token=f"w{EOS}", pad_token=f"w{EOS}"
    )
    rows = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in PROMPTS]
    told = tokenizer([row["prompt"] for row in rows], padding=True)["input_ids"]
    assert (told[1][0] == EOS) == (side == "left"), "the tokenizer itself pads on that side"
    prompts = PromptSet.tokenise(rows, tokenizer, 0, 64, 8).take(GROUPS)
    assert prompts.ids == list(PROMPTS)
    policy = Policy(build("llama"))
    rollout = drawn(policy, prompts)
    expected = drawn(policy)
    assert torch.equal(rollout.tokens_BT, expected.tokens_BT)
    assert torch.equal(rollout.prompt_BP, expected.prompt_BP)
    first = next(tokens for tokens, end, _ in by_sample(rollout).values() if end == End.EOS and len(tokens) > 1)
    assert f"w{EOS}" not in rollout.texts()[rollout.completion_ids().index(first)].split()


def test_settings_of_the_generation_config_are_ignored_and_reported():
    model = build("llama")
    expected = drawn(Policy(build("llama")))
    assert ignored_sampling(model) == []
    odd = {"top_p": 0.1, "top_k": 1, "temperature": 0.01, "repetition_penalty": 9.0, "min_p": 0.9, "typical_p": 0.1}
    model.generation_config = GenerationConfig(do_sample=True, no_repeat_ngram_size=1, **odd)
    rollout = drawn(Policy(model))
    assert torch.equal(rollout.tokens_BT, expected.tokens_BT)
    assert torch.equal(rollout.behaviour_logp_BT, expected.behaviour_logp_BT)
    told = {*(f"{name}={value}" for name, value in odd.items()), "no_repeat_ngram_size=1"}
    assert set(ignored_sampling(model)) == told


def test_neutral_settings_of_the_generation_config_are_not_reported():
    model = build("llama")
    model.generation_config = GenerationConfig(top_p=1.0, top_k=0, temperature=1.0, repetition_penalty=1.0)
    assert ignored_sampling(model) == []


def test_eos_ids_come_from_generation_config_then_config_then_tokenizer():
    class Named:
        eos_token_id = 9

    model = build("llama", eos_token_id=3)
    model.generation_config = GenerationConfig(eos_token_id=[7, 8])
    assert eos_ids(model, Named()) == [7, 8]
    model.generation_config = GenerationConfig(eos_token_id=0)
    assert eos_ids(model, Named()) == [0], "id 0 is an id"
    model.generation_config = GenerationConfig()
    assert eos_ids(model, Named()) == [3]
    model.config.eos_token_id = None
    assert eos_ids(model, Named()) == [9]
    Named.eos_token_id = None
    assert eos_ids(model, Named()) == []


def test_float64_stays_float64_and_bfloat16_is_sampled_in_fp32():
    rollout = drawn(tabular_policy(), Prompts([[1], [0]], [0, 1]), max_new_tokens=2, eos_ids=[])
    assert rollout.behaviour_logp_BT.dtype == torch.float64
    policy = Policy(build("llama").to(torch.bfloat16))
    rollout = drawn(policy)
    assert rollout.behaviour_logp_BT.dtype == torch.float32
    assert rollout.origin == "policy"
