"""The books that record themselves: every call of the front door, with what it was asked and what came of it.

Only these are slower: an engine that does not record has a ``CacheManager`` and a ``HostTier`` as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.memory.admission import Admission
from engine.memory.integers import Int32
from engine.memory.manager import CacheManager
from engine.memory.offload import HostTier, PageFormat, Pages
from engine.memory.page_moves import PageLoad, PageMove
from engine.memory.pages import PageIds
from engine.memory.prefix import EvictedPages, token_vector
from engine.memory.rows import RowGrowth
from engine.memory.scope import CacheScope
from engine.trace.integer_lists import pack
from engine.trace.recorder import Recorder

Asked = dict[str, Any]


class RecordedCacheManager(CacheManager):
    """A ``CacheManager`` that tells a recorder of every call that changes something.

    What only looks is not recorded. A call that raises is recorded with the name of the error.

    Args:
        recorder: is told.
        arguments, options: as for ``CacheManager``.
    """

    def __init__(self, recorder: Recorder, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.recorder = recorder
        settings = signature(CacheManager).bind(*arguments, **options)
        settings.apply_defaults()
        del settings.arguments["max_events"]  # which changes no decision
        self._index = recorder.add_books(self, settings.arguments)
        self._is_inside = False  # a call that was recorded makes this one
        self._taken: list[PageIds] = []
        self._grown = b""  # the rows of the last growth
        self._repeated = f'["grow",{self._index},{{}},{{}}]'

    def attach_host_tier(self, tier: HostTier) -> None:
        """As there."""
        super().attach_host_tier(tier)
        self.recorder.add("tier", self._index, {"pages": tier.capacity_pages}, {})

    def admit(
        self,
        scope: CacheScope,
        token_ids: Int32,
        *,
        most_tokens: int | None = None,
        priority: int = 0,
        counts_hit: bool = True,
    ) -> Admission | None:
        """As there."""

        def asked() -> Asked:
            most = None if most_tokens is None else int(most_tokens)
            options = {"most": most, "priority": int(priority), "counts": bool(counts_hit)}
            return self._sequence("waiting", scope, token_ids) | options

        with self._noted("admit", asked) as outcome:
            options: dict[str, Any] = {"most_tokens": most_tokens, "priority": priority, "counts_hit": counts_hit}
            admission = super().admit(scope, token_ids, **options)
            if admission is not None:
                row = admission.row
                outcome.update(row=row, cached=admission.cached_tokens, loaded=admission.loaded_tokens)
                outcome["held"] = self._print_of(row)
        if admission is not None:
            self.recorder.digests.rename((self._index, "waiting"), (self._index, admission.row))
        return admission

    def share(self, row: int, scope: CacheScope, token_ids: Int32, *, counts_hit: bool = True) -> int:
        """As there."""
        with self._noted(
            "share", lambda: self._of_row(row, scope, token_ids) | {"counts": bool(counts_hit)}
        ) as outcome:
            shared = super().share(row, scope, token_ids, counts_hit=counts_hit)
            outcome.update(tokens=shared, held=self._print_of(row))
        return shared

    def grow(self, rows: npt.ArrayLike, counts: npt.ArrayLike) -> None:
        """As there; a step that repeats the one before it is a line that was made already."""
        if self._is_inside:
            return super().grow(rows, counts)
        if type(counts) is int and counts == 1 and isinstance(rows, np.ndarray) and rows.dtype == np.int32:
            key = rows.tobytes()
            if key == self._grown:
                return self._grow_again(rows)
            self._grown = key
        else:
            self._grown = b""
        with self._noted("grow", lambda: {"rows": pack(rows), "counts": _counts(counts)}):
            super().grow(rows, counts)
        return None

    def _grow_again(self, rows: Int32) -> None:
        """The rows of the last growth grow by one token each: this is done at every step."""
        evicted = self.prefix.evicted_pages
        try:
            super().grow(rows, 1)
        except BaseException as error:
            self._note("grow", dict, {}, evicted, error)
            raise
        if self.prefix.evicted_pages != evicted:
            self._note("grow", dict, {}, evicted, None)
        elif self._taken:
            self.recorder.note_growth(self._index, self._taken[0])
            self._taken = []
        else:
            self.recorder.write(self._repeated)

    def truncate(self, row: int, tokens: int) -> None:
        """As there."""
        with self._noted("truncate", lambda: {"row": int(row), "tokens": int(tokens)}) as outcome:
            super().truncate(row, tokens)
            outcome["held"] = self._print_of(row)

    def mark_computed(self, rows: npt.ArrayLike, tokens: npt.ArrayLike) -> None:
        """As there."""
        with self._noted("computed", lambda: {"rows": pack(rows), "tokens": pack(tokens)}):
            super().mark_computed(rows, tokens)

    def leave_behind(self, rows: npt.ArrayLike) -> None:
        """As there; not recorded where no group has a window, since nothing changes."""
        if not self.page_table.has_windows:
            return super().leave_behind(rows)
        with self._noted("leave", lambda: {"rows": pack(rows)}):
            super().leave_behind(rows)
        return None

    def publish(self, row: int, scope: CacheScope, token_ids: Int32) -> None:
        """As there."""
        with self._noted("publish", lambda: self._of_row(row, scope, token_ids)) as outcome:
            super().publish(row, scope, token_ids)
            outcome.update(held=self._print_of(row), cached=self.prefix.cached_pages)

    def fork(self, row: int, tokens: int) -> int:
        """As there."""
        with self._noted("fork", lambda: {"row": int(row), "tokens": int(tokens)}) as outcome:
            self._is_inside = True
            try:
                child = super().fork(row, tokens)
            finally:
                self._is_inside = False
            outcome.update(row=child, held=self._print_of(child))
        self.recorder.digests.rename((self._index, row), (self._index, child), tokens)
        return child

    def release(self, row: int, scope: CacheScope, token_ids: Int32) -> None:
        """As there."""
        with self._noted("release", lambda: self._of_row(row, scope, token_ids)) as outcome:
            super().release(row, scope, token_ids)
            outcome["cached"] = self.prefix.cached_pages
        self.recorder.digests.forget((self._index, row))

    def take_moves(self) -> list[PageMove]:
        """As there; recorded where there are any."""
        moves = super().take_moves()
        if moves:
            kinds = {"saves": EvictedPages, "loads": PageLoad}
            counts = {name: sum(isinstance(move, kind) for move in moves) for name, kind in kinds.items()}
            self.recorder.add("moves", self._index, {}, counts | {"copies": len(moves) - sum(counts.values())})
        return moves

    def reset_prefix_cache(self) -> None:
        """As there."""
        with self._noted("reset", dict):
            super().reset_prefix_cache()

    def raise_weights_epoch(self, model: str, epoch: int) -> None:
        """As there."""
        with self._noted("epoch", lambda: {"model": self.recorder.model(model), "epoch": int(epoch)}):
            super().raise_weights_epoch(model, epoch)

    def clear(self) -> None:
        """As there."""
        with self._noted("clear", dict):
            super().clear()

    def _take_for(self, growth: RowGrowth) -> PageIds:
        pages = super()._take_for(growth)
        self._taken.append(pages)
        return pages

    @contextmanager
    def _noted(self, what: str, asked: Callable[[], Asked]) -> Iterator[dict[str, Any]]:
        """Records the call that is made within, with what it puts into the dict that it gets."""
        outcome: dict[str, Any] = {}
        evicted, self._taken = self.prefix.evicted_pages, []
        if not self.recorder.is_on:
            yield outcome
            return
        try:
            yield outcome
        except BaseException as error:
            self._note(what, asked, outcome, evicted, error)
            raise
        self._note(what, asked, outcome, evicted, None)

    def _note(
        self, what: str, asked: Callable[[], Asked], outcome: dict[str, Any], evicted: int, error: BaseException | None
    ) -> None:
        if error is not None:
            outcome = {"error": type(error).__name__}
        elif self._taken:
            outcome["pages"] = pack(np.concatenate(self._taken))
        if self.prefix.evicted_pages != evicted:
            outcome["evicted"] = self.prefix.evicted_pages - evicted
        self._taken = []
        try:
            self.recorder.add(what, self._index, asked(), outcome)
        except Exception as fault:  # what was asked was no request at all, and was refused
            if error is None:
                self.recorder.stop(f"a {what} cannot be written: {fault!r}")

    def _of_row(self, row: int, scope: CacheScope, token_ids: Int32) -> Asked:
        return {"row": int(row)} | self._sequence(int(row), scope, token_ids)

    def _sequence(self, name: str | int, scope: CacheScope, token_ids: Int32) -> Asked:
        tokens = self.recorder.tokens((self._index, name), token_vector(token_ids))
        return {"scope": self.recorder.scope(scope), "tokens": tokens}

    def _print_of(self, row: int) -> int:
        """A checksum of the pages of a row: two runs that decide alike have the same."""
        return zlib.crc32(self.page_table.pages_by_group(row).tobytes())


class RecordedHostTier(HostTier):
    """A ``HostTier`` that tells a recorder what is put into it.

    Args:
        recorder: is told.
        budget_bytes, page_format: as for ``HostTier``.
    """

    def __init__(self, recorder: Recorder, budget_bytes: int, page_format: PageFormat) -> None:
        super().__init__(budget_bytes, page_format)
        self._recorder = recorder

    def put(self, scope: CacheScope, token_ids: npt.ArrayLike, first_page: int, data: Pages, group: int = 0) -> int:
        """As there."""
        stored = super().put(scope, token_ids, first_page, data, group)
        if not self._recorder.is_on:
            return stored
        tokens = self._recorder.tokens("tier", token_vector(token_ids))
        asked = {"scope": self._recorder.scope(scope), "tokens": tokens, "first": int(first_page), "group": int(group)}
        self._recorder.add("store", 0, asked, {"stored": stored})
        return stored


def _counts(counts: npt.ArrayLike) -> int | list[int] | str:
    return int(counts) if np.ndim(counts) == 0 else pack(counts)  # type: ignore[arg-type]
