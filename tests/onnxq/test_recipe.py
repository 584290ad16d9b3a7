import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq import passes, recipe
from onnxq.errors import RecipeError, TargetError
from onnxq.pass_manager import Changes, PassManager
from onnxq.recipe import RECIPES, Recipe

TABLE = dict(passes.PASSES)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A pass with an option of each kind."""

    name: ClassVar[str] = "sample"

    text: str = "a"
    count: int = 1
    share: float = 0.5
    flag: bool = False
    method: Literal["minmax", "mse"] = "mse"
    globs: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    rank: int | None = 8
    label: str | None = None
    mixed: Literal["auto"] | float = "auto"

    def __post_init__(self):
        if self.count < 0:
            raise RecipeError("count is negative", where="count", fix="give 0 or more")
        if self.text == "target":
            raise TargetError("no such target")

    def apply(self, model, ctx):
        return Changes()


@dataclass(frozen=True, kw_only=True)
class Needy:
    """A pass with an option that has no default."""

    name: ClassVar[str] = "needy"

    path: str

    def apply(self, model, ctx):
        return Changes()


@pytest.fixture(autouse=True, scope="module")
def known():
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Sample, Needy):
            patch.setitem(passes.PASSES, kind.name, f"{__name__}:{kind.__name__}")
        yield


def parse(options="", name="sample"):
    return recipe.loads(f'[[pass]]\nname = "{name}"\n{options}', where="r.toml").passes[0]


# ------------------------------------------------------------------------------- reading


def test_whole_recipe():
    text = """
        name = "mine"
        description = "for tests"
        target = "ort-cpu"
        [[pass]]
        name = "needy"
        path = "e.json"
        [[pass]]
        name = "sample"
        count = 2
    """
    found = recipe.loads(text)
    steps = (Needy(path="e.json"), Sample(count=2))
    assert found == Recipe(name="mine", description="for tests", target="ort-cpu", passes=steps)
    assert found.manager() == PassManager(*steps)


def test_manager_hands_its_hook_on():
    def hook(step, model, changes):
        pass

    assert Recipe(passes=()).manager(hook).after is hook


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ('text = "b"', "text", "b"),
        ("count = 3", "count", 3),
        ("share = 0.25", "share", 0.25),
        ("share = 2", "share", 2.0),
        ("share = -inf", "share", -math.inf),
        ("flag = true", "flag", True),
        ('method = "minmax"', "method", "minmax"),
        ('globs = ["a", "b*"]', "globs", ("a", "b*")),
        ("globs = []", "globs", ()),
        ("pair = [3, 4]", "pair", (3, 4.0)),
        ("limit = 3", "limit", 3),
        ('limit = "none"', "limit", None),
        ('rank = "none"', "rank", None),
        ('label = "none"', "label", "none"),
        ('mixed = "auto"', "mixed", "auto"),
        ("mixed = 1", "mixed", 1.0),
    ],
)
def test_options(text, option, value):
    found = getattr(parse(text), option)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("text = 1", "text: wanted text, got 1"),
        ('count = "3"', "count: wanted an integer, got '3'"),
        ("count = 3.0", r"count: wanted an integer, got 3\.0"),
        ("count = true", "count: wanted an integer, got True"),
        ("share = true", "share: wanted a number, got True"),
        (f"share = 1{'0' * 400}", r"share: wanted a number, got 1000.*\.\.\."),
        ("flag = 1", "flag: wanted true or false, got 1"),
        ('method = "mes"', "method: wanted one of minmax, mse, got 'mes'.*did you mean mse"),
        ('method = ["mse"]', "method: wanted one of minmax, mse"),
        ('method = "entropy"', r"got 'entropy' \(pass 1 \(sample\) of r\.toml\)$"),
        ('globs = "a"', "globs: wanted a list, each text, got 'a'"),
        ("globs = [1]", r"globs: wanted a list, each text, got \[1\]"),
        ("pair = [1]", "pair: wanted a list of an integer, a number"),
        ("limit = 0.5", "limit: wanted an integer or none, got 0.5"),
        ('limit = "all"', "limit: wanted an integer or none, got 'all'"),
        ('mixed = "aut"', "mixed: wanted one of auto or a number.*did you mean auto"),
        ("date = 2020-01-01", "sample has no option 'date'"),
        ("text = 2020-01-01", r"wanted text, got datetime\.date"),
        ("cuont = 3", "sample has no option 'cuont'.*did you mean count"),
        ("zzzzzz = 3", "options are text, count"),
        (
            "count = -1",
            r"count is negative \(count, pass 1 \(sample\) of r\.toml\); give 0 or more",
        ),
    ],
)
def test_option_errors(text, match):
    with pytest.raises(RecipeError, match=match):
        parse(text)


def test_other_errors_of_a_pass_keep_their_kind():
    with pytest.raises(TargetError, match=r"no such target \(pass 1 \(sample\) of r\.toml\)"):
        parse('text = "target"')


def test_an_option_without_a_default_is_needed():
    with pytest.raises(RecipeError, match=r"path is missing \(pass 1 \(needy\) of r\.toml\)"):
        parse(name="needy")


def test_a_pass_without_options_says_so():
    with pytest.raises(RecipeError, match=r"clean has no option 'weights'.*it takes none"):
        parse('weights = "int8"', name="clean")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name = \n", r"not TOML: .*line 1.*\(r\.toml\)"),
        ('name = "a"\nname = "b"\n', "not TOML: .*line 2"),
        (f"x = {'[' * 100_000}", "not TOML"),
        ("", "names no passes.*write \\[\\[pass\\]\\]"),
        ("pass = []", "names no passes"),
        ("[pass]\nname = 'clean'", "names no passes"),
        ("pass = ['clean']", "names no passes"),
        ("[[passes]]\nname = 'clean'", "no key 'passes'.*did you mean pass"),
        ("zzz = 1", "no key 'zzz'.*keys are name, description, target, pass"),
        ("name = 1", "name: wanted text, got 1"),
        ("description = true", "description: wanted text, got True"),
        ("target = []", r"target: wanted text, got \[\]"),
        ("target = 'ort-cpo'", "no target 'ort-cpo'.*did you mean ort-cpu"),
        ("target = 'zzz'", "no target 'zzz'.*targets are ort-cpu"),
        ("[[pass]]", r"wanted the name of a pass, got nothing \(pass 1 of r\.toml\)"),
        ("[[pass]]\nname = 3", "wanted the name of a pass, got 3"),
        ("[[pass]]\nname = 'clena'", r"no pass 'clena' \(pass 1 \(clena\).*did you mean clean"),
        ("[[pass]]\nname = 'zzz'", "no pass 'zzz'.*passes are clean"),
        ("[[pass]]\nname = 'sample'\n[[pass]]\nname = 'sampel'", r"\(pass 2 \(sampel\)"),
    ],
)
def test_document_errors(text, match):
    with pytest.raises(RecipeError, match=match):
        recipe.loads(text, where="r.toml")


# ------------------------------------------------------------------------------- files and names


def test_load_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes('description = "größer"\r\n[[pass]]\r\nname = "sample"\r\n'.encode())
    for source in (path, str(path)):
        assert recipe.load(source) == Recipe(description="größer", passes=(Sample(),))


def test_load_errors(tmp_path):
    with pytest.raises(RecipeError, match=r"no such file.*missing\.toml"):
        recipe.load(tmp_path / "missing.toml")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe.load(tmp_path)
    with pytest.raises(RecipeError, match=r"no recipe 'defualt'; did you mean default\?$"):
        recipe.load("defualt")
    with pytest.raises(
        RecipeError,
        match="no recipe 'zzz'; recipes are default, accurate, per-tensor, data-free, weight-only",
    ):
        recipe.load("zzz")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe4"')
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        recipe.load(tmp_path / "latin.toml")
    (tmp_path / "wrong.toml").write_text("[[pass]]\nname = 'sample'\ncount = 'x'")
    with pytest.raises(RecipeError, match=r"\(pass 1 \(sample\) of .*wrong\.toml\)"):
        recipe.load(tmp_path / "wrong.toml")


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes(name):
    found = recipe.load(name)
    assert found.name == name
    assert found.description
    steps = [step.name for step in found.passes if step.name != "space-to-depth"]
    assert steps[:2] == ["clean", "fold-batch-norm"]
    assert steps[-1] == "insert-qdq"
    assert recipe.loads(recipe.dumps(found)) == found


def test_minmax_is_the_plain_scheme():
    default, minmax = (recipe.load(name).passes for name in ("default", "minmax"))
    [calibrate] = [step for step in default if step.name == "calibrate"]
    assert minmax[2] == dataclasses.replace(calibrate, method="minmax") != calibrate
    assert set(minmax) - {minmax[2]} < set(default)


# ------------------------------------------------------------------------------- writing

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
samples = st.builds(
    Sample,
    text=texts.filter(lambda t: t != "target"),
    count=st.integers(0),
    share=st.floats(allow_nan=False),
    flag=st.booleans(),
    method=st.sampled_from(["minmax", "mse"]),
    globs=st.lists(texts, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), st.floats(allow_nan=False)),
    limit=st.none() | st.integers(),
    rank=st.none() | st.integers(),
    label=st.none() | texts,
    mixed=st.just("auto") | st.floats(allow_nan=False),
)


@given(
    st.builds(
        Recipe,
        name=texts,
        description=texts,
        target=st.sampled_from([None, "ort-cpu"]),
        passes=st.lists(samples | st.builds(Needy, path=texts), min_size=1, max_size=3).map(tuple),
    )
)
def test_round_trip(given_recipe):
    text = recipe.dumps(given_recipe)
    assert recipe.loads(text) == given_recipe
    assert recipe.dumps(recipe.loads(text)) == text


def test_every_option_is_written():
    assert recipe.dumps(Recipe(name="n", passes=(Sample(rank=None),))) == (
        'name = "n"\n'
        "\n"
        "[[pass]]\n"
        'name = "sample"\n'
        'text = "a"\n'
        "count = 1\n"
        "share = 0.5\n"
        "flag = false\n"
        'method = "mse"\n'
        "globs = []\n"
        "pair = [1, 2.0]\n"
        'rank = "none"\n'
        'mixed = "auto"\n'
    )


def test_what_toml_cannot_say():
    with pytest.raises(RecipeError, match=r"TOML cannot say .* \(text of pass 1 \(sample\)\)"):
        recipe.dumps(Recipe(passes=(Sample(text=object()),)))
    with pytest.raises(RecipeError, match="TOML cannot say None"):
        recipe.dumps(Recipe(passes=(Sample(text=None),)))
    with pytest.raises(RecipeError, match="no pass 'pass-manager'"):
        recipe.dumps(Recipe(passes=(PassManager(),)))

    class Impostor(Sample):
        """Not the pass that the name stands for."""

    with pytest.raises(RecipeError, match="Impostor is not the pass of that name"):
        recipe.dumps(Recipe(passes=(Impostor(),)))


# ------------------------------------------------------------------------------- table of passes


@pytest.mark.parametrize("name", TABLE)
def test_passes_are_what_the_table_says(name):
    kind = recipe.pass_class(name)
    assert kind.name == name
    assert callable(kind.apply)
    assert kind.__dataclass_params__.frozen
    assert getattr(passes, kind.__name__) is kind
    assert kind.__name__ in passes.__all__
    assert kind.__name__ in dir(passes)


def test_all_names_the_table_and_its_passes():
    classes = {path.partition(":")[2] for path in TABLE.values()}
    assert set(passes.__all__) == {"PASSES", *classes}
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = passes.Nothing
