"""Packs configs/ and the scripts of the console commands into a wheel; pyproject.toml has the rest.

They stay at the top level of a checkout, where people look for them, and an editable installation
uses those (``causal_lm.config.CONFIG_DIR``).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PATTERNS = ("configs/**/*.yaml", "scripts/evaluate.py", "scripts/export.py",
            "scripts/generate.py", "scripts/preflight.py")  # fmt: skip


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for pattern in PATTERNS:
            for path in Path().glob(pattern):
                target = Path(self.build_lib, "causal_lm", path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


setup(cmdclass={"build_py": BuildWithConfigs})
