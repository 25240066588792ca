"""The decisions of the control plane, written down: to be played again, made smaller, counted and seen.

Books that record are a ``CacheManager`` and a ``HostTier`` like others. An engine has them where it is asked to record;
it never pays for this room where it is not. Nothing here touches a buffer or imports jax.

    recorder        Recorder: writes lines, bounded
    recorded_books  RecordedCacheManager, RecordedHostTier: the books that tell a recorder of every call
    page_digests    sequences of tokens by keyed digests of their pages
    integer_lists   short and long lists of integers
    trace_file      reads lines and checks their form
    resolver        makes each event stand alone
    player          Player: plays events on fresh books
    replay          plays a whole trace and checks it
    shrink          makes a failing trace small
    trace_stats     counts what is in a trace
    page_code       what a picture shows of each page
    event_text      what happened, in the words of a person
    page_history    every page of a trace at every step
    page_html       the page that shows them, made of page/
    trace_commands  ``python -m engine trace``
"""

from engine.trace.recorded_books import RecordedCacheManager, RecordedHostTier
from engine.trace.recorder import Recorder
from engine.trace.replay import replay
from engine.trace.trace_file import read_trace

__all__ = ["RecordedCacheManager", "RecordedHostTier", "Recorder", "read_trace", "replay"]
