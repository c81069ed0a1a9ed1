"""Tokens to answers: one a token or one for all, never half a character, never more than asked."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import CanceledError
from serve.generate.request_fields import GenerationRequest
from serve.generate.responses import Client, GenerationOutput
from serve.generate.sampling import SamplingParameters
from serve.generate.tokenizer import Tokenizer
from serve.protocol.codec import encode_infer_response
from tests.serve.generate.byte_tokenizer import EOS, write_byte_tokenizer

if TYPE_CHECKING:
    from serve.request import InferResponse

PROMPT = "go: "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    loaded = Tokenizer.load(folder)
    assert loaded is not None
    return loaded


def asked(tokenizer: Tokenizer, **changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {
        "prompt_ids": tokenizer.encode(PROMPT), "prompt_text": PROMPT, "max_tokens": 100,
        "sampling": SamplingParameters(), "stops": (), "include_stop": False, "stream": True,
        "ignore_eos": False, "exclude_input_in_output": True, "outputs": ("text_output",), **changes,
    }  # fmt: skip
    return GenerationRequest(**fields)


class Conversation:
    """A request's output, its tokens fed in as the engine does."""

    def __init__(self, tokenizer: Tokenizer, *, unary: bool = False, **changes: Any) -> None:
        self.emitted: list[InferResponse] = []
        self.future: Future[InferResponse] = Future()
        request = asked(tokenizer, **changes)
        emit = None if unary else self.emitted.append
        client = Client("m", "3", "id", self.future, emit)
        self._max_tokens = request.max_tokens
        self.output = GenerationOutput(request, client, tokenizer, frozenset({EOS}))

    def feed(self, tokens: list[int]) -> list[InferResponse]:
        """All answers, the last one last."""
        for count, token in enumerate(tokens, 1):
            reason = self.output.take(token)
            if reason is None and count == self._max_tokens:
                reason = "length"
            if reason is not None:
                self.output.end(reason)
                break
        return [*self.emitted, self.future.result(timeout=0)]


def values(response: InferResponse, name: str) -> list[Any]:
    found: list[Any] = next(output.array for output in response.outputs if output.name == name).tolist()
    return found


def text_of(responses: list[InferResponse]) -> list[str]:
    return [values(response, "text_output")[0].decode() for response in responses]


def final(responses: list[InferResponse]) -> list[Any]:
    return [response.parameters.get("triton_final_response") for response in responses]


def test_each_token_is_answered_and_the_last_one_last(tokenizer: Tokenizer) -> None:
    responses = Conversation(tokenizer, max_tokens=3).feed(tokenizer.encode("abc"))
    assert text_of(responses) == ["a", "b", "c"]
    assert final(responses) == [False, False, True]
    assert {(r.model_name, r.model_version, r.id) for r in responses} == {("m", "3", "id")}
    for response in responses:
        encode_infer_response(response)


def test_half_a_character_waits_for_the_other_half(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, outputs=("text_output", "num_output_tokens"))
    responses = conversation.feed([*tokenizer.encode("aä€b"), EOS])
    assert "".join(text_of(responses)) == "aä€b"
    assert all("\ufffd" not in text for text in text_of(responses))
    assert [text for text in text_of(responses)[:-1] if not text] == []
    counts = [values(response, "num_output_tokens")[0] for response in responses]
    assert sum(counts) == len("aä€b".encode()) + 1
    assert max(counts) == 3


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    first_half = tokenizer.encode("ä")[:1]
    responses = Conversation(tokenizer, max_tokens=2).feed([*tokenizer.encode("a"), *first_half])
    assert text_of(responses) == ["a", "\ufffd"]


def test_the_end_token_ends_the_text_and_shows_nothing(tokenizer: Tokenizer) -> None:
    outputs = ("text_output", "output_ids", "finish_reason")
    tokens = [*tokenizer.encode("ab"), EOS, *tokenizer.encode("c")]
    responses = Conversation(tokenizer, outputs=outputs).feed(tokens)
    assert text_of(responses) == ["a", "b", ""]
    assert [values(response, "output_ids") for response in responses] == [[t] for t in tokens[:3]]
    assert [values(response, "finish_reason") for response in responses] == [[b"None"], [b"None"], [b"stop"]]


def test_the_end_token_can_be_ignored(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("a"), EOS, *tokenizer.encode("b")]
    conversation = Conversation(
        tokenizer, ignore_eos=True, max_tokens=3, outputs=("text_output", "finish_reason")
    )
    responses = conversation.feed(tokens)
    assert "".join(text_of(responses)) == "ab"
    assert values(responses[-1], "finish_reason") == [b"length"]


def test_a_stop_text_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, stops=("END",), outputs=("text_output", "finish_reason"))
    responses = conversation.feed(tokenizer.encode("a EN ENDx"))
    assert "".join(text_of(responses)) == "a EN "
    assert values(responses[-1], "finish_reason") == [b"stop"]
    assert final(responses)[-1] is True


def test_a_stop_text_may_be_part_of_the_text(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, stops=("END",), include_stop=True)
    assert "".join(text_of(conversation.feed(tokenizer.encode("a ENDx")))) == "a END"


def test_what_might_have_become_a_stop_text_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    responses = Conversation(tokenizer, stops=("END",), max_tokens=3).feed(tokenizer.encode("aEN"))
    assert text_of(responses) == ["a", "EN"]


def test_stop_texts_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, stops=("b",), sampling=SamplingParameters(min_tokens=3))
    assert "".join(text_of(conversation.feed(tokenizer.encode("abcdbe")))) == "abcd"


def test_ids_alone_need_no_tokenizer() -> None:
    future: Future[InferResponse] = Future()
    emitted: list[InferResponse] = []
    request = GenerationRequest(
        [1, 2], None, 2, SamplingParameters(), (), include_stop=False, stream=True,
        ignore_eos=False, exclude_input_in_output=True, outputs=("output_ids",),
    )  # fmt: skip
    output = GenerationOutput(request, Client("m", "1", "", future, emitted.append), None, frozenset())
    assert output.take(5) is None
    assert output.take(6) is None
    output.end("length")
    assert [values(response, "output_ids") for response in (*emitted, future.result())] == [[5], [6]]
    assert all(response.outputs[0].array.dtype == np.int64 for response in emitted)


def test_counts_alone_are_answered_once(tokenizer: Tokenizer) -> None:
    outputs = ("num_input_tokens", "num_output_tokens")
    (response,) = Conversation(tokenizer, outputs=outputs).feed([*tokenizer.encode("abc"), EOS])
    assert values(response, "num_input_tokens") == [len(PROMPT)]
    assert values(response, "num_output_tokens") == [4]
    assert [output.array.dtype for output in response.outputs] == [np.uint32] * 2


def test_without_stream_there_is_one_answer(tokenizer: Tokenizer) -> None:
    outputs = ("text_output", "output_ids", "finish_reason", "num_input_tokens", "num_output_tokens")
    tokens = [*tokenizer.encode("abä"), EOS]
    conversation = Conversation(tokenizer, stream=False, exclude_input_in_output=False, outputs=outputs)
    (response,) = conversation.feed(tokens)
    assert [values(response, name) for name in outputs] == [
        [f"{PROMPT}abä".encode()], tokens, [b"stop"], [len(PROMPT)], [len(tokens)],
    ]  # fmt: skip
    assert final([response]) == [True]


def test_a_single_call_gets_the_whole_text(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, unary=True, stream=False)
    (response,) = conversation.feed([*tokenizer.encode("abc"), EOS])
    assert text_of([response]) == ["abc"]
    assert response.parameters == {}


def test_a_failure_is_the_last_answer(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer)
    conversation.output.take(tokenizer.encode("a")[0])
    conversation.output.fail(CanceledError("given up"))
    assert text_of(conversation.emitted) == ["a"]
    with pytest.raises(CanceledError, match="given up"):
        conversation.future.result(timeout=0)


def test_a_client_that_gave_up_is_no_error(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer)
    assert conversation.future.cancel()
    conversation.output.end("stop")
    conversation.output.fail(CanceledError())


@given(st.text(max_size=30), st.sampled_from([(), ("ab",), ("\u00e4", "b\n")]), st.integers(1, 40))
def test_streamed_and_whole_texts_are_the_same(
    tokenizer: Tokenizer, text: str, stops: tuple[str, ...], max_tokens: int
) -> None:
    tokens = [*tokenizer.encode(text), EOS]
    changes: dict[str, Any] = {
        "stops": stops, "max_tokens": max_tokens, "outputs": ("text_output", "output_ids", "finish_reason")
    }  # fmt: skip
    streamed = Conversation(tokenizer, **changes).feed(tokens)
    (whole,) = Conversation(tokenizer, stream=False, **changes).feed(tokens)
    assert "".join(text_of(streamed)) == text_of([whole])[0]
    assert [i for r in streamed for i in values(r, "output_ids")] == values(whole, "output_ids")
    assert values(streamed[-1], "finish_reason") == values(whole, "finish_reason")
    shown = text_of([whole])[0]
    assert not any(stop in shown for stop in stops)
    if len(tokens) <= max_tokens:
        assert shown == min((text.partition(stop)[0] for stop in stops), key=len, default=text)
