"""Time stamp of a run's manifest by an authority (RFC 3161), requested over HTTP and checked offline."""

from __future__ import annotations

import http.client
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from cryptography import x509

from ...base.durable_files import replace_file
from ...base.extras import require_extra
from ...base.refusal import Refusal, refusing
from ...configs.bundle_files import read_file
from ...run.files import MANIFEST, TIME_STAMP
from ...run.manifest import PUBLIC_MODE, read_manifest
from .bound_folder import BoundFolder, NotShown, Wrong

TSA = "FEDVEIL_TSA"  # environment variable: address of an authority, which a server asks at the end of a run
SECONDS = 30.0  # for each step of the exchange with an authority
MAX_BYTES = 1 << 18  # of an answer; with a chain of certificates some have 8 kB


def stamp(folder: Path, url: str) -> datetime:
    """Ask an authority for a time stamp of a run's manifest, and write it into the run's folder.

    Only the hash of the manifest goes to the authority.

    Args:
      folder: of a closed run.
      url: of the authority, http or https.

    Returns:
      The time by the authority, which only a check against its certificate makes certain.

    Raises:
      Refusal: the extra is missing, the authority gives no stamp or one of another text, or it cannot be written.
    """
    require_extra("timestamps", "a time stamp")
    from rfc3161_client import HashAlgorithm, TimestampRequestBuilder, decode_timestamp_response

    if urlsplit(url).scheme not in ("http", "https"):
        raise Refusal("--tsa", url, "is not an address of http or https")
    manifest = read_manifest(folder).text.encode()
    request = TimestampRequestBuilder().data(manifest).hash_algorithm(HashAlgorithm.SHA256).build()
    try:
        http_request = Request(url, request.as_bytes(), {"Content-Type": "application/timestamp-query"})
        with urlopen(http_request, timeout=SECONDS) as reply:
            answer = reply.read(MAX_BYTES)
        response = decode_timestamp_response(answer)
        if response.status != 0:
            raise ValueError(f"status {response.status}: {', '.join(response.status_string)}")
        info = response.tst_info
        if info.message_imprint.message != request.message_imprint.message or info.nonce != request.nonce:
            raise ValueError("it stamps something else")
    except (URLError, http.client.HTTPException, OSError, ValueError) as problem:
        remedy = f"no time stamp was had ({problem}); the run stands without: fedveil report stamp {folder} asks again"
        raise Refusal("--tsa", url, remedy) from None
    with refusing("run", folder / TIME_STAMP, "cannot be written"):
        replace_file(folder / TIME_STAMP, answer, PUBLIC_MODE)
    return info.gen_time


def check_time_stamp(folder: BoundFolder) -> str:
    """Check the time stamp of a run's manifest against the certificates that the verifier trusts."""
    path, trusted = folder.path / TIME_STAMP, folder.knowledge.time_stamps
    if not path.exists():
        raise Wrong(f"{TIME_STAMP} is missing, and --tsa is given")
    if trusted is None:
        raise NotShown("give --tsa with the root certificate of its authority, to check it")
    if find_spec("rfc3161_client") is None:
        raise NotShown("rfc3161-client is not installed: pip install 'fedveil[timestamps]'")
    time = time_of_stamp(path.read_bytes(), folder.manifest.text.encode(), trusted)
    return f"{MANIFEST} was there at {time.isoformat(timespec='seconds')}, by an authority in {trusted}"


def time_of_stamp(answer: bytes, manifest: bytes, trusted: Path) -> datetime:
    """Return the time of a manifest's stamp.

    Args:
      answer: of the authority, in DER.
      manifest: the text under the stamp.
      trusted: file of certificates in PEM, with the root above the authority's own.

    Raises:
      Refusal: the stamp is of another text, or of an authority that none of them vouches for.
    """
    from rfc3161_client import VerificationError, VerifierBuilder, decode_timestamp_response

    try:
        roots = x509.load_pem_x509_certificates(read_file(trusted))
        response = decode_timestamp_response(answer[:MAX_BYTES])
        VerifierBuilder(roots=roots).build().verify_message(response, manifest)
    except (VerificationError, ValueError) as problem:
        vouched = "verifying certificates" not in str(problem)  # else OpenSSL's own words follow
        reason = str(problem) if vouched else f"no certificate in {trusted} vouches for its authority"
        raise Refusal("time stamp", TIME_STAMP, f"does not hold for {MANIFEST}: {reason}") from None
    return response.tst_info.gen_time
