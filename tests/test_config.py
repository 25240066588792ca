import math

import numpy as np
import pytest

from engine.config import EngineConfig, read_toml, require_split
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
        ({"max_running_requests": 0}, "from 1 to 65536"),
        ({"chunked_prefill_size": -1}, "chunked_prefill_size=-1"),
        ({"context_length": 0}, "context_length=0"),
        ({"max_total_tokens": 100, "page_size": 16}, "use 96 or 112"),
        ({"max_total_tokens": 5, "page_size": 16}, "use 16$"),
        ({"max_running_requests": 2**16 + 1}, "from 1 to 65536"),
        ({"chunked_prefill_size": 2**20 + 1}, "from 1 to 1048576"),
        ({"max_total_tokens": 2**31, "page_size": 1}, "from 1 to 2147483391"),
        ({"context_length": 2**31}, "from 1 to 2147483391"),
        ({"host_tier_bytes": 2**46 + 1}, f"from 0 to {2**46}"),
        ({"tp": 2**16 + 1}, "from 1 to 65536"),
        ({"prefix_cache_dir": 5, "host_tier_bytes": 1 << 20}, "prefix_cache_dir=5 must be the path"),
        ({"dtype": np.dtype("float32")}, "dtype=dtype"),
        ({5: 1}, "unknown key 5"),
        ({"mem_fraction_static": 1.0}, "between 0 and 1"),
        ({"mem_fraction_static": "most"}, "mem_fraction_static='most'"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(values, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_mapping(values)


COUNTS = (
    "page_size", "max_total_tokens", "max_running_requests", "chunked_prefill_size", "context_length",
    "host_tier_bytes", "tp", "dp", "cp",
)  # fmt: skip
NO_COUNTS = (True, np.int64(16), 16.0, "16", math.nan, math.inf, -1, -(2**63), 2**63, 10**5000, [16], np.arange(2))


@pytest.mark.parametrize("value", NO_COUNTS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_that_is_none_or_out_of_bounds_is_refused_by_its_name(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}=.* must be a whole number"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    "value",
    [True, "0.5", math.nan, math.inf, -0.5, 0.0, 1.0, 10**5000, None, np.arange(2)],
    ids=lambda value: type(value).__name__,
)
def test_a_share_that_is_none_is_refused_by_its_name(value):
    with pytest.raises(ConfigError, match=r"^mem_fraction_static=.* must lie between 0 and 1"):
        EngineConfig(mem_fraction_static=value)


def test_a_split_of_a_large_number_is_refused_with_the_nearest_that_would_do():
    size = 2**4 * 3**3 * 5 * 7 * 11 * 13  # of 2 * 160 divisors
    with pytest.raises(ConfigError, match="dp=97 does not divide") as refused:
        require_split("dp", 97, {"rows": size, "tokens": 2 * size})
    named = [int(word) for word in str(refused.value).split("use dp ")[1].split(", ")]
    assert len(named) == 8
    assert all(size % n == 0 for n in named)
    assert not any(size % n == 0 for n in range(named[0], named[-1]) if n not in named)
    assert named[0] < 97 < named[-1]


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
        ("[engine]\npage_size = " + "9" * 5000, "not valid TOML"),
        ("[engine]\nx = " + "[" * 100_000, "not valid TOML"),
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
