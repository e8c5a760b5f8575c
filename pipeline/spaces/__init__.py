"""Which vectors may be compared: encoder fingerprints."""

from pipeline.spaces.fingerprint import (
    GIVEN_MODEL,
    EncoderIdentity,
    check_same_space,
    given_identity,
    hashing_identity,
    identify_folder,
)

__all__ = [
    "GIVEN_MODEL",
    "EncoderIdentity",
    "check_same_space",
    "given_identity",
    "hashing_identity",
    "identify_folder",
]
