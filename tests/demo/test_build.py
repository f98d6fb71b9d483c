"""The networks of the page, and how its folder is filled."""

import base64
import copy
import hashlib
import json
import stat
import tarfile

import build
import pytest
import torch
from networks import Drawer, Reader

from tritoncaps import ops
from tritoncaps.data import load_dataset, to_float
from tritoncaps.models import create_model


@pytest.fixture(scope="module")
def model():
    return create_model("efficient_capsnet", pretrained=True)


def primary_sums(model, features):
    """The primary capsules before their squash, (B, I, P)."""
    return model.primary(features).flatten(1).unflatten(1, (16, 8))


@torch.no_grad()
def test_the_shares_and_an_empty_image_make_the_length(model):
    torch.manual_seed(0)
    images = torch.rand(3, 1, 28, 28)
    result = Reader(model)(images)

    sums = primary_sums(model, model.features(images))
    u = ops.squash(sums, form="exponential")
    routing = model.routing
    s, coupling = ops.attention_routing(u, routing.weight, routing.bias, return_coupling=True)
    empty = primary_sums(model, model.features(torch.zeros(1, 1, 28, 28)))
    for b, j in enumerate(model(images).activations.argmax(dim=1)):
        # The empty image takes the same squash and coupling, which the shares hold fixed.
        part = empty[0] * (u[b] / sums[b]).mean(dim=-1, keepdim=True)
        votes = torch.einsum("ip,ipd->id", part, routing.weight[:, :, j])
        direction = s[b, j] / s[b, j].norm()
        of_empty = (coupling[b, :, j, None] * votes).sum(dim=0) @ direction
        length = result["shares"][b].sum() + of_empty
        torch.testing.assert_close(length, s[b, j].norm(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_page_reads_and_draws_what_the_model_does(model):
    torch.manual_seed(1)
    images = torch.rand(2, 1, 28, 28)
    expected = model(images)
    result = Reader(model)(images)
    torch.testing.assert_close(result["activations"], expected.activations)
    torch.testing.assert_close(result["poses"], expected.poses)
    longest = expected.activations.argmax(dim=1)
    drawn = Drawer(model.decoder)(
        expected.poses[torch.arange(2), longest], torch.nn.functional.one_hot(longest, 10).float()
    )
    torch.testing.assert_close(drawn["image"], expected.reconstruction)


@torch.no_grad()
def test_the_exported_networks_compute_what_torch_does(tmp_path, model):
    """Both compute in float32, and add in different orders.

    So both are compared with float64, and the files may be four times as far from it as torch is.
    Here it is at most once as far. Another processor adds in yet another order.
    """
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    build.export_networks(tmp_path)
    images = to_float(load_dataset("digits").test.images[:20])
    answers = model(images)
    longest = answers.activations.argmax(dim=1)
    capsules = answers.poses[range(20), longest], torch.nn.functional.one_hot(longest, 10).float()
    for name, network, inputs in (
        ("encoder", Reader(model), (images,)),
        ("decoder", Drawer(model.decoder), capsules),
    ):
        session = onnxruntime.InferenceSession(
            tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"]
        )
        names = [entry.name for entry in session.get_inputs()]
        rows = [
            session.run(None, {n: x[b : b + 1].numpy() for n, x in zip(names, inputs, strict=True)})
            for b in range(20)  # the page reads one drawing at a time
        ]
        exact = copy.deepcopy(network).double()(*(x.double() for x in inputs))
        here = network(*inputs)
        results = [entry.name for entry in session.get_outputs()]
        assert results == list(here)
        for result, parts in zip(results, zip(*rows, strict=True), strict=True):
            there = torch.cat([torch.from_numpy(part) for part in parts])
            error, usual = ((x - exact[result]).abs().max() for x in (there, here[result]))
            assert error <= 4 * usual, (
                f"{name}, {result}: {error:.1e} from float64, torch {usual:.1e}"
            )


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A program in the place of npm that packs two small files. Returns the archive's SHA-512."""
    archive = tmp_path / "runtime.tgz"
    with tarfile.open(archive, "w:gz") as files:
        for name in build.RUNTIME_FILES:
            path = tmp_path / name
            path.write_text(name)
            files.add(path, f"package/dist/{name}")
    program = tmp_path / "npm"
    answer = json.dumps([{"filename": archive.name}])
    program.write_text(f"#!/bin/sh\ncp '{archive}' \"$5\"\necho '{answer}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(program))
    return base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()


def test_the_runtime_is_fetched_once(tmp_path, monkeypatch, npm):
    monkeypatch.setattr(build, "RUNTIME_SHA512", npm)
    folder = tmp_path / "runtime"
    build.fetch_runtime(folder)
    for name in build.RUNTIME_FILES:
        assert (folder / name).read_text() == name
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.fetch_runtime(folder)
    monkeypatch.setattr(build, "RUNTIME", "onnxruntime-web@0.0.0")
    with pytest.raises(RuntimeError, match="npm is not installed"):
        build.fetch_runtime(folder)


@pytest.mark.parametrize("name", build.RUNTIME_FILES)
def test_a_runtime_that_lacks_a_file_is_fetched_again(tmp_path, monkeypatch, npm, name):
    monkeypatch.setattr(build, "RUNTIME_SHA512", npm)
    build.fetch_runtime(tmp_path / "runtime")
    (tmp_path / "runtime" / name).unlink()
    build.fetch_runtime(tmp_path / "runtime")
    assert (tmp_path / "runtime" / name).read_text() == name


def test_another_runtime_than_the_tested_one_is_refused(tmp_path, npm):
    folder = tmp_path / "runtime"
    with pytest.raises(RuntimeError, match="SHA-512 differs"):
        build.fetch_runtime(folder)
    assert not folder.exists()


def test_without_npm_the_program_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "export_networks", lambda folder: None)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.main(["--output", str(tmp_path / "page")]) == 2
    assert capsys.readouterr().err.startswith("build.py: error: npm is not installed")
    assert (tmp_path / "page/index.html").exists()


def test_a_port_in_use_is_noticed_before_the_build(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "build", lambda output: pytest.fail("the page was built"))
    with build.server(tmp_path, 0) as other:
        assert build.main(["--serve", "--port", str(other.server_port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"build.py: error: --port {other.server_port}: ")
    assert "choose another" in error


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_number_that_is_no_port_is_refused(capsys, port):
    with pytest.raises(SystemExit):
        build.main(["--serve", "--port", port])
    assert f"expected 0 to 65535, got {port}" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "fetch_runtime", lambda folder: None)
    monkeypatch.setattr("tritoncaps.export.find_spec", lambda name: None)
    assert build.main(["--output", str(tmp_path)]) == 2
    assert "pip install 'tritoncaps[export]'" in capsys.readouterr().err


def test_a_build_can_be_stopped(tmp_path, monkeypatch):
    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "fetch_runtime", stop)
    assert build.main(["--output", str(tmp_path)]) == 130


def test_the_page_is_served_until_it_is_stopped(tmp_path, monkeypatch, capsys):
    built, opened = [], []

    def stop(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "build", built.append)
    monkeypatch.setattr(build.webbrowser, "open", opened.append)
    monkeypatch.setattr(build.ThreadingHTTPServer, "serve_forever", stop)
    assert build.main(["--open", "--port", "0", "--output", str(tmp_path)]) == 130
    assert built == [tmp_path]
    assert opened[0] in capsys.readouterr().out
