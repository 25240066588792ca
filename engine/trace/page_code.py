"""What a picture shows of each page, as three integers: what it is, whose it is, and which page comes before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.memory.integers import Int32
from engine.memory.page_map import PageMap
from engine.memory.scope import CacheScope

# A code is state + 4 * (several rows hold it) + 8 * group + 2048 * (tenant + 1), 0 where no tenant has it cached.
SHARED_BIT, GROUP_BIT, TENANT_BIT = 2, 3, 11
MOST_GROUPS, MOST_TENANTS = 2 ** (TENANT_BIT - GROUP_BIT), 2**19
MOST_PAGES = 2**18  # of a replica that are shown


def code_pages(pages: PageMap, owners: Mapping[int, int], tenants: Mapping[CacheScope, int | None]) -> Int32:
    """Every page of a map, int32 ``[3, n]``: its code, its owner and the page before it.

    Args:
        pages: the map; of a large pool the first ``MOST_PAGES`` are shown.
        owners: a number from 1 for each row that holds pages, which becomes the owner; 0 is nobody.
        tenants: the tenant of each scope, a number from 0, or None.
    """
    count = min(pages.state.size, MOST_PAGES + 1)
    of_row = np.zeros(int(pages.row.max(initial=0)) + 2, np.int32)  # the last entry is that of NOBODY, -1
    for row, owner in owners.items():
        if row < of_row.size - 1:
            of_row[row] = owner
    of_scope = np.zeros(len(pages.scopes) + 1, np.int32)
    for index, scope in enumerate(pages.scopes):
        tenant = tenants.get(scope)
        of_scope[index] = 0 if tenant is None else 1 + tenant % MOST_TENANTS
    code = pages.state.astype(np.int32) + ((pages.rows > 1) << SHARED_BIT)
    code += np.minimum(pages.group, MOST_GROUPS - 1) << GROUP_BIT
    code += of_scope[pages.scope] << TENANT_BIT
    coded = np.stack([code, of_row[pages.row], pages.before])[:, :count].astype(np.int32)
    coded[2][coded[2] >= count] = 0
    return coded


def about_books(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture has to know of a replica's books: pages shown, pages in all, tokens per page, windows.

    Args:
        settings: ``size``, ``page_size`` and ``windows`` as ``CacheManager`` takes them.
    """
    pages = settings["size"] // settings["page_size"]
    shown = min(pages, MOST_PAGES)
    return {"pages": shown, "all": pages, "page_size": settings["page_size"], "windows": list(settings["windows"])}
