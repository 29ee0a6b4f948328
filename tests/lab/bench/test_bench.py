"""The benchmark's own machinery: grid, measures, resuming, workers, report, the WebUI mode."""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loratorio.errors import LoratorioError
from loratorio_lab.bench import beside, cli, measures, presets, report, styles
from loratorio_lab.bench.plan import (
    MAIN_ROWS,
    METHOD_ROWS,
    PRESET_ROWS,
    Cell,
    Variant,
    cells,
    combinations,
    sample,
)
from loratorio_lab.bench.runner import run
from loratorio_lab.bench.store import ImageResult, Result, Store
from loratorio_lab.benchmarks import request_time
from loratorio_lab.chosen_toybox import ChosenToybox
from loratorio_lab.toybox.world import World

BACKEND = "tests.lab.bench.fake_backend:make"
CATEGORIES = {
    "character": ["robot", "cat"],
    "clothing": ["stripes", "hat"],
    "style": ["ink"],
    "background": ["night", "rays"],
    "object": ["cactus"],
}
SAMPLING = {"steps": 4, "cfg": 3.0, "sampler": "euler"}


def small_grid() -> list[Cell]:
    return cells(
        MAIN_ROWS,
        combinations(CATEGORIES, 2)[:2],
        3,
        SAMPLING,
        truths=4,
    )


def test_combinations_are_composloras() -> None:
    for count, expected in ((2, 2 * 6), (5, 2 * 2 * 1 * 2 * 1)):
        found = combinations(CATEGORIES, count)
        assert len(found) == len(set(found)) == expected
        for combo in found:
            assert combo[0] in CATEGORIES["character"]
            places = [name for name, own in CATEGORIES.items() if set(own) & set(combo)]
            assert len(places) == count
    few = sample(combinations(CATEGORIES, 3), 5)
    assert few == sample(combinations(CATEGORIES, 3), 5)
    assert len(set(few)) == 5
    used = Counter(name for combo in few for name in combo)
    assert {"robot", "cat"} <= used.keys()
    assert sample([("a",)], 0) == [("a",)]
    every = sample(combinations(CATEGORIES, 3), 0)
    assert every[:5] == few
    assert sorted(every) == sorted(combinations(CATEGORIES, 3))


def test_cells_are_known_by_their_work() -> None:
    first, second = Variant("a", "A", {}), Variant("b", "B", {"patch_size": 8})
    grid = cells([first, second, Variant("again", "A", {})], [("robot", "ink")], 2, SAMPLING)
    assert [cell.variant for cell in grid] == ["truth", "a", "b"]
    assert grid[1].is_of(Variant("again", "A", {}))
    assert not grid[1].is_of(second)
    more_steps = cells([first], [("robot", "ink")], 2, {**SAMPLING, "steps": 5})
    assert more_steps[1].key != grid[1].key


def test_measures() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert measures.border_ratio(noise, 16) == pytest.approx(1, abs=0.05)
    blocks = (
        np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8) // 2 + noise // 16
    )
    assert measures.border_ratio(blocks, 16) > 3
    assert measures.border_ratio(np.zeros((32, 32, 3), np.uint8), 16) == 1
    assert measures.saturation(np.full((4, 4, 3), 90, np.uint8)) == 0
    assert measures.saturation(np.zeros((4, 4, 3), np.uint8) + np.array([200, 0, 0], np.uint8)) == 1
    assert measures.clipped(np.full((4, 4, 3), 255, np.uint8)) == 1


def test_frechet_of_gaussians() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(20000, 2))
    assert measures.frechet(first, first) == pytest.approx(0, abs=1e-9)
    # |Δμ|² + Σ(σ₁−σ₂)²: 9 + 2·(1−2)²
    second = 2 * rng.normal(size=(20000, 2)) + np.array([3.0, 0.0])
    assert measures.frechet(first, second) == pytest.approx(11, rel=0.03)
    assert np.isnan(measures.frechet(first[:1], second))


def test_intervals_resample_whole_groups() -> None:
    same = [np.ones(5), np.zeros(5)] * 10
    low, high = measures.bootstrap(same)
    assert low < 0.35
    assert high > 0.65


def test_a_grid_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_BACKEND_LOG", str(log))
    grid, store = small_grid(), Store(tmp_path / "cells")
    done: list[int] = []

    def stop_after_three(count: int, total: int, cell: Cell) -> None:
        done.append(count)
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(grid, store, BACKEND, tell=stop_after_three)
    (store.folder / "half.123.part").write_text("{")
    assert run(grid, store, BACKEND) == len(grid) - 3
    assert run(grid, store, BACKEND) == 0
    keys = [line.split()[1] for line in log.read_text().splitlines()]
    assert sorted(keys) == sorted(cell.key for cell in grid)
    assert len(list(store.read())) == len(grid)
    assert run(cells(METHOD_ROWS, [("robot", "ink")], 1, SAMPLING), store, BACKEND, until=0.0) == 0


def test_processes_do_each_cell_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_BACKEND_LOG", str(log))
    grid = small_grid()
    assert run(grid, Store(tmp_path / "cells"), BACKEND, workers=2) == len(grid)
    keys = [line.split()[1] for line in log.read_text().splitlines()]
    assert sorted(keys) == sorted(cell.key for cell in grid)


def test_ray_is_asked_for_by_name_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoratorioError, match="pip install"):
        run(small_grid(), Store(tmp_path), BACKEND, ray_address="local")


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'loratorio[lab]')"
)
def test_two_ray_workers_one_of_them_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, died = tmp_path / "log", tmp_path / "died"
    for name, value in (("LOG", str(log)), ("DIE", str(died)), ("SECONDS", "0.3")):
        monkeypatch.setenv(f"FAKE_BACKEND_{name}", value)
    grid, store = small_grid(), Store(tmp_path / "cells")
    assert run(grid, store, BACKEND, workers=2, ray_address="local") == len(grid)
    lines = [line.split() for line in log.read_text().splitlines()]
    killed = died.read_text()
    # It may have done other cells before: the one at which it was killed is its last.
    unfinished = (killed, [key for pid, key in lines if pid == killed][-1])
    finished = [key for pid, key in lines if (pid, key) != unfinished]
    assert sorted(finished) == sorted(cell.key for cell in grid)
    assert len({pid for pid, _ in lines}) >= 2
    assert not store.missing(grid)
    assert run(grid, store, BACKEND, workers=2, ray_address="local") == 0


def options(**changes: Any) -> argparse.Namespace:
    values = cli.parser().parse_args(["--backend", BACKEND])
    for name, value in changes.items():
        setattr(values, name, value)
    return values


def test_the_command_writes_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChosenToybox, "categories", lambda self: CATEGORIES)
    to = tmp_path / "docs" / "RESULTS.md"
    to.parent.mkdir()
    to.write_text("# Results\n\n<!-- notes -->\nA note by hand.\n<!-- end of notes -->\n\nOld tables.\n")
    chosen = options(
        out=tmp_path / "out",
        report=to,
        combinations=2,
        other_combinations=1,
        ablation_combinations=1,
        seeds=2,
        counts="2,3",
    )
    cli.bench(chosen)
    text = to.read_text()
    for part in (
        "LoRAtorio",
        "CMLoRA",
        "K-LoRA",
        "## Methods",
        "Combinations: 2 of N=2, 2 of N=3; 2 seeds each.",
        "By elements found: LoRAtorio > ",
        "All of its cells are done.",
        "### By category",
        "### Without styles",
        "Without styles: LoRAtorio > ",
        "## Other methods",
        "## Roles of styles",
        "role=always",
        "A note by hand.",
        "| temperature | 0.1 | ",
        "as a pool",
    ):
        assert part in text, part
    assert (
        "loratorio-lab bench --combinations 2 --other-combinations 1 --ablation-combinations 1 --counts 2,3"
        in " ".join(text.split())
    )
    assert "Old tables" not in text
    assert "| LoRAtorio | 100 | 100 |" in text
    assert "| Merge | 50 | 33 |" in text
    assert (to.parent / "results" / "methods.png").is_file()
    before = capsys.readouterr()
    assert "\n0 cells" not in "\n" + before.out
    cli.bench(chosen)
    assert "0 cells done now" in capsys.readouterr().out
    assert to.read_text() == text
    next(file for file in (tmp_path / "out" / "cells").glob("merge.*")).unlink()
    chosen.report_only = True
    cli.bench(chosen)
    assert "1 of its" in to.read_text()


def test_the_quick_grid_says_whether_the_published_order_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "RESULTS.md"
    monkeypatch.setattr(ChosenToybox, "categories", lambda self: CATEGORIES)
    monkeypatch.setattr(cli, "PUBLISHED", published)
    chosen = options(out=tmp_path / "out", quick=True, seeds=1)
    for order, verdict in (
        ("LoRAtorio > LoRAtorio by divergence ≈ Merge ≈ Composite ≈ Merge, re-centred", "agrees with"),
        ("Merge > LoRAtorio ≈ LoRAtorio by divergence ≈ Composite ≈ Merge, re-centred", "DIFFERS from"),
    ):
        published.write_text(f"# Results\n\nBy elements found: {order}.\n")
        cli.bench(chosen)
        assert verdict in capsys.readouterr().out


def test_orders_agree_unless_what_is_clearly_apart_is_turned_round() -> None:
    assert report.agrees("a > b > c", "a > b ≈ c")
    assert report.agrees("a ≈ c > b", "a > b ≈ c")
    assert not report.agrees("b ≈ a > c", "a > b ≈ c")
    assert not report.agrees("a > b", "a > c")
    assert report.agrees("a > new > b", "a > b")


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": 0},
        {"workers": 0},
        {"groups": "method"},
        {"counts": "1,2"},
        {"combinations": -1},
        {"elements": "ink,nobody"},
    ],
)
def test_bad_numbers_are_sentences(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(LoratorioError):
        cli.bench(options(out=tmp_path, **changes))


def test_shares_by_category_count_only_what_was_wanted() -> None:
    variant = Variant("merge", "Merge", {"method": "merge"})

    def result(elements: tuple[str, ...], *found: tuple[str, ...]) -> Result:
        images = tuple(ImageResult(i, each, 1.0, 0.5, 0.0, (0.0,)) for i, each in enumerate(found))
        return Result(Cell("merge", elements, 0, len(found), variant.resolved()), images, 1.0)

    results = [
        result(("robot", "ink"), ("robot", "night"), ("robot", "ink")),
        result(("cat", "ink", "night"), ("cat",), ("ink", "night", "hat")),
        result(("cat", "hat"), ("hat",), ("hat",)),
    ]
    lines = report.category_table([variant], results, CATEGORIES).splitlines()
    assert lines[0] == "|  | character | clothing | style | background | object |"
    assert lines[2:] == ["| Merge | 50 | 100 | 50 | 50 | – |"]
    assert report.without(CATEGORIES["style"], results) == results[2:]


class FakeWebUI(BaseHTTPRequestHandler):
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (10, 20, 30)).save(buffer, "PNG")
        self.answer({"images": [base64.b64encode(buffer.getvalue()).decode()], "info": "{}"})

    def do_GET(self) -> None:
        assert self.path == "/sdapi/v1/loras"
        self.answer([{"name": f"{kind}_1", "alias": "none"} for kind in ("style", "character", "object")])

    def answer(self, content: Any) -> None:
        answer = json.dumps(content).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def webui() -> Iterator[str]:
    FakeWebUI.asked = []
    server = HTTPServer(("127.0.0.1", 0), FakeWebUI)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def constant_scorer() -> Any:
    return lambda picture, text: float(len(text))


@pytest.fixture
def lora_list(tmp_path: Path) -> Path:
    file = tmp_path / "lora_info.json"
    content = {
        kind: [{"id": f"{kind}_1", "trigger": ["word", "other"]}] for kind in ("style", "character", "object")
    }
    file.write_text(json.dumps({"anime": content}))
    return file


def test_webui_mode_asks_scores_and_resumes(
    tmp_path: Path,
    webui: str,
    lora_list: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LORATORIO_SCORER", "tests.lab.bench.test_bench:constant_scorer")
    chosen = options(
        webui=webui,
        loras=lora_list,
        out=tmp_path / "out",
        counts="2",
        seeds=1,
        base_prompt="best",
        size="512x768",
        steps=9,
    )
    cli.bench(chosen)
    assert len(FakeWebUI.asked) == 2 * len(METHOD_ROWS)
    first = FakeWebUI.asked[0]
    assert first["prompt"] == "best, word, other, word, other <lora:character_1:1> <lora:style_1:1>"
    assert (first["width"], first["height"], first["steps"]) == (512, 768, 9)
    assert "cfg_scale" not in first
    methods = {
        body["alwayson_scripts"]["LoRAtorio"]["args"][0].get("method", "loratorio")
        for body in FakeWebUI.asked
    }
    assert methods == {variant.knobs.get("method", "loratorio") for variant in METHOD_ROWS}
    assert "| LoRAtorio | 24.00 | 24.00 |" in capsys.readouterr().out
    cli.bench(chosen)
    assert len(FakeWebUI.asked) == 2 * len(METHOD_ROWS)


def test_whole_requests_are_timed_in_turns(webui: str, capsys: pytest.CaptureFixture[str]) -> None:
    request_time.main([webui, "--loras", "character_1,style_1", "--rounds", "2", "--schedules", "2", "6"])
    # A round to warm up and two more, four ways, and for each another prompt's request, two of few steps, and one of more.
    assert [body["steps"] for body in FakeWebUI.asked] == [1, 2, 2, 6] * 4 * 3
    assert FakeWebUI.asked[0]["prompt"] == "a picture"
    assert FakeWebUI.asked[1]["prompt"] == "a picture <lora:character_1:1> <lora:style_1:1>"
    ours = [body["alwayson_scripts"]["LoRAtorio"]["args"][0] for body in FakeWebUI.asked[1::4]]
    assert [way.get("preset") for way in ours[:4]] == [None, "paper", "balanced", "fast"]
    assert [way.get("preset") for way in ours[4:8]] == ["paper", "balanced", "fast", None]
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    merged = [float(value) for value in rows[0][2:5]]
    for row in rows:
        for ratio, own, others in zip(row[5:8], row[2:5], merged, strict=True):
            # Of numbers with two digits behind the point.
            assert (float(own) - 0.006) / (others + 0.006) - 0.006 < float(ratio)
            assert others <= 0.006 or float(ratio) < (float(own) + 0.006) / (others - 0.006) + 0.006
    assert len(rows) == 4


def test_a_quick_look_is_merging_and_the_presets_side_by_side(
    tmp_path: Path, webui: str, lora_list: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORATORIO_SCORER", "tests.lab.bench.test_bench:constant_scorer")
    chosen = options(webui=webui, loras=lora_list, out=tmp_path, counts="2,3", seeds=2, quick=True)
    cli.bench(chosen)
    assert chosen.minutes == cli.QUICK_MINUTES
    # Two pairs and a triple of one character with others; all four ways before the next prompt, pairs and triples in turn.
    assert len(FakeWebUI.asked) == (2 + 1) * 2 * 4
    prompts = [body["prompt"] for body in FakeWebUI.asked]
    assert [prompts[at].count("<lora:") for at in (0, 3, 8, 16)] == [2, 2, 3, 2]
    assert len(set(prompts[:8])) == 1
    folder = tmp_path / "webui"
    lines = (folder / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["Merge", "Paper", "Balanced", "Fast"]
    assert lines[2].startswith("| Merge | 24.00 | 37.00 | 28.33 |")
    two, three = (Image.open(folder / f"sheet-{count}.png") for count in (2, 3))
    assert two.height > three.height
    # Out of time before the last way: that prompt counts for none of them.
    (folder / "fast.character_1+style_1.1.json").unlink()
    chosen.minutes = 0.0
    cli.bench(chosen)
    assert len(FakeWebUI.asked) == (2 + 1) * 2 * 4
    lines = (folder / "table.md").read_text().splitlines()
    assert all("| 24.00 | 37.00 | 29.20 |" in line for line in lines[2:])


def test_webui_mode_says_what_is_wrong(
    tmp_path: Path, webui: str, lora_list: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LoratorioError, match="--loras"):
        cli.bench(options(webui="http://127.0.0.1:9", out=tmp_path))
    with pytest.raises(LoratorioError, match="--size"):
        cli.bench(options(webui="http://127.0.0.1:9", loras=lora_list, out=tmp_path, size="big"))
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    with pytest.raises(LoratorioError, match="not a list of LoRAs"):
        cli.bench(options(webui="http://127.0.0.1:9", loras=bad, out=tmp_path))
    bad.write_text(
        json.dumps({"character": [{"id": "nobody"}, {"id": "character_1"}], "style": [{"id": "style_1"}]})
    )
    with pytest.raises(LoratorioError, match="has no LoRA nobody: write"):
        cli.bench(options(webui=webui, loras=bad, out=tmp_path))
    bad.write_text(json.dumps({"character": [{"id": "character_1"}]}))
    with pytest.raises(LoratorioError, match="no combination of 2,3,4,5 LoRAs"):
        cli.bench(options(webui=webui, loras=bad, out=tmp_path))
    for scorer in ("no_such_module:make", "json:no_such_function", "json", ":make", "json:dumps"):
        monkeypatch.setenv("LORATORIO_SCORER", scorer)
        with pytest.raises(LoratorioError, match="write module:function"):
            cli.bench(options(webui=webui, loras=lora_list, out=tmp_path))
    monkeypatch.setenv("LORATORIO_SCORER", "tests.lab.bench.test_bench:constant_scorer")
    with pytest.raises(LoratorioError, match="No WebUI answers"):
        cli.bench(options(webui="http://127.0.0.1:9", loras=lora_list, out=tmp_path))


def test_presets_are_shown_with_what_they_find_and_cost(tmp_path: Path) -> None:
    combos = combinations(CATEGORIES, 2)[:3]
    grid = cells(PRESET_ROWS, combos, 2, SAMPLING, truths=4)
    store = Store(tmp_path)
    run(grid, store, BACKEND)
    results = list(store.read(grid))
    text = "\n".join(presets.section(results, {"presets": "results/presets.png"}))
    assert "## Presets" in text
    assert "(results/presets.png)" in text
    assert "chosen from" not in text  # that table has no pictures here
    by_label = {
        line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if line.startswith("| ")
    }
    assert list(by_label)[2:] == [row.label for row in PRESET_ROWS]
    own = [each for each in results if each.cell.variant == "fast"]
    rows = np.mean([each.model_rows / len(each.images) for each in own])
    assert by_label["Fast"][5].strip() == f"{rows / 2 / SAMPLING['steps']:.2f}"
    assert by_label["Paper"][1].strip() == ""
    assert by_label["Fast"][1].strip()[0] in "+-"
    file = presets.plot(results, tmp_path)
    assert file is not None
    assert Image.open(file).size[0] > 300
    assert presets.section([], {}) == []


def test_the_table_of_words_differs_in_who_reads_them_alone(tmp_path: Path) -> None:
    grid = cli.the_grid(options(out=tmp_path, groups="words", elements="tiger,ghost,night", place_seeds=1))
    assert len(grid) == 3 * 2 * 2
    of = {cell.variant: cell for cell in grid if cell.elements == ("tiger", "ghost", "night")}
    prompts = {name: beside.prompt(cell, World()) for name, cell in of.items()}
    tags = "<lora:tiger:at=left:1> <lora:ghost:at=right:1> <lora:night:1>"
    words = "small tigro on the left, small boolio on the right"
    assert prompts["common"] == prompts["common_whole"] == f"{words}, lunara background {tags}"
    assert prompts["beside_balanced"].startswith(
        "lunara background <lora:tiger:at=left:words=small tigro on the left:1>"
    )
    assert [of[name].knobs.get("own_words") for name in ("common", "common_whole")] == [True, False]
    assert "own_words" not in of["beside_balanced"].knobs


@pytest.mark.parametrize("group", ["places", "styles", "words", "found"])
def test_without_the_art_no_rendered_pictures_are_asked_for(tmp_path: Path, group: str) -> None:
    grid = cli.the_grid(options(out=tmp_path, groups=group, elements="tiger,ghost,ink", art=None))
    assert grid
    assert all(cell.made != "truth" for cell in grid)


def test_prompts_say_who_stands_where() -> None:
    knobs: dict[str, Any] = {}
    for kind, wanted in (
        (
            "free",
            "small tigro on the left, small boolio on the right, blue background <lora:tiger:1> <lora:ghost:1>",
        ),
        (
            "placed",
            "blue background <lora:tiger:at=left:words=small tigro on the left:1> <lora:ghost:at=right:words=small boolio on the right:1>",
        ),
        (
            "found common",
            "small tigro on the left, small boolio on the right, blue background <lora:tiger:at=auto:1> <lora:ghost:at=auto:1>",
        ),
    ):
        assert beside.prompt(Cell("", ("tiger", "ghost"), 0, 1, knobs, beside=kind), World()) == wanted
    four = Cell("", ("tiger", "ghost", "clown", "turtle"), 0, 1, knobs, beside="placed common")
    assert beside.prompt(four, World()) == (
        "small tigro on the left, small boolio, small klauno, small tortalo on the right, blue background "
        "<lora:tiger:at=0,0,0.25,1:1> <lora:ghost:at=0.25,0,0.5,1:1> "
        "<lora:clown:at=0.5,0,0.75,1:1> <lora:turtle:at=0.75,0,1,1:1>"
    )
    three = Cell("", ("tiger", "ghost", "clown"), 0, 1, knobs, beside="found")
    assert beside.prompt(three, World()) == (
        "blue background <lora:tiger:at=auto:words=small tigro on the left:1> "
        "<lora:ghost:at=auto:words=small boolio:1> <lora:clown:at=auto:words=small klauno on the right:1>"
    )


def test_neighbours_stand_in_threes_and_fours(tmp_path: Path) -> None:
    named = "tiger,ghost,clown,turtle,night"
    grid = cli.the_grid(options(out=tmp_path, groups="words", elements=named, place_seeds=1))
    elements = list(dict.fromkeys(cell.elements for cell in grid))
    assert len([each for each in elements if len(each) == 2]) == 12
    assert len([each for each in elements if "night" in each]) == 12
    # In the order of the world's elements, which is a ring.
    assert [each for each in elements if len(each) == 3 and "night" not in each] == [
        ("ghost", "turtle", "tiger"),
        ("turtle", "tiger", "clown"),
        ("tiger", "clown", "ghost"),
        ("clown", "ghost", "turtle"),
    ]
    assert len([each for each in elements if len(each) == 4]) == 4
    assert beside.drawn_places(3) == ["0,0,0.333,1", "0.333,0,0.667,1", "0.667,0,1,1"]


def test_every_part_has_its_own_character_and_none_of_the_others() -> None:
    def image(*found: str) -> ImageResult:
        return ImageResult(0, found, 1.0, 0.5, 0.0, (0.0,))

    assert beside.found_in([("tiger", "ink"), (), ("ghost",)]) == ("1:tiger", "1:ink", "3:ghost")
    three = ("tiger", "ghost", "clown")
    assert beside.is_right(image("1:tiger", "1:ink", "2:ghost", "2:turtle", "3:clown"), three)
    assert not beside.is_right(image("1:tiger", "2:ghost", "3:clown", "3:tiger"), three)
    assert not beside.is_right(image("1:tiger", "2:ghost"), three)


def test_the_table_of_places_has_a_column_for_each_background_and_style() -> None:
    category = {
        "tiger": "character",
        "ghost": "character",
        "clown": "character",
        "night": "background",
        "ink": "style",
    }
    right, turned = ("1:tiger", "2:ghost"), ("1:ghost", "2:tiger")
    made = {
        (): [right, right],
        ("ink",): [(*right, "1:ink", "2:ink"), turned],
        ("night",): [(*right, "1:night"), ()],
        ("clown",): [(*right, "3:clown"), right],
    }
    results = [
        Result(
            beside.cell(beside.WORD_ROWS[1], ("tiger", "ghost", *more), 2, SAMPLING),
            tuple(ImageResult(i, found, 1.0, 0.5, 0.0, (0.0,)) for i, found in enumerate(pictures)),
            1.0,
        )
        for more, pictures in made.items()
    ]
    assert beside.table(results, category).splitlines() == [
        "| all right / that is found | alone | before night | in ink | three |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| **both words in the prompt, each read by its own LoRA** | 100 | 50 / 25 | 50 / 50 | 50 |",
    ]


def test_characters_in_styles_are_complete_or_not(tmp_path: Path) -> None:
    grid = styles.cells(CATEGORIES, 2, truth=True)
    pairs = [("robot", "ink"), ("cat", "ink")]
    behind = [("robot", "night", "ink"), ("cat", "rays", "ink")]
    assert [cell.elements for cell in grid if cell.variant == "balanced"] == pairs + behind
    assert len(grid) == 4 * len(styles.ROWS)
    assert styles.cells({"character": ["robot"], "style": []}, 2, truth=True) == []

    def image(*found: str) -> ImageResult:
        return ImageResult(0, found, 0.0, 0.0, 0.0, ())

    results = [Result(cell, (image("robot", "ink", "night"), image(*cell.elements)), 1.0) for cell in grid]
    heading, _, text = styles.section(results, CATEGORIES)
    assert heading == "## A character in a style"
    # Of the robot's pictures all are complete, of the cat's every second.
    assert "| Merge | 75 (50–100) | 75 | 75 (50–100) |" in text
    assert styles.section([], CATEGORIES) == []
