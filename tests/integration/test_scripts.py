"""`LLM` in scripts as people write them: with and without a `__main__` guard, and beside their own processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.slow

ASK = """
from PIL import Image
from mmv1 import LLM, SamplingParams

def ask(model):
    picture = Image.linear_gradient("L").resize((90, 60))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    with LLM(model) as llm:
        (answer,) = llm.chat([{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=5))
    print("ids", *answer.outputs[0].token_ids)
"""

SCRIPTS = {
    "with a guard": """
        if __name__ == "__main__":
            ask(sys.argv[1])
    """,
    "without a guard": """
        ask(sys.argv[1])
    """,
    "never closed": """
        if __name__ == "__main__":
            llm = LLM(sys.argv[1])
            (answer,) = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=5))
            print("ids", *answer.outputs[0].token_ids)
    """,
    "in a spawned process": """
        import multiprocessing

        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=ask, args=(sys.argv[1],))
            process.start()
            process.join()
            sys.exit(process.exitcode)
    """,
    "beside a spawned process": """
        import multiprocessing

        def double(numbers):
            for number in iter(numbers.recv, None):
                numbers.send(2 * number)

        if __name__ == "__main__":
            here, there = multiprocessing.get_context("spawn").Pipe()
            helper = multiprocessing.get_context("spawn").Process(target=double, args=(there,))
            helper.start()
            ask(sys.argv[1])
            here.send(21)
            assert here.recv() == 42
            here.send(None)
            helper.join()
    """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_once_and_ends(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nprint('begins', __name__)\n{ASK}\n{textwrap.dedent(SCRIPTS[name])}")
    result = subprocess.run(
        [sys.executable, str(script), str(tiny_model_dir)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines.count("begins __main__") == 1  # the engine's processes do not run it again
    (ids,) = [line.split()[1:] for line in lines if line.startswith("ids")]
    assert 1 <= len(ids) <= 5
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr, result.stderr
