"""Parts of images: poses, attention pooling, templates and their mixture, each as a plain loop."""

import math
import re

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal

from tritoncaps.layers import DrawnParts, PartEncoder, TemplateDecoder, affine_pose
from tritoncaps.layers._poses import compose, inverse

# Two poses that put no pixel of a template exactly on one of the image, where bilinear
# interpolation has a kink.
POSE = torch.tensor(
    [[[0.61, 0.23, 0.117], [-0.31, 0.53, -0.219]], [[0.43, 0.03, -0.31], [0.11, 0.71, 0.317]]]
)


def drawn(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64)


def homogeneous(pose):
    last = torch.tensor([0.0, 0, 1], dtype=pose.dtype).expand(*pose.shape[:-2], 1, 3)
    return torch.cat([pose, last], dim=-2)


@pytest.mark.parametrize("similarity", [False, True])
def test_a_pose_is_scale_shear_rotation_and_translation(similarity):
    """The product of a matrix for each, as the released parametrisation has it."""
    for numbers, pose in zip(
        parameters := drawn(7, 6), affine_pose(parameters, similarity=similarity), strict=True
    ):
        a, b, angle, shear, x, y = numbers.tolist()
        s_x, s_y = (1 / (1 + math.exp(-number)) + 0.01 for number in (a, b))
        theta, h = 2 * math.pi * angle, math.tanh(5 * shear)
        if similarity:
            s_y, h = s_x, 0.0
        cos, sin = math.cos(theta), math.sin(theta)
        rotation = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        scaled_and_sheared = torch.tensor([[s_x, h * s_y], [0, s_y]], dtype=torch.float64)
        torch.testing.assert_close(pose[:, :2], scaled_and_sheared @ rotation)
        torch.testing.assert_close(pose[:, :2].det().item(), s_x * s_y)
        shift = torch.tensor([math.tanh(5 * x), math.tanh(5 * y)], dtype=torch.float64)
        torch.testing.assert_close(pose[:, 2], shift)
    assert gradcheck(lambda p: affine_pose(p, similarity=similarity), drawn(2, 6).requires_grad_())


def test_poses_compose_and_invert():
    first, second = affine_pose(drawn(2, 5, 6))
    product = homogeneous(first) @ homogeneous(second)
    torch.testing.assert_close(homogeneous(compose(first, second)), product)
    torch.testing.assert_close(homogeneous(inverse(first)), homogeneous(first).inverse())


def test_attention_pools_each_part_by_itself():
    torch.manual_seed(0)
    encoder = PartEncoder(2, (9, 11), 3, features=2, channels=(4, 5), strides=(2, 1)).double()
    with torch.no_grad():
        encoder.position_bias.normal_()
    images = torch.rand(2, 2, 9, 11, dtype=torch.float64)
    poses, presence, features = encoder.eval()(images)
    hidden = encoder.convolutions(images) + encoder.position_bias
    assert hidden.shape == (2, 5, 2, 3)
    maps = encoder.readout(hidden).reshape(2, 3, 10, 6)
    for b in range(2):
        for i in range(3):
            weights = maps[b, i, 9].exp()
            pooled = (maps[b, i, :9] * weights).sum(dim=1) / weights.sum()
            torch.testing.assert_close(poses[b, i], affine_pose(pooled[:6]))
            torch.testing.assert_close(features[b, i], pooled[6:8])
            torch.testing.assert_close(presence[b, i], pooled[8].sigmoid())


def test_parts_start_in_the_middle_of_the_image():
    torch.manual_seed(0)
    encoder = PartEncoder(1, (40, 40), 40)
    with torch.no_grad():
        poses = encoder(torch.rand(8, 1, 40, 40)).poses
    assert poses[..., 2].abs().mean() < 0.2  # at full scale 0.75, and a third of them beyond 0.95
    assert poses[..., 2].std(dim=1).min() > 0.05


def test_the_encoder_is_noisy_in_training_alone_unless_told():
    torch.manual_seed(0)
    options = {"features": 1, "channels": (3,), "strides": (2,)}
    images = torch.rand(2, 1, 7, 7)
    encoder = PartEncoder(1, (7, 7), 4, noise=1.5, **options)
    quiet = encoder.eval()(images).presence.logit()
    assert torch.equal(quiet, encoder(images).presence.logit())
    shifts = torch.stack([encoder.train()(images).presence.logit() for _ in range(200)]) - quiet
    assert 1.4 < shifts.max() < 1.5001 and -1.5001 < shifts.min() < -1.4
    assert shifts.mean().abs() < 0.1
    noisy = PartEncoder(1, (7, 7), 4, noisy_evaluation=True, **options).eval()
    assert not torch.equal(noisy(images).presence, noisy(images).presence)
    silent = PartEncoder(1, (7, 7), 4, noise=0, **options)
    assert torch.equal(silent(images).presence, silent(images).presence)


def test_the_gradient_of_the_encoder():
    torch.manual_seed(0)
    encoder = PartEncoder(1, (5, 5), 2, features=1, channels=(2,), strides=(2,)).double().eval()
    images = torch.rand(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, *_: encoder(x), (images, *encoder.parameters()))


def small_decoder(features=0, channels=1):
    torch.manual_seed(0)
    decoder = TemplateDecoder(channels, (6, 5), 2, (3, 4), features=features, hidden=3).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    return decoder


def sample(template, x, y):
    """A template's value at a point, between pixels bilinear, and 0 outside."""
    h, w = template.shape
    column, row = (x + 1) / 2 * (w - 1), (y + 1) / 2 * (h - 1)
    total = 0.0
    for i in range(h):
        for j in range(w):
            weight = max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j))
            total = total + weight * template[i, j]
    return total


@pytest.mark.parametrize("features, scale", [(0, 1.0), (2, 0.3)])
def test_each_pixel_is_a_mixture_of_warped_templates(features, scale):
    decoder = small_decoder(features, channels=2)
    poses, presence = POSE.double()[None], torch.tensor([[0.9, 0.4]], dtype=torch.float64)
    given = drawn(1, 2, features) if features else None
    image = torch.rand(1, 2, 6, 5, dtype=torch.float64)
    result = decoder(poses, presence, given)
    colours = torch.ones(1, 2, 2) if given is None else decoder.colour(given)
    log_prob = torch.zeros((), dtype=torch.float64)
    mean = torch.zeros(1, 2, 6, 5, dtype=torch.float64)
    for row in range(6):
        for column in range(5):
            # Where the pixel is in each template.
            pixel = torch.tensor([2 * column / 4 - 1, 2 * row / 5 - 1, 1], dtype=torch.float64)
            logits, means = [], []
            for i in range(2):
                x, y, _ = (homogeneous(poses[0, i]).inverse() @ pixel).tolist()
                logits.append(sample(decoder.opacity[i, 0], x, y) + presence[0, i].log())
                colour = [sample(channel, x, y) for channel in decoder.template_logits[i].sigmoid()]
                means.append([a * b for a, b in zip(colour, colours[0, i], strict=True)])
            logits.append(torch.log(1 + decoder.background_opacity.exp()))
            means.append(list(decoder.background.sigmoid()))
            weights = torch.stack(logits).softmax(dim=0)
            for channel in range(2):
                values = torch.stack([torch.as_tensor(value[channel]) for value in means])
                densities = Normal(values, scale).log_prob(image[0, channel, row, column]).exp()
                log_prob = log_prob + (weights * densities).sum().log()
                mean[0, channel, row, column] = (weights * values).sum()
    torch.testing.assert_close(result.log_prob(image, scale), log_prob[None])
    torch.testing.assert_close(result.mean(), mean)
    total = result.log_weights.exp().sum(dim=1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_the_identity_puts_a_template_on_the_whole_image():
    decoder = TemplateDecoder(1, (6, 5), 1, (6, 5), features=0)
    result = decoder(torch.eye(2, 3)[None, None], torch.ones(1, 1))
    torch.testing.assert_close(result.means[0, 0], decoder.templates[0])


def test_an_absent_part_draws_nothing_and_breaks_nothing():
    decoder = small_decoder()
    poses = POSE.double()[None].requires_grad_()
    presence = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    result = decoder(poses, presence)
    alone = result.log_weights[:, [0, 2]].log_softmax(dim=1)
    torch.testing.assert_close(result.log_weights[:, [0, 2]], alone)
    log_prob = result.log_prob(torch.rand(1, 1, 6, 5, dtype=torch.float64))
    for grad in torch.autograd.grad(log_prob.sum(), (poses, presence)):
        assert grad.isfinite().all()


def test_the_gradient_of_the_decoder():
    """With respect to poses, presence, features and every parameter."""
    decoder = small_decoder(features=2)
    image = torch.rand(1, 1, 6, 5, dtype=torch.float64)
    presence = torch.tensor([[0.9, 0.4]], dtype=torch.float64, requires_grad=True)
    inputs = (POSE.double()[None].requires_grad_(), presence, drawn(1, 2, 2).requires_grad_())

    def log_prob(poses, presence, features, *parameters):
        return decoder(poses, presence, features).log_prob(image)

    assert gradcheck(log_prob, (*inputs, *decoder.parameters()))


def test_templates_start_orthogonal_and_within_the_range():
    decoder = TemplateDecoder(1, (40, 40), 40)
    logits = decoder.template_logits.detach()
    assert (logits.min(), logits.max()) == (0, 1)
    # Without the shift, the rows are orthogonal.
    flat = logits.flatten(1)
    centred = flat - flat.mean()
    cosines = (
        torch.nn.functional.normalize(centred, dim=1)
        @ torch.nn.functional.normalize(centred, dim=1).mT
    )
    assert (cosines - torch.eye(40)).abs().max() < 0.1


def test_drawn_parts_travel_through_pytrees():
    result = small_decoder()(POSE.double()[None], torch.ones(1, 2, dtype=torch.float64))
    leaves, spec = torch.utils._pytree.tree_flatten(result)
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), DrawnParts)


def a_drawing():
    """Two drawn images of 6×5 pixels, of two parts and a background."""
    return DrawnParts(torch.rand(2, 3, 1, 6, 5), torch.zeros(2, 3, 1, 6, 5))


CASES = {
    "pose": (
        lambda: affine_pose(torch.ones(2, 5)),
        "affine_pose: parameters must be (..., 6), got (2, 5)",
    ),
    "too small": (
        lambda: PartEncoder(1, (22, 40), 4),
        "PartEncoder: image_size=(22, 40) is too small for 4 convolutions with "
        "strides=(2, 2, 1, 1); enlarge or pad the images",
    ),
    "as many": (
        lambda: PartEncoder(1, (40, 40), 4, channels=(8, 8)),
        "PartEncoder: channels and strides must have the same length, got 2 and 4",
    ),
    "images": (
        lambda: PartEncoder(1, (40, 40), 4)(torch.ones(2, 3, 40, 40)),
        "PartEncoder: images must be (B, 1, 40, 40), got (2, 3, 40, 40)",
    ),
    "poses": (
        lambda: TemplateDecoder(1, (6, 6), 4, features=0)(torch.ones(2, 4, 3, 3), torch.ones(2, 4)),
        "TemplateDecoder: poses must be (B, 4, 2, 3), got (2, 4, 3, 3)",
    ),
    "no features": (
        lambda: TemplateDecoder(1, (6, 6), 4)(torch.ones(2, 4, 2, 3), torch.ones(2, 4)),
        "TemplateDecoder: features must be (B, 4, 16), got None",
    ),
    "features": (
        lambda: TemplateDecoder(1, (6, 6), 4, features=0)(
            torch.ones(2, 4, 2, 3), torch.ones(2, 4), torch.ones(2, 4, 2)
        ),
        "TemplateDecoder: features must be None, for the decoder has features=0",
    ),
    "features of other images": (
        lambda: TemplateDecoder(1, (6, 6), 4)(
            torch.ones(2, 4, 2, 3), torch.ones(2, 4), torch.ones(1, 4, 16)
        ),
        "TemplateDecoder: features has B=1 but poses has B=2 (poses: (2, 4, 2, 3), "
        "presence: (2, 4), features: (1, 4, 16))",
    ),
    "device": (
        lambda: TemplateDecoder(1, (6, 6), 4, features=0)(
            torch.ones(2, 4, 2, 3, device="meta"), torch.ones(2, 4, device="meta")
        ),
        "TemplateDecoder: opacity is on cpu but poses is on meta",
    ),
    "other images": (
        lambda: a_drawing().log_prob(torch.ones(1, 1, 6, 5)),
        "DrawnParts.log_prob: means has B=2 but images has B=1 (images: (1, 1, 6, 5), "
        "means: (2, 3, 1, 6, 5))",
    ),
    "images without channels": (
        lambda: a_drawing().log_prob(torch.ones(2, 6, 5)),
        "DrawnParts.log_prob: images must have 4 axes (B, C, H, W), got 3 (images: (2, 6, 5))",
    ),
    "scale": (
        lambda: a_drawing().log_prob(torch.ones(2, 1, 6, 5), 0.0),
        "DrawnParts.log_prob: scale must be > 0 and finite, got 0.0",
    ),
    "tiny scale": (
        lambda: a_drawing().log_prob(torch.ones(2, 1, 6, 5), 1e-7),
        "DrawnParts.log_prob: scale must be from 1e-6 to 1e6, got 1e-07",
    ),
}


@pytest.mark.parametrize(("call", "words"), CASES.values(), ids=CASES)
def test_errors_name_the_argument_and_both_numbers(call, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        call()


def test_maps_of_the_encoder_must_be_ints():
    with pytest.raises(TypeError, match="PartEncoder: channels must be a tuple of ints, got 8"):
        PartEncoder(1, (40, 40), 4, channels=8)
