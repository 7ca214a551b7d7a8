"""What bytes are on the wire: as they are, or as TLS records.

TLS runs on buffers of memory, not on the socket: so one thread pumps all of a link, and no two ever use one TLS session at a time.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from trivisor.core.errors import MigrationError

if TYPE_CHECKING:
    import ssl

_PIECE = 256 << 10


class Sealing:
    """Bytes as they are."""

    certificate: bytes = b""
    """The other side's, if it showed one (DER)."""

    def sealed(self, data: bytes) -> bytes:
        """Return what goes on the wire for `data`."""
        return data

    def opened(self, data: bytes) -> bytes:
        """Return what `data` from the wire means, as far as it is complete. Raises MigrationError."""
        return data


class TlsSealing(Sealing):
    """One TLS session over `sock`, which blocks; its handshake is done when this returns. Raises MigrationError."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server: bool, name: str | None, timeout: float) -> None:
        # Here, since Python may be one without it (Debian's minimal one), which moves machines over unix sockets all the same.
        import ssl

        self._wants, self._fault, self._ended = ssl.SSLWantReadError, ssl.SSLError, (ssl.SSLZeroReturnError, ssl.SSLEOFError)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._in, self._out, server_side=server, server_hostname=name)
        self._shake(sock, time.monotonic() + timeout)
        self.certificate = self._session.getpeercert(binary_form=True) or b""

    def sealed(self, data: bytes) -> bytes:
        self._session.write(data)
        return self._out.read()

    def opened(self, data: bytes) -> bytes:
        self._in.write(data)
        found = bytearray()
        try:
            while piece := self._session.read(_PIECE):
                found += piece
        except self._wants:
            pass
        except self._ended:
            pass  # the socket's own end says the same, next
        except self._fault as error:
            raise MigrationError(
                f"what came is not what was sent: {error.reason or error}", hint="see the way between the hosts"
            ) from error
        return bytes(found)

    def _shake(self, sock: socket.socket, deadline: float) -> None:
        done = False
        try:
            while not done:
                try:
                    self._session.do_handshake()
                    done = True
                except self._wants:
                    pass
                if data := self._out.read():
                    sock.sendall(data)
                if done:
                    return
                sock.settimeout(max(0.01, deadline - time.monotonic()))
                if not (data := sock.recv(_PIECE)):
                    raise MigrationError(
                        "the other side ended the TLS handshake", hint="does it know our certificate, and speak TLS at all?"
                    )
                self._in.write(data)
        except self._fault as error:
            said = getattr(error, "verify_message", "") or error.reason or str(error)
            raise MigrationError(
                f"there is no TLS with the other side: {said}", hint="see certificates and authority of both sides"
            ) from error
        except OSError as error:
            raise MigrationError(f"there is no TLS with the other side: {error.strerror or error}", hint="does it speak TLS?") from error
