"""`Tls`: the certificate of one side, and the authority that it trusts."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cotra_rdma.errors import InvalidInputError

if TYPE_CHECKING:
    import grpc

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tls:
    """The files for mutual TLS. Each side shows a certificate, and trusts certificates that the authority signed.

    Attributes:
        certificate: the PEM file of this side's certificate, and of the certificates between it and the authority.
        key: the PEM file of this side's private key.
        ca: the PEM file of the authority's certificates.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    ca: str | os.PathLike[str]

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Reads the files: the certificate, the key, and the authority's certificates.

        Raises:
            InvalidInputError: a file cannot be read, or is not a PEM file.
        """
        contents = []
        for what, path in (("certificate", self.certificate), ("key", self.key), ("ca", self.ca)):
            try:
                content = Path(path).read_bytes()
            except OSError as error:
                raise InvalidInputError(f"the TLS {what} {os.fspath(path)} cannot be read: {error.strerror}") from error
            if b"-----BEGIN " not in content:
                raise InvalidInputError(f"the TLS {what} {os.fspath(path)} is no PEM file")
            contents.append(content)
        return contents[0], contents[1], contents[2]

    def for_server(self) -> grpc.ServerCredentials:
        """Makes an owner's credentials for gRPC. A new connection sees the files as they are then.

        Raises:
            InvalidInputError: as for `read`.
        """
        import grpc

        last = self.read()

        def now() -> grpc.ServerCertificateConfiguration | None:
            """Returns what a new connection is to see, or None if nothing changed."""
            nonlocal last
            try:
                fresh = self.read()
            except InvalidInputError as error:  # somebody may be replacing the files just now
                log.warning("the certificate stays as it was: %s", error)
                return None
            if fresh == last:
                return None
            last = fresh
            return _configuration(fresh)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(last), cast(Any, now), require_client_authentication=True
        )

    def for_client(self) -> grpc.ChannelCredentials:
        """Makes a reader's credentials for gRPC.

        Raises:
            InvalidInputError: as for `read`.
        """
        import grpc

        certificate, key, ca = self.read()
        return grpc.ssl_channel_credentials(ca, key, certificate)


def _configuration(read: tuple[bytes, bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    import grpc

    certificate, key, ca = read
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca)
