"""Flag beats YAML beats default, and every mistake is a sentence that says what was perhaps meant."""

import pytest
import yaml

from lowrank.data.names import read_targets, split_names, split_pairs
from lowrank.errors import ConfigError
from lowrank.train.config_file import resolve
from lowrank.train.settings import AdapterSettings, EvalSettings, TrainSettings

NEEDED = {"model": "m", "data": "d.csv", "out": "o"}


def written(tmp_path, **content):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_flag_beats_yaml_beats_default(tmp_path):
    file = written(tmp_path, **NEEDED, rank=4, lr="1e-3", batch_size=2)
    found = resolve(TrainSettings, {"rank": 6}, file)
    assert (found.rank, found.lr, found.batch_size, found.seed) == (6, 1e-3, 2, 0)
    assert resolve(TrainSettings, {}, file).rank == 4
    assert resolve(TrainSettings, NEEDED).rank == 8


@pytest.mark.parametrize(
    ("file", "flag", "wanted"),
    [
        ({"steps": 7}, {"epochs": 2.0}, {"steps": None, "epochs": 2.0}),
        ({"epochs": 7}, {"steps": 2}, {"steps": 2, "epochs": None}),
        ({"eval_split": 0.1}, {"eval_data": "e.csv"}, {"eval_split": 0.0, "eval_data": "e.csv"}),
        ({"eval_data": "e.csv"}, {"eval_split": 0.1}, {"eval_split": 0.1, "eval_data": None}),
    ],
)
def test_a_flag_beats_what_excludes_it_in_the_file(tmp_path, file, flag, wanted):
    found = resolve(TrainSettings, flag, written(tmp_path, **NEEDED, **file))
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_resolved_settings_are_read_back_the_same(tmp_path):
    asked = resolve(
        TrainSettings,
        {**NEEDED, "targets": "q,v", "layers": (0, 2), "template": "Q: {prompt}\\nA:", "rank_pattern": {"q": 3}},
    )
    assert asked.template == "Q: {prompt}\nA:"
    assert resolve(TrainSettings, {}, written(tmp_path, **asked.resolved())) == asked
    assert list(asked.resolved())[:3] == ["model", "data", "out"]
    full = resolve(TrainSettings, {**NEEDED, "full": True})
    assert resolve(TrainSettings, {}, written(tmp_path, **full.resolved())) == full


WRONG = [
    ({}, {"rnak": 4}, ["'rnak' is no setting", "did you mean 'rank'?", "c.yaml"]),
    ({}, {"batch-size": 4}, ["did you mean 'batch_size'?"]),
    ({"lr": "fast"}, {}, ["--lr", "valid number", "'fast'"]),
    ({}, {"lr": 0}, ["--lr", "greater than 0", "c.yaml"]),
    ({"lr": float("inf")}, {}, ["--lr", "finite"]),
    ({"steps": 3, "epochs": 1}, {}, ["steps and epochs cannot both"]),
    ({"eval_data": "x", "eval_split": 0.1}, {}, ["eval_data and eval_split cannot both"]),
    ({"keep": "best"}, {}, ["need eval_data, eval_split"]),
    ({"eval_every": 3}, {}, ["need eval_data, eval_split"]),
    ({"full": True, "rank": 4}, {}, ["full trains every weight", "rank"]),
    ({"dtype": "float16"}, {}, ["float16 overflows"]),
    ({"template": "Q:"}, {}, ["{prompt} once", "'Q:'"]),
    ({"schedule": "wave"}, {}, ["--schedule", "'linear', 'cosine', 'constant' or 'wsd'", "'wave'"]),
    ({"lr": 0, "batch_size": 0}, {}, ["--lr", "--batch-size"]),
]


@pytest.mark.parametrize(("flags", "file", "parts"), WRONG)
def test_wrong_settings_are_one_sentence(tmp_path, flags, file, parts):
    with pytest.raises(ConfigError) as raised:
        resolve(TrainSettings, {**NEEDED, **flags}, written(tmp_path, **file))
    for part in parts:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_needed_is_named():
    with pytest.raises(ConfigError, match=r"--model is needed: .*; --data is needed: .*; --out is needed"):
        resolve(TrainSettings, {})
    with pytest.raises(ConfigError, match="--data is needed"):
        resolve(EvalSettings, {"model": "m"})


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1, 2]", "must hold lines of `name: value`"), ("a: [", "is not YAML"), ("\x00", "is not YAML")],
)
def test_files_that_are_no_settings(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        resolve(TrainSettings, NEEDED, tmp_path / "c.yaml")


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert resolve(TrainSettings, NEEDED, tmp_path / "c.yaml").rank == 8
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        resolve(TrainSettings, NEEDED, tmp_path / "none.yaml")


def test_yaml_cannot_make_python_objects(tmp_path):
    (tmp_path / "c.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        resolve(TrainSettings, NEEDED, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (None, None),
        ("all-linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        ("c_attn[q,v],c_proj", ("c_attn[q,v]", "c_proj")),
        ("model.layers.0.self_attn.q_proj", ("model.layers.0.self_attn.q_proj",)),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r".*[02]\.q_proj", r".*[02]\.q_proj"),
        (("a", "b"), ("a", "b")),
    ],
)
def test_targets(typed, meant):
    assert read_targets(typed) == meant


def test_names_with_commas():
    assert split_names("a,b") == ("a", "b")
    assert split_names(("a,b", "c")) == ("a", "b", "c")
    assert split_names(None) == ()
    assert AdapterSettings(exclude="lm_head, x").exclude == ("lm_head", "x")


@pytest.mark.parametrize("given", ["0, 2", ("0,2",), ("0", "2"), [0, 2]])
def test_numbers_of_layers_with_commas_too(given):
    assert AdapterSettings(layers=given).layers == (0, 2)


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        ("q=3", {"q": "3"}),
        (" q_proj = 3 , layers.0.up_proj=2,", {"q_proj": "3", "layers.0.up_proj": "2"}),
        (r"h\.[0,1]\.q{1,3}(?=x)=4,b=2", {r"h\.[0,1]\.q{1,3}(?=x)": "4", "b": "2"}),
        ("", {}),
        ({"model": {"layers": {"0": 3}, "x": 1}, "q": 2}, {"model.layers.0": 3, "model.x": 1, "q": 2}),
        ({"": 1, "a.b": 2}, {"": 1, "a.b": 2}),
        (["q"], ["q"]),
    ],
)
def test_pairs_as_a_command_line_has_them(given, pairs):
    assert split_pairs(given) == pairs


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_is_read_as_its_help_says(setting):
    example = TrainSettings.model_fields[setting].description.split()[-1]
    found = getattr(resolve(TrainSettings, NEEDED | {setting: example}), setting)
    assert found == {name: float(value) for name, value in (pair.split("=") for pair in example.split(","))}
    for wrong, said in {"q": "give NAME=VALUE", "q:3": "give NAME=VALUE", "q=1,q=2": "'q' stands there twice"}.items():
        with pytest.raises(ConfigError, match=said):
            resolve(TrainSettings, NEEDED | {setting: wrong})
