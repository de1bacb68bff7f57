import math

import pytest

from common.files import UserError
from training.settings import INF, choose_settings, make_parser, resumed_settings

TABLE = dict(  # a row of each type
    recipe=("default", None, "a row of RECIPES"),
    switch=(True, None, ""),
    count=(3, (1, INF), ""),
    rate=(0.5, (0.0, 1.0), ""),
    pace=(1.0, (0.0, INF), ""),
    name=("x", None, ""),
    kind=("a", ("a", "b"), ""),
    sizes=((16, 32), (1, INF), ""),
    files=((), None, ""),
)
RECIPES = dict(default={}, quick=dict(count=1, rate=0.25))


def parse(*flags):
    return vars(make_parser(TABLE, "a script").parse_args(flags))


def test_every_type_of_row_has_a_flag():
    flags = "--no-switch --count 5 --rate 1 --name y --kind b --sizes 4 8 --files a b".split()
    given = parse(*flags)
    row = dict(kind="b", sizes=[4, 8], files=["a", "b"])
    assert given == dict(switch=False, count=5, rate=1.0, name="y") | row
    assert type(given["rate"]) is float
    assert parse("--switch", "--files") == dict(switch=True, files=[])
    assert parse() == {}


def test_a_flag_that_cannot_be_read_is_one_line(capsys):
    for flags, words in ((["--sizes", "4"], "expected 2 arg"), (["--coun", "4"], "unrecognized")):
        with pytest.raises(SystemExit) as end:
            parse(*flags)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and words in line


WRONG = [
    ("count", 0, "give a whole number of at least 1"),
    ("count", 2.5, "give a whole number"),
    ("count", True, "give a whole number"),
    ("rate", -0.1, "give a number from 0.0 to 1.0"),
    ("rate", math.nan, "give a number from 0.0 to 1.0"),
    ("pace", math.inf, "give a number"),
    ("kind", "c", "give one of a, b"),
    ("switch", 1, "give True or False"),
    ("name", 3, "give text"),
    ("sizes", (4, 0), "give a tuple like (16, 32), each a whole number of at least 1"),
    ("sizes", 4, "give a tuple like (16, 32)"),
    ("files", "a", "give a tuple like (), each text"),
]


@pytest.mark.parametrize("name, value, words", WRONG)
def test_a_value_that_is_not_allowed_is_refused(name, value, words):
    for recipes, given in ((RECIPES, {name: value}), ({"default": {name: value}}, {})):
        with pytest.raises(UserError) as error:
            choose_settings(TABLE, recipes, given)
        assert str(error.value).startswith(f"--{name} {value!r}: {words}")


def test_an_edited_default_is_checked_as_well():
    with pytest.raises(UserError, match=r"^--count 0: give a whole number"):
        choose_settings(TABLE | dict(count=(0, *TABLE["count"][1:])), RECIPES, {})


def test_what_is_at_the_edge_of_its_range_is_allowed():
    given = dict(count=1, rate=1, sizes=[1, 1], kind="b", files=["a"])
    settings = choose_settings(TABLE, RECIPES, given)
    assert settings.count == 1 and settings.rate == 1 and settings.kind == "b"
    assert settings.sizes == (1, 1) and settings.files == ("a",)  # lists become tuples


def test_flags_go_before_the_recipe_and_it_before_defaults():
    settings = choose_settings(TABLE, RECIPES, dict(recipe="quick", rate=0.75))
    assert (settings.count, settings.rate, settings.sizes) == (1, 0.75, (16, 32))
    edited = TABLE | dict(recipe=("quick", None, "a row of RECIPES"))
    assert choose_settings(edited, RECIPES, {}).count == 1


def test_a_name_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="--recipe slow: give one of default, quick"):
        choose_settings(TABLE, RECIPES, dict(recipe="slow"))
    with pytest.raises(UserError, match="there is no setting coutn: correct the name"):
        choose_settings(TABLE, dict(default=dict(coutn=1)), {})


def test_a_resumed_run_keeps_its_settings():
    saved = vars(choose_settings(TABLE, RECIPES, dict(count=7, sizes=(4, 8))))
    # the first is as it was, the others may change
    given = dict(sizes=(4, 8), name="y", switch=False)
    resumed = resumed_settings(TABLE, saved, given, may_change=("name", "switch"))
    assert resumed == saved | dict(name="y", switch=False)
    with pytest.raises(UserError, match="the run to resume has --count 7: leave yours out"):
        resumed_settings(TABLE, saved, dict(count=8), may_change=("name",))


def test_a_run_of_a_table_with_other_rows_is_not_resumed():
    saved = vars(choose_settings(TABLE, RECIPES, {}))
    smaller = {name: row for name, row in TABLE.items() if name != "rate"}
    for table, name in ((TABLE | dict(more=(1, None, "")), "more"), (smaller, "rate")):
        with pytest.raises(UserError, match=f"had other settings .{name}.: start anew"):
            resumed_settings(table, saved, {}, may_change=())
