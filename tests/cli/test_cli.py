"""The command line: what a user types, what comes back, and what bad input looks like."""

import importlib.util
import json
import subprocess
import sys

import pytest

import crosslight
from crosslight import cli, registry
from crosslight.cli import checkout
from crosslight.cli.index import write
from crosslight.cli.show import address
from crosslight.errors import CrosslightError


@pytest.fixture(scope="module")
def index_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "index.json"
    write(None, path)
    return path


@pytest.fixture
def run(index_file, monkeypatch, capsys):
    """``run("list", "--json")`` -> (exit code, stdout, stderr), with an index of all cards."""
    monkeypatch.setattr(registry, "INDEX", index_file)
    registry.index.cache_clear()

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["crosslight", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    yield call
    registry.index.cache_clear()


def test_list_json_is_one_array_of_cards(run):
    code, out, _ = run("list", "--json")
    cards = json.loads(out)
    assert code == 0
    assert {"softmax", "moba", "eca"} <= {c["id"] for c in cards}
    wanted = {"id", "kind", "group", "title", "year", "paper", "patterns", "cost", "status"}
    assert all(wanted <= set(card) for card in cards)
    assert next(c for c in cards if c["id"] == "softmax")["status"] == "baseline"


def test_list_filters(run):
    cards = json.loads(run("list", "--kind", "token", "--pattern", "causal-self", "--cost", "n log n", "--json")[1])
    ids = {c["id"] for c in cards}
    assert "lightning-attention" in ids
    assert "softmax" not in ids, "its cost is n^2"
    assert {c["kind"] for c in cards} == {"token"}


@pytest.mark.parametrize("width", ["60", "100", "200"])
def test_tables_keep_ids_whole(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    out = run("list")[1]
    assert all(id in out for id in registry.ids())
    assert f"of {len(registry.ids())} cards" in out


def test_find_holds_every_word(run):
    ids = {c["id"] for c in json.loads(run("find", "block", "softmax", "--json")[1])}
    assert all(
        "block" in (t := f"{c.id} {c.title} {c.summary}".lower()) and "softmax" in t for c in map(registry.card, ids)
    )
    assert run("find", "unheardof")[0] == 1


def test_find_says_which_word_is_too_much(run):
    code, out, _ = run("find", "softmax", "unheardof")
    assert code == 1
    count = len(json.loads(run("find", "softmax", "--json")[1]))
    assert f"'softmax' {count}, 'unheardof' 0" in out
    assert json.loads(run("find", "unheardof", "--json")[1]) == []


def test_list_by_what_decoding_carries(run):
    cards = json.loads(run("list", "--decode", "state", "--pattern", "causal-self", "--json")[1])
    assert "lightning-attention" in {c["id"] for c in cards}
    assert {c["decode"] for c in cards} == {"state"}


def test_only_references_become_links():
    assert address("unpublished") == "unpublished"
    assert address("2409.04431").endswith("arxiv.org/abs/2409.04431")
    assert address("cs/0101001").endswith("arxiv.org/abs/cs/0101001")


def test_show_has_equations_options_and_evidence(run):
    out = run("show", "sigmoid-attention")[1]
    for part in ("sigmoid(q_i . k_j", "arxiv.org/abs/2409.04431", "score_bias=None", "claim", "unverified"):
        assert part in out
    card = json.loads(run("show", "sigmoid-attention", "--json")[1])
    assert card["options"]["dim"] is None, "has no default"
    assert card["options"]["heads"] == "8"
    assert card["doc"].startswith("Sigmoid attention")


def test_near_names(run):
    code, out, err = run("show", "sotfmax")
    assert (code, out) == (2, "")
    assert err.startswith("error: id: got 'sotfmax'")
    assert "softmax" in err
    assert err.count("\n") == 1, "one line"
    code, _, err = run("lst")
    assert code == 2
    assert "'list'" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("list", "--kind", "tokens"), "kind: got 'tokens'"),
        (("list", "--pattern", "self"), "pattern: got 'self'"),
        (("list", "--cost", "n^9"), "cost: got 'n^9'"),
        (("list", "--group", "linear-kernel"), "group: got 'linear-kernel', expected one of"),
        (("find", "softmax", "--decode", "keys"), "decode: got 'keys', expected one of kv"),
        (("bench", "softmax", "--lengths", "4x"), "--lengths: got '4x'"),
        (("bench", "softmax", "--mask", "open"), "mask: got 'open'"),
        (("bench", "softmax", "--heads", "3", "--dim", "16"), "dim: got 16"),
        (("bench", "softmax", "--dtype", "int4"), "dtype: got 'int4'"),
        (("bench", "softmax", "--chart", "x.png"), "--chart: got x.png"),
        (("bench", "softmax", "--json", "no/such/folder.json"), "file: got no/such/folder.json"),
        (("bench", "sotfmax"), "id: got 'sotfmax'"),
        (("bench", "slot-attention", "--pattern", "causal-self"), "pattern: slot-attention has no causal-self"),
        (("new", "My_Attention"), "id: got 'My_Attention'"),
        (("new", "softmax"), "id: got 'softmax'"),
        (("new", "mine", "--kind", "survey"), "--kind: got 'survey'"),
        (("new", "mine", "--root", "no/such/folder"), "--root: got no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, says):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {says}")
    assert err.count("\n") == 1
    assert "expected" in err or "has no" in err


def test_version(run):
    assert run("--version")[1] == f"crosslight {crosslight.__version__}\n"


def test_listing_imports_no_torch():
    code = (
        "import sys; from crosslight.cli import main; sys.argv = ['crosslight', 'list', '--json']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_python_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "crosslight", "show", "nothing-like-it"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: id: got")


def test_bench_writes_figures_and_chart(run, tmp_path):
    pytest.importorskip("jinja2")
    figures, chart = tmp_path / "bench.json", tmp_path / "bench.html"
    code, out, _ = run(
        *("bench", "softmax", "mega:ema_dim=4", "--lengths", "16,32", "--dim", "16", "--heads", "2", "--rounds", "1"),
        *("--json", str(figures), "--chart", str(chart), "--against", "sdpa"),
    )
    assert code == 0
    found = json.loads(figures.read_text())
    assert {(m["entrant"], m["length"]) for m in found["measurements"]} == {
        (e, n) for e in ("softmax", "mega(ema_dim=4)", "sdpa") for n in (16, 32)
    }
    assert found["setting"]["pattern"] == "causal-self"
    assert {s["entrant"] for s in found["summary"]} == {"softmax", "mega(ema_dim=4)", "sdpa"}
    assert "peak memory" in out
    assert "mega(ema_dim=4)" in chart.read_text()


def test_index_is_what_the_cards_say(index_file, tmp_path):
    found = json.loads(index_file.read_text())
    assert found == registry.build_index(None)
    assert list(index_file.parent.iterdir()) == [index_file], "nothing is left beside it"
    results = tmp_path / "results.jsonl"
    results.write_text(
        json.dumps({"id": "moba", "holds": False}) + "\n" + json.dumps({"id": "moba", "holds": True}) + "\n"
    )
    write(results, tmp_path / "index.json")
    assert json.loads((tmp_path / "index.json").read_text())["moba"]["status"] == "reproduced", "the last line stands"


def test_checkout_is_this_repository():
    assert (checkout.root() / "src" / "crosslight").is_dir()


@pytest.fixture
def skeleton(run, tmp_path):
    """A new row in a checkout of its own, and its module imported."""
    (tmp_path / "src/crosslight").mkdir(parents=True)
    code, out, err = run(
        "new", "my-attention", "--root", str(tmp_path), "--title", 'Attention, "mine"', "--year", "2031"
    )
    assert code == 0, err
    path = tmp_path / "src/crosslight/attention/my_attention.py"
    assert "src/crosslight/attention/my_attention.py" in out
    spec = importlib.util.spec_from_file_location("crosslight.attention.my_attention", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    registry._registered.pop("my-attention")
    del sys.modules[spec.name]


def test_a_new_row_conforms_as_it_is(skeleton, tmp_path):
    card = crosslight.card("my-attention")
    assert (card.title, card.year) == ('Attention, "mine"', 2031)
    crosslight.testing.check("my-attention")
    test = (tmp_path / "tests/attention/test_my_attention.py").read_text()
    space = {}
    exec(compile(test, "test_my_attention.py", "exec"), space)
    space["test_equals_its_equations"]()


def test_a_new_row_overwrites_nothing(skeleton, run, tmp_path):
    before = (tmp_path / "src/crosslight/attention/my_attention.py").read_text()
    registry._registered.pop("my-attention")
    code, _, err = run("new", "my-attention", "--root", str(tmp_path))
    assert code == 2
    assert "does not exist" in err
    assert (tmp_path / "src/crosslight/attention/my_attention.py").read_text() == before
    registry.register(skeleton.CARD)(skeleton.MyAttention)


def test_an_installed_package_is_no_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(crosslight, "__file__", str(tmp_path / "site-packages" / "crosslight" / "__init__.py"))
    with pytest.raises(CrosslightError, match="checkout"):
        checkout.root()
