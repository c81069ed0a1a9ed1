"""What config.pbtxt and --backend-config say about running a graph → SessionSettings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import text_format

import serve.runtime.accelerators
from serve.errors import ModelLoadError
from serve.pb import model_config_pb2 as pb
from serve.runtime.accelerators import file_parameters
from serve.runtime.backend_config import PARAMETERS, parse_backend_config, session_settings, takes_parameter
from serve.runtime.providers import CPU, CUDA, OPENVINO, TENSORRT, Accelerator
from serve.runtime.session import SessionSettings
from serve.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has none, whatever this one has."""
    monkeypatch.setattr(serve.runtime.accelerators, "DEFAULT_ORDER", ())
    monkeypatch.setattr(serve.runtime.accelerators, "GPU_PROVIDERS", ())
    monkeypatch.setattr(serve.runtime.accelerators, "missing", lambda _: "it was built without it")


def parsed(text: str) -> pb.ModelConfig:
    return text_format.Parse(text, pb.ModelConfig())


def settings(text: str = "", defaults: Mapping[str, str] | None = None, **more: Any) -> SessionSettings:
    return session_settings(parsed(text), defaults or {}, more.pop("cores", 4), **more)


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'


def accelerators(*declared: str) -> str:
    return f"optimization {{ execution_accelerators {{ {' '.join(declared)} }} }}"


def gpu(name: str, **parameters: str) -> str:
    return _declared("gpu", name, parameters)


def cpu(name: str, **parameters: str) -> str:
    return _declared("cpu", name, parameters)


def _declared(device: str, name: str, parameters: Mapping[str, str]) -> str:
    entries = " ".join(f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in parameters.items())
    return f'{device}_execution_accelerator {{ name: "{name}" {entries} }}'


def wanted(text: str, **more: Any) -> list[tuple[str, dict[str, str]]]:
    return [
        (a.name.removesuffix("ExecutionProvider"), dict(a.options))
        for a in settings(text, **more).accelerators
    ]


def test_without_a_word_two_instances_share_the_cores() -> None:
    assert settings() == SessionSettings(instances=2, intra_op_threads=2)
    assert settings(cores=1) == SessionSettings(instances=1, intra_op_threads=1)


@pytest.mark.parametrize(
    ("groups", "instances", "threads"),
    [
        ("instance_group { count: 1 }", 1, 4),
        ("instance_group { count: 3 kind: KIND_CPU }", 3, 1),
        ("instance_group { count: 9 kind: KIND_CPU }", 9, 1),
        ("instance_group { kind: KIND_MODEL }", 2, 2),
        ("instance_group { count: 1 kind: KIND_CPU } instance_group { count: 3 kind: KIND_CPU }", 4, 1),
        ("instance_group { kind: KIND_CPU } instance_group { kind: KIND_CPU }", 2, 2),
    ],
)
def test_instances_divide_the_threads(groups: str, instances: int, threads: int) -> None:
    found = settings(groups)
    assert (found.instances, found.intra_op_threads, found.accelerators) == (instances, threads, ())


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ("instance_group { count: -1 }", "count is -1, expected 0 or more"),
        ("instance_group { kind: KIND_CPU } instance_group { kind: KIND_GPU }", "kinds KIND_CPU, KIND_GPU"),
        ("instance_group { kind: KIND_GPU gpus: [ 0, 1 ] }", r"gpus \[0, 1\], but one session"),
        ("instance_group { kind: KIND_CPU gpus: [ 0 ] }", "with KIND_CPU, expected KIND_GPU"),
        ("instance_group { kind: KIND_GPU gpus: [ -1 ] }", r"gpus \[-1\]"),
    ],
)
def test_groups_that_one_session_cannot_be_are_refused(groups: str, complaint: str) -> None:
    with pytest.raises(ModelLoadError, match=complaint):
        settings(groups)


def test_every_knob() -> None:
    text = "".join(
        parameter(name, value)
        for name, value in {
            "intra_op_thread_count": "3",
            "inter_op_thread_count": "2",
            "execution_mode": "1",
            "enable_mem_arena": "true",
            "enable_mem_pattern": "False",
            "memory.enable_memory_arena_shrinkage": "cpu:0;gpu:0",
            "session.intra_op.allow_spinning": "true",
            "session.dynamic_block_base": "4",
            "session.intra_op_thread_affinities": "1;2",
            "share_session_between_instances": "true",
        }.items()
    )
    assert settings(f"{text} optimization {{ graph {{ level: -1 }} }}", model="m") == SessionSettings(
        instances=2,
        intra_op_threads=3,
        inter_op_threads=2,
        parallel=True,
        graph_level=-1,
        memory_pattern=False,
        arena_shrinkage="cpu:0;gpu:0",
        entries={
            "session.intra_op.allow_spinning": "1",
            "session.dynamic_block_base": "4",
            "session.intra_op_thread_affinities": "1;2",
        },
        model="m",
    )


def test_parallel_execution_alone_takes_an_instance_s_share() -> None:
    found = settings(parameter("execution_mode", "1"))
    assert (found.parallel, found.inter_op_threads) == (True, 2)


def test_more_threads_than_cores_are_cut_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert settings(parameter("intra_op_thread_count", "64"), model="m").intra_op_threads == 4
    assert "'m': intra_op_thread_count is 64, cut to the 4 cores" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("intra_op_thread_count", "many"),
        ("intra_op_thread_count", "-1"),
        ("intra_op_thread_count", ""),
        ("inter_op_thread_count", "²"),
        ("execution_mode", "2"),
        ("enable_mem_arena", "maybe"),
        ("session.disable_prepacking", "yes"),
        ("session.dynamic_block_base", "x"),
        ("memory.enable_memory_arena_shrinkage", "cpu"),
        ("memory.enable_memory_arena_shrinkage", "cpu:0,gpu:0"),
        ("cudnn_conv_algo_search", "3"),
        ("arena_extend_strategy", "kNextPowerOfTwo"),
        ("gpu_mem_limit", "2G"),
        ("gpu_mem_limit", "-1"),
        ("do_copy_in_default_stream", "yes"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"config\.pbtxt: parameter '{name}' is '{value}', expected"):
        settings(parameter(name, value))


def test_knobs_that_exclude_each_other_are_refused() -> None:
    both = parameter("memory.enable_memory_arena_shrinkage", "cpu:0") + parameter("enable_mem_arena", "0")
    with pytest.raises(ModelLoadError, match="needs the arena"):
        settings(both)
    with pytest.raises(ModelLoadError, match=r"graph\.level is 7"):
        settings("optimization { graph { level: 7 } }")


def test_names_are_listed_and_no_entry_writes_files() -> None:
    assert takes_parameter("intra_op_thread_count")
    assert takes_parameter("session.use_device_allocator_for_initializers")
    assert not takes_parameter("session.optimized_model_filepath")
    assert not takes_parameter("encoded_image")
    assert len(set(PARAMETERS)) == len(PARAMETERS)


def test_other_parameters_are_not_ours_to_read() -> None:
    assert settings(parameter("encoded_image", "x")) == settings()


@pytest.mark.parametrize("kind", ["", "instance_group { kind: KIND_GPU }", "instance_group { gpus: [ 0 ] }"])
def test_tensorrt_in_triton_s_words(kind: str) -> None:
    text = accelerators(
        gpu(
            "tensorrt",
            precision_mode="FP16",
            max_workspace_size_bytes="1073741824",
            int8_calibration_table_name="t",
            int8_use_native_calibration_table="1",
            trt_engine_cache_enable="1",
            trt_engine_cache_path="/cache",
        )
    )
    device = {"device_id": "0"} if "gpus" in kind else {}
    assert wanted(kind + text) == [
        (
            "Tensorrt",
            {
                "trt_fp16_enable": "1",
                "trt_max_workspace_size": "1073741824",
                "trt_int8_calibration_table_name": "t",
                "trt_int8_use_native_calibration_table": "1",
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": "/cache",
                **device,
            },
        )
    ]
    assert file_parameters(parsed(text)) == ["int8_calibration_table_name", "trt_engine_cache_path"]


@pytest.mark.parametrize(
    ("precision", "options"),
    [("FP32", {}), ("INT8", {"trt_int8_enable": "1"}), ("BF16", {"trt_bf16_enable": "1"})],
)
def test_tensorrt_precisions(precision: str, options: dict[str, str]) -> None:
    assert wanted(accelerators(gpu("tensorrt", precision_mode=precision))) == [("Tensorrt", options)]


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        (gpu("tensorrt", precision_mode="FP8"), "precision_mode is 'FP8', expected FP32, FP16"),
        (gpu("tensorrt", workspace="1"), "parameter 'workspace' of accelerator 'tensorrt' is unknown"),
        (gpu("turbo"), "accelerator 'turbo' is unknown, expected one of .*cuda"),
        (cpu("azure"), "accelerator 'azure' is unknown"),
    ],
)
def test_unknown_accelerators_are_refused_under_either_policy(declared: str, complaint: str) -> None:
    for policy in ("fallback", "strict"):
        with pytest.raises(ModelLoadError, match=complaint):
            settings(accelerators(declared), policy=policy)


def test_cuda_options_come_from_both_places_and_go_to_its_gpu() -> None:
    text = (
        "instance_group { kind: KIND_GPU gpus: [ 1 ] }"
        + parameter("cudnn_conv_algo_search", "1")
        + parameter("gpu_mem_limit", "1000")
        + accelerators(gpu("cuda", gpu_mem_limit="2000", use_tf32="0"))
    )
    options = {
        "cudnn_conv_algo_search": "HEURISTIC",
        "gpu_mem_limit": "2000",
        "use_tf32": "0",
        "device_id": "1",
    }
    assert wanted(text) == [("CUDA", options)]


def test_tensorrt_takes_tritons_parameters() -> None:
    """Those of Triton's onnxruntime backend, as its documentation spells them."""
    text = accelerators(
        gpu(
            "tensorrt", precision_mode="FP16", max_workspace_size_bytes="1073741824",
            trt_engine_cache_enable="true", trt_engine_cache_path="engines",
        )
    )  # fmt: skip
    assert wanted(text) == [
        ("Tensorrt", {
            "trt_fp16_enable": "1", "trt_max_workspace_size": "1073741824",
            "trt_engine_cache_enable": "true", "trt_engine_cache_path": "engines",
        })
    ]  # fmt: skip


def test_the_servers_engine_cache_is_for_models_that_say_nothing_of_it(tmp_path: Path) -> None:
    defaults = parse_backend_config([f"onnxruntime,trt_engine_cache_path={tmp_path}"]).defaults
    cache = {
        "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(tmp_path),
    }  # fmt: skip
    assert wanted(accelerators(gpu("tensorrt", precision_mode="INT8")), defaults=defaults) == [
        ("Tensorrt", {**cache, "trt_int8_enable": "1"})
    ]
    own = {"trt_engine_cache_enable": "0", "trt_engine_cache_path": "elsewhere"}
    assert wanted(accelerators(gpu("tensorrt", **own)), defaults=defaults) == [("Tensorrt", {**cache, **own})]
    assert wanted(accelerators(gpu("cuda")), defaults=defaults) == [("CUDA", {})]
    assert not takes_parameter("trt_engine_cache_path")


def test_an_engine_cache_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"trt_engine_cache_path.*expected a folder that is there"):
        parse_backend_config([f"onnxruntime,trt_engine_cache_path={tmp_path / 'none'}"])


def test_gpu_accelerators_come_first_and_cpu_ones_behind() -> None:
    text = accelerators(cpu("openvino"), cpu("xnnpack"), gpu("openvino", precision="FP16"), gpu("migraphx"))
    assert wanted(text) == [
        ("OpenVINO", {"device_type": "GPU", "precision": "FP16"}),
        ("MIGraphX", {}),
        ("OpenVINO", {"device_type": "CPU"}),
        ("Xnnpack", {}),
    ]
    assert wanted(accelerators(gpu("OpenVINOExecutionProvider")) + "instance_group { gpus: [ 1 ] }") == [
        ("OpenVINO", {"device_type": "GPU.1"})
    ]


def test_on_the_cpu_gpu_accelerators_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    text = "instance_group { kind: KIND_CPU }" + accelerators(gpu("cuda"), cpu("openvino"))
    assert wanted(text, model="m") == [("OpenVINO", {"device_type": "CPU"})]
    assert "'m': instance_group says KIND_CPU" in caplog.text


def test_strict_is_about_what_the_config_names() -> None:
    assert settings(accelerators(cpu("openvino")), policy="strict").strict
    assert not settings(accelerators(cpu("openvino"))).strict
    assert not settings(policy="strict").strict


def test_a_gpu_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    text = "instance_group { kind: KIND_GPU }"
    with caplog.at_level(logging.WARNING):
        assert settings(text, model="m").accelerators == ()
    assert "'m': instance_group.kind is KIND_GPU, but no GPU can be used: " in caplog.text
    with pytest.raises(ModelLoadError, match=r"no GPU can be used: .*--provider-policy=fallback"):
        settings(text, policy="strict")


@pytest.mark.parametrize(
    ("name", "names_a_file"),
    [
        ("trt_extra_plugin_lib_paths", True),
        ("backend_path", True),
        ("ModelCacheDirectory", True),
        ("cache_dir", True),
        ("load_config", True),
        ("trt_dump_subgraphs", True),
        ("trt_profile_min_shapes", False),
        ("int8_use_native_calibration_table", False),
        ("gpu_mem_limit", False),
        ("device_type", False),
    ],
)
def test_parameters_that_name_files_are_known(name: str, *, names_a_file: bool) -> None:
    assert file_parameters(parsed(accelerators(cpu("qnn", **{name: "x"})))) == (
        [name] if names_a_file else []
    )


def test_backend_config_gives_defaults_and_a_model_overrides_them() -> None:
    found = parse_backend_config(
        (
            "onnxruntime,intra_op_thread_count=1",
            "onnxruntime,session.disable_prepacking=0",
            "onnxruntime,session.disable_prepacking=1",
            "onnxruntime,default-max-batch-size=8",
        )
    )
    assert found.default_max_batch_size == 8
    assert settings("", found.defaults).intra_op_threads == 1
    assert settings("", found.defaults).entries == {"session.disable_prepacking": "1"}
    assert settings(parameter("intra_op_thread_count", "3"), found.defaults).intra_op_threads == 3
    assert parse_backend_config(("default-max-batch-size=4",)).default_max_batch_size == 4
    assert parse_backend_config(()).default_max_batch_size is None


def test_the_shared_pool_s_size_is_the_server_s() -> None:
    shared = parse_backend_config(("onnxruntime,enable-global-threadpool=1",)).defaults
    found = settings(
        parameter("intra_op_thread_count", "1") + parameter("inter_op_thread_count", "2"), shared
    )
    assert (found.shared_pool, found.intra_op_threads, found.inter_op_threads) == (True, 4, 1)
    sized = parse_backend_config(
        ("onnxruntime,enable-global-threadpool=1", "onnxruntime,intra_op_thread_count=2")
    ).defaults
    assert settings("instance_group { count: 3 }", sized).intra_op_threads == 2
    assert not settings(
        "", parse_backend_config(("onnxruntime,enable-global-threadpool=0",)).defaults
    ).shared_pool


@pytest.mark.parametrize("text", ["python,shm-default-byte-size=1", "backend-directory=/opt/backends"])
def test_settings_of_other_backends_have_no_effect(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert parse_backend_config((text,)) == parse_backend_config(())
    assert f"--backend-config={text} has no effect" in caplog.text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("onnxruntime", "expected onnxruntime,NAME=VALUE or NAME=VALUE"),
        ("onnxruntime,", "expected onnxruntime,NAME=VALUE"),
        ("onnxruntime,=1", "expected onnxruntime,NAME=VALUE"),
        (",intra_op_thread_count=1", "expected onnxruntime,NAME=VALUE"),
        (
            "onnxruntime,turbo=1",
            "'turbo' is unknown, expected one of default-max-batch-size, .*intra_op_thread",
        ),
        ("intra_op_thread_count=1", "'intra_op_thread_count' is unknown"),
        (
            "onnxruntime,intra_op_thread_count=x",
            "parameter 'intra_op_thread_count' is 'x', expected a number",
        ),
        ("onnxruntime,enable-global-threadpool=x", "'enable-global-threadpool' is 'x', expected 0 or 1"),
        ("onnxruntime,default-max-batch-size=-1", "default-max-batch-size=-1: expected a whole number"),
    ],
)
def test_a_backend_config_that_cannot_be_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        parse_backend_config((text,))


def test_accelerators_know_their_names() -> None:
    assert settings(accelerators(gpu("TensorRT"))).accelerators == (Accelerator(TENSORRT),)
    assert {a.name for a in settings(accelerators(cpu("OPENVINO"))).accelerators} == {OPENVINO}


def test_cuda_stands_behind_tensorrt_where_it_is_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.runtime.accelerators, "missing", lambda _: "")
    text = accelerators(gpu("tensorrt"), cpu("xnnpack")) + "instance_group { gpus: [ 1 ] }"
    assert wanted(text) == [("Tensorrt", {"device_id": "1"}), ("CUDA", {"device_id": "1"}), ("Xnnpack", {})]
    assert [name for name, _ in wanted(accelerators(gpu("cuda"), gpu("tensorrt")))] == ["CUDA", "Tensorrt"]


def test_without_a_wish_it_is_the_first_default_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for one that works."""
    for name in ("DEFAULT_ORDER", "GPU_PROVIDERS"):
        monkeypatch.setattr(serve.runtime.accelerators, name, ("NoSuchExecutionProvider", CPU, CUDA))
    assert settings().accelerators == (Accelerator(CPU),)
    assert settings("instance_group { kind: KIND_GPU }").accelerators == (Accelerator(CPU),)
    assert settings("instance_group { kind: KIND_CPU }").accelerators == ()
    assert settings(accelerators(cpu("openvino"))).accelerators[0].name == OPENVINO
