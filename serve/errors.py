"""What can go wrong with a request, one class per gRPC status (the mapping of Triton's error codes)."""

# A name that a client made up comes back in the message, which is a header of at most some KB.
_LONGEST_MESSAGE = 1000


class ServeError(Exception):
    """An error whose message is meant for the client.

    Attributes:
        code: name of the gRPC status code that a transport answers with.
    """

    code = "UNKNOWN"

    def __init__(self, message: str = "") -> None:
        """Cut the message to a length that a header can hold."""
        cut = len(message) > _LONGEST_MESSAGE
        super().__init__(f"{message[:_LONGEST_MESSAGE]}..." if cut else message)


class InvalidArgumentError(ServeError):
    """The request can't be right, whatever the state of the server."""

    code = "INVALID_ARGUMENT"


class NotFoundError(ServeError):
    """The request names a model or version that is not here."""

    code = "NOT_FOUND"


class UnavailableError(ServeError):
    """The request may succeed later or on another server: retry."""

    code = "UNAVAILABLE"


class UnsupportedError(ServeError):
    """The request asks for something that this server doesn't do."""

    code = "UNIMPLEMENTED"


class InternalError(ServeError):
    """The model failed while it ran."""

    code = "INTERNAL"


class AlreadyExistsError(ServeError):
    """What the request wants to make is there already."""

    code = "ALREADY_EXISTS"


class CanceledError(ServeError):
    """The client gave the request up."""

    code = "CANCELLED"


class DeadlineExceededError(ServeError):
    """The request's deadline passed before its answer was there."""

    code = "DEADLINE_EXCEEDED"


class RetiredError(Exception):
    """The model version was replaced or unloaded after it was looked up: look it up again."""


class ModelLoadError(Exception):
    """A model version can't be served; the message says why and what to do."""
