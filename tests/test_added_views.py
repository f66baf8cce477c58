"""Views that come while a cluster runs, as its registry keeps them, and what a start makes of them."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from millpond.cluster.backfills import kept_layout, verdict_of, wait_until_whole
from millpond.cluster.deploy import Running, nobody, versions_of
from millpond.feature_actors import FeatureView
from millpond.feature_actors.errors import DeclarationError, Unavailable
from millpond.feature_actors.layout import compile_layout, identity_of
from millpond.models.added_views import Ingress, Progress, routed_by_now
from millpond.models.definition import Definition
from millpond.models.registry import Registry
from millpond.models.registry_views import RegistryViews, declared_view, extended_layout
from millpond.models.version import version_of

SOURCE = """
from millpond.feature_actors import Count, FeatureView, Max, Source, Sum
from millpond.models import Model

orders = Source("orders", owner="shop", fields={"id": "string", "user_id": "int64", "cents": "int64",
                "at": "timestamp[ms, UTC]"}, event_id="id", event_time="at")
"""


def text_of(name: str, features: str) -> str:
    return f'{SOURCE}\nv = FeatureView("{name}", owner="ml", source=orders, key=["user_id"], features={{{features}}})\n'


def view_of(text: str) -> FeatureView:
    (view,) = Definition("v.py", text).declared().views
    return view


AT_START, LARGE, LARGER = text_of("spend", '"n": Count()'), text_of("large", '"n": Count()'), text_of(
    "large", '"n": Count(), "max": Max("cents")')  # fmt: skip
LAYOUT = compile_layout([], [view_of(AT_START)])


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def add(registry: Registry, *texts: str) -> list[str]:
    identities = [identity_of(view_of(text)) for text in texts]
    for text, identity in zip(texts, identities, strict=True):
        registry.views.add("v.py", text, [identity])
    return identities


def test_they_keep_their_numbers_and_what_becomes_of_them(registry: Registry, tmp_path: Path) -> None:
    port = pickle.loads(pickle.dumps(RegistryViews(str(tmp_path / "registry"))))
    assert port.added() == []
    before = registry.generation()
    large, larger = add(registry, LARGE, LARGER)
    assert registry.generation() == port.generation() == before + 2
    add(registry, LARGE)  # it is there
    assert registry.generation() == before + 2
    assert [(one.identity, one.number, one.state) for one in registry.views.all()] == [
        (large, 0, "backfilling"), (larger, 1, "backfilling")
    ]  # fmt: skip
    registry.views.note(large, Progress(1, 4, 0, 2))
    assert registry.generation() == before + 2
    assert {i: str(p) for i, p in registry.views.progress().items()} == {large: "25 % of 4 records, 0 of 2 shards"}
    registry.views.settle(large, "live", history_since_ms=7)
    registry.views.settle(large, "failed", "too late to fail")
    registry.views.settle(larger, "failed", "a disk")
    assert registry.views.progress() == {}
    assert [(one.state, one.why, one.history_since_ms) for one in registry.views.all()] == [
        ("live", "", 7), ("failed", "a disk", None)
    ]  # fmt: skip
    assert [(identity_of(one.view), one.state) for one in port.added()] == [(large, "live"), (larger, "failed")]
    assert registry.check() == []
    registry.views.drop([large])
    assert [(one.identity, one.number) for one in registry.views.all()] == [(larger, 0)]


def test_a_version_goes_by_its_name_when_it_is_live(registry: Registry) -> None:
    (large,) = add(registry, LARGE)

    def named() -> tuple[str, int]:
        layout = extended_layout(LAYOUT, registry.views.all())
        return identity_of(layout.view("large")), len(layout.kept_views)

    assert named() == (large, 2)  # nothing else goes by it
    registry.views.settle(large, "live")
    (larger,) = add(registry, LARGER)
    assert named() == (large, 3)
    registry.views.settle(larger, "live")
    assert named() == (larger, 3)


def test_one_with_a_key_of_its_own_is_told_to_one_after_the_other(registry: Registry) -> None:
    by_id = text_of("by_id", '"n": Count()').replace('["user_id"]', '["id"]')
    large, mine = (identity_of(view_of(text)) for text in (LARGE, by_id))
    registry.views.add("v.py", LARGE, [large])
    registry.views.add("v.py", by_id, [mine], [mine])
    states = ["added", "routing", "backfilling"]
    for state, routed in zip(states, ([large], [large, mine], [large, mine]), strict=True):
        assert [one.state for one in registry.views.all()] == ["backfilling", state]
        assert [one.identity for one in routed_by_now(registry.views.all())] == routed
        if state != "backfilling":
            registry.views.advance(mine, states[states.index(state) + 1])  # type: ignore[arg-type]
    layout = extended_layout(LAYOUT, registry.views.all())
    assert layout.added_keys == (("orders", ("id",)),)
    assert [(t.routed, t.key_number) for t in layout.tables] == [(True, 0), (False, 0), (True, 1)]
    registry.views.settle(mine, "failed", "a disk")
    registry.views.advance(mine, "routing")  # too late
    assert [one.state for one in registry.views.all()] == ["backfilling", "failed"]
    assert extended_layout(LAYOUT, registry.views.all()).added_keys == layout.added_keys  # it keeps its place
    registry.views.say_known("events-1", 12, 34, 5)
    assert registry.views.ingresses() == {"events-1": Ingress(12, 34, 5)}
    registry.views.forget_ingresses()
    assert registry.views.ingresses() == {}
    assert registry.check() == []


def test_a_failed_one_keeps_its_place_and_is_not_read(registry: Registry) -> None:
    large, larger = add(registry, LARGE, LARGER)
    registry.views.settle(larger, "failed", "a disk")
    layout = extended_layout(LAYOUT, registry.views.all())
    assert [table.added for table in layout.tables] == ["", large, larger]
    assert layout.version_of(view_of(LARGER), view_of(LARGER)) is None
    assert identity_of(layout.view("large")) == large


def test_a_start_keeps_what_is_needed_and_drops_the_rest(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    other = text_of("other", '"n": Count()').replace('"orders"', '"returns"')
    failed = text_of("failed", '"n": Count()')
    _, _, failing, larger, _ = add(registry, LARGE, other, failed, LARGER, AT_START)
    registry.views.settle(failing, "failed", "a disk")
    with caplog.at_level(logging.WARNING):
        layout = kept_layout(registry, LAYOUT)
    # Nothing reads `large` as it was; `spend` is of the definitions by now.
    assert [one.identity for one in registry.views.all()] == [larger]
    assert [table.added for table in layout.tables] == ["", larger]
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "view `other`, which was deployed, is not kept any more",
        "view `failed`, which was deployed, is not kept any more",
    ]
    assert "the cluster has no source `returns`" in caplog.messages[0]
    assert "its backfill had failed (a disk)" in caplog.messages[1]


def test_a_start_with_a_key_that_was_brought_in_part_is_refused(registry: Registry) -> None:
    by_id = text_of("by_id", '"n": Count()').replace('["user_id"]', '["id"]')
    mine = identity_of(view_of(by_id))
    registry.views.add("v.py", by_id, [mine], [mine])
    start = compile_layout([], [view_of(AT_START), view_of(by_id)])
    for state in ("added", "backfilling"):
        registry.views.advance(mine, state)  # type: ignore[arg-type]
        with pytest.raises(
            DeclarationError, match=r"view `by_id`: it was deployed, and only a part .* its key \(id\) yet"
        ):
            kept_layout(registry, start)
        assert kept_layout(registry, LAYOUT).added_keys == (("orders", ("id",)),)
    registry.views.settle(mine, "live")
    kept_layout(registry, start)
    assert registry.views.all() == []


MODEL = """
class P:
    def predict(self, features): return [1.0] * len(features.matrix)

m = Model("m", version="1", owner="ml", features=[v["n"]], predictor=P)
"""


@pytest.mark.parametrize("started_with_newer", [True, False])
def test_a_former_version_is_kept_as_long_as_a_model_reads_it(registry: Registry, started_with_newer: bool) -> None:
    made = Definition("m.py", LARGE + MODEL)
    (model,) = made.declared().models
    version = version_of(made, model, {"user_id": "int64"}, memory_bytes=0, predict_us=1.0)
    large, larger = add(registry, LARGE, LARGER)
    for one in (large, larger):
        registry.views.settle(one, "live")
    registry.publish(made, [version])
    start = compile_layout([], [view_of(AT_START), view_of(LARGER)]) if started_with_newer else LAYOUT
    for _ in range(2):
        layout = kept_layout(registry, start)
        kept = [one.identity for one in registry.views.all()]
        assert kept == ([large] if started_with_newer else [large, larger])
        assert identity_of(layout.view("large")) == larger
        assert layout.table_of(view_of(LARGE)).added == large
    registry.retire("m")
    kept_layout(registry, start)
    assert [one.identity for one in registry.views.all()] == ([] if started_with_newer else [larger])


def test_a_text_that_declares_something_else_where_it_is_run_is_refused(registry: Registry) -> None:
    registry.views.add("v.py", LARGE, ["large#0123456789abcdef"])
    with pytest.raises(DeclarationError, match=r"`v.py`: it does not declare view `large` in this process as it did"):
        declared_view(registry.views.all()[0])


def test_it_is_live_when_all_shards_have_it_and_has_failed_when_one_has() -> None:
    def shard(number: int, state: str | None, **more: object) -> dict[str, object]:
        one = {"state": state, "read": 3, "of": 4, "why": "", "history_since_ms": None, **more}
        return {"shard": number, "views": {} if state is None else {"v": one}}

    verdict = verdict_of("v", [shard(0, "whole"), shard(1, None)])
    assert (verdict.state, verdict.progress) == ("backfilling", Progress(3, 4, 1, 2))
    verdict = verdict_of("v", [shard(0, "whole", history_since_ms=5), shard(1, "whole", history_since_ms=9)])
    assert (verdict.state, verdict.history_since_ms) == ("live", 9)
    assert verdict_of("v", [{"shard": 0, "state": "recovering"}]).state == "backfilling"
    stuck = verdict_of("v", [shard(0, None) | {"views_failure": "no registry"}])
    assert str(stuck.progress) == "about to begin, 0 of 1 shards; shard 0: no registry"
    waits = verdict_of("v", [shard(0, "whole"), shard(1, "backfilling", why="no disk; it is tried again")])
    assert (waits.state, str(waits.progress)) == (
        "backfilling", "75 % of 8 records, 1 of 2 shards; shard 1: no disk; it is tried again"
    )  # fmt: skip
    verdict = verdict_of("v", [shard(0, "backfilling"), shard(1, "failed", why="no room")])
    assert (verdict.state, verdict.why) == ("failed", "shard 1: no room")


def test_who_waits_is_told_why_it_is_in_vain(registry: Registry) -> None:
    (large,) = add(registry, LARGE)
    with pytest.raises(Unavailable, match="the cluster has ended; the backfill goes on when it is started again"):
        wait_until_whole(registry, [large], lambda: False)
    registry.views.settle(large, "failed", "shard 1: no room")
    with pytest.raises(Unavailable, match="view `large`: its backfill failed: shard 1: no room; mend that, and start"):
        wait_until_whole(registry, [large], lambda: True)


def test_what_a_running_cluster_cannot_take_is_refused() -> None:
    with nobody(LAYOUT) as client:
        cluster = Running("", LAYOUT, client, spare_words=1_000)
        assert cluster.with_views(Definition("v.py", AT_START)) is cluster
        made = Definition("v.py", LARGER)
        more = cluster.with_views(made)
        assert versions_of(made, more.layout) == [identity_of(view_of(LARGER))]
        assert more.spare_words == 1_000 - more.layout.tables[-1].slot_words
        with pytest.raises(
            DeclarationError, match=r"^views `large`: a cluster that runs has room for 3 words more, and"
        ):
            replace(cluster, spare_words=3).with_views(made)
        with pytest.raises(DeclarationError, match=r"^views `large`: a cluster that runs has no log \(`durability`\)"):
            replace(cluster, spare_words=0).with_views(made)
        twice = Definition("v.py", LARGE + LARGER.partition("timestamp")[2].partition("\n\n")[2].replace("v =", "w ="))
        with pytest.raises(DeclarationError, match="two different views are named `large`"):
            cluster.with_views(twice)


@pytest.mark.parametrize(
    ("word", "other"),
    [
        ('"cents": "int64"', '"cents": "float64"'),
        ('"cents": "int64"', '"cents": "int64", "note": "string"'),
        ('owner="shop"', 'owner="sales"'),
    ],
)
def test_a_file_whose_source_is_another_is_refused_although_no_view_has_changed(word: str, other: str) -> None:
    with nobody(LAYOUT) as client:
        cluster = Running("", LAYOUT, client, spare_words=1_000)
        made = Definition("v.py", AT_START.replace(word, other))
        assert identity_of(view_of(made.text)) in LAYOUT.kept_views
        with pytest.raises(DeclarationError) as refused:
            cluster.with_views(made)
        assert refused.value.message == (
            "definition `v.py`: source `orders` is declared otherwise than the cluster has it; declare it word for "
            "word, or start the cluster with the definition"
        )
        with pytest.raises(DeclarationError, match="two different sources are named `orders`"):
            compile_layout([], [view_of(AT_START), view_of(made.text)])  # as a start would
        of_sources_alone = Definition("s.py", made.text.partition("v = ")[0])
        with pytest.raises(DeclarationError, match=r"^definition `s.py`: source `orders` is declared otherwise"):
            cluster.with_views(of_sources_alone)
