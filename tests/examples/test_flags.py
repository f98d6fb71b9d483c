"""Flags: the fields of a dataclass define the command line, its help and its errors."""

from dataclasses import dataclass, fields

import pytest

import train_mnist
from engine.flags import (
    NO_TRAINING,
    Machine,
    Output,
    Recipe,
    as_dict,
    first_difference,
    flag,
    flag_name,
    parse,
    positive,
)
from engine.runner import check_model_kwargs


@dataclass(frozen=True)
class Example:
    """An example."""

    paths: list[str] = flag(..., "what to read", nargs="+", metavar="PATH")
    count: int = flag(3, "how many", "-c", type=positive, metavar="N")
    share: float = flag(0.5, "how much (default: half)")
    name: str | None = flag(None, "who")
    keep: bool = flag(True, "keep it")
    loud: bool = flag(False, "say it")


def read(*argv, **options):
    return parse("Do it.\n\nMore.", argv, Example, **options)[0]


class TestParse:
    def test_defaults_are_those_of_the_fields(self):
        assert read("a", "b") == Example(["a", "b"], 3, 0.5, None, True, False)

    def test_every_field_is_a_flag(self):
        given = read("a", "-c", "4", "--share=1", "--name=x", "--no-keep", "--loud")
        assert given == Example(["a"], 4, 1.0, "x", False, True)

    def test_a_program_may_have_other_defaults_and_fewer_flags(self, capsys):
        given = read("a", leave_out=("share",), count=7, share=0.25, unknown=1)
        assert (given.count, given.share) == (7, 0.25)
        with pytest.raises(SystemExit):
            read("a", "--share=1", leave_out=("share",))
        assert "unrecognized arguments: --share=1" in capsys.readouterr().err

    def test_the_help_tells_each_default_once(self, capsys):
        with pytest.raises(SystemExit) as stop:
            read("--help", name="me")
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert "Do it." in printed and "More." not in printed
        for text in ("how many (default: 3)", "how much (default: half)", "who (default: me)"):
            assert text in printed
        assert printed.count("default") == 5

    @pytest.mark.parametrize(
        "argument, message",
        [
            ("--count=0", "argument -c/--count: must be >= 1, got 0"),
            ("--count=many", "argument -c/--count: invalid positive value: 'many'"),
            ("--share=x", "argument --share: invalid float value: 'x'"),
        ],
    )
    def test_errors_name_flag_and_value(self, capsys, argument, message):
        with pytest.raises(SystemExit) as stop:
            read("a", argument)
        assert stop.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")


class TestModelKwargs:
    def test_values_are_literals_or_text(self):
        argv = ("--model-kwargs", "iterations=2", "channels=(8, 8)", "gradient=last", "x=a=b")
        (recipe,) = parse("Train.", argv, Recipe)
        assert recipe.model_kwargs == {
            "iterations": 2, "channels": (8, 8), "gradient": "last", "x": "a=b",
        }  # fmt: skip

    def test_nothing_is_executed(self):
        (recipe,) = parse("Train.", ["--model-kwargs", "x=exit()", "y={1, 2}"], Recipe)
        assert recipe.model_kwargs == {"x": "exit()", "y": "{1, 2}"}

    def test_flags_of_their_own_fill_them_too(self):
        argv = ("--gradient=last", "--model-kwargs", "iterations=2", "--learned-prior")
        (recipe,) = parse("Train.", argv, Recipe)
        expected = {"gradient": "last", "iterations": 2, "learned_prior": True}
        assert recipe.model_kwargs == expected
        # A resumed run has those of the run as defaults.
        (recipe,) = parse("Train.", ["--gradient=full"], Recipe, model_kwargs=expected)
        assert recipe.model_kwargs == {**expected, "gradient": "full"}

    @pytest.mark.parametrize(
        "argv",
        [
            ("--gradient=full", "--model-kwargs", "gradient=last"),
            ("--model-kwargs", "gradient=full", "--gradient=last"),
        ],
    )
    def test_two_values_of_one_argument_are_refused(self, capsys, argv):
        with pytest.raises(SystemExit):
            parse("Train.", argv, Recipe)
        assert "gradient is given twice, as full and as last" in capsys.readouterr().err

    @pytest.mark.parametrize("text", ["iterations", "=2", "2=3", "a b=1"])
    def test_a_value_that_is_no_pair_is_refused(self, capsys, text):
        with pytest.raises(SystemExit):
            parse("Train.", ["--model-kwargs", text], Recipe)
        expected = f"argument --model-kwargs: expected KEY=VALUE, got {text!r}"
        assert expected in capsys.readouterr().err

    def test_an_unknown_one_is_refused_with_a_list_of_the_known_ones(self):
        recipe = Recipe(model="capsnet", model_kwargs={"secondary_iterations": 2})
        message = r"--model-kwargs secondary_iterations: capsnet has no such argument, it has iter"
        with pytest.raises(ValueError, match=message):
            check_model_kwargs(recipe)

    def test_what_the_images_decide_is_refused(self):
        with pytest.raises(ValueError, match="--model-kwargs image_size: the images decide it"):
            check_model_kwargs(Recipe(model_kwargs={"image_size": 32}))

    def test_arguments_of_the_network_pass(self):
        check_model_kwargs(Recipe(model="capsnet", model_kwargs={"iterations": 1}))
        check_model_kwargs(Recipe(model_kwargs={"secondary_iterations": 1, "hidden_capsules": 4}))


class TestRecipe:
    def test_the_first_difference_is_named(self):
        before = as_dict(Recipe())
        assert first_difference(Recipe(), before) is None
        assert first_difference(Recipe(gamma=0.5, seed=2), before) == "gamma"

    def test_more_epochs_are_no_difference(self):
        assert first_difference(Recipe(epochs=9), as_dict(Recipe())) is None

    def test_a_tuple_equals_the_list_that_json_makes_of_it(self):
        recipe = Recipe(model_kwargs={"channels": (8, 8)})
        assert first_difference(recipe, {"model_kwargs": {"channels": [8, 8]}}) is None

    def test_a_data_set_fills_in_what_no_flag_gave(self):
        given = Recipe(max_shift=1)
        mnist, digits = given.on("mnist", 30), given.on("digits", 15)
        assert (mnist.epochs, mnist.batch_size, mnist.reconstruction_weight) == (30, 128, 0.0005)
        assert (digits.epochs, digits.batch_size) == (15, 32)
        assert mnist.max_shift == digits.max_shift == 1 and digits.dataset == "digits"
        norb, folder = Recipe().on("smallnorb", 30), Recipe(crop=0).on("folder", 30)
        assert (norb.max_shift, norb.crop) == (8, 32) and (folder.max_shift, folder.crop) == (2, 0)

    def test_no_two_groups_share_a_name(self):
        groups = (train_mnist.Run, Recipe, Machine, Output)
        names = [entry.name for group in groups for entry in fields(group)]
        assert len(names) == len(set(names))

    def test_a_program_that_only_tests_needs_the_images(self):
        needed = {entry.name for entry in fields(Recipe)} - NO_TRAINING
        assert needed == {"dataset", "image_size", "crop", "limit_test"}


def test_the_help_of_train_mnist_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        train_mnist.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for group in (train_mnist.Run, Recipe, Machine, Output):
        for entry in fields(group):
            if entry.name not in ("limit_train", "limit_test"):
                assert flag_name(entry.name) in printed
    assert "None" not in printed
