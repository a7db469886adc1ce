"""Makes certificates for tests and small clusters, signed by an authority whose files lie in a directory."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cotra_rdma.errors import InvalidInputError
from cotra_rdma.protocol.tls import Tls

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, CertificateBuilder, Name

AUTHORITY = "ca"
"""The name of the authority's files. Everybody gets `ca.pem`. `ca.key` is secret."""
_AUTHORITY_DAYS = 3650


def make_certificate(
    directory: str | os.PathLike[str], name: str, hosts: Sequence[str] = (), *, days: int = 365
) -> Tls:
    """Makes a certificate, signed by the authority of the directory. The first call makes the authority.

    Args:
        directory: the directory that gets NAME.pem and NAME.key, and at the first call ca.pem and ca.key.
        name: the name that the certificate is for. A policy file has its rules by this name.
        hosts: the host names and IP addresses at which an owner is reached. Readers refuse an owner at any other address.
        days: the number of days for which the certificate is valid.

    Returns:
        The paths of the files, for `serve` and `connect`.

    Raises:
        InvalidInputError: `name` cannot be the name of a file, or has a certificate already; `days` is out of its range; the
            authority's files cannot be read; or the package `cryptography` is missing.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise InvalidInputError(
            "certificates need the package cryptography: pip install 'cotra-rdma[certs]'"
        ) from error
    folder = Path(directory)
    if (
        not name
        or name == AUTHORITY
        or Path(name).name != name
        or name.startswith(".")
        or not name.isprintable()
        or len(name) > 64
    ):
        raise InvalidInputError(f"{name!r} cannot be the name of a certificate")
    if not 1 <= days <= 3650:
        raise InvalidInputError(f"days must be in [1, 3650], not {days}")
    files = Tls(folder / f"{name}.pem", folder / f"{name}.key", folder / f"{AUTHORITY}.pem")
    if Path(files.certificate).exists():
        raise InvalidInputError(f"{files.certificate} is there already")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority_key, authority = _authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = (
        _begun(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), authority.subject, key, days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write(Path(files.key), _pem_of(key))
    _write(Path(files.certificate), made.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return files


def _authority(folder: Path) -> tuple[EllipticCurvePrivateKey, Certificate]:
    """Reads the key and the certificate of the directory's authority. Makes them if there are none."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key_file, file = folder / f"{AUTHORITY}.key", folder / f"{AUTHORITY}.pem"
    if file.exists() or key_file.exists():
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(file.read_bytes())
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"the authority in {folder} cannot be read: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise InvalidInputError(f"{key_file} holds another kind of key")
        return key, certificate
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cotra-rdma authority")])
    certificate = (
        _begun(name, name, key, _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(key_file, _pem_of(key))
    _write(file, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return key, certificate


def _begun(subject: Name, issuer: Name, key: EllipticCurvePrivateKey, days: int) -> CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _pem_of(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Writes a new file. It has its mode from the start, so nobody can read a key in between."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(content)
