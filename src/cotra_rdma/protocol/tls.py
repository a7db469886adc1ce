"""`Tls`: the certificate of one side, and whom it believes."""

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
    """Files for mutual TLS: each side shows a certificate, and believes those that the authority signed.

    Attributes:
        certificate: PEM file of this side's certificate, with those between it and the authority.
        key: PEM file of its private key.
        ca: PEM file of the authority's certificates. Only who has a certificate of it gets in.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    ca: str | os.PathLike[str]

    def read(self) -> tuple[bytes, bytes, bytes]:
        """The certificate, the key and the authority's certificates, as they are in the files now.

        Raises:
            InvalidInputError: a file cannot be read, or holds no PEM.
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
        """gRPC's credentials of an owner. Raises `InvalidInputError`."""
        import grpc

        last = self.read()

        def now() -> grpc.ServerCertificateConfiguration | None:
            """What a new connection is to see; None: as before."""
            nonlocal last
            try:
                fresh = self.read()
            except InvalidInputError as error:  # the files are being replaced, maybe
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
        """gRPC's credentials of a reader. Raises `InvalidInputError`."""
        import grpc

        certificate, key, ca = self.read()
        return grpc.ssl_channel_credentials(ca, key, certificate)


def _configuration(read: tuple[bytes, bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    import grpc

    certificate, key, ca = read
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca)
