"""Tensors in POSIX shared memory of clients on the same machine: Triton's system shared-memory extension.

A region is read and written through its file, not mapped: a client may shorten the file whenever it likes,
and touching a mapped page that is gone would kill the server with SIGBUS, where `pread` is merely short. It
costs 28 µs for 600 KB, 20 µs more than copying them from a mapping.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref
from typing import TYPE_CHECKING

import numpy as np

from serve.admission import default_byte_limit
from serve.errors import (
    AlreadyExistsError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from serve.protocol.tensor_codec import check_byte_size, decode_tensor
from serve.request import Tensor

if TYPE_CHECKING:
    from serve.request import InferRequest, SharedArea, SharedInput

# Each holds a file open.
MAX_REGIONS = 512
_LONGEST_NAME = 256
_FOLDER = "/dev/shm"  # noqa: S108 - where Linux keeps POSIX shared memory


class Region:
    """A registered part of a shared-memory file; the file is closed when nobody uses the region any more.

    Attributes:
        name: what requests call it.
        key: the file's POSIX name, as the client gave it.
        offset: where in the file it begins, in bytes.
        byte_size: how long it is.
    """

    __slots__ = ("__weakref__", "_file", "byte_size", "key", "name", "offset")

    def __init__(self, name: str, key: str, offset: int, byte_size: int, file: int) -> None:
        """Take over an open file."""
        self.name = name
        self.key = key
        self.offset = offset
        self.byte_size = byte_size
        self._file = file
        weakref.finalize(self, os.close, file).atexit = False

    def check(self, area: SharedArea) -> None:
        """Raise InvalidArgumentError when an area isn't wholly inside."""
        if area.offset >= self.byte_size or area.offset + area.byte_size > self.byte_size:
            raise InvalidArgumentError(
                f"shared memory region '{self.name}' has {self.byte_size} bytes, the request names "
                f"{area.byte_size} from {area.offset} on"
            )

    def read(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on.

        Raises:
            InvalidArgumentError: the file has become too short.
        """
        position = self.offset + offset
        while target:
            count = os.preadv(self._file, [target], position)
            if not count:
                raise self._shortened()
            position += count
            target = target[count:]

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put `data` at `offset`.

        Raises:
            InvalidArgumentError: the file has become too short.
            UnavailableError: the machine has no shared memory left for it.
        """
        position = self.offset + offset
        rest = memoryview(data)
        # Writing past its end would make the file grow.
        if position + len(rest) > os.fstat(self._file).st_size:
            raise self._shortened()
        while rest:
            try:
                count = os.pwrite(self._file, rest, position)
            except OSError as error:
                raise UnavailableError(f"shared memory region '{self.name}': {error.strerror}") from error
            position += count
            rest = rest[count:]

    def _shortened(self) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"shared memory region '{self.name}': its file '{self.key}' was shortened after it was registered"
        )


class SharedMemory:
    """The regions that clients have registered."""

    def __init__(self, *, allow: bool, prefix: str, byte_limit: int = 0) -> None:
        """Start without any.

        Args:
            allow: whether clients may register regions at all.
            prefix: what the names of their files must begin with, so that no client gets the server to open
                the shared memory of another program; "/" is any.
            byte_limit: bytes of all regions together, and of the copies of inputs that are in use at once; 0:
                an eighth of the server's memory. The pages that the server writes count as its own.
        """
        self._allow = allow
        self._prefix = _file_name(prefix)
        self._byte_limit = byte_limit or default_byte_limit()
        self._regions: dict[str, Region] = {}
        self._copied = 0
        # Re-entered when a copy is dropped while the lock is held.
        self._lock = threading.RLock()

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open the shared-memory file `key`, and call `byte_size` bytes of it from `offset` on `name`.

        Raises:
            UnavailableError: it is not allowed, or there are too many regions or bytes already.
            InvalidArgumentError: the name is no name, the key has another prefix, or the file is too short.
            AlreadyExistsError: there is a region of this name.
            InternalError: there is no such file, or it can't be opened.
        """
        self._require_allowed()
        if len(name) > _LONGEST_NAME:
            raise InvalidArgumentError(
                f"a shared memory region's name has at most {_LONGEST_NAME} characters, got {len(name)}"
            )
        file_name = _file_name(key)
        if not file_name.startswith(self._prefix):
            raise InvalidArgumentError(
                f"shared memory region '{name}': key '{key}' doesn't begin with '/{self._prefix}': choose "
                f"another key, or start the server with another --client-shm-prefix (/ takes any key)"
            )
        with self._lock:
            self._require_room(name, byte_size)
            file = _open(key, file_name)
            try:
                _check_bounds(name, file, offset, byte_size)
            except BaseException:
                os.close(file)
                raise
            self._regions[name] = Region(name, key, offset, byte_size, file)

    def unregister(self, name: str) -> None:
        """Forget a region, all of them for ""; requests that use it already go on with it."""
        with self._lock:
            if name:
                self._regions.pop(name, None)
            else:
                self._regions.clear()

    def close(self) -> None:
        """Forget all regions."""
        self.unregister("")

    def status(self, name: str = "") -> list[Region]:
        """The region of this name, all of them for "".

        Raises:
            NotFoundError: there is none.
        """
        with self._lock:
            if not name:
                return list(self._regions.values())
            region = self._regions.get(name)
        if region is None:
            raise NotFoundError(f"Unable to find system shared memory region: '{name}'")
        return [region]

    def resolve(self, request: InferRequest) -> None:
        """Read a request's inputs that are in shared memory, and look up the regions that its outputs go to.

        Raises:
            NotFoundError: a region is not registered.
            InvalidArgumentError: a tensor isn't wholly inside its region, or its bytes don't make one up.
            UnavailableError: shared memory is not allowed, or the copies in use are too many bytes already.
        """
        self._require_allowed()
        for output in request.outputs:
            if output.shared_memory is not None:
                output.shared_memory.memory = self._find(output.shared_memory)
        request.inputs += tuple(map(self._read, request.shared_inputs))
        request.shared_inputs = ()

    def _read(self, shared: SharedInput) -> Tensor:
        area = shared.area
        region = self._find(area)
        check_byte_size(shared.name, shared.datatype, shared.shape, area.byte_size)
        with self._lock:
            if self._copied + area.byte_size > self._byte_limit:
                raise UnavailableError(
                    f"the inputs in use from shared memory have {self._copied} bytes, '{shared.name}' has "
                    f"{area.byte_size}, and the server's limit is {self._byte_limit}: retry later"
                )
            self._copied += area.byte_size
        try:
            copy = np.empty(area.byte_size, np.uint8)
        except BaseException:
            self._give_back(area.byte_size)
            raise
        weakref.finalize(copy, self._give_back, area.byte_size).atexit = False
        region.read(area.offset, copy.data)
        return Tensor(
            shared.name,
            shared.datatype,
            decode_tensor(shared.name, shared.datatype, shared.shape, copy.data),
        )

    def _find(self, area: SharedArea) -> Region:
        with self._lock:
            region = self._regions.get(area.region)
        if region is None:
            raise NotFoundError(f"Unable to find shared memory region: '{area.region}'")
        region.check(area)
        return region

    def _give_back(self, byte_size: int) -> None:
        with self._lock:
            self._copied -= byte_size

    def _require_allowed(self) -> None:
        if not self._allow:
            raise UnavailableError(
                "clients' shared memory is disabled: start the server with --allow-client-shm=true"
            )

    def _require_room(self, name: str, byte_size: int) -> None:
        if name in self._regions:
            raise AlreadyExistsError(f"shared memory region '{name}' is registered already")
        if len(self._regions) >= MAX_REGIONS:
            raise UnavailableError(f"{MAX_REGIONS} shared memory regions are registered, the server's limit")
        used = sum(region.byte_size for region in self._regions.values())
        if used + byte_size > self._byte_limit:
            raise UnavailableError(
                f"the registered shared memory regions have {used} bytes, '{name}' has {byte_size}, and the "
                f"server's limit is {self._byte_limit}"
            )


def _file_name(key: str) -> str:
    """A POSIX shared-memory name without its slash, which some clients leave out and others write twice."""
    return key.lstrip("/")


def _open(key: str, file_name: str) -> int:
    """Open a shared-memory file for reading and writing, and nothing else.

    Raises:
        InternalError: it isn't there, can't be opened, or is something else.
    """
    problem: str | None = "it is no name of a file"
    if "/" not in file_name:
        try:
            file = os.open(f"{_FOLDER}/{file_name}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            problem = error.strerror
        except ValueError:  # a NUL in it, or not encodable
            pass
        else:
            if stat.S_ISREG(os.fstat(file).st_mode):
                return file
            os.close(file)
            problem = "it is no file"
    raise InternalError(f"Unable to open shared memory region: '{key}': {problem}")


def _check_bounds(name: str, file: int, offset: int, byte_size: int) -> None:
    length = os.fstat(file).st_size
    if not byte_size or offset + byte_size > length:
        raise InvalidArgumentError(
            f"shared memory region '{name}': {byte_size} bytes from {offset} on are not inside its "
            f"file, which has {length}"
        )
