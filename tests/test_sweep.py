"""`dynamoe sweep` on the shipped model: the table, failures, going on, plots, configurations to serve, ablations."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from dynamoe import Quality
from dynamoe.dynamic.cli.main import main
from dynamoe.dynamic.cli.targets import check_arguments, refuse_foreign_targets
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.studies.report import comparisons, pareto, swept, tidy, write_report, write_serve_configs
from dynamoe.serve.settings import ServerSettings
from omegaconf import OmegaConf

SMALL = ["model=tiny", "requests=4", "texts=4", "max_tokens=8", "timing_groups=2", "engine.max_num_seqs=4"]
GRID = ["quality.alpha=null,0.05", "quality.experts_per_token=null,1"]
QUALITY = ["agreement", "forced_agreement", "kl", "perplexity", "layers_share", "flops_share"]


def sweep(output: Path, *arguments: str) -> int:
    """The exit code; a failed job's is 1."""
    try:
        return main(["sweep", *SMALL, f"output={output}", *arguments])
    except SystemExit as error:
        return int(error.code or 0)


@pytest.fixture(scope="module")
def swept_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sweep")
    assert sweep(output, *GRID) == 1  # a contract and a cap contradict each other: that job fails
    return output


@pytest.fixture(scope="module")
def table(swept_once: Path) -> pd.DataFrame:
    return pd.read_csv(swept_once / "table.csv")


def test_every_job_is_a_row_and_a_failed_one_says_why(table: pd.DataFrame) -> None:
    assert len(table) == 4
    failed = table[table["error"].notna()]
    assert len(failed) == 1
    assert "quality.alpha and quality.experts_per_token contradict each other" in failed["error"].iloc[0]
    assert failed["config.quality.alpha"].iloc[0] == 0.05
    assert failed["agreement"].isna().all()
    assert table[table["error"].isna()]["agreement"].between(0, 1).all()


def test_a_row_holds_what_its_numbers_depend_on(table: pd.DataFrame, swept_once: Path) -> None:
    good = table[table["error"].isna()]
    assert (good["config.seed"] == 0).all()
    assert good["git_revision"].str.fullmatch(r"none|[0-9a-f]{40}(-dirty)?").all()
    for name in ("deployment.weights", "deployment.exits", "deployment.contributions"):
        assert good[name].str.fullmatch("[0-9a-f]{64}").all()
    for name in (*QUALITY, "tokens_per_second", "speed"):
        assert (good[f"{name}_low"] <= good[name]).all()
        assert (good[name] <= good[f"{name}_high"]).all()
    parquet = pd.read_parquet(swept_once / "table.parquet")
    assert list(parquet) == list(table)
    np.testing.assert_allclose(parquet["agreement"], table["agreement"])
    exact = good[good["config.quality.alpha"].isna() & good["config.quality.experts_per_token"].isna()]
    assert exact["agreement"].tolist() == exact["flops_share"].tolist() == [1.0]


def test_finished_jobs_are_not_run_again_and_failed_ones_are(swept_once: Path) -> None:
    files = {file: file.stat().st_mtime_ns for file in (swept_once / "jobs").glob("*.json")}
    lost = next(file for file in files if "error" not in json.loads(file.read_text()))
    lost.unlink()  # as if the sweep had been killed before this job
    before = pd.read_csv(swept_once / "table.csv")
    assert sweep(swept_once, *GRID) == 1
    for file, changed in files.items():
        again = file == lost or "error" in json.loads(file.read_text())
        assert (file.stat().st_mtime_ns != changed) == again
    after = pd.read_csv(swept_once / "table.csv")
    # One seed, equal numbers: those of the job that was measured twice too.
    pd.testing.assert_frame_equal(before[QUALITY], after[QUALITY])


def test_plots_are_drawn_and_the_page_needs_no_network(swept_once: Path) -> None:
    assert (swept_once / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    page = (swept_once / "pareto.html").read_text()
    assert len(page) > 1_000_000, "plotly's own code is not in it"
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    assert "operations per decoded token" in page
    assert "output tokens per second" in page


def test_points_are_written_as_configurations_that_serve_takes(
    swept_once: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((swept_once / "serve" / "point").glob("*.yaml"))
    assert files
    for file in files:
        capsys.readouterr()
        assert main(["serve", "--config-dir", str(swept_once / "serve"), f"+point={file.stem}", "--cfg", "job"]) == 0
        shown = capsys.readouterr().out
        assert "model: tiny" in shown
        assert "max_num_seqs: 4" in shown
        assert main(["serve", "--config-dir", str(swept_once / "serve"), "+point=99", "--cfg", "job"]) == 2


def test_a_server_runs_a_point_and_keeps_its_contract(start_server, swept_once: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(swept_once / "table.parquet")
    point = table[(table["config.quality.alpha"] == 0.05) & table["error"].isna()]
    point = point.assign(label="a contract", **{"setting.promised": True})
    assert write_serve_configs(point, tmp_path) == 1
    server = start_server(resolve_model("tiny"), "--config-dir", str(tmp_path), "+point=01")
    body = {"prompt": "To install the package,", "temperature": 0, "max_tokens": 8}
    asked = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["usage"]["compute"]
    assert asked["certificates"] or "alpha=0.05" in asked["reason"]
    exact = httpx.post(f"{server.url}/v1/completions", json={**body, "quality": "exact"}, timeout=60).json()
    assert exact["usage"]["compute"]["quality"] == "exact"
    assert exact["usage"]["compute"]["reason"] is None


def test_a_default_contract_is_checked() -> None:
    assert ServerSettings().default_quality is None
    assert ServerSettings(default_alpha=0.1).default_quality == Quality(alpha=0.1, delta=0.05)
    with pytest.raises(ValueError, match=r"server.default_alpha must be between 0 and 1, not 2"):
        ServerSettings(default_alpha=2)


def test_raw_settings_are_not_offered_to_servers(table: pd.DataFrame, tmp_path: Path) -> None:
    capped = table[(table["config.quality.experts_per_token"] == 1) & table["error"].isna()].copy()
    assert len(capped) == 1
    assert write_serve_configs(capped.assign(label="a cap"), tmp_path) == 0


def test_all_failed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "quality.exit_threshold=2,3") == 2
    assert "dynamoe sweep: all 2 jobs failed; the first: exit_threshold=2" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "table.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quality.alpah=0.1,0.2"], "there is no key quality.alpah"),
        (["experiment=luck"], "there is no preset experiment=luck; there are: calibration_method"),
        (["requests=many,4"], "requests"),
    ],
)
def test_mistakes_that_no_job_could_mend_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_pairs_differ_in_one_key_alone() -> None:
    generator = np.random.default_rng(0)
    records = []
    for share in (0.9, 0.8):
        first = generator.random(30)
        for rule, values in (("a", first), ("b", first + share / 10)):
            records.append(
                {
                    "config": {"model": "m", "rule": rule, "share": share},
                    "metrics": {"kl": {"value": values.mean(), "low": 0.0, "high": 2.0}},
                    "by_request": {"kl": values.tolist()},
                }
            )
    frame = tidy(records)
    assert swept(frame) == ["config.rule", "config.share"]
    pairs = comparisons(records, frame, "rule")
    assert pairs[["first", "second", "metric"]].to_numpy().tolist() == [["a", "b", "kl"]] * 2
    assert pairs["difference"].tolist() == pytest.approx([0.09, 0.08])
    with pytest.raises(ValueError, match="compare=model: no jobs differ in that key; they do in rule, share"):
        comparisons(records, frame, "model")


def test_pareto_keeps_what_nothing_beats() -> None:
    costs, qualities = pd.Series([1.0, 2.0, 2.0, 3.0, 1.0]), pd.Series([1.0, 3.0, 2.0, 3.0, 1.0])
    assert pareto(costs, qualities).tolist() == [True, True, False, False, True]


def test_a_metric_that_was_not_measured_is_named(swept_once: Path, tmp_path: Path) -> None:
    records = [json.loads(file.read_text()) for file in sorted((swept_once / "jobs").glob("*.json"))]
    with pytest.raises(ValueError, match=r"quality_metric=luck was not measured; there are: .*agreement"):
        write_report(tmp_path, records, None, "luck")


def test_the_ablation_of_calibrations_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ["calibration.probabilities=[0.98,0.6]", "calibration.alpha=0.3", "requests=12", "calibration.size=40"]
    methods = "calibration.method=hoeffding_bentkus,conformal_risk_control"
    assert sweep(tmp_path, "experiment=calibration_method", *path, "calibration.resamples=50", methods) == 0
    table = pd.read_csv(tmp_path / "table.csv").set_index("config.calibration.method")
    assert table["layers_share"].between(0, 1).all()
    assert table["violations"].between(0, 1).all()
    # An expectation is easier to keep than a probability: it saves at least as much.
    assert table.loc["conformal_risk_control", "layers_share"] <= table.loc["hoeffding_bentkus", "layers_share"]
    assert len(list(tmp_path.glob("losses/*/setting-*.json"))) == 2, "the losses were measured once for both"


FOREIGN = [
    (
        "hydra:\n  callbacks:\n    mine:\n      _target_: os.mkdir\n",
        "_target_ must be in dynamoe or a plug-in of Hydra, not 'os.mkdir'",
    ),
    ("a:\n  - _target_: dynamoe.dynamic.cli.main.os.getcwd\n", "only imported there"),
    ("a:\n  _target_: dynamoe.nothing.here\n", "is not there"),
    ("a:\n  _target_: dynamoe_evil.run\n", "must be in dynamoe"),
    ("a:\n  _target_: ${oc.env:HOME}\n", "must be in dynamoe"),
    ("hydra:\n  job_logging:\n    handlers:\n      x:\n        (): os.mkdir\n", "logging factory"),
    ("hydra:\n  launcher:\n    setup: [touch made]\n", "setup runs code"),
    ("a:\n  _target_: hydra_plugins.hydra_joblib_launcher.joblib_launcher.SearchPathPlugin\n", "is not there"),
    ("a:\n  _target_: hydra_plugins.hydra_joblib_launcher.config.JobLibLauncherConf\n", "is no Plugin"),
    ("hydra:\n  searchpath: [file:///tmp]\n", "searchpath is not allowed"),
    ("engine:\n  logits_processors: [evil.py:Rule]\n", "logits_processors runs code"),
    ("a: [\n", "cannot be read"),
]


@pytest.mark.parametrize(("text", "message"), FOREIGN)
def test_a_file_with_a_foreign_target_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\n" + text)
    arguments = ["--config-dir", str(tmp_path / "conf"), "experiment=mine", f"output={tmp_path / 'out'}"]
    assert main(["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argument",
    [
        "+hydra.callbacks.mine._target_=os.getcwd",
        "hydra.callbacks.sweep._target_=subprocess.Popen",
        "+hydra.callbacks.mine={_target_:os.getcwd}",
        "hydra.searchpath=[file:///tmp]",
    ],
)
def test_a_foreign_target_on_the_command_line_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=r"must be in dynamoe|not allowed"):
        check_arguments([argument])


def test_targets_of_our_own_and_the_launchers_are_allowed() -> None:
    ours = {"_target_": "dynamoe.dynamic.cli.sweep.SweepCallback"}
    joblib = {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}
    sweeper = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"}
    refuse_foreign_targets({"hydra": {"callbacks": {"sweep": ours}, "launcher": joblib, "sweeper": sweeper}}, "here")


@pytest.mark.parametrize("wanted", ["hydra_optuna_sweeper", "hydra_submitit_launcher"])
def test_plug_ins_that_are_installed_are_allowed(wanted: str) -> None:
    pytest.importorskip(f"hydra_plugins.{wanted}")
    targets = {
        "hydra_optuna_sweeper": ("hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper", "optuna.samplers.TPESampler"),
        "hydra_submitit_launcher": ("hydra_submitit_launcher.submitit_launcher.SlurmLauncher",),
    }
    for name in targets[wanted]:
        target = name if name.startswith("optuna.") else f"hydra_plugins.{name}"
        refuse_foreign_targets({"hydra": {"plugin": {"_target_": target}}}, "here")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_optuna_searches_for_the_objective(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    space = ["quality.exit_threshold=interval(0.5,0.99)", "hydra.sweeper.direction=[maximize,minimize]"]
    assert sweep(tmp_path, *search, *space, "objective=[agreement,layers_share]") == 0
    table = pd.read_csv(tmp_path / "table.csv")
    assert len(table) == 3
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    measured = {tuple(row) for row in table[["agreement", "layers_share"]].round(9).to_numpy().tolist()}
    assert {tuple(round(v, 9) for v in solution["values"]) for solution in best.solutions} <= measured


def test_an_objective_that_is_not_measured_ends_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "requests=2", "texts=2", "max_tokens=2", "objective=[beauty]") == 2
    assert "objective=beauty was not measured; there are: agreement" in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_run_side_by_side_with_joblib(tmp_path: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert sweep(tmp_path, "quality.exit_threshold=0.9,7", *launcher) == 1
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["error"].notna().tolist() == [False, True]


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dynamoe", "sweep", *SMALL, f"output={tmp_path}", "seed=0,1,2,3"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("jobs/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in tmp_path.glob("jobs/*.json")}
    assert 1 <= len(done) < 4
    assert sweep(tmp_path, "seed=0,1,2,3") == 0
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert len(pd.read_csv(tmp_path / "table.csv")) == 4


@pytest.mark.slow
def test_the_ablation_of_probes_runs(tmp_path: Path) -> None:
    few = ["probes.steps=20", "probes.exit_rows=6000", "probes.served_prompts=16", "quality.exit_threshold=0.9"]
    assert sweep(tmp_path, "experiment=probe_kind", "probes.kind=linear,mlp", *few) == 0
    assert set(pd.read_csv(tmp_path / "comparison.csv")["metric"]) == {"agreement", "forced_agreement", "kl", "nll"}
    assert len(pd.read_csv(tmp_path / "table.csv")["deployment.exits"].unique()) == 2
