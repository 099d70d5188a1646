"""The part of packaging that needs Python; the metadata is in pyproject.toml.

``kernels/`` is installed as ``fastbf.kernels``. In a checkout the link ``fastbf/kernels`` leads there too. Where git
makes no links it is a text file, so the folder is named here.
"""

from contextlib import suppress
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist


class SdistWithLink(sdist):
    """An sdist with the link ``fastbf/kernels``, so that fastbf can be imported where the sdist is unpacked."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        link = Path(base_dir, "fastbf", "kernels")
        with suppress(OSError):  # some systems make no links; what is installed from the sdist is the same
            link.symlink_to(Path("..", "kernels"), target_is_directory=True)


setup(
    packages=sorted({*find_packages(include=["fastbf", "fastbf.*"]), "fastbf.kernels"}),
    package_dir={"fastbf.kernels": "kernels"},
    cmdclass={"sdist": SdistWithLink},
)
