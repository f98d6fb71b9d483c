"""Pretrained models: names and tags, what changed arguments keep, directories, the Hub."""

import copy
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from image_sets import needs_mnist
from torch import nn

from tritoncaps._files import write_sealed
from tritoncaps.data import load_dataset, to_float
from tritoncaps.models import (
    CapsNet,
    CheckpointError,
    DeepCapsNet,
    PretrainedCfg,
    PretrainedMixin,
    _pretrained,
    create_model,
    list_models,
    load_model,
)

KWARGS = {"channels": 4, "capsule_types": 1, "image_size": 18, "num_classes": 3}
NAMES = ("a", "b", "c")


def assert_equal_weights(model, expected, but=()):
    assert type(model) is type(expected)
    for name, value in expected.state_dict().items():
        if name not in but:
            assert torch.equal(model.state_dict()[name], value), name


def wrong(name, test):
    """How many images a shipped model does not read."""
    model = create_model(name, pretrained=True)
    with torch.inference_mode():
        answers = [model(to_float(part)).activations.argmax(1) for part in test.images.split(500)]
    return int((torch.cat(answers) != test.labels).sum())


@pytest.fixture
def trained():
    return create_model("capsnet", learned_prior=True, **KWARGS).eval()


@pytest.fixture
def shipped(tmp_path, monkeypatch, trained):
    """A package with weights of two tags. Those of the second are zeros."""
    monkeypatch.setattr(_pretrained, "FOLDER", tmp_path)
    monkeypatch.setattr("tritoncaps.models._load.FOLDER", tmp_path)
    kwargs = {**KWARGS, "learned_prior": True, "in_channels": 1}
    entries = []
    for tag in ("mnist", "digits"):
        cfg = PretrainedCfg(
            **{"model": "capsnet", "model_kwargs": kwargs, "class_names": NAMES, "tag": tag},
            **{"file": f"capsnet.{tag}.safetensors", "dataset": tag},
            **{"description": f"CapsNet, trained on {tag.upper()}"},
        )
        entries.append(cfg.to_config())
        zeros = {name: torch.zeros_like(value) for name, value in trained.state_dict().items()}
        weights = trained.state_dict() if tag == "mnist" else zeros
        write_sealed(tmp_path / cfg.file, weights, cfg.to_config())
    (tmp_path / "registry.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.fixture
def saved(tmp_path, trained):
    """A directory of `save_pretrained`."""
    trained.save_pretrained(tmp_path / "saved", class_names=NAMES)
    return tmp_path / "saved"


class TestWhatShips:
    def test_every_entry_has_its_files_and_loads(self):
        """With the real registry: sizes, the card, and equal words in file and registry."""
        names = list_models(pretrained=True)
        assert len(names) == len(set(names))
        for cfg in _pretrained.registry():
            assert cfg.license and cfg.description and cfg.class_names and cfg.input_size
            model = create_model(cfg.name, pretrained=True)
            assert all(value.dtype == torch.float32 for value in model.parameters())
            assert model.pretrained_cfg == cfg
            assert model(torch.rand(2, *cfg.input_size)).activations.shape == (2, cfg.num_classes)
            if cfg.file:
                card = (_pretrained.FOLDER / f"{cfg.name}.md").read_text(encoding="utf-8")
                assert f"# {cfg.name}" in card
                assert load_model(_pretrained.FOLDER / cfg.file).pretrained_cfg == cfg
        files = {path.name for path in _pretrained.FOLDER.glob("*.safetensors")}
        assert files == {cfg.file for cfg in _pretrained.registry() if cfg.file}

    def test_it_reads_the_digits_of_scikit_learn(self):
        test = load_dataset("digits").test
        assert wrong("efficient_capsnet.digits", test) == 0

    @needs_mnist
    def test_it_reads_mnist(self):
        test = load_dataset("mnist", os.environ["TRITONCAPS_MNIST"], download=False).test
        # No answer is closer than 0.004 to the next, far above rounding.
        assert wrong("efficient_capsnet", test) == 34


@pytest.mark.parametrize("name", list_models(classifiers=True))
def test_every_model_saves_and_loads_itself(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=3)
    assert isinstance(model, PretrainedMixin)
    assert model.init_arguments["num_classes"] == 3
    assert {"in_channels", "image_size"} <= set(model.init_arguments)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "pretrained"),
        [("capsnet", True), ("capsnet", "mnist"), ("capsnet.mnist", True)],
    )
    def test_the_first_tag_is_the_default(self, shipped, trained, name, pretrained):
        model = create_model(name, pretrained=pretrained)
        assert not model.training
        assert_equal_weights(model, trained)
        assert model.pretrained_cfg.name == "capsnet.mnist"
        assert model.pretrained_cfg.class_names == NAMES

    def test_another_tag(self, shipped):
        model = create_model("capsnet", pretrained="digits")
        assert all(not value.any() for value in model.state_dict().values())

    def test_a_tag_alone_gives_the_arguments(self, shipped):
        model = create_model("capsnet.digits", channels=2)
        assert model.training
        assert model.conv.weight.shape == (2, 1, 9, 9)
        assert model.image_shape == (1, 18, 18)
        assert model.conv.weight.any()

    def test_names_are_listed(self, shipped):
        assert list_models(pretrained=True) == ["capsnet.mnist", "capsnet.digits"]
        assert "capsnet.mnist" not in list_models()

    def test_load_model_takes_a_name(self, shipped, trained):
        for source in ("capsnet", "capsnet.mnist", shipped / "capsnet.mnist.safetensors"):
            assert_equal_weights(load_model(source), trained)

    def test_the_callers_random_numbers_stay(self, shipped):
        before = torch.get_rng_state()
        create_model("capsnet", pretrained=True)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("capsnt.mnist", {}, f"no model is named 'capsnt', there are {', '.join(list_models())}"
             "; did you mean 'capsnet'?"),
            ("capsnet.mnits", {}, "capsnet has no pretrained weights with the tag 'mnits', the "
             "tags are mnist, digits; did you mean 'mnist'?"),
            ("capsnet.MNIST", {}, "did you mean 'mnist'?"),
            ("capsnet.", {}, "no pretrained weights with the tag '', the tags are mnist, digits"),
            ("capsnet", {"pretrained": ""}, "no pretrained weights with the tag ''"),
            ("capsnet", {"pretrained": "capsnet.mnist"}, "the tags are mnist, digits"),
            ("../capsnet", {"pretrained": True}, "no model is named '../capsnet'"),
            ("capsnet", {"pretrained": "svhn"}, "the tags are mnist, digits"),
            ("capsnet.mnist", {"pretrained": "digits"}, "'mnist' and pretrained for 'digits'"),
            ("deep_capsnet", {"pretrained": True}, "no pretrained weights of deep_capsnet; use "
             "capsnet.mnist, capsnet.digits, or train it"),
            ("local-dir:x", {"pretrained": "mnist"}, "local-dir:x has no tags"),
            ("capsnet", {"pretrained": 3}, "pretrained must be a bool or a tag, got int"),
            ("capsnet", {"pretrained": True, "chanels": 3}, "capsnet has no argument 'chanels'; "
             "did you mean 'channels'?"),
            ("capsnet", {"depth": 3}, "has no argument 'depth'; it has num_classes, in_channels"),
        ],
    )  # fmt: skip
    def test_refused(self, shipped, name, options, message):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
            create_model(name, **options)
        assert str(error.value).startswith("create_model: ")

    def test_missing_weights(self, shipped):
        (shipped / "capsnet.mnist.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"capsnet\.mnist\.safetensors does not exist"):
            create_model("capsnet", pretrained=True)


class TestChangedArguments:
    def test_another_number_of_classes_renews_what_depends_on_it(self, shipped, trained):
        model = create_model("capsnet", pretrained=True, num_classes=5)
        renewed = {"routing.weight", "routing.prior", "decoder.layers.0.weight"}
        assert_equal_weights(model, trained, but=renewed)
        assert model.routing.weight.shape == (trained.routing.weight.shape[0], 8, 5, 16)
        assert model.routing.weight.std() > 0
        assert model.pretrained_cfg.class_names == ()
        assert model.pretrained_cfg.num_classes == 5
        assert (model.pretrained_cfg.dataset, model.pretrained_cfg.description) == ("", "")
        other = create_model("capsnet", pretrained=True, num_classes=5)
        assert not torch.equal(other.routing.weight, model.routing.weight)

    def test_the_hidden_routing_of_a_deep_network_stays(self, tmp_path):
        kwargs = {"channels": (2, 2), "capsule_types": 1, "num_classes": 3, "pose_bias": True}
        deep = create_model("deep_capsnet", **kwargs)
        deep.save_pretrained(tmp_path)
        model = create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2)
        renewed = {f"secondary_routing.{name}" for name in ("weight", "pose_bias")}
        assert_equal_weights(model, deep, but=renewed | {"decoder.layers.0.weight"})

    def test_options_without_weights_are_free(self, shipped, trained):
        model = create_model("capsnet", pretrained=True, iterations=1, reconstruction=False)
        assert model.routing.iterations == 1
        assert model.decoder is None
        assert torch.equal(model.routing.weight, trained.routing.weight)
        same = create_model("capsnet", pretrained=True, image_size=(18, 18), num_classes=3)
        assert_equal_weights(same, trained)
        assert same.pretrained_cfg.class_names == NAMES

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"in_channels": 3}, "trained with in_channels=1, and in_channels=3 was asked for"),
            ({"image_size": 28}, r"do not fit image_size=28: routing\.weight is \(1, 8, 3, 16\) "
             r"and must be \(36, 8, 3, 16\), .*leave the argument out"),
            ({"pose_bias": True}, r"do not fit pose_bias=True: it lacks routing\.pose_bias"),
            ({"learned_prior": False}, r"the model has no routing\.prior"),
        ],
    )  # fmt: skip
    def test_refused(self, shipped, changes, message):
        with pytest.raises(ValueError, match=f"create_model: .*{message}"):
            create_model("capsnet", pretrained=True, **changes)

    @pytest.mark.parametrize(
        "changes",
        [{"num_classes": 3.0}, {"in_channels": True}, {"num_classes": torch.tensor([1, 2])}],
        ids=str,
    )
    def test_what_is_equal_but_of_another_type_is_refused(self, shipped, changes):
        with pytest.raises(TypeError, match=f"CapsNet: {next(iter(changes))} must be an int"):
            create_model("capsnet", pretrained=True, **changes)


class Scores(PretrainedMixin, nn.Module):
    """A model of a user."""

    def __init__(self, sizes, *, scale=1.0, **options):
        super().__init__()
        self.linear = nn.Linear(*sizes, **options)


class TestDirectories:
    def test_round_trip(self, saved, trained):
        for model in (
            CapsNet.from_pretrained(saved),
            CapsNet.from_pretrained(str(saved), device="cpu"),
            create_model(f"local-dir:{saved}", pretrained=True),
            load_model(saved),
        ):
            assert not model.training
            assert_equal_weights(model, trained)
            assert model.pretrained_cfg.class_names == NAMES
        assert CapsNet.from_pretrained(saved, num_classes=4).routing.out_capsules == 4
        assert create_model(f"local-dir:{saved}").image_shape == (1, 18, 18)

    def test_what_is_written(self, saved):
        assert {path.name for path in saved.iterdir()} == {
            "config.json", "model.safetensors", "README.md",
        }  # fmt: skip
        config = json.loads((saved / "config.json").read_text())
        assert config["model"] == "capsnet"
        assert config["model_kwargs"].items() >= {**KWARGS, "iterations": 3}.items()
        card = (saved / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: tritoncaps\n")
        assert 'create_model("local-dir:PATH", pretrained=True)' in card
        assert "images (B, 1, 18, 18)" in card and "classes are a, b, c" in card

    def test_a_card_stays_and_a_loaded_model_is_saved_again(self, saved, shipped):
        (saved / "README.md").write_text("mine")
        model = create_model("capsnet.mnist", pretrained=True)
        model.save_pretrained(saved)
        assert (saved / "README.md").read_text() == "mine"
        cfg = load_model(saved).pretrained_cfg
        assert (cfg.name, cfg.class_names, cfg.file) == ("capsnet", NAMES, "")
        model.save_pretrained(saved / "new")
        card = (saved / "new" / "README.md").read_text()
        about = "Started from capsnet.mnist: CapsNet, trained on MNIST."
        assert f"parameters. {about} It takes" in card
        load_model(saved / "new").save_pretrained(saved / "newer")
        assert about in (saved / "newer" / "README.md").read_text()

    def test_a_model_of_a_user(self, tmp_path):
        model = Scores((2, 3), scale=2.0, bias=False)
        model.save_pretrained(tmp_path)
        assert_equal_weights(Scores.from_pretrained(tmp_path), model)
        assert 'Scores.from_pretrained("PATH")' in (tmp_path / "README.md").read_text()
        own = "no model is named 'Scores'.*a class of your own, call its from_pretrained"
        with pytest.raises(CheckpointError, match=own):
            load_model(tmp_path)
        with pytest.raises(CheckpointError, match="from_pretrained of Scores builds it"):
            CapsNet.from_pretrained(tmp_path)

    def test_a_model_that_reads_values_while_it_is_built(self, tmp_path):
        class Net(PretrainedMixin, nn.Module):
            def __init__(self, rate=0.1, cls=2):
                super().__init__()
                self.layers = nn.ModuleList(
                    nn.Sequential(nn.Dropout(p.item()), nn.Linear(2, cls))
                    for p in torch.linspace(0, rate, 2)
                )

        model = Net(cls=3)
        model.save_pretrained(tmp_path)
        before = torch.random.get_rng_state()
        assert_equal_weights(Net.from_pretrained(tmp_path), model)
        assert torch.equal(torch.random.get_rng_state(), before)
        with pytest.raises(ValueError, match="do not fit cls=2"):
            Net.from_pretrained(tmp_path, cls=2)

    def test_arguments_that_json_would_change(self, tmp_path):
        class Net(PretrainedMixin, nn.Module):
            def __init__(self, names=None, sizes=()):
                super().__init__()

        with pytest.raises(TypeError, match=r"argument names of Net: \{1: 2\} would come back as"):
            Net({1: 2}).save_pretrained(tmp_path)
        sizes = [3, (4, 5)]
        model = Net(sizes=sizes)
        sizes[0] = 9
        model.save_pretrained(tmp_path)
        assert Net.from_pretrained(tmp_path).init_arguments["sizes"] == [3, [4, 5]]

    @pytest.mark.parametrize("name", ["model_best.safetensors", "last.safetensors"])
    def test_the_directory_of_a_run_is_refused(self, trained, tmp_path, name):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"directory of a run.* its {name} instead"):
            trained.save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize(
        ("names", "message"), [(range(3), "int 0"), (3, "int 3"), ([b"a"] * 3, "bytes b'a'")]
    )
    def test_class_names_that_are_no_texts(self, trained, tmp_path, names, message):
        with pytest.raises(TypeError, match=f"class_names must be texts, got {message}"):
            trained.save_pretrained(tmp_path, class_names=names)
        assert not list(tmp_path.iterdir())

    def test_a_model_without_values_leaves_no_directory(self, tmp_path):
        with torch.device("meta"):
            model = create_model("efficient_capsnet")
        with pytest.raises(ValueError, match=r"save_pretrained: .*weight is on the meta device"):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_what_is_no_directory(self, trained, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError, match="file is a file; give a directory"):
            trained.save_pretrained(tmp_path / "file")
        with pytest.raises(TypeError, match="save_directory must be a str or a Path, got int"):
            trained.save_pretrained(3)
        with pytest.raises(TypeError, match="repo_id must be a str, got NoneType"):
            trained.push_to_hub(None)
        for empty in ("", "local-dir:"):
            with pytest.raises(ValueError, match="load_model: the path is empty"):
                load_model(empty)

    def test_a_folder_that_is_called_like_a_model(self, shipped, trained, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("capsnet").mkdir()
        assert_equal_weights(load_model("capsnet"), trained)
        other = create_model("capsnet", **KWARGS)
        other.save_pretrained("capsnet")
        assert_equal_weights(load_model("capsnet"), other)

    def test_a_path_may_begin_at_home(self, trained, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        trained.save_pretrained("~/net")
        assert (tmp_path / "net" / "config.json").exists()
        for path in ("~/net", "local-dir:~/net", Path("~/net")):
            assert_equal_weights(load_model(path), trained)

    @pytest.mark.parametrize("image_size", [(3, 8, 8), 8.5, "8", None], ids=str)
    def test_a_model_of_a_user_may_mean_something_else_by_image_size(self, tmp_path, image_size):
        class Net(PretrainedMixin, nn.Module):
            def __init__(self, in_channels=3, image_size=8):
                super().__init__()
                self.linear = nn.Linear(2, 2)

        Net(image_size=image_size).save_pretrained(tmp_path)
        assert Net.from_pretrained(tmp_path).pretrained_cfg.input_size is None

    def test_copies_keep_their_arguments(self, trained):
        assert copy.deepcopy(trained).init_arguments == trained.init_arguments

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: Scores((2, 3), scale=torch.ones(1)), "cannot hold the argument scale of Sco"),
            (lambda: Scores((2, 3), scale=float("nan")), "cannot hold the argument scale"),
            (lambda: type("Any", (CapsNet,), {"__init__": _anything})(3, 1, 18, channels=2),
             "the arguments of Any have no names to write down"),
        ],
        ids=["tensor", "nan", "positions"],
    )  # fmt: skip
    def test_arguments_that_cannot_be_written(self, tmp_path, build, message):
        with pytest.raises(TypeError, match=f"save_pretrained: .*{message}"):
            build().save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_another_class(self, saved):
        words = "holds a model 'capsnet', and DeepCapsNet is 'deep_capsnet'"
        with pytest.raises(CheckpointError, match=words):
            DeepCapsNet.from_pretrained(saved)

    def test_nothing_there(self, tmp_path):
        path = tmp_path / "none"
        for call in (
            lambda: CapsNet.from_pretrained(path),
            lambda: create_model(f"local-dir:{path}", pretrained=True),
        ):
            with pytest.raises(CheckpointError, match="none does not exist"):
                call()

    @pytest.mark.parametrize("pretrained", [False, True])
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model": "capsnt"}, "no model is named 'capsnt'.* mean 'capsnet'"),
            ({"model": ["capsnet"]}, r"no model is named \['capsnet'\]"),
            ({"model": "hf-hub:a/b"}, "no model is named 'hf-hub:a/b'"),
            ({"model": "efficient_capsnet.mnist"}, "no model is named 'efficient_capsnet.mnist'"),
            ({"model": "capsnet", "model_kwargs": None}, "'model_kwargs' of type NoneType; it"),
            ({"model": "capsnet", "model_kwargs": {"name": 3}}, "capsnet has no argument 'name'"),
            ({"model": "capsnet", "model_kwargs": {"pretrained": True}}, "no argument 'pretrain"),
            ({"model": "capsnet", "model_kwargs": {**KWARGS, "channels": 2**30}}, "does not fit"),
            ({"model": "deep_capsnet"}, "does not fit deep_capsnet"),
        ],
        ids=str,
    )  # fmt: skip
    def test_a_config_that_does_not_fit(self, saved, pretrained, config, message):
        """Whether the weights are asked for or not. No memory is taken for what it claims."""
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"create_model: .*{saved}.*{message}"):
            create_model(f"local-dir:{saved}", pretrained=pretrained)

    def test_weights_that_are_not_floating_point(self, saved, trained):
        whole = {name: value.int() for name, value in trained.state_dict().items()}
        write_sealed(saved / "model.safetensors", whole, {})
        with pytest.raises(CheckpointError, match=r"conv\.weight is torch\.int32 and must be fl"):
            load_model(saved)

    def test_as_many_class_names_as_classes(self, saved, trained):
        with pytest.raises(ValueError, match="class_names has 2 names, and the model has 3 cla"):
            trained.save_pretrained(saved, class_names=("a", "b"))
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps({**config, "class_names": ["a", "b"]}))
        assert load_model(saved).pretrained_cfg.class_names == ()

    def test_neither_a_path_nor_a_name(self):
        with pytest.raises(
            TypeError, match=r"from_pretrained: .* must be a str or a Path, got int"
        ):
            CapsNet.from_pretrained(3)


def _anything(self, *args, **kwargs):
    CapsNet.__init__(self, *args, **kwargs)


class TestHub:
    """Without a network: huggingface_hub's own cache, and a stand-in for its API."""

    @pytest.fixture
    def cache(self, tmp_path, saved):
        """The cache as a download of the directory leaves it."""
        commit = "0" * 40
        folder = tmp_path / "hub" / "models--me--digits"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        (folder / "snapshots").mkdir()
        saved.rename(folder / "snapshots" / commit)
        return tmp_path / "hub"

    def test_what_was_downloaded_before(self, cache, trained):
        options = {"cache_dir": cache, "local_files_only": True}
        for name in ("me/digits", "hf-hub:me/digits", "me/digits@main"):
            assert_equal_weights(CapsNet.from_pretrained(name, **options), trained)

    def test_a_name_of_the_hub_for_create_model(self, cache, trained, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        model = create_model("hf-hub:me/digits", pretrained=True)
        assert_equal_weights(model, trained)
        assert_equal_weights(load_model("hf-hub:me/digits"), trained)

    def test_neither_downloaded_nor_a_network(self, tmp_path):
        options = {"cache_dir": tmp_path, "local_files_only": True}
        words = "me/none was not downloaded before, and the Hub cannot be reached: connect"
        with pytest.raises(
            CheckpointError, match=words + ".*there is no directory 'me/none' either"
        ):
            CapsNet.from_pretrained("me/none", **options)
        with pytest.raises(CheckpointError, match=r"did you mean 'efficient_capsnet\.mnist'"):
            CapsNet.from_pretrained("efficient_capsnt.mnist", **options)

    def test_no_repository_name(self):
        with pytest.raises(CheckpointError, match="'a b' is no repository of the Hub: give owner"):
            CapsNet.from_pretrained("a b", local_files_only=True)

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("GatedRepoError", "accept them on huggingface.co"),
            ("RepositoryNotFoundError", "no repository me/digits that you may read"),
            ("RevisionNotFoundError", "me/digits has no such revision"),
            ("HfHubHTTPError", "the Hub refused me/digits"),
        ],
    )
    def test_refusals_of_the_hub(self, monkeypatch, kind, words):
        from huggingface_hub import errors

        def refuse(*args, **options):
            error = getattr(errors, kind)
            raise error.__new__(error, "reason")

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(CheckpointError, match=f"load_model: .*{words}"):
            load_model("hf-hub:me/digits")

    def test_without_huggingface_hub(self, monkeypatch, saved, trained):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert_equal_weights(CapsNet.from_pretrained(saved), trained)
        calls = {
            "create_model": lambda: create_model("hf-hub:me/digits", pretrained=True),
            "from_pretrained": lambda: CapsNet.from_pretrained("me/digits"),
            "push_to_hub": lambda: trained.push_to_hub("me/digits"),
        }
        for function, call in calls.items():
            words = rf'{function}: .*pip install "tritoncaps\[hub\]", or use a directory'
            with pytest.raises(ModuleNotFoundError, match=words):
                call()

    def test_a_push_without_a_network(self, monkeypatch, trained):
        """The library behind huggingface_hub raises an error of its own, which is no OSError."""

        class ConnectError(Exception):
            pass

        def refuse(*args, **options):
            raise ConnectError("[Errno 111] Connection refused")

        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
        words = r"push_to_hub: me/digits cannot be .* check the network.*\(ConnectError: \[Errno"
        with pytest.raises(CheckpointError, match=words):
            trained.push_to_hub("me/digits")

    def test_push(self, monkeypatch, trained):
        seen = {}

        class Api:
            def __init__(self, token):
                seen["token"] = token

            def create_repo(self, repo_id, **options):
                seen["create"] = options
                return SimpleNamespace(repo_id=repo_id)

            def upload_folder(self, repo_id, folder_path, **options):
                seen["upload"] = options
                card = (Path(folder_path) / "README.md").read_text()
                assert 'create_model("hf-hub:me/digits", pretrained=True)' in card
                assert_equal_weights(load_model(folder_path), trained)
                return "https://example.org/commit"

        monkeypatch.setattr("huggingface_hub.HfApi", Api)
        url = trained.push_to_hub("me/digits", class_names=NAMES, private=True, token="t")
        assert url == "https://example.org/commit"
        assert seen["token"] == "t"
        assert seen["create"] == {"private": True, "exist_ok": True}
        assert seen["upload"]["commit_message"] == "Push model using tritoncaps"
