"""Certificate of a device, which the authority renews for the device's existing key."""

import logging
import time
from dataclasses import replace

from cryptography.hazmat.primitives.serialization import Encoding

from ...base.durable_files import PUBLIC, replace_file
from ...base.refusal import Refusal
from ...configs.bundle_files import (
    CERTIFICATE,
    Credentials,
    certificate_ends,
    check_certificate,
    issued_by,
    load_certificate,
    read_credentials,
)
from .client_bundle import ClientBundle

logger = logging.getLogger("fedveil.client")


def renew_certificate(bundle: ClientBundle, pem: bytes) -> ClientBundle:
    """Return the bundle with a newer certificate for its key, which replaces the earlier one on disk.

    Args:
      bundle: returned unchanged if its certificate expires no earlier, unless an authority signed it that was replaced.
      pem: from the server; it needs the authority's signature, and this device's key and name.

    Raises:
      Refusal: it is not a certificate of the authority for this key and name.
      OSError: it cannot be stored.
    """
    authority, own = bundle.authority, bundle.settings
    held = replace(bundle.credentials, earlier=authority.earlier_ca)
    if pem == held.certificate:
        return bundle
    path = bundle.folder / CERTIFICATE
    check_certificate(path, pem, held, own.federation, own.name)
    pem = load_certificate(path, pem).public_bytes(Encoding.PEM)  # without trailing data from the server
    before, after = (
        issued_by(load_certificate(path, each), authority.ca) for each in (held.certificate, pem)
    )
    ends_later = certificate_ends(path, pem) > certificate_ends(path, held.certificate)
    if after < before or (after == before and not ends_later):
        return bundle
    replace_file(path, pem, PUBLIC)
    logger.info("the certificate was renewed")
    return replace(bundle, credentials=replace(held, certificate=pem))


def newest_credentials(bundle: ClientBundle) -> Credentials:
    """Return the current credentials in the bundle's folder, or the earlier ones if these cannot be used."""
    own = bundle.settings
    try:
        authority = bundle.authority
        held = read_credentials(bundle.folder, own.federation, own.name, authority.earlier_ca)
        return replace(held, ca=authority.roots(time.time()))
    except Refusal as refusal:
        logger.warning("%s", refusal)
        return bundle.credentials
