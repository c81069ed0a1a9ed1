"""Trace and log settings, as Triton's trace and logging extensions have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from serve.core import InferenceCore


def trace_setting(core: InferenceCore, request: pb.TraceSettingRequest) -> pb.TraceSettingResponse:
    """Change what is traced, where the request says so, and answer what is in force now."""
    model = request.model_name
    if model and not core.repository.is_ready(model, ""):
        raise InvalidArgumentError(f"Request for unknown model : {model}")
    if request.settings:
        core.tracer.update(model, {name: list(given.value) for name, given in request.settings.items()})
    response = pb.TraceSettingResponse()
    for name, values in core.tracer.describe(model).items():
        response.settings[name].value.extend(values)
    return response


def log_settings(core: InferenceCore, request: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
    """Change what is logged, where the request says so, and answer what is in force now."""
    if request.settings:
        core.log.update({name: _given(name, value) for name, value in request.settings.items()})
    response = pb.LogSettingsResponse()
    for name, value in core.log.describe().items():
        setting = response.settings[name]
        if isinstance(value, bool):
            setting.bool_param = value
        elif isinstance(value, int):
            setting.uint32_param = value
        else:
            setting.string_param = value
    return response


def _given(name: str, setting: pb.LogSettingsRequest.SettingValue) -> bool | int | str:
    """The value in the field that holds one; its type says which.

    Raises:
        InvalidArgumentError: none of them does.
    """
    field = setting.WhichOneof("parameter_choice")
    if field is None:
        raise InvalidArgumentError(f"'{name[:64]}' has no value")
    value: bool | int | str = getattr(setting, field)
    return value
