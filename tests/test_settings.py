"""From YAML, mappings and overrides to one validated configuration, and back."""

from pathlib import Path

import pytest
import yaml

from rlkl import settings
from rlkl.config import Config, KLConfig, dump

CONFIGS = [
    p for p in sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")) if p.name != "fix.yaml"
]  # a comparison
MINIMAL = {
    "name": "minimal",
    "model": {"type": "pretrained", "path": "somewhere"},
    "data": {"type": "jsonl", "path": "prompts.jsonl"},
    "rewards": {"f1": {"type": "function", "path": "rlkl.rewards.overlap:word_f1"}},
    "trainer": {"type": "reinforce"},
}


def written(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_yaml_mapping_and_config_object_give_the_same_configuration(tmp_path):
    from_mapping = settings.load(MINIMAL)
    assert settings.load(written(tmp_path, MINIMAL)) == from_mapping
    assert settings.load(str(written(tmp_path, MINIMAL))) == from_mapping
    assert settings.load(from_mapping) == from_mapping


def test_an_override_changes_its_key_and_leaves_the_rest():
    plain = dump(settings.load(MINIMAL))
    changed = dump(settings.load(MINIMAL, ["kl.beta=0.3"]))
    assert changed["kl"].pop("beta") == 0.3
    assert plain["kl"].pop("beta") != 0.3
    assert changed == plain


def test_the_last_override_of_a_key_wins():
    assert settings.load(MINIMAL, ["seed=1", "seed=2"]).seed == 2


def test_an_override_leaves_the_given_mapping_as_it_was():
    before = yaml.safe_dump(MINIMAL)
    settings.load(MINIMAL, ["model.path=elsewhere", "kl.beta=1"])
    assert yaml.safe_dump(MINIMAL) == before


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("5E3", 5000.0), (".5", 0.5), ("3", 3.0), ("1_0", 10.0)],
)
def test_numbers_parse_in_every_notation(text, value):
    assert settings.load(MINIMAL, [f"optimiser.learning_rate={text}"]).optimiser.learning_rate == value


def test_exponents_without_a_point_parse_in_a_file_too(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimiser: {learning_rate: 1e-4}\n")
    assert settings.load(path).optimiser.learning_rate == 1e-4


def test_lists_mappings_booleans_and_null_parse():
    config = settings.load(
        MINIMAL,
        [
            "optimiser.betas=[0.8,0.95]",
            "data.columns={prompt: question}",
            "credit.whiten_rewards=true",
            "credit.horizon=3",
            "credit.horizon=null",
        ],
    )
    assert config.optimiser.betas == (0.8, 0.95)
    assert dump(config)["data"]["columns"] == {"prompt": "question"}
    assert config.credit.whiten_rewards is True
    assert config.credit.horizon is None


def test_a_value_may_hold_an_equals_sign():
    config = settings.load(MINIMAL, ["data.path=a=b.jsonl"])
    assert dump(config)["data"]["path"] == "a=b.jsonl"


def test_an_override_may_add_a_reward_by_name():
    config = settings.load(MINIMAL, ["rewards.more.type=function", "rewards.more.path=math:sqrt"])
    assert list(config.rewards) == ["f1", "more"]
    assert config.rewards["f1"].path == "rlkl.rewards.overlap:word_f1"


def test_a_changed_type_drops_the_keys_of_the_old_type():
    tiny = ["model.type=tiny", "model.texts=[prompt]"]
    config = settings.load(MINIMAL, tiny)
    assert config.model.type == "tiny"
    with pytest.raises(ValueError, match=r"model\.path: unknown key"):
        settings.load(MINIMAL, [*tiny, "model.path=somewhere"])


def test_the_same_type_again_keeps_the_keys():
    config = settings.load(MINIMAL, ["model.type=pretrained"])
    assert dump(config)["model"]["path"] == "somewhere"


def test_lambda_is_written_lambda():
    config = settings.load(MINIMAL, ["credit.lambda=0.7", "credit.advantage=gae", "credit.baseline=value"])
    assert config.credit.lambda_ == 0.7
    credit = dump(config)["credit"]
    assert credit["lambda"] == 0.7
    assert "lambda_" not in credit


def test_interpolations_are_resolved():
    config = settings.load({**MINIMAL, "seed": 5, "optimiser": {"warmup_steps": "${seed}"}})
    assert config.optimiser.warmup_steps == 5


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("credit.gamma=0.9", "optimiser.betas=[0.5,0.6]", "optimiser.learning_rate=1e-7"),
        ("credit.lambda=0.5", "credit.advantage=gae", "credit.baseline=value"),
        ("credit.horizon=2", "kl.window=same", "data.held_out=other.jsonl"),
        ("model.type=tiny", "model.texts=[prompt,gold]"),
        ("kl.target=3", "seed=4294967295", "folder=/a b/ü"),
    ],
)
def test_what_is_dumped_loads_to_the_same_configuration(tmp_path, overrides):
    config = settings.load(MINIMAL, overrides)
    assert settings.load(written(tmp_path, dump(config))) == config
    assert settings.load(config) == config


def test_dump_holds_every_section_with_its_defaults():
    tree = dump(settings.load(MINIMAL))
    assert set(tree) == set(Config.model_fields)
    assert set(tree["kl"]) == set(KLConfig.model_fields)
    assert tree["kl"]["beta"] == KLConfig().beta


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_committed_configuration_is_valid(path):
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    missing = tree["data"]["type"] not in ("facts", "fix") and "path" not in tree["data"]
    config = settings.load(path, ["data.path=prompts.jsonl"] if missing else [])
    assert config.name == path.stem


def test_there_are_configurations_to_check():
    assert CONFIGS


def test_a_configuration_cannot_change_after_validation():
    config = settings.load(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.kl.beta = 1.0  # type: ignore[misc]
