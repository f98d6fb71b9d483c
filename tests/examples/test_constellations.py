"""The constellations: what is drawn, how errors are counted, and how a run goes."""

import itertools
import signal
from types import SimpleNamespace

import pytest
import torch
from example_runs import stop_after
from test_experiments import check_picture, finish, rows_of, run, untimed

import constellations
from constellations import (
    OWNER,
    ConstellationNet,
    Constellations,
    Explain,
    Recipe,
    best_of,
    draw_constellations,
    needed,
    segmented,
)
from engine.training import Trainer
from tritoncaps.losses import entropy_sparsity

pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    *("--epochs=2", "--steps=3", "--batch-size=8", "--dim=8", "--blocks=1", "--log-interval=1"),
    "--starts=2",
)


def drawn(count=500, seed=0):
    return draw_constellations(count, torch.Generator().manual_seed(seed))


def test_a_pattern_is_a_moved_square_or_triangle():
    points, presence, pattern = drawn()
    assert points.abs().max() <= 1
    assert 0.45 < presence.mean() < 0.55
    ratios = {0: 2**0.5, 1: 5**0.5 / 2, 2: 2**0.5}  # of the longest to the shortest distance
    for k, longest in ratios.items():
        mine = torch.stack([points[b, pattern[b] == k] for b in range(len(points))])
        assert mine.shape[1] == OWNER.tolist().count(k)
        distances = torch.cdist(mine, mine) + 1e3 * torch.eye(mine.shape[1])
        shortest = distances.amin(dim=(1, 2))
        ratio = torch.cdist(mine, mine).amax(dim=(1, 2)) / shortest
        torch.testing.assert_close(ratio, torch.full_like(ratio, longest), rtol=1e-3, atol=0)
        # The shortest distance of the pattern is 2, scaled by 1 to 4, and all by 2/40.2.
        unit = 4 / (36 + 3 * 2**0.5)
        assert 0.999 * unit <= shortest.min() < 1.1 * unit
        assert 3.9 * unit < shortest.max() <= 4.001 * unit
        # All points of a pattern are there, or none.
        there = torch.stack([presence[b, pattern[b] == k] for b in range(len(points))])
        assert (there.amin(dim=1) == there.amax(dim=1)).all()


def test_points_come_in_any_order():
    assert len({tuple(row) for row in drawn(50).pattern.tolist()}) > 45


def test_batches_depend_on_seed_epoch_and_batch_alone():
    source = Constellations(3, batches=4, batch_size=2)
    batches = list(source.epoch(1))
    assert len(batches) == len(source) == 4 and len(source.images) == 8
    for (points, patterns), (again, same) in zip(batches[2:], source.epoch(1, 2), strict=True):
        assert torch.equal(points, again) and torch.equal(patterns, same)
    others = [*source.epoch(2), *Constellations(4, 4, 2).epoch(1)]
    distinct = {tuple(points.flatten().tolist()) for points, _ in [*batches, *others]}
    assert len(distinct) == 12
    assert batches[0][0].shape == (2, 3, 11, 1)


def test_a_segmentation_is_right_by_the_best_naming_of_capsules():
    torch.manual_seed(0)
    capsules, patterns = torch.randint(3, (2, 20, 11))
    presence = (torch.rand(20, 11) < 0.5).float()
    right, present = segmented(capsules, patterns, presence)
    for b in range(20):
        there = [n for n in range(11) if presence[b, n]]
        best = max(
            sum(names[capsules[b, n]] == patterns[b, n] for n in there)
            for names in itertools.permutations(range(3))
        )
        assert (right[b], present[b]) == (best, len(there))


def explained(seed=0, count=40):
    constellations, _ = next(Constellations(seed, 1, count).epoch(0))
    torch.manual_seed(seed)
    return ConstellationNet(8, 1, 3).eval()(constellations)


def test_chosen_capsules_explain_and_no_other():
    output = explained()
    capsules = torch.tensor([1.0, 0, 1]).expand(40, 3)
    chosen = output.by(capsules)
    present = output.presence > 0
    assert chosen.posterior[:, :, 1].max() == 0
    assert (chosen.posterior[present][:, [0, 2]] > 0).all()
    # The weights of their votes are equal, whatever presence the network gives them.
    votes = output.votes._replace(logits=output.votes.logits * 0)
    log_prob, _ = votes.set_log_prob(output.points, output.presence)
    torch.testing.assert_close(output.by(torch.ones(40, 3)).log_prob, log_prob)


@pytest.mark.parametrize("cost", [0.0, 0.3, 1e6])
def test_the_needed_capsules_are_the_likeliest_less_their_cost(cost):
    output = explained()
    choices = [torch.tensor(choice) for choice in itertools.product((0.0, 1.0), repeat=3)]
    scores = [output.by(c.expand(40, 3)).log_prob - cost * c.sum() for c in choices]
    best = torch.stack(scores).amax(dim=0)
    found = needed(output, cost)
    torch.testing.assert_close(output.by(found).log_prob - cost * found.sum(dim=1), best)
    empty = output.presence.sum(dim=1) == 0
    assert empty.any() and not found[empty].any()
    if cost == 1e6:
        assert not found.any()


def test_needed_capsules_learn_to_be_present():
    """In the second half of the steps, the loss is the likelihood by them and their presence."""
    output = explained()
    recipe = Recipe(epochs=1, steps=100, capsule_cost=0.3, deformation=7.0)
    task = Explain(recipe)
    task.step = 45
    capsules = needed(output, 0.3)
    logits = output.votes.capsule_logits
    presence = -(capsules * logits.sigmoid().log() + (1 - capsules) * (-logits).sigmoid().log())
    expected = 7 * output.votes.deformation - output.by(capsules).log_prob + presence.sum(dim=1)
    torch.testing.assert_close(task.loss(output, None, None), expected.mean())
    assert torch.equal(task.predictions(output), output.by(capsules).posterior.argmax(dim=2))


def test_the_start_with_the_lowest_loss_half_way_goes_on():
    losses = ([3.0, 2.0, 0.0], [1.0, 1.5], [0.0, 1.75])
    starts = [SimpleNamespace(rows=[{"train_loss": x} for x in of]) for of in losses]
    assert best_of(starts, Recipe(epochs=4)) is starts[1]


def test_the_weight_of_the_entropy_rises_and_falls():
    task = Explain(Recipe(epochs=10, steps=100, posterior_within=7.0))
    weights = {}
    for task.step in (0, 50, 150, 250, 350, 450, 999, None):
        weights[task.step] = task.entropy_weight()
    assert weights == pytest.approx(
        {0: 0, 50: 0, 150: 3.5, 250: 7, 350: 3.5, 450: 1, 999: 1, None: 1}
    )
    assert Explain(Recipe(posterior_within=0.5)).entropy_weight() == 0.5


def test_the_loss_has_the_weight_of_the_step():
    (constellations, patterns) = next(Constellations(1, 1, 16).epoch(0))
    torch.manual_seed(0)
    recipe = Recipe(epochs=1, steps=100, posterior_within=8.0, posterior_between=2.0)
    output = ConstellationNet(8, 1, 3)(constellations)
    mass = (output.posterior * output.presence.unsqueeze(2)).sum(dim=1)
    within, between = entropy_sparsity(mass)
    task = Explain(recipe)
    losses = []
    for task.step in (0, 25):
        losses.append(task.loss(output, patterns, constellations))
    torch.testing.assert_close(losses[1] - losses[0], 8 * (within - between))


@pytest.mark.parametrize("frequencies", [0, 3])
def test_all_votes_of_a_capsule_are_as_present_as_the_capsule(frequencies):
    constellations, _ = next(Constellations(1, 1, 5).epoch(0))
    torch.manual_seed(0)
    output = ConstellationNet(8, 1, frequencies).eval()(constellations)
    presence = output.votes.capsule_logits.sigmoid()
    expected = presence.unsqueeze(1).expand(5, 4, 3)
    torch.testing.assert_close(output.votes.logits.exp(), expected)
    assert output.posterior.shape == (5, 11, 3)


def table_of(directory):
    return untimed(rows_of(directory, "segmentation"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--capsule-cost=nan"], "--capsule-cost nan must be >= 0 and finite"),
        (["--posterior-within=-1"], "--posterior-within -1.0 must be >= 0 and finite"),
        (["--frequencies=17"], "--frequencies 17 must be in 0 .. 16"),
    ],
)
def test_a_wrong_flag_is_refused(flags, words, tmp_path):
    status, printed = run(constellations, *TINY, *flags, f"--output-dir={tmp_path / 'run'}")
    assert status == 2 and words in printed
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_continues_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    flags = (*TINY, "--seeds=2")
    printed = finish(constellations, *flags, f"--output-dir={tmp_path / 'whole'}")
    assert "segmentation error " in printed and " ± " in printed
    check_picture(tmp_path / "whole/constellations.png", (700, 900))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 11)  # in the first epoch of the second seed
        status, printed = run(constellations, *flags, f"--output-dir={tmp_path / 'parts'}")
    assert status == 130 and "stopped and saved" in printed
    printed = finish(constellations, *flags, f"--output-dir={tmp_path / 'parts'}")
    assert "resuming    seed 2, start 1 after 0 epochs and 2 batches" in printed
    assert "finished    seed 1, start 1" in printed
    assert table_of(tmp_path / "parts") == table_of(tmp_path / "whole")
    # More seeds join, and nothing else may change.
    printed = finish(constellations, *TINY, "--seeds=3", f"--output-dir={tmp_path / 'parts'}")
    assert "training    seed 3, start 1" in printed
    assert table_of(tmp_path / "parts")[:2] == table_of(tmp_path / "whole")
    status, printed = run(constellations, *TINY, "--lr=1", f"--output-dir={tmp_path / 'parts'}")
    assert status == 2 and "was made with --lr 0.002, not --lr 1" in printed


def test_the_start_that_goes_on_is_stopped_and_continued(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(constellations, *TINY, f"--output-dir={whole}")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 8)  # two starts take three steps each, and this is the second one more
        status, printed = run(constellations, *TINY, f"--output-dir={parts}")
    assert status == 130 and "seed 1 goes on with start " in printed
    finish(constellations, *TINY, f"--output-dir={parts}")
    assert table_of(parts) == table_of(whole)


def test_a_signal_in_an_evaluation_stops_the_program(tmp_path, monkeypatch):
    """The evaluation is the last of the first start. The second start does not begin."""

    def evaluate(self, images):
        signal.raise_signal(signal.SIGTERM)
        return inner(self, images)

    inner = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    status, printed = run(constellations, *TINY, f"--output-dir={tmp_path / 'run'}")
    assert status == 130 and "seed 1, start 2" not in printed


def test_a_dry_run_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "dry run: everything works" in finish(constellations, "--dry-run", "--dim=8")
    assert list(tmp_path.iterdir()) == []
