"""Repositories as resticprofile's profiles describe them, and a backup between a profile's commands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from blockferry.config.reference import ForeignReference
from blockferry.config.resticprofile import profile_of
from blockferry.errors import UsageError
from commands_support import blockferry, command, run
from config_support import SECRET, real_resticprofile, restic_repository

YAML = """\
version: "1"
global: {restic-binary: restic}
base:
  repository: "local:PLACE/repository"
  password-file: key
  env: {restic_pack_size: 32}
  run-before: [a, b]
default:
  inherit: base
  run-before: [c]
  no-cache: true
other: {inherit: nobody}
"""
TOML = """\
version = "2"
[profiles.base]
repository = "local:PLACE/repository"
password-file = "key"
run-before = ["a", "b"]
[profiles.base.env]
RESTIC_PACK_SIZE = "32"
[profiles.default]
inherit = "base"
run-before = ["c"]
no-cache = true
"""
JSON = """{"version": "2", "profiles": {"default": {
"repository": "local:PLACE/repository", "password-file": "key", "no-cache": true, "run-before": ["c"],
"env": {"RESTIC_PACK_SIZE": 32}}}}
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "key").write_text(SECRET)
    return restic_repository(tmp_path / "repository")


def write(place: Path, name: str, text: str) -> str:
    (place / name).write_text(text.replace("PLACE", str(place)))
    return f"resticprofile:{place / name}"


def environment(reference: str, **around: str) -> dict[str, str]:
    named = ForeignReference.parse(reference)
    assert named
    return profile_of(named).environment(around)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("profiles.yaml", YAML, ["c", "b"]),  # format 1 puts lists together item by item
        ("profiles.toml", TOML, ["c"]),
        ("profiles.conf", TOML, ["c"]),
        ("profiles.json", JSON, ["c"]),
    ],
)
def test_a_plain_profile_gives_what_restic_is_to_find(tmp_path: Path, name: str, text: str, lines: list[str]) -> None:
    reference = write(tmp_path, name, text)
    found = environment(reference, RESTIC_PASSWORD="of the environment", OTHER="stays")
    binary = {"BLOCKFERRY_RESTIC": "restic"} if text is YAML else {}
    assert found == binary | {
        "OTHER": "stays",
        "RESTIC_REPOSITORY": f"local:{tmp_path}/repository",
        "RESTIC_PASSWORD_FILE": f"{tmp_path}/key",
        "RESTIC_PACK_SIZE": "32",
        "BLOCKFERRY_RESTIC_OPTIONS": "--no-cache",
    }
    named = ForeignReference.parse(reference)
    assert named
    assert profile_of(named).values["run-before"] == lines


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "text"), [("profiles.yaml", YAML), ("profiles.toml", TOML), ("profiles.json", JSON)])
def test_a_real_resticprofile_finds_the_same(repository: Path, name: str, text: str) -> None:
    place = repository.parent
    programs = "; ".join(f"{each}() {{ echo {each} >>{place}/log; }}; export -f {each}" for each in "abc")
    reference = write(place, name, text)
    words = [real_resticprofile(), "--no-ansi", "--config", f"{place / name}", "snapshots"]
    run("bash", "-euc", f'{programs}; "$@"', "bash", *words)
    named = ForeignReference.parse(reference)
    assert named
    assert (place / "log").read_text().split() == profile_of(named).values["run-before"]


def test_env_files_commands_and_options_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "rest.env").write_text(
        f"# rest server\nexport RESTIC_REST_USERNAME=me\nRESTIC_REST_PASSWORD='{SECRET}'\n"
    )
    reference = write(
        tmp_path,
        "p.yaml",
        "default:\n  repository: rest:https://$HOST_OF_IT/vms\n  env-file: rest.env\n"
        "  password-command: pass show $$x\n  limit-upload: 100\n  option: [a=1, b=2]\n  insecure-tls: false\n",
    )
    found = environment(reference, HOST_OF_IT="nas", RESTIC_PASSWORD_FILE="/x", RESTIC_REPOSITORY_FILE="/y")
    assert found == {
        "HOST_OF_IT": "nas",
        "RESTIC_REPOSITORY": "rest:https://nas/vms",
        "RESTIC_REST_USERNAME": "me",
        "RESTIC_REST_PASSWORD": SECRET,
        "RESTIC_PASSWORD_COMMAND": "pass show $$x",
        "BLOCKFERRY_RESTIC_OPTIONS": "--limit-upload=100 --option=a=1 --option=b=2",
    }


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.yaml", "default:\n  repository: /x\n  password-file: {{ .Env.KEY }}\n", "p.yaml:3: holds templates"),
        ("p.hcl", 'default { repository = "/x" }\n', "it is HCL"),
        ("p.yaml", "includes: ['*.yaml']\ndefault: {repository: /x}\n", "includes: it includes"),
        ("p.yaml", "version: '2'\nprofiles: {default: {use: [a]}}\n", "use: it uses mixins"),
        ("p.yaml", "version: '2'\nprofiles: {default: {backup: {tag...: [a]}}}\n", "adds to lists"),
        ("p.yaml", YAML + "loop: {inherit: loop}\n", "loop: inherits from itself"),
        ("p.yaml", YAML, "nobody: no such profile"),
        ("p.toml", "version = [\n", "cannot be read"),
    ],
)
def test_what_takes_resticprofile_itself_is_refused_with_a_way_out(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    wanted = {"inherits": "#loop", "nobody": "#other"}
    reference = write(tmp_path, name, text) + next((each for key, each in wanted.items() if key in words), "")
    with pytest.raises(UsageError, match=words.replace(".", r"\.")) as caught:
        environment(reference)
    assert caught.value.remedy


def test_a_profile_is_never_shown_with_its_secrets(tmp_path: Path) -> None:
    named = ForeignReference.parse(write(tmp_path, "p.yaml", f"default: {{env: {{RESTIC_PASSWORD: {SECRET}}}}}\n"))
    assert named
    assert SECRET not in repr(profile_of(named))


JOB = """
default:
  repository: "PLACE/repository"
  password-file: key
  lock: lock
  run-before: ['echo before profile $PROFILE_NAME $PROFILE_COMMAND >> PLACE/log; test -e PLACE/lock']
  run-after: ['echo after profile >> PLACE/log']
  run-after-fail: ['echo fail profile $ERROR_EXIT_CODE >> PLACE/log']
  run-finally: ['echo finally profile >> PLACE/log']
  backup:
    source: [PLACE/key]
    tag: [nightly]
    run-before: ['echo before backup >> PLACE/log; exit STATUS', 'echo second >> PLACE/log']
    run-after: ['echo after backup >> PLACE/log']
    run-after-fail: ['echo fail backup >> PLACE/log']
    run-finally: ['echo finally backup >> PLACE/log; exit 1']
  retention: {after-backup: true, keep-last: 1, prune: true}
"""


def test_a_profiles_commands_tags_and_rules_are_those_of_the_backup(repository: Path, volume: Path) -> None:
    place = repository.parent
    reference = write(place, "p.yaml", JOB.replace("STATUS", "0"))
    other = blockferry("backup", volume, "--name", "other", "--repo", reference, "--no-job", "--json").json()
    for _ in range(2):
        stored = blockferry("backup", volume, "--repo", reference, "--json").json()
    lines = (place / "log").read_text().splitlines()
    assert lines[: len(lines) // 2] == [
        "before profile default backup",
        "before backup",
        "second",
        "after backup",
        "after profile",
        "finally backup",
        "finally profile",
    ]
    assert not (place / "lock").exists()
    left = blockferry("snapshots", "--repo", reference, "--json").json()["snapshots"]
    assert [each["id"] for each in left] == [other["snapshot"], stored["snapshot"]]
    tagged = run(
        "restic", "-r", repository, "--password-file", place / "key", "snapshots", "--tag", "nightly", "--json"
    )
    assert tagged.count('"short_id"') == 1
    # The same repository, named otherwise.
    named = blockferry("show", stored["snapshot"], "--repo", f"restic:{repository}", env={"RESTIC_PASSWORD": SECRET})
    assert named.code == 0


def test_a_group_is_backed_up_between_them_too(repository: Path) -> None:
    place = repository.parent
    (place / "files").mkdir()
    (place / "files" / "one").write_text("all work and no play")
    reference = write(place, "p.yaml", JOB.replace("STATUS", "0"))
    (place / "config.yaml").write_text(f"repository: {reference}\ngroups: {{g: {{volume: {place}/files}}}}\n")
    stored = blockferry("--config", place / "config.yaml", "backup", "g", "--json").json()
    assert (place / "log").read_text().splitlines()[-1] == "finally profile"
    (listed,) = blockferry("--config", place / "config.yaml", "snapshots", "--json").json()["snapshots"]
    assert (listed["id"], listed["volume"]) == (stored["snapshot"], "g")


def test_the_first_command_that_fails_ends_it(repository: Path, volume: Path) -> None:
    place = repository.parent
    reference = write(place, "p.yaml", JOB.replace("STATUS", "7"))
    blockferry("backup", volume, "--repo", reference).refused(1, "run-before", "status 7")
    assert (place / "log").read_text().splitlines() == [
        "before profile default backup",
        "before backup",
        "fail backup",
        "fail profile 7",
        "finally backup",
        "finally profile",
    ]
    assert blockferry("snapshots", "--repo", reference, "--json").json()["snapshots"] == []
    (place / "lock").touch()
    blockferry("backup", volume, "--repo", reference).refused(75, "locked")


@pytest.mark.thorough
@pytest.mark.parametrize("status", [0, 7])
def test_a_real_resticprofile_runs_the_commands_in_the_same_order(repository: Path, volume: Path, status: int) -> None:
    place = repository.parent
    reference = write(place, "p.yaml", JOB.replace("STATUS", str(status)))
    logs = []
    words = [real_resticprofile(), "--no-ansi", "--config", f"{place}/p.yaml", "backup"]
    for each in (words, command("backup", volume, "--repo", reference)):
        done = subprocess.run(each, capture_output=True, text=True, check=False)
        assert bool(done.returncode) == bool(status), done.stdout + done.stderr
        logs.append((place / "log").read_text().splitlines())
        (place / "log").unlink()
    assert logs[0] == logs[1]


def test_a_forget_that_would_mix_volumes_with_files_is_refused(tmp_path: Path, volume: Path) -> None:
    reference = write(tmp_path, "p.yaml", "default: {repository: /x, forget: {group-by: host, keep-last: 1}}\n")
    blockferry("backup", volume, "--repo", reference).refused(2, "group by paths", "group-by")
