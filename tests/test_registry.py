# ruff: noqa: E501  (messages stand whole)
"""The registry: what is added stays, what is live changes in one step and back, whoever is killed or races."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import signal
import sqlite3
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from apps import DEFINITION
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from millpond.feature_actors.errors import BadRequest, DeclarationError, MillpondError, NotFound, Unavailable
from millpond.feature_actors.lock import FileLock
from millpond.models import Pool
from millpond.models.contents import VersionDamaged
from millpond.models.definition import Definition
from millpond.models.index import RegistryDamaged
from millpond.models.registry import Registry, VersionExists, VersionRetired, check_registry
from millpond.models.rollout import FORMER_MAX, RolloutRefused
from millpond.models.version import Version, version_of

USER = {"user_id": "int64"}
BOTH = {"user_id": "int64", "book": "string"}
NOON = "2026-01-02T12:00:00.000Z"


def content(number: int, **artifacts: bytes) -> Definition:
    return Definition("defs.py", f"# content {number}\n", {"weights.npy": bytes([number]), **artifacts})


def of(
    model: str, version: str, definition: Definition, key: dict[str, str] = USER, pool: Pool | None = None
) -> Version:
    return Version(
        model, version, definition.digest, definition.file_name, "ml", "", NOON, key, ("spend.n",), 10, 2.5, pool, definition.hashes
    )  # fmt: skip


#: Versions of one model, each of a content of its own; and of another model, of the first one's content.
CONTENTS = [content(n) for n in range(5)]
V = [of("churn", str(n), CONTENTS[n]) for n in range(5)]
OTHER = of("offer", "a/b", CONTENTS[0])


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "registry")
    yield registry
    assert registry.check() == []
    registry.close()


def added(registry: Registry, *numbers: int) -> None:
    for n in numbers:
        registry.add(CONTENTS[n], [V[n]])


def everything(registry: Registry) -> Any:
    """All that a registry answers with, and the files it has."""
    versions = [v for model in registry.models() for v in registry.versions(model)]
    return (
        registry.generation(),
        registry.rollouts(),
        [(v, registry.state_of(v)) for v in versions],
        folders(registry),
        registry.reports(),
    )


def folders(registry: Registry) -> set[str]:
    return {p.name for p in registry.artifacts_dir(V[0]).parents[1].iterdir()}


def live(registry: Registry, model: str = "churn") -> tuple[str | None, ...] | None:
    """The names of champion, canary and shadow."""
    rollout = registry.rollouts().get(model)
    return (
        None if rollout is None else tuple(v and v.version for v in (rollout.champion, rollout.canary, rollout.shadow))
    )


# -- versions


def test_a_content_is_its_text_and_artifacts_and_not_the_name_of_its_file() -> None:
    one = Definition("a.py", "x = 1\n", {"w": b"1", "v": b"2"})
    assert Definition("b.py", "x = 1\n", {"v": b"2", "w": b"1"}).digest == one.digest
    others = [
        Definition("a.py", "x = 2\n", {"w": b"1", "v": b"2"}),
        Definition("a.py", "x = 1\n", {"w": b"2", "v": b"1"}),
        Definition("a.py", "x = 1\n", {"w": b"1"}),
        Definition("a.py", "x = 1\n", {"w": b"1", "u": b"2"}),
        Definition("a.py", "x = 1\n"),
    ]
    assert len({d.digest for d in (one, *others)}) == 6
    assert Definition.of_files("a.py", one.files) == one
    assert one.hashes == {path: hashlib.sha256(content).hexdigest() for path, content in one.files.items()}


def test_an_artifact_may_have_the_name_of_the_definition() -> None:
    one = Definition("definition.py", "x = 1\n", {"definition.py": b"other"})
    assert Definition.of_files("definition.py", one.files) == one


def test_versions_are_made_of_what_a_definition_declares() -> None:
    definition = Definition("spend.py", DEFINITION)
    churn, offer = definition.declared().models
    time = datetime(2026, 1, 2, 12, 0, 0, 5_900, tzinfo=UTC)
    pool = Pool(replicas=2)
    made = version_of(definition, replace(churn, pool=pool), USER, memory_bytes=5, predict_us=1.5, created=time)
    assert made == Version(
        model="churn", version="3", digest=definition.digest, file_name="spend.py", owner="retention", about="",
        created="2026-01-02T12:00:00.005Z", key_fields=USER,
        features=("user_spend.orders_30d", "user_spend.spend_30d", "user_spend.last_price", "user_spend.recency_s"),
        memory_bytes=5, predict_us=1.5, pool=pool, files={"definition.py": hashlib.sha256(DEFINITION.encode()).hexdigest()},
    )  # fmt: skip
    assert version_of(definition, offer, BOTH).digest == made.digest


def test_a_model_without_a_version_is_called_after_its_content() -> None:
    definition = Definition("spend.py", DEFINITION.replace('version="3", ', ""))
    for model in definition.declared().models:
        assert version_of(definition, model, USER).version == definition.digest[:12]


def test_what_was_added_comes_back(registry: Registry) -> None:
    assert (registry.generation(), registry.models(), registry.rollouts()) == (0, [], {})
    pooled = replace(V[0], pool=Pool(2, 0.5, 4, ["lightgbm>=4"]), about="über 🐟")
    assert registry.add(CONTENTS[0], [pooled, OTHER]) == 1
    added(registry, 2, 1)
    assert registry.models() == ["churn", "offer"]
    assert registry.versions("churn") == [pooled, V[2], V[1]]
    assert registry.version("offer", "a/b") == OTHER
    assert {registry.state_of(v) for v in registry.versions("churn")} == {"registered"}
    for version, definition in ((pooled, CONTENTS[0]), (OTHER, CONTENTS[0]), (V[2], CONTENTS[2])):
        assert registry.definition(version) == definition
        assert (registry.artifacts_dir(version) / "weights.npy").read_bytes() == definition.artifacts["weights.npy"]


def test_models_of_one_content_share_a_folder_that_only_the_owner_reads(registry: Registry) -> None:
    registry.add(CONTENTS[0], [V[0], OTHER])
    assert folders(registry) == {CONTENTS[0].digest}
    folder = registry.artifacts_dir(OTHER).parent
    modes = {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in [folder, *folder.rglob("*")]}
    assert modes == {".": 0o700, "artifacts": 0o700, "definition.py": 0o400, "artifacts/weights.npy": 0o400}
    assert stat.S_IMODE(folder.parents[1].stat().st_mode) == 0o700


def test_a_folder_that_was_open_to_others_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    Registry(tmp_path).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_adding_again_changes_nothing(registry: Registry) -> None:
    added(registry, 0)
    before = everything(registry)
    # Measured again and under another name of the file: the first record stands.
    again = Definition("renamed.py", CONTENTS[0].text, CONTENTS[0].artifacts)
    registry.add(again, [replace(of("churn", "0", again), memory_bytes=99, created="2027-01-01T00:00:00.000Z")])
    assert everything(registry) == before


def test_a_version_of_another_content_is_refused_with_all_that_comes_with_it(registry: Registry) -> None:
    added(registry, 0)
    before = everything(registry)
    with pytest.raises(VersionExists) as caught:
        registry.add(CONTENTS[1], [of("offer", "1", CONTENTS[1]), of("churn", "0", CONTENTS[1])])
    assert (caught.value.status, caught.value.code) == (409, "version_exists")
    assert str(caught.value) == (
        "model `churn` version `0`: its content (the whole file and its artifacts) is "
        f"{CONTENTS[1].digest[:12]}, and since {NOON} there is one with the content {CONTENTS[0].digest[:12]}; a version "
        "never changes; give this content another, or none to be named by it"
    )
    assert everything(registry) == before
    with pytest.raises(VersionExists):
        registry.deploy([of("churn", "0", CONTENTS[1])])
    assert everything(registry) == before


@pytest.mark.parametrize("name", ["../w", "", "..", ".", "a/b", "a\0b"])
def test_an_artifact_that_is_no_file_name_is_refused(registry: Registry, name: str) -> None:
    definition = Definition("defs.py", "", {name: b""})
    with pytest.raises(DeclarationError) as caught:
        registry.add(definition, [of("churn", "1", definition)])
    assert str(caught.value) == f"definition `defs.py`: artifact {name!r} is no file name"
    assert (registry.generation(), folders(registry)) == (0, set())


# -- rollouts


def test_a_champion_a_canary_and_a_shadow_go_live_and_change_places(registry: Registry) -> None:
    added(registry, 0, 1, 2, 3)
    registry.deploy([V[0]])
    assert live(registry) == ("0", None, None)
    registry.deploy([V[1]], "canary", 0.05)
    registry.deploy([V[2]], "shadow")
    rollout = registry.rollouts()["churn"]
    assert (rollout.champion, rollout.canary, rollout.share, rollout.shadow, rollout.pool) == (
        V[0],
        V[1],
        0.05,
        V[2],
        None,
    )
    assert [registry.state_of(v) for v in V[:4]] == ["champion", "canary", "shadow", "registered"]
    registry.deploy([V[2]], "canary", 0.5)  # in its place, and no shadow any more
    assert (live(registry), registry.rollouts()["churn"].share) == (("0", "2", None), 0.5)
    registry.deploy([V[2]], "canary", 0.6)
    assert registry.rollouts()["churn"].share == 0.6
    registry.deploy([V[2]], "shadow")
    assert (live(registry), registry.rollouts()["churn"].share) == (("0", None, "2"), 0.0)
    registry.deploy([V[1]])  # the shadow stays, and is compared with the new champion
    assert live(registry) == ("1", None, "2")
    registry.deploy([V[2]])
    assert live(registry) == ("2", None, None)


def test_a_deployment_is_of_all_models_of_a_file_or_of_none(registry: Registry) -> None:
    registry.add(CONTENTS[0], [V[0], OTHER])
    registry.add(CONTENTS[1], [V[1], of("offer", "1", CONTENTS[1])])
    generation = registry.deploy([V[0]])
    before = everything(registry)
    with pytest.raises(RolloutRefused):
        registry.deploy([V[1], of("offer", "1", CONTENTS[1])], "canary", 0.5)  # no champion of offer
    assert everything(registry) == before
    assert registry.deploy([V[0], OTHER]) == generation + 1
    assert registry.deploy([V[1], of("offer", "1", CONTENTS[1])], "shadow") == generation + 2
    assert (live(registry), live(registry, "offer")) == (("0", None, "1"), ("a/b", None, "1"))


def test_deploying_what_is_live_already_changes_nothing(registry: Registry) -> None:
    added(registry, 0, 1)
    registry.deploy([V[0]])
    registry.deploy([V[1]], "canary", 0.1)
    before = everything(registry)
    registry.deploy([V[0]])
    registry.deploy([V[1]], "canary", 0.1)
    registry.promote("churn", "0")
    registry.set_pool("churn", None)
    assert everything(registry) == before
    registry.rollback("churn")
    assert live(registry) == ("0", None, None)


def test_promote_takes_the_canary_or_the_shadow_or_who_is_named(registry: Registry) -> None:
    added(registry, 0, 1, 2, 3)
    registry.deploy([V[0]])
    registry.deploy([V[1]], "canary", 0.1)
    registry.promote("churn")
    assert (live(registry), registry.rollouts()["churn"].share) == (("1", None, None), 0.0)
    registry.deploy([V[2]], "shadow")
    registry.promote("churn")
    assert live(registry) == ("2", None, None)
    registry.deploy([V[0]], "canary", 0.1)
    registry.deploy([V[1]], "shadow")
    registry.promote("churn", "1")
    assert (live(registry), registry.rollouts()["churn"].share) == (("1", "0", None), 0.1)
    registry.promote("churn", "3")  # an old one, or one that was never live
    assert live(registry) == ("3", "0", None)


def test_a_rollback_restores_exactly_what_was_before_each_change(registry: Registry) -> None:
    added(registry, 0, 1, 2)
    changes: list[Callable[[], Any]] = [
        lambda: registry.deploy([V[0]]),
        lambda: registry.deploy([V[1]], "canary", 0.05),
        lambda: registry.deploy([V[1]], "canary", 0.2),
        lambda: registry.set_pool("churn", Pool(3)),
        lambda: registry.deploy([V[2]], "shadow"),
        lambda: registry.promote("churn", "1"),
        lambda: registry.set_pool("churn", None),
        lambda: registry.retire("churn", "2"),
    ]
    seen = []
    for change in changes[:-1]:
        change()
        seen.append(registry.rollouts())
    while len(seen) > 1:
        assert registry.rollouts() == seen.pop()
        registry.rollback("churn")
    assert registry.rollouts() == seen[0]
    with pytest.raises(RolloutRefused):
        registry.rollback("churn")


def test_as_many_changes_as_are_kept_can_be_rolled_back(registry: Registry) -> None:
    added(registry, 0)
    registry.deploy([V[0]])
    for n in range(1, FORMER_MAX + 10):
        registry.set_pool("churn", Pool(n))
    for n in reversed(range(9, FORMER_MAX + 9)):
        registry.rollback("churn")
        assert registry.rollouts()["churn"].pool == Pool(n)
    with pytest.raises(RolloutRefused):
        registry.rollback("churn")


def test_a_model_is_in_the_pool_that_the_operator_says_or_else_its_champion(registry: Registry) -> None:
    own, other = Pool(2), Pool(replicas=1, replicas_max=8, pip=("lightgbm>=4",))
    registry.add(CONTENTS[0], [replace(V[0], pool=own)])
    added(registry, 1)
    registry.deploy([V[0]])
    assert registry.rollouts()["churn"].pool == own
    registry.set_pool("churn", other)
    registry.deploy([V[1]])
    assert registry.rollouts()["churn"].pool == other
    registry.set_pool("churn", None)
    assert registry.rollouts()["churn"].pool is None
    registry.deploy([V[0]])
    assert registry.rollouts()["churn"].pool == own


def test_a_retired_version_is_gone_for_ever_with_its_files_and_its_part_in_the_past(registry: Registry) -> None:
    added(registry, 0, 1, 2)
    registry.add(CONTENTS[0], [OTHER])
    registry.deploy([V[0]])
    registry.deploy([V[1]], "canary", 0.5)
    registry.retire("churn", "1")
    assert live(registry) == ("0", None, None)
    with pytest.raises(RolloutRefused):  # what was before had it, and what was before that is the same as now
        registry.rollback("churn")
    assert folders(registry) == {CONTENTS[0].digest, CONTENTS[2].digest}
    registry.deploy([V[2]])
    registry.retire("churn", "0")
    assert folders(registry) == {CONTENTS[0].digest, CONTENTS[2].digest}  # the other model has it too
    with pytest.raises(RolloutRefused):
        registry.rollback("churn")
    assert [registry.state_of(v) for v in V[:3]] == ["retired", "retired", "champion"]
    assert registry.versions("churn") == V[:3]
    assert registry.definition(OTHER) == CONTENTS[0]
    before = everything(registry)
    gone: list[Callable[[], Any]] = [
        lambda: registry.add(CONTENTS[1], [V[1]]),
        lambda: registry.deploy([V[1]]),
        lambda: registry.deploy([V[1]], "canary", 0.5),
        lambda: registry.promote("churn", "1"),
        lambda: registry.definition(V[1]),
    ]
    for use in gone:
        with pytest.raises(VersionRetired) as caught:
            use()
        assert (caught.value.status, str(caught.value)) == (
            409,
            "model `churn` version `1`: it has been retired, and is never served again; give the content another version",
        )
    registry.retire("churn", "1")
    assert everything(registry) == before
    registry.add(CONTENTS[1], [of("churn", "1 again", CONTENTS[1])])
    assert registry.deploy([of("churn", "1 again", CONTENTS[1])]) == before[0] + 2


def test_a_whole_model_is_retired_at_once(registry: Registry) -> None:
    registry.add(CONTENTS[0], [V[0], OTHER])
    added(registry, 1, 2)
    registry.deploy([V[0], OTHER])
    registry.set_pool("churn", Pool(3))
    registry.deploy([V[1]], "canary", 0.5)
    registry.deploy([V[2]], "shadow")
    generation = registry.generation()
    assert registry.retire("churn") == generation + 1
    assert registry.rollouts().keys() == {"offer"}
    assert {registry.state_of(v) for v in V[:3]} == {"retired"}
    assert folders(registry) == {CONTENTS[0].digest}
    assert registry.retire("churn") == generation + 1
    # A new version starts anew, and may ask for another id.
    registry.add(CONTENTS[3], [of("churn", "3", CONTENTS[3], BOTH)])
    registry.deploy([of("churn", "3", CONTENTS[3], BOTH)])
    assert registry.rollouts()["churn"].pool is None


def deployed_all(registry: Registry) -> None:
    added(registry, 0, 1, 2, 3)
    registry.add(CONTENTS[4], [of("churn", "4", CONTENTS[4], BOTH), OTHER_KEYS])
    registry.deploy([V[0]])
    registry.deploy([V[1]], "canary", 0.05)
    registry.deploy([V[2]], "shadow")


OTHER_KEYS = of("offer", "4", CONTENTS[4], BOTH)
KEYS_DIFFER = (
    "model `churn` version `4`: its id is `user_id` (int64), `book` (string), that of the live version `0` is `user_id` "
    "(int64); another id is another model: give it another name"
)
NO_CHURM = "no model `churm`; known: `churn`, `offer`; did you mean `churn`?"


@pytest.mark.parametrize(
    ("do", "kind", "message"),
    [
        (lambda r: r.versions("churm"), NotFound, NO_CHURM),
        (lambda r: r.version("churm", "1"), NotFound, NO_CHURM),
        (lambda r: r.promote("churm"), NotFound, NO_CHURM),
        (lambda r: r.rollback("churm"), NotFound, NO_CHURM),
        (lambda r: r.retire("churm"), NotFound, NO_CHURM),
        (lambda r: r.set_pool("churm", None), NotFound, NO_CHURM),
        (lambda r: r.version("churn", "11"), NotFound, "no version `11` of model `churn`; known: `0`, `1`, `2`, `3`, `4`; did you mean `1`?"),
        (lambda r: r.deploy([of("churn", "x", CONTENTS[0])]), NotFound, "no version `x` of model `churn`; known: `0`, `1`, `2`, `3`, `4`"),
        (lambda r: r.retire("churn", "x"), NotFound, "no version `x` of model `churn`; known: `0`, `1`, `2`, `3`, `4`"),
        (lambda r: r.deploy([V[1]], "canary"), BadRequest, "share: got None; a canary answers a share of the ids above 0 and below 1, such as 0.05; name one"),
        (lambda r: r.deploy([V[1]], "canary", 1.0), BadRequest, "share: got 1.0; a canary answers a share of the ids above 0 and below 1, such as 0.05; name one"),
        (lambda r: r.deploy([V[1]], "canary", 0), BadRequest, "share: got 0; a canary answers a share of the ids above 0 and below 1, such as 0.05; name one"),
        (lambda r: r.deploy([V[1]], "canary", float("nan")), BadRequest, "share: got nan; a canary answers a share of the ids above 0 and below 1, such as 0.05; name one"),
        (lambda r: r.deploy([V[1]], "shadow", 0.1), BadRequest, "share: got 0.1 for the shadow; only a canary has one; leave it out"),
        (lambda r: r.deploy([V[0]], "canary", 0.1), RolloutRefused, "model `churn` version `0`: it is the champion, and cannot be the canary too; deploy another version"),
        (lambda r: r.deploy([OTHER_KEYS], "shadow"), RolloutRefused, "model `offer` version `4`: a shadow stands beside a champion, and there is none; deploy a champion first"),
        (lambda r: r.deploy([of("churn", "4", CONTENTS[4])]), RolloutRefused, KEYS_DIFFER),
        (lambda r: r.deploy([of("churn", "4", CONTENTS[4])], "shadow"), RolloutRefused, KEYS_DIFFER),
        (lambda r: r.promote("churn", "4"), RolloutRefused, KEYS_DIFFER),
        (lambda r: r.promote("churn"), RolloutRefused, "model `churn`: there are canary `1` and shadow `2`; name the version to promote"),
        (lambda r: r.promote("offer"), RolloutRefused, "model `offer`: no version of it is live; deploy one first"),
        (lambda r: r.set_pool("offer", Pool()), RolloutRefused, "model `offer`: no version of it is live; deploy one first"),
        (lambda r: r.rollback("offer"), RolloutRefused, "model `offer`: no version of it is live; deploy one first"),
        (lambda r: r.retire("churn", "0"), RolloutRefused, "model `churn` version `0`: it is the champion, and `1` the canary, and `2` the shadow; promote another version first, or retire the whole model"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_to_do_and_changes_nothing(
    registry: Registry, do: Callable[[Registry], Any], kind: type[MillpondError], message: str
) -> None:
    deployed_all(registry)
    before = everything(registry)
    with pytest.raises(kind) as caught:
        do(registry)
    assert (type(caught.value), str(caught.value)) == (kind, message)
    assert everything(registry) == before


def test_the_only_version_can_neither_be_rolled_back_nor_promoted_nor_retired(registry: Registry) -> None:
    added(registry, 0)
    registry.deploy([V[0]])
    for do, message in (
        (lambda: registry.rollback("churn"), "model `churn`: there is nothing to roll back to; name a version to promote, or retire the model"),
        (lambda: registry.promote("churn"), "model `churn`: there is neither a canary nor a shadow; name the version to promote"),
        (lambda: registry.retire("churn", "0"), "model `churn` version `0`: it is the champion; promote another version first, or retire the whole model"),
    ):  # fmt: skip
        with pytest.raises(RolloutRefused) as caught:
            do()
        assert (caught.value.status, str(caught.value)) == (409, message)


# -- pools


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replicas": 0}, "pool: replicas is 0; allowed are 1 to 1000"),
        ({"replicas": True}, "pool: replicas is True; allowed are 1 to 1000"),
        ({"replicas": 1.0}, "pool: replicas is 1.0; allowed are 1 to 1000"),
        ({"cpus": 0}, "pool: cpus is 0; allowed are numbers above 0 and up to 1024"),
        ({"cpus": float("nan")}, "pool: cpus is nan; allowed are numbers above 0 and up to 1024"),
        ({"cpus": "1"}, "pool: cpus is '1'; allowed are numbers above 0 and up to 1024"),
        ({"replicas": 3, "replicas_max": 2}, "pool: replicas_max is 2; allowed are 3 (its replicas) to 1000, or None for a fixed number"),
        ({"pip": "lightgbm"}, "pool: pip is 'lightgbm'; allowed is a list of at most 100 requirements"),
        ({"pip": ["lightgbm", ""]}, "pool: pip has ''; allowed are requirements of at most 200 characters such as `lightgbm>=4`, without options"),
        ({"pip": ["-r requirements.txt"]}, "pool: pip has '-r requirements.txt'; allowed are requirements of at most 200 characters such as `lightgbm>=4`, without options"),
        ({"pip": [4]}, "pool: pip has 4; allowed are requirements of at most 200 characters such as `lightgbm>=4`, without options"),
    ],
)  # fmt: skip
def test_a_wrong_pool_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        Pool(**wrong)
    assert str(caught.value) == message


# -- reports


def test_reports_are_kept_by_replica_and_are_no_change(registry: Registry) -> None:
    registry.report("a/1", {"generation": 3, "failed": {"churn": "no memory"}})
    registry.report("b", {"generation": 2})
    registry.report("b", {"generation": 3, "loaded": [1.5, None, "ü"]})
    assert registry.reports() == {
        "a/1": {"generation": 3, "failed": {"churn": "no memory"}},
        "b": {"generation": 3, "loaded": [1.5, None, "ü"]},
    }
    registry.forget_report("b")
    registry.forget_report("never")
    assert (registry.reports().keys(), registry.generation()) == ({"a/1"}, 0)


def test_what_a_report_said_before_is_in_no_file_when_it_was_scrubbed(registry: Registry) -> None:
    """Whether SQLite overwrites what it deletes is a matter of how it was built: here it is told not to."""
    registry._index._cache._sql("PRAGMA secure_delete = 0")
    names = [f"replica {n}" for n in range(20)]
    for size in (10, 20_000):  # in a page with others, and in pages of its own
        for name in names:
            registry.report(name, {"said": ["what nobody is to know"] * (size // 20)})
    for name in names[1:]:
        registry.forget_report(name)
    registry.report(names[0], {"said": "nothing"})

    def who_has_it() -> list[str]:
        files = [p for p in registry._folder.rglob("*") if p.is_file()]
        return [p.name for p in files if b"nobody is to know" in p.read_bytes()]

    registry._index._cache._sql("PRAGMA wal_checkpoint(TRUNCATE)")
    assert who_has_it() == ["cache.db"]
    registry.report(names[1], {"said": "what nobody is to know"})
    registry.forget_report(names[1])
    assert sorted(who_has_it()) == ["cache.db", "cache.db-wal"]
    assert registry.scrub()
    assert who_has_it() == []
    assert (registry.reports(), registry.check()) == ({names[0]: {"said": "nothing"}}, [])


# -- damage


@pytest.mark.parametrize("path", ["definition.py", "artifacts/weights.npy"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_file_is_named_and_adding_it_again_mends_it(tmp_path: Path, path: str, gone: bool) -> None:
    registry = Registry(tmp_path)
    registry.add(CONTENTS[0], [V[0], OTHER])
    file = tmp_path / "versions" / CONTENTS[0].digest / path
    file.unlink()
    if not gone:
        file.write_bytes(b"x")
    found = "no such file" if gone else hashlib.sha256(b"x").hexdigest()
    with pytest.raises(VersionDamaged) as caught:
        registry.definition(V[0])
    damage = (
        f"the file `{file}` is damaged: expected the SHA-256 {V[0].files[path]}, found {found}; deploy the same content "
        "again, or restore the file from a copy"
    )
    assert (caught.value.status, str(caught.value)) == (500, f"model `churn` version `0`: {damage}")
    assert registry.check() == [f"model `churn` version `0`: {damage}", f"model `offer` version `a/b`: {damage}"]
    registry.add(CONTENTS[0], [V[0]])
    assert registry.definition(V[0]) == CONTENTS[0]
    assert (registry.check(), folders(registry)) == ([], {CONTENTS[0].digest})


def rewrite(folder: Path, statement: str, *values: Any) -> None:
    """Change the database behind the registry's back."""
    with closing(sqlite3.connect(folder / "index" / "cache.db")) as database, database:
        assert database.execute(statement, values).rowcount == 1


def test_a_list_of_files_that_was_changed_with_them_is_noticed(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    added(registry, 0)
    (file := registry.artifacts_dir(V[0]) / "weights.npy").unlink()
    file.write_bytes(b"x")
    old, new = V[0].files["artifacts/weights.npy"], hashlib.sha256(b"x").hexdigest()
    rewrite(
        tmp_path,
        "UPDATE Cache SET value = CAST(replace(CAST(value AS TEXT), ?, ?) AS BLOB) WHERE key = 'version/churn/0'",
        old,
        new,
    )
    with pytest.raises(
        VersionDamaged, match=r"^model `churn` version `0`: its list of files has the digest [0-9a-f]{64}, expected"
    ):
        registry.definition(V[0])
    assert len(registry.check()) == 1


class Opens:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("key", ["generation", "format", "version/churn/0", "rollout/churn", "report/a"])
@pytest.mark.parametrize("mode", ["pickled", "raw text", "file"])
def test_what_is_pickled_is_refused_and_not_loaded(tmp_path: Path, key: str, mode: str) -> None:
    registry = Registry(tmp_path)
    added(registry, 0)
    registry.deploy([V[0]])
    registry.report("a", {})
    registry.close()
    trap = tmp_path / "trap"
    code = pickle.dumps(Opens(trap), 0)
    if mode == "pickled":
        rewrite(tmp_path, "UPDATE Cache SET value = ?, mode = 4 WHERE key = ?", code, key)
    elif mode == "raw text":
        rewrite(tmp_path, "UPDATE Cache SET value = ? WHERE key = ?", code.decode(), key)
    else:
        (tmp_path / "index" / "planted").write_bytes(code)
        rewrite(tmp_path, "UPDATE Cache SET value = NULL, mode = 4, filename = 'planted' WHERE key = ?", key)
    message = "registry: a value is not of raw bytes; nothing else is read; restore it from a copy"
    with pytest.raises(RegistryDamaged) as caught:
        reads_all(tmp_path)
    assert str(caught.value) == message
    assert not trap.exists()
    pickle.loads(code)  # nothing is wrong with the trap
    assert trap.exists()


def reads_all(folder: Path) -> None:
    again = Registry(folder)
    try:
        again.check()
        everything(again)
    finally:
        again.close()


def test_a_pickled_key_is_refused_and_not_loaded(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    added(registry, 0)
    trap = tmp_path / "trap"
    rewrite(tmp_path, "UPDATE Cache SET key = ?, raw = 0 WHERE key = 'generation'", pickle.dumps(Opens(trap)))
    with pytest.raises(RegistryDamaged) as caught:
        registry.check()
    assert str(caught.value) == "registry: a key is bytes; keys are names; restore it from a copy"
    assert not trap.exists()


def test_a_value_that_is_no_json_of_its_kind_names_its_key(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    added(registry, 0)
    rewrite(tmp_path, "UPDATE Cache SET value = ? WHERE key = 'version/churn/0'", b'{"version": 1}')
    with pytest.raises(RegistryDamaged) as caught:
        registry.version("churn", "0")
    assert str(caught.value) == (
        f"registry: the value of `version/churn/0` cannot be read: Expected `object`, got `int` - at `$.version`; restore `{tmp_path / 'index'}` from a copy"
    )


def test_another_format_is_not_read(tmp_path: Path) -> None:
    Registry(tmp_path).close()
    rewrite(tmp_path, "UPDATE Cache SET value = ? WHERE key = 'format'", b"2")
    with pytest.raises(RegistryDamaged) as caught:
        Registry(tmp_path)
    assert str(caught.value) == (
        f"registry: `{tmp_path}` has format 2; this version reads 1; start the version that wrote it"
    )


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "cache.db").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(RegistryDamaged) as caught:
        Registry(tmp_path)
    assert str(caught.value) == (
        f"registry: `{tmp_path / 'index'}` cannot be read: file is not a database; restore it from a copy, or move the "
        "registry away: `millpond up` with the definition files makes another"
    )


def test_a_registry_is_checked_without_a_change_of_it(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    added(registry, 0, 1)
    registry.deploy([V[0]])
    registry.close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert check_registry(tmp_path) == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    path = Registry(tmp_path).artifacts_dir(V[0]).parent / "definition.py"
    path.chmod(0o600)
    path.write_text("other")
    (wrong,) = check_registry(tmp_path)
    assert wrong.startswith(f"model `churn` version `0`: the file `{path}` is damaged: expected")
    (tmp_path / "index" / "cache.db").write_bytes(b"nothing")
    assert check_registry(tmp_path) == [
        f"registry: `{tmp_path / 'index'}` cannot be read: file is not a database; restore it from a copy, or move the "
        "registry away: `millpond up` with the definition files makes another"
    ]


def test_check_tells_rollouts_that_cannot_be(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    added(registry, 0, 1)
    registry.deploy([V[0]])
    registry.deploy([V[1]], "shadow")
    rewrite(tmp_path, "DELETE FROM Cache WHERE key = 'version/churn/1'")
    assert registry.check() == ["model `churn`: a rollout has versions ['0', '1'], of which one is not there"]


def test_who_adds_waits_for_who_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)
    lock = FileLock(tmp_path / "lock")
    monkeypatch.setattr("millpond.models.registry._WAIT_S", 0.05)
    for do in (lambda: added(registry, 0), lambda: registry.retire("churn")):
        with pytest.raises(
            Unavailable,
            match=rf"^registry: process {os.getpid()}, since .* UTC, adds or retires versions; nothing has been changed; try again$",
        ):
            do()
    lock.release()
    added(registry, 0)
    assert registry.check() == []


def test_a_disk_that_cannot_be_written_changes_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    added(registry, 0)
    before = everything(registry)

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(Unavailable) as caught:
            added(registry, 1)
    assert str(caught.value) == (
        f"registry: `{registry.artifacts_dir(V[0]).parents[1]}` cannot be written: No space left on device; nothing has been changed; mend that and try again"
    )
    assert everything(registry) == before
    added(registry, 1)


# -- crashes


def test_a_content_is_synced_before_it_has_its_name_and_its_name_before_the_index_has_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    synced: set[int] = set()
    folder = registry.artifacts_dir(V[0]).parents[1]

    def recorded(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen = registry.models()
        order.append(f"{path.relative_to(folder)}{' named' if (folder / CONTENTS[0].digest).exists() else ''} {seen}")
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    added(registry, 0)
    new = f".new-{CONTENTS[0].digest}"
    assert sorted(order[:4]) == [
        f"{new} []", f"{new}/artifacts []", f"{new}/artifacts/weights.npy []", f"{new}/definition.py []",
    ]  # fmt: skip
    assert order[4:] == [". named []"]
    assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= synced


_REFUSED = 3
_COUNTED = ("os.", "shutil.", "fcntl.", "sqlite3.")


def killed_at(step: int, folder: Path, do: Callable[[Registry], Any], *, opening: bool = False) -> str:
    """Do something in a process that is killed when it begins its n-th step: a call of the operating system or a
    statement of SQLite. Return how it ended. opening: opening the registry is among the steps."""
    if (child := os.fork()) == 0:
        left, armed = step, opening

        def count(*_: Any) -> None:
            nonlocal left, armed
            if armed:
                left -= 1
                if left < 0:
                    armed = False  # the kill is heard too
                    os.kill(os.getpid(), signal.SIGKILL)

        def heard(event: str, _: tuple[Any, ...]) -> None:
            if event == "open" or event.startswith(_COUNTED):
                count()

        def traced(*arguments: Any, connect: Callable[..., Any] = sqlite3.connect, **options: Any) -> Any:
            connection = connect(*arguments, **options)
            connection.set_trace_callback(count)
            return connection

        status = 1
        try:
            sys.addaudithook(heard)
            sqlite3.connect = traced  # type: ignore[assignment]
            registry = Registry(folder)
            armed = True
            do(registry)
            status = 0
        except MillpondError:
            status = _REFUSED
        finally:
            armed = False
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    ends = {signal.SIGKILL.value: "killed", 0: "done", _REFUSED << 8: "refused"}
    assert ended in ends, f"the process ended with {ended}"
    return ends[ended]


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder that is quick to sync: a kill leaves the same on every disk."""
    folder = Path(tempfile.mkdtemp(prefix="millpond-registry-", dir=_MEMORY))
    yield folder
    shutil.rmtree(folder)


_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def crash_everywhere(top: Path, prepared: Callable[[Registry], Any], do: Callable[[Registry], Any]) -> list[Any]:
    """Kill what does something at each of its steps, each time in a copy; return what was there then, and at last
    what is there when nothing kills it."""
    registry = Registry(top / "origin")
    prepared(registry)
    registry.close()
    states, ended = [], "killed"
    while ended == "killed":
        folder = top / str(len(states))
        shutil.copytree(top / "origin", folder)
        ended = killed_at(len(states), folder, do)
        registry = Registry(folder)
        states.append((*everything(registry)[:3], registry.check()))
        # The next one works, and clears up; and so does doing it (again).
        for then in (lambda r: r.add(CONTENTS[3], [V[3]]), do):
            then(registry)
            assert folders(registry) == {v.digest for v in usable(registry)}
        assert registry.check() == []
        registry.close()
        shutil.rmtree(folder)
    assert ended == "done"
    return states


def usable(registry: Registry) -> list[Version]:
    found = [v for model in registry.models() for v in registry.versions(model)]
    return [v for v in found if registry.state_of(v) != "retired"]


def full(registry: Registry) -> None:
    registry.add(CONTENTS[0], [V[0], OTHER])
    added(registry, 1, 2)
    registry.deploy([V[0], OTHER])
    registry.deploy([V[1]], "canary", 0.4)
    registry.deploy([V[1]], "canary", 0.5)


@pytest.mark.parametrize(
    ("do", "steps"),
    [
        (lambda r: r.add(CONTENTS[4], [V[4], of("offer", "4", CONTENTS[4])]), 30),
        (lambda r: r.deploy([V[2], of("offer", "a/b", CONTENTS[0])], "champion"), 5),
        (lambda r: r.promote("churn", "1"), 5),
        (lambda r: r.set_pool("churn", Pool(3)), 5),
        (lambda r: r.rollback("churn"), 5),
        (lambda r: r.retire("churn", "2"), 10),
        (lambda r: r.retire("churn"), 10),
    ],
    ids=["add", "deploy", "promote", "set_pool", "rollback", "retire a version", "retire a model"],
)
def test_who_is_killed_at_any_step_has_changed_all_or_nothing(
    in_memory: Path, do: Callable[[Registry], Any], steps: int
) -> None:
    before, *_, after = states = crash_everywhere(in_memory, full, do)
    assert len(states) > steps
    assert (before[0] + 1, before[3], after[3]) == (after[0], [], [])
    there = states.index(after)
    assert states == [before] * there + [after] * (len(states) - there)


def test_who_is_killed_as_it_mends_a_content_leaves_that_to_the_next(in_memory: Path) -> None:
    def damaged(registry: Registry) -> None:
        full(registry)
        (file := registry.artifacts_dir(V[0]) / "weights.npy").unlink()
        file.write_bytes(b"x")

    before, *_, after = states = crash_everywhere(in_memory, damaged, lambda r: r.add(CONTENTS[0], [V[0]]))
    assert len(states) > 20
    assert before[:3] == after[:3]
    assert (len(before[3]), after[3]) == (2, [])  # it is the content of two models


def test_a_registry_that_was_half_made_can_be_made(in_memory: Path) -> None:
    step = 0
    while killed_at(step, in_memory / str(step), lambda r: None, opening=True) == "killed":
        registry = Registry(in_memory / str(step))
        added(registry, 0)
        assert registry.check() == []
        registry.close()
        step += 7  # of some hundred; each is one that nothing but diskcache makes
    assert step > 50


# -- races


def in_processes(work: Sequence[Callable[[], Any]]) -> None:
    """Do several things at once, each in a process of its own; fail if one fails."""
    children = []
    for do in work:
        if (child := os.fork()) == 0:
            status = 1
            try:
                do()
                status = 0
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)


def in_threads(work: Sequence[Callable[[], Any]]) -> None:
    failed: list[BaseException] = []

    def tried(do: Callable[[], Any]) -> None:
        try:
            do()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=tried, args=[do]) for do in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


@pytest.mark.parametrize("at_once", [in_processes, in_threads])
def test_changes_that_are_made_at_once_are_each_made_once(
    tmp_path: Path, at_once: Callable[[Sequence[Callable[[], Any]]], None]
) -> None:
    registry = Registry(tmp_path)
    added(registry, 0)
    before = registry.deploy([V[0]])
    registry.close()
    each, workers = 12, 3

    def changes(worker: int) -> Callable[[], None]:
        def do() -> None:
            mine, generations = Registry(tmp_path), []
            for n in range(each):
                generations.append(mine.set_pool("churn", Pool(1 + worker * each + n)))
                new = content(100 + worker * each + n)
                generations.append(mine.add(new, [of(f"m{worker}", str(n), new)]))
                mine.report(f"replica {worker}", {"n": n})
            mine.close()
            assert sorted(set(generations)) == generations, "a generation came twice"

        return do

    def polls() -> None:
        mine, seen, was = Registry(tmp_path), -1, None
        while (generation := mine.generation()) < before + 2 * each * workers:
            assert generation >= seen
            now = mine.rollouts()["churn"].pool
            assert now == was or generation > seen or mine.generation() > generation, "a change without a generation"
            seen, was = generation, now
        mine.close()

    at_once([*(changes(worker) for worker in range(workers)), polls])
    registry = Registry(tmp_path)
    assert registry.generation() == before + 2 * each * workers
    assert registry.models() == ["churn", "m0", "m1", "m2"]
    assert [len(registry.versions(f"m{w}")) for w in range(workers)] == [each] * workers
    assert registry.reports() == {f"replica {w}": {"n": each - 1} for w in range(workers)}
    pools = [registry.rollouts()["churn"].pool]
    for _ in range(FORMER_MAX):
        registry.rollback("churn")
        pools.append(registry.rollouts()["churn"].pool)
    assert len(set(pools)) == FORMER_MAX + 1, "a change was made twice, or upon what was not there any more"
    assert registry.check() == []
    registry.close()


def test_who_retires_a_content_leaves_it_to_who_adds_it_at_once(tmp_path: Path) -> None:
    """Both want the same folder: one to go, the other to be there."""
    Registry(tmp_path).close()
    rounds = 12

    def turns(model: str) -> Callable[[], None]:
        def do() -> None:
            mine = Registry(tmp_path)
            for n in range(rounds):
                version = of(model, str(n), CONTENTS[0])
                mine.add(CONTENTS[0], [version])
                assert mine.definition(version) == CONTENTS[0]
                mine.deploy([version])
                mine.retire(model)
            mine.close()

        return do

    in_processes([turns("one"), turns("two")])
    registry = Registry(tmp_path)
    assert (registry.check(), registry.rollouts(), folders(registry)) == ([], {}, set())
    registry.close()


# -- anything, in any order


class Plain:
    """What a registry has to do, over dicts: the oracle. A step that is refused raises `KeyError` and changes nothing."""

    def __init__(self) -> None:
        self.contents: dict[tuple[str, str], int] = {}
        self.retired: set[tuple[str, str]] = set()
        self.past: dict[str, list[dict[str, Any]]] = {}  # all rollouts of a model, the last is live

    def copy(self) -> Plain:
        other = Plain()
        other.contents, other.retired = dict(self.contents), set(self.retired)
        other.past = {model: list(stack) for model, stack in self.past.items()}
        return other

    def state(self) -> Any:
        return self.contents, self.retired, self.past

    def add(self, number: int, names: Sequence[tuple[str, str]]) -> None:
        if any(self.contents.get(name, number) != number or name in self.retired for name in names):
            raise KeyError
        self.contents |= dict.fromkeys(names, number)

    def place(self, model: str, name: str, role: str, share: float = 0.0) -> None:
        if (model, name) not in self.contents or (model, name) in self.retired:
            raise KeyError
        stack = self.past.get(model, [])
        now = dict(stack[-1]) if stack else {"pool": None}
        if role != "champion" and (not stack or now["champion"] == name):
            raise KeyError
        if any(KEYS[self.contents[model, v]] != KEYS[self.contents[model, name]] for r, v in now.items() if r in ROLES):
            raise KeyError
        now = {r: v for r, v in now.items() if v != name or r not in ROLES}
        now[role] = name
        now["share"] = share if role == "canary" else now.get("share", 0.0) if "canary" in now else 0.0
        self._push(model, now)

    def _push(self, model: str, now: dict[str, Any]) -> None:
        stack = self.past.setdefault(model, [])
        if not stack or stack[-1] != now:
            stack.append(now)
        del stack[: -FORMER_MAX - 1]

    def deploy(self, names: Sequence[tuple[str, str]], role: str, share: float | None) -> None:
        if (share is not None) != (role == "canary"):
            raise KeyError
        for model, name in names:
            self.place(model, name, role, share or 0.0)

    def promote(self, model: str, name: str | None) -> None:
        now = self.past[model][-1]
        if name is None:
            (name,) = [now[r] for r in ("canary", "shadow") if r in now] if len(now.keys() & ROLES) == 2 else [""]
        self.place(model, name, "champion")

    def rollback(self, model: str) -> None:
        if len(self.past[model]) < 2:
            raise KeyError
        self.past[model].pop()

    def set_pool(self, model: str, pool: Pool | None) -> None:
        self._push(model, {**self.past[model][-1], "pool": pool})

    def retire(self, model: str, name: str | None) -> None:
        names = [n for m, n in self.contents if m == model and name in (None, n)]
        if not names:
            raise KeyError
        if name is None:
            self.past.pop(model, None)
        elif stack := self.past.get(model):
            if stack[-1]["champion"] == name:
                raise KeyError
            left = {r: v for r, v in stack[-1].items() if v != name or r not in ROLES}
            left["share"] = left["share"] if "canary" in left else 0.0
            kept = [one for one in stack if name not in (one.get(r) for r in ROLES)]
            self.past[model] = [one for i, one in enumerate([*kept, left]) if i == 0 or one != [*kept, left][i - 1]]
        self.retired |= {(model, n) for n in names}


ROLES = {"champion", "canary", "shadow"}
KEYS = [USER, USER, BOTH]
MODELS, NAMES = ("churn", "offer"), ("1", "2", "3")
_names = st.tuples(st.sampled_from(MODELS), st.sampled_from(NAMES))
_one_of_each = st.lists(_names, min_size=1, max_size=2, unique_by=lambda name: name[0])
_steps = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 2), _one_of_each),
    st.tuples(st.just("deploy"), _one_of_each, st.just("champion"), st.none()),
    st.tuples(st.just("deploy"), _one_of_each, st.just("canary"), st.sampled_from([0.1, 0.5])),
    st.tuples(st.just("deploy"), _one_of_each, st.just("shadow"), st.sampled_from([None, None, None, 0.5])),
    st.tuples(st.just("promote"), st.sampled_from(MODELS), st.sampled_from([None, None, *NAMES])),
    st.tuples(st.just("rollback"), st.sampled_from(MODELS)),
    st.tuples(st.just("set_pool"), st.sampled_from(MODELS), st.sampled_from([None, Pool(2), Pool(3)])),
    st.tuples(st.just("retire"), st.sampled_from(MODELS), st.sampled_from([None, *NAMES, *NAMES])),
)


class Registries(RuleBasedStateMachine):
    """Two registries on one folder, one of which may be killed at any step, against dicts."""

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="millpond-registry-", dir=_MEMORY))
        self.open_ones = [Registry(self.folder), Registry(self.folder)]
        self.plain, self.generation = Plain(), 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for one in self.open_ones:
                one.close()
            shutil.rmtree(self.folder)

    def versions(self, names: Sequence[tuple[str, str]], number: int | None = None) -> list[Version]:
        numbers = [self.plain.contents.get(name, 0) if number is None else number for name in names]
        return [of(*name, CONTENTS[n], KEYS[n]) for name, n in zip(names, numbers, strict=True)]

    def done(self, registry: Registry, step: tuple[Any, ...]) -> int:
        verb, *arguments = step
        if verb == "add":
            number, names = arguments
            return registry.add(CONTENTS[number], self.versions(names, number))
        if verb == "deploy":
            return registry.deploy(self.versions(arguments[0]), *arguments[1:])
        return int(getattr(registry, verb)(*arguments))

    def expected(self, step: tuple[Any, ...]) -> Plain | None:
        """What it comes to, or None if it is to be refused."""
        verb, *arguments = step
        try:
            getattr(after := self.plain.copy(), verb)(*arguments)
        except KeyError:
            return None
        return after

    @rule(step=_steps, which=st.integers(0, 1))
    def one_does(self, step: tuple[Any, ...], which: int) -> None:
        after = self.expected(step)
        if after is None:
            with pytest.raises(MillpondError):
                self.done(self.open_ones[which], step)
            return
        self.generation += after.state() != self.plain.state()
        assert self.done(self.open_ones[which], step) == self.generation
        self.plain = after

    @rule(step=_steps, at=st.integers(0, 40))
    def one_is_killed(self, step: tuple[Any, ...], at: int) -> None:
        after = self.expected(step)
        ended = killed_at(at, self.folder, lambda registry: self.done(registry, step))
        assert ended == "killed" or ended == ("refused" if after is None else "done")
        if after is None or after.state() == self.plain.state():
            return
        generation = self.open_ones[0].generation()
        assert ended == "killed" or generation == self.generation + 1
        if generation != self.generation:
            self.generation, self.plain = self.generation + 1, after

    @rule(which=st.integers(0, 1))
    def one_opens_again(self, which: int) -> None:
        self.open_ones[which].close()
        self.open_ones[which] = Registry(self.folder)

    @rule(which=st.integers(0, 1), number=st.integers(0, 9))
    def one_reports(self, which: int, number: int) -> None:
        self.open_ones[which].report("replica", {"number": number})
        assert self.open_ones[1 - which].reports() == {"replica": {"number": number}}

    @invariant()
    def both_answer_as_the_dicts_do(self) -> None:
        if not hasattr(self, "folder"):
            return
        for registry in self.open_ones:
            assert registry.generation() == self.generation
            assert registry.check() == []
            live = {
                model: {
                    "pool": r.pool,
                    "share": r.share,
                    **{x: v.version for x in ROLES if (v := getattr(r, x)) is not None},
                }
                for model, r in registry.rollouts().items()
            }
            assert live == {model: stack[-1] for model, stack in self.plain.past.items()}
            found = {(v.model, v.version): v for m in registry.models() for v in registry.versions(m)}
            assert {name: v.digest for name, v in found.items()} == {
                name: CONTENTS[n].digest for name, n in self.plain.contents.items()
            }
            for (model, name), version in found.items():
                roles = {r for r, v in live.get(model, {}).items() if v == name and r in ROLES} or {"registered"}
                assert {registry.state_of(version)} == ({"retired"} if (model, name) in self.plain.retired else roles)


Registries.TestCase.settings = settings(stateful_step_count=25, max_examples=40)
TestRegistries = Registries.TestCase
