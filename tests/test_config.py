import pytest

from engine.config import EngineConfig, read_toml
from engine.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"page_sise": 16}, "did you mean 'page_size'"),
        ({"zzz": 1}, "known keys: attention_impl"),
        ({"model": 5}, "model=5 must be the path"),
        ({"dtype": "float8"}, "choose one of auto, float32"),
        ({"kv_cache_dtype": 3}, "kv_cache_dtype=3"),
        ({"attention_impl": "cuda"}, "choose one of auto, reference, xla, cpu, tpu, gpu"),
        ({"page_size": 0}, "from 1 to 256"),
        ({"page_size": 257}, "from 1 to 256"),
        ({"page_size": 16.0}, "page_size=16.0 must be a whole number"),
        ({"page_size": True}, "page_size=True"),
        ({"max_running_requests": 0}, "at least 1"),
        ({"chunked_prefill_size": -1}, "chunked_prefill_size=-1"),
        ({"context_length": 0}, "context_length=0"),
        ({"max_total_tokens": 100, "page_size": 16}, "use 96 or 112"),
        ({"max_total_tokens": 5, "page_size": 16}, "use 16$"),
        ({"mem_fraction_static": 1.0}, "between 0 and 1"),
        ({"mem_fraction_static": "most"}, "mem_fraction_static='most'"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(values, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_mapping(values)


def test_a_good_configuration_is_kept_as_given():
    config = EngineConfig.from_mapping({"page_size": 64, "max_total_tokens": 640, "dtype": "bfloat16"})
    assert (config.page_size, config.max_total_tokens, config.dtype) == (64, 640, "bfloat16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[engine\n", "not valid TOML"),
        ("[engin]\npage_size = 16\n", "did you mean 'engine'"),
        ("engine = 3\n", r"must be a table, \[engine\]"),
        (None, "cannot read the configuration"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, message):
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_toml(path)


def test_the_default_configuration_is_valid():
    EngineConfig()
