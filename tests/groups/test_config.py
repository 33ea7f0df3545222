"""The configuration file: what it may say, and where and why it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockferry.config.configuration import Configuration, NamedVolume, load_configuration
from blockferry.errors import UsageError
from blockferry.hookspecs import hookimpl
from blockferry.manager import plugin_manager
from commands_support import blockferry

EXAMPLE = """\
repository: borg:/srv/borg          # for whatever has none of its own
volumes:
  vm: {path: /srv/vm.img, repository: restic:/srv/restic}
  data: {path: /dev/vg/data, mount: /mnt/data}
groups:
  small:
    volume: /mnt/small
    paths: [/mnt/small/mail]
    patterns:
      - "- **/*.tmp"
    schedule: hourly
    keep_daily: 7
  www:
    volume: data
    repository: restic:/srv/www
"""


def load(text: str, place: Path) -> Configuration:
    (place / "config.yaml").write_text(text)
    return load_configuration(plugin_manager(), str(place / "config.yaml"))


def refused(text: str, place: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load(text, place)
    assert caught.value.message.startswith(f"{place}/config.yaml:")
    assert caught.value.remedy
    return caught.value


def test_volumes_and_groups_have_names(tmp_path: Path) -> None:
    configuration = load(EXAMPLE, tmp_path)
    assert configuration.repository == "borg:/srv/borg"
    assert configuration.volume("vm") == NamedVolume("vm", "/srv/vm.img", "", "restic:/srv/restic")
    small = configuration.group("small")
    assert (small.root, small.schedule, small.keep) == ("/mnt/small", "hourly", {"keep_daily": 7})
    assert list(configuration.groups) == ["small", "www"]


def test_a_group_on_a_named_volume_is_where_that_is_mounted(tmp_path: Path) -> None:
    assert load(EXAMPLE, tmp_path).group("www").root == "/mnt/data"


def test_the_repository_is_the_groups_own_or_its_volumes_or_that_of_all(tmp_path: Path) -> None:
    configuration = load(EXAMPLE + "  vms: {volume: vm}\n", tmp_path)
    named = {name: group.repository for name, group in configuration.groups.items()}
    assert named == {"small": "borg:/srv/borg", "www": "restic:/srv/www", "vms": "restic:/srv/restic"}
    assert configuration.volume("data").repository == "borg:/srv/borg"


@pytest.mark.parametrize(
    ("replaced", "by", "line", "words"),
    [
        ("repository: borg", "repositories: borg", 1, "repositories: no such key"),
        ("mount: /mnt", "mounted: /mnt", 4, "volumes.data.mounted: no such key"),
        ("{path: /srv/vm.img, ", "{", 3, "volumes.vm: has no path"),
        ("    schedule", "    schedul", 11, "groups.small.schedul: no such key"),
        ("[/mnt/small/mail]", "[/mnt/mail]", 8, "groups.small.paths: '/mnt/mail' is not below"),
        ('"- **/*.tmp"', '"- re:("', 9, "groups.small.patterns: pattern 1"),
        ("- **/*.tmp", "home", 9, "groups.small.patterns: pattern 1"),
        ("keep_daily: 7", "keep_daily: many", 12, "groups.small.keep_daily: 'many'"),
        ("keep_daily: 7", "schedule: daily", 12, "duplicate key"),
        ("volume: data", "volume: dato", 14, "groups.www.volume: dato: no volume"),
        ("  www:", "  w w:", 13, "'w w' cannot be a name"),
        ("[/mnt/small/mail]", "[/mnt/small/mail", 9, "expected"),
        ("  www:", "  none:\n  www:", 13, "groups.none.volume: is missing"),
        ("    volume: data", "    <<: {schedul: daily}\n    volume: data", 13, "groups.www.schedul: no such key"),
        ("volumes:", "volumes: 7\nx:", 3, "x: no such key"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_key(
    tmp_path: Path, replaced: str, by: str, line: int, words: str
) -> None:
    text = EXAMPLE.replace(replaced, by, 1)
    message = refused(text, tmp_path).message
    assert words in message
    assert message.startswith(f"{tmp_path}/config.yaml:{line}:"), message


@pytest.mark.parametrize(
    "text", ["- a\n", "just words\n", "groups: [a]\n", "groups: {a: 7}\n", "a: b: c\n", "\x00", "a: !!python/x 1\n"]
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    refused(text, tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"repository: \xff\xfe\xfd\n")
    with pytest.raises(UsageError, match="is no YAML"):
        load_configuration(plugin_manager(), str(tmp_path / "config.yaml"))


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "groups:\nvolumes:\n"])
def test_a_file_that_says_nothing_is_an_empty_configuration(tmp_path: Path, text: str) -> None:
    configuration = load(text, tmp_path)
    assert (configuration.repository, configuration.volumes, configuration.groups) == ("", {}, {})


def test_a_group_on_an_image_without_a_mount_point_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vm.img").touch()
    error = refused(f"volumes: {{vm: {{path: {tmp_path}/vm.img}}}}\ngroups: {{g: {{volume: vm}}}}\n", tmp_path)
    assert "is no directory" in error.message
    assert "mount:" in error.remedy


def test_the_usual_file_may_be_missing_but_not_one_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tmp_path / "config.yaml"
    monkeypatch.setattr("blockferry.config.configuration.USUAL", str(usual))
    monkeypatch.delenv("BLOCKFERRY_CONFIG")
    assert load_configuration(plugin_manager()) == Configuration()
    with pytest.raises(UsageError, match="no such configuration file"):
        load_configuration(plugin_manager(), str(usual))
    monkeypatch.setenv("BLOCKFERRY_CONFIG", str(usual))
    with pytest.raises(UsageError, match="no such configuration file"):
        load_configuration(plugin_manager())
    usual.write_text(EXAMPLE)
    monkeypatch.delenv("BLOCKFERRY_CONFIG")
    assert load_configuration(plugin_manager()).group("small").name == "small"


def test_a_name_that_is_not_configured_brings_the_nearest(tmp_path: Path) -> None:
    configuration = load(EXAMPLE, tmp_path)
    for ask, name, meant in ((configuration.group, "smal", "small"), (configuration.volume, "dat", "data")):
        with pytest.raises(UsageError) as caught:
            ask(name)
        assert meant in caught.value.remedy
    with pytest.raises(UsageError, match="no group of that name for want of"):
        Configuration().group("small")


def test_a_plugin_for_another_format_is_asked_before(tmp_path: Path) -> None:
    class Foreign:
        @hookimpl
        def blockferry_load_config(self, path: str) -> Configuration | None:
            return Configuration(file=path, repository="borg:foreign") if path.endswith(".toml") else None

    manager = plugin_manager()
    manager.register(Foreign())
    for name, said in (("a.toml", "borg:foreign"), ("a.yaml", "borg:own")):
        (tmp_path / name).write_text("repository: borg:own\n")
        assert load_configuration(manager, str(tmp_path / name)).repository == said


def test_commands_take_the_repository_from_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"repository: borg:{tmp_path}/nowhere\n")
    blockferry("--config", config, "snapshots").refused(1, f"{tmp_path}/nowhere")
    blockferry("snapshots", env={"BLOCKFERRY_CONFIG": str(config)}).refused(1, f"{tmp_path}/nowhere")
    config.write_text("repositry: borg:/srv\n")
    blockferry("--config", config, "snapshots").refused(2, f"{config}:1: repositry", "did you mean repository")
    blockferry("--config", tmp_path / "no.yaml", "snapshots").refused(2, "no such configuration file")
