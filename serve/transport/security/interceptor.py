"""Who may call what: one look at every call, before its message is read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import grpc

from serve.observability.occasionally import Occasionally
from serve.transport.security.protocol_groups import GROUP_OF, HEALTH_METHODS
from serve.transport.security.tokens import bearer_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from serve.transport.security.protocol_groups import Restriction
    from serve.transport.security.tokens import Tokens

logger = logging.getLogger(__name__)
_occasionally = Occasionally(logger)


class AccessInterceptor(grpc.ServerInterceptor):
    """Denies by default: a call passes with a token, with its group's header, and only if it has a group.

    Args:
        tokens: those that are let in; None: no token is needed.
        restrictions: a group's name to the header that it needs.
        health_needs_token: false lets grpc.health.v1 be asked without.
    """

    def __init__(
        self,
        tokens: Tokens | None,
        restrictions: Mapping[str, Restriction],
        *,
        health_needs_token: bool = True,
    ) -> None:
        self._tokens = tokens
        self._open = () if health_needs_token else HEALTH_METHODS
        self._restrictions = restrictions
        self._no_token = _refusal(
            grpc.StatusCode.UNAUTHENTICATED,
            "this server needs a token: send metadata 'authorization: Bearer TOKEN'",
        )
        self._wrong_token = _refusal(grpc.StatusCode.UNAUTHENTICATED, "the bearer token is not known here")
        self._no_group = _refusal(
            grpc.StatusCode.PERMISSION_DENIED, "this method belongs to no group of RPCs that may be called"
        )
        self._restricted = {
            group: _refusal(
                grpc.StatusCode.UNAVAILABLE,
                f"This protocol is restricted, expecting header '{restriction.header}'",
            )
            for group, restriction in restrictions.items()
        }

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's handler, or one that refuses. Runs on gRPC's own thread: must not wait."""
        metadata = handler_call_details.invocation_metadata or ()
        if self._tokens is not None and handler_call_details.method not in self._open:
            token = bearer_token(metadata)
            if token is None:
                return self._no_token
            if not self._tokens.accept(token):
                return self._wrong_token
        group = GROUP_OF.get(handler_call_details.method)
        restriction = None if group is None else self._restrictions.get(group)
        if group is not None and restriction is not None and not restriction.met_by(metadata):
            return self._restricted[group]
        handler = continuation(handler_call_details)
        # A method that there isn't is gRPC's to refuse, as UNIMPLEMENTED.
        return self._no_group if handler is not None and group is None else handler


def _refusal(code: grpc.StatusCode, details: str) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler for calls of any arity: it ends them without reading a message."""

    def refuse(_requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        _occasionally.warn(f"refused {context.peer()}: {code.name}: {details}")
        context.abort(code, details)

    return grpc.stream_stream_rpc_method_handler(refuse)
