"""`psyche plan --table`: cells that are compiled once, whatever interrupts it, and the page of them."""

import json
from types import SimpleNamespace

import pytest
from support.tiny_plans import MODEL, needs_libtpu

from psyche_jax import cli
from psyche_jax.model.config import ARCHITECTURES
from psyche_jax.plan import table
from psyche_jax.plan.compile import GIB, batch_places
from psyche_jax.plan.slices import parse_topology


def fits(cell):
    return {
        "fits": True,
        "compiled": True,
        "peak_gib": 12.5,
        "seconds": [40.0, 80.5],
        "hours": [10.0, 20.0],
        "price": [27.0, 54.0],
    }


@pytest.fixture
def compiled(monkeypatch):
    """The cells that are compiled, which takes no compiler here."""
    cells = []
    monkeypatch.setattr(table, "find_compiler", lambda: True)
    monkeypatch.setattr(table, "_compiler", lambda: "1.2")
    monkeypatch.setattr(table, "compile_cell", lambda cell: (cells.append(cell), fits(cell))[1])
    return cells


def run(out, **filters):
    return cli.main(["plan", "--table", "--out", str(out), *(f"--{name}={value}" for name, value in filters.items())])


FEW = {"models": "7B,0.5B", "chips": "v6e-1", "modes": "adapters"}


def test_cells_that_are_there_are_skipped(tmp_path, compiled, monkeypatch, capsys):
    out = tmp_path / "which.jsonl"
    assert run(out, **FEW, programs="sft") == 0
    assert [(cell.model, cell.program) for cell in compiled] == [("7B", "sft"), ("0.5B", "sft")]
    assert run(out, **FEW) == 0
    assert [(cell.model, cell.program) for cell in compiled[2:]] == [("7B", "grpo"), ("0.5B", "grpo")]
    before = out.read_bytes()
    assert run(out, **FEW) == 0
    assert (len(compiled), out.read_bytes()) == (4, before)
    assert "4 cells, 4 of them in" in capsys.readouterr().err
    # Another compiler may say something else.
    monkeypatch.setattr(table, "_compiler", lambda: "1.3")
    assert run(out, **FEW) == 0
    assert len(compiled) == 8


def test_an_interrupted_table_goes_on(tmp_path, compiled, monkeypatch, capsys):
    """After Ctrl-C in the second cell, and half a line of a crash."""
    out = tmp_path / "which.jsonl"

    def interrupted(cell):
        if cell.model == "0.5B":
            raise KeyboardInterrupt
        return fits(cell)

    with monkeypatch.context() as patch:
        patch.setattr(table, "compile_cell", interrupted)
        assert run(out, **FEW, programs="grpo") == 1
    (line,) = out.read_text().splitlines()
    with out.open("a") as file:
        file.write(line[:40])
    capsys.readouterr()
    assert run(out, **FEW, programs="grpo") == 0
    assert [cell.model for cell in compiled] == ["0.5B"]
    assert "which.jsonl:2" in capsys.readouterr().err
    lines = out.read_text().splitlines()
    assert [lines[0], lines[1], json.loads(lines[2])["model"]] == [line, line[:40], "0.5B"]
    assert run(out, **FEW, programs="grpo") == 0
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"mode": []}, {"key": []}, {"date": 5}, {"peak_gib": "x"}, {"seconds": 3}, {"hours": [None, None]}, {"fits": 1}],
)
def test_lines_that_cannot_be_shown_are_skipped(wrong, tmp_path, capsys):
    out = tmp_path / "which.jsonl"
    cell = table.Cell("sft", "int8", "v5e-8", "7B")
    good = {**vars(cell), **fits(cell), "key": "k", "date": "2026-01-01", "compiler": "1.2", "jax": "0.9"}
    out.write_text("".join(json.dumps(line) + "\n" for line in (good | wrong, good)))
    assert table.read_records(out) == [good]
    assert f"{out}:1: is no cell of a table, skipped" in capsys.readouterr().err


def test_the_page(tmp_path, compiled):
    out = tmp_path / "which.jsonl"
    assert run(out, **FEW, programs="grpo") == 0
    page = (tmp_path / "which.md").read_text()
    assert "2 of 288 cells" in page and "libtpu 1.2" in page and "1,157 steps" in page and "157 steps" in page
    rows = [line for line in page.splitlines() if line.startswith("| Qwen2.5-7B ")]
    assert len(rows) == 6
    cells = rows[0].split(" | ")
    assert cells[1 + table.CHIPS.index("v6e-1")] == "12.5 GiB<br>40 to 80.5 s<br>10 to 20 h<br>$27 to $54"
    others = [cell for number, cell in enumerate(cells[1:]) if number != table.CHIPS.index("v6e-1")]
    assert all(cell.startswith(("≥", "**no**, ≥", "8 prompts<br>≥", "32 prompts<br>≥")) for cell in others), others


def test_what_was_not_compiled_is_bounded_by_arithmetic():
    assert table.by_arithmetic(table.Cell("grpo", "full", "v5e-1", "14B"))["fits"] is False
    small, large = (table.by_arithmetic(table.Cell("sft", "full", "v5e-16", model)) for model in ("0.5B", "7B"))
    assert small["fits"] is None and small["peak_gib"] < large["peak_gib"] < 15.75
    # 256 × 2,048 tokens on 16 × 197 TFLOP/s: at least six FLOPs a parameter and token, eight with remat.
    flops = 256 * 2048 * 7.6e9 / (16 * 197e12)
    assert 6 * flops < large["seconds"] < 12 * flops
    assert large["price"] == pytest.approx(16 * 1.2 * large["hours"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--table", "--out is missing"),
        ("--table --out x.json", "--out x.json: must end in .jsonl"),
        ("--table --out x.jsonl --models 7", "--models: '7' is not in the table; nearest: 7B"),
        ("--table --out x.jsonl --chips v6e-1,v5-8", "--chips: 'v5-8' is not in the table; nearest: v5p-8, v5e-8"),
        ("--table --out x.jsonl --modes lora", "--modes: 'lora' is not in the table; known: adapters, int8, full"),
        ("--table --out x.jsonl --programs gpro", "--programs: 'gpro' is not in the table; nearest: grpo"),
        ("--table --out x.jsonl --topology v6e-1", "--topology cannot be given with --table"),
        ("--config x.yaml --topology v6e-1 --models 7B", "--models cannot be given without --table"),
        ("--topology v6e-1", "--config is missing"),
        ("--config sft_7b", "--topology is missing"),
    ],
)
def test_wrong_use(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *arguments.split()]) == 2
    assert capsys.readouterr().err == f"psyche plan: {said}\n"


def test_what_cannot_fit_is_not_compiled(monkeypatch):
    monkeypatch.setattr(table, "make_plan", None)
    record = table.compile_cell(table.Cell("sft", "full", "v5e-1", "7B"))
    assert (record["fits"], record["compiled"]) == (False, False)
    assert record["peak_gib"] > 12 * 7.6e9 / GIB, "parameters and two moments in float32"


def test_fewer_prompts_where_the_paper_s_do_not_fit(monkeypatch):
    def planned(config, slice_, wishes):
        fits = config.prompts_per_step <= 32
        return SimpleNamespace(fits=fits, peak_bytes=GIB, config=config, mesh={}, compile_seconds=1, forecast=None)

    monkeypatch.setattr(table, "make_plan", planned)
    record = table.compile_cell(table.Cell("grpo", "adapters", "v6e-1", "7B"))
    assert (record["fits"], record["prompts"]) == (True, 32)
    shown = table._shown(record | {"seconds": [4.0, 8.0], "hours": [1.0, 2.0], "price": [2.0, 4.0]})
    assert shown.startswith("32 prompts<br>1.0 GiB")


@pytest.mark.parametrize("program", table.PROGRAMS)
def test_settings_become_smaller(program):
    cell = table.Cell(program, "adapters", "v5e-4", "7B")
    tries = table.settings(cell.config(), cell.slice_)
    peaks = {variant: peak for peak, variant in table._variants(cell.config(), cell.slice_)}
    sizes = [next(peak for variant, peak in peaks.items() if variant == tried) for tried in tries]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= 0.9 * 15.75 * GIB and sizes[-1] == min(peaks.values())
    assert all(tried.model.remat == "full" and tried.adapter.rank == 32 for tried in tries)
    assert batch_places(table._mesh(parse_topology("v5e-4"))) == 4


@needs_libtpu
@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_cell_through_the_compiler(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "Qwen2.5-0.5B", MODEL)
    out = tmp_path / "which.jsonl"
    assert run(out, models="0.5B", chips="v5e-1", modes="adapters", programs="sft") == 0
    record = json.loads(out.read_text())
    assert record["fits"] and 0 < record["peak_gib"] < 15.75 and record["seconds"][0] <= record["seconds"][1]
