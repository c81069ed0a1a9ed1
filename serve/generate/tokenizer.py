"""Text to token ids and back with the `tokenizer.json` beside a graph; back also token by token."""

from __future__ import annotations

import codecs
import json
import re
import threading
from typing import TYPE_CHECKING

from serve.errors import InternalError, InvalidArgumentError, ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import tokenizers

FILE = "tokenizer.json"
_LARGEST_FILE = 256 << 20  # one of 262 144 tokens has 33 MB
_LONGEST_CHARACTER = 4  # bytes of UTF-8
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# What decoders make of a token depends on its neighbours: whether there is one before it, to all we know.
_CONTEXT = 4
_MOST_PENDING = 16  # a text that ends in U+FFFD after each of so many tokens isn't waited for
# The library's own errors are of type Exception, but it may also panic, which is none.
_INTERRUPTS = (KeyboardInterrupt, SystemExit)
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a token of the kind that takes any text
# GPT-2's character for each byte: itself where it can be seen, else one of those from U+0100 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = sorted(set(range(0x100)).difference(_VISIBLE))
_BYTE_LEVEL = {chr(byte): byte for byte in _VISIBLE} | {
    chr(0x100 + n): byte for n, byte in enumerate(_HIDDEN)
}


# A text in pieces has a few more tokens than in one, but not twice as many.
_PIECE = 1 << 16  # characters
_CERTAINLY = 2


class Tokenizer:
    """A model's tokenizer, of Hugging Face's format; may be used by several threads at once.

    Attributes:
        vocabulary: number of tokens; a graph may have logits for more.
        longest_token_bytes: a text of more bytes than this times a number of tokens has more tokens, but for
            what a normalizer takes away and words that are unknown: it is refused without being encoded.
    """

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        """Wrap the library's object, whose own cutting and padding are turned off."""
        library.no_truncation()
        library.no_padding()
        self._library = library
        added = library.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in added.items() if token.special)
        kinds = _decoders(library)
        self._byte_level = kinds in ({"ByteLevel"}, {"Sequence", "ByteLevel"})
        self._byte_fallback = "ByteFallback" in kinds
        self._pieces: dict[int, bytes | None] = {}
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocabulary = len(vocabulary)
        self._long_texts = threading.Lock()  # one at a time, for their memory
        self.longest_token_bytes = max((len(token.encode()) for token in vocabulary), default=1)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer beside a graph, if there is one.

        Args:
            folder: of a version.

        Raises:
            ModelLoadError: the library is not installed, or it can't read the file.
        """
        path = folder / FILE
        if not (path.exists() or path.is_symlink()):
            return None
        if not path.is_file():
            raise ModelLoadError(f"{FILE}: expected a file, or none")
        try:
            import tokenizers  # noqa: PLC0415 - an extra that few models need
        except ImportError as error:
            raise ModelLoadError(
                f"{FILE} needs the library 'tokenizers', which is not installed: "
                "pip install 'onnxedge[text]', in a checkout '.[text]'"
            ) from error
        if (size := path.stat().st_size) > _LARGEST_FILE:
            raise ModelLoadError(f"{FILE}: expected {_LARGEST_FILE} bytes at most, got {size}")
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text("utf-8")))
        except _INTERRUPTS:
            raise
        except BaseException as error:
            raise ModelLoadError(
                f"{FILE}: the library 'tokenizers' {tokenizers.__version__} can't read it: {error}"
            ) from error

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt's tokens, with those that every text of the model begins with.

        Raises:
            InvalidArgumentError: the vocabulary can't express the text.
        """
        try:
            # `encode` would keep the interpreter's lock: 1.3 us a token, in which no other thread runs.
            return self._library.encode_batch_fast([text])[0].ids
        except _INTERRUPTS:
            raise
        except BaseException as error:
            unknown = [c for c in sorted(set(text)) if self._library.token_to_id(c) is None][:5]
            raise InvalidArgumentError(
                f"the tokenizer can't encode the text: {error}"
                + (f"; its vocabulary doesn't have {', '.join(map(repr, unknown))}" if unknown else "")
            ) from error

    def exceeds(self, text: str, tokens: int) -> bool:
        """Whether a long text has certainly more than so many tokens, found out without having them all.

        A text's tokens take some 200 bytes each while they are made, and neither a deadline nor a
        cancellation ends it: 16 MB took 14 s and 2.6 GB.
        """
        if len(text) <= _CERTAINLY * tokens + _PIECE:
            return False
        found = 0
        with self._long_texts:
            for start in range(0, len(text), _PIECE):
                found += len(self.encode(text[start : start + _PIECE]))
                if found > _CERTAINLY * tokens:
                    return True
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; special ones, and ids beyond the vocabulary, have none.

        Raises:
            InternalError: the tokenizer can't.
        """
        try:
            return self._library.decode(ids, skip_special_tokens=True)
        except _INTERRUPTS:
            raise
        except BaseException as error:
            raise InternalError(f"the tokenizer can't decode {str(list(ids))[:100]}: {error}") from error

    def piece(self, token: int) -> bytes | None:
        """What a token adds to a text's UTF-8, wherever it stands; None: that depends on its neighbours."""
        try:
            return self._pieces[token]
        except KeyError:
            return self._pieces.setdefault(token, self._piece(token))

    def _piece(self, token: int) -> bytes | None:
        text = None if token in self._special else self._library.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            if all(character in _BYTE_LEVEL for character in text):
                return bytes(_BYTE_LEVEL[character] for character in text)
            return text.encode()  # an added token
        if self._byte_fallback and _BYTE.fullmatch(text):
            return bytes.fromhex(text[3:5])
        return None


class IncrementalDetokenizer:
    """The text of a sequence as its tokens come, never with half a character at its end.

    All that it returns together is what `Tokenizer.decode` makes of the tokens where they stand, after the
    prompt, but for two cases. Where tokens of single bytes make no valid UTF-8, each part that can't be one
    is replaced, and valid characters beside it are not (the library replaces every byte in the row). Where a
    prompt ends in half a character, the whole character comes with the token that completes it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        """Start after a prompt's tokens."""
        self._tokenizer = tokenizer
        # Keeps the bytes of a character that is not complete; replaces as the Unicode Standard, 3.9, has it.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending: list[int] = []
        self._shown = 0  # characters of what is pending
        self._context: list[int] = []
        for token in reversed(prompt_ids):
            if len(self._context) == _CONTEXT:
                break
            if tokenizer.piece(token) != b"":
                self._context.insert(0, token)
        end = b""
        for token in reversed(self._context):
            if not (piece := tokenizer.piece(token)):
                break
            end = piece + end
        self._utf8.decode(end[1 - _LONGEST_CHARACTER :])

    def push(self, token: int) -> str:
        """The text that is complete with the next token; often "", where a character takes several."""
        piece = self._tokenizer.piece(token)
        if piece is None:
            ended = self._utf8.decode(b"", final=True)
            self._pending.append(token)
            return ended + self._decode_pending(final=False)
        if not piece:
            return ""
        text = self._decode_pending(final=True)
        self._context = [*self._context, token][-_CONTEXT:]
        return text + self._utf8.decode(piece)

    def flush(self) -> str:
        """The rest, at the end of the text."""
        return self._decode_pending(final=True) + self._utf8.decode(b"", final=True)

    def _decode_pending(self, *, final: bool) -> str:
        """What the tokens that wait add to those before them, all but what may be half a character."""
        if not self._pending:
            return ""
        before = self._tokenizer.decode(self._context)
        ids = self._context + self._pending
        text = self._tokenizer.decode(ids)[len(before) :]
        waits = not final and text.endswith(_REPLACEMENT) and len(self._pending) < _MOST_PENDING
        new = text[self._shown : len(text) - waits]
        if waits:
            self._shown += len(new)
        else:
            self._context, self._pending, self._shown = ids[-_CONTEXT:], [], 0
        return new


def _decoders(library: tokenizers.Tokenizer) -> set[str]:
    """The types of decoders that a tokenizer has, one or several within one another."""
    if library.decoder is None:
        return set()
    todo = [json.loads(library.decoder.__getstate__())]
    kinds = set()
    while todo:
        decoder = todo.pop()
        kinds.add(decoder["type"])
        todo += decoder.get("decoders", [])
    return kinds
