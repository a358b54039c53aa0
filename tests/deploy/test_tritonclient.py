"""tritonclient, a client of the Open Inference Protocol by others, against a service in another process."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from deploy.service.work import Feeds
from diffusion.export import runtime
from tests.deploy.models import write_model
from tests.deploy.services import Running, running, same
from tests.export.test_sampler_graph import SHAPE

pytestmark = pytest.mark.slow

VERSION = "a" * 12
NOISE = np.random.default_rng(0).standard_normal((5, *SHAPE), np.float32)
LABELS = np.array([0, 1, 2, -1, 0])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("triton") / "sampler.onnx", "dpm-solver++", True)


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Running]:
    with running(path.parent, str(path)) as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=4) as made:
        yield made


@pytest.fixture(scope="module")
def expected(path: Path) -> Feeds:
    """What ONNX Runtime gives for the inputs."""
    session = runtime.session(path.read_bytes(), None, 1)
    names = [output.name for output in session.get_outputs()]
    feeds = {"noise": NOISE, "y": LABELS, "steps": np.array([3]), "guidance": np.array([1.5], np.float32)}
    return dict(zip(names, session.run(names, feeds), strict=True))


def given(binary: bool = True, library: Any = triton) -> list[Any]:
    inputs = []
    for name, value in (("noise", NOISE), ("y", LABELS), ("steps", [3]), ("guidance", np.array([1.5], np.float32))):
        array = np.asarray(value)
        each = library.InferInput(name, list(array.shape), "FP32" if array.dtype.kind == "f" else "INT64")
        inputs.append(each.set_data_from_numpy(array, binary_data=binary))
    return inputs


def check(result: Any, expected: Feeds, *names: str) -> None:
    for name in names:
        found: NDArray[Any] = result.as_numpy(name)
        assert found.shape == expected[name].shape
        assert found.dtype == expected[name].dtype
    if "images" in names:
        same(result.as_numpy("images"), expected["images"])
    if "x_0" in names:
        np.testing.assert_allclose(result.as_numpy("x_0"), expected["x_0"], rtol=0, atol=1e-4)


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ddpm")
    assert client.is_model_ready("ddpm", VERSION)
    assert not client.is_model_ready("ddpm", "7")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("ddpm")
    assert client.get_model_metadata("ddpm", VERSION) == metadata
    assert metadata["versions"] == [VERSION]
    assert {each["name"] for each in metadata["inputs"]} == {"noise", "steps", "y", "guidance"}


@pytest.mark.parametrize("binary", [True, False])
def test_inference(client: Any, expected: Feeds, binary: bool) -> None:
    result = client.infer("ddpm", given(binary), request_id="42", model_version=VERSION, timeout=1, priority=1)
    check(result, expected, "images", "x_0")
    assert {key: value for key, value in result.get_response().items() if key != "outputs"} == {
        "id": "42",
        "model_name": "ddpm",
        "model_version": VERSION,
    }
    sizes = [each["parameters"]["binary_data_size"] for each in result.get_response()["outputs"]]
    assert sizes == [NOISE.size, 4 * NOISE.size]


@pytest.mark.parametrize("binary", [(True, True), (True, False), (False, True), (False, False)])
def test_outputs_as_json_and_binary(client: Any, expected: Feeds, binary: tuple[bool, bool]) -> None:
    names = ("x_0", "images")
    outputs = [
        triton.InferRequestedOutput(name, binary_data=wanted) for name, wanted in zip(names, binary, strict=True)
    ]
    result = client.infer("ddpm", given(), outputs=outputs)
    check(result, expected, *names)
    for name, wanted in zip(names, binary, strict=True):
        assert ("data" in result.get_output(name)) != wanted


@pytest.mark.parametrize("request_encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_compression(
    client: Any, expected: Feeds, request_encoding: str | None, response_encoding: str | None, binary: bool
) -> None:
    outputs = [triton.InferRequestedOutput("x_0", binary_data=binary)]
    result = client.infer(
        "ddpm",
        given(binary),
        outputs=outputs,
        request_compression_algorithm=request_encoding,
        response_compression_algorithm=response_encoding,
    )
    check(result, expected, "x_0")


def test_concurrent_requests(client: Any, expected: Feeds) -> None:
    waiting = [client.async_infer("ddpm", given(), request_id=str(number)) for number in range(8)]
    results = [each.get_result() for each in waiting]
    assert [each.get_response()["id"] for each in results] == [str(number) for number in range(8)]
    for result in results:
        check(result, expected, "images", "x_0")


def test_asyncio(server: Running, expected: Feeds) -> None:
    async def ask() -> None:
        async with triton_aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready("ddpm")
            results = await asyncio.gather(
                client.infer("ddpm", given(library=triton_aio)),
                client.infer("ddpm", given(False, triton_aio), request_compression_algorithm="gzip"),
                client.infer("ddpm", given(library=triton_aio), response_compression_algorithm="deflate"),
            )
            for result in results:
                check(result, expected, "images", "x_0")
            with pytest.raises(InferenceServerException, match="input noise: missing"):
                await client.infer("ddpm", given(library=triton_aio)[1:])

    asyncio.run(ask())


def test_the_examples_of_the_readme(root: Path, server: Running) -> None:
    codes = re.findall(r"```python\n(.*?)```", (root / "deploy" / "service" / "README.md").read_text(), flags=re.S)
    assert len(codes) == 2
    assert "tritonclient" in codes[1]
    found = []
    for code in codes:
        scope: dict[str, Any] = {}
        exec(
            code.replace("127.0.0.1:8000", server.url.removeprefix("http://")).replace("(2, 1, 8, 8)", "(2, 3, 7, 10)"),
            scope,
        )
        found.append(scope["images"])
    same(*found)
    assert found[0].shape == (2, 7, 10, 3)


def test_errors(client: Any) -> None:
    y = triton.InferInput("y", [5], "INT64").set_data_from_numpy(LABELS + 3)
    for inputs, line in (
        (given()[1:], "input noise: missing; send standard normal noise, FP32 of shape [-1, 3, 7, 10]"),
        ([given()[0], y], "input y: must be from -1 to 2, -1 for no class (got 3)"),
    ):
        for encoding in (None, "gzip"):
            with pytest.raises(InferenceServerException) as error:
                client.infer("ddpm", inputs, response_compression_algorithm=encoding)
            assert (error.value.message(), error.value.status()) == (line, "400")
    with pytest.raises(InferenceServerException, match="model other: unknown"):
        client.infer("other", given())


def test_extensions_that_it_does_not_have(client: Any) -> None:
    shared = given()
    shared[0].set_shared_memory("region", NOISE.nbytes)
    with pytest.raises(InferenceServerException, match="input noise: has no data"):
        client.infer("ddpm", shared)
    for call in (
        lambda: client.get_model_config("ddpm"),
        lambda: client.get_inference_statistics("ddpm"),
        client.get_model_repository_index,
        lambda: client.load_model("ddpm"),
        client.get_system_shared_memory_status,
        lambda: client.register_system_shared_memory("region", "/region", 8),
        client.get_cuda_shared_memory_status,
        client.get_trace_settings,
        client.get_log_settings,
    ):
        with pytest.raises(InferenceServerException) as error:
            call()
        assert error.value.status() == "404"
        assert "no such path; /docs lists those of this service" in error.value.message()
