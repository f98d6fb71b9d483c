"""Build the page where one draws a digit, and serve it.

    python demo/build.py --open                # build, serve, open the browser
    python demo/build.py                       # only build; then: python -m http.server -d demo
    python demo/build.py --output site         # a folder to put on any web server

Needs `pip install "tritoncaps[export]"` and npm. The page is static: two ONNX files that are
exported from the pretrained network, and ONNX Runtime for the browser.
"""

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import webbrowser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from networks import Drawer, Reader

from tritoncaps.export import to_onnx
from tritoncaps.layers import ReconstructionDecoder
from tritoncaps.models import EfficientCapsNet, create_model

PAGE = Path(__file__).parent
# What the page consists of, without what is built.
SOURCES = ("*.html", "*.css", "*.js", "*.svg")
RUNTIME = "onnxruntime-web@1.30.0"
# npm checks a package against its registry. This also checks the registry.
RUNTIME_SHA512 = (
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def main(argv: list[str] | None = None) -> int:
    """Build and serve; returns the exit status of the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=PAGE, help="the folder of the whole page")
    parser.add_argument("--serve", action="store_true", help="serve the page on this machine")
    parser.add_argument("--open", action="store_true", help="serve it, and open it in a browser")
    parser.add_argument("--port", type=int, default=8000, help="of the server; 0 is any free one")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"argument --port: expected 0 to 65535, got {args.port}")
    try:
        if args.serve or args.open:
            # A port in use is noticed before the build, which takes a while.
            with server(args.output, args.port) as running:
                build(args.output)
                serve(running, args.open)
        else:
            build(args.output)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"build.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def build(output: Path) -> None:
    """Write the whole page to a folder. A runtime that is there already is kept."""
    output.mkdir(parents=True, exist_ok=True)
    if output.resolve() != PAGE.resolve():
        for pattern in SOURCES:
            for path in PAGE.glob(pattern):
                shutil.copy(path, output)
    fetch_runtime(output / "runtime")
    export_networks(output / "models")
    built = [path for name in ("models", "runtime") for path in (output / name).iterdir()]
    size = sum(path.stat().st_size for path in built)
    print(f"{output}: the page is complete, with {size / 1e6:.1f} MB of networks and runtime")


def export_networks(folder: Path) -> None:
    """Write encoder.onnx and decoder.onnx."""
    print("exporting the networks …", flush=True)
    model = create_model("efficient_capsnet", pretrained=True)
    assert isinstance(model, EfficientCapsNet)
    assert isinstance(model.decoder, ReconstructionDecoder)
    folder.mkdir(exist_ok=True)
    example = torch.zeros(1, *model.image_shape)
    to_onnx(Reader(model), folder / "encoder.onnx", example, dynamic_batch=False)
    capsule = torch.zeros(1, model.decoder.dim), torch.zeros(1, model.decoder.num_classes)
    to_onnx(Drawer(model.decoder), folder / "decoder.onnx", capsule, dynamic_batch=False)


def fetch_runtime(folder: Path) -> None:
    """Get ONNX Runtime for the browser from npm."""
    version = folder / "version.txt"
    complete = all((folder / name).is_file() for name in (*RUNTIME_FILES, version.name))
    if complete and version.read_text() == RUNTIME:
        return
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not installed: it comes with Node.js (https://nodejs.org)")
    print(f"getting {RUNTIME} from npm …", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        packed = subprocess.run(
            [npm, "pack", RUNTIME, "--json", "--pack-destination", temporary],
            capture_output=True,
            text=True,
            check=False,
        )
        if packed.returncode != 0:
            raise RuntimeError(f"npm pack {RUNTIME} failed:\n{packed.stderr}")
        archive = Path(temporary) / json.loads(packed.stdout)[0]["filename"]
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != RUNTIME_SHA512:
            raise RuntimeError(f"{RUNTIME} is not the package that was tested: its SHA-512 differs")
        folder.mkdir(exist_ok=True)
        with tarfile.open(archive) as files:
            for name in RUNTIME_FILES:
                content = files.extractfile(f"package/dist/{name}")
                assert content is not None
                (folder / name).write_bytes(content.read())
    version.write_text(RUNTIME)


class Handler(SimpleHTTPRequestHandler):
    """Serve files with the types that modules and wasm need, whatever the system says."""

    # The type is that of the base class.
    extensions_map = {  # noqa: RUF012
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, *args: object) -> None:
        """Print nothing for each file."""


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """Return a server of a folder, for this machine alone. Port 0 is any free one."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))
    except OSError as error:
        advice = "choose another, or 0 for any free one"
        raise RuntimeError(f"--port {port}: {error}; {advice}") from error


def serve(running: ThreadingHTTPServer, open_browser: bool) -> None:
    """Serve until Ctrl+C."""
    address = f"http://127.0.0.1:{running.server_port}"
    print(f"{address} (stop with Ctrl+C)", flush=True)
    if open_browser:
        webbrowser.open(address)
    running.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
