"""The page of a plan: what is on it, that it says what the plan says, and what it does in a browser."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.models import CASES
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import Placement, Replicate, Shard
from tp_planner.ir.step import NO_STEP, Collective, Memory, MemoryUse, Step
from tp_planner.planner import make_plan
from tp_planner.readable_plan import Plan
from tp_planner.report.drawing import draw_tensor
from tp_planner.report.html import plan_to_html
from tp_planner.report.markup import element
from tp_planner.report.outline import Node, outline, walk
from tp_planner.report.rows import layer_rows

HOSTILE = '</script></style><script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>"\'&'
KNOWN = Step(
    "adam",
    "mean_squared_error",
    Memory(MemoryUse(1, 2, 3, 4, 5), MemoryUse(1000, 2000, 3000, 4000, 5000), "backward"),
    (),
)
VOID = {"meta", "input"}


@cache
def plan_case(name: str, parts: int = 2, **options: int) -> Plan:
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in CASES[name].rules.items())
    return make_plan(CASES[name].build(**options), Layout(Mesh((("model", parts),)), rules))


def with_blocks(blocks: int, differ: bool = False) -> Plan:
    """Return the plan of a GPT with that many blocks, which are equal unless they ``differ``."""
    data = json.loads(plan_case("gpt", blocks=1).to_json())
    for key in ("layers", "variables", "collectives"):
        texts = [json.dumps(item) for item in data[key]]
        first = min(n for n, text in enumerate(texts) if "block_0" in text)
        inside = [text for text in texts if "block_0" in text]
        around = [json.loads(text) for text in texts if "block_0" not in text]
        copies = [
            json.loads(text.replace("block_0", f"block_{n}").replace("float32", f"float{n}" if differ else "float32"))
            for n in range(blocks)
            for text in inside
        ]
        data[key] = [*around[:first], *copies, *around[first:]]
    return Plan.from_json(json.dumps(data))


def hostile(plan: Plan) -> Plan:
    """Return the plan with a hostile text in every text that a model or a layout brings."""
    name = json.dumps(HOSTILE)[1:-1]
    text = plan.to_json()
    for word in ("block_0", "token_embedding", "LayerNormalization", "/kernel", "is sharded", "float32"):
        text = text.replace(word, f"{word}{name}")
    return replace(
        Plan.from_json(text), model=HOSTILE, notes=(HOSTILE,), step=replace(KNOWN, optimizer=HOSTILE, loss=HOSTILE)
    )


class Element:
    """One element of a page."""

    def __init__(self, name: str, attributes: dict[str, str | None]) -> None:
        self.name = name
        self.attributes = attributes
        self.children: list[Element | str] = []

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, name: str = "", **attributes: str) -> list[Element]:
        """Return the elements of that name that have these words among their attributes."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [
            each
            for each in self.walk()
            if name in ("", each.name)
            and all(value in (each.attributes.get(key) or "").split() for key, value in wanted.items())
        ]

    @property
    def values(self) -> list[int]:
        """The exact numbers inside."""
        return [int(each.attributes["value"] or "") for each in self.all("data")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        opened = Element(tag, dict(attrs))
        self.open[-1].children.append(opened)
        if tag not in VOID:
            self.open.append(opened)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(page: str) -> Element:
    """Return the page as elements; every element of it is closed where it has to be."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1
    return reader.open[0]


def page_of(plan: Plan) -> Element:
    return read(plan_to_html(plan))


def section(page: Element, id: str) -> Element:
    return page.all("section", id=id)[0]


# The page says what the plan says


@pytest.mark.parametrize("name", ["gpt", "llama", "tied"])
def test_numbers_are_those_of_the_plan(name: str) -> None:
    """Totals, sums of the table and its rows are the plan's; equal layers are one row, as in the text."""
    plan = plan_case(name, 4)
    whole = sum(math.prod(each.shape) * each.itemsize for each in plan.variables)
    local = sum(math.prod(each.local_shape) * each.itemsize for each in plan.variables)
    sent = sum(each.wire_bytes for each in plan.collectives)
    page = page_of(plan)
    assert section(page, "totals").values == [len(plan.collectives), sent, local, whole, plan.step.memory.peak.total]
    table = section(page, "layers")
    assert table.all("tfoot")[0].values == [len(plan.layers), whole, local, len(plan.collectives), sent]
    rows = [row.values[1:] for row in table.all("tbody")[0].all("tr")]
    assert [sum(column) for column in zip(*rows, strict=True)] == table.all("tfoot")[0].values
    names = [row.all("th")[0].text for row in table.all("tbody")[0].all("tr")]
    assert names == [row.layer for row in layer_rows(plan)]


def test_memory_of_the_step() -> None:
    """Each kind is shown as it is at the peak, and at its own largest; the bar has the widths."""
    memory = section(page_of(replace(plan_case("gpt"), step=KNOWN)), "memory")
    rows = {row.all("th")[0].text: row.values for row in memory.all("tbody")[0].all("tr")}
    assert rows == {
        "parameters": [1000, 1],
        "gradients": [2000, 2],
        "optimizer": [3000, 3],
        "activations": [4000, 4],
        "temporaries": [5000, 5],
    }
    whole = memory.all("div", class_="bar")[0].values[0]
    peak = memory.all("div", class_="bar")[-1]
    assert peak.all("span")[0].text == "rank 0 at its peak: backward"
    assert peak.values == [15000]
    place = {key: f"{100 * size / whole:.3f}%" for key, size in (("x", 10000), ("width", 5000))}
    assert peak.all("rect")[-1].attributes == {**place, "height": "100%", "class": "fill-temporaries"}


def test_what_is_unknown_is_said() -> None:
    """A plan without a simulated step, and a step without an optimizer, do not look as if they needed nothing."""
    plan = plan_case("gpt")
    page = page_of(replace(plan, step=NO_STEP))
    assert "peak memory of rank 0unknownthe plan has no simulated step" in section(page, "totals").text
    assert section(page, "memory").text.endswith("What a step needs beside its variables is unknown.")
    memory = section(page_of(replace(plan, step=replace(KNOWN, optimizer="", loss=""))), "memory")
    assert memory.text.endswith(
        "No optimizer is named, so its state and its update are not in these figures."
        "No loss of Keras is named: the sum of the outputs stands for it, and takes less memory."
    )


def test_unequal_ranks_have_bars_of_their_own() -> None:
    """Llama's two key-value heads on four ranks: two of them hold none."""
    bars = section(page_of(plan_case("llama", 4)), "memory").all("div", class_="bar")
    assert [bar.all("span")[0].text for bar in bars[1:3]] == [
        "ranks 0 to 1, each: variables",
        "ranks 2 to 3, each: variables",
    ]
    assert bars[1].values[0] > bars[2].values[0]


def layer(page: Element, name: str) -> Element:
    """Return a layer of the tree by its name, as the filter finds it."""
    return next(each for each in page.all("div", class_="layer") if each.attributes["data-search"].split()[0] == name)


def test_layers_show_weights_edges_and_reasons() -> None:
    """A row-parallel layer: its shards, its boundaries with bytes, and the reason of each."""
    plan = plan_case("gpt")
    down = layer(page_of(plan), "block_[0-1]_down")
    assert down.all("b", class_="badge")[0].text == "row"
    assert [tip.text for tip in down.all("", role="tooltip")] == [
        "a contracted dim of the weight is shardedtakes S(2), makes P",
        "block_*_down/kernel128x32 float32, 16.0 KiBS(0): 64x32, 8.00 KiB on rank 0"
        "rule 'block_[0-9]+.down/kernel' -> (model, None)",
        "block_*_down/bias32 float32, 128 BR: 32, 128 B on rank 0no layout rule names it",
        "all-reduce of 4096 bytes over 2 ranks, forwardsummands of the ranks are added"
        "output (block_*_down output)each rank sends 4.00 KiB2 times per step",
    ]
    assert [each.text for each in down.all("mark")] == ["64/128"]
    assert [each.attributes["class"] for each in down.all("span", class_="weight")] == [
        "tip weight sharded",
        "tip weight replicated",
    ]
    assert down.all("div", class_="output")[0].all("b")[0].text == "P → R"


def test_gathered_and_shared() -> None:
    """A weight that is gathered at use looks its own way; a boundary that another layer executes is shared."""
    page = page_of(plan_case("llama", 4))
    key = layer(page, "llama_backbone/transformer_layer_[0-1]/self_attention/key")
    assert len(key.all("span", class_="gathered")) == 1
    assert "gathered whole at use" in key.text
    up = layer(page, "llama_backbone/transformer_layer_[0-1]/feedforward_intermediate_dense")
    assert [pill.text for pill in up.all("span", class_="pill")] == [
        "sharedllama_backbone/transformer_layer_*/feedforward_gate_dense takes the same tensor in the same way: "
        "it is converted once"
    ]


def test_modes_of_a_layer_have_their_own_collectives() -> None:
    """An embedding that is called in reverse too: its outputs have one name, and each its own collective."""
    leaves = {leaf.name: leaf for leaf, _, _ in walk(outline(plan_case("tied", 4)))}
    assert {
        name: [(edge.place, each.kind, count) for edge in leaf.edges for each, count in edge.collectives]
        for name, leaf in leaves.items()
    } == {
        "token_embedding": [("out", "all_reduce", 1)],
        "norm (2 calls)": [],
        "up (2 calls)": [("in", "all_reduce", 2)],
        "down (2 calls)": [("out", "all_reduce", 2)],
        "token_embedding [reverse]": [("in", "all_reduce", 1), ("out", "all_gather", 1)],
    }


def test_implicit_collectives_stand_out() -> None:
    """A collective that no boundary makes is with its layer, or in a row of its own, with its cause."""
    made = Collective("all_gather", "model", 2, 100, "final_norm", "aten.add", "forward", "it is", cause="aten.add")
    elsewhere = replace(made, layer="", place="clip", phase="update", cause="aten.norm")
    plan = plan_case("gpt")
    page = page_of(replace(plan, collectives=(*plan.collectives, made, elsewhere)))
    assert "2 implicit" in section(page, "totals").text
    assert [pill.text.partition("implicit: ")[2] for pill in page.all("span", class_="implicit")] == [
        "aten.add",
        "aten.norm",
    ]
    assert layer(page, "final_norm").all("span", class_="implicit")
    rows = section(page, "layers").all("tbody")[0].all("tr")
    assert (rows[-1].all("th")[0].text, rows[-1].values[-2:]) == ("outside", [1, 100])


def test_rules_that_match_nothing_stand_out() -> None:
    plan = plan_case("gpt")
    unused = replace(plan.rules[0], variables=(), outputs=())
    rules = section(page_of(replace(plan, rules=(*plan.rules, unused))), "rules")
    assert [row.all("td")[1].text for row in rules.all("tr")[1:]][-1] == "nothing"
    assert len(rules.all("b", class_="warning")) == 1


def bands(plan: Plan) -> dict[str, str]:
    """Return the classes of the layers that are in a region."""
    layers = page_of(plan).all("div", class_="layer")
    words = {each.all("code")[0].text: (each.attributes["class"] or "").split()[1:] for each in layers}
    return {name: " ".join(band) for name, band in words.items() if band}


def test_regions_are_bands() -> None:
    """Activations are sharded from the first column-parallel to the row-parallel layer, not at their outer ends."""
    plan = plan_case("gpt")
    inside = "sharded from to"
    attention = {"query": "sharded to", "key": inside, "value": inside, "attention_output": "sharded from"}
    assert bands(plan) == {**attention, "up": "sharded to", "down": "sharded from"}
    up, down = (layer(page_of(plan), f"block_[0-1]_{name}").all("div", class_="edge") for name in ("up", "down"))
    assert up[0].all("small")[-1].text == "a region begins"
    assert down[-1].all("small")[-1].text == "the region ends"


def test_regions_go_on_beside_whole_layers() -> None:
    """A layer on whole tensors that runs between the two ends of a region is inside its band."""
    plan = plan_case("mlp")
    up, down, head = plan.layers
    assert bands(plan) == {"up": "sharded to", "down": "sharded from"}
    assert bands(replace(plan, layers=(up, head, down))) == {
        "up": "sharded to",
        "head": "sharded from to",
        "down": "sharded from",
    }
    assert bands(replace(plan, layers=(down, head, up))) == {"up": "sharded", "down": "sharded"}


# The tree


def shown(nodes: tuple[Node, ...]) -> list[Any]:
    """Return the tree as names, lists of what is in them, and how many they stand for."""
    return [
        f"{node.joint}{node.name}" if node.leaf else [f"{node.joint}{node.name}", *shown(node.children)]
        for node in nodes
    ]


def test_numbered_names_are_blocks() -> None:
    """Flat names with a number are a level of the tree too; blocks that differ are apart."""
    inside = ["_attention_norm", ["_attention", "/query", "/key", "/value", "/attention_output"], "_mlp_norm"]
    around = ["token_embedding", "position_embedding"], ["final_norm", "head"]
    assert shown(outline(with_blocks(3))) == [
        *around[0],
        ["block_[0-2]", *inside, "_up", "_down"],
        *around[1],
    ]
    plan = with_blocks(4)
    layers = tuple(replace(each, style="gathered") if each.layer == "block_2_up" else each for each in plan.layers)
    assert [name for name in shown(outline(replace(plan, layers=layers))) if isinstance(name, list)] == [
        ["block_[0-1,3]", *inside, "_up", "_down"],
        ["block_2", *inside, "_up", "_down"],
    ]


@pytest.mark.parametrize("name", ["encoder", "gpt", "llama", "subclassed", "tied"])
def test_everything_is_in_the_tree_once(name: str) -> None:
    plan = plan_case(name, 4)
    leaves = list(walk(outline(plan)))
    assert sum(times * len(leaf.variables) for leaf, times, _ in leaves) == len(plan.variables)
    assert sum(times * count for leaf, times, _ in leaves for _, count in leaf.collectives) == len(plan.collectives)
    assert sum(times for leaf, times, _ in leaves if leaf.plan) == len(plan.layers)


# Parts


def test_all_text_is_escaped() -> None:
    """Whatever a model's author or a layout writes stays text, in contents and in attributes."""
    plan = hostile(plan_case("gpt"))
    page = page_of(plan)
    assert [len(page.all(name)) for name in ("script", "style", "img", "title")] == [1, 1, 0, 1]
    assert section(page, "notes").all("li")[0].text == HOSTILE
    assert page.all("h1")[0].text == HOSTILE
    assert any(HOSTILE in tip.text for tip in page.all("", role="tooltip"))


@pytest.mark.parametrize("plan", [plan_case("llama", 4), with_blocks(3, differ=True)], ids=["llama", "blocks"])
def test_page_stands_alone(plan: Plan) -> None:
    """Nothing is loaded, ids are unique, and every description that is referred to is there."""
    text = plan_to_html(plan)
    page = read(text)
    assert not {"src", "href", "style", "onclick"} & {key for each in page.walk() for key in each.attributes}
    assert not [word for word in ("http:", "https:", "url(", "@import", "fetch(") if word in text]
    ids = [each.attributes["id"] for each in page.walk() if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    described = [each.attributes["aria-describedby"] for each in page.walk() if "aria-describedby" in each.attributes]
    assert len(described) > 20
    assert set(described) <= set(ids)


def test_equal_plans_give_equal_pages(tmp_path: Path) -> None:
    """Neither the process nor its hash seed changes a byte."""
    plan = replace(plan_case("llama", 4), step=KNOWN)
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    script = (
        "import sys; from tp_planner import Plan; from tp_planner.report.html import plan_to_html\n"
        "sys.stdout.buffer.write(plan_to_html(Plan.from_json(open('plan.json').read())).encode())"
    )
    root = str(Path(__file__).resolve().parents[2])
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=True
        )
        assert done.stdout.decode() == plan_to_html(plan)


DRAWN = {
    "a vector": ((1024,), Shard(0), 4, "61.0 7.0", "15.2 7.0", "v"),
    "rows of a matrix": ((64, 1024), Shard(0), 4, "61.0 27.4", "61.0 6.8", "h"),
    "columns of a matrix": ((64, 1024), Shard(1), 4, "61.0 27.4", "15.2 27.4", "v"),
    "heads of a kernel": ((64, 16, 64), Shard(1), 2, "61.0 27.4", "30.5 27.4", "v"),
    "an uneven dim": ((64, 10), Shard(1), 4, "24.9 27.4", "7.5 27.4", "v"),
    "whole": ((64, 1024), Replicate(), 4, "61.0 27.4", "61.0 27.4", ""),
    "a scalar": ((), Replicate(), 4, "7.0 7.0", "7.0 7.0", ""),
    "nothing at all": ((0, 4), Shard(0), 2, "17.8 7.0", "17.8 0.0", "h"),
}


@pytest.mark.parametrize(("shape", "placement", "parts", "whole", "own", "line"), DRAWN.values(), ids=DRAWN)
def test_tensors_are_cut_along_their_sharded_dim(
    shape: tuple[int, ...], placement: Placement, parts: int, whole: str, own: str, line: str
) -> None:
    drawing = read(draw_tensor(shape, placement, parts))
    sizes = {each.attributes["class"]: "{width} {height}".format(**each.attributes) for each in drawing.all("rect")}
    assert sizes == {"whole": whole, "own": own, "frame": whole}
    lines = [path.attributes["d"] or "" for path in drawing.all("path")]
    assert [each.count(line) for each in lines] == ([parts - 1] if line else [])


def test_elements_escape_all_that_is_not_markup() -> None:
    shown = element(
        "p", "<", element("b", "&"), id='"', class_="a", aria_label="x", hidden=True, open=False, title=None
    )
    assert shown == '<p id="&quot;" class="a" aria-label="x" hidden>&lt;<b>&amp;</b></p>'


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, which records what it loads and what goes wrong."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, tmp_path: Path, plan: Plan) -> str:
    """Open the page of a plan from a file, and return its address."""
    path = tmp_path / "plan.html"
    path.write_text(plan_to_html(plan), encoding="utf-8")
    browser.get_log("performance")
    browser.get(path.as_uri())
    return path.as_uri()


def texts(browser: Any, selector: str) -> list[str]:
    """Return the texts of the elements that can be seen."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).map(e => e.innerText)",
        selector,
    )


def press(browser: Any, keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(keys).perform()


NAMES = "#layers tbody tr th"
ESCAPE = "\ue00c"  # the key, as WebDriver writes it


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opens_from_a_file(browser: Any, tmp_path: Path, scheme: str) -> None:
    """It loads nothing but itself, runs without a complaint, and follows the reader's colours."""
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    address = show(browser, tmp_path, plan_case("gpt"))
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    loaded = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert loaded == [address]
    assert browser.get_log("browser") == []
    ink, paper = browser.execute_script("let s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")


def test_tree_folds(browser: Any, tmp_path: Path) -> None:
    """Blocks fold by a click on their line, and all at once."""
    show(browser, tmp_path, plan_case("gpt"))
    every = texts(browser, ".layer .line code:first-child")
    assert len(every) > 12
    browser.find_element("css selector", "details details summary code").click()
    inner = {"query", "key", "value", "attention_output"}
    assert set(every) - set(texts(browser, ".layer .line code:first-child")) == inner
    browser.find_element("id", "fold").click()
    outer = ["token_embedding", "position_embedding", "final_norm", "head"]
    assert texts(browser, ".layer .name code") == outer
    browser.find_element("id", "unfold").click()
    assert texts(browser, ".layer .line code:first-child") == every


def test_table_sorts(browser: Any, tmp_path: Path) -> None:
    """A click on a head sorts by exact numbers, another the other way round; "#" is the order of execution."""
    show(browser, tmp_path, plan_case("gpt"))
    before = texts(browser, NAMES)
    heads = {head.text: head for head in browser.find_elements("css selector", "#layers thead button")}
    values = "return [...document.querySelectorAll('#layers tbody tr')].map(r => Number(r.cells[4].firstChild.value))"
    for turn, backwards in enumerate((False, True)):
        heads["bytes"].click()
        assert browser.execute_script(values) == sorted(browser.execute_script(values), reverse=backwards)
        sorts = [head.get_attribute("aria-sort") for head in browser.find_elements("css selector", "#layers thead th")]
        assert sorts[4] == ("ascending", "descending")[turn]
        assert set(sorts[:4] + sorts[5:]) == {"none"}
    assert texts(browser, NAMES) != before
    heads["style"].click()
    styles = texts(browser, "#layers tbody td:nth-child(4)")
    assert styles == sorted(styles)
    next(head for text, head in heads.items() if text.startswith("#")).click()
    assert texts(browser, NAMES) == before


FILTERS = {
    "a name": ("QUERY", ["block_[0-11]_attention/query"]),
    "one of equal blocks": ("block_7_up", ["block_[0-11]_up"]),
    "a block that is not there": ("block_12_up", []),
    "words": ("norm final", ["final_norm"]),
    "a style": ("vocabulary", ["token_embedding"]),
    "signs": ("block_[0-11]_down", ["block_[0-11]_down"]),
    "half an expression": ("block_7(", []),
}


def test_layers_are_filtered(browser: Any, tmp_path: Path) -> None:
    """Tree and table show the layers that are looked for, wherever they are folded, and then all as before."""
    show(browser, tmp_path, with_blocks(12))
    browser.find_element("id", "fold").click()
    before = texts(browser, ".layer"), texts(browser, NAMES)
    field = browser.find_element("id", "filter")
    for wanted, names in FILTERS.values():
        field.clear()
        field.send_keys(wanted)
        assert texts(browser, NAMES) == names
        assert len(texts(browser, ".layer")) == len(names)
        assert texts(browser, "#found") == [f"{len(names)} of {len(before[1])}"]
    press(browser, ESCAPE)
    assert (texts(browser, ".layer"), texts(browser, NAMES)) == before


def test_reasons_are_shown(browser: Any, tmp_path: Path) -> None:
    """An explanation is shown where the pointer is and where the focus is, inside the window, until Escape."""
    from selenium.webdriver import ActionChains

    plan = plan_case("gpt")
    reason = next(layer.reason for layer in plan.layers if layer.style == "row")
    show(browser, tmp_path, plan)
    assert texts(browser, "[role=tooltip]") == []
    ActionChains(browser).move_to_element(browser.find_element("css selector", ".layer .badge.row")).perform()
    assert texts(browser, "[role=tooltip]") == [f"{reason}\ntakes S(2), makes P"]
    press(browser, ESCAPE)
    assert texts(browser, "[role=tooltip]") == []
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    browser.find_element("id", "fold").send_keys("\t\t")  # past the style of the first layer, to its weight
    (said,) = texts(browser, "[role=tooltip]")
    assert said.startswith("token_embedding/embeddings\n64x32 float32")
    box = "let b = document.activeElement.lastChild.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]"
    left, top, right, bottom = browser.execute_script(box)
    width, height = browser.execute_script("return [innerWidth, innerHeight]")
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_hostile_names_do_nothing(browser: Any, tmp_path: Path) -> None:
    show(browser, tmp_path, hostile(plan_case("gpt")))
    assert browser.title == f"{HOSTILE} on model=2"
    assert browser.get_log("browser") == []
    assert texts(browser, "h1") == [HOSTILE]


@pytest.mark.parametrize(
    "differ", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["equal blocks", "blocks that differ"]
)
def test_large_plans(browser: Any, tmp_path: Path, differ: bool) -> None:
    """126 blocks are one where they are equal; else they are folded at first, and every layer is there."""
    plan = with_blocks(126, differ)
    show(browser, tmp_path, plan)
    assert browser.get_log("browser") == []
    blocks = [name for name in texts(browser, "summary code") if name.startswith("block")]
    assert blocks == ([f"block_{n}" for n in range(126)] if differ else ["block_[0-125]"])
    assert len(texts(browser, ".layer")) == (4 if differ else 12)
    browser.find_element("id", "unfold").click()
    assert len(texts(browser, ".layer")) == (len(plan.layers) if differ else 12)
