"""Figures of the user's own from info: `--log-info`."""

import io
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from rich.console import Console

from fastppo import Config, SimulatorEnv, Trainer, resume
from fastppo.analysis.figures import info_diagnostics
from fastppo.analysis.report import report
from fastppo.analysis.run_data import read_runs
from fastppo.envs.info_sums import MOST_SEEN, InfoSums, join_totals
from fastppo.envs.tensor.info_sums import TensorInfoSums
from fastppo.errors import ConfigError
from fastppo.monitoring.info_monitor import InfoMonitor
from tests.envs.worlds import Scored
from tests.worlds import short

KEYS = ("success", "terms/*")
N, T = 5, 12


def figures(run_dir):
    """The figures of each line of metrics.jsonl."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{tag: x for tag, x in row.items() if tag.startswith("info/")} for row in rows]


def train(tmp_path, make_env=Scored, console=None, **settings):
    settings = {"n_envs": N, "n_steps": T, "total_timesteps": 4 * N * T, "log_info": KEYS, "threads": 1} | settings
    trainer = Trainer(short(tmp_path, compile="off", **settings), make_env=make_env, console=console)
    trainer.run()
    return figures(trainer.run_dir)


def definition(iterations=4):
    """The figures of Scored by their definition: every environment has the same episodes."""
    steps, episode, found = 0, 0, []
    for _ in range(iterations):
        even, deep, success = [], [], []
        for _ in range(T):
            steps += 1
            even.append(float(steps % 2 == 0))
            deep.append(float(np.float32(steps / 3)))
            if steps == (3 if episode == 0 else 5):
                success.append(float(episode % 3 == 0))
                steps, episode = 0, episode + 1
        means = {"success": success, "terms/deep/steps": deep, "terms/even": even}
        found.append({f"info/{name}": sum(x) / len(x) for name, x in means.items() if x})
    return found


def expected(rows):
    return [{tag: pytest.approx(x, rel=1e-12) for tag, x in row.items()} for row in rows]


def test_figures_are_means_over_the_steps_that_have_the_key(tmp_path):
    found = train(tmp_path)
    assert found == expected(definition())
    assert list(found[0]) == ["info/success", "info/terms/deep/steps", "info/terms/even"]  # in the order of patterns


@pytest.mark.parametrize("settings", [{"vectorization": "pool", "workers": 2}, {"vectorization": "async"}])
def test_every_vectorisation_of_python_environments_gives_the_same_bits(tmp_path, settings):
    if settings["vectorization"] == "pool":
        settings = settings | {"half_batches": True}
    assert train(tmp_path / "other", **settings) == train(tmp_path / "sync")


class Disabled(VectorEnv):
    """Scored with autoreset disabled."""

    def __init__(self):
        self.inner = SyncVectorEnv([Scored] * N, autoreset_mode=AutoresetMode.DISABLED)
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        for name in ("num_envs", "single_observation_space", "single_action_space"):
            setattr(self, name, getattr(self.inner, name))
        self.observation_space, self.action_space = self.inner.observation_space, self.inner.action_space
        self.reset, self.step = self.inner.reset, self.inner.step


def test_vector_environments_of_the_users_own(tmp_path):
    def same_step():
        return SyncVectorEnv([Scored] * N, autoreset_mode=AutoresetMode.SAME_STEP)

    for name, make in {"same": same_step, "disabled": Disabled}.items():
        assert train(tmp_path / name, make, n_envs=None) == expected(definition()), name


def test_filler_rows_of_next_step_autoreset_do_not_count(tmp_path):
    def make():
        return SyncVectorEnv([Scored] * N, autoreset_mode=AutoresetMode.NEXT_STEP)

    (first, *_) = train(tmp_path, make, n_envs=None)
    # 12 rows hold 3, 5 and 2 steps, with a row that only resets after each episode
    steps = [1, 2, 3, 1, 2, 3, 4, 5, 1, 2]
    assert first == {
        "info/success": 0.5,
        "info/terms/even": pytest.approx(sum(x % 2 == 0 for x in steps) / 10),
        "info/terms/deep/steps": pytest.approx(sum(steps) / 30, rel=1e-6),
    }


@pytest.mark.filterwarnings("ignore:.*precision lowered")
def test_envpool(tmp_path):
    pytest.importorskip("envpool")
    keys = ("elapsed_step", "players/*")
    found = train(tmp_path, None, env_id="CartPole-v1", vectorization="envpool", log_info=keys, n_steps=4)
    # no episode of CartPole ends within 4 steps
    assert found[0] == {"info/elapsed_step": 2.5, "info/players/env_id": 2.0}
    assert all(row.keys() == found[0].keys() for row in found)


class Simulator:
    """Scored in tensors; `final_info` as ManiSkill gives it, `log/rate` as a number of the whole step."""

    num_envs = 3

    def reset(self):
        self.steps, self.t = torch.zeros(3, dtype=torch.int64), 0
        return torch.zeros(3, 2)

    def step(self, actions):
        self.t, taken = self.t + 1, self.steps + 1
        over = taken >= 2 + torch.arange(3)
        self.steps = torch.where(over, 0, taken)
        extras = {"terms": {"taken": torch.where(over, 1000, taken)}, "odd": torch.zeros(3, 2)}
        extras["final_info"] = {"terms": {"taken": taken}, "success": taken % 2 == 0}
        if self.t % 2:
            extras["log"] = {"rate": torch.tensor(self.t / 2), "plain": self.t}
        return torch.zeros(3, 2), torch.ones(3), over, torch.zeros(3, dtype=torch.bool), extras


def test_simulators_keep_their_sums_on_the_device(tmp_path):
    box, two = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)
    out = io.StringIO()
    keys = ("success", "terms/*", "log/*", "odd")
    settings = {"n_envs": 3, "n_steps": 6, "n_minibatches": 1, "total_timesteps": 18, "log_info": keys}
    simulator = SimulatorEnv(Simulator(), box, two)
    (found,) = train(tmp_path, lambda: simulator, Console(file=out, width=300), **settings)
    taken = [[1, 2, 1, 2, 1, 2], [1, 2, 3, 1, 2, 3], [1, 2, 3, 4, 1, 2]]
    assert found == {
        "info/success": (3 + 0 + 1) / (3 + 2 + 1),
        "info/terms/taken": pytest.approx(sum(map(sum, taken)) / 18),
        "info/log/rate": 1.5,  # steps 1, 3 and 5
        "info/log/plain": 3.0,
    }
    assert "--log-info odd: info holds an array of shape (3, 2), not a number" in out.getvalue()


def test_a_step_of_a_simulator_reads_nothing_back():
    """On the meta device nothing can be read back: a read raises."""
    sums, tensors = TensorInfoSums(["*"], 4), torch.zeros(4, device="meta")
    extras = {"a": tensors, "_a": tensors.bool(), "b": tensors[0], "c": 2.0, "final_info": {"a": tensors, "d": tensors}}
    sums.add(extras, tensors.bool())
    assert set(sums._totals) == {"a", "b", "c", "d"}


def test_infos_as_vector_environments_may_give_them():
    ended, everyone = np.array([False, True, False]), np.ones(3, bool)
    infos = {
        "x": np.array([1.0, 50.0, 3.0]),
        "_x": np.array([True, True, False]),
        "whole": 7.0,
        "_whole": 0.5,  # no mask
        "mixed": np.array([1, None, 2.5], object),
        "_mixed": np.array([True, False, True]),
        "final_info": np.array([None, {"x": 2.0, "deep": {"y": 4}}, None], object),
        "_final_info": ended,
    }
    totals = {name: x.tolist() for name, x in _add_batch(infos, ended).totals.items()}
    assert totals == {
        "x": [[1, 2, 0], [1, 1, 0]],
        "whole": [[7, 0, 0], [1, 0, 0]],
        "_whole": [[0.5, 0, 0], [1, 0, 0]],
        "mixed": [[1, 0, 2.5], [1, 0, 1]],
        "deep/y": [[0, 4, 0], [0, 1, 0]],
    }
    # NaN where another environment has the key must not spread, nor that of a row which only resets
    infos = {"x": np.array([1.0, math.nan, math.nan]), "_x": np.array([True, False, True])}
    real = np.array([True, True, False])
    assert _add_batch(infos, ~everyone, real).totals["x"].tolist() == [[1, 0, 0], [1, 0, 0]]


def _add_batch(infos, ended, real=None):
    sums = InfoSums(["*"], len(ended))
    sums.add_batch(infos, ended, real)
    return sums.take()


def test_odd_values_are_named_once_and_missing_keys_are_noted(tmp_path):
    out = io.StringIO()
    keys = ("name", "vector", "nothing", "number", "only_reset", "succes")
    found = train(tmp_path, lambda: Scored(odd=True), Console(file=out, width=300), log_info=keys)
    assert found == [{"info/number": 2.5}] * 4
    text = out.getvalue()
    for name, what in {"name": "'seven'", "vector": "an array of shape (3,)", "nothing": "None"}.items():
        assert text.count(f"--log-info {name}: info holds {what}, not a number; it is left out.") == 1
    held = "it held terms/even, terms/deep/steps, name, vector, nothing, number, success."
    line = f"--log-info only_reset succes: no such key in info in {N * T} steps and {2 * N} episodes; {held}"
    assert text.count(line) == text.count("no such key") == 1


def test_environments_without_info_are_named(tmp_path):
    out = io.StringIO()
    settings = {"env_id": "CartPole-v1", "vectorization": "native", "n_steps": 32}
    found = train(tmp_path, None, Console(file=out, width=300), log_info=("success",), **settings)
    assert found == [{}] * 1
    assert "--log-info success: no such key in info" in out.getvalue()
    assert "it held nothing at all." in out.getvalue()


def test_tensor_environments_are_refused():
    with pytest.raises(ConfigError, match=r"these environments give no info; use sync, pool or async"):
        Config(vectorization="tensor", log_info=("success",))


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_refused(empty):
    with pytest.raises(ConfigError, match="log_info holds an empty name; name keys of info"):
        Config(log_info=("success", empty))


def test_keys_without_end_take_no_memory_without_end():
    sums = InfoSums(["wanted"], 1)
    for k in range(3000):
        sums.add(0, {f"key{k}": 1.0})
    assert len(sums.take().seen) == MOST_SEEN
    assert sums._selection.chooses.cache_info().currsize <= 1024


def test_totals_of_processes_are_pooled():
    """Two processes give the figures that one with all environments gives."""
    parts, together = [InfoSums(["*"], 2) for _ in range(2)], InfoSums(["*"], 4)
    for i in range(4):
        info = {"all": 0.1 * i} | ({"some": 0.3} if i > 1 else {})
        parts[i // 2].add(i % 2, info)
        together.add(i, info)
    joined, whole = join_totals([part.take() for part in parts]), together.take()
    assert joined.n_envs == 4
    assert {k: x.tolist() for k, x in joined.totals.items()} == {k: x.tolist() for k, x in whole.totals.items()}


class TwoRanks:
    """A world whose other process has the same infos, and one key more."""

    def gather_objects(self, x):
        other = InfoSums(["*"], 1)
        other.add(0, {"success": 0.0, "theirs": 8.0})
        return [x, other.take()]


def test_the_figures_of_ranks_are_means_over_all_their_steps(tmp_path):
    mine, said = InfoSums(["*"], 1), []
    mine.add(0, {"success": 1.0})
    mine.add(0, {"success": 1.0})

    class Env:
        def read_info(self):
            return mine.take()

    class Row:
        scalars, episodes, global_step = {}, 1, 3

    InfoMonitor(Env(), ["success", "*"], TwoRanks(), said.append)(Row)
    assert Row.scalars == {"info/success": pytest.approx(2 / 3), "info/theirs": 8.0}
    assert said == []


def test_a_replaced_worker_sums_on(tmp_path):
    """The worker that replaces a lost one knows the keys."""
    from fastppo.envs.fault_policy import FaultPolicy
    from fastppo.envs.pool import PoolVectorEnv

    pool = PoolVectorEnv([Scored] * 2, n_workers=1, fault_policy=FaultPolicy(restarts=2))
    try:
        pool.log_info(["terms/even"])
        pool.reset(seed=0)
        actions = np.zeros(2, np.int64)
        pool.step(actions)
        assert pool.read_info().totals["terms/even"].tolist() == [[0, 0], [1, 1]]
        pool._workers[0].process.kill()
        pool.step(actions)  # lost: the new worker resets
        pool.step(actions)
        pool.step(actions)
        assert pool.read_info().totals["terms/even"].tolist() == [[1, 1], [2, 2]]
    finally:
        pool.close()


@pytest.mark.parametrize("vectorization", ["sync", "pool"])
def test_a_resumed_run_logs_the_same_figures(tmp_path, vectorization):
    whole = train(tmp_path / "whole", vectorization=vectorization)
    settings = {"n_envs": N, "n_steps": T, "log_info": KEYS, "threads": 1, "vectorization": vectorization}
    config = short(tmp_path / "cut", compile="off", total_timesteps=4 * N * T, **settings)
    trainer = Trainer(config, make_env=Scored)
    for stats in trainer.iterations():
        if stats.iteration == 2:
            break
    resume(trainer.run_dir, make_env=Scored).run()
    assert figures(trainer.run_dir) == whole


def test_figures_change_no_number_of_the_training(tmp_path):
    vectors = []
    for keys in ((), KEYS):
        config = short(tmp_path / str(len(keys)), compile="off", threads=1, log_info=keys)
        trainer = Trainer(config, make_env=Scored)
        trainer.run()
        vectors.append(trainer.update.parameters.vector)
    assert torch.equal(*vectors)


def test_every_sink_and_the_report_show_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = io.StringIO()
    rows = train(tmp_path, console=Console(file=out, width=300))
    run = tmp_path / "run"
    found = EventAccumulator(str(run))
    found.Reload()
    logged = [event.value for event in found.Scalars("info/terms/even")]
    assert logged == pytest.approx([row["info/terms/even"] for row in rows])
    last = rows[-1]
    line = f"success {last['info/success']:.3g}  terms/deep/steps {last['info/terms/deep/steps']:.3g}"
    assert line in out.getvalue()
    (data,) = read_runs([run])
    assert [(d.title, [name for _, name in d.lines]) for d in info_diagnostics([data])] == [
        ("info/success", [""]),
        ("info/terms/deep", ["steps"]),
        ("info/terms", ["even"]),
    ]
    report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Figures from info" in page
    assert "<figcaption>info/terms</figcaption>" in page
    train(tmp_path / "without", log_info=())
    report([tmp_path / "without" / "run"], tmp_path / "page.html")
    assert "Figures from info" not in (tmp_path / "page.html").read_text()


def test_rows_of_several_iterations_hold_the_mean_of_those_that_have_a_key(tmp_path):
    def make():
        return Scored(ends=((15, False),))  # no episode ends in the first iteration

    each, both = train(tmp_path / "1", make), train(tmp_path / "2", make, log_every=2, record_ratios=0)
    assert "info/success" not in each[0]
    for row, pair in zip(both, (each[:2], each[2:]), strict=True):
        for tag in ("info/success", "info/terms/even"):
            values = [figures[tag] for figures in pair if tag in figures]
            assert row[tag] == pytest.approx(sum(values) / len(values))


def test_the_group_is_the_runs_own(tmp_path):
    trainer = Trainer(short(tmp_path, compile="off"), make_env=Scored)
    for _ in trainer.iterations():
        with pytest.raises(ValueError, match="another group than .*info"):
            trainer.log("info/success", 1.0)
        break


class Silent(gym.Wrapper):
    """Returns None as info, as no environment should."""

    def step(self, action):
        return *super().step(action)[:4], None


def test_an_info_that_is_no_dict_holds_nothing(tmp_path):
    assert train(tmp_path, lambda: Silent(Scored())) == [{}] * 4
