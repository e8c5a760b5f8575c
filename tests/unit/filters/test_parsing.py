import pickle
import subprocess
import sys

import pyarrow as pa
import pytest

from pipeline.errors import FilterError
from pipeline.filters import Comparison, Conjunction, Truth, parse_filter

ATTRIBUTES = pa.schema(
    {
        "year": pa.int64(),
        "score": pa.float64(),
        "section": pa.string(),
        "public": pa.bool_(),
        "published": pa.timestamp("us", tz="UTC"),
        "tags": pa.list_(pa.string()),
        "blob": pa.binary(),
        'odd "name"': pa.int32(),
    }
)


def canonical(text: str) -> str:
    return parse_filter(text, ATTRIBUTES).text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("year>2020 and public", "  year\n> 2020 AND public"),
        ("5 < year", "year > 5"),
        ("year != 5", "year <> 5"),
        ("year BETWEEN 1 AND 3", "year <= 3 and year >= 1"),
        ("year NOT BETWEEN 1 AND 3", "year > 3 or year < 1"),
        ("section IN ('b', 'a', 'b')", "section in ('a','b')"),
        ("section IN ('a')", "section = 'a'"),
        ("section = 'a' OR section = 'b'", "section IN ('b', 'a')"),
        ("section NOT IN ('a', 'b')", "section <> 'b' AND NOT section = 'a'"),
        ("NOT NOT public", "public"),
        ("public <> TRUE", "NOT public"),
        ("year = 1 AND (public AND section = 'a')", "(section = 'a' AND year = 1) AND public"),
        ("NOT (year = 1 OR public)", "year <> 1 AND NOT public"),
        ("year IS NOT NULL", "NOT year IS NULL"),
        ("year < 2.5", "year <= 2"),
        ("year = 2.0", "2 = year"),
        ("score = -0.0", "score = 0"),
        ("published >= '2024-01-01'", "published >= TIMESTAMP '2024-01-01 00:00:00'"),
        ("published >= DATE '2024-01-01'", "published >= TIMESTAMPTZ '2024-01-01 02:00:00+02:00'"),
        ("public AND TRUE", "public OR FALSE"),
        ("year = 1 AND year = 1", "(((year = 1))) -- once"),
        ("year = NULL", "NULL"),
    ],
)
def test_filters_that_differ_trivially_have_one_text(text, same):
    assert canonical(text) == canonical(same)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("year < 2", "year <= 2"),
        ("section = 'a'", "section = 'A'"),
        ("section = 'a'", "section = ' a'"),
        ("year IN (1, NULL)", "year IN (1)"),
        ("year = 9007199254740992", "year = 9007199254740993"),
        ("(public OR year = 1) AND score > 0", "public OR (year = 1 AND score > 0)"),
    ],
)
def test_filters_that_mean_different_things_have_different_texts(text, other):
    assert canonical(text) != canonical(other)


def test_the_canonical_text_is_plain_sql():
    text = canonical(
        "not (section in ('it''s', 'b') or list_contains(tags, 'x')) and published < '2024-01-31T10:00Z'"
    )
    assert text == (
        "\"published\" < '2024-01-31 10:00:00+00:00' AND \"section\" NOT IN ('b', 'it''s')"
        " AND NOT list_contains(\"tags\", 'x')"
    )


def test_a_filter_tells_the_columns_it_reads():
    assert parse_filter("year > 1 AND (public OR year = 0)", ATTRIBUTES).columns == ("public", "year")


def test_a_test_that_cannot_matter_is_folded_away():
    parsed = parse_filter("public OR (year > 1 OR TRUE)", ATTRIBUTES)
    assert (parsed.predicate, parsed.columns) == (Truth(value=True), ())


def test_the_predicate_is_in_negation_normal_form():
    parsed = parse_filter("NOT (year < 5 OR public)", ATTRIBUTES)
    assert parsed.predicate == Conjunction((Comparison("public", "=", False), Comparison("year", ">=", 5)))


def test_a_quoted_name_may_hold_anything():
    assert parse_filter('"odd ""name""" = 1', ATTRIBUTES).columns == ('odd "name"',)


def test_a_filter_crosses_processes():
    parsed = parse_filter("year > 1 AND NOT list_contains(tags, 'x')", ATTRIBUTES)
    assert pickle.loads(pickle.dumps(parsed)) == parsed


def test_a_long_list_and_a_long_chain_are_read():
    chain = " OR ".join(f"year > {year}" for year in range(3000))
    assert canonical(f"year IN ({', '.join(map(str, range(3000)))})").count(",") == 2999
    assert canonical(chain).count(" OR ") == 2999


def test_an_import_of_the_package_leaves_sqlglot_alone():
    loaded = "import sys, pipeline.filters; print('sqlglot' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def refusal(text: str, attributes: pa.Schema = ATTRIBUTES) -> FilterError:
    with pytest.raises(FilterError) as caught:
        parse_filter(text, attributes)
    return caught.value


def test_an_unknown_column_is_named_with_the_nearest_and_all_known_ones():
    error = refusal("Yaer > 2020", pa.schema({"year": pa.int64(), "section": pa.string()}))
    assert str(error) == (
        'filter "Yaer > 2020": unknown column Yaer, nearest known column year; '
        "known columns: year int, section string"
    )


def test_names_are_case_sensitive_and_the_right_case_is_offered():
    assert refusal("YEAR = 1").problem == "unknown column YEAR, nearest known column year"


def test_a_schema_without_attributes_says_so():
    assert refusal("year = 1", pa.schema({})).remedy == "known columns: none"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("year = 'abc'", "column year has type int and cannot be compared with 'abc'"),
        ("year IN (1, 'abc')", "column year has type int and cannot be compared with 'abc'"),
        ("year BETWEEN 1 AND TRUE", "column year has type int and cannot be compared with TRUE"),
        ("section < 5", "column section has type string and cannot be compared with 5"),
        (
            "section = DATE '2024-01-31'",
            "column section has type string and cannot be compared with DATE '2024-01-31'",
        ),
        ("score = 'nan'", "column score has type float and cannot be compared with 'nan'"),
        ("public = 1", "column public has type bool and cannot be compared with 1"),
        ("published > 2020", "column published has type timestamp and cannot be compared with 2020"),
        ("published > 'soon'", "column published has type timestamp and cannot be compared with 'soon'"),
        (
            "published > '2023-02-29'",
            "column published has type timestamp and cannot be compared with '2023-02-29'",
        ),
        ("tags = 'x'", "column tags has type list<string> and cannot be compared with 'x'"),
        ("tags = NULL", "column tags has type list<string> and cannot be compared with NULL"),
        ("tags IN ('x')", "column tags has type list<string> and cannot be compared with 'x'"),
        ("list_contains(tags, 1)", "column tags has type list<string> and cannot be compared with 1"),
        ("list_contains(section, 'x')", "column section has type string, list_contains needs a list<string>"),
        ("blob = 'x'", "column blob has type binary and cannot be compared with 'x'"),
        ("year AND public", "column year has type int and is no condition by itself"),
        ("FALSE AND year = 'abc'", "column year has type int and cannot be compared with 'abc'"),
    ],
)
def test_a_literal_of_another_kind_is_refused_with_column_type_and_literal(text, problem):
    assert refusal(text).problem == problem


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("lower(section) = 'a'", "expected a column, found LOWER(section)"),
        ("year + 1 = 2", "expected a column, found year + 1"),
        ("-year = 2", "expected a column, found -year"),
        ("1 = 1", "expected a column, found 1"),
        ("t.year = 1", "expected a column, found t.year"),
        ("(year = 1) IS NULL", "expected a column, found year = 1"),
        ("list_contains('x', tags)", "expected a column, found 'x'"),
        ("year = score", "expected a literal (a string takes single quotes), found score"),
        ('section = "a"', 'expected a literal (a string takes single quotes), found "a"'),
        ("year = 1 + 1", "expected a literal, found 1 + 1"),
        ("year = ?", "expected a literal, found ?"),
        ("public = NOT public", "expected a literal, found NOT public"),
        (
            "published = TRY_CAST('2024-01-31' AS DATE)",
            "expected a literal, found TRY_CAST('2024-01-31' AS DATE)",
        ),
        ("year = - 'x'", "expected a number after -, found -'x'"),
        ("year = 1e", "expected a number, found 1e"),
        ("section LIKE 'a%'", "expected a condition, found section LIKE 'a%'"),
        ("year IS DISTINCT FROM 1", "expected a condition, found year IS DISTINCT FROM 1"),
        ("EXISTS (SELECT 1)", "expected a condition, found EXISTS(SELECT 1)"),
        ("year IN (SELECT 1)", "expected literals only, found year IN (SELECT 1)"),
        ("list_contains(tags, 'a', 'b')", "expected literals only, found ARRAY_CONTAINS(tags, 'a')"),
        ("year IN ()", "expected at least one literal after IN, found year IN ()"),
        ("public IS TRUE", "expected NULL or NOT NULL after IS, found public IS TRUE"),
    ],
)
def test_what_is_not_supported_is_refused_with_what_is(text, found):
    error = refusal(text)
    assert error.problem == found
    assert "supported are = <> < <= > >= IN" in error.remedy


@pytest.mark.parametrize(
    "literal", ["year BETWEEN SYMMETRIC 3 AND 1", "published = TIMESTAMP(3) '2024-01-31'"]
)
def test_variants_of_supported_words_are_refused(literal):
    assert "supported are" in refusal(literal).remedy


@pytest.mark.parametrize(
    "text", ["published = DATE '2024-01-31 10:00:00'", "published = TIMESTAMP '2024-01-31 10:00:00+02'"]
)
def test_a_literal_of_which_engines_drop_a_part_is_refused(text):
    assert "without a" in refusal(text).problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected one condition, found an empty text"),
        ("-- nothing", "expected one condition, found an empty text"),
        ("public; public", "expected one condition, found 2 separated by semicolons"),
        ("SELECT 1", "not a SQL condition: Invalid expression / Unexpected token near 'SELECT', character 6"),
        (
            "public; DROP TABLE x",
            "not a SQL condition: Invalid expression / Unexpected token near 'DROP', character 12",
        ),
        ("year =", "not a SQL condition: something is missing near '=', character 6"),
        ("(year = 1", "not a SQL condition: Expecting ) near '1', character 9"),
        ("section = 'a", "not a SQL condition: Error tokenizing 'section = ''"),
        (
            "public = TRUE AS x",
            "not a SQL condition: Invalid expression / Unexpected token near 'AS', character 16",
        ),
    ],
)
def test_what_is_no_single_condition_is_refused(text, problem):
    assert refusal(text).problem == problem


def test_nesting_without_end_is_refused_like_any_other_error():
    assert refusal("(" * 5000 + "public" + ")" * 5000).problem == "nested too deeply"


def test_an_error_shows_the_start_of_a_very_long_filter():
    assert len(refusal(f"year IN ({', '.join(['1'] * 9999)}, 'x')").place) < 250
