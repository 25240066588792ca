import pytest

from engine.serving.llm import LLM


@pytest.fixture(scope="session")
def llm():
    """The small model that ships, for all tests of the server: each runs a server of its own over it."""
    return LLM(max_running_requests=4, chunked_prefill_size=16)


@pytest.fixture(autouse=True)
def _nothing_stays(request):
    """After each test no page is held by a request, if the engine was there at all."""
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm")
        engine.check_integrity()
        assert engine.metrics().running == engine.metrics().waiting == 0
