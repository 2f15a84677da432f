"""Where the scheduler's settings come from, and what wrong ones say."""

from pathlib import Path

import pytest

from scheduler_service.config import ConfigError, ProcessSpec, load_settings
from scheduler_service.listen import PortInUseError, reserve_port


def test_flags_override_environment_which_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "baton.toml"
    file.write_text('model = "/m"\nport = 1\nlease = 1.5\nrun_ahead = 3\n')
    monkeypatch.setenv("BATON_SCHEDULER_PORT", "2")
    monkeypatch.setenv("BATON_SCHEDULER_RUN_AHEAD", "4")
    settings = load_settings(["--config", str(file), "--run-ahead", "auto"])
    assert (settings.model, settings.lease, settings.port, settings.run_ahead) == (Path("/m"), 1.5, 2, "auto")


def test_child_processes_see_the_settings_as_they_were_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ProcessSpec(settings=load_settings(["--model", "/m", "--port", "7"]), scheduler_id="s", engine_endpoint="e")
    monkeypatch.setenv("BATON_SCHEDULER_PORT", "9")
    assert ProcessSpec.model_validate_json(spec.model_dump_json()).settings.port == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model: Field required"),
        (["--model", "m", "--port", "70000"], "--port: Input should be less than"),
        (["--model", "m", "--run-ahead", "9"], "--run-ahead: Input should be 'auto' or Input should be less than"),
        (["--model", "m", "--bogus"], "--bogus"),
        (["--model", "m", "--config", "/missing.toml"], "cannot read /missing.toml"),
        (["--model", "m", "--port", "7", "--health-port", "7"], "--port and --health-port must not be the same"),
        (
            ["--model", "m", "--health-port", "7", "--metrics-port", "7", "--metrics-host", "0.0.0.0"],
            "--health-port and --metrics-port must not be the same",
        ),
    ],
)
def test_wrong_settings_end_in_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_settings(arguments)
    assert "\n" not in str(caught.value)


def test_one_port_may_be_used_at_several_addresses() -> None:
    load_settings(["--model", "m", "--port", "7", "--host", "10.0.0.1", "--health-port", "7"])


def test_a_port_in_use_is_an_error_also_between_schedulers() -> None:
    with reserve_port("127.0.0.1", 0, shared=True) as first:
        for shared in (False, True):
            with pytest.raises(PortInUseError, match="in use"):
                reserve_port("127.0.0.1", first.port, shared=shared)
    with reserve_port("127.0.0.1", first.port, shared=False) as again:
        assert again.port == first.port
