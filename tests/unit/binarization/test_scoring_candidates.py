"""What the benchmark measures beside the product's ways computes the same."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.binarization import Binarizer
from pipeline.binarization.scoring import expand_queries
from tests.benchmarks.scoring_candidates import BitPlanes, Int8Tiles, uncorrected_fast_scan, unpacked_products
from tests.unit.binarization.cases import BINARIZERS, plain_scores, random_codes


@settings(max_examples=40)
@given(binarizer=BINARIZERS, num_codes=st.integers(1, 300), seed=st.integers(0, 99))
def test_every_candidate_computes_the_plain_products(binarizer: Binarizer, num_codes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rotated = rng.standard_normal((3, binarizer.levels[0])).astype(np.float32)
    codes = random_codes(binarizer, num_codes, rng)
    bare = codes._replace(factor=np.ones(num_codes, np.float16), offset=np.zeros(num_codes, np.float16))
    plain, symmetric = (plain_scores(binarizer, rotated, bare, mode) for mode in ("asymmetric", "symmetric"))
    # What a product can reach, which the steps of quantized queries and tables are a share of.
    reach = np.abs(expand_queries(binarizer, rotated)).sum(axis=1).max()
    float32 = 1e-5 * max(reach, np.abs(symmetric).max())
    np.testing.assert_allclose(unpacked_products(binarizer, rotated, codes.code), plain, atol=float32)
    popcounts = BitPlanes.of(binarizer, codes.code).products(rotated)
    np.testing.assert_allclose(popcounts, symmetric, atol=float32)
    # Both factors in steps of 1/127 of their largest: at most half a step of each for every dimension.
    np.testing.assert_allclose(Int8Tiles(binarizer, bare).products(rotated, 0), plain, atol=0.05 * reach)
    found, rows = uncorrected_fast_scan(codes.code).search(
        expand_queries(binarizer, rotated), min(10, num_codes)
    )
    ranked = np.take_along_axis(plain, np.maximum(rows, 0), axis=1)
    # Tables of 255 steps, of the widest nibble's range, for every nibble.
    np.testing.assert_allclose(found[rows >= 0], ranked[rows >= 0], atol=0.05 * reach)
