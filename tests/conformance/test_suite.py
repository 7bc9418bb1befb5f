"""Every case passes over the reference picker, and fails over one with that behaviour broken."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import grpc
import pytest
from broken_pickers import BROKEN
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from reference_picker import Picker, in_process

from pointsman.conformance import suite
from pointsman.conformance.case import CASES

IMPATIENT_S = 0.5
"""Enough to see that an answer does not come."""


@pytest.fixture(scope="module")
def credentials() -> grpc.ServerCredentials:
    """Of a certificate signed by itself, as pickers make them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "a picker")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("10.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return grpc.ssl_server_credentials([(private, certificate.public_bytes(serialization.Encoding.PEM))])


async def test_reference_passes(tmp_path: Path, credentials: grpc.ServerCredentials) -> None:
    cases = suite.chosen(())
    results = await suite.run(cases, in_process(Picker, credentials), tmp_path)
    assert {r.case.id: r.reason for r in results if r.verdict == "fail"} == {}
    assert {r.case.id for r in results if r.verdict == "skip"} == {c.id for c in CASES.values() if c.skipped}


def test_every_case_has_a_broken_picker() -> None:
    suite.chosen(())
    assert set(BROKEN) == {case.id for case in CASES.values() if case.trial is not None}


LUCK = 4
"""A picker that draws lots is right now and then: of three endpoints three times in a row in one of 27
runs.
"""


@pytest.mark.parametrize("case_id", BROKEN)
async def test_fails_over_a_picker_without_it(
    case_id: str, tmp_path: Path, credentials: grpc.ServerCredentials
) -> None:
    cases = suite.chosen([case_id])
    for i, kind in enumerate(BROKEN[case_id]):
        launch = in_process(kind, credentials)
        for chance in range(LUCK):
            folder = tmp_path / f"{i}-{chance}"
            [result] = await suite.run(cases, launch, folder, patience_s=IMPATIENT_S)
            if result.verdict == "fail":
                break
        else:
            pytest.fail(f"passes over the broken picker {i}")
        print(f"{case_id}: {result.reason}")
