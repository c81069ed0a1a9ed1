"""What tritonclient sees of trace and log settings, as JSON.

A process of its own: its protobuf messages have our names.

Usage: python interop_diagnostics.py HOST:PORT traces|logs
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from collections.abc import Callable


def settings(answer: dict[str, Any]) -> dict[str, Any]:
    """Lists of a TraceSetting answer, bare values of a LogSettings answer."""
    return {
        name: given.get("value", next(iter(given.values()))) for name, given in answer["settings"].items()
    }


def refusal(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def observe_traces(client: Any) -> dict[str, Any]:
    def update(model: str | None = None, **changes: Any) -> dict[str, Any]:
        return settings(client.update_trace_settings(model, changes, as_json=True))

    def get(model: str | None = None) -> dict[str, Any]:
        return settings(client.get_trace_settings(model, as_json=True))

    seen: dict[str, Any] = {"initial": get(), "initial_model": get("scalar")}
    update("scalar", trace_rate="12", log_frequency="34")
    update(trace_rate="56", trace_count="78", trace_level=["OFF"])
    seen["global_cleared"] = update(trace_rate=None, trace_count=None)
    seen["model_kept"] = get("scalar")
    seen["model_cleared"] = update("scalar", trace_rate=None, trace_level=None)
    update("scalar", log_frequency=None)
    seen["levels"] = update(trace_level=["TENSORS", "TIMESTAMPS"])
    seen["model_follows"] = get("scalar")
    seen["restored"] = update(trace_level=None)
    wrong: dict[str, dict[str, Any]] = {
        "file": {"trace_file": "/tmp/elsewhere.json"},  # noqa: S108 - to be refused
        "file_cleared": {"trace_file": None},
        "mode": {"trace_mode": "opentelemetry"},
        "rate": {"trace_rate": "often"},
        "rate_zero": {"trace_rate": "0"},
        "count": {"trace_count": "-2"},
        "level": {"trace_level": ["EVERYTHING"]},
        "off_and_more": {"trace_level": ["OFF", "TIMESTAMPS"]},
        "two_rates": {"trace_rate": ["1", "2"]},
        "unknown": {"trace_colour": "blue"},
    }
    for name, changes in wrong.items():
        seen[f"refused_{name}"] = refusal(partial(update, **changes))
    seen["same_mode"] = refusal(lambda: update(trace_mode="triton"))
    seen["refused_model"] = refusal(lambda: get("nope"))
    seen["after_refusals"] = get()
    return seen


def observe_logs(client: Any) -> dict[str, Any]:
    def update(**changes: Any) -> dict[str, Any]:
        return settings(client.update_log_settings(changes, as_json=True))

    seen: dict[str, Any] = {
        "initial": settings(client.get_log_settings(as_json=True)),
        "verbose": update(log_verbose_level=1, log_format="ISO8601"),
    }
    refusal(lambda: client.get_model_metadata("no\nsuch model"))
    seen["silent"] = update(log_verbose_level=0, log_info=False, log_warning=False, log_error=False)
    refusal(lambda: client.get_model_metadata("never shown"))
    wrong: dict[str, dict[str, Any]] = {
        "file": {"log_file": "/tmp/elsewhere.log"},  # noqa: S108 - to be refused
        "format": {"log_format": "JSON"},
        "unknown": {"log_colour": True},
        "no_value": {"log_info": None},
        "mixed": {"log_info": True, "log_format": "JSON"},
    }
    for name, changes in wrong.items():
        seen[f"refused_{name}"] = refusal(partial(update, **changes))
    seen["after_refusals"] = settings(client.get_log_settings(as_json=True))
    update(log_info=True, log_warning=True, log_error=True, log_format="default")
    return seen


if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[1]) as connected:
        observe = {"traces": observe_traces, "logs": observe_logs}[sys.argv[2]]
        print(json.dumps(observe(connected)))
