"""What can't run here is at least read by what will read it: systemd, compose, Helm, Kubernetes' schemas."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command

from medveil.agent.cli import app as agent_app
from medveil.agent.policy import SitePolicy, load_policy
from medveil.coordinator.cli import app as coordinator_app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
EXAMPLE = DEPLOY / "site.example.toml"
CHART = DEPLOY / "helm" / "medveil"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMPOSE = DEPLOY / "compose" / "compose.yaml"

_OFF = re.compile(r"^# (?=\[[a-z_.]+\]$|[a-z_]+ = )", re.MULTILINE)
"""A key or a table that is switched off, in the way the file's first lines explain."""

_EXPOSURE = 2.0
"""systemd's own score of a unit, 0 to 10, from which on it says "OK" and no more "safe": our units stay below."""


_OTHERWISE = re.compile(r"^# or: ", re.MULTILINE)
"""A key that excludes another."""


def switched_on() -> str:
    return _OFF.sub("", EXAMPLE.read_text(encoding="utf-8"))


# -- the policy


def test_the_example_policy_is_what_holds_without_one() -> None:
    assert load_policy(EXAMPLE) == SitePolicy()


def test_every_key_that_is_off_would_be_valid(tmp_path: Path) -> None:
    authority, whole = tmp_path / "ca.pem", tmp_path / "site.toml"
    authority.touch()
    whole.write_text(re.sub(r"/etc/medveil/[a-z-]+\.pem", str(authority), switched_on()), encoding="utf-8")
    everything = load_policy(whole)
    assert everything.campaigns is not None
    assert everything.egress is not None


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in tables_in(field.annotation):
            yield from keys_of(part, f"{prefix}{name}.")


def tables_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from tables_in(part)


def test_every_key_of_the_policy_is_explained_in_the_example() -> None:
    settings = tomllib.loads(_OTHERWISE.sub("", switched_on()))

    def written(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in table.items():
            yield prefix + name
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, dict):
                    yield from written(part, f"{prefix}{name}.")

    missing = set(keys_of(SitePolicy)) - set(written(settings))
    assert not missing, f"deploy/site.example.toml doesn't say what these keys are: {sorted(missing)}"
    assert {"windows.may_guess", "campaigns.source"} <= set(keys_of(SitePolicy))


def test_every_key_in_the_example_has_a_comment_before_it() -> None:
    explained = False
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if not line:
            explained = False
        elif line.startswith("#") and not _OFF.match(line) and not _OTHERWISE.match(line):
            explained = True
        else:
            assert explained, line


# -- commands that the files call


def commands() -> list[tuple[str, ...]]:
    found = []
    for unit in UNITS:
        (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
        found.append(tuple(Path(word).name if "/opt/" in word else word for word in line.split()))
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    found += [tuple(service["command"]) for service in services.values()]
    found.append(tuple(services["site"]["healthcheck"]["test"][1:]))
    return found


def test_every_command_and_option_exists() -> None:
    apps = {"medveil-agent": get_command(agent_app), "medveil-coordinator": get_command(coordinator_app)}
    called = commands()
    assert len(called) == 6
    for program, *words in called:
        command: Any = apps[program]
        while words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words.pop(0)]
        known = {option for p in command.params for option in p.opts}
        assert not hasattr(command, "commands"), (program, words)
        assert {word for word in words if word.startswith("--")} <= known, (program, words)


# -- systemd


@pytest.fixture
def installed_units(tmp_path: Path) -> list[Path]:
    """The units, with the programs, users and files they name put where this machine has them."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    units = []
    for unit in UNITS:
        text = re.sub(r"/opt/medveil/bin/\S+", str(program), unit.read_text())
        copy = tmp_path / unit.name
        copy.write_text(re.sub(r"^(User|Group)=.*$", r"\1=root", text, flags=re.MULTILINE))
        units.append(copy)
    return units


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze isn't installed here")
def test_systemd_reads_the_units_without_a_complaint(installed_units: list[Path]) -> None:
    names = ["medveil-agent.service", "medveil-coordinator.service", "medveil-pacs.service"]
    assert [unit.name for unit in installed_units] == names
    for unit in installed_units:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
        )
        said = [line for line in done.stderr.splitlines() if unit.name in line or str(unit) in line]
        assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze isn't installed here")
def test_a_unit_with_a_wrong_line_would_be_noticed(installed_units: list[Path]) -> None:
    unit = installed_units[0]
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystem=strictly"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert unit.name in done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze isn't installed here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_finds_the_units_hardened(unit: Path) -> None:
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=true",
            "--no-pager",
            f"--threshold={10 * _EXPOSURE:g}",
            unit,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_no_unit_lets_a_core_dump_be_written() -> None:
    assert all("LimitCORE=0" in unit.read_text() for unit in UNITS)


# -- compose


def test_compose_accepts_its_file(tmp_path: Path) -> None:
    command = _compose_command()
    done = subprocess.run(
        [*command, "-f", COMPOSE, "--profile", "site", "--profile", "coordinator", "config"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "medveil-agent" in done.stdout


def _compose_command() -> list[str]:
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and not subprocess.run([*command, "version"], capture_output=True, check=False).returncode
        ):
            return command
    pytest.skip("neither docker compose nor docker-compose is installed here")


def test_both_containers_are_shut_off_and_a_site_opens_no_port() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["user"].split(":")[0].isdecimal()
    assert "ports" not in services["site"]
    assert next(v for v in services["site"]["volumes"] if ":/images" in v).endswith(":ro")


def test_the_image_is_built_from_what_is_there_and_is_not_run_by_root() -> None:
    text = (DEPLOY / "compose" / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    (extras,) = re.findall(r'pip install .*"\.\[(.*)\]"', text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["10001:10001"]


# -- Helm

VALUES = {
    "site": {
        "enabled": True,
        "policy": EXAMPLE.read_text(encoding="utf-8"),
        "joinSecret": "invitation",
        "imagesClaim": "images",
        "releasesClaim": "releases",
        "networkPolicy": {"coordinatorCidrs": ["192.0.2.1/32"]},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
    },
    "coordinator": {"enabled": True, "name": "coordinator.example"},
}


@pytest.fixture
def helm() -> ModuleType:
    """Helm's own code, as a library (extra [dev])."""
    import helm_python

    return helm_python


@pytest.mark.dev
@pytest.mark.parametrize("values", [{}, VALUES], ids=["nothing on", "both sides"])
def test_helm_finds_nothing_wrong_with_the_chart(helm: ModuleType, values: dict[str, Any]) -> None:
    found = helm.lint(str(CHART), values, strict=True)
    assert found["total_charts_linted"] == 1
    assert not found["errors"]
    assert not [m for m in found["messages"] if m["severity"] >= 2]


@pytest.mark.dev
@pytest.mark.parametrize(
    "wrong",
    [
        {"site": {**VALUES["site"], "policy": ""}},
        {"site": {**VALUES["site"], "imagesClaim": ""}},
        {"coordinator": {"enabled": True}},
        {"siet": {}},
    ],
)
def test_helm_refuses_values_that_lack_something_or_are_misspelt(
    helm: ModuleType, wrong: dict[str, Any]
) -> None:
    with helm.Chart.load(str(CHART)) as chart, pytest.raises(helm.HelmError):
        chart.render(wrong, name="x", namespace="n")


def rendered(helm: ModuleType, values: dict[str, Any]) -> list[dict[str, Any]]:
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="x", namespace="n")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


@pytest.mark.dev
def test_kubernetes_knows_every_field_that_the_chart_writes(helm: ModuleType) -> None:
    import kubernetes_validate as schemas

    objects = rendered(helm, VALUES)
    kinds = sorted(found["kind"] for found in objects)
    assert kinds == ["ConfigMap", "NetworkPolicy", "Service", "StatefulSet", "StatefulSet"]
    for found in objects:
        schemas.validate(found, "1.30", strict=True)
    wrong = json.loads(json.dumps(objects[-1]))
    wrong["spec"]["replica"] = 1
    with pytest.raises(schemas.ValidationError):
        schemas.validate(wrong, "1.30", strict=True)


@pytest.mark.dev
def test_every_pod_is_shut_off_and_the_policy_arrives_as_it_is(helm: ModuleType, tmp_path: Path) -> None:
    objects = rendered(helm, VALUES)
    for found in objects:
        if found["kind"] == "StatefulSet":
            pod = found["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["automountServiceAccountToken"] is False
            for container in (*pod["initContainers"], *pod["containers"]):
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    (policy,) = (found["data"]["site.toml"] for found in objects if found["kind"] == "ConfigMap")
    arrived = tmp_path / "site.toml"
    arrived.write_text(policy)
    assert load_policy(arrived) == load_policy(EXAMPLE)


@pytest.mark.dev
def test_nothing_is_installed_unless_a_side_is_switched_on(helm: ModuleType) -> None:
    assert rendered(helm, {}) == []
