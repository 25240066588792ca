"""What one who only takes the events of a prefix cache knows of it."""

from engine.memory.prefix import EventsMissed, PagesCached, PagesLost


class CacheMirror:
    """The scope and the tokens up to its end, by page."""

    def __init__(self, cache):
        self.cache = cache
        self.prefixes = {}

    def follow(self):
        """Takes the events; returns whether some were missed, and all was read anew."""
        size, was_missed = self.cache.page_size, False
        for event in self.cache.take_events():
            if isinstance(event, PagesCached):
                before = ()
                if event.parent_page:
                    scope, before = self.prefixes[event.parent_page]
                    assert scope == event.scope
                tokens = event.token_ids.tolist()
                assert len(tokens) == size * len(event.pages) > 0
                for index, page in enumerate(event.pages.tolist()):
                    self.prefixes[page] = event.scope, (*before, *tokens[: (index + 1) * size])
            elif isinstance(event, PagesLost):
                for page in event.pages.tolist():
                    self.prefixes.pop(page, None)
            elif isinstance(event, EventsMissed):
                self.prefixes, was_missed = self.found(), True
            else:
                gone = [page for page, (scope, _) in self.prefixes.items() if concerns(event, scope)]
                for page in gone:
                    del self.prefixes[page]
        return was_missed

    def found(self):
        """The same from the cache itself."""
        size, found = self.cache.page_size, {}
        for scope, tokens, pages, group in self.cache.runs():
            first = len(tokens) // size - len(pages)
            for index, page in enumerate(pages.tolist()):
                if group == 0:
                    found[page] = scope, tuple(tokens[: (first + index + 1) * size].tolist())
        return found


def concerns(event, scope):
    if event.scope is not None:
        return scope == event.scope
    return event.model is None or (scope.model == event.model and scope.weights_epoch < event.weights_epoch)
