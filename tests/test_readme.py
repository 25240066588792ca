import re
from pathlib import Path

import jax
import numpy as np

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_embedding_example_runs_as_printed():
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "ReqToTokenPool" in code]
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["out"].shape == (100, 8, 64)
    assert np.isfinite(jax.device_get(names["out"])).all()
    assert names["allocator"].available_size() == 4096
