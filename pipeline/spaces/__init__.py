"""Which vectors may be compared: encoder fingerprints."""

from pipeline.spaces.fingerprint import (
    EncoderIdentity,
    check_same_space,
    given_identity,
    hashing_identity,
    identify_folder,
)

__all__ = ["EncoderIdentity", "check_same_space", "given_identity", "hashing_identity", "identify_folder"]
