"""Stacked capsule autoencoder: the released sizes, where gradients stop, and that it learns."""

import re
from pathlib import Path

import pytest
import torch

from tritoncaps.export import to_program
from tritoncaps.losses import StackedCapsuleLoss
from tritoncaps.models import SCAE, SCAEOutput, create_model


def leaves_of(output):
    return torch.utils._pytree.tree_leaves(output)


def loss_of(output, loss=None):
    loss = loss or StackedCapsuleLoss()
    return loss(
        output.image_log_prob,
        output.part_log_prob,
        output.activations,
        output.explained,
        output.votes.deformation,
    )


def test_it_has_the_sizes_of_the_released_configuration():
    model = create_model("scae")
    assert model.image_shape == (1, 40, 40)
    encoder, templates = model.part_encoder, model.template_decoder
    kernels = [layer.weight.shape for layer in encoder.convolutions[::2]]
    assert kernels == [(128, 1, 3, 3)] + 3 * [(128, 128, 3, 3)]
    assert [layer.stride for layer in encoder.convolutions[::2]] == 2 * [(2, 2)] + 2 * [(1, 1)]
    assert encoder.position_bias.shape == (128, 5, 5)
    assert encoder.readout.weight.shape == (40 * (6 + 16 + 1) + 40, 128, 1, 1)
    assert templates.templates.shape == (40, 1, 11, 11)
    objects, decoder = model.object_encoder, model.object_decoder
    assert objects.first.weight.shape == (16, 6 + 1 + 16 + 121)
    assert len(objects.blocks) == 3 and objects.blocks[0].attention.num_heads == 1
    assert objects.queries.shape == (32, 256)
    assert decoder.static.shape == (32, 40, 6)
    assert [decoder.reduce[0].weight.shape, decoder.reduce[2].weight.shape] == [
        (32, 256, 128), (32, 128, 32),
    ]  # fmt: skip
    assert decoder.expand[2].weight.shape == (32, 128, 6 * 40 + 6 + 1 + 40 + 40)
    numbers = [sum(p.numel() for p in part.parameters()) for part in model.children()]
    assert numbers == [571_072, 10_259, 284_704, 2_669_792]
    with torch.no_grad():
        output = model.eval()(torch.rand(2, 1, 40, 40))
    assert output.activations.shape == output.explained.shape == (2, 32)
    assert output.parts.poses.shape == (2, 40, 2, 3)
    assert output.votes.poses.shape == (2, 40, 32, 2, 3)
    assert output.posterior.shape == (2, 40, 32)


@pytest.mark.parametrize(
    "options",
    [
        {"in_channels": 3, "image_size": (14, 17), "template_size": (3, 5)},
        {"features": 0, "objects": 1, "parts": 1, "normalize": True},
    ],
)
def test_it_takes_any_sizes(device, small_model, options):
    model = small_model("scae", **options).to(device)
    images = torch.rand(3, *model.image_shape, device=device)
    output = model(images)
    assert isinstance(output, SCAEOutput)
    assert output.reconstruction.shape == images.shape
    assert all(leaf.isfinite().all() for leaf in leaves_of(output))
    assert ((output.activations > 0) & (output.activations < 1)).all()
    torch.testing.assert_close(output.explained, output.posterior.sum(dim=1))
    loss_of(output).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.eval()(images[:0]).activations.shape == (0, output.activations.shape[1])


def test_the_output_is_made_of_its_parts(small_model):
    model = small_model("scae", normalize=True, pixel_scale=0.3).eval()
    images = torch.rand(2, 1, 14, 14)
    output = model(images)
    parts, decoder = model.part_encoder(images), model.template_decoder
    drawn = decoder(*parts)
    torch.testing.assert_close(output.reconstruction, drawn.mean())
    torch.testing.assert_close(output.image_log_prob, drawn.log_prob(images, 0.3))
    colours = decoder.colour(parts.features)[..., None, None]
    described = [parts.poses.flatten(2), 1 - parts.presence[..., None], parts.features]
    described.append((decoder.templates * colours).flatten(2))
    votes = model.object_decoder(model.object_encoder(torch.cat(described, dim=2), parts.presence))
    expected = votes.log_prob(parts.poses, parts.presence)
    torch.testing.assert_close((output.part_log_prob, output.posterior), expected)
    torch.testing.assert_close(output.activations, votes.presence)


def test_objects_teach_the_parts_nothing_but_their_features(small_model):
    model = small_model("scae").eval()
    output = model(torch.rand(2, 1, 14, 14))
    decoder = model.template_decoder
    stopped = [output.parts.poses, output.parts.presence, decoder.template_logits, decoder.opacity]
    stopped += decoder.colour.parameters()
    grads = torch.autograd.grad(
        output.part_log_prob.sum(), [*stopped, output.parts.features], allow_unused=True
    )
    assert grads[:-1] == (None,) * len(stopped)
    assert grads[-1].any()


def test_an_evaluation_draws_no_noise_unless_told(small_model):
    images = torch.rand(2, 1, 14, 14)
    quiet, told = small_model("scae"), small_model("scae", noisy_evaluation=True)
    for model, training, is_noisy in (
        (quiet, True, True),
        (quiet, False, False),
        (told, False, True),
    ):
        model.train(training)
        first, second = (leaves_of(model(images)) for _ in range(2))
        assert is_noisy != all(map(torch.equal, first, second))


def test_a_bad_image_stays_alone(device, small_model):
    model = small_model("scae").to(device).eval()
    images = torch.rand(3, 1, 14, 14, device=device)
    spoilt = images.clone()
    spoilt[1, 0, 5, 5] = float("nan")
    with torch.no_grad():
        results = zip(leaves_of(model(spoilt)), leaves_of(model(images)), strict=True)
        for result, expected in results:
            assert result[1].isnan().any()
            assert torch.equal(result[::2], expected[::2])


def test_it_learns_where_a_square_is(one_thread):
    """Without labels: after a few steps the drawn image is like the image."""
    torch.manual_seed(0)
    model = SCAE(
        image_size=14, parts=4, template_size=5, features=2, objects=2, channels=(16, 16),
        strides=(2, 1), attention_blocks=1, encoding_dim=8, params=4, hidden=8,
    )  # fmt: skip
    images = torch.zeros(32, 1, 14, 14)
    for image, (row, column) in zip(images, torch.randint(1, 9, (32, 2)), strict=True):
        image[0, row : row + 4, column : column + 4] = 1
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = model(images)
    for _ in range(60):
        output = model(images)
        loss = loss_of(output, StackedCapsuleLoss(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error, first = ((x.reconstruction - images).square().mean() for x in (output, before))
    assert error < first / 2
    assert output.part_log_prob.mean() > before.part_log_prob.mean() + 1


def test_the_program_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs/scae.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(program, "scae.md", "exec"), names)
    assert all(p.grad is not None for p in names["model"].parameters())


def test_it_saves_and_loads_itself(small_model, tmp_path):
    model = small_model("scae").eval()
    model.save_pretrained(tmp_path / "saved")
    images = torch.rand(2, 1, 14, 14)
    again = SCAE.from_pretrained(tmp_path / "saved").eval()
    assert "pipeline_tag: image-feature-extraction" in (tmp_path / "saved/README.md").read_text()
    assert all(map(torch.equal, leaves_of(again(images)), leaves_of(model(images))))


def test_an_exported_program_takes_any_batch(small_model):
    model = small_model("scae").eval()
    program = to_program(model, torch.rand(2, 1, 14, 14)).module()
    for B in (1, 3):
        images = torch.rand(B, 1, 14, 14)
        actual, expected = leaves_of(program(images)), leaves_of(model(images))
        torch.testing.assert_close(actual, expected)


def test_errors_name_the_argument_and_both_numbers(small_model):
    for call, words in (
        (lambda: SCAE(image_size=22), "PartEncoder: image_size=(22, 22) is too small for 4 conv"),
        (lambda: SCAE(parts=0), "SCAE: parts must be >= 1, got 0"),
        (
            lambda: small_model("scae")(torch.rand(2, 1, 14, 15)),
            "SCAE: images must be (B, 1, 14, 14), got (2, 1, 14, 15)",
        ),
        (lambda: SCAE(pixel_scale=1e-20), "SCAE: pixel_scale must be from 1e-6 to 1e6, got 1e-20"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
            call()
