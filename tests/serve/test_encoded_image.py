"""Image files as input: what Pillow reads of them, and that nothing in them harms the server."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image, ImageOps

from serve.core import InferenceCore
from serve.errors import InvalidArgumentError
from serve.model.config_pbtxt import read_config
from serve.model.encoded_image import MAX_SCANS, EncodedImage
from serve.model_repository.repository import Repository
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.protocol.datatypes import DATATYPES
from serve.request import Call, InferRequest, Tensor
from serve.settings import ServerSettings
from tests.graphs import info, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunningServer

ROOT = Path(__file__).parents[2]
SIZE = 16
PARAMETER = 'parameters { key: "encoded_image" value { string_value: "image" } }'
CONFIG = f'max_batch_size: 4 input {{ name: "image" data_type: TYPE_STRING dims: [ 1 ] }} {PARAMETER}'


def graph(*shape: int | str, onnx_type: int = TensorProto.UINT8) -> onnx.GraphProto:
    """Gives its pixels back."""
    node = helper.make_node("Identity", ["image"], ["pixels"])
    return helper.make_graph(
        [node], "pixels", [info("image", shape, onnx_type)], [info("pixels", shape, onnx_type)]
    )


def mean_color() -> onnx.GraphProto:
    """The mean of each channel of an image of any size, as scores of three classes."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["scores"], axes=[1, 2], keepdims=0),
    ]
    image = info("image", ["batch", "height", "width", 3], TensorProto.UINT8)
    return helper.make_graph(nodes, "mean", [image], [info("scores", ["batch", 3])])


def best_colors() -> onnx.GraphProto:
    """The two strongest channels."""
    made = mean_color()
    made.initializer.append(helper.make_tensor("k", TensorProto.INT64, [1], [2]))
    made.node[1].output[0] = "means"
    made.node.append(helper.make_node("TopK", ["means", "k"], ["scores", "classes"]))
    del made.output[:]
    made.output.extend([info("scores", ["batch", 2]), info("classes", ["batch", 2], TensorProto.INT64)])
    return made


@pytest.fixture(scope="module")
def image_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name, made in {
        "rgb": graph("batch", SIZE, SIZE, 3),
        "gray": graph("batch", SIZE, SIZE, 1),
        "any": graph("batch", "height", "width", 3),
        "color": mean_color(),
        "best": best_colors(),
    }.items():
        write_model(root / name, made)
        (root / name / "config.pbtxt").write_text(CONFIG)
    write_model(root / "unbatched", graph("batch", SIZE, SIZE, 3))
    (root / "unbatched" / "config.pbtxt").write_text(PARAMETER)
    return root


@pytest.fixture(scope="module")
def core(image_repository: Path) -> Iterator[InferenceCore]:
    core = make_core(image_repository)
    assert all(model.ready for model in core.repository.models)
    yield core
    core.repository.close()


def make_core(root: Path, **settings: Any) -> InferenceCore:
    full = ServerSettings(model_repository=(root,), **settings)
    repository = Repository(full)
    repository.load()
    return InferenceCore(full, repository)


def photo(width: int = 30, height: int = 20, mode: str = "RGB") -> Image.Image:
    """Smooth, so that a lossy format changes little."""
    down, across = np.mgrid[0:height, 0:width]
    pixels = np.stack([across * 255 // width, down * 255 // height, np.full_like(down, 90)], axis=2)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def fitted(image: Image.Image, mode: str = "RGB") -> np.ndarray:
    """As training reads a file."""
    upright = ImageOps.exif_transpose(image).convert(mode)
    return np.asarray(ImageOps.fit(upright, (SIZE, SIZE), Image.Resampling.BILINEAR))


def infer(core: InferenceCore, model: str, *files: bytes) -> np.ndarray:
    array = np.empty((len(files), 1), object)
    array[:, 0] = files
    request = InferRequest(model, "", (Tensor("image", DATATYPES["BYTES"], array),))
    return core.infer(request, Call(), inline=True).result(60).outputs[0].array


def refused(core: InferenceCore, model: str, *files: bytes) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        infer(core, model, *files)
    return str(caught.value)


@pytest.mark.parametrize(
    ("form", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 95}, 12),
        ("JPEG", {"quality": 95, "progressive": True}, 12),
    ],
)
def test_each_format_gives_the_pixels_that_training_sees(
    core: InferenceCore, form: str, options: dict[str, Any], tolerance: int
) -> None:
    file = encoded(photo(), form, **options)
    got = infer(core, "rgb", file)
    assert (got.shape, got.dtype.name) == ((1, SIZE, SIZE, 3), "uint8")
    assert np.array_equal(got[0], fitted(Image.open(io.BytesIO(file))))
    assert np.abs(got[0].astype(int) - fitted(photo())).max() <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_kind_of_pixel_becomes_the_graphs(core: InferenceCore, mode: str) -> None:
    file = encoded(photo(mode=mode))
    assert np.array_equal(infer(core, "rgb", file)[0], fitted(Image.open(io.BytesIO(file))))
    assert np.array_equal(infer(core, "gray", file)[0, ..., 0], fitted(Image.open(io.BytesIO(file)), "L"))


def test_sixteen_bits_become_eight(core: InferenceCore) -> None:
    eight = np.asarray(photo(SIZE, SIZE, "L"))
    file = encoded(Image.fromarray(eight.astype(np.uint16) * 257))
    assert Image.open(io.BytesIO(file)).mode.startswith("I")
    assert np.array_equal(infer(core, "gray", file)[0, ..., 0], eight)
    assert np.array_equal(infer(core, "rgb", file)[0], np.stack([eight] * 3, axis=2))


def test_a_system_without_cpu_affinity_decodes_too() -> None:
    script = "import os; del os.sched_getaffinity; import serve.model.encoded_image"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_images_are_turned_upright(core: InferenceCore, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned clockwise
    file = encoded(photo(30, 20), form, exif=exif)
    assert infer(core, "any", file).shape == (1, 30, 20, 3)
    upright = photo(30, 20).transpose(Image.Transpose.ROTATE_270)
    assert np.abs(infer(core, "rgb", file)[0].astype(int) - fitted(upright)).max() <= 12


def test_rows_of_any_size_become_the_graphs_size_and_else_must_agree(core: InferenceCore) -> None:
    files = [encoded(photo(*size)) for size in ((30, 20), (9, 40), (16, 16))]
    got = infer(core, "rgb", *files)
    assert np.array_equal(got, [fitted(Image.open(io.BytesIO(file))) for file in files])
    assert "must agree in size, got 16 x 16, 30 x 20, 9 x 40 pixels" in refused(core, "any", *files)
    assert infer(core, "any", files[0], files[0]).shape == (2, 20, 30, 3)


def test_without_a_batch_dimension_any_number_of_files_goes_in(core: InferenceCore) -> None:
    assert infer(core, "unbatched", *[encoded(photo())] * 7).shape == (7, SIZE, SIZE, 3)
    assert "at least one image" in refused(core, "unbatched")


def test_a_batch_is_as_large_as_the_config_says(core: InferenceCore) -> None:
    assert "batch size 5 is not in 1 to 4" in refused(core, "rgb", *[encoded(photo())] * 5)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "expected a JPEG, PNG or WebP file"),
        (b"no image", "expected a JPEG, PNG or WebP file"),
        (encoded(photo(), "BMP"), "expected a JPEG, PNG or WebP file"),
        (encoded(photo(), "GIF"), "expected a JPEG, PNG or WebP file"),
        (encoded(photo(), "TIFF"), "expected a JPEG, PNG or WebP file"),
        (encoded(photo(200, 200), "JPEG")[:700], "truncated"),
        (encoded(photo(200, 200), "PNG")[:400], "truncated"),
        (encoded(photo(200, 200), "WEBP")[:400], ""),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_row(core: InferenceCore, file: bytes, reason: str) -> None:
    message = refused(core, "rgb", encoded(photo()), file)
    assert message.startswith("input 'image', image 1: ")
    assert reason in message
    assert "object at 0x" not in message


def claim_png(width: int, height: int) -> bytes:
    """A header of that size, and the data of a small image."""
    data = bytearray(encoded(photo()))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def claim_webp(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo(), "WEBP", lossless=True))
    bits = int.from_bytes(data[21:25], "little") & ~((1 << 28) - 1)
    data[21:25] = (bits | (height - 1) << 14 | (width - 1)).to_bytes(4, "little")
    return bytes(data)


def claim_jpeg(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("claim", [claim_png, claim_webp, claim_jpeg])
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((16383, 16383), "decompression bomb"),  # Pillow's own limit comes first
        ((5001, 5000), "5001 x 5000 pixels: the limit is 25000000 (--max-image-pixels)"),
    ],
)
def test_a_size_beyond_the_limit_is_refused_before_anything_is_decoded(
    core: InferenceCore, claim: Callable[[int, int], bytes], size: tuple[int, int], reason: str
) -> None:
    """Decoding would find that the data is that of a smaller image."""
    assert reason in refused(core, "rgb", claim(*size))


def test_the_limit_is_a_setting_and_counts_all_rows_that_are_kept(image_repository: Path) -> None:
    core = make_core(image_repository, max_image_pixels=1200)
    files = [encoded(photo(30, 20))] * 3
    assert infer(core, "rgb", *files).shape[0] == 3
    assert infer(core, "any", *files[:2]).shape[0] == 2
    assert "30 x 20 pixels, 3 times: the limit is 1200" in refused(core, "any", *files)
    assert "31 x 40 pixels: the limit is 1200" in refused(core, "rgb", encoded(photo(31, 40)))
    core.repository.close()


def test_a_jpeg_of_endless_scans_is_refused(core: InferenceCore) -> None:
    """Each costs a pass over all pixels, and some hundred bytes."""
    data = encoded(photo(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scans = data[:last] + data[last:-2] * MAX_SCANS + data[-2:]
    assert "more than 100 scans" in refused(core, "rgb", scans)
    assert infer(core, "rgb", data).shape == (1, SIZE, SIZE, 3)


def test_mutated_files_are_decoded_or_refused() -> None:
    random = np.random.default_rng(0)
    decoder = EncodedImage("image", 3, (SIZE, SIZE), 1_000_000)
    files = [
        encoded(photo(60, 50), form, **options)
        for form, options in (("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}))
    ]
    outcomes = []
    for index in range(240):
        data = bytearray(files[index % len(files)])
        for _ in range(random.integers(1, 8)):
            data[random.integers(len(data))] = random.integers(256)
        if index % 5 == 0:
            del data[random.integers(len(data)) :]
        try:
            outcomes.append(decoder.decode(np.array([bytes(data)], object)).shape)
        except InvalidArgumentError:
            outcomes.append(())
    assert set(outcomes) == {(), (1, SIZE, SIZE, 3)}


@pytest.mark.parametrize(
    ("made", "config", "reason"),
    [
        (
            graph("n", 8, 8, 3),
            PARAMETER.replace('image" }', 'x" }'),
            "names input 'x', the graph has ['image']",
        ),
        (graph("n", 8, 8, 3), CONFIG.replace("STRING", "UINT8"), "is TYPE_UINT8, expected TYPE_STRING"),
        (graph("n", 8, 8, 3), CONFIG.replace("[ 1 ]", "[ 2 ]"), "has shape [-1, 2], the graph has [-1, 1]"),
        (graph("n", 8, 8, 4), PARAMETER, "[-1, 8, 8, 4]; expected tensor(uint8) [batch, height, width, 1 or"),
        (graph("n", 8, 8), PARAMETER, "expected tensor(uint8)"),
        (graph("n", 8, 8, 3, onnx_type=TensorProto.FLOAT), PARAMETER, "tensor(float)"),
        (graph("n", 8, "w", 3), PARAMETER, "either both fixed or both of any size"),
    ],
)
def test_an_input_that_takes_no_images_is_refused_at_load(
    tmp_path: Path, made: onnx.GraphProto, config: str, reason: str
) -> None:
    write_model(tmp_path / "m", made)
    (tmp_path / "m" / "config.pbtxt").write_text(config)
    read_config(tmp_path / "m")
    (model,) = make_core(tmp_path).repository.models
    assert reason in model.problems[1]


def test_without_pillow_the_model_is_not_loaded_and_says_which_extra(image_repository: Path) -> None:
    script = f"""
import sys
sys.modules["PIL"] = None  # as if it were not installed
from pathlib import Path
from serve.model_repository.repository import Repository
from serve.settings import ServerSettings
repository = Repository(ServerSettings(model_repository=(Path({str(image_repository)!r}),)))
repository.load()
print(repository.models[0].problems)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Pillow is not installed: pip install 'onnxedge[images]'" in done.stdout


@pytest.fixture(scope="module")
def image_server(image_repository: Path, serve: Callable[..., RunningServer]) -> RunningServer:
    return serve("--model-repository", image_repository, "--max-image-pixels", "100000")


def test_metadata_and_config_say_bytes(image_server: RunningServer) -> None:
    with grpc.insecure_channel(image_server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="rgb"))
        config = stub.ModelConfig(pb.ModelConfigRequest(name="unbatched")).config
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("image", "BYTES", [-1, 1])]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("image", 13, [-1, 1])]
    assert config.parameters["encoded_image"].string_value == "image"


def test_tritonclient_sends_files(image_server: RunningServer) -> None:
    script = """
import io, json, sys
import numpy as np
import tritonclient.grpc as triton
from PIL import Image
client = triton.InferenceServerClient(sys.argv[1])
seen = {}
for form in ("JPEG", "PNG", "WEBP"):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (10, 200, 90)).save(file, form)
    array = np.empty((2, 1), object)
    array[:] = file.getvalue()
    tensor = triton.InferInput("image", [2, 1], "BYTES")
    tensor.set_data_from_numpy(array)
    seen[form] = client.infer("color", [tensor]).as_numpy("scores").tolist()
    tensor.set_data_from_numpy(np.array([[b"no image"], [b""]], object))
    try:
        client.infer("color", [tensor])
    except triton.InferenceServerException as error:
        seen["refused"] = [error.status(), error.message()]
print(json.dumps(seen))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, image_server.url], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    status, message = seen.pop("refused")
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert message == "input 'image', image 0: expected a JPEG, PNG or WebP file"
    assert sorted(seen) == ["JPEG", "PNG", "WEBP"]
    for rows in seen.values():
        np.testing.assert_allclose(rows, [[10, 200, 90]] * 2, atol=3)


@pytest.mark.parametrize(
    ("model", "expected"), [("color", ["200.0000  1", "90.0000  2"]), ("best", ["200.0000  1", "90.0000  2"])]
)
def test_infer_sends_the_file_as_it_is(
    image_server: RunningServer, tmp_path: Path, model: str, expected: list[str]
) -> None:
    picture = tmp_path / "green.png"
    Image.new("RGB", (31, 17), (10, 200, 90)).save(picture)
    flags = ("--image", str(picture), "--url", image_server.url, "--top", "2")
    command = [sys.executable, "-m", "serve", "infer", model, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert [line.strip() for line in done.stdout.splitlines()] == expected, done.stderr
    done = subprocess.run(
        [*command, "--scaling", "unit"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "takes the file as it is: leave --scaling out" in done.stderr


def test_the_server_lives_on_after_bad_files(image_server: RunningServer) -> None:
    random = np.random.default_rng(1)
    files = [encoded(photo(60, 50), form) for form in ("PNG", "JPEG", "WEBP")]
    codes = []
    with grpc.insecure_channel(image_server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        for index in range(60):
            data = bytearray(files[index % len(files)])
            for place in random.integers(0, len(data), 5):
                data[place] = random.integers(256)
            message = pb.ModelInferRequest(model_name="rgb")
            message.inputs.add(name="image", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(
                bytes(data)
            )
            try:
                stub.ModelInfer(message, timeout=30)
                codes.append("OK")
            except grpc.RpcError as error:
                codes.append(error.code().name)
    assert set(codes) == {"OK", "INVALID_ARGUMENT"}
    assert image_server.process.poll() is None
