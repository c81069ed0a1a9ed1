"""A sequence's tokens as the answers that its client gets: one a token, or one for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.generate.sequence import STOP
from serve.generate.stop_strings import StopStrings
from serve.generate.tensors import (
    FINISH_REASON,
    NUM_INPUT_TOKENS,
    NUM_OUTPUT_TOKENS,
    OUTPUT_IDS,
    TEXT_OUTPUT,
)
from serve.generate.tokenizer import IncrementalDetokenizer
from serve.model.answers import give
from serve.protocol.datatypes import DATATYPES
from serve.request import InferResponse, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from serve.errors import ServeError
    from serve.generate.request_fields import GenerationRequest
    from serve.generate.tokenizer import Tokenizer
    from serve.request import Parameter

_UNFINISHED = "None"  # what Triton's vLLM backend answers before the last token
_BYTES, _INT64, _UINT32 = DATATYPES["BYTES"], DATATYPES["INT64"], DATATYPES["UINT32"]
_FINAL_PARAMETERS: dict[str, Parameter] = {"triton_final_response": True}
_OTHER_PARAMETERS: dict[str, Parameter] = {"triton_final_response": False}


@dataclass(frozen=True, slots=True)
class Client:
    """Whom a request's answers go to.

    Attributes:
        model_name, model_version, id: what each answer carries.
        future: gets the last answer, or the error.
        emit: gets those before it, from the engine's thread; None: there is only one.
    """

    model_name: str
    model_version: str
    id: str
    future: Future[InferResponse]
    emit: Callable[[InferResponse], None] | None = None


class GenerationOutput:
    """Answers one request: the `Output` of its sequence, called from the engine's thread alone.

    When streaming, an answer goes out with each token that shows something; what a token leaves open (half a
    character, the beginning of a stop text) comes with a later one. The last token's is the last answer.
    """

    def __init__(
        self,
        request: GenerationRequest,
        client: Client,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
    ) -> None:
        """Take the tokens of a checked request.

        Args:
            request: what is generated.
            client: whom for.
            tokenizer: None: the request asks for no text and has no stop texts.
            eos_token_ids: tokens that end a text.
        """
        self._request = request
        self._client = client
        self._eos = frozenset() if request.ignore_eos else eos_token_ids
        outputs = request.outputs
        needs_text = TEXT_OUTPUT in outputs or bool(request.stops)
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, request.prompt_ids) if tokenizer and needs_text else None
        )
        self._stops = (
            StopStrings(request.stops, include_stop_str_in_output=request.include_stop)
            if request.stops
            else None
        )
        self._streams = request.stream and client.emit is not None
        self._shows_ids = OUTPUT_IDS in outputs
        self._shows_text = TEXT_OUTPUT in outputs
        self._tokens = 0
        self._ids: list[int] = []  # since the last answer, as are the texts
        self._texts: list[str] = []
        if request.prompt_text is not None and not request.exclude_input_in_output:
            self._texts.append(request.prompt_text)

    def take(self, token: int) -> str | None:
        """A token was generated; `stop` where it, or the text that it completes, ends the generation."""
        self._tokens += 1
        self._ids.append(token)
        if token in self._eos:
            return STOP
        if self._detokenizer is not None and self._add(self._detokenizer.push(token)):
            self._detokenizer = None  # nothing of what follows is shown
            return STOP
        # The last token's answer is `end`'s.
        if self._streams and self._tokens < self._request.max_tokens and self._has_news():
            assert self._client.emit is not None
            self._client.emit(self._response(_UNFINISHED, _OTHER_PARAMETERS))
        return None

    def end(self, reason: str) -> None:
        """The text is complete: answer what is left, possibly nothing, as the last answer."""
        self.give(self.last(reason))

    def last(self, reason: str) -> InferResponse:
        """The last answer of a text that is complete."""
        if self._detokenizer is not None:
            if self._add(self._detokenizer.flush()):
                reason = STOP
            elif self._stops is not None:
                self._texts.append(self._stops.flush())
        parameters = {} if self._client.emit is None else _FINAL_PARAMETERS
        return self._response(reason, parameters)

    def give(self, answer: InferResponse) -> None:
        """Settle the request with its last answer."""
        give(self._client.future, answer)

    def fail(self, error: ServeError) -> None:
        """There won't be any more."""
        give(self._client.future, error)

    def _add(self, text: str) -> bool:
        """Take text that came to light; whether it completes a stop text."""
        stopped = False
        if self._stops is not None and self._tokens > self._request.sampling.min_tokens:
            text, stopped = self._stops.push(text)
        if text:
            self._texts.append(text)
        return stopped

    def _has_news(self) -> bool:
        return self._shows_ids or (self._shows_text and bool(self._texts))

    def _response(self, reason: str, parameters: dict[str, Parameter]) -> InferResponse:
        """Everything since the last answer."""
        outputs = tuple(self._output(name, reason) for name in self._request.outputs)
        self._texts.clear()
        self._ids.clear()
        client = self._client
        return InferResponse(client.model_name, client.model_version, client.id, outputs, parameters)

    def _output(self, name: str, reason: str) -> Tensor:
        if name == TEXT_OUTPUT:
            return _texts(name, "".join(self._texts))
        if name == OUTPUT_IDS:
            return Tensor(name, _INT64, np.array(self._ids, np.int64))
        if name == FINISH_REASON:
            return _texts(name, reason)
        assert name in (NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS)
        count = len(self._request.prompt_ids if name == NUM_INPUT_TOKENS else self._ids)
        return Tensor(name, _UINT32, np.array([count], np.uint32))


def _texts(name: str, text: str) -> Tensor:
    elements: Any = np.empty(1, object)
    elements[0] = text.encode()
    return Tensor(name, _BYTES, elements)
