"""Certificate of a federation's server, distinguished from its clients' certificates by the same authority."""

from cryptography import x509
from cryptography.x509.oid import NameOID

from ..configs.bundle_files import issued_by
from .server_bundle import SERVER


def server_certificate(pem: bytes, ca: bytes, federation: str) -> x509.Certificate:
    """Return the certificate if it is that of the federation's server; its validity period is not checked.

    Args:
      pem: the certificate.
      ca: of the authority; during an overlap another behind it.
      federation: its name.

    Raises:
      ValueError: it is none, or another's.
    """
    try:
        own = x509.load_pem_x509_certificate(pem)
        held = issued_by(own, ca)
    except TypeError as error:
        raise ValueError("it is no certificate") from error
    if not held:
        raise ValueError("the federation's authority did not sign it")
    kinds = (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME)
    named = [[each.value for each in own.subject.get_attributes_for_oid(kind)] for kind in kinds]
    if named != [[federation], [SERVER]]:
        raise ValueError("it belongs to another server")
    return own
