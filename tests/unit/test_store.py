"""The coordinator's file: what it forgets, and which files it refuses."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from peerload.coordinator.directory import FENCE_S
from peerload.coordinator.store import Store
from peerload.errors import HostError
from peerload.model.offer import SourceId


def test_generations_are_forgotten_once_nobody_could_wake_up_from_them(tmp_path: Path) -> None:
    now_s = [1e9]
    store = Store(f"sqlite:{tmp_path}/peerload.db", lambda: now_s[0])
    for number in range(50):
        source = SourceId(f"host-{number}", 0, "g1")
        store.save(source, 30, b"")
        store.end([source])
    store.save(SourceId("serves", 0, "g1"), 30, b"")
    now_s[0] += 8 * FENCE_S  # it has served for long: what ends now is not old
    store.save(SourceId("serves", 0, "g2"), 30, b"")
    store.prune()
    assert store.generations() == [(SourceId("serves", 0, "g1"), True), (SourceId("serves", 0, "g2"), False)]
    now_s[0] += 1.1 * FENCE_S
    store.close()
    store = Store(f"sqlite:{tmp_path}/peerload.db", lambda: now_s[0])  # opening it forgets as well
    assert store.generations() == [(SourceId("serves", 0, "g2"), False)]
    store.close()


def test_a_file_of_another_schema_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "peerload.db"
    Store(f"sqlite:{path}").close()
    for version, words in ((99, "a newer peerload: its schema is version 99"), (0, "another peerload: its schema is version 0")):
        with sqlite3.connect(path) as db:
            db.execute(f"PRAGMA user_version={version}")
        db.close()
        with pytest.raises(HostError, match=words) as caught:
            Store(f"sqlite:{path}")
        assert str(path) in caught.value.message
        assert "name another file" in caught.value.next_step


def test_a_file_keeps_its_epoch_and_memory_has_a_new_one_each_time(tmp_path: Path) -> None:
    epochs = []
    for url in (f"sqlite:{tmp_path}/peerload.db", f"sqlite:{tmp_path}/peerload.db", "memory", "memory"):
        store = Store(url)
        epochs.append(store.epoch)
        store.close()
    assert epochs[0] == epochs[1]
    assert len(set(epochs)) == 3
